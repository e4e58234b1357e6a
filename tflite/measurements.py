"""What a benchmark is told (a plan) and what it finds (measurements), whatever device it runs on.

A device implements `Device.run`. Tables, JSON and pictures are made from `Measurements` alone.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from tflite.inspect import Description

T = TypeVar("T")

_MOST_THREADS = 256  # with 100,000 the LiteRT runtime dies of a segmentation fault


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        graphs: .tflite files; the first is the one that ratios refer to.
        num_threads: thread counts; each graph is measured with each.
        runs: recorded runs per graph and thread count.
        warmup: unrecorded runs before the first round.
        runs_per_round: recorded runs before the next graph's turn. Each turn starts with one unrecorded run, because
            the turns of the others emptied the caches.
        cooldown_seconds: pause after each round.
        profile: also record time per operator.
        profile_runs: profiled invocations; the profile averages the faster half.
        inputs: `.npy` files, one per model input; None draws random inputs.
        seed: of the random inputs.
    """

    graphs: tuple[Path, ...]
    num_threads: tuple[int, ...] = (1,)
    runs: int = 50
    warmup: int = 10
    runs_per_round: int = 10
    cooldown_seconds: float = 0.0
    profile: bool = True
    profile_runs: int = 20
    inputs: tuple[Path, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.graphs:
            raise ValueError("no graph given: name at least one .tflite file, as in --graph=model.tflite.")
        if not self.num_threads or any(threads < 1 for threads in self.num_threads):
            given = ",".join(map(str, self.num_threads))
            raise ValueError(f"num_threads is {given or 'empty'}; give positive numbers, as in --num_threads=1,2.")
        if max(self.num_threads) > _MOST_THREADS:
            raise ValueError(f"num_threads is {max(self.num_threads)}; at most {_MOST_THREADS} are allowed.")
        if len(set(self.num_threads)) != len(self.num_threads):
            raise ValueError(f"num_threads names a count twice: {','.join(map(str, self.num_threads))}.")
        for name, least in (("runs", 1), ("warmup", 0), ("runs_per_round", 1), ("profile_runs", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if not 0 <= self.cooldown_seconds < float("inf"):
            raise ValueError(f"cooldown_seconds is {self.cooldown_seconds}; it must be 0 or more.")

    @property
    def labels(self) -> tuple[str, ...]:
        """A short distinct name per graph: the file's stem, else its path, numbered where that repeats too."""
        stems = [graph.stem for graph in self.graphs]
        names = [str(graph) if stems.count(graph.stem) > 1 else graph.stem for graph in self.graphs]
        return tuple(
            f"{name} #{names[: index + 1].count(name)}" if names.count(name) > 1 else name
            for index, name in enumerate(names)
        )

    @property
    def rounds(self) -> tuple[int, ...]:
        """Recorded runs of each round; they add up to `runs`."""
        full, rest = divmod(self.runs, self.runs_per_round)
        return (self.runs_per_round,) * full + ((rest,) if rest else ())


@dataclass(frozen=True)
class Node:
    """Time of one operator: `where` is "builtin" or "delegate <partition>", `index` its number in there."""

    op: str
    where: str
    index: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """Mean times per invocation over the faster half of the profiled ones (`all_runs`: over all of them).

    `runs` is how many that is; `unattributed_seconds` is what no operator accounts for.
    """

    runs: int
    invoke_seconds: float
    unattributed_seconds: float
    nodes: tuple[Node, ...]
    all_runs: bool = False

    def by_type(self) -> dict[str, tuple[int, float]]:
        """Operator type to number of nodes and seconds per invocation, slowest first."""
        totals: dict[str, tuple[int, float]] = {}
        for node in self.nodes:
            count, seconds = totals.get(node.op, (0, 0.0))
            totals[node.op] = count + 1, seconds + node.seconds
        return dict(sorted(totals.items(), key=lambda item: (-item[1][1], item[0])))

    def slowest(self, count: int) -> list[Node]:
        """The `count` slowest nodes, slowest first."""
        return sorted(self.nodes, key=lambda node: -node.seconds)[:count]


@dataclass(frozen=True)
class Statistics:
    """Of recorded latencies, in seconds; p90 is linearly interpolated, deviation is the sample's.

    `median` and `p90` are None where a device reports neither the latencies nor these.
    """

    runs: int
    min: float
    median: float | None
    p90: float | None
    mean: float
    standard_deviation: float

    @property
    def typical(self) -> float:
        """The median, or the mean where there is none."""
        return self.mean if self.median is None else self.median


@dataclass(frozen=True)
class Delegation:
    """What a delegate took of a graph, as the device itself said; `partitions` is None where it did not say."""

    delegate: str
    nodes: int | None
    delegated_nodes: int | None
    partitions: int | None


@dataclass
class Measurement:
    """One graph at one thread count with one backend; filled round by round.

    Attributes:
        graph: index into the plan's graphs.
        label: the graph's short name.
        num_threads: threads.
        backend: what computes: "XNNPACK", "GPU", "CPU" (the runtime's own kernels), "WASM" or "WebGPU".
        load_seconds: creating the interpreter and allocating tensors, which packs weights; the file may be cached.
        first_run_seconds: the first invocation.
        rounds: recorded latencies in seconds, one list per round; empty where the device reports no single latency.
        round_statistics: one summary per round, where that is all that the device reports.
        invocations_per_latency: a clock too coarse for one invocation times several, in some rounds fewer than in
            others, here the most; latencies are per invocation.
        peak_bytes: the largest resident size of the process that held this model alone.
        baseline_bytes: the same process's resident size before it loaded the model.
        output_error: the greatest difference of the outputs from those of this computer's LiteRT, relative to their
            largest value, where the device hands outputs back.
        delegation: what the device said of its delegate; None: see the graph's description.
        profile: time per operator.
        profile_error: why there is none.
    """

    graph: int
    label: str
    num_threads: int
    load_seconds: float
    first_run_seconds: float
    backend: str = "XNNPACK"
    baseline_bytes: int | None = None
    peak_bytes: int | None = None
    rounds: list[list[float]] = field(default_factory=list)
    round_statistics: list[Statistics] = field(default_factory=list)
    invocations_per_latency: int = 1
    output_error: float | None = None
    delegation: Delegation | None = None
    profile: Profile | None = None
    profile_error: str | None = None

    @property
    def latencies(self) -> list[float]:
        """All recorded latencies in seconds, in order."""
        return [latency for latencies in self.rounds for latency in latencies]

    @property
    def statistics(self) -> Statistics | None:
        """Over all rounds; None before the first."""
        return summarize(self.latencies) or pooled(self.round_statistics)

    @property
    def round_latencies(self) -> list[float]:
        """The typical latency of each round in seconds: its median, or its mean where the device reports no median."""
        summaries = [summarize(latencies) for latencies in self.rounds] or self.round_statistics
        return [summary.typical for summary in summaries if summary]

    @property
    def model_bytes(self) -> int | None:
        """Peak above the baseline: what loading and running this model took."""
        if self.peak_bytes is None or self.baseline_bytes is None:
            return None
        return max(0, self.peak_bytes - self.baseline_bytes)


@dataclass
class Measurements:
    """Everything one benchmark found.

    Attributes:
        device: where. Always `kind` (host, adb, browser), `name` (as a person calls it), `runtime`, `date` (ISO, UTC)
            and `headline` (the lines that stand above tables); beside them what that kind of device tells of itself.
        plan: what was to be measured.
        descriptions: one per graph.
        measurements: one per graph, thread count and backend.
        interrupted: stopped early, by Ctrl-C or by `failure`.
        failure: the one line that says what ended it: a phone that was unplugged.
        warnings: what a reader must know to judge the figures.
        exports: for each graph what its export says of it (`tflite.results.read_export`), or None.
    """

    device: dict[str, Any]
    plan: Plan
    descriptions: tuple[Description, ...]
    measurements: list[Measurement]
    interrupted: bool = False
    failure: str | None = None
    warnings: list[str] = field(default_factory=list)
    exports: tuple[dict[str, Any] | None, ...] = ()


class Device(Protocol):
    """Something that can run a plan."""

    def run(self, plan: Plan) -> Measurements:
        """Measures. Ctrl-C ends it early with what has been measured, marked as interrupted.

        Raises:
            UserError: a file or the device cannot be used.
        """


def summarize(latencies: Sequence[float]) -> Statistics | None:
    """Statistics of latencies in seconds; None of none."""
    if not latencies:
        return None
    return Statistics(
        runs=len(latencies),
        min=min(latencies),
        median=statistics.median(latencies),
        p90=float(np.percentile(latencies, 90)),
        mean=statistics.fmean(latencies),
        standard_deviation=statistics.stdev(latencies) if len(latencies) > 1 else 0.0,
    )


def pooled(rounds: Sequence[Statistics]) -> Statistics | None:
    """Statistics over several rounds of which only summaries are known; None of none.

    Runs, minimum, mean and standard deviation are those of all runs together; the median is the median of the rounds'
    medians, and p90 is not known.
    """
    if not rounds:
        return None
    runs = sum(one.runs for one in rounds)
    mean = sum(one.runs * one.mean for one in rounds) / runs
    squares = sum((one.runs - 1) * one.standard_deviation**2 + one.runs * (one.mean - mean) ** 2 for one in rounds)
    medians = [one.median for one in rounds if one.median is not None]
    return Statistics(
        runs=runs,
        min=min(one.min for one in rounds),
        median=statistics.median(medians) if len(medians) == len(rounds) else None,
        p90=None,
        mean=mean,
        standard_deviation=math.sqrt(squares / (runs - 1)) if runs > 1 else 0.0,
    )


@dataclass(frozen=True)
class Ratio:
    """Latency relative to the first graph at equal threads and backend, paired by round: median, least and greatest."""

    median: float
    min: float
    max: float


def rotated(turns: list[T], number: int) -> list[T]:
    """The turns of round `number`: each round starts with another one, so that drift of the machine meets all alike."""
    start = number % len(turns)
    return turns[start:] + turns[:start]


def ratio(measurement: Measurement, reference: Measurement) -> Ratio | None:
    """Compares round by round (medians of the same round), so that slow drift of the device cancels."""
    pairs = zip(measurement.round_latencies, reference.round_latencies, strict=False)
    ratios = [own / other for own, other in pairs]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios)) if ratios else None


def reference_of(measurements: Measurements, measurement: Measurement) -> Measurement:
    """The first graph's measurement at the same thread count and backend."""
    return next(
        other
        for other in measurements.measurements
        if (other.graph, other.num_threads, other.backend) == (0, measurement.num_threads, measurement.backend)
    )

"""One interleaved run of all workers, and what it says about each."""

import contextlib
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.peers.preparation import ROOT, Prepared
from benchmarks.peers.programs import PROGRAMS, TOLERANCES, Variant
from mobiatt_tf.errors import UserError
from tflite.measurements import Measurement, ratio, rotated, summarize
from tflite.process import Worker

RUNS_PER_ROUND = 3
_WARMUP = 3
_LOAD_TIMEOUT_SECONDS = 900  # torch.compile takes minutes


@dataclass
class Row:
    """One variant at one number of threads.

    Attributes:
        variant: which.
        measurement: latencies by round.
        difference: largest absolute difference from the reference logits, over the largest of these; None: no network.
        versions: of the packages that ran it.
        cpu_seconds, wall_seconds: processor time of all threads and elapsed time of the recorded runs.
    """

    variant: Variant
    measurement: Measurement
    difference: float | None
    versions: dict[str, str]
    cpu_seconds: float = 0.0
    wall_seconds: float = field(default=0.0)


def difference(logits: np.ndarray, reference: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute reference; infinite where a logit is not a number."""
    if logits.shape != reference.shape or not np.isfinite(logits).all():
        return float("inf")
    return float(np.max(np.abs(logits - reference)) / max(float(np.max(np.abs(reference))), 1e-30))


def measure(
    prepared: list[Prepared], images: Path, num_threads: list[int], runs: int
) -> tuple[list[Row], dict[tuple[Variant, int], str]]:
    """Loads every variant at every number of threads in a process of its own, then runs them in turns.

    All are loaded first; each round starts with another one, so that drift of the machine meets all alike. What does
    not load, or gives other logits than the reference, is not timed.

    Returns:
        The rows, and why the others are missing.

    Raises:
        UserError: a process ended in the middle of the run.
    """
    rows: list[Row] = []
    workers: list[Worker] = []
    skipped: dict[tuple[Variant, int], str] = {}
    wanted = [(one, threads) for threads in num_threads for one in prepared]
    with contextlib.ExitStack() as stack:
        for one, threads in progress(wanted, "load"):
            worker = stack.enter_context(_worker(one, threads))
            try:
                rows.append(_load(worker, one, images, threads, len(rows)))
                workers.append(worker)
            except UserError as error:
                skipped[one.variant, threads] = reason = str(error).removeprefix(f"{worker.subject}: ")
                tqdm.write(f"skipped: {worker.subject}: {reason}")
                worker.close()
        _rounds(rows, workers, runs)
    return rows, skipped


def _worker(one: Prepared, threads: int) -> Worker:
    program = PROGRAMS[one.variant.program]
    environment: dict[str, Any] = {"python": str(one.python), "path": [str(ROOT)]} if one.python else {}
    subject = f"{one.variant}, {threads} thread{'s' * (threads > 1)}"
    return Worker(subject, module="benchmarks.peers.worker", runtime=program.runtime, **environment)


def _load(worker: Worker, one: Prepared, images: Path, threads: int, index: int) -> Row:
    """Raises: UserError: it cannot be loaded, or its logits are not the reference's."""
    loaded = worker.request(
        "load",
        timeout_seconds=_LOAD_TIMEOUT_SECONDS,
        runtime=PROGRAMS[one.variant.program].runtime,
        source=one.source,
        images=str(images.absolute()),
        num_threads=threads,
    )
    found = None
    if one.reference is not None:
        found = difference(np.asarray(loaded["logits"]), one.reference)
        allowed = TOLERANCES[one.variant.format]
        if not found <= allowed or np.isinf(found):
            raise UserError(f"its logits differ from the reference by {found:.2g} of the largest; {allowed} is allowed")
    worker.request("invoke", unrecorded=_WARMUP, recorded=0)
    measurement = Measurement(index, str(one.variant), threads, loaded["load_seconds"], loaded["first_run_seconds"])
    return Row(one.variant, measurement, found, loaded["versions"])


def _rounds(rows: list[Row], workers: list[Worker], runs: int) -> None:
    turns = list(zip(rows, workers, strict=True))
    full, rest = divmod(runs, RUNS_PER_ROUND)
    rounds = [RUNS_PER_ROUND] * full + [rest] * bool(rest)
    schedule = [(count, turn) for number, count in enumerate(rounds) for turn in rotated(turns, number)]
    for count, (row, worker) in progress(schedule, "measure"):
        # The turns of the others emptied the caches.
        found = worker.request("invoke", unrecorded=1, recorded=count)
        row.measurement.rounds.append(found["latencies"])
        row.cpu_seconds += found["cpu_seconds"]
        row.wall_seconds += found["wall_seconds"]


def progress(items: list[Any], name: str) -> "tqdm[Any]":
    """The items, with a bar on standard error that shows the time left."""
    return tqdm(items, desc=name, leave=False, mininterval=0.5 if sys.stderr.isatty() else 30)


def reference_of(rows: list[Row], threads: int) -> Row | None:
    """What ratios refer to: litert-torch's softmax host in float32, else our softmax host, at as many threads."""
    for program in ("litert_torch", "ours"):
        for row in rows:
            if row.variant == Variant(program, "softmax", "float32") and row.measurement.num_threads == threads:
                return row
    return None


def to_json(rows: list[Row]) -> list[dict[str, Any]]:
    """One object per row: what it is, latency in seconds, ratio to the reference, and how busy the processor was."""
    values = []
    for row in rows:
        reference = reference_of(rows, row.measurement.num_threads)
        relative = ratio(row.measurement, reference.measurement) if reference else None
        statistics = summarize(row.measurement.latencies)
        values.append(
            {
                **asdict(row.variant),
                "num_threads": row.measurement.num_threads,
                "median_seconds": statistics.median if statistics else None,
                "p90_seconds": statistics.p90 if statistics else None,
                "ratio": asdict(relative) if relative else None,
                "cpu_per_wall": row.cpu_seconds / row.wall_seconds if row.wall_seconds else None,
                "difference": row.difference,
                "versions": row.versions,
            }
        )
    return values

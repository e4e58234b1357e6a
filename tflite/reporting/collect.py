"""Reads benchmark.json and evaluation.json files and joins them: latency, accuracy and tokens of the same graph.

A graph is known by the SHA-256 of its file, never by its name.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mobiatt_tf import files
from mobiatt_tf.errors import UserError
from tflite import beside, measurements, results, summary
from tflite.inspect import Description
from tflite.measurements import Measurement, Measurements, Ratio
from tflite.reporting import evaluations
from tflite.reporting.evaluations import Accuracy, Evaluated, check_share

_WHAT = "a benchmark.json of tflite.benchmark or an evaluation.json of mobiatt_tf.training.evaluate"
_KINDS = {"host": "computer", "adb": "Android, over adb", "browser": "browser"}


@dataclass(frozen=True)
class Graph:
    """One file.

    Attributes:
        number: from 1, in the order of the results; charts write it beside markers.
        name: distinct among the graphs.
        description: of the first result that has it.
        tokens: of each stage with attention, as its export says; empty where that is not known.
        format: as its export says, or None.
        model: likewise.
        target: likewise.
        accuracies: one for each set of images, those of evaluations first.
    """

    number: int
    name: str
    description: Description
    tokens: tuple[int, ...]
    format: str | None
    model: str | None
    target: str | None
    accuracies: tuple[Accuracy, ...]

    @property
    def most_tokens(self) -> int | None:
        """Tokens of the stage that has most of them."""
        return max(self.tokens, default=None)

    @property
    def pixels(self) -> int | None:
        """Height times width of the first input [1, height, width, channels]; None where it is no image."""
        shape = self.description.inputs[0].shape if self.description.inputs else ()
        return shape[1] * shape[2] if len(shape) == 4 and min(shape[1:3]) > 0 else None


@dataclass(frozen=True)
class Result:
    """One benchmark.json; `name` tells its device from those of the other results, `marks` say why not to quote it."""

    number: int
    path: Path
    name: str
    found: Measurements
    marks: tuple[str, ...]

    @property
    def kind(self) -> str:
        """What sort of device it was."""
        return _KINDS.get(self.found.device["kind"], self.found.device["kind"])

    @property
    def runtime(self) -> str:
        """Name and version of what ran the graphs."""
        return str(self.found.device["runtime"])

    @property
    def date(self) -> str:
        """When, in UTC, to the minute."""
        return str(self.found.device["date"])[:16].replace("T", " ")


@dataclass(frozen=True)
class Spread:
    """A range in seconds: `what` is "quartiles" of the runs or "rounds", the least and greatest round."""

    low: float
    high: float
    what: str


@dataclass(frozen=True)
class Entry:
    """One measurement: a graph on a device, at one thread count and backend.

    Attributes:
        result: where it stands.
        graph: what was measured.
        measurement: how it ran.
        statistic: what `seconds` is: "median", "median of round medians" or "mean".
        seconds: the typical latency.
        spread: around it, or None.
        to_first_graph: latency relative to the same result's first graph.
        to_first_device: relative to the same file in the first result, see `tflite.beside.pairs`.
        doubtful: the profile says little about the latency.
    """

    result: Result
    graph: Graph
    measurement: Measurement
    statistic: str
    seconds: float
    spread: Spread | None
    to_first_graph: Ratio | None
    to_first_device: float | None
    doubtful: bool

    @property
    def setting(self) -> str:
        """Backend and threads, as in "XNNPACK, 4 threads"."""
        return setting(self.measurement)


@dataclass(frozen=True)
class Report:
    """Everything that the page shows; `notes` are what the reader of the page must know about the files."""

    results: tuple[Result, ...]
    graphs: tuple[Graph, ...]
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]

    def of(self, result: Result) -> list[Entry]:
        """The result's measurements, in its order."""
        return [entry for entry in self.entries if entry.result is result]


def setting(measurement: Measurement) -> str:
    """Backend and threads, as in "XNNPACK, 4 threads"."""
    plural = "" if measurement.num_threads == 1 else "s"
    return f"{measurement.backend}, {measurement.num_threads} thread{plural}"


def collect(paths: Sequence[Path]) -> Report:
    """Reads and joins the files.

    Args:
        paths: benchmark.json and evaluation.json in any order; ratios between devices refer to the first benchmark.

    Raises:
        UserError: no file is given, one is missing, damaged or something else, or none is a benchmark.
    """
    if not paths:
        raise UserError(f"No file is given: give {_WHAT}, or several.")
    notes: list[str] = []
    benchmarks: list[tuple[Path, Measurements]] = []
    evaluated: list[Evaluated] = []
    seen: dict[str, Path] = {}
    for path in paths:
        content = _read(path)
        digest = hashlib.sha256(content).hexdigest()
        if digest in seen:
            notes.append(f"{path} holds the same as {seen[digest]} and is shown once.")
            continue
        seen[digest] = path
        try:
            value = files.read_json(path)
            json.dumps(value, ensure_ascii=False).encode()
        except RecursionError:
            raise UserError(f"{path} is not {_WHAT}: its values are nested too deep.") from None
        except UnicodeEncodeError as error:
            raise UserError(f"{path} is damaged: it holds text that is no Unicode ({error.reason}).") from None
        if isinstance(value, dict) and "results" in value and "dataset" in value:
            evaluated += evaluations.read(path, value)
        else:
            benchmarks.append((path, _benchmark(path, value)))
    if not benchmarks:
        raise UserError(f"{', '.join(map(str, paths))}: no benchmark is among them. Give a benchmark.json as well.")
    found = [
        Result(index + 1, path, name, measured, _marks(measured))
        for index, ((path, measured), name) in enumerate(zip(benchmarks, _device_names(benchmarks), strict=True))
    ]
    graphs = _graphs(found, evaluated, notes)
    entries = [entry for result in found for entry in _entries(result, found[0], graphs)]
    ordered = sorted({graph.number: graph for graph in graphs.values()}.values(), key=lambda graph: graph.number)
    return Report(tuple(found), tuple(ordered), tuple(entries), tuple(notes))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None


def _benchmark(path: Path, value: Any) -> Measurements:
    if not isinstance(value, dict) or value.get("kind") != results.KIND:
        hint = " An older version of the benchmark wrote it: measure again." if results.is_benchmark(value) else ""
        raise UserError(f"{path} is neither {_WHAT}.{hint}")
    found = results.checked(value, path)
    try:
        _check_numbers(found)
        results.to_json(found)  # every derived figure can be had
    except (ValueError, TypeError, ArithmeticError, LookupError, StopIteration) as error:
        what = str(error) or type(error).__name__
        raise UserError(f"{path} is damaged: {what}. Measure again.") from error
    return found


def _check_numbers(found: Measurements) -> None:
    """Raises ValueError for figures that no benchmark writes and no chart can show."""
    if not any(measurement.statistics for measurement in found.measurements):
        raise ValueError("it holds no latency")
    seen = set()
    for measurement in found.measurements:
        place = (measurement.graph, measurement.num_threads, measurement.backend)
        if place in seen:
            raise ValueError(f"graph {measurement.graph} stands there twice with {setting(measurement)}")
        seen.add(place)
        statistics = measurement.statistics
        if statistics and min(statistics.min, statistics.typical) <= 0:
            raise ValueError(f"a latency of {measurement.label} is not above 0")
        if measurement.num_threads < 1:
            raise ValueError(f"num_threads is {measurement.num_threads}")
        profile = measurement.profile
        if profile and profile.invoke_seconds <= 0:
            raise ValueError(f"the profile of {measurement.label} takes no time")
        if profile and min([profile.unattributed_seconds, *(node.seconds for node in profile.nodes)]) < 0:
            raise ValueError(f"the profile of {measurement.label} has a negative time")
    for description, export in zip(found.descriptions, found.exports, strict=True):
        if not isinstance(description.sha256, str) or len(description.sha256) != 64:
            raise ValueError(f"the SHA-256 of {description.path} is missing")
        if description.nodes < 0 or (description.delegated_nodes or 0) < 0:
            raise ValueError(f"{description.path} has a negative number of nodes")
        tokens = (export or {}).get("tokens", [])
        if not isinstance(tokens, list) or any(type(count) is not int or count < 1 for count in tokens):
            raise ValueError(f"tokens of {description.path} are {tokens!r}")
        for key in ("format", "model", "target"):
            if not isinstance((export or {}).get(key, ""), str):
                raise ValueError(f"{key} of {description.path} is no text")
        if export and "top1" in export:
            check_share(export["top1"], export.get("images"), description.path)


def _device_names(benchmarks: Sequence[tuple[Path, Measurements]]) -> list[str]:
    """The devices' names, with date or file where a name repeats."""
    names = [found.device["name"] or "unnamed device" for _, found in benchmarks]
    dated = [f"{name}, {found.device['date'][:16]}" for name, (_, found) in zip(names, benchmarks, strict=True)]
    filed = [f"{name}, {path}" for name, (path, _) in zip(names, benchmarks, strict=True)]
    chosen = []
    for name, with_date, with_file in zip(names, dated, filed, strict=True):
        if names.count(name) == 1:
            chosen.append(name)
        else:
            chosen.append(with_date if dated.count(with_date) == 1 else with_file)
    return chosen


def _marks(found: Measurements) -> tuple[str, ...]:
    marks = []
    if emulated := found.device.get("emulated"):
        marks.append(emulated if isinstance(emulated, str) else "emulated: not a phone's figures")
    if found.interrupted:
        complete = min((len(measurement.round_latencies) for measurement in found.measurements), default=0)
        why = f" ({found.failure})" if found.failure else ""
        marks.append(f"interrupted after {complete} of {len(found.plan.rounds)} rounds: partial results{why}")
    return tuple(marks)


def _graphs(found: Sequence[Result], evaluated: Sequence[Evaluated], notes: list[str]) -> dict[tuple[int, int], Graph]:
    """(result's number, index of the graph in it) to the graph; a file given twice in one result stays two graphs."""
    keys: dict[tuple[str, int], list[tuple[Result, int]]] = {}
    for result in found:
        checksums = [description.sha256 for description in result.found.descriptions]
        for index, checksum in enumerate(checksums):
            keys.setdefault((checksum, checksums[:index].count(checksum)), []).append((result, index))
    labels = [places[0][0].found.plan.labels[places[0][1]] for places in keys.values()]
    graphs: dict[tuple[int, int], Graph] = {}
    used: set[str] = set()
    for position, (((checksum, _), places), label) in enumerate(zip(keys.items(), labels, strict=True)):
        place = next((place for place in places if place[0].found.device["kind"] == "host"), places[0])
        description = place[0].found.descriptions[place[1]]
        exports = [export for result, index in places if (export := result.found.exports[index])]
        export = exports[0] if exports else {}
        name = label if labels.count(label) == 1 else f"{label} ({checksum[:8]})"
        name = name if name not in used else f"{name} #{position + 1}"
        used.add(name)
        graph = Graph(
            number=position + 1,
            name=name,
            description=description,
            tokens=tuple(export.get("tokens") or ()),
            format=export.get("format"),
            model=export.get("model") or None,
            target=export.get("target"),
            accuracies=_accuracies(description, export, places[0][0], evaluated, notes),
        )
        graphs |= {(result.number, index): graph for result, index in places}
    for each in evaluated:
        if not any(each.is_of(graph.description) for graph in graphs.values()):
            notes.append(f"{each.accuracy.source}: {each.file_name} is in no benchmark (compared by SHA-256).")
    return graphs


def _accuracies(
    description: Description, export: dict[str, Any], result: Result, evaluated: Sequence[Evaluated], notes: list[str]
) -> tuple[Accuracy, ...]:
    chosen: dict[tuple[str, str], Accuracy] = {}
    for each in evaluated:
        if each.is_of(description):
            first = chosen.setdefault((each.dataset, each.accuracy.data), each.accuracy)
            if first.top1 != each.accuracy.top1:
                notes.append(
                    f"{each.file_name}: {first.source} says {first.top1:.2%} and {each.accuracy.source} "
                    f"{each.accuracy.top1:.2%} on {first.data}; the first is shown."
                )
    if "top1" in export:
        data = f"{export['images']} check images at export"
        at_export = Accuracy(float(export["top1"]), export["images"], data, str(result.path), at_export=True)
        return (*chosen.values(), at_export)
    return tuple(chosen.values())


def _entries(result: Result, first: Result, graphs: dict[tuple[int, int], Graph]) -> Iterable[Entry]:
    across = {}
    if result is not first:
        pairs = beside.pairs(result.found, first.found)
        across = {id(pair.own): pair.ratio for pair in pairs if pair.same_file}
    for measurement in result.found.measurements:
        statistics = measurement.statistics
        if statistics is None:  # interrupted before its first round
            continue
        if statistics.median is None:
            statistic = "mean"
        else:
            statistic = "median" if measurement.rounds else "median of round medians"
        reference = measurements.reference_of(result.found, measurement)
        yield Entry(
            result=result,
            graph=graphs[result.number, measurement.graph],
            measurement=measurement,
            statistic=statistic,
            seconds=statistics.typical,
            spread=_spread(measurement),
            to_first_graph=measurements.ratio(measurement, reference),
            to_first_device=across.get(id(measurement)),
            doubtful=summary.is_doubtful(measurement),
        )


def _spread(measurement: Measurement) -> Spread | None:
    if len(measurement.latencies) > 1:
        low, high = np.percentile(measurement.latencies, (25, 75))
        return Spread(float(low), float(high), "quartiles")
    rounds = measurement.round_latencies
    return Spread(min(rounds), max(rounds), "rounds") if len(rounds) > 1 else None


def plan_values(found: Measurements) -> dict[str, Any]:
    """The plan as plain values, without the paths."""
    return {key: value for key, value in dataclasses.asdict(found.plan).items() if key not in ("graphs", "inputs")}

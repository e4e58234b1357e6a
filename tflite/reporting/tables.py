"""The figures behind each chart as tables: every number with its exact value beside its rounded text."""

from collections.abc import Sequence
from dataclasses import dataclass

from tflite.reporting.collect import Accuracy, Entry, Graph
from tflite.reporting.drawing import milliseconds
from tflite.reporting.rows import CoverageRow, operator_rows

_MIB = 1024 * 1024
UNKNOWN = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """What is written; `value` is the number as the JSON has it, None for words."""

    text: str
    value: float | int | None = None


@dataclass(frozen=True)
class Table:
    """`heads` name the columns, one row is one line; `caption` is for those who hear the table."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def seconds_cell(seconds: float | None) -> Cell:
    """Written in milliseconds; the value is in seconds."""
    return Cell(UNKNOWN) if seconds is None else Cell(milliseconds(seconds), seconds)


def _count(value: int | None) -> Cell:
    return Cell(UNKNOWN) if value is None else Cell(f"{value:,}", value)


def _bytes(value: int | None) -> Cell:
    return Cell(UNKNOWN) if value is None else Cell(f"{value / _MIB:.1f}", value)


def _number(value: float | None, form: str = ".3f") -> Cell:
    return Cell(UNKNOWN) if value is None else Cell(format(value, form), value)


def _share(value: float) -> Cell:
    return Cell(f"{value:.2%}", value)


def _names(entry: Entry) -> tuple[Cell, ...]:
    measurement = entry.measurement
    device = entry.result.name + "".join(f" ({mark})" for mark in entry.result.marks)
    return (
        Cell(f"{entry.graph.number} {entry.graph.name}"),
        Cell(device),
        Cell(measurement.backend),
        _count(measurement.num_threads),
    )


_NAMES = ("graph", "device", "backend", "threads")


def tokens_text(graph: Graph) -> str:
    """As in "197" or "3136, 784, 196, 49"; without tokens the size of the input."""
    if graph.tokens:
        return ", ".join(f"{count:,}" for count in graph.tokens)
    if graph.pixels:
        height, width = graph.description.inputs[0].shape[1:3]
        return f"unknown ({height} x {width} pixels)"
    return "unknown"


def graphs_table(graphs: Sequence[Graph]) -> Table:
    """What is known of each file."""
    rows = []
    for graph in graphs:
        found = graph.description
        inputs = ", ".join(
            "\N{MULTIPLICATION SIGN}".join(map(str, tensor.shape)) + f" {tensor.dtype}" for tensor in found.inputs
        )
        rows.append(
            (
                _count(graph.number),
                Cell(graph.name),
                Cell(graph.format or UNKNOWN),
                Cell(graph.model or UNKNOWN),
                Cell(f"{found.size_bytes / 1e6:.2f}", found.size_bytes),
                _count(found.parameters),
                _count(found.nodes),
                Cell(inputs or UNKNOWN),
                Cell(tokens_text(graph)),
                Cell(found.sha256[:12]),
            )
        )
    heads = ("", "graph", "format", "model", "MB", "parameters", "nodes", "input", "tokens", "SHA-256")
    return Table("The graphs", heads, tuple(rows))


def latency_table(entries: Sequence[Entry]) -> Table:
    """Everything that was measured of a run."""
    rows = []
    for entry in entries:
        measurement, found = entry.measurement, entry.measurement.statistics
        assert found is not None  # an entry has a latency
        first = entry.to_first_graph
        spread = entry.spread
        rows.append(
            (
                *_names(entry),
                _count(found.runs),
                seconds_cell(found.median),
                seconds_cell(spread.low if spread else None),
                seconds_cell(spread.high if spread else None),
                Cell(spread.what if spread else UNKNOWN),
                seconds_cell(found.min),
                seconds_cell(found.p90),
                seconds_cell(found.mean),
                seconds_cell(found.standard_deviation),
                _number(first.median if first else None),
                Cell(f"{first.min:.3f} to {first.max:.3f}" if first else UNKNOWN),
                _number(entry.to_first_device),
                seconds_cell(measurement.load_seconds),
                seconds_cell(measurement.first_run_seconds),
                _bytes(measurement.peak_bytes),
                _bytes(measurement.model_bytes),
                _number(measurement.output_error, ".1e"),
            )
        )
    heads: tuple[str, ...] = (
        *_NAMES,
        "runs",
        "median ms",
        "from ms",
        "to ms",
        "range is of",
        "min ms",
        "p90 ms",
        "mean ms",
        "deviation ms",
    )
    heads += ("to first graph", "over rounds", "to first device", "load ms", "first run ms", "peak MiB", "model MiB")
    return Table("Latency and memory", (*heads, "output error"), tuple(rows))


def accuracy_table(pairs: Sequence[tuple[Entry, Accuracy]]) -> Table:
    """Latency and accuracy of each graph."""
    rows = [
        (
            *_names(entry),
            seconds_cell(entry.seconds),
            Cell(entry.statistic),
            _share(accuracy.top1),
            _count(accuracy.images),
            Cell(accuracy.data),
        )
        for entry, accuracy in pairs
    ]
    heads = (*_NAMES, "latency ms", "which is the", "top-1", "images", "on")
    return Table("Latency and accuracy", heads, tuple(rows))


def tokens_table(entries: Sequence[Entry]) -> Table:
    """Latency and size of the input of each graph."""
    rows = [
        (
            *_names(entry),
            _count(entry.graph.most_tokens),
            _count(entry.graph.pixels),
            seconds_cell(entry.seconds),
            Cell(entry.statistic),
        )
        for entry in entries
    ]
    heads = (*_NAMES, "most tokens", "pixels", "latency ms", "which is the")
    return Table("Latency and tokens", heads, tuple(rows))


def operators_table(entries: Sequence[Entry]) -> Table:
    """Every operator type of every profile."""
    rows = [
        (
            *_names(entry),
            Cell(row.op),
            _count(row.nodes),
            seconds_cell(row.seconds),
            Cell(f"{row.share:.1%}", row.share),
        )
        for entry in entries
        for row in operator_rows(entry)
    ]
    return Table("Time per operator type", (*_NAMES, "operator", "nodes", "ms", "share"), tuple(rows))


def coverage_table(found: Sequence[CoverageRow]) -> Table:
    """Nodes and partitions of each delegate."""
    rows = [
        (
            Cell(f"{row.graph.number} {row.graph.name}"),
            Cell(row.where),
            Cell(row.delegate),
            _count(row.nodes),
            _count(row.delegated),
            _count(row.partitions),
            Cell(row.others or UNKNOWN),
        )
        for row in found
    ]
    heads = ("graph", "as said by", "delegate", "nodes", "delegated", "partitions", "not delegated")
    return Table("Nodes that delegates take", heads, tuple(rows))

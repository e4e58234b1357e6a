"""Operators and delegates as rows: what bars and tables show."""

from dataclasses import dataclass

from tflite.reporting.collect import Entry, Graph, Report, Result
from tflite.reporting.drawing import counted

_MOST_OPERATORS = 10


@dataclass(frozen=True)
class OperatorRow:
    """Time of one kind of operator; `nodes` is None for what is not attributed."""

    op: str
    nodes: int | None
    seconds: float
    share: float


def operator_rows(entry: Entry) -> list[OperatorRow]:
    """Every operator type, slowest first, then what is not attributed."""
    profile = entry.measurement.profile
    if profile is None:
        return []
    total = profile.invoke_seconds
    rows = [OperatorRow(op, count, seconds, seconds / total) for op, (count, seconds) in profile.by_type().items()]
    rest = profile.unattributed_seconds
    return [*rows, OperatorRow("(not attributed)", None, rest, rest / total)]


def shown_operators(entry: Entry) -> list[OperatorRow]:
    """`operator_rows`, where those after the tenth type are one row."""
    *rows, rest = operator_rows(entry)
    head, tail = rows[:_MOST_OPERATORS], rows[_MOST_OPERATORS:]
    if len(tail) > 1:
        nodes = sum(row.nodes or 0 for row in tail)
        seconds, share = sum(row.seconds for row in tail), sum(row.share for row in tail)
        tail = [OperatorRow(f"{len(tail)} other types", nodes, seconds, share)]
    return [*head, *tail, rest]


@dataclass(frozen=True)
class CoverageRow:
    """What a delegate takes of a graph, and who says so; `result` is None for this computer's LiteRT."""

    graph: Graph
    where: str
    result: Result | None
    delegate: str
    nodes: int | None
    delegated: int | None
    partitions: int | None
    others: str

    @property
    def words(self) -> str:
        """As in "861 of 867 nodes, 1 partition"."""
        if self.delegated is None:
            return "unknown"
        nodes = f"{self.delegated:,} nodes" if self.nodes is None else f"{self.delegated:,} of {self.nodes:,} nodes"
        return nodes if self.partitions is None else f"{nodes}, {counted(self.partitions, 'partition')}"


def coverage_rows(report: Report) -> list[CoverageRow]:
    """For every graph what XNNPACK takes on the computer that described it, and what other devices said themselves."""
    return [row for graph in report.graphs for row in (_described(graph, report), *_said(graph, report))]


def _described(graph: Graph, report: Report) -> CoverageRow:
    found = graph.description
    host = next(
        (e.result for e in report.entries if e.graph is graph and e.result.found.device["kind"] == "host"), None
    )
    others = ", ".join(f"{count} {name}" for name, count in (found.undelegated_ops or {}).items())
    return CoverageRow(
        graph=graph,
        where=host.name if host else "the computer that started the benchmark",
        result=host,
        delegate="XNNPACK",
        nodes=found.nodes,
        delegated=found.delegated_nodes,
        partitions=found.delegate_partitions,
        others=found.undelegated_reason or others,
    )


def _said(graph: Graph, report: Report) -> list[CoverageRow]:
    """One row for each device and delegate, whatever the number of threads."""
    rows: list[CoverageRow] = []
    for entry in report.entries:
        said = entry.measurement.delegation
        if entry.graph is graph and said is not None:
            nodes = graph.description.nodes if said.nodes is None else said.nodes
            counts = (said.delegate, nodes, said.delegated_nodes, said.partitions)
            row = CoverageRow(graph, entry.result.name, entry.result, *counts, others="")
            if row not in rows:
                rows.append(row)
    return rows

"""The charts: pure functions from a report to drawings. Colour is the device, the number beside a marker the graph.

Figures that are not to be quoted (emulated, interrupted) are hollow with dashed outlines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tflite.reporting import drawing
from tflite.reporting.collect import Entry, Result
from tflite.reporting.drawing import (
    FONT_SIZE,
    Domain,
    Drawing,
    Item,
    Line,
    Mark,
    Shape,
    Text,
    bar,
    counted,
    marker,
    milliseconds,
    number,
    shorten,
    text_width,
)
from tflite.reporting.rows import CoverageRow, shown_operators

_SMALL = FONT_SIZE - 1
_BOLD = 0.9  # so much less of a bold text fits
_WIDE_FROM = 520.0  # from this width on, a bar's name stands to its left instead of above it


def color(result: Result) -> str:
    """The device's role in the palette; beyond eight devices the colours come again, and the names tell them apart."""
    return f"c{(result.number - 1) % drawing.CATEGORIES + 1}"


def describe_entry(entry: Entry) -> str:
    """The words of a latency: graph, device, setting, figure, range, marks."""
    words = f"{entry.graph.number} {entry.graph.name} on {entry.result.name}, {entry.setting}: "
    words += f"{milliseconds(entry.seconds)} ms ({entry.statistic}"
    if entry.spread:
        what = "quartiles" if entry.spread.what == "quartiles" else "rounds from"
        words += f"; {what} {milliseconds(entry.spread.low)} to {milliseconds(entry.spread.high)}"
    words += ")"
    if entry.to_first_device is not None:
        words += f"; {entry.to_first_device:.3f} times the first device"
    return words + "".join(f"; {mark}" for mark in entry.result.marks)


# Devices side by side.


def latency_bars(entries: Sequence[Entry], several_devices: bool, width: float) -> Drawing:
    """One group of bars for each graph, from zero; a line over each bar spans the quartiles or the rounds."""
    values = [max(entry.seconds, entry.spread.high if entry.spread else 0) for entry in entries]
    labels = [_bar_name(entry, several_devices) for entry in entries]
    wide = width >= _WIDE_FROM
    left = min(max(text_width(label, _SMALL) for label in labels) + 12, width * 0.4) if wide else 0.0
    right = width - max(text_width(_bar_value(entry), _SMALL) for entry in entries) - 10
    domain = Domain(0, max(values) * 1000)
    items: list[Item] = []
    y = 4.0
    groups: dict[int, list[tuple[Entry, str]]] = {}
    for entry, label in zip(entries, labels, strict=True):
        groups.setdefault(entry.graph.number, []).append((entry, label))
    for group in groups.values():
        graph = group[0][0].graph
        items.append(Text(0, y + 13, shorten(f"{graph.number}  {graph.name}", width * _BOLD), bold=True))
        y += 22
        for entry, label in group:
            if wide:
                items.append(Text(left - 8, y + 12, shorten(label, left - 12, _SMALL), "muted", "end", _SMALL))
            else:
                items.append(Text(0, y + 11, shorten(label, width, _SMALL), "muted", size=_SMALL))
                y += 15
            items.append(_latency_bar(entry, domain, left, right, y))
            y += 22 if wide else 21
        y += 10
    items.insert(0, Line(left, 4 + 20, left, y - 10, "axis") if wide else Line(0, 4, 0, 4, "axis"))
    return Drawing(width, y, tuple(items), f"Latency of {counted(len(groups), 'graph')} in milliseconds, as bars")


def _bar_name(entry: Entry, several_devices: bool) -> str:
    return f"{entry.result.name} · {entry.setting}" if several_devices else entry.setting


def _bar_value(entry: Entry) -> str:
    ratio = f" · \N{MULTIPLICATION SIGN}{entry.to_first_device:.2f}" if entry.to_first_device is not None else ""
    return f"{milliseconds(entry.seconds)} ms{ratio}"


def _latency_bar(entry: Entry, domain: Domain, left: float, right: float, y: float) -> Mark:
    end = domain.place(entry.seconds * 1000, left, right)
    parts: list[Text | Line | Shape] = [bar(left, y, end - left, 15, color(entry.result), bool(entry.result.marks))]
    text_from = end
    if entry.spread:
        low = domain.place(entry.spread.low * 1000, left, right)
        high = domain.place(entry.spread.high * 1000, left, right)
        text_from = max(end, high)
        parts += [
            Line(low, y + 7.5, high, y + 7.5, "ink", 1.5),
            Line(low, y + 4, low, y + 11, "ink", 1.5),
            Line(high, y + 4, high, y + 11, "ink", 1.5),
        ]
    parts.append(Text(text_from + 7, y + 12, _bar_value(entry), "ink", size=_SMALL))
    return Mark(describe_entry(entry), tuple(parts))


# Markers over two axes.


@dataclass(frozen=True)
class Dot:
    """A marker.

    Attributes:
        entry: whose it is.
        x, y: in the units of the axes.
        spread: along the axis of the latency, or None.
        shape: index of the setting.
        line: dots with the same one are joined; None: with none.
        tip: its words.
        labelled: the graph's number stands beside it.
    """

    entry: Entry
    x: float
    y: float
    spread: tuple[float, float] | None
    shape: int
    line: tuple[object, ...] | None
    tip: str
    labelled: bool = True


@dataclass(frozen=True)
class Axis:
    """A title, the values and how they are written."""

    title: str
    domain: Domain
    percent: bool = False

    def label(self, value: float) -> str:
        """Of a tick."""
        return f"{value * 100:.4g}%" if self.percent else number(value)


def scatter(
    dots: Sequence[Dot], x_axis: Axis, y_axis: Axis, latency_is_x: bool, x_ticks: Sequence[float] | None, width: float
) -> Drawing:
    """Markers with their graphs' numbers, and names where there is room.

    Args:
        dots: what to draw; all of one device.
        x_axis, y_axis: shared by the charts that stand side by side.
        latency_is_x: spreads are horizontal.
        x_ticks: where only these values of x occur.
        width: in pixels.
    """
    height = min(max(250.0, width * 0.62), 420.0)
    y_ticks = y_axis.domain.ticks(6)
    left = max(text_width(y_axis.label(tick), _SMALL) for tick in y_ticks) + 12
    right, top, bottom = width - 10.0, 26.0, height - 44.0
    ticks = list(x_ticks) if x_ticks else x_axis.domain.ticks(max(3, int((right - left) / 70)))
    items: list[Item] = [Text(0, 12, y_axis.title, "muted", size=_SMALL)]
    for tick in y_ticks:
        y = y_axis.domain.place(tick, bottom, top)
        items.append(Line(left, y, right, y, "grid"))
        items.append(Text(left - 6, y + 4, y_axis.label(tick), "muted", "end", _SMALL))
    written = -1e9
    for tick in ticks:
        x = x_axis.domain.place(tick, left, right)
        items.append(Line(x, bottom, x, bottom + 5, "axis"))
        label = x_axis.label(tick)
        half = text_width(label, _SMALL) / 2
        if x - half > written + 4 and x + half <= width:
            items.append(Text(x, bottom + 18, label, "muted", "middle", _SMALL))
            written = x + half
    items.append(Line(left, bottom, right, bottom, "axis"))
    items.append(Text(right, height - 6, x_axis.title, "muted", "end", _SMALL))

    places = [(x_axis.domain.place(dot.x, left, right), y_axis.domain.place(dot.y, bottom, top)) for dot in dots]
    items += _series(dots, places)
    for dot, (x, y) in zip(dots, places, strict=True):
        items.append(
            _dot(dot, x, y, x_axis if latency_is_x else y_axis, (left, right) if latency_is_x else (bottom, top))
        )
    anchors = []
    named: set[int] = set()
    has_room = sum(dot.labelled for dot in dots) <= (12 if width >= _WIDE_FROM else 6)
    for dot, (x, y) in zip(dots, places, strict=True):
        graph = dot.entry.graph
        fits = (
            has_room and text_width(graph.name) <= (220 if width >= _WIDE_FROM else 130) and graph.number not in named
        )
        texts = [f"{graph.number} {graph.name}"] if fits else []
        named.add(graph.number)
        anchors.append((x, y, [*texts, str(graph.number)] if dot.labelled else []))
    items += drawing.place_labels(anchors, left + 2, top - 8, right, bottom - 1)
    return Drawing(
        width, height, tuple(items), f"{y_axis.title} against {x_axis.title}: {counted(len(dots), 'marker')}"
    )


def _series(dots: Sequence[Dot], places: Sequence[tuple[float, float]]) -> list[Item]:
    """Thin lines through the dots that belong together, from left to right."""
    series: dict[tuple[object, ...], list[tuple[float, float]]] = {}
    for dot, place in zip(dots, places, strict=True):
        if dot.line is not None:
            series.setdefault(dot.line, []).append(place)
    lines: list[Item] = []
    for found in series.values():
        ordered = sorted(found)
        lines += [Line(*one, *other, "axis", 1.0) for one, other in pairwise(ordered)]
    return lines


def _dot(dot: Dot, x: float, y: float, axis: Axis, ends: tuple[float, float]) -> Mark:
    role = color(dot.entry.result)
    parts: list[Text | Line | Shape] = []
    if dot.spread:
        low, high = (axis.domain.place(value, *ends) for value in dot.spread)
        horizontal = ends[0] < ends[1]
        parts.append(Line(low, y, high, y, role, 2) if horizontal else Line(x, low, x, high, role, 2))
    parts.append(marker(dot.shape, x, y, role, bool(dot.entry.result.marks)))
    return Mark(dot.tip, tuple(parts))


def settings_of(entries: Sequence[Entry]) -> list[str]:
    """The settings in their order: the marker's shape is the index in here."""
    return list(dict.fromkeys(entry.setting for entry in entries))


# Operators and delegates.


def operator_bars(entry: Entry, most: float, width: float) -> Drawing:
    """Shares of the profiled invocation; `most` is the largest share of all charts, which have the same scale."""
    rows = shown_operators(entry)
    values = [f"{row.share:.1%} · {milliseconds(row.seconds)} ms" for row in rows]
    right = width - max(text_width(value, _SMALL) for value in values) - 10
    domain = Domain(0, most or 1.0)
    items: list[Item] = []
    y = 2.0
    for row, value in zip(rows, values, strict=True):
        name = row.op if row.nodes is None else f"{row.op} ({row.nodes})"
        role = "rest" if row.nodes is None or row.op.endswith("other types") else color(entry.result)
        end = domain.place(row.share, 0, right)
        tip = f"{entry.graph.name} on {entry.result.name}, {entry.setting}: {name} {value}"
        parts = (
            Text(0, y + 11, shorten(name, width, _SMALL), "ink", size=_SMALL),
            bar(0, y + 16, end, 10, role, bool(entry.result.marks)),
            Text(end + 7, y + 25, value, "muted", size=_SMALL),
        )
        items.append(Mark(tip, parts))
        y += 35
    return Drawing(width, y, tuple(items), f"Time per operator type of {entry.graph.name}, {counted(len(rows), 'bar')}")


def coverage_bars(rows: Sequence[CoverageRow], width: float) -> Drawing:
    """The delegate's share of each graph's nodes; the rest of each bar is grey."""
    labels = [_coverage_label(row, width) for row in rows]
    wide = width >= _WIDE_FROM
    left = min(max(text_width(label, _SMALL) for label in labels) + 10, width * 0.6) if wide else 0.0
    right = width - max(text_width(_coverage_value(row), _SMALL) for row in rows) - 10
    items: list[Item] = []
    y, last = 4.0, None
    for row, label in zip(rows, labels, strict=True):
        if row.graph is not last:
            y += 8 if last else 0
            items.append(Text(0, y + 13, shorten(f"{row.graph.number}  {row.graph.name}", width * _BOLD), bold=True))
            y, last = y + 20, row.graph
        label = _coverage_label(row, left - 10) if wide else label
        items.append(Text(0, y + 11, label, "muted", size=_SMALL))
        y += 0 if wide else 16
        marks = "".join(f"; {mark}" for mark in row.result.marks) if row.result else ""
        others = f"; not delegated: {row.others}" if row.others else ""
        tip = f"{row.graph.number} {row.graph.name}: {row.delegate} on {row.where}, {row.words}{others}{marks}"
        items.append(Mark(tip, _coverage_bar(row, left, right, y)))
        y += 20
        if row.others:
            text = f"not delegated: {row.others}"
            items.append(Text(left, y + 9, shorten(text, width - left, _SMALL), "muted", size=_SMALL))
            y += 18
    graphs = counted(len({row.graph.number for row in rows}), "graph")
    return Drawing(width, y + 2, tuple(items), f"Share of the nodes that delegates take of {graphs}")


def _coverage_label(row: CoverageRow, width: float) -> str:
    """Of the words only the device's name is shortened."""
    room = width - text_width(f"{row.delegate} on : {row.words}", _SMALL)
    return shorten(f"{row.delegate} on {shorten(row.where, max(room, 40), _SMALL)}: {row.words}", width, _SMALL)


def _coverage_bar(row: CoverageRow, left: float, right: float, y: float) -> tuple[Text | Line | Shape, ...]:
    value = Text(right + 7, y + 11, _coverage_value(row), "ink", size=_SMALL)
    if row.delegated is None or not row.nodes:
        return (value,)
    end = left + (right - left) * min(1.0, row.delegated / row.nodes)
    role = color(row.result) if row.result else "muted"
    taken = bar(left, y, end - left, 13, role, bool(row.result and row.result.marks))
    rest = bar(end + 2, y, right - end - 2, 13, "rest")
    return (*((taken,) if row.delegated else ()), *((rest,) if row.delegated < row.nodes else ()), value)


def _coverage_value(row: CoverageRow) -> str:
    if row.delegated is None or not row.nodes:
        return "unknown"
    return f"{row.delegated / row.nodes:.1%}".replace("100.0%", "100%")

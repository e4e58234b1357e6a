"""The five figures of a report: title, caption, panels, notes and table, all from a `Report`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tflite.reporting import charts, tables
from tflite.reporting.charts import Axis, Dot
from tflite.reporting.collect import Accuracy, Entry, Graph, Report, Result
from tflite.reporting.drawing import Domain, Drawing, domain_of, milliseconds
from tflite.reporting.rows import coverage_rows, shown_operators
from tflite.reporting.tables import Table

_OPEN_OPERATOR_PANELS = 6
_LABELLED_DOTS = 12  # beyond, only those of the first setting carry their numbers


@dataclass(frozen=True)
class Panel:
    """One chart of a figure.

    Attributes:
        title: whose figures these are.
        lines: device, runtime, threads, date.
        marks: why not to quote them.
        keys: (marker's shape, words) where the shape has a meaning; the role of its colour is `role`.
        role: see `drawing.PALETTE`.
        draw: width in pixels to the chart.
    """

    title: str
    lines: tuple[str, ...]
    marks: tuple[str, ...]
    keys: tuple[tuple[int, str], ...]
    role: str
    draw: Callable[[float], Drawing]


@dataclass(frozen=True)
class Figure:
    """Panels under one heading.

    Attributes:
        name: of the PNG and of the place in the page.
        title: the heading.
        caption: what is drawn, and how it was measured.
        panels: side by side.
        more: panels that the page shows on demand.
        notes: what could not be drawn, and why.
        table: the figures.
    """

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    more: tuple[Panel, ...]
    notes: tuple[str, ...]
    table: Table


def figures(report: Report) -> list[Figure]:
    """Those that stand in the page, in its order."""
    return [
        devices(report),
        accuracy(report),
        tokens(report),
        operators(report),
        delegates(report),
    ]


def lines_of(result: Result) -> tuple[str, ...]:
    """What every chart states: kind and runtime, threads and date."""
    threads = sorted({measurement.num_threads for measurement in result.found.measurements})
    plural = "" if threads == [1] else "s"
    counted = f"{', '.join(map(str, threads))} thread{plural}"
    return (f"{result.kind} · {result.runtime}", f"{counted} · {result.date} UTC")


def _marks(report: Report) -> tuple[str, ...]:
    """Those of all devices in one chart."""
    return tuple(f"{result.name}: {mark}" for result in report.results for mark in result.marks)


def named(graphs: Sequence[Graph]) -> str:
    """As in "1 float32, 2 int8"."""
    return ", ".join(f"{graph.number} {graph.name}" for graph in graphs)


def devices(report: Report) -> Figure:
    """Bars of every latency, by graph; one panel, because ratios live from standing side by side."""
    several = len(report.results) > 1
    ordered = sorted(report.entries, key=lambda entry: (entry.graph.number, entry.result.number))
    first = report.results[0]
    caption = "Typical latency of one inference, from zero; the line over a bar spans the quartiles of the runs"
    if any(entry.spread and entry.spread.what == "rounds" for entry in ordered):
        caption += ", or the range of the rounds where the device reports no single runs"
    caption += "."
    if several:
        caption += (
            f" \N{MULTIPLICATION SIGN}: multiple of {first.name}, for the same file (SHA-256) and number of threads, "
            "and the same backend where both have it."
        )
    shared = [
        graph
        for graph in report.graphs
        if len({entry.result.number for entry in ordered if entry.graph is graph}) == len(report.results)
    ]
    notes = []
    if several and len(shared) < len(report.graphs):
        others = [graph for graph in report.graphs if graph not in shared]
        notes.append(f"Not measured on every device: {named(others)}.")
    if several:
        title, lines = (
            "All devices",
            tuple(f"{result.name}: {' · '.join(lines_of(result))}" for result in report.results),
        )
        marks = _marks(report)
    else:
        title, lines, marks = first.name, lines_of(first), first.marks
    panel = Panel(title, lines, marks, (), charts.color(first), partial(charts.latency_bars, ordered, several))
    heading = "Devices side by side" if several else "Latency"
    return Figure("devices", heading, caption, (panel,), (), tuple(notes), tables.latency_table(ordered))


def accuracy(report: Report) -> Figure:
    """Latency against top-1; one panel for each device and set of images."""
    sets: dict[str, list[tuple[Entry, Accuracy]]] = {}
    for entry in report.entries:
        evaluated = [each for each in entry.graph.accuracies if not each.at_export]
        for each in evaluated or entry.graph.accuracies:
            sets.setdefault(each.data, []).append((entry, each))
    unknown = [graph for graph in report.graphs if not graph.accuracies]
    notes = [f"No accuracy known: {named(unknown)}."] if unknown else []
    if any(each.at_export for pairs in sets.values() for _, each in pairs):
        notes.append(
            "“Check images at export” are a few images on which the export compared the file with its model: a first "
            "impression, not an evaluation; two exports may have used different ones. Give an evaluation.json for more."
        )
    if len(sets) > 1:
        notes.append("Shares on different sets of images stand in charts of their own: they cannot be compared.")
    panels = []
    for data, pairs in sets.items():
        x_axis = Axis("latency, ms", domain_of([s * 1e3 for entry, _ in pairs for s in _extent(entry)]))
        domain = _share_domain([each.top1 for _, each in pairs])
        y_axis = Axis(f"top-1 on {data}", domain, percent=True)
        x_axis = _titled(x_axis)
        for result in report.results:
            own = [(entry, each) for entry, each in pairs if entry.result is result]
            if not own:
                continue
            shapes = charts.settings_of([entry for entry, _ in own])
            leftmost: dict[int, float] = {}  # a graph's dots are joined, so one of them carries its number
            for entry, _ in own:
                leftmost[entry.graph.number] = min(entry.seconds, leftmost.get(entry.graph.number, entry.seconds))
            dots = [
                Dot(
                    entry=entry,
                    x=entry.seconds * 1e3,
                    y=each.top1,
                    spread=(entry.spread.low * 1e3, entry.spread.high * 1e3) if entry.spread else None,
                    shape=shapes.index(entry.setting),
                    line=(entry.graph.number,),
                    tip=f"{charts.describe_entry(entry)}; top-1 {each.top1:.2%} on {each.data}",
                    labelled=entry.seconds == leftmost[entry.graph.number],
                )
                for entry, each in own
            ]
            draw = partial(charts.scatter, dots, x_axis, y_axis, True, None)
            panels.append(_panel(result, shapes, draw, data))
    caption = "Further left is faster, further up is better. " + _reading()
    table = tables.accuracy_table([pair for pairs in sets.values() for pair in pairs])
    return Figure("accuracy", "Latency against accuracy", caption, tuple(panels), (), tuple(notes), table)


def _share_domain(shares: Sequence[float]) -> Domain:
    """Around the shares, at least two percentage points wide, within 0 and 1."""
    room = max((max(shares) - min(shares)) * 0.2, 0.01)
    return Domain(max(min(shares) - room, 0.0), min(max(shares) + room, 1.0))


def tokens(report: Report) -> Figure:
    """Latency against tokens; where no export says them, against the pixels of the input in a chart of its own."""
    with_tokens = [entry for entry in report.entries if entry.graph.most_tokens]
    with_pixels = [entry for entry in report.entries if not entry.graph.most_tokens and entry.graph.pixels]
    sizeless = [graph for graph in report.graphs if not graph.most_tokens and not graph.pixels]
    notes = []
    if with_pixels:
        graphs = [graph for graph in report.graphs if not graph.most_tokens and graph.pixels]
        notes.append(f"Tokens unknown, because no export stands beside the file: {named(graphs)}; drawn over pixels.")
    if sizeless:
        notes.append(f"Neither tokens nor an image as input: {named(sizeless)}.")
    panels: list[Panel] = []
    for entries, title in ((with_tokens, "tokens"), (with_pixels, "pixels of the input")):
        sizes = sorted({_size(entry) for entry in entries})
        if not sizes:
            continue
        if len(sizes) == 1 and len({entry.graph.number for entry in entries}) > 1:
            notes.append(f"All graphs have {sizes[0]:,} {title}; other image sizes would show how latency grows.")
        logarithmic = len(sizes) > 1 and sizes[-1] / sizes[0] >= 3
        x_domain = domain_of(sizes, logarithmic=logarithmic)
        y_domain = domain_of([seconds * 1e3 for entry in entries for seconds in _extent(entry)], logarithmic or None)
        for result in report.results:
            own = [entry for entry in entries if entry.result is result]
            if not own:
                continue
            shapes = charts.settings_of(own)
            dots = [
                Dot(
                    entry=entry,
                    x=_size(entry),
                    y=entry.seconds * 1e3,
                    spread=(entry.spread.low * 1e3, entry.spread.high * 1e3) if entry.spread else None,
                    shape=shapes.index(entry.setting),
                    line=_growth(entry, own),
                    tip=f"{charts.describe_entry(entry)}; {_size(entry):,} {title}",
                    labelled=len(own) <= _LABELLED_DOTS or entry.setting == shapes[0],
                )
                for entry in own
            ]
            axes = _titled(Axis(title, x_domain)), _titled(Axis("latency, ms", y_domain))
            ticks = sizes if len(sizes) <= 8 else None
            panels.append(_panel(result, shapes, partial(charts.scatter, dots, *axes, False, ticks), None))
    caption = (
        "Tokens are those of the stage that has most of them; lines join the same model, format and setting at several "
        f"sizes. {_reading()}"
    )
    table = tables.tokens_table([*with_tokens, *with_pixels])
    return Figure("tokens", "Latency against tokens", caption, tuple(panels), (), tuple(notes), table)


def _size(entry: Entry) -> int:
    size = entry.graph.most_tokens or entry.graph.pixels
    assert size is not None  # the others are sorted out before
    return size


def _growth(entry: Entry, others: Sequence[Entry]) -> tuple[object, ...] | None:
    """The series of a model over its image sizes; None where the names do not tell which graph belongs to it."""

    def series(one: Entry) -> tuple[object, ...]:
        return one.graph.model, one.graph.format, one.graph.target, one.setting

    if not entry.graph.model:
        return None
    sizes = [_size(other) for other in others if series(other) == series(entry)]
    return series(entry) if len(set(sizes)) == len(sizes) else None


def _extent(entry: Entry) -> list[float]:
    return [entry.seconds, *((entry.spread.low, entry.spread.high) if entry.spread else ())]


def _titled(axis: Axis) -> Axis:
    return Axis(f"{axis.title} (logarithmic)", axis.domain, axis.percent) if axis.domain.logarithmic else axis


def _reading() -> str:
    return (
        "Numbers are the graphs', the marker's shape is backend and threads, a line through a marker spans the "
        "quartiles (or the rounds). Charts of one kind share their axes."
    )


def _panel(result: Result, settings: Sequence[str], draw: Callable[[float], Drawing], data: str | None) -> Panel:
    lines = lines_of(result) if data is None else (*lines_of(result), data)
    return Panel(result.name, lines, result.marks, tuple(enumerate(settings)), charts.color(result), draw)


def operators(report: Report) -> Figure:
    """Bars per operator type; the first setting of each device stands open."""
    profiled = [entry for entry in report.entries if entry.measurement.profile]
    profiled.sort(key=lambda entry: (entry.graph.number, entry.result.number))
    most = max((row.share for entry in profiled for row in shown_operators(entry)), default=1.0)
    first = {
        result.number: next(e.setting for e in report.of(result)) for result in report.results if report.of(result)
    }
    panels: list[Panel] = []
    more: list[Panel] = []
    for entry in profiled:
        profile = entry.measurement.profile
        assert profile is not None
        marks = entry.result.marks
        if entry.doubtful:
            unattributed = profile.unattributed_seconds / profile.invoke_seconds
            marks += (
                f"not representative: a profiled invocation takes {milliseconds(profile.invoke_seconds)} ms, a plain "
                f"one {milliseconds(entry.seconds)} ms, and {unattributed:.0%} is not attributed",
            )
        lines = (
            entry.result.name,
            f"{entry.result.runtime} · {entry.setting} · {entry.result.date} UTC",
            f"{milliseconds(profile.invoke_seconds)} ms per profiled invocation, mean of "
            + (f"all {profile.runs}" if profile.all_runs else f"the faster half ({profile.runs})"),
        )
        title = f"{entry.graph.number} {entry.graph.name}"
        panel = Panel(title, lines, marks, (), charts.color(entry.result), partial(charts.operator_bars, entry, most))
        shown = entry.setting == first[entry.result.number] and len(panels) < _OPEN_OPERATOR_PANELS
        (panels if shown else more).append(panel)
    notes = _profile_errors(report)
    if not profiled:
        notes.append("No result has a profile: the benchmark was run without it, or the device has none.")
    caption = (
        "Share of a profiled invocation by type of operator, in brackets the number of nodes; all charts have the same "
        "scale. Recording slows the operators, and what no operator accounts for is “not attributed”."
    )
    table = tables.operators_table(profiled)
    return Figure("operators", "Time per operator", caption, tuple(panels), tuple(more), tuple(notes), table)


def _profile_errors(report: Report) -> list[str]:
    """Each reason once for a device and setting, with the graphs that it holds for."""
    reasons: dict[tuple[str, str, str], list[Graph]] = {}
    for entry in report.entries:
        if error := entry.measurement.profile_error:
            reasons.setdefault((entry.result.name, entry.setting, error), []).append(entry.graph)
    return [
        f"No profile on {name}, {setting}, of {named(graphs)}: {error}"
        for (name, setting, error), graphs in reasons.items()
    ]


def delegates(report: Report) -> Figure:
    """Bars of the nodes that delegates take."""
    rows = coverage_rows(report)
    silent = [
        result.name
        for result in report.results
        if result.found.device["kind"] != "host" and not any(e.measurement.delegation for e in report.of(result))
    ]
    notes = [f"{name} does not say what its delegate takes." for name in silent]
    caption = (
        "Share of a graph's nodes that a delegate takes; each further partition costs copies between delegate and "
        "runtime. A row says whose LiteRT it is: devices may decide differently, and only what they said themselves "
        "stands under their name."
    )
    lines = tuple(f"{result.name}: {' · '.join(lines_of(result))}" for result in report.results)
    panel = Panel("All graphs", lines, _marks(report), (), "ink", partial(charts.coverage_bars, rows))
    return Figure("delegates", "Delegate coverage", caption, (panel,), (), tuple(notes), tables.coverage_table(rows))

"""The report as one HTML file that needs nothing else: no network, no other file, and no script to be read."""

import base64
import hashlib
from collections.abc import Sequence

from tflite.reporting import assets, charts, svg, tables
from tflite.reporting.collect import Entry, Report, Result, plan_values
from tflite.reporting.drawing import Drawing, counted, marker, milliseconds
from tflite.reporting.figures import Figure, Panel, figures, lines_of
from tflite.reporting.svg import words
from tflite.reporting.tables import Cell, Table

_NARROW = 324.0  # of a chart on a phone 390 pixels wide
_ONE, _TWO = 1086.0, 528.0  # where one or two charts share a computer's screen
_LONG_TEXT = 44


def render(report: Report) -> str:
    """The page. Everything from the files is escaped, and a content security policy forbids all other content."""
    found = figures(report)
    style, script = assets.style(), assets.script()
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    names = ("graphs", *(figure.name for figure in found), "method")
    navigation = "".join(f'<li><a href="#{name}">{name.capitalize()}</a></li>' for name in names)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{words(_title(report))}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>Benchmark report</h1>
<p class="lead">{words(_lead(report))}</p>
</header>
<nav aria-label="Sections"><ul>{navigation}</ul></nav>
<main>
{_notes(report.notes)}
<div class="cards">{"".join(_card(report, result) for result in report.results)}</div>
{_graphs(report)}
{"".join(_figure(report, figure) for figure in found)}
{_method(report)}
</main>
<footer><p>Made by mobiatt-tf from {words(", ".join(str(result.path) for result in report.results))}.
Point at a mark or tap it, or move through a chart with the arrow keys, for the exact words.</p></footer>
<script>{script}</script>
</body>
</html>
"""


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _title(report: Report) -> str:
    return "Benchmark report: " + ", ".join(result.name for result in report.results)


def _lead(report: Report) -> str:
    days = sorted({result.date[:10] for result in report.results})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{counted(len(report.graphs), 'graph')} on {counted(len(report.results), 'device')}, {when}."


def _notes(notes: Sequence[str]) -> str:
    return '<ul class="notes">' + "".join(f"<li>{words(note)}</li>" for note in notes) + "</ul>" if notes else ""


def _alerts(marks: Sequence[str]) -> str:
    return "".join(f'<strong class="alert">{words(mark)}</strong>' for mark in marks)


def _card(report: Report, result: Result) -> str:
    color = charts.color(result)
    entries = report.of(result)
    best = "" if result.marks else _best(min(entries, key=lambda entry: entry.seconds))  # not to be quoted
    headline = "".join(f'<p class="small">{words(line)}</p>' for line in result.found.device["headline"])
    warnings = "".join(f'<p class="warning">{words(warning)}</p>' for warning in result.found.warnings)
    return (
        f'<article class="card b-{color}"><h2>{words(result.name)}</h2>'
        f'<p class="kind">{"<br>".join(words(line) for line in lines_of(result))}</p>'
        f"{_alerts(result.marks)}{headline}{warnings}{best}</article>"
    )


def _best(entry: Entry) -> str:
    return (
        f'<p class="best"><span>fastest, {entry.statistic}</span><strong>{milliseconds(entry.seconds)} ms</strong>'
        f"{entry.graph.number} {words(entry.graph.name)}, {words(entry.setting)}</p>"
    )


def _graphs(report: Report) -> str:
    table = _table(tables.graphs_table(report.graphs))
    return (
        '<section id="graphs"><h2>Graphs</h2><p class="caption">The number stands for the graph in every chart. A '
        f"graph is known by the SHA-256 of its file, whatever its name on a device.</p>{table}</section>"
    )


def _figure(report: Report, figure: Figure) -> str:
    more = ""
    if figure.more:
        more = f"<details><summary>{counted(len(figure.more), 'more chart')}</summary>{_panels(figure.more)}</details>"
    caption = f'<p class="caption">{words(figure.caption)}</p>' if figure.panels else ""
    legend = ""
    if any(panel.keys for panel in figure.panels):
        lines = "".join(f"<li><b>{graph.number}</b>{words(graph.name)}</li>" for graph in report.graphs)
        legend = f'<ul class="legend" aria-label="Graphs">{lines}</ul>'
    table = ""
    if figure.table.rows:
        rows = counted(len(figure.table.rows), "row")
        table = f"<details><summary>Table of these figures ({rows})</summary>{_table(figure.table)}</details>"
    return (
        f'<section id="{figure.name}"><h2>{words(figure.title)}</h2>{caption}'
        f"{_panels(figure.panels)}{more}"
        f"{legend}{_notes(figure.notes)}{table}</section>"
    )


def _panels(panels: Sequence[Panel]) -> str:
    if not panels:
        return ""
    arrangement, wide = {1: ("one", _ONE), 2: ("two", _TWO)}.get(len(panels), ("", None))
    return (
        f'<div class="panels {arrangement}{" plots" if panels[0].keys else ""}">'
        + "".join(_panel(panel, wide) for panel in panels)
        + "</div>"
    )


def _panel(panel: Panel, wide: float | None) -> str:
    keys = "".join(f"<li>{_key(panel, shape)}{words(text)}</li>" for shape, text in panel.keys)
    lines = "".join(f'<p class="small">{words(line)}</p>' for line in panel.lines)
    drawn = f'<div class="narrow">{svg.render(panel.draw(_NARROW))}</div>'
    if wide:
        drawn += f'<div class="wide">{svg.render(panel.draw(wide))}</div>'
    else:
        drawn = drawn.replace('class="narrow"', 'class="always"', 1)
    return (
        f'<figure class="panel"><figcaption><h3>{words(panel.title)}</h3>{lines}{_alerts(panel.marks)}'
        f"{f'<ul class=keys>{keys}</ul>' if keys else ''}</figcaption>{drawn}</figure>"
    )


def _key(panel: Panel, shape: int) -> str:
    drawing = Drawing(16, 16, (marker(shape, 8, 8, panel.role, bool(panel.marks), 4.5),), "")
    return svg.render(drawing).replace('role="group" tabindex="0" aria-label=""', 'aria-hidden="true"', 1)


def _table(table: Table) -> str:
    numeric = [any(row[column].value is not None for row in table.rows) for column in range(len(table.heads))]
    heads = "".join(
        f'<th scope="col"{" class=n" if right else ""}>{words(head)}</th>'
        for head, right in zip(table.heads, numeric, strict=True)
    )
    rows = "".join(
        "<tr>" + "".join(_cell(cell, right) for cell, right in zip(row, numeric, strict=True)) + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{words(table.caption)}"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(cell: Cell, right: bool) -> str:
    if cell.value is not None:
        return f'<td class="n"><data value="{cell.value!r}">{words(cell.text)}</data></td>'
    kind = ' class="n"' if right else ' class="long"' if len(cell.text) > _LONG_TEXT else ""
    return f"<td{kind}>{words(cell.text)}</td>"


def _method(report: Report) -> str:
    parts = "".join(
        f"<h3>{words(result.name)}</h3><p>{words(_measured(result))}</p>{_inputs(result)}" for result in report.results
    )
    return (
        '<section id="method" class="method"><h2>How it was measured</h2><p class="caption">Latency is one inference '
        "with everything loaded. Graphs and thread counts take turns in rounds, so that drift of the device meets all "
        "alike; ratios to the first graph are paired by round, their range is over the rounds. Ratios between devices "
        "are of the typical latencies. Accuracy is joined by the SHA-256 of the file, never by its name.</p>"
        f"{parts}</section>"
    )


def _measured(result: Result) -> str:
    plan, found = plan_values(result.found), result.found
    text = (
        f"{plan['runs']} recorded runs per graph and setting in rounds of {plan['runs_per_round']}, after "
        f"{plan['warmup']} unrecorded ones"
    )
    text += f"; {plan['cooldown_seconds']:g} s pause between rounds. " if plan["cooldown_seconds"] else ". "
    if any(measurement.round_statistics for measurement in found.measurements):
        text += (
            "The device's program reports a summary of each round only: the typical latency is the median of the "
            "rounds' medians, or the mean where it reports no median; there are no quartiles and no p90. "
        )
    if any(measurement.rounds for measurement in found.measurements):
        text += "Median, quartiles and p90 are of all recorded runs. "
    most = max((one.invocations_per_latency for one in found.measurements), default=1)
    if most > 1:
        text += f"Its clock is coarse: a latency is the mean of up to {most} inferences. "
    errors = [one.output_error for one in found.measurements if one.output_error is not None]
    if errors:
        text += f"Its outputs differ from the computer's by at most {max(errors):.1e} of their largest value. "
    return text.strip()


def _inputs(result: Result) -> str:
    given = result.found.plan.inputs
    source = ", ".join(path.name for path in given) if given else f"random, seed {result.found.plan.seed}"
    return f'<p class="small">Inputs: {words(source)}. File: {words(str(result.path))}</p>'

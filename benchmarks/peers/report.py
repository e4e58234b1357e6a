"""Tables and pictures of measured cases; see `benchmarks/models.py` for what a case is."""

from pathlib import Path
from typing import Any

from benchmarks.peers.programs import PROGRAMS
from mobiatt_tf import files


def _networks(case: dict[str, Any]) -> list[str]:
    """In the order of the rows, without the floor."""
    return list(dict.fromkeys(row["network"] for row in case["rows"] if row["program"] != "floor"))


def _lines(case: dict[str, Any]) -> list[tuple[str, str]]:
    """Program and format of every line, in the order of the table of programs."""
    found = {(row["program"], row["format"]) for row in case["rows"]}
    return [
        (name, format) for name, program in PROGRAMS.items() for format in program.formats if (name, format) in found
    ]


def _cell(case: dict[str, Any], program: str, format: str, network: str, threads: int) -> dict[str, Any] | None:
    wanted = (program, format, "floor" if program == "floor" else network, threads)
    keys = ("program", "format", "network", "num_threads")
    return next((row for row in case["rows"] if tuple(row[key] for key in keys) == wanted), None)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def reference_title(case: dict[str, Any]) -> str:
    """What the ratios of a case refer to, in words."""
    measured = any(row["program"] == "litert_torch" and row["network"] == "softmax" for row in case["rows"])
    return f"{PROGRAMS['litert_torch' if measured else 'ours'].title}, softmax, float32"


def table(case: dict[str, Any]) -> str:
    """One case as Markdown: a line for each program and format, a column for each network and number of threads."""
    networks, threads = _networks(case), case["settings"]["num_threads"]
    columns = [(network, count) for count in threads for network in networks]
    device = case["device"]
    lines = [
        f"{case['model']}, {case['image_size']} x {case['image_size']}, {device['cpu']}: latency relative to "
        f"{reference_title(case)} at as many threads (median of {case['settings']['runs']} runs in ms; processor time "
        "per elapsed time)",
        "",
        f"| program | format | {' | '.join(f'{network}, {_threads(count)}' for network, count in columns)} |",
        f"| --- | --- |{' ---: |' * len(columns)}",
    ]
    for program, format in _lines(case):
        cells = [_text(_cell(case, program, format, network, count)) for network, count in columns]
        if program == "floor":
            cells = [cell if network == networks[-1] else "" for cell, (network, _) in zip(cells, columns, strict=True)]
        lines.append(f"| {PROGRAMS[program].title} | {format} | {' | '.join(cells)} |")
    lines += ["", *(f"- not measured: {skipped_line(one)}" for one in case["skipped"])]
    return "\n".join(lines).rstrip()


def _text(row: dict[str, Any] | None) -> str:
    if row is None or row["median_seconds"] is None:
        return ""
    relative = f"{row['ratio']['median']:.3f} " if row["ratio"] else ""
    return f"{relative}({1e3 * row['median_seconds']:.1f}; {row['cpu_per_wall']:.2f})"


def summary(cases: list[dict[str, Any]]) -> str:
    """All cases as one Markdown table at the first number of threads: ratios alone, programs as lines."""
    lines = list(dict.fromkeys(line for case in cases for line in _lines(case)))
    lines.sort(key=lambda line: list(PROGRAMS).index(line[0]))
    columns = [(case, network) for case in cases for network in _networks(case)]
    header = " | ".join(f"{case['image_size']} px, {network}" for case, network in columns)
    rows = [f"| program | format | {header} |", f"| --- | --- |{' ---: |' * len(columns)}"]
    for program, format in lines:
        cells = []
        for case, network in columns:
            row = _cell(case, program, format, network, case["settings"]["num_threads"][0])
            shown = row is not None and row["ratio"] and (program != "floor" or network == _networks(case)[-1])
            cells.append(f"{row['ratio']['median']:.2f}" if row is not None and shown else "")
        rows.append(f"| {PROGRAMS[program].title} | {format} | {' | '.join(cells)} |")
    return "\n".join(rows)


def skipped_line(skipped: dict[str, Any]) -> str:
    """What was not measured, and why."""
    threads = f", {_threads(skipped['num_threads'])}" if skipped["num_threads"] else ""
    title = PROGRAMS[skipped["program"]].title
    return f"{title}, {skipped['network']}, {skipped['format']}{threads}: {skipped['reason']}"


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    """Bars of latency relative to the reference: a row of pictures for each case, one for each number of threads."""
    from matplotlib.figure import Figure

    threads = list(dict.fromkeys(count for case in cases for count in case["settings"]["num_threads"]))
    longest = max(len(_lines(case)) for case in cases)
    size = (7.5 * len(threads), (1.2 + 0.42 * longest) * len(cases))
    figure = Figure(figsize=size, layout="constrained")
    for position, axis in enumerate(figure.subplots(len(cases), len(threads), squeeze=False).flat):
        case, count = cases[position // len(threads)], threads[position % len(threads)]
        lines, networks = _lines(case), _networks(case)
        height = 0.8 / max(len(networks), 1)
        for index, network in enumerate(networks):
            found = [
                (place + (index - (len(networks) - 1) / 2) * height, row["ratio"]["median"])
                for place, (program, format) in enumerate(lines)
                if (row := _cell(case, program, format, network, count)) and row["ratio"]
                if program != "floor" or network == networks[-1]
            ]
            if found:
                bars = axis.barh(*zip(*found, strict=True), height=height, label=network)
                axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        axis.axvline(1, color="0.6", linestyle=":")
        axis.set_yticks(range(len(lines)), [f"{PROGRAMS[name].title}, {format}" for name, format in lines], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlabel(f"latency; {reference_title(case)} = 1", fontsize=8)
        title = f"{case['model']}, {case['image_size']} x {case['image_size']}, {_threads(count)}"
        axis.set_title(f"{title}\n{case['device']['cpu']}", fontsize=9)
        axis.legend(fontsize=8)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)

"""Table and picture of what benchmarks/resolution.py measured."""

from pathlib import Path
from typing import Any

from mobiatt_tf import files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "resolution.json"
DOCUMENT = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "images" / "performance_resolution.png"
TITLES = {"mobile": "Mobile-Attention", "softmax": "softmax", "floor": "floor: dense layers and convolutions alone"}
PHASES = {"tflite": "TFLite", "training": "training step"}
_COLORS = {"mobile": "C0", "softmax": "C1", "floor": "0.6"}


def table(results: dict[str, Any]) -> str:
    """A row for each model, size and phase: memory and time of both attentions, and their ratio; then the failures."""
    lines = [
        "| model | image | tokens | | Mobile-Attention: MB, s | softmax: MB, s | time, softmax = 1 (by round) "
        "| time, floor = 1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    failures = []
    for found in results["cases"].values():
        rows = found["rows"]
        height, width = found["image_size"]
        image = f"{height} x {width}"
        mobile = rows["mobile"]
        relative, floor = mobile.get("to_softmax"), mobile.get("to_floor")
        cells = [
            found["subject"],
            image,
            f"{found['tokens']:,}",
            PHASES[found["phase"]],
            *(_figures(rows[name]) for name in ("mobile", "softmax")),
            f"{relative['median']:.2f} ({relative['min']:.2f} to {relative['max']:.2f})" if relative else "",
            f"{floor['median']:.2f}" if floor else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        failures += [
            f"- {found['subject']}, {image}, {PHASES[found['phase']]}, {name}: {row['failure']}"
            for name, row in rows.items()
            if row["failure"]
        ]
    return "\n".join([*lines, *([""] if failures else []), *failures])


def _figures(row: dict[str, Any]) -> str:
    if row["failure"]:
        return row["failure"].partition(":")[0]
    return f"{row['peak_bytes'] / 1e6:,.0f}, {row['median_seconds']:.3g}"


def draw(results: dict[str, Any], path: Path) -> None:
    """Peak memory and time over tokens, on log axes: a row of panels for each model, two columns for each phase."""
    from matplotlib.figure import Figure

    cases = list(results["cases"].values())
    subjects = list(dict.fromkeys(one["subject"] for one in cases))
    phases = [phase for phase in PHASES if any(one["phase"] == phase for one in cases)]
    figure = Figure(figsize=(8.4 * len(phases), 3.3 * len(subjects) + 0.5), layout="constrained")
    panels = figure.subplots(len(subjects), 2 * len(phases), squeeze=False)
    for row, subject in enumerate(subjects):
        for column, phase in enumerate(phases):
            chosen = [one for one in cases if (one["subject"], one["phase"]) == (subject, phase)]
            chosen.sort(key=lambda one: one["tokens"])
            memory, time = panels[row, 2 * column : 2 * column + 2]
            _draw_panel(memory, chosen, "peak_bytes", 1e6, "peak memory (MB)")
            _draw_panel(time, chosen, "median_seconds", 1, "time (s)")
            for axis in (memory, time):
                axis.set_title(f"{subject}, {PHASES[phase]}", fontsize=9)
    device, settings = cases[0]["device"], cases[0]["settings"]
    versions = next((one["versions"] for one in cases if one.get("versions")), {})
    named = "".join(f", {name} {version}" for name, version in versions.items())
    figure.suptitle(
        f"One image, float32, {settings['num_threads']} thread(s), {device['cpu']}, ai-edge-litert "
        f"{device['ai_edge_litert']}{named}",
        fontsize=9,
    )
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)


def _draw_panel(axis: Any, cases: list[dict[str, Any]], key: str, unit: float, label: str) -> None:
    from matplotlib.ticker import LogLocator

    axis.set(xscale="log", yscale="log", ylabel=label)
    for name, title in TITLES.items():
        if key == "peak_bytes" and name == "floor":
            continue  # its layers read copies of the image, which no network has
        points = [
            (one["tokens"], one["rows"][name][key] / unit)
            for one in cases
            if name in one["rows"] and not one["rows"][name]["failure"]
        ]
        if points:
            axis.plot(*zip(*points, strict=True), "o-", color=_COLORS[name], label=title, markersize=4)
    if not axis.lines:
        return
    limits = axis.get_ylim()
    _draw_slope(axis)
    axis.set_ylim(limits)
    axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        formatted(lambda value, _: f"{value:g}")
    axis.tick_params(axis="y", which="both", labelsize=7)
    for one in cases:
        failed = [name for name, row in one["rows"].items() if row["failure"]]
        for number, name in enumerate(failed):
            axis.axvline(one["tokens"], color=_COLORS[name], linestyle=":", linewidth=1)
            reason = one["rows"][name]["failure"].partition(":")[0][:20]
            place = {
                "rotation": 90,
                "fontsize": 7 if len(failed) < 3 else 5,
                "color": _COLORS[name],
                "ha": "right",
                "va": "bottom",
            }
            height = 0.04 + 0.96 * number / len(failed)
            axis.text(one["tokens"], height, f"{name}: {reason}", transform=axis.get_xaxis_transform(), **place)
    ticks: list[int] = []
    for one in cases:  # one label for 1024 x 1024 and 800 x 1344
        if not ticks or one["tokens"] > 1.2 * ticks[-1]:
            ticks.append(one["tokens"])
    axis.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks], fontsize=7, rotation=30)
    axis.set_xticks([], minor=True)
    axis.set_xlabel("tokens of the first attention", fontsize=8)
    axis.legend(fontsize=7)


def _draw_slope(axis: Any) -> None:
    """What grows in proportion to tokens is parallel to this line."""
    tokens, values = axis.lines[0].get_data()
    if len(tokens) > 1:
        factor = tokens[-1] / tokens[0]
        ends = [values[-1] / factor, values[-1]]
        axis.plot(
            [tokens[0], tokens[-1]], ends, "--", color="0.8", linewidth=1, zorder=0, label="in proportion to tokens"
        )


def render() -> None:
    """Writes the table of the committed results into docs/performance.md, and draws its picture."""
    from benchmarks.model_table import put_into

    results = files.read_json(RESULTS)
    put_into(DOCUMENT, table(results), "resolution")
    draw(results, PICTURE)

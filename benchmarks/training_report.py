"""Table and picture of what benchmarks/training.py measured."""

from pathlib import Path
from typing import Any

from mobiatt_tf import files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "training_speed.json"
DOCUMENT = ROOT / "docs" / "accuracy.md"
TITLES = {
    "ours": "this project",
    "ours_xla": "this project, XLA",
    "pytorch": "PyTorch",
    "pytorch_compile": "PyTorch, torch.compile",
}
PEAK = "peak"


def _rows(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of networks, in the order of `TITLES` within each precision."""
    rows = [row for row in case["rows"] if row["program"] != PEAK]
    precisions = case["settings"]["precisions"]
    return sorted(rows, key=lambda row: (precisions.index(row["precision"]), list(TITLES).index(row["program"])))


def table(results: dict[str, Any]) -> str:
    """All cases as one Markdown table; what was not measured follows it, with the reason."""
    lines = [
        "| model, attention | precision | program | images/s | speed, PyTorch = 1 (by round) | step / floor "
        "| peak memory, MB (libraries alone) | first step, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    skipped = []
    for case in results["cases"].values():
        for row in _rows(case):
            speed, floor = row["speed"], row["to_floor"]
            cells = [
                f"{case['model']}, {case['network']}",
                row["precision"],
                TITLES[row["program"]],
                f"{row['images_per_second']:.1f}",
                f"{speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f})" if speed else "",
                f"{floor:.1f}" if floor else "",
                f"{row['peak_bytes'] / 1e6:.0f} ({row['baseline_bytes'] / 1e6:.0f})",
                f"{row['first_step_seconds']:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        for one in case["skipped"]:
            title = TITLES.get(one["program"], one["program"])
            skipped.append(
                f"- not measured: {case['model']}, {case['network']}, {title}, {one['precision']}: {one['reason']}"
            )
    return "\n".join([*lines, *([""] if skipped else []), *skipped])


def draw(results: dict[str, Any], path: Path) -> None:
    """Bars of images per second and of peak memory, a column of panels for each case."""
    from matplotlib.figure import Figure

    cases = list(results["cases"].values())
    figure = Figure(figsize=(4.8 * len(cases), 5.6), layout="constrained")
    panels = figure.subplots(2, len(cases), squeeze=False)
    colors = dict(zip(TITLES, ("C0", "C9", "C1", "C8"), strict=True))
    for column, case in enumerate(cases):
        rows = _rows(case)
        names = [f"{TITLES[row['program']]}\n{row['precision']}" for row in rows]
        for axis, values, label in (
            (panels[0, column], [row["images_per_second"] for row in rows], "images/s"),
            (panels[1, column], [row["peak_bytes"] / 1e6 for row in rows], "peak memory, MB"),
        ):
            axis.bar(range(len(rows)), values, color=[colors[row["program"]] for row in rows])
            axis.set_xticks(range(len(rows)), names if axis is panels[1, column] else [], rotation=90, fontsize=7)
            axis.set_ylabel(label)
        settings = case["settings"]
        size = settings["image_size"]
        title = f"{case['model']}, {case['network']}\n{size} x {size}, batch {settings['batch_size']}"
        panels[0, column].set_title(title, fontsize=10)
    versions: dict[str, str] = {}
    for case in cases:
        for row in _rows(case):
            versions |= row["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    device, threads = cases[0]["device"]["cpu"], cases[0]["settings"]["num_threads"]
    figure.suptitle(f"A training step: {device}, {threads} threads; {named}", fontsize=9)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def render() -> None:
    """Writes the table of the committed results into docs/accuracy.md."""
    from benchmarks.model_table import put_into

    put_into(DOCUMENT, table(files.read_json(RESULTS)), "training speed")

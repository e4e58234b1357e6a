"""What the finished runs of benchmarks/accuracy.py say: means and deviations over seeds, tables, picture."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobiatt_tf import files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "accuracy.json"
DOCUMENT = ROOT / "docs" / "accuracy.md"
REFERENCE = "softmax"  # what the other networks are compared with, seed by seed
TITLES = {"softmax": "softmax", "linear": "linear (elu + 1)", "mobile": "Mobile-Attention"}
# Student's t for two-sided 95 % by degrees of freedom.
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
_T95_MANY = 1.96


def spread(values: list[float]) -> dict[str, float | None]:
    """Mean, sample deviation and half of the mean's 95 % interval (Student's t); None where one value has none."""
    if len(values) < 2:
        return {"mean": values[0], "deviation": None, "interval95": None}
    deviation = statistics.stdev(values)
    return {
        "mean": statistics.fmean(values),
        "deviation": deviation,
        "interval95": _T95.get(len(values) - 1, _T95_MANY) * deviation / len(values) ** 0.5,
    }


def summarize(runs: Mapping[tuple[str, str, int], Mapping[str, Any]]) -> dict[str, Any]:
    """The results of all finished runs in one JSON value.

    Args:
        runs: results.json of each run by (dataset, network, seed).

    Returns:
        `datasets`: by name the recipe, the numbers of images and the `networks`, each with top-1 and loss by seed,
        their mean and deviation, and the paired difference to softmax over the seeds that both have. Beside it the
        model, the device and the versions of the runs.
    """
    datasets: dict[str, Any] = {}
    for (dataset, network, seed), results in sorted(runs.items()):
        recipe = {name: value for name, value in results["recipe"].items() if name != "seed"}
        about = {"recipe": recipe, "data": results["dataset"], "networks": {}}
        row = datasets.setdefault(dataset, about)["networks"].setdefault(
            network,
            {
                "attention": results["model"]["attention"],
                "head_dim": results["model"]["head_dim"],
                "parameters": results["model"]["parameters"],
                "seeds": {},
            },
        )
        row["seeds"][str(seed)] = {
            "top1": results["top1"],
            "loss": results["loss"],
            "train_seconds": round(results["train_seconds"], 1),
        }
    for row in datasets.values():
        networks = row["networks"].values()
        reference = next((one for one in networks if one["attention"] == REFERENCE), None)
        for one in networks:
            one["top1"] = spread([values["top1"] for values in one["seeds"].values()])
            one["loss"] = spread([values["loss"] for values in one["seeds"].values()])
            one["to_softmax"] = _difference(one, reference) if reference else None
    last = next(reversed(sorted(runs.items())))[1]
    return {
        "model": {name: last["model"][name] for name in ("family", "variant", "input_shape")},
        "device": last["device"],
        "threads_per_run": last["cpu_threads"],
        "versions": last["versions"],
        "datasets": datasets,
    }


def _difference(one: dict[str, Any], reference: dict[str, Any]) -> dict[str, float | None] | None:
    """Top-1 minus the reference's, over the seeds that both have."""
    both = [seed for seed in one["seeds"] if seed in reference["seeds"]]
    pairs = [one["seeds"][seed]["top1"] - reference["seeds"][seed]["top1"] for seed in both]
    return spread(pairs) if pairs else None


def table(summary: dict[str, Any], dataset: str) -> str:
    """One dataset as a Markdown table, softmax first, then by attention and channels of a head."""
    lines = [
        "| attention | channels of a head | top-1, % | by seed | minus softmax, points (95 % interval) | loss, nats |",
        "|---|---|---|---|---|---|",
    ]
    for row in _ordered(summary["datasets"][dataset]["networks"]):
        seeds = ", ".join(f"{100 * values['top1']:.2f}" for values in row["seeds"].values())
        cells = [
            TITLES[row["attention"]],
            str(row["head_dim"]),
            _with_deviation(row["top1"], 100, 2),
            seeds,
            _interval(row) if row["attention"] != REFERENCE else "",
            _with_deviation(row["loss"], 1, 3),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ordered(networks: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    order = list(TITLES)
    return sorted(networks.values(), key=lambda row: (order.index(row["attention"]), -row["head_dim"]))


def _with_deviation(values: dict[str, float | None], scale: float, digits: int) -> str:
    mean, deviation = values["mean"], values["deviation"]
    assert mean is not None
    return f"{scale * mean:.{digits}f}" + ("" if deviation is None else f" ± {scale * deviation:.{digits}f}")


def _interval(row: dict[str, Any]) -> str:
    """The difference to softmax in percentage points, bold where the interval leaves out 0."""
    values = row["to_softmax"]
    if values is None:
        return ""
    mean, half = values["mean"], values["interval95"]
    if half is None:
        return f"{100 * mean:+.2f}"
    text = f"{100 * mean:+.2f} ({100 * (mean - half):+.2f} to {100 * (mean + half):+.2f})"
    return f"**{text}**" if abs(mean) > half else text


def draw(summary: dict[str, Any], path: Path) -> None:
    """Top-1 with deviations over the channels of a head, a panel for each dataset; softmax is a band."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    datasets = summary["datasets"]
    figure = Figure(figsize=(6 * len(datasets), 4.8), layout="constrained")
    for axis, (dataset, about) in zip(
        figure.subplots(1, len(datasets), squeeze=False)[0], datasets.items(), strict=True
    ):
        rows = _ordered(about["networks"])
        for color, attention in (("C1", "linear"), ("C0", "mobile")):
            chosen = [row for row in rows if row["attention"] == attention]
            if chosen:
                axis.errorbar(
                    [row["head_dim"] for row in chosen],
                    [100 * row["top1"]["mean"] for row in chosen],
                    [100 * (row["top1"]["deviation"] or 0) for row in chosen],
                    fmt="o-",
                    capsize=4,
                    color=color,
                    label=TITLES[attention],
                )
        for row in rows:
            if row["attention"] == REFERENCE:
                mean, deviation = row["top1"]["mean"], row["top1"]["deviation"] or 0
                label = f"softmax, {row['head_dim']} channels"
                axis.axhline(100 * mean, color="0.4", label=label)
                axis.axhspan(100 * (mean - deviation), 100 * (mean + deviation), color="0.4", alpha=0.2)
        axis.set_xscale("log", base=2)
        ticks = sorted({row["head_dim"] for row in rows})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        seeds = max(len(row["seeds"]) for row in rows)
        axis.set(xlabel="channels of a head", ylabel="top-1, %")
        axis.set_title(
            f"{dataset}, {about['recipe']['epochs']} epochs, up to {seeds} seeds: mean ± deviation", fontsize=10
        )
        axis.legend(fontsize=8)
    model, versions = summary["model"], summary["versions"]
    figure.suptitle(
        f"DeiT {model['variant']}, {model['input_shape'][0]} x {model['input_shape'][1]}; {summary['device']}, "
        f"{summary['threads_per_run']} thread, TensorFlow {versions['tensorflow']}, Keras {versions['keras']}",
        fontsize=9,
    )
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def render() -> None:
    """Writes the tables of the committed results into docs/accuracy.md."""
    from benchmarks.model_table import put_into

    summary = files.read_json(RESULTS)
    for dataset in summary["datasets"]:
        put_into(DOCUMENT, table(summary, dataset), f"accuracy {dataset}")

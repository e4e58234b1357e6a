"""An evaluation as a table, a JSON file and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobiatt_tf import files

_MATRIX_CLASSES = 20  # larger confusion matrices cannot be read in the picture
_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")


def short_names(results: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each result: as many of the last parts of its path as tell it from the others, and its weights."""
    paths = [Path(result["graph"]).parts for result in results]

    def names(count: int) -> list[str]:
        return [
            "/".join(parts[-count:]) + (f" ({result['weights']})" if result["weights"] else "")
            for parts, result in zip(paths, results, strict=True)
        ]

    longest = max(len(parts) for parts in paths)
    return next((found for count in range(1, longest) if len(set(found := names(count))) == len(found)), names(longest))


def format_table(content: dict[str, Any]) -> str:
    """One line for each graph; of what `write` writes to JSON."""
    results, dataset = content["results"], content["dataset"]
    names = short_names(results)
    width = max(len("graph"), *(len(name) for name in names))
    lines = [
        f"{dataset['evaluated_images']} of {dataset['test_images']} test images of {dataset['name']}, "
        f"{dataset['fingerprint']}; {content['device']}, {content['num_threads']} threads",
        f"{'graph':<{width}}  {'top-1':>7}  {'top-5':>7}  {'as first':>8}  {'loss':>6}  {'ECE':>6}  {'Brier':>6}  "
        f"{'confidence':>10}  {'size':>9}",
    ]
    for name, result in zip(names, results, strict=True):
        calibration = result["calibration"]
        top5 = "" if result["top5"] is None else f"{result['top5']:.2%}"
        lines.append(
            f"{name:<{width}}  {result['top1']:>7.2%}  {top5:>7}  {result['agreement_with_first']:>8.2%}  "
            f"{result['loss']:>6.4f}  {calibration['expected_calibration_error']:>6.4f}  "
            f"{calibration['brier_score']:>6.4f}  {calibration['mean_confidence']:>10.2%}  "
            f"{result['size_bytes'] / 1e3:>6.0f} kB"
        )
    return "\n".join(lines)


def write(content: dict[str, Any], confusions: Sequence[np.ndarray], output_dir: Path) -> list[Path]:
    """Writes evaluation.json and evaluation.png, each whole or not at all, and returns their paths.

    Args:
        content: JSON values.
        confusions: int64 [classes, classes] of each result.
        output_dir: made if it is missing.

    Raises:
        UserError: the disk refuses.
    """
    table, picture = output_dir / "evaluation.json", output_dir / "evaluation.png"
    files.write_json(table, content)
    with files.atomic_path(picture) as temporary:
        draw(content, confusions, temporary)
    return [table, picture]


def draw(content: dict[str, Any], confusions: Sequence[np.ndarray], path: Path) -> None:
    """Draws reliability, recall and precision of each class, and confusion matrices of up to 20 classes, to a PNG."""
    from matplotlib.figure import Figure  # here, because matplotlib takes a second to load

    results = content["results"]
    names, classes = short_names(results), content["dataset"]["classes"]
    has_matrices = len(classes) <= _MATRIX_CLASSES
    rows = 4 if has_matrices else 3
    figure = Figure(figsize=(max(9.0, 4.0 * len(results)), 3.6 * rows), layout="constrained")
    parts: Any = figure.subfigures(rows, 1)
    reliability = parts[0].subplots(1, len(results), squeeze=False, sharey=True)[0]
    for axes, name, result in zip(reliability, names, results, strict=True):
        _draw_reliability(axes, name, result)
    reliability[0].set_ylabel("accuracy")
    for part, score in zip(parts[1:3], ("recall", "precision"), strict=True):
        draw_scores(part.subplots(), score, classes, names, results)
    if has_matrices:
        matrices = parts[3].subplots(1, len(results), squeeze=False)[0]
        for axes, name, confusion in zip(matrices, names, confusions, strict=True):
            _draw_matrix(axes, name, classes, confusion)
    figure.suptitle(
        f"{content['dataset']['evaluated_images']} test images of {content['dataset']['name']}; {content['device']}, "
        f"{content['num_threads']} threads, TensorFlow {content['versions']['tensorflow']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=100)


def _draw_reliability(axes: Any, name: str, result: dict[str, Any]) -> None:
    calibration = result["calibration"]
    bins = [each for each in calibration["reliability"] if each["images"]]
    width = calibration["reliability"][0]["high"]
    centres = [(each["low"] + each["high"]) / 2 for each in bins]
    axes.bar(
        centres, [each["images"] / result["images"] for each in bins], width, color="0.85", label="share of images"
    )
    axes.bar(centres, [each["accuracy"] for each in bins], width, color="tab:blue", alpha=0.6, ec="w", label="accuracy")
    axes.plot([0, 1], [0, 1], color="k", lw=0.8, ls="--", label="calibrated")
    axes.plot([each["confidence"] for each in bins], [each["accuracy"] for each in bins], "k.", ms=4)
    axes.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="confidence",
        title=f"{name}\ntop-1 {result['top1']:.2%}, ECE {calibration['expected_calibration_error']:.3f}",
    )
    axes.title.set_fontsize(9)
    axes.legend(fontsize=7, loc="upper left")


def draw_scores(
    axes: Any, score: str, classes: Sequence[str], names: Sequence[str], results: Sequence[dict[str, Any]]
) -> None:
    """Bars by class; beyond what can be labelled, the classes sorted by the score."""
    values = np.array(
        [[np.nan if (v := result["per_class"][c][score]) is None else v for c in classes] for result in results]
    )  # [graphs, classes]
    for index, (name, row) in enumerate(zip(names, values, strict=True)):
        color = _COLORS[index % len(_COLORS)]
        if len(classes) <= _MATRIX_CLASSES:
            width = 0.8 / len(results)
            axes.bar(np.arange(len(classes)) + (index + 0.5) * width - 0.4, row, width, label=name, color=color)
        else:
            axes.plot(np.sort(row[~np.isnan(row)]), label=name, color=color)
    if len(classes) <= _MATRIX_CLASSES:
        axes.set_xticks(range(len(classes)), classes, rotation=30, ha="right", fontsize=7)
    else:
        axes.set_xlabel(f"{len(classes)} classes, sorted by {score}")
    axes.set(ylim=(0, 1), ylabel=score)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=7, loc="lower right")


def _draw_matrix(axes: Any, name: str, classes: Sequence[str], confusion: np.ndarray) -> None:
    """Rows sum to 1; the count stands in each cell."""
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(confusion), strict=True):
        color = "w" if shares[row, column] > 0.5 else "k"
        axes.text(column, row, confusion[row, column], ha="center", va="center", fontsize=5, color=color)
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=6)
    axes.set_yticks(range(len(classes)), classes, fontsize=6)
    axes.set(xlabel="prediction", ylabel="label")
    axes.set_title(name, fontsize=9)

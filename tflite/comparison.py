"""Puts quantized files and models beside the float model: accuracy on a whole test set, size, delegation, latency."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from tqdm import tqdm

from mobiatt_tf import data, files
from mobiatt_tf.errors import UserError, first_line
from mobiatt_tf.verification import Run
from tflite.host import HostDevice
from tflite.measurements import Measurements, Plan, ratio, reference_of, summarize

Logits = Callable[[np.ndarray], np.ndarray]  # float32 [N, height, width, 3] to float32 [N, classes]

FLOAT, FAKE_QUANT = "Keras float32", "Keras fake-quant"  # rows of models; rows of files have the file's name
MIN_AGREEMENT = 0.98  # with the fake-quantized model; seen: 99.6 % and more for int8

_BATCH_SIZE = 64


@dataclass(frozen=True)
class Row:
    """One model or file on the test set.

    Attributes:
        name: what it is.
        file: its name, None for a Keras model.
        top1: share of right classes in [0, 1].
        agreement: share of images with the class that the float model gives.
        agreement_with_fake_quant: of a file with the fake-quantized Keras model it was made from; None without one.
        error: relative root mean square difference of its logits from the float model's.
        size_bytes, nodes, partitions, undelegated_ops: of a file, see `inspect.Description`.
        latency_ratio: median over rounds, to the float32 file of the same run, 1 thread.
        median_seconds: of an inference, 1 thread.
        refused: why the file was not kept; None if it was.
    """

    name: str
    file: str | None
    top1: float
    agreement: float
    agreement_with_fake_quant: float | None
    error: float
    size_bytes: int | None = None
    nodes: int | None = None
    partitions: int | None = None
    undelegated_ops: dict[str, int] | None = None
    latency_ratio: float | None = None
    median_seconds: float | None = None
    refused: str | None = None

    @property
    def score(self) -> float:
        """What decides whether a file is kept."""
        return self.top1


def keras_runner(model: keras.Model) -> Run:
    """The outputs of a Keras model, float32: the logits of a classifier, see `verification.Outputs` for the others."""

    def run(images: np.ndarray) -> Any:
        return keras.tree.map_structure(lambda values: np.asarray(values, "float32"), model.predict_on_batch(images))

    return run


def all_logits(
    runners: Mapping[str, Logits], split: data.Split, image_size: tuple[int, int]
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, str]]:
    """Runs several models on a whole split.

    Returns:
        The logits float32 [M, classes] by name, the labels int [M], and what is wrong with those that have no logits:
        not finite, or LiteRT gave up (int8 DIV does so where a divisor rounds to 0).

    Raises:
        UserError: the float model's are not finite.
    """
    batches = data.test_batches(split, image_size=image_size, batch_size=_BATCH_SIZE)
    outputs: dict[str, list[np.ndarray]] = {name: [] for name in runners}
    failures: dict[str, str] = {}
    labels = []
    steps = math.ceil(len(split) / _BATCH_SIZE)
    for images, batch_labels in tqdm(batches.as_numpy_iterator(), total=steps, desc="compare", leave=False):
        for name, run in runners.items():
            if name in failures:
                continue
            try:
                outputs[name].append(run(images))
            except RuntimeError as error:
                failures[name] = first_line(error)
        labels.append(batch_labels)
    logits = {name: np.concatenate(parts) for name, parts in outputs.items() if name not in failures}
    for name in [name for name, values in logits.items() if not np.isfinite(values).all()]:
        failures[name] = "its logits are not finite"
        del logits[name]
    if FLOAT in failures:
        raise UserError(f"The float model cannot be compared with: {failures[FLOAT]}.")
    return logits, np.concatenate(labels), failures


def make_rows(
    logits: Mapping[str, np.ndarray],
    labels: np.ndarray,
    paths: Mapping[str, Path],
    twins: Mapping[str, str],
    runs: int,
) -> tuple[list[Row], Measurements]:
    """A row for each entry of `logits`, and the measurement of the files in turns.

    Args:
        logits: by name; FLOAT is the float model.
        labels: int [M].
        paths: the files among them by name; the first is the float32 file, which latencies refer to.
        twins: name of a file to that of the fake-quantized model it was made from.
        runs: timed inferences of each file.

    Raises:
        UserError: a file that does not run.
    """
    reference = logits[FLOAT]
    costs, measured = cost_of(paths, runs)
    rows = []
    for name, values in logits.items():
        fake = logits.get(twins.get(name, ""))
        row = Row(
            name=name,
            file=None,
            top1=float(np.mean(values.argmax(-1) == labels)),
            agreement=_agreement(values, reference),
            agreement_with_fake_quant=None if fake is None else _agreement(values, fake),
            error=relative_error(values, reference),
        )
        rows.append(dataclasses.replace(row, **costs.get(name, {})))
    return rows, measured


def cost_of(paths: Mapping[str, Path], runs: int) -> tuple[dict[str, dict[str, Any]], Measurements]:
    """Measures files in turns: the fields of a row from `file` and `size_bytes` on, by name, and the measurement.

    Args:
        paths: files by name; latencies refer to the first.
        runs: timed inferences of each file.

    Raises:
        UserError: a file that does not run.
    """
    measured = HostDevice().run(Plan(graphs=tuple(paths.values()), runs=runs, profile=False))
    if measured.interrupted:
        raise KeyboardInterrupt
    costs = {}
    for name, found, description in zip(paths, measured.measurements, measured.descriptions, strict=True):
        relative, summary = ratio(found, reference_of(measured, found)), summarize(found.latencies)
        costs[name] = {
            "file": paths[name].name,
            "size_bytes": description.size_bytes,
            "nodes": description.nodes,
            "partitions": description.delegate_partitions,
            "undelegated_ops": description.undelegated_ops,
            "latency_ratio": relative.median if relative else None,
            "median_seconds": summary.median if summary else None,
        }
    return costs, measured


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference over the root mean square of `expected`."""
    scale = float(np.sqrt(np.mean(np.square(expected, dtype="float64"))))
    return float(np.sqrt(np.mean(np.square(actual - expected, dtype="float64")))) / max(scale, 1e-30)


def _agreement(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.mean(first.argmax(-1) == second.argmax(-1)))


def check_loss(row: Any, float_score: float, max_loss: float, worst_layer: tuple[str, float] | None) -> str | None:
    """Why a file must not be kept, as a sentence; None if it may.

    Args:
        row: the file: a `Row`, or a `dense_report.DenseRow`.
        float_score: top-1 of the float model on the same images, or the headline metric of another task.
        max_loss: how much of it a file may lose, as a share in [0, 1].
        worst_layer: the layer with the largest error of its own, and that error, if known.
    """
    loss = float_score - row.score
    if loss <= max_loss:
        return None
    layer = ""
    if worst_layer is not None:
        layer = f" The layer that loses most is {worst_layer[0]} (relative error {worst_layer[1]:.3f})."
    return (
        f"{row.name} has {row.score:.2%} where the float model has {float_score:.2%}: it loses {100 * loss:.2f} "
        f"points, more than the allowed {100 * max_loss:.2f} (--max_top1_loss).{layer}"
    )


def format_table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = ("", "top-1", "as float", "as fake-q.", "size", "nodes", "partitions", "latency")
    lines = ["{:<22}{:>9}{:>10}{:>12}{:>11}{:>7}{:>12}{:>9}".format(*head)]
    for row in rows:
        fake = "" if row.agreement_with_fake_quant is None else f"{row.agreement_with_fake_quant:.2%}"
        size = "" if row.size_bytes is None else f"{row.size_bytes / 1e3:,.0f} kB"
        latency = "" if row.latency_ratio is None else f"x {row.latency_ratio:.2f}"
        lines.append(
            f"{row.name:<22}{row.top1:>9.2%}{row.agreement:>10.2%}{fake:>12}{size:>11}{row.nodes or '':>7}"
            f"{row.partitions or '':>12}{latency:>9}{'  refused' if row.refused else ''}"
        )
    return "\n".join(lines)


def to_json(
    rows: Sequence[Any], layer_errors: Mapping[str, float], measured: Measurements, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything as plain values."""
    return {
        **extra,
        "rows": [dataclasses.asdict(row) for row in rows],
        "layer_errors": dict(layer_errors),
        "device": measured.device,
        "runs": measured.plan.runs,
        "threads": 1,
        "largest_rank": max(description.max_rank for description in measured.descriptions),
        "op_counts": {description.path: description.op_counts for description in measured.descriptions},
    }


def write_report(output: Path, report: Mapping[str, Any]) -> None:
    """report.json and report.png in the directory `output`."""
    with files.atomic_path(output / "report.png") as temporary:
        draw(report, temporary)
    files.write_json(output / "report.json", report)


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Top-1 or another task's metrics, size and latency of every row, and the error that each layer makes."""
    from matplotlib.figure import Figure

    rows = report["rows"]
    measured = [row for row in rows if row["size_bytes"] is not None]
    figure = Figure(figsize=(16, 5), layout="constrained")
    accuracy, cost, errors = figure.subplots(1, 3)
    titles = report.get("metrics", {"top1": "Top-1"})  # by their keys; the first is the headline
    height = 0.8 / len(titles)
    for offset, (key, title) in enumerate(titles.items()):
        values = [100 * (row[key] if "metrics" not in row else row["metrics"][key]) for row in rows]
        bars = accuracy.barh([place + height * offset for place in range(len(rows))], values, height, label=title)
        accuracy.bar_label(bars, fmt="%.2f")
    accuracy.set_yticks([place + 0.4 - height / 2 for place in range(len(rows))], [row["name"] for row in rows])
    accuracy.invert_yaxis()
    if len(titles) > 1:
        accuracy.legend()
    accuracy.set(title=f"{' and '.join(titles.values())} on {report['test_images']:,} test images (%)", xlim=(0, 110))
    for offset, (key, label) in enumerate((("size_bytes", "size"), ("latency_ratio", "latency, 1 thread"))):
        places = [index + 0.4 * offset for index in range(len(measured))]
        values = [row[key] / (measured[0][key] or 1) for row in measured]
        cost.bar_label(cost.barh(places, values, height=0.35, label=label), fmt="%.2f")
    cost.set_yticks(range(len(measured)), [row["name"] for row in measured])
    cost.invert_yaxis()
    cost.margins(x=0.12)
    cost.legend()
    cost.set(title=f"Relative to the float32 file\n{report['device']['cpu']}")
    layers = report["layer_errors"]
    errors.barh(list(layers), list(layers.values()))
    errors.invert_yaxis()
    errors.tick_params(axis="y", labelsize=max(3, min(9, 180 // max(len(layers), 1))))
    errors.set(title="Relative error that each quantized layer adds\n(its float input, its fake-quantized output)")
    figure.savefig(path, dpi=110)

"""Quantized detectors and segmenters beside the float model: average precision or intersection over union, and cost.

What `comparison` does for classifiers.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mobiatt_tf import verification
from mobiatt_tf.errors import UserError, first_line
from mobiatt_tf.verification import DenseComparison, Run
from tflite.comparison import FLOAT, MIN_AGREEMENT, cost_of
from tflite.measurements import Measurements
from tflite.verify import BOX_TOLERANCES, TOLERANCES

# What is reported of each task, by the key in its results; the first is the headline, which decides.
METRICS = {
    "detection": {"ap": "AP", "ap50": "AP50"},
    "segmentation": {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"},
}
_COMPARED_IMAGES = 16  # each gives thousands of places


@dataclass(frozen=True)
class DenseRow:
    """One model or file on the test set.

    Attributes:
        name: what it is.
        file: its name, None for a Keras model.
        metrics: shares in [0, 1] by the keys of `METRICS`, the headline first.
        agreement: share of places with the class that the float model gives, see `verification.DenseComparison`.
        agreement_with_fake_quant: of a file with the fake-quantized Keras model it was made from; None without one.
        output_errors: of each output: largest difference from the float model over the largest of its values.
        errors_from_fake_quant: the same from the fake-quantized model.
        box_error: of a detector, see `verification.DenseComparison`; None where it finds nothing.
        box_error_from_fake_quant: the same from the fake-quantized model.
        size_bytes, nodes, partitions, undelegated_ops: of a file, see `inspect.Description`.
        latency_ratio: median over rounds, to the float32 file of the same run, 1 thread.
        median_seconds: of an inference, 1 thread.
        refused: why the file was not kept; None if it was.
    """

    name: str
    file: str | None
    metrics: dict[str, float]
    agreement: float
    agreement_with_fake_quant: float | None
    output_errors: dict[str, float]
    errors_from_fake_quant: dict[str, float] | None
    box_error: float | None = None
    box_error_from_fake_quant: float | None = None
    size_bytes: int | None = None
    nodes: int | None = None
    partitions: int | None = None
    undelegated_ops: dict[str, int] | None = None
    latency_ratio: float | None = None
    median_seconds: float | None = None
    refused: str | None = None

    @property
    def score(self) -> float:
        """The headline metric."""
        return next(iter(self.metrics.values()))


def measure(
    task: str, runners: Mapping[str, Run], dataset: Any, image_size: tuple[int, int], progress: bool = True
) -> tuple[dict[str, Any], dict[str, str]]:
    """Runs several models on the whole test split.

    Args:
        task: "detection" or "segmentation".
        runners: models by name; `FLOAT` is the float one.
        dataset: a `data.dense.DenseDataset`.
        image_size: (height, width) of their input.
        progress: a bar on standard error for each.

    Returns:
        The task's result by name, and what is wrong with those that have none: outputs that are not finite, or LiteRT
        gave up.

    Raises:
        UserError: the float model cannot be measured.
    """
    results: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name, run in runners.items():
        try:
            results[name] = _evaluator(task, image_size)(run, dataset, dataset.test, image_size, progress=progress)
        except (ValueError, RuntimeError) as error:
            failures[name] = first_line(error)
    if FLOAT in failures:
        raise UserError(f"The float model cannot be compared with: {failures[FLOAT]}")
    return results, failures


def _evaluator(task: str, image_size: tuple[int, int]) -> Callable[..., Any]:
    from mobiatt_tf.tasks import detection, segmentation

    if task == "segmentation":
        return segmentation.evaluate_outputs

    def evaluate(*arguments: Any, **options: Any) -> Any:
        return detection.evaluate_outputs(*arguments, batch_size=verification.batch_size_for(image_size), **options)

    return evaluate


def make_rows(
    task: str,
    results: Mapping[str, Any],
    runners: Mapping[str, Run],
    images: np.ndarray,
    paths: Mapping[str, Path],
    twins: Mapping[str, str],
    runs: int,
) -> tuple[list[DenseRow], Measurements]:
    """A row for each entry of `results`, and the measurement of the files in turns.

    Args:
        task: "detection" or "segmentation".
        results: of `measure`.
        runners: the models by name.
        images: float32 [N, height, width, 3], normalised: what the outputs are compared on, place by place.
        paths: the files among the models by name; the first is the float32 file, which latencies refer to.
        twins: name of a file to that of the fake-quantized model it was made from.
        runs: timed inferences of each file.

    Raises:
        UserError: a file that does not run.
    """
    costs, measured = cost_of(paths, runs)
    rows = []
    for name, result in results.items():
        check = _compared(runners[FLOAT], runners[name], images, name)
        twin = twins.get(name)
        fake = _compared(runners[twin], runners[name], images, name) if twin in results and twin is not None else None
        line = result.to_line()
        row = DenseRow(
            name=name,
            file=None,
            metrics={key: line[key] for key in METRICS[task]},
            agreement=check.agreement,
            agreement_with_fake_quant=fake.agreement if fake else None,
            output_errors=check.output_errors,
            errors_from_fake_quant=fake.output_errors if fake else None,
            box_error=check.box_error,
            box_error_from_fake_quant=fake.box_error if fake else None,
        )
        rows.append(dataclasses.replace(row, **costs.get(name, {})))
    return rows, measured


def _compared(expected: Run, actual: Run, images: np.ndarray, name: str) -> DenseComparison:
    return verification.compare_dense(expected, actual, images, tolerance=np.inf)


def compared_images(task: str, dataset: Any, image_size: tuple[int, int]) -> np.ndarray:
    """Test images for `make_rows`, spread over the split, float32 [N, height, width, 3] normalised."""
    return verification.dense_images(task, dataset.test, image_size, _COMPARED_IMAGES)


def unlike_its_twin(row: DenseRow) -> str | None:
    """Why a file does not compute what the fake-quantized model does, as a sentence; None if it does."""
    method = "int8_full" if row.name.startswith("int8_full") else "int8"
    bounds = [(error, TOLERANCES[method], name) for name, error in (row.errors_from_fake_quant or {}).items()]
    if row.box_error_from_fake_quant is not None:
        bounds.append((row.box_error_from_fake_quant, BOX_TOLERANCES[method], "boxes around objects"))
    for error, tolerance, name in bounds:
        if not error <= tolerance:
            return (
                f"{row.name} differs from the fake-quantized model by {error:.2e} of the largest of {name}, more than "
                f"the allowed {tolerance:.0e}: the converter changed it."
            )
    agreement = row.agreement_with_fake_quant
    if agreement is not None and not agreement >= MIN_AGREEMENT:
        return (
            f"{row.name} gives the class of the fake-quantized model at {agreement:.2%} of the places only, less than "
            f"{MIN_AGREEMENT:.0%}: the converter changed it."
        )
    return None


def loses_a_small_score(row: DenseRow, float_score: float, max_loss: float) -> str | None:
    """Why a file must not be kept where the float model has no more points than may be lost, as a sentence, or None.

    There the allowed points stand for per cent of what the float model has: otherwise a file that finds nothing passes.
    """
    loss = float_score - row.score
    if float_score > max_loss or loss <= max_loss * float_score:
        return None
    return (
        f"{row.name} has {row.score:.2%} where the float model has {float_score:.2%}, no more than the allowed loss of "
        f"{100 * max_loss:.2f} points (--max_top1_loss): of so little it may lose {max_loss:.0%}. Train the model "
        "longer first."
    )


def format_table(task: str, rows: Sequence[DenseRow]) -> str:
    """The rows as text."""
    titles = list(METRICS[task].values())
    widths = [max(9, len(title) + 2) for title in titles]
    head = "".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True))
    lines = [
        f"{'':<22}{head}{'as float':>10}{'as fake-q.':>12}{'size':>11}{'nodes':>7}{'partitions':>12}{'latency':>9}"
    ]
    for row in rows:
        fake = "" if row.agreement_with_fake_quant is None else f"{row.agreement_with_fake_quant:.2%}"
        size = "" if row.size_bytes is None else f"{row.size_bytes / 1e3:,.0f} kB"
        latency = "" if row.latency_ratio is None else f"x {row.latency_ratio:.2f}"
        metrics = "".join(f"{value:>{width}.2%}" for value, width in zip(row.metrics.values(), widths, strict=True))
        lines.append(
            f"{row.name:<22}{metrics}{row.agreement:>10.2%}{fake:>12}{size:>11}{row.nodes or '':>7}"
            f"{row.partitions or '':>12}{latency:>9}{'  refused' if row.refused else ''}"
        )
    return "\n".join(lines)

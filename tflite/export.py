"""Exports a trained model to TensorFlow Lite, checks the file against the Keras model, and describes it.

Example:
    python -m tflite.export --checkpoint=runs/quickstart/train --format=dynamic --output=runs/dynamic.tflite

A file that does not match its Keras model, that needs TensorFlow's operators, or that cannot be loaded is an error and
is not left behind.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import flags

from keras_models.command_line import check_images, define_check_flags, define_model_flags, model_from_flags
from mobiatt_tf import cli, files, verification
from mobiatt_tf.complexity import attention_stages
from mobiatt_tf.errors import UserError
from mobiatt_tf.models import rebuild
from mobiatt_tf.tasks import task_of
from tflite import convert, inspect, verify
from tflite.host import HostDevice
from tflite.measurements import Plan

CHECK_IMAGES = 128
DENSE_CHECK_IMAGES = 16  # each has thousands of places to compare, and costs as much as hundreds of small images


@dataclass(frozen=True)
class Export:
    """A file that passed its checks.

    `tokens` are those of the attention of each stage that has any; `task` is one of `mobiatt_tf.tasks.TASKS`,
    `classes` are the names of the classes, if they are known, and `category_ids` what a detector's dataset calls them.
    """

    path: Path
    format: str
    comparison: verification.Comparison
    description: inspect.Description
    median_seconds: float
    target: str = "arm"
    model: str = ""
    tokens: tuple[int, ...] = ()
    task: str = "classification"
    classes: tuple[str, ...] | None = None
    category_ids: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the JSON beside the file."""
        return {
            "file": self.path.name,
            "format": self.format,
            "target": self.target,
            "model": self.model,
            "tokens": list(self.tokens),
            "task": self.task,
            "classes": None if self.classes is None else list(self.classes),
            **({} if self.category_ids is None else {"category_ids": list(self.category_ids)}),
            "sha256": files.sha256(self.path),
            "verification": {**dataclasses.asdict(self.comparison), "passed": self.comparison.passed},
            "latency": {"median_seconds": self.median_seconds, "threads": 1, "device": "host"},
            "description": {**inspect.to_json(self.description), "path": self.path.name},
        }


def export(
    model: keras.Model,
    output: str | Path,
    format: str | None,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    runs: int = 30,
    target: str = "arm",
    optimize: bool = True,
    classes: Sequence[str] | None = None,
    category_ids: Sequence[int] | None = None,
) -> Export:
    """Converts, checks and describes; `output` exists afterwards only if every check passed.

    Args:
        model: a functional model with one image input; a classifier, a detector or a segmenter.
        output: the .tflite file to write.
        format: see `convert.format_of`.
        images: float32 [N, height, width, 3], normalised: the images that file and model are compared on.
        labels: int [N] of a classifier, or None.
        runs: timed inferences for the latency in the description.
        target: see `convert.formulation_for`.
        optimize: see `convert.convert`.
        classes: the names of the classes, for the JSON.
        category_ids: what the dataset itself calls them (COCO's ids), for the JSON.

    Raises:
        UserError: the file does not match the model, or needs operators that LiteRT does not have.
        ValueError: an unknown format, or a model that cannot be converted.
    """
    output = Path(output)
    format = convert.format_of(model, format)
    task = task_of(model)
    content = convert.convert(model, format, convert.formulation_for(format, target), optimize)
    with files.atomic_path(output) as temporary:
        temporary.write_bytes(content)
        description = inspect.describe(temporary)
        check_description(description)
        reference = rebuild(model, batch_size=None)  # in float32, as the file computes
        comparison = verify.verify(
            temporary,
            reference,
            images,
            labels,
            verify.TOLERANCES[format],
            verify.BOX_TOLERANCES[format],
            verify.LEAST_AGREEMENT[format],
        )
        if not comparison.passed:
            raise UserError(
                f"The {format} file differs from its Keras model by {_error(comparison)} on {comparison.images} "
                f"images, more than the allowed {_allowed(comparison)}. Nothing was written."
            )
        plan = Plan(graphs=(temporary,), runs=runs, warmup=3, profile=False)
        found = HostDevice().run(plan)
        if found.interrupted:
            raise KeyboardInterrupt
        # No moment at which a new file stands beside the report of an old one.
        output.with_suffix(".json").unlink(missing_ok=True)
    description = dataclasses.replace(description, path=str(output))
    result = Export(
        output,
        format,
        comparison,
        description,
        median_seconds=float(np.median(found.measurements[0].latencies)),
        target=target,
        model=model.name,
        tokens=tuple(stage["tokens"] for stage in attention_stages(model)),
        task=task,
        classes=None if classes is None else tuple(classes),
        category_ids=None if category_ids is None else tuple(category_ids),
    )
    files.write_json(output.with_suffix(".json"), result.to_json())
    return result


def check_description(description: inspect.Description) -> None:
    """What every file that we hand out must fulfil.

    Raises:
        UserError: operators of TensorFlow (Flex) or custom ones, more than one signature, or not runnable here.
    """
    foreign = (*description.flex_ops, *description.custom_ops)
    if foreign:
        raise UserError(f"The converted file needs operators that LiteRT does not have: {', '.join(foreign)}.")
    if len(description.signatures) != 1:
        raise UserError(f"The converted file has {len(description.signatures)} signatures instead of one.")
    if description.delegate_partitions is None:
        raise UserError(f"The converted file does not run in LiteRT: {description.undelegated_reason}")


def format_table(result: Export) -> str:
    """The description with parity and latency, as text."""
    check = result.comparison
    lines = [
        inspect.format_table(result.description),
        f"Against Keras   max error {_error(check, digits=1)} (allowed {check.tolerance:.0e}), same class on "
        f"{check.agreement:.2%} of {_places(check, result.task)}{check.images} real images",
    ]
    if check.keras_top1 is not None:
        lines.append(f"Top-1           {check.file_top1:.2%} (Keras {check.keras_top1:.2%}) on these images")
    lines.append(f"Latency         {result.median_seconds * 1e3:.2f} ms median, 1 thread, this machine")
    return "\n".join(lines)


def _error(check: verification.Comparison, digits: int = 2) -> str:
    """The largest error, and of a dense model that of each output."""
    if not isinstance(check, verification.DenseComparison):
        return f"{check.max_relative_error:.{digits}e} of max|logit|"
    errors = [f"{error:.{digits}e} of the largest of {name}" for name, error in check.output_errors.items()]
    if check.box_error is not None:
        errors.append(f"{check.box_error:.{digits}e} of the largest of boxes around objects")
    return " and ".join(errors)


def _allowed(check: verification.Comparison) -> str:
    """The bounds on the error, and of a detector what else it must keep."""
    if not isinstance(check, verification.DenseComparison) or not check.least_agreement:
        return f"{check.tolerance:.0e}"
    return (
        f"{check.tolerance:.0e} ({check.box_tolerance:.0e} around objects), or gives the same class at "
        f"{check.agreement:.2%} of {check.places:,} anchors only (at least {check.least_agreement:.1%})"
    )


def _places(check: verification.Comparison, task: str) -> str:
    if not isinstance(check, verification.DenseComparison):
        return ""
    return f"{check.places:,} {'anchors' if task == 'detection' else 'pixels'} of "


def _classes(
    dataset: str | None, checkpoint: str | None, cache_dir: str | None, task: str
) -> tuple[Sequence[str] | None, Sequence[int] | None]:
    """The names of the classes and a detector's category ids: those of the run's results, else of its dataset."""
    names, ids = verification.class_names_of_run(checkpoint), verification.category_ids_of_run(checkpoint)
    wanted = names is None or (task == "detection" and ids is None)
    if wanted and (dataset or verification.dataset_of_run(checkpoint)):
        found = verification.dataset_of(checkpoint, dataset, cache_dir, task)
        names = names or tuple(found.class_names)
        if task == "detection" and names == tuple(found.class_names):
            ids = found.category_ids
    return names, ids


def main(_: Sequence[str]) -> None:
    """Exports as the flags say."""
    values = flags.FLAGS
    output = files.user_path(values.output)
    if output.suffix != ".tflite":
        raise UserError(f"--output={values.output} must end in .tflite.")
    model = model_from_flags()
    try:
        task = task_of(model)
        count = check_images(task, DENSE_CHECK_IMAGES)
        images, labels, what = verification.checking_images(
            values.checkpoint, values.dataset, values.cache_dir, model.input_shape[1:3], count, task
        )
        print(f"Checked on {what}.")
        classes, ids = _classes(values.dataset, values.checkpoint, values.cache_dir, task)
        fits = classes is not None and len(classes) == verification.class_count(model)
        result = export(
            model,
            output,
            values.format,
            images,
            labels,
            target=values.target,
            optimize=values.optimize,
            classes=classes if fits else None,
            category_ids=ids if fits else None,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    print(format_table(result))
    print(f"Wrote {output} and {output.with_suffix('.json').name} beside it.")


def define_flags() -> None:
    """The command line's flags."""
    define_model_flags()
    define_check_flags(CHECK_IMAGES, DENSE_CHECK_IMAGES)
    flags.DEFINE_enum(
        "format",
        None,
        [*convert.FORMATS, "int8", "int8_full"],
        "Precision of the file; without it float32, or that of a quantized model.",
    )
    flags.DEFINE_enum(
        "target", "arm", list(convert.GROUP_WIDTHS), "Processors that the file is meant for; runs on all."
    )
    flags.DEFINE_bool("optimize", True, "--nooptimize writes the graph as it is trained.")
    flags.DEFINE_string(
        "output", None, "The .tflite file to write; a .json beside it says what was checked.", required=True
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main)

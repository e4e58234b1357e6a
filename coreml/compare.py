"""Exports every variant of a trained model and compares size, error and accuracy in one table.

Example:
    python -m coreml.compare --checkpoint=runs/quickstart/train --output_dir=runs/coreml

float32, float16, int8 weights, a palette of 256 values, W8A8 calibrated on training images, and, with --qat_checkpoint,
W8A8 with the ranges and kernels that tflite.qat trained. Each package is checked as `coreml.export` does.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import flags

from coreml import export, package, verify
from coreml.interpreter import Interpreter
from keras_models.command_line import define_check_flags
from mobiatt_tf import cli, data, files, quantization, verification
from mobiatt_tf.errors import UserError
from mobiatt_tf.models import load_trained
from mobiatt_tf.training.evaluator import class_count

# Name of the package, its precision and its weights.
VARIANTS: dict[str, tuple[str, str]] = {
    "float32": ("float32", "float"),
    "float16": ("float16", "float"),
    "int8": ("float16", "int8"),
    "palette8": ("float16", "palette8"),
    "w8a8": ("float16", "w8a8"),
    "w8a8_trained": ("float16", "w8a8"),
}


def compare(
    model: keras.Model,
    dataset: data.Dataset,
    output_dir: Path,
    trained: keras.Model | None = None,
    check_images: int = verify.CHECK_IMAGES,
    calibration_images: int = 512,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes the packages that pass, compare.json and compare.png; removes older packages that pass no more.

    Args:
        model: float classifier of a dataset.
        dataset: training images to calibrate on, test images to compare on.
        output_dir: directory.
        trained: the same model after tflite.qat; None leaves that variant out.
        check_images: how many test images.
        calibration_images: how many training images set the ranges of "w8a8".
        progress: shows bars.

    Returns:
        The content of compare.json: "rows" by variant, each with size, operators, error, agreement and top-1 against
        the float Keras model (in declared types); "refused" with the reason of each package that did not pass.

    Raises:
        UserError: no package passed, or the disk is full.
    """
    size = model.input_shape[1:3]
    images, labels = verification.dataset_images(dataset, size, check_images)
    pictures = verify.as_pixels(images)
    expected = verification.keras_logits(model, verify.from_pixels(pictures))
    rows: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name, (precision, weights) in VARIANTS.items():
        source = model
        if name == "w8a8":
            source = quantization.calibrated_copy(model, "int8", dataset, calibration_images)
        elif name == "w8a8_trained":
            if trained is None:
                continue
            source = trained
        path = output_dir / f"{name}.mlpackage"
        try:
            result = export.export(
                source, path, images, labels, precision=precision, weights=weights,
                class_names=dataset.class_names, progress=progress,
            )  # fmt: skip
        except verify.RefusedError as error:
            refused[name] = str(error)
            for leftover in (path, export.golden_path(path)):  # of an earlier call: it would seem to have passed
                shutil.rmtree(leftover, ignore_errors=True)
            for leftover in verify.report_paths(path):
                leftover.unlink(missing_ok=True)
            continue
        rows[name] = row(result, expected, labels, pictures)
    if not rows:
        raise UserError("No package passed. " + " ".join(f"{name}: {reason}" for name, reason in refused.items()))
    found = {"dataset": dataset.name, "images": len(images), "rows": rows, "refused": refused}
    files.write_json(output_dir / "compare.json", found)
    draw(found, output_dir / "compare.png")
    return found


def row(result: export.Export, expected: np.ndarray, labels: np.ndarray, pictures: np.ndarray) -> dict[str, Any]:
    """What stands in the table for one package; `expected` are the float model's logits [N, classes]."""
    mode = "typed" if "typed" in result.verification.comparisons else "float32"
    own = result.verification.comparisons[mode]
    agreement = own.agreement
    error, top1 = own.max_relative_error, own.file_top1
    if result.verification.kind == "w8a8":  # the package was compared with the quantized model: here with the float one
        logits = Interpreter(package.read(result.path), mode).logits(pictures)
        against = verification.compare(expected, logits, labels, tolerance=np.inf)
        agreement, error, top1 = against.agreement, against.max_relative_error, against.file_top1
    tightest = result.verification.tightest
    return {
        "ios": result.ios,
        "size_bytes": result.size_bytes,
        "operators": result.operators,
        "max_relative_error": error,
        "agreement": agreement,
        "top1": top1,
        "keras_top1": float(np.mean(expected.argmax(-1) == labels)),
        "own_error": own.max_relative_error,
        "own_agreement": own.agreement,
        "headroom": tightest.headroom if tightest else None,
    }


def format_table(found: dict[str, Any]) -> str:
    """The comparison as text."""
    lines = [f"{'package':<13} {'iOS':>3} {'MB':>7} {'operators':>9} {'error':>8} {'same class':>10} {'top-1':>7}"]
    for name, entry in found["rows"].items():
        lines.append(
            f"{name:<13} {entry['ios']:>3} {entry['size_bytes'] / 1e6:>7.2f} {entry['operators']:>9} "
            f"{entry['max_relative_error']:>8.1e} {entry['agreement']:>10.2%} {entry['top1']:>7.2%}"
        )
    lines += [f"{name:<13} refused: {reason}" for name, reason in found["refused"].items()]
    keras_top1 = next((entry["keras_top1"] for entry in found["rows"].values()), float("nan"))
    lines.append(
        f"{found['images']} test images of {found['dataset']}; error of max|logit| and class against the float Keras "
        f"model, whose top-1 is {keras_top1:.2%}."
    )
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Size and error of each package as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    sizes, errors = figure.subplots(1, 2)
    names = list(found["rows"])
    bars = sizes.bar(names, [entry["size_bytes"] / 1e6 for entry in found["rows"].values()])
    sizes.bar_label(bars, fmt="%.2f", fontsize=8)
    sizes.set_ylabel("MB")
    errors.bar(names, [max(entry["max_relative_error"], 1e-9) for entry in found["rows"].values()])
    errors.set_yscale("log")
    errors.set_ylabel("error of max|logit| against float Keras")
    for axes in (sizes, errors):
        axes.tick_params(axis="x", labelrotation=30)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(_: Sequence[str]) -> None:
    """Compares as the flags say."""
    values = flags.FLAGS
    model = load_trained(values.checkpoint)
    if len(model.outputs[0].shape) != 2:
        raise UserError(f"{values.checkpoint} is no classifier: export and check its variants with coreml.export.")
    if quantization.is_quantized(model):
        raise UserError(f"{values.checkpoint} is quantized. Give the float model, and this one as --qat_checkpoint.")
    trained = load_trained(values.qat_checkpoint) if values.qat_checkpoint else None
    if trained is not None and not quantization.is_quantized(trained):
        raise UserError(f"{values.qat_checkpoint} is not quantized: tflite.qat writes such a model.")
    dataset = verification.dataset_of(values.checkpoint, values.dataset, values.cache_dir)
    if (classes := class_count(model)) != len(dataset.class_names):
        raise UserError(f"The model has {classes} classes, the dataset {dataset.name} {len(dataset.class_names)}.")
    output_dir = files.user_path(values.output_dir)
    try:
        found = compare(model, dataset, output_dir, trained, values.check_images, progress=True)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(format_table(found))
    print(f"Wrote the packages, compare.json and compare.png to {output_dir}.")


def define_flags() -> None:
    """The command line's flags."""
    flags.DEFINE_string("checkpoint", None, "Output directory of a training run, or a .keras file.", required=True)
    flags.DEFINE_string(
        "qat_checkpoint", None, "The same model after tflite.qat: its output directory, or .keras file."
    )
    flags.DEFINE_string("output_dir", None, "Gets the packages and the comparison.", required=True)
    define_check_flags(verify.CHECK_IMAGES)


if __name__ == "__main__":
    define_flags()
    cli.run(main)

"""Exports a trained model to a Core ML package, checks the saved package without a Mac, and keeps it only if it passes.

Example:
    python -m coreml.export --checkpoint=runs/quickstart/train --output=runs/model.mlpackage

The package takes an RGB image of fixed size (the normalisation is inside). A classifier gives logits, probabilities
and, where the classes have names, a label; a detector boxes and logits, a segmenter a map of logits. Beside it stand
X.mlpackage.json and .png with what was checked, and X.golden/ with pictures and what the package gives for them; by
those of a classifier the app in coreml/ios checks a phone.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import flags

from coreml import compress, convert, lint, package, verify
from coreml.calls import outputs_of
from coreml.interpreter import Interpreter, logits_output
from coreml.lowering import least_ios
from coreml.tools import SPECIFICATION_VERSIONS
from keras_models.command_line import check_images, define_check_flags, define_model_flags, model_from_flags
from mobiatt_tf import cli, files, quantization, verification
from mobiatt_tf.errors import UserError
from mobiatt_tf.tasks import task_of

_GOLDEN_IMAGES = 4
_GRAPH_IMAGES = 8  # on which the program is checked in float32, before its precision is reduced
_GRAPH_ERROR = 1e-4  # `typical_error` of every layer there; seen: 2e-5
# The same in detectors and segmenters whose activations are rounded to int8: some of the many numbers of large maps
# always fall to the next step, attention and norms hand that on, and half of a coarse level of 12 places ends one step
# off. A step is 1/255 of about 6 deviations, .025; two are refused, as is every mistake in layout or order, which
# gives about 1. A zero point that is wrong by one is within this: tests/coreml/test_lowering.py holds the steps.
_ROUNDED_GRAPH_ERROR = 5e-2
_GOLDEN_TOLERANCE = 1e-3  # at least, for a phone that adds up in another order
_GOLDEN_PLACES = 1000  # of each output of a detector or segmenter
_CALIBRATION_IMAGES = 512


@dataclass(frozen=True)
class Export:
    """A package that passed its checks."""

    path: Path
    ios: int
    verification: verify.Verification
    findings: tuple[lint.Finding, ...]
    operators: int
    size_bytes: int


def export(
    model: keras.Model,
    output: str | Path,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    ios: int | None = None,
    precision: str = "float16",
    weights: str = "float",
    class_names: Sequence[str] | None = None,
    description: convert.Description | None = None,
    progress: bool = False,
    least_agreement: float | None = None,
) -> Export:
    """Converts, saves, reads back and checks; `output` exists afterwards only if every check passed.

    Args:
        model: a functional model with one image input, a classifier, a detector or a segmenter (see
            `mobiatt_tf.tasks.task_of`); one of `mobiatt_tf.quantization.quantize_aware` carries its int8 ranges and
            kernels over (W8A8).
        output: the .mlpackage to write.
        images: float32 [N, height, width, 3], normalised: real images, on which the scale of the residual streams is
            chosen and the package compared with the model.
        labels: int [N] of a classifier, or None.
        ios: deployment target, 15 to 18; None takes the least that can hold the weights.
        precision: "float16" or "float32", of the tensors.
        weights: "float", "int8", "palette8", or "w8a8" for a quantized model.
        class_names: the label of each class, see `convert.convert`; None leaves labels out.
        description: of the model.
        progress: shows a bar while checking.
        least_agreement: see `verify.verify`.

    Raises:
        RefusedError: the package does not match the model (a `UserError`).
        UserError: coremltools is missing or wrote another version, or the disk is full.
        ValueError: an argument that is not allowed, or a model that cannot be exported.
    """
    output = Path(output)
    if output.suffix != ".mlpackage":
        raise ValueError(f"A Core ML package must end in .mlpackage, but {output.name} does not.")
    ios = _deployment_target(model, weights, ios)
    options: dict[str, Any] = {"class_names": class_names, "description": description}
    if precision == "float16":
        _check_graph(model, images[:_GRAPH_IMAGES], ios, options)
    converted = convert.convert(model, images, ios, precision, **options)
    if weights in ("int8", "palette8"):
        converted = compress.compress(converted, weights, progress)
    golden = golden_path(output)
    if golden.exists() and not (golden / "golden.json").is_file():
        raise UserError(f"{golden} is there and was not written by an export. Choose another output.")
    with files.atomic_directory(output) as temporary, files.atomic_directory(golden) as temporary_golden:
        convert.save(converted, temporary, ios)
        try:
            found = verify.verify(temporary, model, images, labels, progress, least_agreement)
        except UserError as error:  # it names the temporary package
            raise verify.RefusedError(
                f"{output.name} was not written. {error}".replace(str(temporary), "It")
            ) from error
        if not found.passed:
            raise verify.RefusedError(f"{output.name} was not written. " + " ".join(found.failures))
        saved = package.read(temporary)
        _write_golden(saved, output.name, verify.as_pixels(images[:_GOLDEN_IMAGES]), temporary_golden)
        verify.write_report(output, found, saved)
    return Export(output, ios, found, lint.lint(saved), saved.operator_count, saved.size_bytes)


def golden_path(output: Path) -> Path:
    """X.golden beside X.mlpackage."""
    return output.with_suffix(".golden")


def _deployment_target(model: keras.Model, weights: str, ios: int | None) -> int:
    if weights not in compress.WEIGHTS:
        raise ValueError(f"There are no weights {weights!r}. Choose one of {', '.join(compress.WEIGHTS)}.")
    policy = quantization.policy_of(model)
    if policy is not None and weights not in ("float", "w8a8"):
        raise ValueError(f"The model is quantized already: its weights cannot become {weights} as well.")
    if weights == "w8a8" and (policy is None or not policy.activations):
        raise ValueError("w8a8 needs a quantized model: see mobiatt_tf.quantization.calibrated_copy, or tflite.qat.")
    least = max(compress.LEAST_IOS[weights], least_ios(model))
    if ios is not None and ios < least:
        what = f"{weights} weights need" if policy is None else f"A model quantized to {policy.name} needs"
        raise ValueError(f"{what} iOS {least}, but iOS {ios} was asked for.")
    return least if ios is None else ios


def _check_graph(model: keras.Model, images: np.ndarray, ios: int, options: dict[str, Any]) -> None:
    """The same program in float32 must match the model to 1e-4: what float16 adds is then rounding alone."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "float32.mlpackage"
        convert.save(convert.convert(model, images, ios, "float32", **options, scaled=True), path, ios)
        found = verify.verify(path, model, images, least_agreement=0.0)
    policy = quantization.policy_of(model)
    rounded = policy is not None and policy.activations and task_of(model) != "classification"
    bound = _ROUNDED_GRAPH_ERROR if rounded else _GRAPH_ERROR
    wrong = next((layer for layer in found.layers if not layer.typical_error <= bound), None)
    failures = [*found.failures, *([f"The layer {wrong.name} differs by {wrong.typical_error:.1e}."] if wrong else [])]
    if failures:
        raise verify.RefusedError("The program does not match the model even in float32. " + " ".join(failures))


def _write_golden(saved: package.Package, name: str, pixels: np.ndarray, directory: Path) -> None:
    from PIL import Image

    directory.mkdir()
    pictures = [f"image{index}.png" for index in range(len(pixels))]
    for picture, image in zip(pictures, pixels, strict=True):
        Image.fromarray(image).save(directory / picture)
    content = {
        "model": name,
        "input": next(iter(saved.inputs)),
        "height": pixels.shape[1],
        "width": pixels.shape[2],
        "tolerance": max(_GOLDEN_TOLERANCE, *verify.TOLERANCES[verify.kind_of(saved)].values()),  # of max|logit|
        "images": pictures,
    }
    interpreter = Interpreter(saved, "typed")
    if saved.metadata.get(package.TASK_KEY, "classification") == "classification":
        content |= {"output": logits_output(saved), "logits": interpreter.logits(pixels).tolist()}
    else:
        content["outputs"] = _golden_samples([interpreter(picture) for picture in pixels])
    files.write_json(directory / "golden.json", content)


def _golden_samples(results: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Of each output of a detector or segmenter, whole it would be megabytes, numbers at evenly spread places.

    Args:
        results: of each picture the outputs by name.

    Returns:
        By name: "shape", "places" (int, in the flattened output), for each picture "values" at them and the "largest"
        magnitude of the whole output.
    """
    samples = {}
    for name, output in results[0].items():
        places = np.unique(np.linspace(0, output.size - 1, _GOLDEN_PLACES).astype(int))
        samples[name] = {
            "shape": list(output.shape),
            "places": places.tolist(),
            "values": [result[name].reshape(-1)[places].tolist() for result in results],
            "largest": [float(np.abs(result[name]).max()) for result in results],
        }
    return samples


def format_table(result: Export) -> str:
    """What was written and how it compares, as text."""
    lines = [
        verify.format_table(result.path, result.verification),
        f"Package   {result.size_bytes / 1e6:.2f} MB, {result.operators} operators, iOS {result.ios} (specification "
        f"version {SPECIFICATION_VERSIONS[result.ios]})",
        lint.format_table(result.findings),
    ]
    return "\n".join(lines)


def _class_names(task: str, classes: int, dataset: str | None) -> list[str] | None:
    """The labels of a file, one a line, else those of the run or the dataset, where they are as many as the classes."""
    values = flags.FLAGS
    labels = values.labels
    if labels:
        path = files.user_path(labels)
        if not path.is_file():
            raise UserError(f"There is no file {path}. --labels names a text file with one label a line.")
        try:
            names = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not a text file in UTF-8 ({error.reason}).") from error
        if len(names) != classes:
            raise UserError(f"{path} has {len(names)} labels, but the model has {classes} classes.")
        return names
    # Large datasets take long to index: a run says itself what its detector was trained on.
    known = None if values.dataset or task == "classification" else verification.class_names_of_run(values.checkpoint)
    if known is None and dataset is not None:
        known = verification.dataset_of(values.checkpoint, dataset, values.cache_dir, task).class_names
    return list(known) if known is not None and len(known) == classes else None


def main(_: Sequence[str]) -> None:
    """Exports as the flags say."""
    values = flags.FLAGS
    output = files.user_path(values.output)
    if output.suffix != ".mlpackage":
        raise UserError(f"--output={values.output} must end in .mlpackage.")
    model = model_from_flags()
    try:
        task = task_of(model)
    except ValueError as error:
        raise UserError(str(error)) from error
    size = model.input_shape[1:3]
    count = check_images(task, verify.DENSE_CHECK_IMAGES)
    images, labels, what = verification.checking_images(
        values.checkpoint, values.dataset, values.cache_dir, size, count, task
    )
    dataset_name = values.dataset or verification.dataset_of_run(values.checkpoint)
    if values.weights == "w8a8" and not quantization.is_quantized(model):
        if dataset_name is None:
            raise UserError("Give --dataset: the ranges of w8a8 are set on its training images.")
        dataset = verification.dataset_of(values.checkpoint, dataset_name, values.cache_dir, task)
        model = quantization.calibrated_copy(model, "int8", dataset, _CALIBRATION_IMAGES)
        print(f"Calibrated on {min(_CALIBRATION_IMAGES, len(dataset.train))} training images of {dataset.name}.")
    class_names = _class_names(task, int(outputs_of(model)["logits"][0].shape[-1]), dataset_name)
    print(f"Checked on {what}.")
    description = convert.Description(values.author, values.license, values.model_version, f"{model.name}, mobiatt-tf")
    try:
        result = export(
            model,
            output,
            images,
            labels,
            ios=None if values.ios is None else int(values.ios),
            precision=values.precision,
            weights=values.weights,
            class_names=class_names,
            description=description,
            progress=True,
            least_agreement=None if values.checkpoint else 0.0,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    print(format_table(result))
    print(f"Wrote {output}, and beside it {golden_path(output).name} and the report as .json and .png.")


def define_flags() -> None:
    """The command line's flags."""
    define_model_flags()
    define_check_flags(verify.CHECK_IMAGES, verify.DENSE_CHECK_IMAGES)
    flags.DEFINE_string("output", None, "The .mlpackage to write.", required=True)
    flags.DEFINE_enum("ios", None, [str(ios) for ios in SPECIFICATION_VERSIONS], "Least iOS; without it what suffices.")
    flags.DEFINE_enum("precision", "float16", convert.PRECISIONS, "Of tensors and weights.")
    flags.DEFINE_enum(
        "weights",
        "float",
        compress.WEIGHTS,
        "float; int8 or palette8 (iOS 16); w8a8 (iOS 17), activations in int8 too, calibrated or from tflite.qat.",
    )
    flags.DEFINE_string("labels", None, "Text file with one label a line; without it the dataset's class names.")
    flags.DEFINE_string("author", "", "Author that Xcode shows.")
    flags.DEFINE_string("license", "", "Licence that Xcode shows.")
    flags.DEFINE_string("model_version", "", "Version that Xcode shows.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)

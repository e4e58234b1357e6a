"""Whether a saved Core ML package computes what its Keras model computes, on real images; needs no Mac.

Example:
    python -m coreml.verify runs/model.mlpackage --checkpoint=runs/quickstart/train

The package is read from disk and run in NumPy: in float32, in its declared types ("typed"), and, where it is float16,
with float16 inside the operators too. Exit status 1 if it is damaged or differs; a report as JSON and PNG beside it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import flags
from tqdm import tqdm

import keras_models
from coreml import lint, package, report
from coreml.interpreter import Interpreter
from coreml.package import Package
from coreml.probe import LayerCheck, OperatorCheck, check, check_steps
from keras_models.command_line import check_images, define_check_flags
from mobiatt_tf import cli, data, files, quantization, verification
from mobiatt_tf.errors import UserError
from mobiatt_tf.models import load_trained, rebuild
from mobiatt_tf.tasks import task_of
from mobiatt_tf.verification import Comparison, DenseComparison, compare, compare_dense, keras_logits, keras_outputs

CHECK_IMAGES = 200
DENSE_CHECK_IMAGES = 8  # of detectors and segmenters: NumPy takes minutes for one of 800 x 1344
# Least share of images (of a segmenter pixels, of a detector anchors with a class) that must get the same class, for
# each kind of package of a trained model.
LEAST_AGREEMENT = {"float32": 0.99, "float16": 0.99, "int8": 0.98, "palette8": 0.98, "w8a8": 0.95}
_PROBES = 4  # images on which every operator is looked at

# Largest allowed difference of logits, relative to max|logit|, and of boxes, relative to max|box delta|, for each kind
# of package and mode of the interpreter.
# Seen on trained models: float32 4e-6, float16 typed 2e-3 and strict 4e-3; compressed weights up to 6e-2.
TOLERANCES: dict[str, dict[str, float]] = {
    "float32": {"float32": 1e-4},
    "float16": {"float32": 5e-3, "typed": 1e-2, "float16": 2e-2},
    "int8": {"float32": 1e-1, "typed": 1e-1, "float16": 1e-1},
    "palette8": {"float32": 1e-1, "typed": 1e-1, "float16": 1e-1},
    "w8a8": {"float32": 1e-1, "typed": 1e-1, "float16": 1e-1},
}
_W8A8_AGAINST_FLOAT = 0.3  # where the float model is given instead of the quantized one; seen: .12
# A layer or an operator whose result is further away than this, relative to its largest number, has diverged.
DIVERGENCE = {"float32": 1e-3, "float16": 5e-2, "int8": 0.2, "palette8": 0.2, "w8a8": 0.3}


@dataclass(frozen=True)
class Verification:
    """What was found; `failures` is empty if the package passed.

    Attributes:
        kind: see `kind_of`.
        comparisons: with the Keras model, by mode.
        layers: in the order of the model; empty for a package that export did not write.
        operators: in the order of the program.
        failures: why it did not pass, one sentence each.
    """

    kind: str
    comparisons: dict[str, Comparison]
    layers: tuple[LayerCheck, ...]
    operators: tuple[OperatorCheck, ...]
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return not self.failures

    @property
    def tightest(self) -> OperatorCheck | None:
        """The operator with the least headroom to float16's largest number; None without float16."""
        halves = [operator for operator in self.operators if operator.float16]
        return min(halves, key=lambda operator: operator.headroom) if halves else None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            "kind": self.kind,
            "comparisons": {mode: dataclasses.asdict(found) for mode, found in self.comparisons.items()},
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "operators": [dataclasses.asdict(operator) for operator in self.operators],
        }


class RefusedError(UserError):
    """A package that did not pass."""


def kind_of(found: Package) -> str:
    """ "w8a8", "int8", "palette8", "float16" or "float32"."""
    types = {operation.type for operation in found.operations}
    if "quantize" in types:
        return "w8a8"
    if types & {"constexpr_affine_dequantize", "constexpr_blockwise_shift_scale"}:
        return "int8"
    if "constexpr_lut_to_dense" in types:
        return "palette8"
    dtypes = {declared.dtype for operation in found.operations for _, declared in operation.outputs}
    return "float16" if "FLOAT16" in dtypes else "float32"


def as_pixels(images: np.ndarray) -> np.ndarray:
    """Normalised images [N, height, width, 3] as the nearest RGB pictures, uint8: what Core ML takes."""
    return np.clip(np.round((images * data.IMAGENET_STD + data.IMAGENET_MEAN) * 255), 0, 255).astype(np.uint8)


def from_pixels(pixels: np.ndarray) -> np.ndarray:
    """RGB pictures as the Keras model takes them, float32."""
    return np.asarray(data.normalize(pixels.astype(np.float32)), np.float32)


def verify(
    path: str | Path,
    model: keras.Model,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    progress: bool = False,
    least_agreement: float | None = None,
) -> Verification:
    """Checks a package against the Keras model that it was made from.

    Args:
        path: the .mlpackage.
        model: functional model, a classifier, a detector or a segmenter; for "w8a8" the quantized one, or the float
            one, from which it may differ more.
        images: float32 [N, height, width, 3], normalised; they are rounded to pixels first, for both sides.
        labels: int [N] of a classifier, or None.
        progress: shows a bar with the remaining time.
        least_agreement: share of images, pixels or anchors that must get the same class (see `DenseComparison`); None
            takes `LEAST_AGREEMENT`. Random weights have near ties everywhere: give 0 for them.

    Raises:
        UserError: the package cannot be read or run, or was made from another model.
        RefusedError: its content is not what was exported.
        ValueError: the model is no classifier, detector or segmenter, or there are no images.
    """
    found = package.read(path)
    if damaged := package.damage(found):
        raise RefusedError(f"{found.path} is damaged: {damaged}. Export it again.")
    if not len(images):
        raise ValueError("There are no images to compare on.")
    kind = kind_of(found)
    tolerances = TOLERANCES[kind]
    if kind == "w8a8" and not quantization.is_quantized(model):
        tolerances = dict.fromkeys(tolerances, _W8A8_AGAINST_FLOAT)
    if least_agreement is None:
        least_agreement = LEAST_AGREEMENT[kind]
    if not any(declared.dtype == "FLOAT16" for op in found.operations for _, declared in op.outputs):
        tolerances = {"float32": tolerances["float32"]}
    reference = rebuild(model, batch_size=None)
    pixels = as_pixels(images)
    comparisons = _comparisons(found, reference, pixels, labels, tolerances, progress)
    probes = pixels[:_PROBES]
    operators, layers = check(found, reference, probes, from_pixels(probes), list(tolerances)[-1])
    failures = _failures(kind, comparisons, layers, operators, least_agreement) + check_steps(found)
    return Verification(kind, comparisons, layers, operators, tuple(failures))


def _comparisons(
    found: Package,
    model: keras.Model,
    pixels: np.ndarray,
    labels: np.ndarray | None,
    tolerances: dict[str, float],
    progress: bool,
) -> dict[str, Comparison]:
    task = task_of(model)
    if (own := found.metadata.get(package.TASK_KEY, task)) != task:
        raise UserError(f"{found.path} was not made from this model: it is for {own}, the model for {task}.")
    expected = keras_logits(model, from_pixels(pixels)) if task == "classification" else None
    comparisons: dict[str, Comparison] = {}
    with tqdm(
        total=len(tolerances) * len(pixels), desc="verifying", unit="image", disable=not progress, leave=False
    ) as bar:

        def outputs(interpreter: Interpreter, pictures: np.ndarray) -> Any:
            rows = []
            for picture in pictures:
                rows.append(interpreter.outputs(picture[None]))
                if expected is not None and rows[-1].shape[1:] != expected.shape[1:]:
                    raise UserError(
                        f"{found.path} was not made from this model: it has {rows[-1].shape[-1]} classes, the model "
                        f"{expected.shape[-1]}."
                    )
                bar.update()
            return keras.tree.map_structure(lambda *parts: np.concatenate(parts), *rows)

        for mode, tolerance in tolerances.items():
            interpreter = Interpreter(found, mode)
            if expected is None:
                try:
                    comparisons[mode] = compare_dense(
                        lambda part: keras_outputs(model, from_pixels(part)),
                        functools.partial(outputs, interpreter),
                        pixels,
                        tolerance,
                    )
                except ValueError as error:
                    raise UserError(f"{found.path} was not made from this model: {error}") from error
                continue
            comparisons[mode] = compare(expected, outputs(interpreter, pixels), labels, tolerance)
    return comparisons


def as_function(path: str | Path, mode: str = "typed") -> Any:
    """A package as a function of normalised images, with what the Keras model gives: for `mobiatt_tf.tasks`.

    Args:
        path: the .mlpackage.
        mode: see `coreml.interpreter`.

    Returns:
        A function from float32 [N, height, width, 3] to what `Interpreter.outputs` gives. The images are rounded to
        pixels, as Core ML gets them.
    """
    interpreter = Interpreter(package.read(path), mode)
    return lambda images: interpreter.outputs(as_pixels(images))


def _failures(
    kind: str,
    comparisons: dict[str, Comparison],
    layers: Sequence[LayerCheck],
    operators: Sequence[OperatorCheck],
    least_agreement: float,
) -> list[str]:
    failures = []
    for mode, comparison in comparisons.items():
        if not comparison.max_relative_error <= comparison.tolerance:
            name, error = _worst_output(comparison)
            unit = "box delta" if name == "boxes" else "logit"
            failures.append(
                f"In {mode} its {name} differ from the Keras model's by {error:.1e} of max|{unit}|, more than "
                f"{comparison.tolerance:.0e}."
            )
        if (boxes := _box_error(comparison)) and not boxes[0] <= boxes[1]:
            failures.append(
                f"In {mode} its boxes around objects differ from the Keras model's by {boxes[0]:.1e} of max|box delta| "
                f"there, more than {boxes[1]:.0e}."
            )
        count, what = _compared(comparison)
        differing = round((1 - comparison.agreement) * count)
        if differing > max(1, int((1 - least_agreement) * count)):  # one near tie is no mistake
            failures.append(f"In {mode} only {comparison.agreement:.1%} of the {what} get the same class.")
    overflowing = next((operator for operator in operators if operator.float16 and operator.headroom < 1), None)
    if overflowing:
        failures.append(f"The first operator that overflows float16 is {overflowing.name} ({overflowing.type}).")
    if not failures:
        return []
    bound = DIVERGENCE[kind]
    wrong_layer = next((layer for layer in layers if not layer.error <= bound), None)
    if wrong_layer:
        failures.append(f"The first layer that differs from Keras is {wrong_layer.name} ({wrong_layer.error:.1e}).")
    wrong = next((operator for operator in operators if not operator.error <= bound), None)
    if wrong:
        failures.append(f"The first operator that loses its precision is {wrong.name} ({wrong.type}).")
    return failures


def _worst_output(comparison: Comparison) -> tuple[str, float]:
    """The output that differs most, and its error."""
    errors = comparison.output_errors if isinstance(comparison, DenseComparison) else {}
    errors = errors or {"logits": comparison.max_relative_error}
    return max(errors.items(), key=lambda item: np.inf if np.isnan(item[1]) else item[1])


def _box_error(comparison: Comparison) -> tuple[float, float] | None:
    """The error of boxes around objects and its bound; None if it is no detector's, or nothing was found."""
    if not isinstance(comparison, DenseComparison) or comparison.box_error is None:
        return None
    return comparison.box_error, comparison.box_tolerance


def _compared(comparison: Comparison) -> tuple[int, str]:
    """How many classes were compared, and of what."""
    if not isinstance(comparison, DenseComparison):
        return comparison.images, "images"
    return comparison.places, "anchors" if "boxes" in comparison.output_errors else "pixels"


def format_table(path: Path, found: Verification) -> str:
    """The findings as text."""
    lines = [f"{path}  {found.kind}"]
    for mode, comparison in found.comparisons.items():
        top1 = ""
        if comparison.file_top1 is not None:
            top1 = f", top-1 {comparison.file_top1:.2%} (Keras {comparison.keras_top1:.2%})"
        count, what = _compared(comparison)
        where = f"{count} images" if what == "images" else f"{count} {what} of {comparison.images} images"
        unit = "|box delta|" if _worst_output(comparison)[0] == "boxes" else "|logit|"
        lines.append(
            f"{mode:<9} max error {comparison.max_relative_error:.1e} of max{unit} (allowed "
            f"{comparison.tolerance:.0e}), same class on {comparison.agreement:.2%} of {where}{top1}"
        )
    if found.layers:
        worst = max(found.layers, key=lambda layer: layer.error)
        lines.append(f"Layers    worst {worst.name}: {worst.error:.1e} of its largest number, in float32")
    if tightest := found.tightest:
        lines.append(
            f"Headroom  {tightest.headroom:.0f} x at {tightest.name} ({tightest.type}), which reaches "
            f"{tightest.largest:.0f}"
        )
    return "\n".join([*lines, *(f"FAILED    {failure}" for failure in found.failures)])


def report_paths(path: Path) -> tuple[Path, Path]:
    """The JSON and the PNG beside a package."""
    return path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.png")


def write_report(path: Path, found: Verification, saved: Package) -> None:
    """Writes the JSON and the picture beside the package `path`, of which `saved` is the content."""
    json_path, picture = report_paths(path)
    content = {
        "package": path.name,
        "specification_version": saved.specification_version,
        "size_bytes": saved.size_bytes,
        "operators": saved.operator_count,
        "findings": [dataclasses.asdict(finding) for finding in lint.lint(saved)],
        "verification": found.to_json(),
    }
    files.write_json(json_path, _finite(content))
    with files.atomic_path(picture) as temporary:
        report.draw(path.name, found.layers, found.operators, temporary)


def _finite(value: Any) -> Any:
    """The same with null for infinity and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _model_for(saved: Package, checkpoint: str) -> keras.Model:
    """The trained model, resized where the package was exported for images of another size."""
    model = load_trained(checkpoint)
    sizes = [side for side in next(iter(saved.inputs.values())).shape or () if side not in (1, 3, None)]
    if len(sizes) != 2 or tuple(sizes) == tuple(model.input_shape[1:3]):
        return model
    try:
        return keras_models.resize(model, (sizes[0], sizes[1]))
    except ValueError as error:
        raise UserError(f"{saved.path} was not made from this model: {error}") from error


def main(argv: Sequence[str]) -> None:
    """Verifies as the flags say."""
    values = flags.FLAGS
    path = files.user_path(argv[1])
    saved = package.read(path)  # a damaged package is said before the model is loaded
    model = _model_for(saved, values.checkpoint)
    try:
        task = task_of(model)
    except ValueError as error:
        raise UserError(str(error)) from error
    count = check_images(task, DENSE_CHECK_IMAGES)
    images, labels, what = verification.checking_images(
        values.checkpoint, values.dataset, values.cache_dir, model.input_shape[1:3], count, task
    )
    print(f"Checked on {what}.")
    try:
        result = verify(path, model, images, labels, progress=True)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(format_table(path, result))
    write_report(path, result, saved)
    json_path, picture = report_paths(path)
    print(f"Wrote {json_path.name} and {picture.name} beside it.")
    if not result.passed:
        raise RefusedError(f"{path} did not pass.")


def define_flags() -> None:
    """The command line's flags."""
    flags.DEFINE_string("checkpoint", None, "Output directory of a training run, or a .keras file.", required=True)
    define_check_flags(CHECK_IMAGES, DENSE_CHECK_IMAGES)


if __name__ == "__main__":
    define_flags()
    cli.run(main, ["PACKAGE"])

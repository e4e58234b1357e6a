"""Whether a saved Core ML package computes what its Keras model computes, on real images; needs no Mac.

Example:
    python -m coreml.verify runs/model.mlpackage --checkpoint=runs/quickstart/train

The package is read from disk and run in NumPy: in float32, in its declared types ("typed"), and, where it is float16,
with float16 inside the operators too. Exit status 1 if it is damaged or differs; a report as JSON and PNG beside it.
"""

import dataclasses
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
from coreml.probe import LayerCheck, OperatorCheck, check_layers, check_operators, check_steps
from keras_models.command_line import define_check_flags
from mobiatt_tf import cli, data, files, quantization, verification
from mobiatt_tf.errors import UserError
from mobiatt_tf.models import load_trained, rebuild
from mobiatt_tf.verification import Comparison, compare, keras_logits

CHECK_IMAGES = 200
# Least share of images that must get the same class, for each kind of package of a trained model.
LEAST_AGREEMENT = {"float32": 0.99, "float16": 0.99, "int8": 0.98, "palette8": 0.98, "w8a8": 0.95}
_PROBES = 4  # images on which every operator is looked at

# Largest allowed difference of logits, relative to max|logit|, for each kind of package and mode of the interpreter.
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
        model: functional model with logits [B, classes]; for "w8a8" the quantized one, or the float one, from which it
            may differ more.
        images: float32 [N, height, width, 3], normalised; they are rounded to pixels first, for both sides.
        labels: int [N], or None.
        progress: shows a bar with the remaining time.
        least_agreement: share of images that must get the same class; None takes `LEAST_AGREEMENT`. Random weights
            have near ties everywhere: give 0 for them.

    Raises:
        UserError: the package cannot be read or run, or was made from another model.
        RefusedError: its content is not what was exported.
        ValueError: the model is no classifier, or there are no images.
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
    expected = keras_logits(reference, from_pixels(pixels))
    total = len(tolerances) * len(pixels)
    comparisons = {}
    with tqdm(total=total, desc="verifying", unit="image", disable=not progress, leave=False) as bar:
        for mode, tolerance in tolerances.items():
            interpreter = Interpreter(found, mode)
            rows = []
            for picture in pixels:
                rows.append(interpreter.logits(picture[None])[0])
                if rows[-1].shape != expected.shape[1:]:
                    raise UserError(
                        f"{found.path} was not made from this model: it has {len(rows[-1])} classes, the model "
                        f"{expected.shape[-1]}."
                    )
                bar.update()
            comparisons[mode] = compare(expected, np.stack(rows), labels, tolerance)
    probes = pixels[:_PROBES]
    operators, values = check_operators(found, probes, list(tolerances)[-1])
    layers = check_layers(found, reference, from_pixels(probes), values)
    failures = _failures(kind, comparisons, layers, operators, least_agreement) + check_steps(found)
    return Verification(kind, comparisons, layers, operators, tuple(failures))


def _failures(
    kind: str,
    comparisons: dict[str, Comparison],
    layers: Sequence[LayerCheck],
    operators: Sequence[OperatorCheck],
    least_agreement: float,
) -> list[str]:
    failures = []
    for mode, comparison in comparisons.items():
        if not comparison.passed:
            failures.append(
                f"In {mode} its logits differ from the Keras model's by {comparison.max_relative_error:.1e} of "
                f"max|logit|, more than {comparison.tolerance:.0e}."
            )
        differing = round((1 - comparison.agreement) * comparison.images)
        if differing > max(1, int((1 - least_agreement) * comparison.images)):  # one near tie is no mistake
            failures.append(f"In {mode} only {comparison.agreement:.1%} of the images get the same class.")
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


def format_table(path: Path, found: Verification) -> str:
    """The findings as text."""
    lines = [f"{path}  {found.kind}"]
    for mode, check in found.comparisons.items():
        top1 = "" if check.file_top1 is None else f", top-1 {check.file_top1:.2%} (Keras {check.keras_top1:.2%})"
        lines.append(
            f"{mode:<9} max error {check.max_relative_error:.1e} of max|logit| (allowed {check.tolerance:.0e}), same "
            f"class on {check.agreement:.2%} of {check.images} images{top1}"
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
    images, labels, what = verification.checking_images(
        values.checkpoint, values.dataset, values.cache_dir, model.input_shape[1:3], values.check_images
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
    define_check_flags(CHECK_IMAGES)


if __name__ == "__main__":
    define_flags()
    cli.run(main, ["PACKAGE"])

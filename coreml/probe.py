"""A package looked at from inside: every operator and every Keras layer, on a few images."""

import json
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from coreml import package
from coreml.graph import FLOAT16_MAX
from coreml.interpreter import Interpreter
from coreml.package import Operation, Package
from mobiatt_tf.errors import UserError


@dataclass(frozen=True)
class OperatorCheck:
    """One operator on the probing images.

    Attributes:
        name, type: of the operator.
        float16: whether its result is declared float16.
        largest: largest magnitude of its result, or met inside it.
        error: its result in the strictest mode against float32, relative to its largest number.
    """

    name: str
    type: str
    float16: bool
    largest: float
    error: float

    @property
    def headroom(self) -> float:
        """How many times larger its numbers could be in float16; below 1 it overflows."""
        return FLOAT16_MAX / max(self.largest, 1e-30) if np.isfinite(self.largest) else 0.0


@dataclass(frozen=True)
class LayerCheck:
    """One Keras layer on the probing images: its result in the package, in float32, against Keras.

    Attributes:
        name: of the layer.
        error: largest difference on the worst image, relative to the largest number.
        typical_error: median difference on the best image, relative to the root mean square of the result. Where
            numbers are rounded to int8, one between two steps may fall to either side: that moves a few numbers by a
            step, a mistake moves all of them.
    """

    name: str
    error: float
    typical_error: float


def check_operators(
    found: Package, pixels: np.ndarray, mode: str
) -> tuple[tuple[OperatorCheck, ...], list[dict[str, np.ndarray]]]:
    """Every operator in `mode` against float32; and the float32 results of each image by name."""
    checks: dict[str, OperatorCheck] = {}
    values: list[dict[str, np.ndarray]] = []
    exact, rounded = Interpreter(found, "float32"), Interpreter(found, mode)
    for picture in pixels:
        expected: dict[str, np.ndarray] = {}

        def keep(operation: Operation, result: np.ndarray, largest: float, into: Any = expected) -> None:
            into[operation.outputs[0][0]] = result

        def look(operation: Operation, result: np.ndarray, largest: float, against: Any = expected) -> None:
            if result.dtype.kind != "f":
                return
            wanted = against[operation.outputs[0][0]]
            old = checks.get(operation.name)
            largest = max(largest, _largest(result), old.largest if old else 0.0)
            error = max(_relative(wanted, result), old.error if old else 0.0)
            half = operation.outputs[0][1].dtype == "FLOAT16"
            checks[operation.name] = OperatorCheck(operation.name, operation.type, half, largest, error)

        exact(picture, keep)
        rounded(picture, look)
        values.append(expected)
    return tuple(checks.values()), values


def check_layers(
    found: Package, model: keras.Model, images: np.ndarray, values: list[dict[str, np.ndarray]]
) -> tuple[LayerCheck, ...]:
    """The Keras layers that export named, against their results in float32 on each image."""
    names: dict[str, tuple[str, int]] = json.loads(found.metadata.get(package.LAYERS_KEY, "{}"))
    known = [layer for layer in model.layers if names.get(layer.name, ("", 0))[0] in values[0]]
    if not known:
        return ()
    probe = keras.Model(model.inputs, [layer.output for layer in known])
    errors: dict[str, list[tuple[float, float]]] = {layer.name: [] for layer in known}
    for image, results in zip(images, values, strict=True):
        expected = keras.tree.flatten(probe([image[None]], training=False))
        for layer, wanted in zip(known, expected, strict=True):
            variable, exponent = names[layer.name]
            result = results[variable].transpose(0, 2, 3, 1) * 2.0**exponent  # [1, H, W, C]
            wanted = keras.ops.convert_to_numpy(wanted)
            if result.size != wanted.size:
                raise UserError(f"{found.path} was not made from this model: {layer.name} has another shape.")
            result = result.reshape(wanted.shape)
            errors[layer.name].append((_relative(wanted, result), _relative_median(wanted, result)))
    return tuple(
        LayerCheck(name, max(largest for largest, _ in pairs), min(typical for _, typical in pairs))
        for name, pairs in errors.items()
    )


def check_steps(found: Package) -> list[str]:
    """int8 weights whose scale is so small that float16 holds fewer digits of it than the weights have."""
    smallest = 2.0**-17  # of the multiples of 2^-24 there: 7 bits
    for operation in found.operations:
        scale, codes = operation.arguments.get("scale"), operation.arguments.get("quantized_data")
        if codes is None or not isinstance(scale, np.ndarray) or scale.dtype != np.float16:
            continue
        used = np.abs(codes.reshape(len(codes), -1)).max(axis=1) > 0 if scale.size > 1 else np.array([codes.any()])
        if (np.atleast_1d(scale)[used] < smallest).any():
            return [
                f"The int8 steps of {operation.name} are smaller than float16 holds well. Export with float weights, "
                "or with --precision=float32."
            ]
    return []


def _largest(values: np.ndarray) -> float:
    largest = float(np.abs(values).max(initial=0.0))
    return largest if np.isfinite(largest) else float("inf")


def _relative(expected: np.ndarray, actual: np.ndarray) -> float:
    difference = float(np.abs(actual - expected).max(initial=0.0))
    return difference / max(_largest(expected), 1e-30) if np.isfinite(difference) else float("inf")


def _relative_median(expected: np.ndarray, actual: np.ndarray) -> float:
    size = float(np.sqrt(np.mean(np.square(expected, dtype="float64"))))
    return float(np.median(np.abs(actual - expected))) / max(size, 1e-30)

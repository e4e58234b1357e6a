"""A package looked at from inside: every operator and every Keras layer, on a few images."""

import json
from dataclasses import dataclass

import keras
import numpy as np

from coreml import package
from coreml.calls import calls
from coreml.graph import FLOAT16_MAX
from coreml.interpreter import Interpreter
from coreml.package import Package
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
    """One call of a Keras layer on the probing images: its result in the package, in float32, against Keras.

    Attributes:
        name: of the call, see `calls`.
        error: largest difference on the worst image, relative to the layer's largest number there.
        typical_error: median difference on the best image, relative to the root mean square of the layer's result (of
            its largest, if it is called several times). Where numbers are rounded to int8, one between two steps may
            fall to either side: that moves a few numbers by a step, a mistake moves all of them.
    """

    name: str
    error: float
    typical_error: float


def check(
    found: Package, model: keras.Model, pixels: np.ndarray, images: np.ndarray, mode: str
) -> tuple[tuple[OperatorCheck, ...], tuple[LayerCheck, ...]]:
    """Every operator in `mode` against float32, and the Keras layers that export named in float32 against Keras.

    Args:
        found: the package.
        model: the Keras model.
        pixels: [N, height, width, 3], 0 to 255.
        images: the same, normalised, float32.
        mode: of the interpreter.

    Raises:
        UserError: the package was not made from this model.
    """
    operators: dict[str, OperatorCheck] = {}
    layers = _Layers(found, model)
    exact, rounded = Interpreter(found, "float32"), Interpreter(found, mode)
    for picture, image in zip(pixels, images, strict=True):
        results: dict[str, np.ndarray] = {}  # of layers, by variable
        # Side by side, so that of each tensor only what is still read is held.
        for wanted, step in zip(exact.steps(picture), rounded.steps(picture), strict=True):
            variable, declared = step.operation.outputs[0]
            if variable in layers.variables:
                results[variable] = wanted.result
            if step.result.dtype.kind != "f":
                continue
            name = step.operation.name
            old = operators.get(name)
            largest = max(step.largest, _largest(step.result), old.largest if old else 0.0)
            error = max(_relative(wanted.result, step.result), old.error if old else 0.0)
            operators[name] = OperatorCheck(name, step.operation.type, declared.dtype == "FLOAT16", largest, error)
        layers.add(image, results)
    return tuple(operators.values()), layers.checks()


class _Layers:
    """Compares what a package's operators give with the Keras layers that they stand for, image by image."""

    def __init__(self, found: Package, model: keras.Model) -> None:
        self._path = found.path
        self._named: dict[str, tuple[str, int]] = json.loads(found.metadata.get(package.LAYERS_KEY, "{}"))
        written = {name for operation in found.operations for name, _ in operation.outputs}
        self._known = [call for call in calls(model) if self._named.get(call.name, ("", 0))[0] in written]
        self.variables = {self._named[call.name][0] for call in self._known}
        self._probe = keras.Model(model.inputs, [call.outputs[0] for call in self._known]) if self._known else None
        self._errors: dict[str, list[tuple[float, float]]] = {call.name: [] for call in self._known}

    def add(self, image: np.ndarray, results: dict[str, np.ndarray]) -> None:
        """Takes one image [height, width, 3] in, and the results by variable."""
        if self._probe is None:
            return
        tensors = keras.tree.flatten(self._probe([image[None]], training=False))
        expected = [keras.ops.convert_to_numpy(tensor) for tensor in tensors]
        # A coarse level of a shared head may have nothing but zeros: the layer's results on all levels are the measure.
        sizes: dict[int, tuple[float, float]] = {}
        for call, wanted in zip(self._known, expected, strict=True):
            largest, square = sizes.get(id(call.operation), (0.0, 0.0))
            square = max(square, float(np.mean(np.square(wanted, dtype="float64"))))
            sizes[id(call.operation)] = (max(largest, _largest(wanted)), square)
        for call, wanted in zip(self._known, expected, strict=True):
            variable, exponent = self._named[call.name]
            result = results[variable].transpose(0, 2, 3, 1) * 2.0**exponent  # [1, H, W, C]
            if result.size != wanted.size:
                raise UserError(f"{self._path} was not made from this model: {call.name} has another shape.")
            difference = np.abs(result.reshape(wanted.shape) - wanted)
            largest, square = sizes[id(call.operation)]
            self._errors[call.name].append(
                (_share(float(difference.max(initial=0.0)), largest), _share(float(np.median(difference)), square**0.5))
            )

    def checks(self) -> tuple[LayerCheck, ...]:
        """What was found, in the order of the model."""
        return tuple(
            LayerCheck(name, max(largest for largest, _ in pairs), min(typical for _, typical in pairs))
            for name, pairs in self._errors.items()
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
    return _share(float(np.abs(actual - expected).max(initial=0.0)), _largest(expected))


def _share(difference: float, size: float) -> float:
    return difference / max(size, 1e-30) if np.isfinite(difference) else float("inf")

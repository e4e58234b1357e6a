"""Runs a saved package in NumPy and checks every declared shape and type on the way. No Mac, no Core ML."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from coreml.kernels import KERNELS, compute
from coreml.package import DAMAGE, TASK_KEY, Operation, Package, Reference, TensorType
from coreml.rounding import Rounding
from mobiatt_tf.data import normalize
from mobiatt_tf.errors import UserError, first_line

# How floats are kept: "float32" ignores the declared types, "typed" rounds each result to its declared type, "float16"
# also rounds what operators compute inside (see `Rounding`).
MODES = ("float32", "typed", "float16")


class Step(NamedTuple):
    """One operation that has run.

    Attributes:
        operation: it.
        result: what it gives, its first result where there are several.
        largest: the largest magnitude met inside it.
    """

    operation: Operation
    result: np.ndarray
    largest: float


class Interpreter:
    """A package, ready to run.

    Args:
        package: see `package.read`.
        mode: one of `MODES`.

    Raises:
        UserError: an operator or a setting that the interpreter does not know; names it.
        ValueError: an unknown mode.
    """

    def __init__(self, package: Package, mode: str = "typed") -> None:
        if mode not in MODES:
            raise ValueError(f"There is no mode {mode!r}. Choose one of {', '.join(MODES)}.")
        self.package = package
        self.mode = mode
        unknown = {op.type for op in package.operations} - KERNELS.keys() - {"const", "classify"}
        if unknown:
            raise UserError(
                f"{package.path} has operators that cannot be verified here: {', '.join(sorted(unknown))}. "
                f"Known are: {', '.join(sorted(KERNELS))}."
            )
        self._constants: dict[str, Any] = {}
        self._steps: list[Operation] = []
        for operation in package.operations:
            if operation.type == "const":
                self._constants[operation.outputs[0][0]] = _readable(operation.arguments.get("val"))
            elif operation.type.startswith("constexpr"):
                self._constants[operation.outputs[0][0]] = self._run(operation, self._constants)[0][0]
            elif operation.type != "classify":  # it only looks up names
                self._steps.append(operation)
        self._finished = self._last_uses()

    def _last_uses(self) -> list[list[str]]:
        """For each step the results that it is the last to read."""
        last: dict[str, int] = {}
        for index, operation in enumerate(self._steps):
            names = [name for value in operation.arguments.values() for name in _references(value)]
            last.update(dict.fromkeys((*names, *(name for name, _ in operation.outputs)), index))
        finished: list[list[str]] = [[] for _ in self._steps]
        for name, index in last.items():
            if name not in self._constants and name not in self.package.outputs:
                finished[index].append(name)
        return finished

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Runs one image.

        Args:
            pixels: [height, width, 3], 0 to 255, as Core ML gets them from a picture. A package that takes an array
                [1, height, width, 3] or [1, 3, height, width] instead of an image gets them normalised.

        Returns:
            The program's outputs that are tensors, by name.

        Raises:
            UserError: a result has not the shape or the type that is declared, or an operator is used in a way that
                the interpreter does not know.
        """
        return self.run(self._inputs(pixels))

    def logits(self, pictures: np.ndarray) -> np.ndarray:
        """The logits float32 [N, classes] of pictures [N, height, width, 3], one by one; see `__call__`."""
        output = logits_output(self.package)
        return np.stack([self(picture)[output].reshape(-1) for picture in pictures])

    def outputs(self, pictures: np.ndarray) -> Any:
        """What the Keras model gives for pictures [N, height, width, 3], which run one by one; see `__call__`.

        Returns:
            float32: logits [N, classes] of a classifier, [N, h, w, classes] of a segmenter (whose package has the
            classes in front), {"boxes": [N, A, 4], "logits": [N, A, classes]} of a detector.

        Raises:
            UserError: the package has other outputs.
        """
        if "boxes" in self.package.outputs:
            results = [self(picture) for picture in pictures]
            return {name: np.concatenate([result[name] for result in results]) for name in ("boxes", "logits")}
        output = logits_output(self.package)
        rows = [self(picture)[output] for picture in pictures]
        if self.package.metadata.get(TASK_KEY) == "segmentation":
            return np.concatenate([row.transpose(0, 2, 3, 1) for row in rows])
        return np.stack([row.reshape(-1) for row in rows])

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the program on arrays by the names of its inputs; see `__call__`."""
        values: dict[str, Any] = {}
        for _ in self._run_all(inputs, values):
            pass
        return {name: values[name] for name in self.package.outputs if name in values}

    def steps(self, pixels: np.ndarray) -> Iterator[Step]:
        """Runs one image, operation by operation; see `__call__`."""
        return self._run_all(self._inputs(pixels), {})

    def _run_all(self, inputs: dict[str, np.ndarray], values: dict[str, Any]) -> Iterator[Step]:
        """Fills `values` by name; what no later operation reads is dropped: a detector's maps are large."""
        values |= {**self._constants, **inputs}
        for operation, finished in zip(self._steps, self._finished, strict=True):
            results, largest = self._run(operation, values)
            for (output, _), result in zip(operation.outputs, results, strict=True):
                values[output] = result
            yield Step(operation, results[0], largest)
            for name in finished:
                del values[name]

    def _inputs(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {next(iter(self.package.inputs)): self._input(pixels)}

    def _input(self, pixels: np.ndarray) -> np.ndarray:
        declared = next(iter(self.package.inputs.values())).shape
        image = np.asarray(pixels, np.float32)
        if not self.package.image_input:
            image = np.asarray(normalize(image), np.float32)
        choices = (image.transpose(2, 0, 1)[None], image[None])  # [1, 3, H, W], [1, H, W, 3]
        for choice in choices:
            if choice.shape == declared:
                return choice
        raise UserError(f"{self.package.path} takes {declared}, but got a picture of {pixels.shape}.")

    def _run(self, operation: Operation, values: dict[str, Any]) -> tuple[tuple[np.ndarray, ...], float]:
        rounding = Rounding(self.mode == "float16" and operation.outputs[0][1].dtype == "FLOAT16")
        where = f"The operator {operation.name} ({operation.type}) of {self.package.path}"
        try:
            arguments = {name: _resolve(value, values) for name, value in operation.arguments.items()}
            with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # infinities show in the report
                results = compute(operation.type, arguments, rounding)
        except NotImplementedError as error:
            raise UserError(f"{where} is used in a way that cannot be verified here: {error}.") from error
        except DAMAGE as error:
            raise UserError(f"{where} does not fit its inputs: {type(error).__name__}, {first_line(error)}.") from error
        outputs = results if isinstance(results, tuple) else (results,)
        if len(outputs) != len(operation.outputs):
            raise UserError(f"{where} declares {len(operation.outputs)} results, but has {len(outputs)}.")
        declared_types = [declared for _, declared in operation.outputs]
        return tuple(self._as_declared(*pair, where) for pair in zip(outputs, declared_types, strict=True)), (
            rounding.largest
        )

    def _as_declared(self, result: np.ndarray, declared: TensorType, where: str) -> np.ndarray:
        shape = declared.shape or ()
        fits = len(result.shape) == len(shape) and all(
            side in (actual, None) for side, actual in zip(shape, result.shape, strict=True)
        )
        if not fits:
            raise UserError(f"{where} gives {result.shape}, but declares {shape}.")
        dtype = declared.numpy_dtype
        if dtype not in (np.float16, np.float32):
            if result.dtype != dtype:
                raise UserError(f"{where} gives {result.dtype}, but declares {declared.dtype}.")
            return result
        if result.dtype.kind != "f":
            raise UserError(f"{where} gives {result.dtype}, but declares {declared.dtype}.")
        if dtype == np.float16 and self.mode != "float32":
            with np.errstate(over="ignore"):
                result = result.astype(np.float16)
        return result.astype(np.float32)


def logits_output(package: Package) -> str:
    """The name of the output that holds the logits.

    Raises:
        UserError: there is none.
    """
    known = {name for operation in package.operations for name, _ in operation.outputs}
    candidates = [name for name in package.outputs if name in known and not _is_classification(package, name)]
    if "logits" in candidates:
        return "logits"
    if len(candidates) != 1:
        raise UserError(f"{package.path} has no output called logits; its outputs are {', '.join(package.outputs)}.")
    return candidates[0]


def _is_classification(package: Package, name: str) -> bool:
    return any(op.type == "classify" and name in dict(op.outputs) for op in package.operations)


def _references(value: Any) -> list[str]:
    values = value if isinstance(value, tuple) else (value,)
    return [item.name for item in values if isinstance(item, Reference)]


def _resolve(value: Any, values: dict[str, Any]) -> Any:
    if isinstance(value, Reference):
        return values[value.name]
    if isinstance(value, tuple) and any(isinstance(item, Reference) for item in value):
        return [_resolve(item, values) for item in value]
    return _readable(value)


def _readable(value: Any) -> Any:
    """float16 weights as float32, so that NumPy computes in float32."""
    return value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype == np.float16 else value

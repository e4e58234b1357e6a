"""Small ML programs: folded by coremltools, or saved as packages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from coreml import package
from coreml.interpreter import Interpreter
from coreml.tools import coremltools, quiet, target


def fold(operator: str, ios: int = 15, **arguments: Any) -> Any:
    """What coremltools itself computes for an operator of constants; a tuple where it has several results."""
    coremltools()
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import Function

    with Function({}, opset_version=target(ios)):
        found = getattr(Builder, operator)(**arguments)
        if isinstance(found, tuple | list):
            return None if any(var.val is None for var in found) else tuple(var.val for var in found)
        return found.val


def save(path: Path, shape: tuple[int | None, ...], build: Callable[[Any, Any], Any]) -> Path:
    """A package for iOS 15 of one array "x" and whatever `build(builder, x)` makes of it; None is a side of 1 to 64."""
    ct = coremltools()
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import Function, Program, get_new_symbol

    sides = [get_new_symbol() if side is None else side for side in shape]
    with Function({"x": Builder.placeholder(shape=sides)}, opset_version=target(15)) as function:
        outputs = build(Builder, function.inputs["x"])
        function.set_outputs(list(outputs) if isinstance(outputs, tuple | list) else [outputs])
    program = Program()
    program.add_function("main", function)
    with quiet():
        converted = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=target(15),
            inputs=[ct.TensorType("x", shape=[ct.RangeDim(1, 64) if side is None else side for side in shape])],
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.CLEANUP,
            skip_model_load=True,
        )
        converted.save(str(path))
    return path


def run(path: Path, x: np.ndarray, mode: str = "float32") -> dict[str, np.ndarray]:
    """The outputs of a package of `save` for its array, as it is."""
    interpreter = Interpreter(package.read(path), mode)
    return interpreter.run({"x": x})

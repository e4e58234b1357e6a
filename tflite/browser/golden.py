"""The inputs that a phone computes on and what this computer's LiteRT makes of them: `python -m tflite.browser.golden`.

A process of its own, started by `tflite.process`: see `tflite.worker`.
"""

from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from tflite.serving import serve
from tflite.worker import make_inputs


class Session:
    """Answers the requests of its public methods' names."""

    def compute(self, path: str, inputs: list[str] | None, seed: int, directory: str) -> dict[str, Any]:
        """Runs the model once, with one thread, and writes inputs and outputs as raw little-endian bytes.

        Returns:
            "inputs" and "outputs": a list of {name, shape, dtype, scale, zero_point, file}; `name` is the signature's.
        """
        interpreter = Interpreter(model_path=path, num_threads=1)
        interpreter.allocate_tensors()
        values = make_inputs(interpreter, inputs, seed)
        for detail, value in zip(interpreter.get_input_details(), values, strict=True):
            interpreter.set_tensor(detail["index"], value)
        interpreter.invoke()
        results = [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]
        names = _signature_names(interpreter)
        return {
            kind: [
                _write(detail, names.get(detail["index"], detail["name"]), value, Path(directory) / f"{kind}{number}")
                for number, (detail, value) in enumerate(zip(details, arrays, strict=True))
            ]
            for kind, details, arrays in (
                ("inputs", interpreter.get_input_details(), values),
                ("outputs", interpreter.get_output_details(), results),
            )
        }


def _signature_names(interpreter: Interpreter) -> dict[int, str]:
    """Tensor index to its name in the first signature, by which LiteRT.js orders inputs and outputs."""
    keys = list(interpreter.get_signature_list())
    if not keys:
        return {}
    runner = interpreter.get_signature_runner(keys[0])
    return {
        int(detail["index"]): name
        for details in (runner.get_input_details(), runner.get_output_details())
        for name, detail in details.items()
    }


def _write(detail: dict[str, Any], name: str, value: np.ndarray, file: Path) -> dict[str, Any]:
    file.write_bytes(value.astype(value.dtype.newbyteorder("<")).tobytes())
    scale, zero_point = detail["quantization"]
    return {
        "name": name,
        "shape": [int(size) for size in value.shape],
        "dtype": str(value.dtype),
        "scale": float(scale) or None,
        "zero_point": int(zero_point) if scale else None,
        "file": str(file),
    }


if __name__ == "__main__":
    serve(Session())

"""Runs a .tflite file through LiteRT on one thread and marks every inference for count_instructions.c.

python infer.py MODEL INPUT.npy OUTPUT.npy INFERENCES

benchmarks/arm.py starts this twice: in the emulator, with an aarch64 Python, and natively for the outputs to compare
with. So it uses nothing but NumPy and LiteRT. The output is the last inference's.
"""

import os
import sys

import numpy as np
from ai_edge_litert.interpreter import Interpreter


def mark() -> None:
    """A system call that changes nothing and nobody else makes; the plugin sees it and writes its counters down."""
    os.getpriority(os.PRIO_PROCESS, 0)


def infer(model: str, inputs: np.ndarray, inferences: int) -> np.ndarray:
    """The model's first output, in its own type, for `inputs`, computed `inferences` times over."""
    interpreter = Interpreter(model, num_threads=1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], inputs)
    mark()
    for _ in range(inferences):
        interpreter.invoke()
        mark()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


if __name__ == "__main__":
    model, source, target, inferences = sys.argv[1:]
    np.save(target, infer(model, np.load(source), int(inferences)))

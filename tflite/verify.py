"""Whether a .tflite file computes what its Keras model computes, on real images."""

from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

from mobiatt_tf.verification import Comparison, compare, keras_logits

# Largest allowed difference between the file's logits and the Keras model's, relative to max|logit|. Measured on the
# trained quickstart model and on DeiT-Tiny: float32 1e-6, float16 1e-3, dynamic 2e-2; the bounds leave a factor of 5.
# int8 against the fake-quantized model 4e-2: a value that lies between two steps may fall to either side.
TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "dynamic": 1e-1, "int8": 1e-1, "int8_full": 2e-1}


class FileRunner:
    """Runs a .tflite file on images through LiteRT, whatever the types of its input and output.

    Args:
        path: the file; one input [1, height, width, 3] and one output [1, classes], float32 or int8.
        num_threads: of XNNPACK.
    """

    def __init__(self, path: Path, num_threads: int = 1) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(str(path), num_threads=num_threads)
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]
        self._output = self._interpreter.get_output_details()[0]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits float32 [N, classes] for float32 images [N, height, width, 3], one by one."""
        outputs = []
        for image in self._quantize(images):
            self._interpreter.set_tensor(self._input["index"], image[None])
            self._interpreter.invoke()
            outputs.append(self._interpreter.get_tensor(self._output["index"])[0])
        logits = np.stack(outputs)
        if logits.dtype != np.int8:
            return logits
        scale, zero_point = self._output["quantization"]
        return (logits.astype("float32") - zero_point) * np.float32(scale)

    def _quantize(self, images: np.ndarray) -> np.ndarray:
        if self._input["dtype"] != np.int8:
            return images
        scale, zero_point = self._input["quantization"]
        return np.clip(np.round(images / np.float32(scale)) + zero_point, -128, 127).astype("int8")


def run_file(path: Path, images: np.ndarray) -> np.ndarray:
    """The file's logits, float32 [N, classes], for float32 images [N, height, width, 3]; see `FileRunner`."""
    return FileRunner(path)(images)


def verify(
    path: Path, model: keras.Model, images: np.ndarray, labels: Sequence[int] | np.ndarray | None, tolerance: float
) -> Comparison:
    """Compares a .tflite file with the Keras model that it was made from.

    Args:
        path: the file.
        model: functional model with logits [B, classes].
        images: float32 [N, height, width, 3], normalised as for training.
        labels: int [N], or None.
        tolerance: see `Comparison`.
    """
    return compare(keras_logits(model, images), run_file(path, images), labels, tolerance)

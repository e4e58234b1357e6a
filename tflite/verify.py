"""Whether a .tflite file computes what its Keras model computes, on real images."""

from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

from mobiatt_tf.verification import Comparison, compare, keras_logits

# Largest allowed difference between the file's logits and the Keras model's, relative to max|logit|. Measured on the
# trained quickstart model and on DeiT-Tiny: float32 1e-6, float16 1e-3, dynamic 2e-2; the bounds leave a factor of 5.
TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "dynamic": 1e-1}


def run_file(path: Path, images: np.ndarray) -> np.ndarray:
    """The file's outputs for float32 images [N, height, width, 3], one by one, through LiteRT: float32 [N, classes]."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    input_index = interpreter.get_input_details()[0]["index"]
    output_index = interpreter.get_output_details()[0]["index"]
    outputs = []
    for image in images:
        interpreter.set_tensor(input_index, image[None])
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(output_index)[0])
    return np.stack(outputs)


def verify(
    path: Path, model: keras.Model, images: np.ndarray, labels: Sequence[int] | np.ndarray | None, tolerance: float
) -> Comparison:
    """Compares a .tflite file with the Keras model that it was made from.

    Args:
        path: the file, float input and output.
        model: functional model with logits [B, classes].
        images: float32 [N, height, width, 3], normalised as for training.
        labels: int [N], or None.
        tolerance: see `Comparison`.
    """
    return compare(keras_logits(model, images), run_file(path, images), labels, tolerance)

"""Whether a .tflite file computes what its Keras model computes, on real images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from mobiatt_tf.errors import UserError
from mobiatt_tf.tasks import task_of, task_of_shapes
from mobiatt_tf.verification import (
    Comparison,
    compare,
    compare_dense,
    keras_logits,
    keras_outputs,
)
from tflite.inspect import Description

# Largest allowed difference between the file's logits and the Keras model's, relative to max|logit|. Measured on the
# trained quickstart model and on DeiT-Tiny: float32 1e-6, float16 1e-3, dynamic 2e-2; the bounds leave a factor of 5.
# int8 against the fake-quantized model 4e-2: a value that lies between two steps may fall to either side.
TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "dynamic": 1e-1, "int8": 1e-1, "int8_full": 2e-1}
# Of a detector's boxes, see `DenseComparison.box_error`. Measured on the detector of the quickstart: float32 5e-7,
# float16 7e-4, dynamic 1.2e-2, int8 against the fake-quantized model 2e-2 (one step of the file).
BOX_TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "dynamic": 1e-1, "int8": 1e-1, "int8_full": 2e-1}
# Share of a detector's anchors that hold something, see `DenseComparison.agreement`; measured there: 1 for all.
LEAST_AGREEMENT = {"float32": 0.999, "float16": 0.99, "dynamic": 0.98, "int8": 0.98, "int8_full": 0.98}


def checked_task(description: Description) -> str:
    """What a file does, one of `mobiatt_tf.tasks.TASKS`, where `FileRunner` can run it: not every .tflite file is ours.

    Raises:
        UserError: it cannot be run, or has other inputs and outputs than the project's files.
    """
    path, inputs, outputs = description.path, description.inputs, description.outputs
    if description.undelegated_reason is not None:
        raise UserError(f"{path} cannot run here: {description.undelegated_reason}.")
    for tensor in inputs + outputs:
        if tensor.dtype not in ("float32", "int8") or (tensor.dtype == "int8" and not tensor.scale):
            raise UserError(
                f"{tensor.name} of {path} is {tensor.dtype}; allowed are float32, and int8 with a scale and zero point."
            )
    try:
        task = task_of_shapes([output.shape for output in outputs])
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if len(inputs) != 1 or (task == "classification" and len(outputs) != 1):
        raise UserError(f"{path} has {len(inputs)} inputs and {len(outputs)} outputs; it must have one each.")
    if inputs[0].shape and inputs[0].shape[0] not in (1, -1):
        raise UserError(f"{path} takes {inputs[0].shape[0]} images at a time; export it with batch 1.")
    if task == "detection":
        names = description.signatures[0].outputs if description.signatures else ()
        if set(names) != {"boxes", "logits"}:
            given = f"its outputs are called {', '.join(names)}" if names else "its outputs have no names (signature)"
            raise UserError(f"{path} is no detector of this project: {given}, not boxes and logits.")
    return task


class FileRunner:
    """Runs a .tflite file on images through LiteRT, whatever the types of its input and outputs.

    Args:
        path: the file; one input [1, height, width, 3], and outputs with a batch of 1; float32 or int8.
        num_threads: of XNNPACK.
    """

    def __init__(self, path: Path, num_threads: int = 1) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(str(path), num_threads=num_threads)
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]
        self._outputs: list[dict[str, Any]] = self._interpreter.get_output_details()
        self._names = [""] * len(self._outputs)
        if len(self._outputs) > 1:
            # The file's order of outputs is the converter's choice: the signature says which one is which.
            signature = next(iter(self._interpreter.get_signature_list()))
            named = self._interpreter.get_signature_runner(signature).get_output_details()
            indices = {details["index"]: name for name, details in named.items()}
            self._names = [indices[details["index"]] for details in self._outputs]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images that it takes."""
        height, width = self._input["shape"][1:3]
        return int(height), int(width)

    def __call__(self, images: np.ndarray) -> Any:
        """The file's outputs for float32 images [N, height, width, 3], which run one by one.

        Returns:
            float32 [N, ...] for a file with one output, such as the logits [N, classes] of a classifier; otherwise a
            dict of them by their names in the signature. An int8 output is scaled by its own scale and zero point.
        """
        rows: list[list[np.ndarray]] = [[] for _ in self._outputs]
        for image in self._quantize(images):
            self._interpreter.set_tensor(self._input["index"], image[None])
            self._interpreter.invoke()
            for details, found in zip(self._outputs, rows, strict=True):
                found.append(self._interpreter.get_tensor(details["index"])[0])
        outputs = [_dequantize(np.stack(found), details) for details, found in zip(self._outputs, rows, strict=True)]
        return outputs[0] if len(outputs) == 1 else dict(zip(self._names, outputs, strict=True))

    def _quantize(self, images: np.ndarray) -> np.ndarray:
        if self._input["dtype"] != np.int8:
            return images
        scale, zero_point = self._input["quantization"]
        return np.clip(np.round(images / np.float32(scale)) + zero_point, -128, 127).astype("int8")


def _dequantize(values: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    """What int8 values stand for, float32; others stay as they are."""
    if values.dtype != np.int8:
        return values
    scale, zero_point = details["quantization"]
    return (values.astype("float32") - zero_point) * np.float32(scale)


def run_file(path: Path, images: np.ndarray) -> Any:
    """The file's outputs for float32 images [N, height, width, 3]; see `FileRunner`."""
    return FileRunner(path)(images)


def verify(
    path: Path,
    model: keras.Model,
    images: np.ndarray,
    labels: Sequence[int] | np.ndarray | None,
    tolerance: float,
    box_tolerance: float | None = None,
    least_agreement: float = 0.0,
) -> Comparison:
    """Compares a .tflite file with the Keras model that it was made from.

    Args:
        path: the file.
        model: functional model; a classifier, a detector or a segmenter.
        images: float32 [N, height, width, 3], normalised as for training.
        labels: int [N] of a classifier, or None.
        tolerance: see `Comparison`.
        box_tolerance, least_agreement: of a detector, see `verification.compare_dense`.

    Raises:
        ValueError: the file of a detector or segmenter has other outputs than the model.
    """
    if (task := task_of(model)) == "classification":
        return compare(keras_logits(model, images), run_file(path, images), labels, tolerance)
    if task != "detection":
        box_tolerance, least_agreement = None, 0.0
    run = FileRunner(path)
    return compare_dense(
        lambda part: keras_outputs(model, part), run, images, tolerance, box_tolerance, least_agreement
    )

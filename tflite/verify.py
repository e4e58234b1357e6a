"""Whether a .tflite file computes what its Keras model computes, on real images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from mobiatt_tf import data

# Largest allowed difference between the file's logits and the Keras model's, relative to max|logit|. Measured on the
# trained quickstart model and on DeiT-Tiny: float32 1e-6, float16 1e-3, dynamic 2e-2; the bounds leave a factor of 5.
TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "dynamic": 1e-1}


@dataclass(frozen=True)
class Verification:
    """The comparison of one file with its Keras model.

    Attributes:
        images: how many images were compared.
        max_relative_error: largest absolute difference of logits, divided by the largest absolute Keras logit.
        agreement: share of images with the same top-1 class, in [0, 1].
        tolerance: the bound on `max_relative_error`.
        keras_top1: share of right classes of the Keras model; None without labels.
        tflite_top1: the same of the file.
    """

    images: int
    max_relative_error: float
    agreement: float
    tolerance: float
    keras_top1: float | None
    tflite_top1: float | None

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return bool(self.max_relative_error <= self.tolerance)


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
) -> Verification:
    """Compares a .tflite file with the Keras model that it was made from.

    Args:
        path: the file, float input and output.
        model: functional model with logits [B, classes].
        images: float32 [N, height, width, 3], normalised as for training.
        labels: int [N], or None.
        tolerance: see `Verification`.
    """
    expected = np.asarray(model.predict(images, batch_size=32, verbose=0), "float32")
    actual = run_file(path, images)
    difference = float(np.max(np.abs(actual - expected)))
    expected_class, actual_class = expected.argmax(-1), actual.argmax(-1)
    return Verification(
        images=len(images),
        max_relative_error=difference / max(float(np.max(np.abs(expected))), 1e-30),
        agreement=float(np.mean(expected_class == actual_class)),
        tolerance=tolerance,
        keras_top1=None if labels is None else float(np.mean(expected_class == labels)),
        tflite_top1=None if labels is None else float(np.mean(actual_class == labels)),
    )


def dataset_images(dataset: data.Dataset, image_size: tuple[int, int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `count` test images spread over the split, float32 [N, height, width, 3] normalised, and their labels."""
    count = min(count, len(dataset.test))
    indices = np.linspace(0, len(dataset.test) - 1, count).astype(int)
    batches = data.test_batches(dataset.test.select(indices), image_size=image_size, batch_size=64)
    images, labels = zip(*batches.as_numpy_iterator(), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def photographs(image_size: tuple[int, int], count: int, seed: int = 0) -> np.ndarray:
    """Random crops of scikit-learn's two photographs, float32 [count, height, width, 3] normalised.

    For models without a dataset at hand: real image statistics, no labels.
    """
    from sklearn.datasets import load_sample_images

    generator = np.random.default_rng(seed)
    pictures = load_sample_images().images  # two of [427, 640, 3], uint8
    crops = []
    for index in range(count):
        picture = pictures[index % len(pictures)]
        side = int(generator.integers(96, 427))
        top, left = (int(generator.integers(0, size - side + 1)) for size in picture.shape[:2])
        crop = picture[None, top : top + side, left : left + side].astype("float32")
        crops.append(keras.ops.image.resize(crop, image_size, antialias=True, data_format="channels_last"))
    return np.asarray(data.normalize(keras.ops.convert_to_numpy(keras.ops.concatenate(crops))))

"""What every exporter needs to check its file: real images, and the comparison of two models' logits on them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np

from mobiatt_tf import data, files
from mobiatt_tf.errors import UserError


@dataclass(frozen=True)
class Comparison:
    """The comparison of an exported file with its Keras model.

    Attributes:
        images: how many images were compared.
        max_relative_error: largest absolute difference of logits, divided by the largest absolute Keras logit.
        agreement: share of images with the same top-1 class, in [0, 1].
        tolerance: the bound on `max_relative_error`.
        keras_top1: share of right classes of the Keras model; None without labels.
        file_top1: the same of the file.
    """

    images: int
    max_relative_error: float
    agreement: float
    tolerance: float
    keras_top1: float | None
    file_top1: float | None

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return bool(self.max_relative_error <= self.tolerance)


def compare(
    expected: np.ndarray, actual: np.ndarray, labels: Sequence[int] | np.ndarray | None, tolerance: float
) -> Comparison:
    """Compares logits [N, classes] of the Keras model and of the file; `labels` are int [N], or None."""
    difference = float(np.max(np.abs(actual - expected)))
    expected_class, actual_class = expected.argmax(-1), actual.argmax(-1)
    return Comparison(
        images=len(expected),
        max_relative_error=difference / max(float(np.max(np.abs(expected))), 1e-30),
        agreement=float(np.mean(expected_class == actual_class)),
        tolerance=tolerance,
        keras_top1=None if labels is None else float(np.mean(expected_class == labels)),
        file_top1=None if labels is None else float(np.mean(actual_class == labels)),
    )


def keras_logits(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Logits float32 [N, classes] of a Keras model for float32 images [N, height, width, 3]."""
    return np.asarray(model.predict(images, batch_size=32, verbose=0), "float32")


def checking_images(
    checkpoint: str | os.PathLike[str] | None,
    dataset: str | None,
    cache_dir: str | None,
    image_size: tuple[int, int],
    count: int,
) -> tuple[np.ndarray, np.ndarray | None, str]:
    """The images of `dataset`, else of the training run that `checkpoint` belongs to, else photographs.

    Returns:
        float32 [N, height, width, 3] normalised, their labels int [N] if they have any, and what they are, in words.

    Raises:
        UserError: the dataset cannot be had.
    """
    name = dataset or dataset_of_run(checkpoint)
    if name is None:
        return photographs(image_size, count), None, "crops of two photographs (--dataset names other images)"
    try:
        images, labels = dataset_images(data.load(name, cache_dir), image_size, count)
    except ValueError as error:
        raise UserError(str(error)) from error
    return images, labels, f"test images of {name}"


def dataset_of_run(checkpoint: str | os.PathLike[str] | None) -> str | None:
    """The name of the dataset that a checkpoint was trained on; None where no run says so."""
    if checkpoint is None:
        return None
    path = files.user_path(checkpoint)
    run_file = (path if path.is_dir() else path.parent) / "run.json"
    return str(files.read_json(run_file)["dataset"]["name"]) if run_file.is_file() else None


def dataset_of(
    checkpoint: str | os.PathLike[str], name: str | None, cache_dir: str | os.PathLike[str] | None
) -> data.Dataset:
    """The dataset called `name`, else that of the training run which `checkpoint` belongs to.

    Raises:
        UserError: neither is known, or it cannot be had.
    """
    name = name or dataset_of_run(checkpoint)
    if name is None:
        raise UserError(f"Give --dataset: {checkpoint} does not say what it was trained on.")
    try:
        return data.load(name, cache_dir)
    except ValueError as error:
        raise UserError(str(error)) from error


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

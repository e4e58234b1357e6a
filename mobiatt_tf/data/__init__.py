"""Datasets to `tf.data`: `load` finds one by name or directory, `train_batches` and `test_batches` make tensors of it.

Example:
    >>> from mobiatt_tf import data
    >>> dataset = data.load("fashion_mnist")
    >>> batches = data.train_batches(dataset.train, image_size=(32, 32), batch_size=128, seed=0, epoch=0)
"""

from mobiatt_tf.data.cache import cache_directory
from mobiatt_tf.data.damage import first_unreadable
from mobiatt_tf.data.dataset import Dataset, Split
from mobiatt_tf.data.order import epoch_order, step_names, steps_per_epoch
from mobiatt_tf.data.pipeline import (
    AUGMENTATIONS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    calibration_batches,
    normalize,
    test_batches,
    train_batches,
)
from mobiatt_tf.data.sources import NAMES, load

__all__ = [
    "AUGMENTATIONS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "NAMES",
    "Dataset",
    "Split",
    "cache_directory",
    "calibration_batches",
    "epoch_order",
    "first_unreadable",
    "load",
    "normalize",
    "step_names",
    "steps_per_epoch",
    "test_batches",
    "train_batches",
]

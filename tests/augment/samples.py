"""What the tests of augmentation share: photographs, and many draws of a random function."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image
from sklearn.datasets import load_sample_images


def photographs() -> list[np.ndarray]:
    """Two photographs, uint8 [96, 120, 3]."""
    return [np.asarray(Image.fromarray(image).resize((120, 96))) for image in load_sample_images().images]


def many(function: Callable[[tf.Tensor], Any], count: int, threads: int = 2) -> Any:
    """What `function` gives for `count` seeds, int64 [2], with a leading axis of `count`."""
    draws = tf.data.Dataset.range(count).map(lambda i: function(tf.stack([i, i % 7])), num_parallel_calls=threads)
    return next(draws.batch(count).as_numpy_iterator())

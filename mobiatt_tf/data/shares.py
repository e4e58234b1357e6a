"""Which example of a dense split comes when, to which device, and with which random numbers."""

from collections.abc import Sequence

import numpy as np

from mobiatt_tf.data.dense import DetectionSplit, SegmentationSplit
from mobiatt_tf.data.order import AUGMENTATION, deal, epoch_order, random_numbers, steps_per_epoch


def shares(
    split: DetectionSplit | SegmentationSplit,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    first_step: int,
    replica_count: int,
    replicas: Sequence[int] | None,
    parts: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The examples of an epoch, as `mobiatt_tf.data.train_batches` deals them out; arguments as there.

    Returns:
        Examples, int64 [elements, share], an element for each step and replica, share = batch_size / replica_count; and
        the seed of each example's augmentation, int64 [elements, share, 2].

    Raises:
        ValueError: an argument is outside what is allowed, or the batch cannot be split evenly.
    """
    if min(seed, epoch) < 0:
        raise ValueError(f"seed and epoch must be 0 or more, got {seed} and {epoch}.")
    steps = steps_per_epoch(split.images, batch_size)
    if not 0 <= first_step <= steps:
        raise ValueError(f"first_step must be from 0 to {steps}, the steps of an epoch, got {first_step}.")
    if min(replica_count, parts) < 1:
        raise ValueError(f"replica_count and parts must be at least 1, got {replica_count} and {parts}.")
    if batch_size % (replica_count * parts):
        raise ValueError(f"A batch of {batch_size} images cannot be split evenly into {replica_count * parts}.")
    replicas = range(replica_count) if replicas is None else replicas
    if not all(0 <= replica < replica_count for replica in replicas):
        raise ValueError(f"replicas must be from 0 to {replica_count - 1}, got {list(replicas)}.")
    order, _ = epoch_order(len(split), batch_size, seed, epoch)
    examples = deal(order, first_step, parts, replica_count, replicas)  # [elements, share]
    seeds = random_numbers(seed, epoch, AUGMENTATION, len(split), 2).astype(np.int64)
    return examples, seeds[examples]


def checked_geometry(
    image_size: Sequence[int], scale: Sequence[float], flip: float
) -> tuple[tuple[int, int], tuple[float, float], float]:
    """The settings of a training pipeline as plain, hashable numbers.

    Raises:
        ValueError: `image_size` is not (height, width), `scale` not (lowest, highest) above 0, `flip` no probability.
    """
    canvas = checked_image_size(image_size)
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] < float("inf"):
        raise ValueError(f"scale must be (lowest, highest), 0 < lowest <= highest, got {scale}.")
    if not 0 <= flip <= 1:
        raise ValueError(f"flip must be a probability from 0 to 1, got {flip}.")
    return canvas, (float(scale[0]), float(scale[1])), float(flip)


def checked_image_size(image_size: Sequence[int]) -> tuple[int, int]:
    """(height, width) as it is given; ValueError for anything else, or a side below 1."""
    if len(image_size) != 2 or min(image_size) < 1:
        raise ValueError(f"image_size must be (height, width), each at least 1, got {image_size}.")
    return int(image_size[0]), int(image_size[1])


def chosen(split: DetectionSplit | SegmentationSplit, indices: Sequence[int] | np.ndarray | None) -> np.ndarray:
    """`indices` as int64 [K], by default all of a split; ValueError for one that is not in it."""
    if indices is None:
        return np.arange(len(split))
    array = np.asarray(indices, np.int64).reshape(-1)
    if len(array) and not 0 <= array.min() <= array.max() < len(split):
        raise ValueError(f"indices must be from 0 to {len(split) - 1}, got {array.min()} to {array.max()}.")
    return array

"""From images with boxes to batches of tensors: resizing onto a canvas, flips, scale jitter, normalization.

The canvas has one size for all images, because accelerators compile for fixed shapes. Images keep their proportions and
are made as large as fits. mmdetection's 1333 x 800 means the long and the short side instead, and its canvas changes
with the image. At the usual (800, 1344):

* Landscape photographs up to 5:3 come out the same, 800 high: 480 x 640 (height x width) becomes 800 x 1067.
* Wider ones get a long side of up to 1344 instead of 1333: 400 x 800 becomes 672 x 1344 instead of 666 x 1333.
* Upright ones become smaller: 640 x 480 becomes 800 x 600 instead of 1067 x 800.

So COCO's AP at (800, 1344) is not exactly comparable with published ones. A square canvas of (1344, 1344) treats
upright and landscape alike, but makes images larger than mmdetection does: 480 x 640 becomes 1008 x 1344.

Of an image so long that its short side would be less than half a pixel nothing is seen.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from mobiatt_tf.augment.photometric import DETECTION_HUE, photometric_distortion
from mobiatt_tf.data.canvas import fitting_scale, place
from mobiatt_tf.data.dense import DetectionSplit
from mobiatt_tf.data.pipeline import normalize
from mobiatt_tf.data.reading import image_reader
from mobiatt_tf.data.shares import checked_geometry, checked_image_size, chosen, shares

NOTHING = -1  # the label of rows without a box
SMALLEST_SIDE = 1.0  # pixels of the canvas; thinner boxes are dropped
SMALLEST_REST = 0.25  # share of its area that a box must keep when the canvas cuts it
_STREAM = 0x424F5845  # sets the random numbers apart from those that others draw from the same seed


def train_batches(
    split: DetectionSplit,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    seed: int,
    epoch: int,
    first_step: int = 0,
    scale: tuple[float, float] = (1.0, 1.0),
    flip: float = 0.5,
    photometric: bool = False,
    replica_count: int = 1,
    replicas: Sequence[int] | None = None,
    parts: int = 1,
) -> tf.data.Dataset:
    """The batches of one epoch, from step `first_step` on; examples that fill no batch are left out of this epoch.

    Boxes of crowds are left out. Boxes that are thinner than a pixel on the canvas are dropped, and those of which the
    canvas has cut away more than three quarters.

    Args:
        split: what to draw from.
        image_size: (height, width) of the canvas.
        batch_size: images of a step, over all replicas.
        seed: chooses the order and the augmentation, with `epoch`; 0 or more.
        epoch: 0 or more; every epoch has another order and other augmentation.
        first_step: how many steps to skip. Skipped images are not read.
        scale: (lowest, highest) factor, drawn uniformly, on the size at which an image just fits. With (1, 1) images
            lie in the upper left corner; otherwise they are cut, or padded, at a random place.
        flip: probability of flipping an image left to right.
        photometric: whether to change colours, see `mobiatt_tf.augment.photometric`.
        replica_count: devices that share a step.
        replicas: those of them whose images are wanted; without it all.
        parts: in how many parts a device computes its share of a step.

    Returns:
        For each step and each of `replicas`, in this order, a pair: images float32 [n, height, width, 3], normalized,
        0 where no image is; and {"boxes": float32 [n, most, 4], xyxy in pixels of the canvas, "labels": int32
        [n, most]}, n = batch_size / replica_count, most = the number of boxes in the image that has most of them, at
        least 1. Rows without a box have the label -1 and zeros; they may stand between others. A step's images are
        dealt out as by `mobiatt_tf.data.train_batches`.

    Raises:
        ValueError: an argument is outside what is allowed, or the batch cannot be split evenly.
    """
    canvas, scale, flip = checked_geometry(image_size, scale, flip)
    examples, seeds = shares(
        split,
        batch_size=batch_size,
        seed=seed,
        epoch=epoch,
        first_step=first_step,
        replica_count=replica_count,
        replicas=replicas,
        parts=parts,
    )
    kept = [~crowd for crowd in split.crowd]
    counts = np.array([rows.sum() for rows in kept])
    ends = counts.cumsum()
    boxes_before = [boxes[rows] for boxes, rows in zip(split.boxes, kept, strict=True)]
    labels_before = [labels[rows] for labels, rows in zip(split.labels, kept, strict=True)]
    with tf.device("CPU:0"):  # the arrays must not take up an accelerator's memory
        all_boxes = tf.constant(np.concatenate([np.zeros((0, 4), np.float32), *boxes_before]), tf.float32)
        all_labels = tf.constant(np.concatenate([np.zeros(0, np.int32), *labels_before]), tf.int32)
        starts, stops = tf.constant(ends - counts), tf.constant(ends)
        read = image_reader(split)
        prepare = _maker(canvas, max(1, int(counts.max())), scale, flip, photometric)

        def example(index: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
            rows = slice(starts[index], stops[index])
            return prepare(read(index), all_boxes[rows], all_labels[rows], seed)

        batches = (
            tf.data.Dataset.from_tensor_slices((examples.reshape(-1), seeds.reshape(-1, 2)))
            .map(example, num_parallel_calls=tf.data.AUTOTUNE)
            .batch(examples.shape[1], drop_remainder=True)
        )
    return batches.prefetch(tf.data.AUTOTUNE)


def test_batches(
    split: DetectionSplit,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    indices: Sequence[int] | np.ndarray | None = None,  # noqa: PT028 (not a test)
) -> tf.data.Dataset:
    """Images of a split in its order, or in that of `indices`; the last batch may be smaller.

    Args:
        split: what to go through.
        image_size: (height, width) of the canvas; images lie in its upper left corner, as large as fits.
        batch_size: images in a batch, the last one excepted.
        indices: integers [K], which images; without it all.

    Returns:
        Pairs: images float32 [n, height, width, 3], normalized, 0 where no image is; and {"index": int32 [n], "scale":
        float32 [n]}. A box on the canvas, divided by its image's scale, is in pixels of the upright image.

    Raises:
        ValueError: an argument is outside what is allowed.
    """
    canvas = checked_image_size(image_size)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    with tf.device("CPU:0"):
        read = image_reader(split)

        def example(index: tf.Tensor) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
            image, scale = _letterbox(read(index), canvas)
            return image, {"index": tf.cast(index, tf.int32), "scale": scale}

        batches = (
            tf.data.Dataset.from_tensor_slices(chosen(split, indices))
            .map(example, num_parallel_calls=tf.data.AUTOTUNE)
            .batch(batch_size)
        )
    return batches.prefetch(tf.data.AUTOTUNE)


def letterbox(image: np.ndarray, image_size: tuple[int, int]) -> tuple[np.ndarray, float]:
    """One image as `test_batches` prepares it.

    Args:
        image: uint8 [H, W, 3], RGB, upright.
        image_size: (height, width) of the canvas.

    Returns:
        float32 [height, width, 3], normalized, 0 where no image is; and the scale: a box on the canvas, divided by it,
        is in pixels of the image.

    Raises:
        ValueError: the image has another type or shape, or the size is not allowed.
    """
    canvas = checked_image_size(image_size)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise ValueError(f"image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}.")
    with tf.device("CPU:0"):
        placed, scale = _letterbox(tf.constant(image), canvas)
    return placed.numpy(), float(scale)


def _letterbox(image: tf.Tensor, canvas: tuple[int, int]) -> tuple[tf.Tensor, tf.Tensor]:
    scale = fitting_scale(tf.shape(image)[:2], canvas)
    pixels, inside = place(image, canvas, scale, tf.zeros(2))
    return normalize(pixels) * inside, scale


@functools.lru_cache(maxsize=8)
def _maker(
    canvas: tuple[int, int], most: int, scale: tuple[float, float], flip: float, photometric: bool
) -> Callable[..., tuple[tf.Tensor, dict[str, tf.Tensor]]]:
    """A function that does all to one training image and its boxes; the same one in every epoch, so traced once.

    Returns:
        A function of an image, uint8 [H, W, 3], its boxes, float32 [K, 4], their labels, int32 [K], and a seed, int64
        [2]; K is at most `most`. It gives one example of `train_batches`.
    """

    def prepare(
        image: tf.Tensor, boxes: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor
    ) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        draws = tf.random.stateless_uniform([4], seed + tf.constant([0, _STREAM], tf.int64), alg="philox")
        size = tf.shape(image)[:2]
        width = tf.cast(size[1], tf.float32)
        flipped = draws[0] < flip
        image = tf.cond(flipped, lambda: tf.reverse(image, [1]), lambda: image)
        mirrored = tf.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
        boxes = tf.where(flipped, mirrored, boxes)
        factor, offset = fitting_scale(size, canvas), tf.zeros(2)
        if scale != (1.0, 1.0):
            factor *= scale[0] + (scale[1] - scale[0]) * draws[1]
            # Above 0 where there is room for padding, below where something is cut off.
            room = tf.constant(canvas, tf.float32) - tf.cast(size, tf.float32) * factor
            offset = tf.round(draws[2:] * room)
        pixels, inside = place(image, canvas, factor, offset)
        if photometric:
            pixels = photometric_distortion(pixels, seed, DETECTION_HUE)
        boxes, kept = _place_boxes(boxes, size, canvas, factor, offset)
        missing = most - tf.shape(boxes)[0]
        boxes = tf.pad(tf.where(kept[:, tf.newaxis], boxes, 0.0), [[0, missing], [0, 0]])  # [most, 4]
        labels = tf.pad(tf.where(kept, labels, NOTHING), [[0, missing]], constant_values=NOTHING)  # [most]
        targets = {"boxes": tf.ensure_shape(boxes, [most, 4]), "labels": tf.ensure_shape(labels, [most])}
        return tf.ensure_shape(normalize(pixels) * inside, [*canvas, 3]), targets

    return tf.function(prepare, autograph=False)


def _place_boxes(
    boxes: tf.Tensor, size: tf.Tensor, canvas: tuple[int, int], scale: tf.Tensor, offset: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Boxes, float32 [K, 4], of an image to those of the canvas, cut off at both; and which are kept, bool [K]."""
    xy_offset = tf.tile(offset[::-1], [2])  # [4]
    placed = boxes * scale + xy_offset
    end = tf.minimum(tf.cast(size, tf.float32) * scale + offset, tf.constant(canvas, tf.float32))  # [2], (y, x)
    lower, upper = tf.tile(tf.maximum(offset, 0.0)[::-1], [2]), tf.tile(end[::-1], [2])
    cut = tf.clip_by_value(placed, lower, upper)  # [K, 4]
    sides = cut[:, 2:] - cut[:, :2]  # [K, 2]
    before = tf.reduce_prod(placed[:, 2:] - placed[:, :2], axis=1)  # [K]
    large = tf.reduce_all(sides >= SMALLEST_SIDE, axis=1)
    return cut, large & (tf.reduce_prod(sides, axis=1) >= SMALLEST_REST * before)

"""From images with a class for every pixel to tensors: scale jitter, crops, flips, normalization.

As mmsegmentation trains and tests on ADE20K: `RandomResize`, `RandomCrop` with cat_max_ratio, `RandomFlip`,
`PhotoMetricDistortion`; for tests the short side alone is fixed.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf

from mobiatt_tf.augment.photometric import SEGMENTATION_HUE, photometric_distortion
from mobiatt_tf.data.canvas import place, place_labels, short_side_scale
from mobiatt_tf.data.dense import IGNORED, SegmentationSplit
from mobiatt_tf.data.pipeline import normalize
from mobiatt_tf.data.reading import image_reader, mask_reader
from mobiatt_tf.data.shares import checked_geometry, chosen, shares

LARGEST_SHARE = 0.75  # of a crop's labelled pixels that one class may have: mmsegmentation's cat_max_ratio
ATTEMPTS = 10  # crops that are drawn until one is varied enough; the last is taken as it is
_STREAM = 0x5345474D  # sets the random numbers apart from those that others draw from the same seed


def train_batches(
    split: SegmentationSplit,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    seed: int,
    epoch: int,
    first_step: int = 0,
    scale: tuple[float, float] = (0.5, 2.0),
    flip: float = 0.5,
    photometric: bool = True,
    replica_count: int = 1,
    replicas: Sequence[int] | None = None,
    parts: int = 1,
) -> tf.data.Dataset:
    """The batches of one epoch, from step `first_step` on; examples that fill no batch are left out of this epoch.

    The short side of an image becomes min(image_size) times a random factor (the long one at most four times that);
    then the crop is cut out at a random place, up to ten times until no class has more than 75 % of its labelled
    pixels. Where the image is smaller than the crop it lies in the upper left corner.

    Args:
        split: what to draw from.
        image_size: (height, width) of the crop.
        batch_size: images of a step, over all replicas.
        seed: chooses the order and the augmentation, with `epoch`; 0 or more.
        epoch: 0 or more; every epoch has another order and other augmentation.
        first_step: how many steps to skip. Skipped images are not read.
        scale: (lowest, highest) factor, drawn uniformly.
        flip: probability of flipping an image left to right.
        photometric: whether to change colours, see `mobiatt_tf.augment.photometric`.
        replica_count: devices that share a step.
        replicas: those of them whose images are wanted; without it all.
        parts: in how many parts a device computes its share of a step.

    Returns:
        For each step and each of `replicas`, in this order, a pair: images float32 [n, height, width, 3], normalized,
        0 where no image is; and labels int32 [n, height, width], 255 for pixels that do not count and where no image
        is; n = batch_size / replica_count. A step's images are dealt out as by `mobiatt_tf.data.train_batches`.

    Raises:
        ValueError: an argument is outside what is allowed, or the batch cannot be split evenly.
        tf.errors.InvalidArgumentError: while going through it: an image and its labels differ in size, or one of them
            cannot be decoded.
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
    with tf.device("CPU:0"):
        read, read_mask = image_reader(split), mask_reader(split)
        prepare = _maker(canvas, scale, flip, photometric)
        batches = (
            tf.data.Dataset.from_tensor_slices((examples.reshape(-1), seeds.reshape(-1, 2)))
            .map(lambda index, seed: prepare(read(index), read_mask(index), seed), num_parallel_calls=tf.data.AUTOTUNE)
            .batch(examples.shape[1], drop_remainder=True)
        )
    return batches.prefetch(tf.data.AUTOTUNE)


def test_images(
    split: SegmentationSplit,
    *,
    short_side: int,
    multiple: int = 1,  # noqa: PT028 (not a test)
    indices: Sequence[int] | np.ndarray | None = None,  # noqa: PT028 (not a test)
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Images of a split in its order, or in that of `indices`, each of its own size.

    Args:
        split: what to go through.
        short_side: pixels of the short side that the model sees; the long side has at most four times that.
        multiple: both sides are rounded up to a multiple of this, see `aligned`.
        indices: integers [K], which images; without it all.

    Yields:
        The index; the image, float32 [h, w, 3], normalized; its labels, uint8 [H, W], at the size of the upright image,
        255 for pixels that do not count.

    Raises:
        ValueError: an argument is outside what is allowed.
        tf.errors.InvalidArgumentError: an image and its labels differ in size, or one of them cannot be decoded.
    """
    _check_size(short_side, multiple)
    with tf.device("CPU:0"):
        read, read_mask = image_reader(split), mask_reader(split)

        def example(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            image, labels = read(index), read_mask(index)
            _check_same_size(image, labels)
            return index, _resize(image, short_side, multiple), labels

        examples = (
            tf.data.Dataset.from_tensor_slices(chosen(split, indices))
            .map(example, num_parallel_calls=tf.data.AUTOTUNE)
            .prefetch(tf.data.AUTOTUNE)
        )
    return ((int(index), image, labels) for index, image, labels in examples.as_numpy_iterator())


def resize_short_side(image: np.ndarray, short_side: int, multiple: int = 1) -> np.ndarray:
    """One image as `test_images` prepares it.

    Args:
        image: uint8 [H, W, 3], RGB, upright.
        short_side: as in `test_images`.
        multiple: as in `test_images`.

    Returns:
        float32 [h, w, 3], normalized.

    Raises:
        ValueError: the image has another type or shape, or a size is not allowed.
    """
    _check_size(short_side, multiple)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise ValueError(f"image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}.")
    with tf.device("CPU:0"):
        return _resize(tf.constant(image), short_side, multiple).numpy()


def aligned(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """(height, width), each rounded up to a multiple: `ResizeToMultiple` of mmsegmentation, `AlignResize` of PVT."""
    height, width = (-(-side // multiple) * multiple for side in size)
    return height, width


def _resize(image: tf.Tensor, short_side: int, multiple: int) -> tf.Tensor:
    size = tf.shape(image)[:2]
    wanted = tf.cast(tf.round(tf.cast(size, tf.float32) * short_side_scale(size, short_side)), tf.int32)
    canvas = tf.stack(aligned(tuple(tf.unstack(tf.maximum(wanted, 1))), multiple))
    pixels, _ = place(image, canvas, tf.cast(canvas / size, tf.float32), tf.zeros(2))
    return normalize(pixels)


@functools.lru_cache(maxsize=8)
def _maker(
    canvas: tuple[int, int], scale: tuple[float, float], flip: float, photometric: bool
) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    """A function that does all to one training image and its labels; the same one in every epoch, so traced once.

    Returns:
        A function of an image, uint8 [H, W, 3], its labels, uint8 [H, W], and a seed, int64 [2]; it gives one example
        of `train_batches`.
    """

    def prepare(image: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        _check_same_size(image, labels)
        draws = tf.random.stateless_uniform([ATTEMPTS + 1, 2], seed + tf.constant([0, _STREAM], tf.int64), alg="philox")
        # Before they are placed, as mmsegmentation pads after the flip: a small image stays in the upper left corner.
        image, labels = tf.cond(
            draws[0, 1] < flip, lambda: (tf.reverse(image, [1]), tf.reverse(labels, [1])), lambda: (image, labels)
        )
        size = tf.shape(image)[:2]
        factor = short_side_scale(size, min(canvas) * (scale[0] + (scale[1] - scale[0]) * draws[0, 0]))
        offset, labels = _varied_crop(labels, canvas, factor, draws[1:])
        pixels, inside = place(image, canvas, factor, offset)
        if photometric:
            pixels = photometric_distortion(pixels, seed, SEGMENTATION_HUE)
        image, labels = normalize(pixels) * inside, tf.cast(labels, tf.int32)
        return tf.ensure_shape(image, [*canvas, 3]), tf.ensure_shape(labels, canvas)

    return tf.function(prepare, autograph=False)


def _varied_crop(
    labels: tf.Tensor, canvas: tuple[int, int], scale: tf.Tensor, draws: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """The first of some random places where no class takes up too much of the crop; if there is none, the last.

    Args:
        labels: uint8 [H, W], of the image as it is stored.
        canvas: (height, width) of the crop.
        scale: float32 [].
        draws: float32 [ATTEMPTS, 2], uniform in [0, 1).

    Returns:
        The offset, float32 [2], see `mobiatt_tf.data.canvas`; and the crop's labels, uint8 [height, width].
    """
    overhang = tf.cast(tf.shape(labels), tf.float32) * scale - tf.constant(canvas, tf.float32)
    offsets = -tf.floor(draws * (tf.floor(tf.maximum(overhang, 0.0)) + 1))  # [ATTEMPTS, 2]

    def crop(attempt: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(place_labels(labels, canvas, scale, offsets[attempt]), canvas)

    def goes_on(attempt: tf.Tensor, cropped: tf.Tensor) -> tf.Tensor:
        pixels = tf.reshape(tf.cast(cropped, tf.int32), [-1])
        counts = tf.math.bincount(pixels, minlength=256, maxlength=256)[:IGNORED]
        varied = tf.cast(tf.reduce_max(counts), tf.float32) < LARGEST_SHARE * tf.cast(tf.reduce_sum(counts), tf.float32)
        return ~varied

    def next_one(attempt: tf.Tensor, cropped: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return attempt + 1, crop(attempt + 1)

    first = tf.constant(0)
    last, cropped = tf.while_loop(goes_on, next_one, (first, crop(first)), maximum_iterations=ATTEMPTS - 1)
    return offsets[last], cropped


def _check_same_size(image: tf.Tensor, labels: tf.Tensor) -> None:
    tf.debugging.assert_equal(
        tf.shape(image)[:2], tf.shape(labels), "An image and its labels must have the same height and width."
    )


def _check_size(short_side: int, multiple: int) -> None:
    if min(short_side, multiple) < 1:
        raise ValueError(f"short_side and multiple must be at least 1, got {short_side} and {multiple}.")

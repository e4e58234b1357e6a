"""From a split to batches of tensors: order, decoding, resizing, augmentation, normalization.

Training data depend on (seed, epoch, position) alone, so a run that stops can go on at the next step as if nothing had
happened, whatever the number of threads. Order and augmentation come from NumPy's counter-based generator Philox 4x64
with the key (seed, epoch), whose raw stream NumPy keeps the same in all versions.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from mobiatt_tf.data.dataset import Dataset, Split
from mobiatt_tf.data.decoding import decode_image, has_format

# Of ImageNet's training set, RGB in 0 .. 1, as torchvision and timm have them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

AUGMENTATIONS = ("none", "flip_crop", "crop", "resized_crop")

_CROP_FRACTION = 224 / 256  # of the short side that a test image keeps: the usual evaluation of ImageNet models
_PAD_FRACTION = 8  # "flip_crop" and "crop" pad by 1/8 of the size: 4 pixels for 32
_CROP_ATTEMPTS = 10
_ORDER, _AUGMENTATION = 0, 1  # streams of random numbers


def normalize(images: tf.Tensor | np.ndarray) -> tf.Tensor:
    """(images / 255 - IMAGENET_MEAN) / IMAGENET_STD.

    Args:
        images: [..., C], C 1 or 3, integer or float, 0 .. 255. One channel is taken as grey.

    Returns:
        float32 [..., 3].
    """
    mean, std = 255 * np.array(IMAGENET_MEAN, np.float32), 255 * np.array(IMAGENET_STD, np.float32)
    return (tf.cast(images, tf.float32) - mean) / std


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """How many whole batches a split has.

    Raises:
        ValueError: not one, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if len(split) < batch_size:
        raise ValueError(
            f"{len(split)} training images do not fill one batch of {batch_size}. Use a smaller batch or more images."
        )
    return len(split) // batch_size


def train_batches(
    split: Split,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    seed: int,
    epoch: int,
    first_step: int = 0,
    augmentation: str = "none",
) -> tf.data.Dataset:
    """The batches of one epoch, from step `first_step` on; examples that fill no batch are left out of this epoch.

    Args:
        split: what to draw from.
        image_size: (height, width) of the result.
        batch_size: images in a batch.
        seed: chooses the order and the augmentation, with `epoch`; 0 or more.
        epoch: 0 or more; every epoch has another order and other augmentation.
        first_step: how many batches to skip. Skipped images are not read.
        augmentation: "none": what `test_batches` does: arrays are resized, of image files the centre is cut out.
            "crop": resize (the whole image, whatever its shape), pad by 1/8 with black on each side, cut the size out
            at random (digits).
            "flip_crop": the same, and flip left to right every other time (small images).
            "resized_crop": cut out a part of 8 % to 100 % of the area with an aspect ratio of 3/4 to 4/3, resize that,
            flip every other time (photographs).

    Returns:
        (float32 [batch_size, height, width, 3], normalized; int32 [batch_size]) pairs.

    Raises:
        ValueError: an argument is outside what is allowed.
    """
    _check_image_size(image_size)
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f'augmentation must be one of {", ".join(AUGMENTATIONS)}, got "{augmentation}".')
    if min(seed, epoch) < 0:
        raise ValueError(f"seed and epoch must be 0 or more, got {seed} and {epoch}.")
    steps = steps_per_epoch(split, batch_size)
    if not 0 <= first_step <= steps:
        raise ValueError(f"first_step must be from 0 to {steps}, the steps of an epoch, got {first_step}.")

    # A stable sort of random numbers: ties, of which there are none in practice, change nothing between machines.
    order = np.argsort(_random_numbers(seed, epoch, _ORDER, len(split), 1)[:, 0], kind="stable")
    order = order[: steps * batch_size].reshape(steps, batch_size)[first_step:]
    random_numbers = _random_numbers(seed, epoch, _AUGMENTATION, len(split), 3)

    with tf.device("CPU:0"):  # the arrays must not take up an accelerator's memory
        labels = tf.constant(split.labels)
        shifts = tf.constant(_shifts(random_numbers, image_size, flip=augmentation == "flip_crop"))
        seeds = tf.constant(random_numbers[:, :2].astype(np.int64))

        def finish(indices: tf.Tensor, images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            images = tf.ensure_shape(images, [batch_size, *image_size, None])
            if augmentation in ("crop", "flip_crop"):
                images = shift_and_flip(images, tf.gather(shifts, indices))
            return tf.ensure_shape(normalize(images), [batch_size, *image_size, 3]), tf.gather(labels, indices)

        if split.images is not None and augmentation != "resized_crop":
            pixels = tf.constant(split.images)
            batches = tf.data.Dataset.from_tensor_slices(order).map(
                lambda indices: finish(indices, _resize(tf.gather(pixels, indices), image_size)),
                num_parallel_calls=tf.data.AUTOTUNE,
            )
        else:
            read = _image_reader(split, image_size, augmentation, seeds)
            batches = (
                tf.data.Dataset.from_tensor_slices(order.reshape(-1))
                .map(lambda index: (index, read(index)), num_parallel_calls=tf.data.AUTOTUNE)
                .batch(batch_size, drop_remainder=True)
                .map(finish, num_parallel_calls=tf.data.AUTOTUNE)
            )
    return batches.prefetch(tf.data.AUTOTUNE)


def test_batches(split: Split, *, image_size: tuple[int, int], batch_size: int) -> tf.data.Dataset:
    """The whole split in its order; the last batch may be smaller.

    Image files are resized (bicubic), for a square `image_size` until that is 224/256 of the short side, and the centre
    is cut out. Arrays are resized where their size differs.

    Args:
        split: what to go through.
        image_size: (height, width) of the result.
        batch_size: images in a batch, the last one excepted.

    Returns:
        (float32 [B, height, width, 3], normalized; int32 [B]) pairs.

    Raises:
        ValueError: an argument is outside what is allowed.
    """
    _check_image_size(image_size)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    with tf.device("CPU:0"):
        if split.images is not None:
            examples = tf.data.Dataset.from_tensor_slices((split.images, split.labels)).batch(batch_size)
        else:
            examples = tf.data.Dataset.from_tensor_slices((list(split.files or ()), split.labels))
            examples = examples.map(
                lambda file, label: (_resize_and_crop_centre(decode_image(tf.io.read_file(file)), image_size), label),
                num_parallel_calls=tf.data.AUTOTUNE,
            ).batch(batch_size)

        def finish(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return tf.ensure_shape(normalize(_resize(images, image_size)), [None, *image_size, 3]), labels

        return examples.map(finish, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def calibration_batches(dataset: Dataset, image_size: tuple[int, int], count: int) -> tf.data.Dataset:
    """The first `count` training images, prepared as test images, in batches of 32: what ranges are set from."""
    return test_batches(dataset.train.take(count), image_size=image_size, batch_size=32)


def shift_and_flip(images: tf.Tensor, shifts: tf.Tensor) -> tf.Tensor:
    """Pads with black, cuts out windows of the old size, flips some: the "crop" and "flip_crop" of `train_batches`.

    Args:
        images: [B, H, W, C], black being 0.
        shifts: int32 [B, 3]: where the window starts in the padded image, row 0 .. 2 (H // 8), column 0 .. 2 (W // 8),
            with the image as it was at (H // 8, W // 8); 1 to flip left to right, or 0.

    Returns:
        [B, H, W, C], the same type.
    """
    height, width = images.shape[1], images.shape[2]
    pad_rows, pad_columns = height // _PAD_FRACTION, width // _PAD_FRACTION
    padded = tf.pad(images, [[0, 0], [pad_rows, pad_rows], [pad_columns, pad_columns], [0, 0]])
    rows = shifts[:, 0:1] + tf.range(height)  # [B, H]
    columns = tf.range(width)
    columns = shifts[:, 1:2] + tf.where(shifts[:, 2:3] == 1, width - 1 - columns, columns)  # [B, W]
    # Two gathers for the whole batch are several times as fast as a map over its images.
    return tf.gather(tf.gather(padded, rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1)


def random_window(height: tf.Tensor, width: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The window of "resized_crop", drawn as torchvision's RandomResizedCrop and timm draw it.

    The area is uniform in 8 % .. 100 % of the image's, the logarithm of the aspect ratio uniform in 3/4 .. 4/3. Of ten
    draws the first that fits into the image counts; if none does it is the largest central window of an allowed ratio.

    Args:
        height: float32 [], rows of the image.
        width: float32 [], columns of the image.
        seed: int64 [2]; the result depends on it alone.

    Returns:
        int32 [4]: top, left, height, width; and bool []: whether to flip left to right.
    """
    draws = tf.random.stateless_uniform([2 * _CROP_ATTEMPTS + 3], seed, alg="philox")
    smallest, largest = np.float32(np.log(3 / 4)), np.float32(np.log(4 / 3))
    areas = height * width * (0.08 + 0.92 * draws[:_CROP_ATTEMPTS])
    ratios = tf.exp(smallest + (largest - smallest) * draws[_CROP_ATTEMPTS : 2 * _CROP_ATTEMPTS])
    ratio = tf.clip_by_value(width / height, 3 / 4, 4 / 3)
    widths = tf.concat([tf.round(tf.sqrt(areas * ratios)), [tf.minimum(width, tf.round(height * ratio))]], 0)
    heights = tf.concat([tf.round(tf.sqrt(areas / ratios)), [tf.minimum(height, tf.round(width / ratio))]], 0)
    widths, heights = tf.maximum(widths, 1), tf.maximum(heights, 1)  # images of a few pixels
    first = tf.argmax(tf.cast((widths <= width) & (heights <= height), tf.int32))  # the last one always fits
    window_height, window_width = heights[first], widths[first]
    position, flip = draws[-3:-1], draws[-1] < 0.5
    position = tf.where(first == _CROP_ATTEMPTS, [0.5, 0.5], position)
    top = tf.floor(position[0] * (height - window_height + 1))
    left = tf.floor(position[1] * (width - window_width + 1))
    return tf.cast(tf.stack([top, left, window_height, window_width]), tf.int32), flip


def _image_reader(
    split: Split, image_size: tuple[int, int], augmentation: str, seeds: tf.Tensor
) -> Callable[[tf.Tensor], tf.Tensor]:
    """A function from an index, int64 [], to an example's pixels, [height, width, C], before "crop" and "flip_crop".

    `seeds`, int64 [M, 2], are those of "resized_crop". Splits with arrays come here for that augmentation alone.
    """
    stored = tf.constant(split.images if split.images is not None else list(split.files or ()))

    def read(index: tf.Tensor) -> tf.Tensor:
        if augmentation != "resized_crop":
            resize = _resize_and_crop_centre if augmentation == "none" else _resize
            return resize(decode_image(tf.io.read_file(stored[index])), image_size)
        if split.images is None:
            image, flip = _read_window(tf.io.read_file(stored[index]), seeds[index])
        else:
            image, flip = _cut_window(stored[index], seeds[index])
        image = tf.cast(_resize(image, image_size), tf.float32)
        return tf.where(flip, image[:, ::-1], image)

    return read


def _read_window(content: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes a random window of an image file: uint8 [h, w, 3], and whether to flip it."""

    def jpeg() -> tuple[tf.Tensor, tf.Tensor]:
        # Decodes the window alone, in about half the time of the whole photograph.
        shape = tf.cast(tf.io.extract_jpeg_shape(content), tf.float32)
        window, flip = random_window(shape[0], shape[1], seed)
        return tf.io.decode_and_crop_jpeg(content, window, channels=3), flip

    return tf.cond(has_format(content, "JPEG"), jpeg, lambda: _cut_window(decode_image(content), seed))


def _cut_window(image: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    shape = tf.cast(tf.shape(image), tf.float32)
    window, flip = random_window(shape[0], shape[1], seed)
    return tf.slice(image, [window[0], window[1], 0], [window[2], window[3], -1]), flip


def _resize_and_crop_centre(image: tf.Tensor, image_size: tuple[int, int]) -> tf.Tensor:
    """[H, W, 3] to [height, width, 3]; see `test_batches`."""
    shape = tf.cast(tf.shape(image)[:2], tf.float32)
    scale = tf.reduce_max(tf.constant(image_size, tf.float32) / _CROP_FRACTION / shape)
    size = tf.maximum(tf.cast(tf.round(shape * scale), tf.int32), image_size)
    top, left = (size[0] - image_size[0]) // 2, (size[1] - image_size[1]) // 2
    return _resize(image, size)[top : top + image_size[0], left : left + image_size[1]]


def _resize(images: tf.Tensor, size: tf.Tensor | tuple[int, int]) -> tf.Tensor:
    """[..., H, W, C] to float32 [..., height, width, C] in 0 .. 255; nothing happens to images that have this size.

    Bicubic. Without `antialias` TensorFlow skips pixels when it makes an image smaller; Pillow, which the published
    models were trained with, does not. When it makes one larger the results agree, but those without come 2 to 6 times
    as fast (28 to 32 and to 224 pixels, TensorFlow 2.21). Bicubic curves overshoot, hence the clipping.
    """
    old_size = tuple(images.shape[-3:-1])  # (None, None) for an image file
    enlarging = False
    if isinstance(size, tuple) and None not in old_size:
        if old_size == tuple(size):
            return images
        enlarging = old_size[0] <= size[0] and old_size[1] <= size[1]
    return tf.clip_by_value(tf.image.resize(images, size, method="bicubic", antialias=not enlarging), 0, 255)


def _random_numbers(seed: int, epoch: int, stream: int, examples: int, count: int) -> np.ndarray:
    """uint64 [examples, count]; row i depends on (seed, epoch, stream, i) alone."""
    generator = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64))
    return generator.random_raw(examples * count).reshape(examples, count)


def _shifts(random_numbers: np.ndarray, image_size: tuple[int, int], *, flip: bool) -> np.ndarray:
    """uint64 [M, 3] to the int32 [M, 3] of `shift_and_flip`. The bias of the remainder is below 1e-15."""
    shifts = [2 * (size // _PAD_FRACTION) + 1 for size in image_size]
    return (random_numbers % np.array([*shifts, 2 if flip else 1], np.uint64)).astype(np.int32)


def _check_image_size(image_size: tuple[int, int]) -> None:
    if len(image_size) != 2 or min(image_size) < 1:
        raise ValueError(f"image_size must be (height, width), each at least 1, got {image_size}.")

"""Cutting, flipping and resizing images."""

import numpy as np
import tensorflow as tf

from mobiatt_tf.data.decoding import decode_image, has_format

CROP_FRACTION = 224 / 256  # of the short side that a test image keeps: the usual evaluation of ImageNet models
_PAD_FRACTION = 8  # "flip_crop" and "crop" pad by 1/8 of the size: 4 pixels for 32
_CROP_ATTEMPTS = 10


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


def draw_shifts(random_numbers: np.ndarray, image_size: tuple[int, int], *, flip: bool) -> np.ndarray:
    """Random numbers, uint64 [M, 3], to the int32 [M, 3] of `shift_and_flip`; the remainder's bias is below 1e-15."""
    shifts = [2 * (size // _PAD_FRACTION) + 1 for size in image_size]
    return (random_numbers % np.array([*shifts, 2 if flip else 1], np.uint64)).astype(np.int32)


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


def read_window(content: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes a random window of an image file: uint8 [h, w, 3], and whether to flip it."""

    def jpeg() -> tuple[tf.Tensor, tf.Tensor]:
        # Decodes the window alone, in about half the time of the whole photograph.
        shape = tf.cast(tf.io.extract_jpeg_shape(content), tf.float32)
        window, flip = random_window(shape[0], shape[1], seed)
        return tf.io.decode_and_crop_jpeg(content, window, channels=3), flip

    return tf.cond(has_format(content, "JPEG"), jpeg, lambda: cut_window(decode_image(content), seed))


def cut_window(image: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    shape = tf.cast(tf.shape(image), tf.float32)
    window, flip = random_window(shape[0], shape[1], seed)
    return tf.slice(image, [window[0], window[1], 0], [window[2], window[3], -1]), flip


def resize_and_crop_centre(
    image: tf.Tensor, image_size: tuple[int, int], crop_fraction: float = CROP_FRACTION
) -> tf.Tensor:
    """[H, W, 3] to [height, width, 3]; see `test_batches`. The cut keeps `crop_fraction` of the short side."""
    shape = tf.cast(tf.shape(image)[:2], tf.float32)
    scale = tf.reduce_max(tf.constant(image_size, tf.float32) / crop_fraction / shape)
    size = tf.maximum(tf.cast(tf.round(shape * scale), tf.int32), image_size)
    top, left = (size[0] - image_size[0]) // 2, (size[1] - image_size[1]) // 2
    return resize(image, size)[top : top + image_size[0], left : left + image_size[1]]


def resize(images: tf.Tensor, size: tf.Tensor | tuple[int, int]) -> tf.Tensor:
    """[..., H, W, C] to float32 [..., height, width, C] in 0 .. 255; nothing happens to images that have this size.

    Bicubic. Without `antialias` TensorFlow skips pixels when it makes an image smaller; Pillow, which the published
    models were trained with, does not. When it makes one larger the results agree, but those without come 2 to 6 times
    as fast (28 to 32 and to 224 pixels, TensorFlow 2.21). Bicubic curves overshoot, hence the clipping.
    """
    old_size = tuple(images.shape[-3:-1])  # (None, None) for an image file
    if isinstance(size, tuple) and old_size == tuple(size):
        return images
    height, width = (
        static or dynamic for static, dynamic in zip(old_size, tf.unstack(tf.shape(images)[-3:-1]), strict=True)
    )

    def resized(antialias: bool) -> tf.Tensor:
        return tf.image.resize(images, size, method="bicubic", antialias=antialias)

    enlarging = (height <= size[0]) & (width <= size[1])
    if isinstance(enlarging, bool):
        image = resized(not enlarging)
    else:  # an image file: known when it is read
        image = tf.cond(enlarging, lambda: resized(False), lambda: resized(True))
    return tf.clip_by_value(image, 0, 255)

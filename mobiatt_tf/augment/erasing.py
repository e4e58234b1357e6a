"""Random erasing (arXiv 1708.04896) as timm's `RandomErasing` does it in its mode "pixel"."""

import math

import tensorflow as tf

_AREA = (0.02, 1 / 3)
_ASPECT = (0.3, 1 / 0.3)
_ATTEMPTS = 10
_STREAM = 0x45524153  # sets the random numbers apart from those that others draw from the same seed


def random_erasing(image: tf.Tensor, seed: tf.Tensor, probability: float) -> tf.Tensor:
    """Replaces a rectangle by noise from a standard normal distribution.

    The rectangle's share of the area is uniform in 0.02 .. 1/3, the logarithm of height over width uniform in
    log 0.3 .. log 1/0.3, its place uniform. Of ten draws the first that is smaller than the image in both directions
    counts; if there is none, nothing happens.

    Args:
        image: float32 [H, W, 3], normalized.
        seed: int64 [2]; the result depends on it and the image alone.
        probability: of doing anything, in [0, 1].

    Returns:
        float32 [H, W, 3].

    Raises:
        ValueError: `probability` is outside [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be from 0 to 1, got {probability}.")
    seed = seed + tf.constant([0, _STREAM], tf.int64)
    happens = tf.random.stateless_uniform([], seed, alg="philox") < probability

    def erase() -> tf.Tensor:
        box, fits = draw_box(tf.shape(image)[0], tf.shape(image)[1], seed + tf.constant([1, 0], tf.int64))
        size = tf.where(fits, box[2:], 0)
        noise = tf.random.stateless_normal([size[0], size[1], 3], seed + tf.constant([2, 0], tf.int64), alg="philox")
        return tf.raw_ops.TensorStridedSliceUpdate(
            input=image, begin=box[:2], end=box[:2] + size, strides=[1, 1], value=noise
        )

    return tf.ensure_shape(tf.cond(happens, erase, lambda: tf.identity(image)), image.shape)


def draw_box(height: tf.Tensor, width: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The rectangle that is erased.

    Args:
        height: int32 [], rows of the image.
        width: int32 [], columns of the image.
        seed: int64 [2].

    Returns:
        int32 [4]: top, left, height, width; and bool []: whether one of the ten draws fits.
    """
    numbers = tf.random.stateless_uniform([2 * _ATTEMPTS + 2], seed, alg="philox")
    rows, columns = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    areas = rows * columns * (_AREA[0] + (_AREA[1] - _AREA[0]) * numbers[:_ATTEMPTS])
    low, high = math.log(_ASPECT[0]), math.log(_ASPECT[1])
    aspects = tf.exp(low + (high - low) * numbers[_ATTEMPTS : 2 * _ATTEMPTS])
    heights, widths = tf.round(tf.sqrt(areas * aspects)), tf.round(tf.sqrt(areas / aspects))
    fitting = (heights < rows) & (widths < columns)
    first = tf.argmax(tf.cast(fitting, tf.int32))  # 0 if there is none
    box_height, box_width = heights[first], widths[first]
    top = tf.floor(numbers[-2] * (rows - box_height + 1))
    left = tf.floor(numbers[-1] * (columns - box_width + 1))
    return tf.cast(tf.stack([top, left, box_height, box_width]), tf.int32), tf.reduce_any(fitting)

"""Operations on single pixels and on neighbouring ones, equal to Pillow's to the last grey level.

Pillow is the definition because the published models were trained with it: `ImageOps` (autocontrast, equalize, invert,
posterize, solarize), `ImageEnhance` (brightness, colour, contrast, sharpness), and timm's `solarize_add`. Where a table
of 256 entries would do, arithmetic on whole vectors is several times as fast in TensorFlow; it gives the same.
"""

import tensorflow as tf

# ITU-R 601 luma in units of 1/65536, as Pillow converts RGB to grey. The sums stay below 2^24: exact in float32.
_LUMA = (19595.0, 38470.0, 7471.0)
_LUMA_UNIT = 65536.0
# Pillow's ImageFilter.SMOOTH: the mean of 3 x 3 pixels, of which the middle one has this weight, the others 1.
_SMOOTH_MIDDLE = 5.0


def invert(image: tf.Tensor) -> tf.Tensor:
    """uint8 [H, W, 3] to 255 - image."""
    return tf.bitwise.invert(image)


def posterize(image: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Keeps the upper `bits`, int32 [] in 0 .. 8, of each value of a uint8 [H, W, 3]."""
    kept = tf.cast(256 - tf.bitwise.left_shift(1, 8 - bits), tf.uint8)  # of 0 bits: 0
    return tf.bitwise.bitwise_and(image, kept)


def solarize(image: tf.Tensor, threshold: tf.Tensor) -> tf.Tensor:
    """Inverts the values of a uint8 [H, W, 3] from `threshold`, int32 [] in 0 .. 256, on."""
    bright = tf.cast(tf.cast(image, tf.int16) >= tf.cast(threshold, tf.int16), tf.uint8)
    return tf.bitwise.bitwise_xor(image, 255 * bright)  # tf.where takes five times as long


def solarize_add(image: tf.Tensor, addend: tf.Tensor) -> tf.Tensor:
    """Adds `addend`, int32 [] in 0 .. 128, to the values of a uint8 [H, W, 3] that are below 128."""
    return image + tf.cast(image < 128, tf.uint8) * tf.cast(addend, tf.uint8)


def autocontrast(image: tf.Tensor) -> tf.Tensor:
    """Stretches each channel of a uint8 [H, W, 3] to 0 .. 255; a channel of one value stays."""
    darkest = tf.cast(tf.reduce_min(image, [0, 1]), tf.float64)  # [3]
    brightest = tf.cast(tf.reduce_max(image, [0, 1]), tf.float64)
    flat = brightest <= darkest
    scale = tf.where(flat, tf.ones_like(darkest), 255 / tf.where(flat, tf.ones_like(darkest), brightest - darkest))
    offset = tf.where(flat, tf.zeros_like(darkest), -darkest * scale)
    table = tf.range(256, dtype=tf.float64) * scale[:, tf.newaxis] + offset[:, tf.newaxis]  # [3, 256]
    return _look_up(image, tf.clip_by_value(table, 0, 255))


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Makes the histogram of each channel of a uint8 [H, W, 3] as even as a table of its values can."""
    numbers = tf.reshape(_numbered(image), [-1])
    counts = tf.reshape(tf.math.bincount(numbers, minlength=768, maxlength=768), [3, 256])
    values = tf.range(256)
    last = tf.reduce_max(tf.where(counts > 0, values, 0), axis=1)  # [3]: the brightest value
    step = (tf.reduce_sum(counts, 1) - tf.gather(counts, last, batch_dims=1)) // 255
    below = tf.cumsum(counts, axis=1, exclusive=True)
    step = step[:, tf.newaxis]
    table = tf.minimum((below + step // 2) // tf.maximum(step, 1), 255)
    return _look_up(image, tf.where(step == 0, values, table))  # 0 too where there is one value only


def brightness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """uint8 [H, W, 3], away from black (0) by a factor, float32 []; 1 changes nothing."""
    return _to_bytes(tf.cast(image, tf.float32) * factor)


def contrast(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """uint8 [H, W, 3], away from its mean grey by a factor, float32 []; 1 changes nothing."""
    pixels = tf.cast(image, tf.float32)
    total = tf.reduce_sum(tf.cast(_luma(pixels, 1), tf.int64))
    count = tf.size(image, tf.int64) // 3
    mean = tf.cast(tf.floor(tf.cast(total, tf.float64) / tf.cast(count, tf.float64) + 0.5), tf.float32)
    return _blend(mean, pixels, factor)


def saturation(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """uint8 [H, W, 3], each pixel away from its grey by a factor, float32 []; 1 changes nothing. Pillow's `Color`."""
    pixels = tf.cast(image, tf.float32)
    return _blend(tf.reshape(_luma(pixels, 3), tf.shape(image)), pixels, factor)


def sharpness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """uint8 [H, W, 3], away from a smoothed copy by a factor, float32 []; 1 changes nothing. Edges stay."""
    pixels = tf.cast(image, tf.float32)
    rows = pixels[:-2] + pixels[1:-1] + pixels[2:]  # [H-2, W, 3]
    inner = pixels[1:-1, 1:-1]
    sums = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + (_SMOOTH_MIDDLE - 1) * inner  # [H-2, W-2, 3]
    smooth = tf.floor(sums * (1 / (_SMOOTH_MIDDLE + 8)) + 0.5)  # thirteenths have no ties
    sharpened = _blend(smooth, inner, factor)
    return tf.raw_ops.TensorStridedSliceUpdate(input=image, begin=[1, 1], end=[-1, -1], strides=[1, 1], value=sharpened)


def _blend(degenerate: tf.Tensor, pixels: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Pillow's `Image.blend` of float32 grey levels, to uint8; a factor above 1 extrapolates."""
    return _to_bytes(degenerate + factor * (pixels - degenerate))


def _to_bytes(pixels: tf.Tensor) -> tf.Tensor:
    """Clips to 0 .. 255 and cuts the fraction off, as C does."""
    return tf.cast(tf.clip_by_value(pixels, 0, 255), tf.uint8)


def _luma(pixels: tf.Tensor, copies: int) -> tf.Tensor:
    """float32 [H, W, 3] to the grey values of its H x W pixels, whole numbers in float32 [H W, copies]."""
    weights = tf.constant([[weight] * copies for weight in _LUMA])
    sums = tf.matmul(tf.reshape(pixels, [-1, 3]), weights)
    return tf.floor((sums + _LUMA_UNIT / 2) * (1 / _LUMA_UNIT))


def _numbered(image: tf.Tensor) -> tf.Tensor:
    """uint8 [H, W, 3] to int32: value + 256 x channel, the place in a [3, 256] table."""
    return tf.cast(image, tf.int32) + tf.constant([0, 256, 512])


def _look_up(image: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
    """uint8 [H, W, 3] through a table [3, 256] of any number type, whose fractions are cut off."""
    return tf.gather(tf.reshape(tf.cast(table, tf.uint8), [-1]), _numbered(image))

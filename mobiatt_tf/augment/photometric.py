"""Photometric distortion of images for detection and segmentation: brightness, contrast, saturation, hue.

As `PhotoMetricDistortion` of mmsegmentation and mmdetection with their settings; it goes back to SSD (arXiv 1512.02325,
section 3.6). Each of the four happens every other time; contrast comes second or last, each every other time. Hue and
saturation are those of HSV. Channels are not swapped, as mmdetection does; and grey levels are not rounded after each
of the four, as mmsegmentation does. Both say 18 of hue and mean different angles: OpenCV's circle has 360 parts for the
float32 images of mmdetection and 180 for the uint8 images of mmsegmentation.
"""

import tensorflow as tf

_STREAM = 0x50484F54  # sets the random numbers apart from those that others draw from the same seed
BRIGHTNESS = 32.0  # at most so many grey levels up or down
FACTORS = (0.5, 1.5)  # of contrast and of saturation
DETECTION_HUE = 18 / 360  # at most this share of the colour circle, up or down
SEGMENTATION_HUE = 18 / 180


def photometric_distortion(image: tf.Tensor, seed: tf.Tensor, largest_hue: float) -> tf.Tensor:
    """Changes the colours of an image at random, each pixel by itself.

    Args:
        image: float32 [H, W, 3], RGB in 0 .. 255.
        seed: int64 [2]; the result depends on it, the image and `largest_hue` alone.
        largest_hue: by what share of the colour circle hues turn at most: `DETECTION_HUE` or `SEGMENTATION_HUE`.

    Returns:
        float32 [H, W, 3] in 0 .. 255.
    """
    brightness, contrast, saturation, hue, contrast_first = draw(seed, largest_hue)
    image = _clip(image + brightness)
    image = _clip(image * tf.where(contrast_first, contrast, 1.0))
    # Both go through HSV, which takes ten times as long as the rest: not where nothing would change.
    image = tf.cond(saturation == 1, lambda: image, lambda: tf.image.adjust_saturation(image, saturation))
    image = tf.cond(hue == 0, lambda: image, lambda: tf.image.adjust_hue(image, hue))
    return _clip(image * tf.where(contrast_first, 1.0, contrast))


def draw(seed: tf.Tensor, largest_hue: float) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """What `photometric_distortion` does with a seed, int64 [2].

    Returns:
        Brightness in grey levels, 0 for no change; the factor of contrast, and that of saturation, 1 for no change; hue
        as a share of the circle, 0 for no change; all float32 []. And whether contrast comes second, bool [].
    """
    seed = seed + tf.constant([0, _STREAM], tf.int64)
    happens = tf.random.stateless_uniform([5], seed, alg="philox") < 0.5
    amounts = tf.random.stateless_uniform([4], seed + tf.constant([1, 0], tf.int64), alg="philox")
    signed = 2 * amounts - 1
    factors = FACTORS[0] + (FACTORS[1] - FACTORS[0]) * amounts
    brightness = tf.where(happens[0], BRIGHTNESS * signed[0], 0.0)
    contrast, saturation = tf.where(happens[1], factors[1], 1.0), tf.where(happens[2], factors[2], 1.0)
    return brightness, contrast, saturation, tf.where(happens[3], largest_hue * signed[3], 0.0), happens[4]


def _clip(image: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(image, 0, 255)

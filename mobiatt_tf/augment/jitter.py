"""Colour jitter as torchvision's `ColorJitter` does it, which timm uses beside other policies than RandAugment."""

import tensorflow as tf

from mobiatt_tf.augment import colour

_STREAM = 0x4A495454  # sets the random numbers apart from those that others draw from the same seed
_OPERATIONS = (colour.brightness, colour.contrast, colour.saturation)


def color_jitter(image: tf.Tensor, seed: tf.Tensor, strength: float) -> tf.Tensor:
    """Changes brightness, contrast and saturation in random order.

    Args:
        image: uint8 [H, W, 3], RGB.
        seed: int64 [2]; the result depends on it and the image alone.
        strength: the three factors are uniform in max(0, 1 - strength) .. 1 + strength; at least 0.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: `strength` is negative.
    """
    if not strength >= 0:
        raise ValueError(f"strength must be at least 0, got {strength}.")
    order, factors = draw(seed, strength)
    shape = image.shape
    for place in range(len(_OPERATIONS)):
        image = _apply(image, order[place], factors[place])
        image = tf.ensure_shape(image, shape)
    return image


def draw(seed: tf.Tensor, strength: float) -> tuple[tf.Tensor, tf.Tensor]:
    """Which of brightness, contrast and saturation (0, 1, 2) comes when, int32 [3]; the factors in that order, [3]."""
    numbers = tf.random.stateless_uniform([2, 3], seed + tf.constant([0, _STREAM], tf.int64), alg="philox")
    low = max(0.0, 1 - strength)
    return tf.argsort(numbers[0]), low + (1 + strength - low) * numbers[1]


def _apply(image: tf.Tensor, operation: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    return tf.switch_case(operation, [lambda apply=apply: apply(image, factor) for apply in _OPERATIONS])

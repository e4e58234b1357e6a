"""RandAugment as timm defines it: two of fifteen operations, each with probability 1/2, magnitudes from a normal law.

RandAugment is section 3 of arXiv 1909.13719; the recipes of DeiT, PVTv2 and EfficientFormerV2 use timm's version
"rand-m9-mstd0.5-inc1" (timm/data/auto_augment.py of huggingface/pytorch-image-models), which is what this is: its
levels, its Pillow operations with bicubic interpolation, ImageNet's mean colour as fill.
"""

from collections.abc import Callable
from dataclasses import dataclass

import tensorflow as tf

from mobiatt_tf.augment import colour, geometry
from mobiatt_tf.augment.policy import RandAugment, parse_rand_augment

_STREAM = 0x52414E44  # sets the random numbers apart from those that others draw from the same seed


@dataclass(frozen=True)
class Operation:
    """One of the fifteen.

    Attributes:
        name: as timm has it, without "Increasing" and "Rel".
        apply: from a uint8 [H, W, 3] and an argument, float64 [], to a uint8 [H, W, 3].
        argument: from a level in 0 .. 10 and a sign of -1 or 1, float64 [], to the argument of "inc1".
        plain_argument: the same for "inc0".
    """

    name: str
    apply: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    argument: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    plain_argument: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def _operation(
    name: str,
    apply: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    argument: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    plain_argument: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None = None,
) -> Operation:
    return Operation(name, apply, argument, plain_argument or argument)


def _enhancement(name: str, apply: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]) -> Operation:
    """An operation that a factor controls, 1 being the image as it is."""
    return _operation(
        name,
        lambda image, factor: apply(image, tf.cast(factor, tf.float32)),
        lambda level, sign: tf.maximum(1 + sign * (level / 10 * 0.9), 0.1),
        lambda level, sign: level / 10 * 1.8 + 0.1,
    )


def _unused(level: tf.Tensor, sign: tf.Tensor) -> tf.Tensor:
    return level


OPERATIONS = (
    _operation("AutoContrast", lambda image, _: colour.autocontrast(image), _unused),
    _operation("Equalize", lambda image, _: colour.equalize(image), _unused),
    _operation("Invert", lambda image, _: colour.invert(image), _unused),
    _operation("Rotate", geometry.rotate, lambda level, sign: sign * (level / 10 * 30)),
    _operation(
        "Posterize",
        lambda image, bits: colour.posterize(image, tf.cast(bits, tf.int32)),
        lambda level, sign: 4 - tf.floor(level / 10 * 4),
        lambda level, sign: tf.floor(level / 10 * 4),
    ),
    _operation(
        "Solarize",
        lambda image, threshold: colour.solarize(image, tf.cast(threshold, tf.int32)),
        lambda level, sign: 256 - tf.floor(level / 10 * 256),
        lambda level, sign: tf.floor(level / 10 * 256),
    ),
    _operation(
        "SolarizeAdd",
        lambda image, addend: colour.solarize_add(image, tf.cast(addend, tf.int32)),
        lambda level, sign: tf.floor(level / 10 * 110),
    ),
    _enhancement("Color", colour.saturation),
    _enhancement("Contrast", colour.contrast),
    _enhancement("Brightness", colour.brightness),
    _enhancement("Sharpness", colour.sharpness),
    _operation("ShearX", geometry.shear_x, lambda level, sign: sign * (level / 10 * 0.3)),
    _operation("ShearY", geometry.shear_y, lambda level, sign: sign * (level / 10 * 0.3)),
    _operation("TranslateX", geometry.translate_x, lambda level, sign: sign * (level / 10 * 0.45)),
    _operation("TranslateY", geometry.translate_y, lambda level, sign: sign * (level / 10 * 0.45)),
)


def rand_augment(image: tf.Tensor, seed: tf.Tensor, text: str) -> tf.Tensor:
    """Applies as many random operations as `text` says, one after the other.

    Args:
        image: uint8 [H, W, 3], RGB.
        seed: int64 [2]; the result depends on it and the image alone.
        text: such as "rand-m9-mstd0.5-inc1", see `policy.parse_rand_augment`.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: `text` says something else.
    """
    settings = parse_rand_augment(text)
    choices, applied, levels, signs = draw(seed, settings)
    shape = image.shape
    for layer in range(settings.layers):
        image = _layer(image, choices[layer], applied[layer], levels[layer], signs[layer], settings.increasing)
        image = tf.ensure_shape(image, shape)
    return image


def draw(seed: tf.Tensor, settings: RandAugment) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """The random numbers of one image.

    Args:
        seed: int64 [2].
        settings: what `parse_rand_augment` gives.

    Returns:
        For each layer: which of `OPERATIONS`, int32 [layers]; whether it is applied, bool [layers]; the level in
        0 .. 10, float64 [layers]; -1 or 1, float64 [layers].
    """
    seed = seed + tf.constant([0, _STREAM], tf.int64)
    numbers = tf.random.stateless_uniform([3, settings.layers], seed, alg="philox")
    choices = tf.minimum(tf.cast(numbers[0] * len(OPERATIONS), tf.int32), len(OPERATIONS) - 1)
    applied = numbers[1] < settings.probability
    signs = tf.where(numbers[2] < 0.5, tf.constant(-1.0, tf.float64), tf.constant(1.0, tf.float64))
    seed = seed + tf.constant([1, 0], tf.int64)
    magnitude = tf.constant(float(settings.magnitude), tf.float64)
    if settings.deviation == float("inf"):
        levels = magnitude * tf.cast(tf.random.stateless_uniform([settings.layers], seed, alg="philox"), tf.float64)
    else:
        noise = tf.cast(tf.random.stateless_normal([settings.layers], seed, alg="philox"), tf.float64)
        levels = magnitude + settings.deviation * noise
    return choices, applied, tf.clip_by_value(levels, 0, 10), signs


def _layer(
    image: tf.Tensor, choice: tf.Tensor, applied: tf.Tensor, level: tf.Tensor, sign: tf.Tensor, increasing: bool
) -> tf.Tensor:
    """One operation or none; only what is chosen runs."""

    def branch(operation: Operation) -> Callable[[], tf.Tensor]:
        argument = operation.argument if increasing else operation.plain_argument
        return lambda: operation.apply(image, argument(level, sign))

    branches = [branch(operation) for operation in OPERATIONS]
    return tf.switch_case(tf.where(applied, choice, len(OPERATIONS)), [*branches, lambda: tf.identity(image)])

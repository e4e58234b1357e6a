"""Shears, translations and rotations with bicubic interpolation, as Pillow's `Image.transform` computes them.

An output pixel whose centre falls outside the image has the fill colour; taps outside the image take the nearest pixel
of its edge. The kernel is the cubic with a = -1 of Pillow's `Geometry.c` (its `resize` has a = -1/2). Pillow computes
in float64 and cuts the fraction off, this in float32: fewer than 1 in 100 values differ, by one grey level.
"""

import math

import numpy as np
import tensorflow as tf

# ImageNet's mean colour, round(255 x mean), with which timm fills.
FILL = (124, 116, 104)
# Cutting the fraction off must not turn 99.99999 into 99.
_EPSILON = 1 / 1024
# [4, 12] and [12, 3]: from four taps to three channels of each, and their sum.
_TAPS_TO_CHANNELS = np.kron(np.eye(4, dtype=np.float32), np.ones((1, 3), np.float32))
_ADD_TAPS = np.kron(np.ones((4, 1), np.float32), np.eye(3, dtype=np.float32))


def shear_x(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Each row of a uint8 [H, W, 3] to the left by `factor`, float64 [], times its distance from the top."""
    return _shift_rows(image, factor * _centres(tf.shape(image)[0]))


def shear_y(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Each column of a uint8 [H, W, 3] upwards by `factor`, float64 [], times its distance from the left."""
    return _shift_columns(image, factor * _centres(tf.shape(image)[1]))


def translate_x(image: tf.Tensor, share: tf.Tensor) -> tf.Tensor:
    """A uint8 [H, W, 3] to the left by a share, float64 [], of its width."""
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    return _shift_rows(image, tf.fill([height], share * tf.cast(width, tf.float64)))


def translate_y(image: tf.Tensor, share: tf.Tensor) -> tf.Tensor:
    """A uint8 [H, W, 3] upwards by a share, float64 [], of its height."""
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    return _shift_columns(image, tf.fill([width], share * tf.cast(height, tf.float64)))


def rotate(image: tf.Tensor, degrees: tf.Tensor) -> tf.Tensor:
    """A uint8 [H, W, 3] counter-clockwise about its centre by an angle, float64 [] in degrees."""
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    angle = degrees * (-math.pi / 180)
    cosine, sine = tf.cos(angle), tf.sin(angle)
    centre_x, centre_y = tf.cast(width, tf.float64) / 2, tf.cast(height, tf.float64) / 2
    x = _centres(width)[tf.newaxis] - centre_x
    y = _centres(height)[:, tf.newaxis] - centre_y
    source_x = tf.reshape(cosine * x + sine * y + centre_x, [-1])  # [H W]
    source_y = tf.reshape(cosine * y - sine * x + centre_y, [-1])
    inside = tf.cast(_is_inside(source_x, width) & _is_inside(source_y, height), tf.float32)
    column, weights_x = _taps(source_x - 0.5)  # weights: 4 x [H W]
    row, weights_y = _taps(source_y - 0.5)
    # Four neighbours of each place lie side by side, so that a place needs four look-ups and not sixteen.
    padded = tf.gather(image, tf.clip_by_value(tf.range(-2, width + 4), 0, width - 1), axis=1)  # [H, W+6, 3]
    windows = tf.concat([padded[:, tap : tap + width + 3] for tap in range(4)], axis=2)
    windows = tf.reshape(windows, [-1, 12])  # [H (W+3), 12]
    column = tf.clip_by_value(column + 1, 0, width + 2)
    weighted = []
    for tap, weight in enumerate(weights_y):
        place = tf.clip_by_value(row + (tap - 1), 0, height - 1) * (width + 3) + column
        weighted.append(tf.cast(tf.gather(windows, place), tf.float32) * weight[:, tf.newaxis])  # [H W, 12]
    # Matrix products spread weights over channels, and add taps up, faster than broadcasting does.
    weights = tf.matmul(tf.stack(weights_x, axis=1) * inside[:, tf.newaxis], tf.constant(_TAPS_TO_CHANNELS))
    total = tf.matmul(tf.add_n(weighted) * weights, tf.constant(_ADD_TAPS))  # [H W, 3]
    outside = tf.matmul(1 - inside[:, tf.newaxis], tf.constant([FILL], tf.float32))
    return tf.reshape(_to_bytes(total + outside), tf.shape(image))


def _shift_rows(image: tf.Tensor, shifts: tf.Tensor) -> tf.Tensor:
    """Row y of the result is row y of a uint8 [H, W, 3], read `shifts[y]` pixels, float64 [H], further right."""
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    first, weights = _taps(shifts)
    columns = tf.clip_by_value(first[:, tf.newaxis] + tf.range(-1, width + 2), 0, width - 1)
    places = columns + width * tf.range(height)[:, tf.newaxis]  # [H, W+3]
    pixels = tf.cast(tf.gather(tf.reshape(image, [-1, 3]), places), tf.float32)
    pixels = tf.reshape(pixels, [height, 3 * (width + 3)])
    taps = [pixels[:, 3 * tap : 3 * (tap + width)] * weight[:, tf.newaxis] for tap, weight in enumerate(weights)]
    inside = _is_inside(tf.repeat(_centres(width), 3) + shifts[:, tf.newaxis], width)  # [H, 3 W]
    return _finish(taps, inside, tf.shape(image))


def _shift_columns(image: tf.Tensor, shifts: tf.Tensor) -> tf.Tensor:
    """Column x of the result is column x of a uint8 [H, W, 3], read `shifts[x]` pixels, float64 [W], further down."""
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    first, weights = _taps(shifts)
    rows = tf.clip_by_value(first + tf.range(-1, height + 2)[:, tf.newaxis], 0, height - 1)
    places = tf.range(width) + width * rows  # [H+3, W]
    pixels = tf.cast(tf.gather(tf.reshape(image, [-1, 3]), places), tf.float32)
    pixels = tf.reshape(pixels, [height + 3, 3 * width])
    taps = [pixels[tap : tap + height] * tf.repeat(weight, 3) for tap, weight in enumerate(weights)]
    inside = _is_inside(_centres(height)[:, tf.newaxis] + tf.repeat(shifts, 3), height)  # [H, 3 W]
    return _finish(taps, inside, tf.shape(image))


def _centres(count: tf.Tensor) -> tf.Tensor:
    """Where the pixels of a side are: 0.5, 1.5 ...; float64 [count]."""
    return tf.range(tf.cast(count, tf.float64), dtype=tf.float64) + 0.5


def _is_inside(places: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    return (places >= 0) & (places < tf.cast(count, tf.float64))


def _taps(places: tf.Tensor) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
    """The second of four taps, int32, and the weights of all four, float32, for places of any shape, float64."""
    first = tf.floor(places)
    d = tf.cast(places - first, tf.float32)
    squared = d * d
    cubed = squared * d
    weights = (2 * squared - cubed - d, 1 - 2 * squared + cubed, d + squared - cubed, cubed - squared)
    return tf.cast(first, tf.int32), weights


def _finish(taps: list[tf.Tensor], inside: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
    """Four weighted taps, float32 [H, 3 W], and a mask, bool [H, 3 W], to uint8 [H, W, 3]."""
    fill = tf.tile(tf.constant(FILL, tf.float32), shape[1:2])  # [3 W]
    mask = tf.cast(inside, tf.float32)  # tf.where takes several times as long
    return tf.reshape(_to_bytes((tf.add_n(taps) - fill) * mask + fill), shape)


def _to_bytes(pixels: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.clip_by_value(pixels + _EPSILON, 0, 255), tf.uint8)

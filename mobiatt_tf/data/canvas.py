"""Images and label images, scaled and moved onto a canvas of fixed size, so that one formula holds for boxes too.

A point (y, x) of an image, in pixels from its upper left corner, comes to lie at (y, x) x scale + offset. Nothing is
rounded to whole pixels on the way: a box is where its pixels are, whatever the sizes.
"""

import numpy as np
import tensorflow as tf

from mobiatt_tf.data.dense import IGNORED

# Pixels whose centre is nearer to the edge of the image than this, in pixels of the canvas, count as outside, so that
# rounding in `ScaleAndTranslate`, which blackens what it takes to be outside, never shows.
_EDGE = 1e-2


def place(
    image: tf.Tensor, canvas: tf.Tensor | tuple[int, int], scale: tf.Tensor, offset: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Scales and moves an image; what falls outside the canvas is not computed.

    Bilinear; where the image is made smaller every pixel counts (antialias). OpenCV, with which mmdetection and
    mmsegmentation resize, then skips pixels: the same for factors near 1, with less noise for small ones.

    Args:
        image: uint8 or float32 [H, W, C], 0 .. 255.
        canvas: (height, width); int32 [2] where it is known only when the image is read.
        scale: float32 [] or [2] (rows, columns), above 0.
        offset: float32 [2] (rows, columns): where the image's upper left corner comes to lie, in pixels.

    Returns:
        float32 [height, width, C] in 0 .. 255; and float32 [height, width, 1], 1 where the image is and 0 elsewhere.
    """
    scale = tf.broadcast_to(scale, [2])
    pixels = tf.raw_ops.ScaleAndTranslate(
        images=image[tf.newaxis], size=canvas, scale=scale, translation=offset, kernel_type="triangle", antialias=True
    )[0]  # [height, width, C]
    sides = [_sources(image, canvas, scale, offset, axis)[1] for axis in range(2)]
    inside = tf.cast(sides[0][:, tf.newaxis, tf.newaxis] & sides[1][:, tf.newaxis], tf.float32)  # [height, width, 1]
    static = canvas if isinstance(canvas, tuple) else (None, None)
    return tf.ensure_shape(pixels, [*static, image.shape[-1]]), inside


def place_labels(
    labels: tf.Tensor, canvas: tf.Tensor | tuple[int, int], scale: tf.Tensor, offset: tf.Tensor
) -> tf.Tensor:
    """What `place` does to an image, to its labels: of each pixel the label of the nearest one.

    Args:
        labels: uint8 [H, W].
        canvas: as in `place`.
        scale: as in `place`.
        offset: as in `place`.

    Returns:
        uint8 [height, width]; IGNORED where no image is.
    """
    scale = tf.broadcast_to(scale, [2])
    rows, is_row = _sources(labels, canvas, scale, offset, 0)
    columns, is_column = _sources(labels, canvas, scale, offset, 1)
    placed = tf.gather(tf.gather(labels, rows), columns, axis=1)  # [height, width]
    return tf.where(is_row[:, tf.newaxis] & is_column, placed, tf.constant(IGNORED, tf.uint8))


def fitting_scale(size: tf.Tensor, canvas: tuple[int, int]) -> tf.Tensor:
    """The factor, float32 [], by which an image of `size`, integer [2], just fits into a canvas, its shape kept."""
    return tf.reduce_min(tf.constant(canvas, tf.float32) / tf.cast(size, tf.float32))


def short_side_scale(size: tf.Tensor, short_side: tf.Tensor | float, longest: float = 4) -> tf.Tensor:
    """The factor that makes the short side of an image `short_side` pixels long.

    Args:
        size: integer [2], height and width.
        short_side: in pixels, above 0.
        longest: how many times as long as `short_side` the long side may become; where it would be longer the factor
            is smaller. mmsegmentation's scale (2048, 512) is 4.

    Returns:
        float32 [].
    """
    size = tf.cast(size, tf.float32)
    return tf.cast(short_side, tf.float32) * tf.minimum(1 / tf.reduce_min(size), longest / tf.reduce_max(size))


def _sources(
    image: tf.Tensor, canvas: tf.Tensor | tuple[int, int], scale: tf.Tensor, offset: tf.Tensor, axis: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Of each row (axis 0) or column (1) of the canvas: the nearest of the image, int32; whether it is inside, bool."""
    length = tf.shape(image)[axis]
    centres = tf.range(canvas[axis], dtype=tf.float32) + np.float32(0.5) - offset[axis]
    end = tf.cast(length, tf.float32) * scale[axis]
    nearest = tf.clip_by_value(tf.cast(tf.floor(centres / scale[axis]), tf.int32), 0, length - 1)
    return nearest, (centres >= _EDGE) & (centres <= end - _EDGE)

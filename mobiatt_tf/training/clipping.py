"""Adaptive gradient clipping: each unit's gradient is held to a share of the norm of the unit's weights."""

import re
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

_SMALLEST_NORM = 1e-6  # of a gradient, so that nothing is divided by 0

# Parameters whose units are not their last axis, and the axes that a unit's norm sums over in the published code.
_AXES: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r"(^|/)class_token/", (-1,)),  # DeiT: the class and the distillation token are parameters of their own
    (r"(^|/)position_embedding/", (0, 1, 2)),  # DeiT: [1, tokens, D] is one unit
    (r"_scale\d/scale$", ()),  # layer scale of EfficientFormerV2 is [D, 1, 1]: a unit for each channel
)


def unit_axes(path: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The axes of a variable that the norm of one unit sums over.

    PyTorch has the unit's index (an output channel) as the first axis, Keras as the last: dense [in, out] and
    convolutions [kh, kw, in, out] sum over all axes but the last, depthwise convolutions [kh, kw, channels, 1] over the
    first two. A variable of rank 0 or 1 is one unit. A convolution with a single filter is taken for a depthwise one.

    Args:
        path: the variable's path, such as "block0_attention/query/kernel".
        shape: its shape.
    """
    for pattern, axes in _AXES:
        if re.search(pattern, path):
            return axes
    rank = len(shape)
    if rank <= 1:
        return tuple(range(rank))
    if rank == 4 and shape[-1] == 1 and path.endswith("kernel"):
        return (0, 1)
    return tuple(range(rank - 1))


def adaptive_clip(
    gradients: Sequence[tf.Tensor | None], variables: Sequence[Any], factor: float, epsilon: float = 1e-3
) -> list[tf.Tensor | None]:
    """Scales down the gradient of every unit whose norm exceeds `factor` times the norm of the unit's weights.

    Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", ICML 2021, section 4.1, as
    timm's `adaptive_clip_grad` computes it. All variables are clipped, the classifier heads too, as main.py of
    snap-research/EfficientFormer does; the paper leaves the last layer out, timm's own training script the last two
    parameters. A bias is one unit: those of query, key and value are three, where timm's DeiT has one vector for all.

    Args:
        gradients: summed over all devices, each of its variable's shape and dtype; None stays None.
        variables: Keras variables (or others with `path` and `shape`), in the order of the gradients.
        factor: largest allowed ratio of the two norms.
        epsilon: smallest norm of the weights that is counted, so that weights of 0 can grow.

    Returns:
        The clipped gradients, in the same order, each of its gradient's dtype.
    """
    clipped: list[tf.Tensor | None] = []
    for gradient, variable in zip(gradients, variables, strict=True):
        if gradient is None:
            clipped.append(None)
            continue
        gradient = tf.convert_to_tensor(gradient)
        axes = unit_axes(variable.path, variable.shape)
        largest = factor * tf.maximum(_norm(keras.ops.convert_to_tensor(variable), axes), epsilon)
        norm = _norm(gradient, axes)
        scale = tf.where(norm < largest, 1.0, largest / tf.maximum(norm, _SMALLEST_NORM))
        clipped.append(gradient * tf.cast(scale, gradient.dtype))
    return clipped


def _norm(values: tf.Tensor, axes: tuple[int, ...]) -> tf.Tensor:
    """Euclidean norms in float32, with the axes kept as 1."""
    return tf.sqrt(tf.reduce_sum(tf.square(tf.cast(values, tf.float32)), axes, keepdims=True))

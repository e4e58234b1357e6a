"""What heads do with maps between their convolutions: enlarge, pool, pad, join, and hand over as rows of anchors."""

from typing import Any

import keras
import numpy as np

from coreml.graph import Graph, Value
from coreml.projections import same_widths
from mobiatt_tf import layers


def upsample(graph: Graph, layer: keras.layers.UpSampling2D, x: Value) -> Value:
    """`UpSampling2D`, nearest or bilinear.

    Keras' bilinear is TensorFlow's with half-pixel centres, which MIL calls align_corners=False (definition of
    upsample_bilinear in coremltools/converters/mil/mil/ops/defs/iOS15/image_resizing.py).

    Raises:
        ValueError: another interpolation.
    """
    _check_layout(layer)
    factors = {"scale_factor_height": layer.size[0], "scale_factor_width": layer.size[1]}
    if layer.interpolation == "nearest":
        return Value(graph.builder.upsample_nearest_neighbor(x=x.var, name=graph.name, **factors))
    if layer.interpolation != "bilinear":
        raise ValueError(
            f"{layer.name} enlarges by {layer.interpolation!r} interpolation; nearest and bilinear can be exported."
        )
    as_floats = {name: np.float32(factor) for name, factor in factors.items()}
    return Value(graph.builder.upsample_bilinear(x=x.var, align_corners=False, name=graph.name, **as_floats))


def max_pool(graph: Graph, layer: keras.layers.MaxPooling2D, x: Value) -> Value:
    """`MaxPooling2D`; "same" pads as TensorFlow does, with what never is the largest."""
    _check_layout(layer)
    padded = layer.padding == "same" and any(same_widths(x.shape[2:], layer.pool_size, layer.strides))
    var = graph.builder.max_pool(
        x=x.var,
        kernel_sizes=list(layer.pool_size),
        strides=list(layer.strides),
        pad_type="same" if padded else "valid",
        name=graph.name,
    )
    return Value(var)


def zero_padding(graph: Graph, layer: keras.layers.ZeroPadding2D, x: Value) -> Value:
    """`ZeroPadding2D`."""
    _check_layout(layer)
    widths = [0, 0, 0, 0, *layer.padding[0], *layer.padding[1]]  # before and after of each of the four axes
    var = graph.builder.pad(x=x.var, pad=widths, mode="constant", constant_val=graph.dtype(0), name=graph.name)
    return Value(var)


def concatenate(graph: Graph, layer: keras.layers.Concatenate, *parts: Value) -> Value:
    """`Concatenate` of channels, or of tokens or anchors along their only other axis.

    Raises:
        ValueError: rows or columns of maps, or anchors of which the parts have different numbers at each position.
    """
    rank = len(graph.shape)
    axis = layer.axis % rank
    places = {part.places for part in parts}
    if axis == rank - 1 and places == {1}:
        return Value(graph.builder.concat(values=[part.var for part in parts], axis=1, name=graph.name))
    if rank != 3 or axis != 1 or len(places) > 1:
        raise ValueError(
            f"{layer.name} joins along axis {layer.axis} of {graph.shape}; channels can be joined, and along axis 1 "
            "tokens, or anchors of which every part has as many at each position."
        )
    joined = graph.builder.concat(values=[part.var for part in parts], axis=3, name=graph.name)  # [1, C, 1, N]
    return Value(joined, places=places.pop())


def reshape(graph: Graph, layer: keras.layers.Reshape, x: Value) -> Value:
    """`Reshape` between tokens and maps, or of a map [B, H, W, places * C] to anchors [B, H * W * places, C].

    The channels stay where they are, so that no axis is transposed: the anchors of all levels are joined first, see
    `Value.places`.

    Raises:
        ValueError: another change of shape.
    """
    _, channels, height, width = x.shape
    positions, shape = height * width, graph.shape[1:]
    if len(shape) == 3 and shape[-1] == channels:  # to a map [h, w, C]
        return graph.reshape(x, (1, channels, *shape[:2]), graph.name)
    if len(shape) == 2 and shape[0] % positions == 0 and channels % shape[-1] == 0:  # to tokens or anchors [N, C]
        places = shape[0] // positions
        rows = graph.reshape(x, (1, channels, 1, positions), graph.name)
        return Value(rows.var, places=places)
    raise ValueError(
        f"{layer.name} reshapes a map of {height} x {width} with {channels} channels to {shape}, which cannot be "
        "exported: a map can become tokens [N, C] or anchors [N * places, C / places], and tokens a map."
    )


def tokens_to_map(graph: Graph, layer: layers.TokensToMap, x: Value) -> Value:
    """`TokensToMap`: without the tokens in front, and in rows."""
    _, channels, _, tokens = x.shape
    if layer.prefix:
        begin, end = [0, 0, 0, layer.prefix], [1, channels, 1, tokens]
        x = Value(graph.builder.slice_by_index(x=x.var, begin=begin, end=end, name=f"{graph.name}_tokens"))
    return graph.reshape(x, (1, channels, *layer.grid), graph.name)  # [1, C, h, w]


def _check_layout(layer: Any) -> None:
    if layer.data_format != "channels_last":
        raise ValueError(f"{layer.name} has data_format={layer.data_format}; only channels_last can be exported.")

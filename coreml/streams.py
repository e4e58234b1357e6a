"""Residual streams and how far they must be scaled down so that float16 holds them.

A pre-norm transformer adds to one stream from block to block, and only norms read it. A norm does not see the
scale of its input, so the stream may be held as x * 2^-k: whatever writes to it (embeddings, output projections) has
its weights multiplied by 2^-k, and the norm's epsilon becomes epsilon * 4^-k. Powers of two change no digit.
"""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from coreml.calls import calls
from mobiatt_tf import layers

# Layers whose output is a linear function of their inputs that keeps the scale: one stream runs through them.
_CARRIERS = (
    keras.layers.Add,
    keras.layers.Dropout,
    keras.layers.Identity,
    layers.ClassToken,
    layers.DropPath,
    layers.LayerScale,
    layers.PositionEmbedding,
)
# Layers that end in weights which can carry the factor.
_WRITERS = (
    layers.DepthwiseMLP,
    layers.MLP,
    layers.OverlapPatchEmbedding,
    layers.PatchEmbedding,
    layers.ProjectedAttention,
)

# The largest length of a token's vector that is let through. A LayerNorm in pure float16 sums the squares, and 65504 is
# 256 squared: this leaves a factor of two for images that were not seen.
LENGTH_LIMIT = 128.0


def find_streams(model: keras.Model) -> list[list[Any]]:
    """The groups of symbolic tensors of a functional model that can be scaled together."""
    group_of: dict[int, list[Any]] = {}  # by tensor
    # Tensors that must keep their scale.
    blocked: set[int] = {id(tensor) for tensor in (*model.inputs, *model.outputs)}

    def group(tensor: Any) -> list[Any]:
        return group_of.setdefault(id(tensor), [tensor])

    for call in calls(model):
        operation, inputs, outputs = call.operation, call.inputs, call.outputs
        if isinstance(operation, _CARRIERS):
            merged = {id(group(tensor)): group(tensor) for tensor in (*inputs, *outputs)}
            together = [tensor for members in merged.values() for tensor in members]
            for tensor in together:
                group_of[id(tensor)] = together
            continue
        if not isinstance(operation, keras.layers.LayerNormalization | layers.RootMeanSquareNorm):
            blocked.update(id(tensor) for tensor in inputs)
        if not isinstance(operation, _WRITERS):
            blocked.update(id(tensor) for tensor in outputs)
        for tensor in (*inputs, *outputs):
            group(tensor)
    groups = {id(members): members for members in group_of.values()}.values()
    return [members for members in groups if not any(id(tensor) in blocked for tensor in members)]


def choose_exponents(model: keras.Model, images: np.ndarray) -> dict[int, int]:
    """For each tensor of a stream, by its id, the k of the factor 2^-k that keeps it within `LENGTH_LIMIT`.

    Args:
        model: a functional model with one image input.
        images: float32 [N, height, width, 3], normalised; a few real ones.
    """
    streams = find_streams(model)
    if not streams:
        return {}
    tensors = [tensor for stream in streams for tensor in stream]
    probe = keras.Model(model.inputs, tensors)
    lengths: dict[int, float] = dict.fromkeys(map(id, tensors), 0.0)
    for image in images:
        values = keras.tree.flatten(probe([image[None]], training=False))
        for tensor, value in zip(tensors, values, strict=True):
            length = float(np.sqrt(np.square(keras.ops.convert_to_numpy(value)).sum(axis=-1).max()))
            lengths[id(tensor)] = max(lengths[id(tensor)], length)
    exponents = {}
    for stream in streams:
        exponent = exponent_for(lengths[id(tensor)] for tensor in stream)
        exponents.update(dict.fromkeys(map(id, stream), exponent))
    return exponents


def exponent_for(lengths: Iterable[float]) -> int:
    """The smallest k >= 0 with length * 2^-k <= `LENGTH_LIMIT` for all."""
    longest = max(lengths)
    if not np.isfinite(longest):
        raise ValueError("The residual stream of the Keras model holds NaN or infinity: it cannot be exported.")
    return max(0, int(np.ceil(np.log2(max(longest, 1e-30) / LENGTH_LIMIT))))

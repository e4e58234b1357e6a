"""What the model families share."""

import operator
from typing import Any

import keras
import numpy as np

from mobiatt_tf.layers import ATTENTIONS, PositionEmbedding, ProjectedAttention, resize_position_embedding

ImageSize = int | tuple[int, int]


def image_sides(image_size: Any, multiple: int) -> tuple[int, int]:
    """(height, width) in pixels.

    Raises:
        ValueError: not one or two positive integers, or not multiples of `multiple`.
    """
    try:
        sides = [operator.index(side) for side in (image_size if hasattr(image_size, "__len__") else (image_size,))]
    except TypeError:
        sides = []
    if len(sides) not in (1, 2) or any(side < 1 or side % multiple for side in sides):
        raise ValueError(
            f"image_size must be one side or (height, width) in pixels, each a positive multiple of {multiple}, but "
            f"{image_size} was given."
        )
    return sides[0], sides[-1]


def attention_layer(
    kind: str, num_heads: int, reference_tokens: int | None = None, **arguments: Any
) -> ProjectedAttention:
    """The attention layer called `kind`; `reference_tokens` concerns Mobile-Attention only.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in ATTENTIONS:
        raise ValueError(f"There is no attention {kind!r}. Choose one of {', '.join(ATTENTIONS)}.")
    if kind == "mobile":
        arguments["reference_tokens"] = reference_tokens
    return ATTENTIONS[kind](num_heads, **arguments)


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth rates rising linearly from 0 at the first block to `last`, as in timm."""
    return [float(rate) for rate in np.linspace(0.0, last, depth)]


def copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Copies every weight of `source` into `target` by its path; position embeddings are resized to the target's grid.

    Raises:
        ValueError: the two models differ in more than image size; lists the weights on either side. `target` is
            then unchanged.
    """
    source_weights = {weight.path: weight for weight in source.weights}
    target_weights = {weight.path: weight for weight in target.weights}
    old_positions, new_positions = _position_embeddings(source), _position_embeddings(target)
    problems = [f"only in the source: {path}" for path in source_weights.keys() - target_weights.keys()]
    problems += [f"only in the target: {path}" for path in target_weights.keys() - source_weights.keys()]
    new_values: dict[str, np.ndarray] = {}
    for path in source_weights.keys() & target_weights.keys():
        value = keras.ops.convert_to_numpy(source_weights[path])
        old, new = old_positions.get(path), new_positions.get(path)
        if old is not None and new is not None and old.prefix == new.prefix:
            value = resize_position_embedding(value, old.grid, new.grid, new.prefix)
        if value.shape != tuple(target_weights[path].shape):
            problems.append(f"{path}: {value.shape} in the source, {tuple(target_weights[path].shape)} in the target")
        new_values[path] = value
    if problems:
        raise ValueError("The weights do not fit:\n  " + "\n  ".join(sorted(problems)))
    for path, value in new_values.items():
        target_weights[path].assign(value)


def _position_embeddings(model: keras.Model) -> dict[str, PositionEmbedding]:
    """The position embedding layers by the path of their weight."""
    return {layer.embedding.path: layer for layer in model.layers if isinstance(layer, PositionEmbedding)}

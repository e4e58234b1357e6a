"""What the model families share."""

import operator
from collections.abc import Collection, Sequence
from typing import Any

import keras
import numpy as np

from mobiatt_tf import ops
from mobiatt_tf.layers import (
    ATTENTIONS,
    DropPath,
    GridTable,
    PositionEmbedding,
    ProjectedAttention,
    TokensToMap,
    grid_tables,
    resize_position_embedding,
)

ImageSize = int | tuple[int, int]
Attention = str | Sequence[str]  # of the whole model, or of each stage (DeiT: block)

# The authors' head counts are not part of their published module. Competition is among heads, so many narrow heads
# give it room, and the operator's output grows as N / H: 8 channels a head keep it near the input's scale.
MOBILE_HEAD_DIM = 8

HEAD_PREFIX = "head"  # the classifier heads of every family are `head` and `head_distillation`


def image_sides(image_size: Any, multiple: int, name: str = "image_size") -> tuple[int, int]:
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
            f"{name} must be one side or (height, width) in pixels, each a positive multiple of {multiple}, but "
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


def attention_kinds(
    attention: Attention, places: int, place: str, allowed: Collection[str] = ATTENTIONS
) -> tuple[str, ...]:
    """The attention of each of `places` stages or blocks (`place` names them), from one kind for all or one for each.

    Raises:
        ValueError: a kind that is not `allowed`, or another number of kinds.
    """
    kinds: tuple[Any, ...] = tuple(attention) if isinstance(attention, list | tuple) else (attention,) * places
    for kind in kinds:
        if kind not in allowed:
            raise ValueError(f"There is no attention {kind!r}. Choose one of {', '.join(allowed)}.")
    if len(kinds) != places:
        raise ValueError(
            f"attention must be one kind for all, or one for each of the {places} {place}, but {len(kinds)} were given."
        )
    return kinds


def attention_drop_rate(kind: str, given: float | None, dropout: float) -> float:
    """The dropout after the output projection: as given, else 0.05 for Mobile-Attention and `dropout` otherwise."""
    if given is not None:
        return given
    return 0.05 if kind == "mobile" else dropout


def attention_label(kinds: tuple[str, ...]) -> str:
    """For a model's name: the kind, or "mixed"."""
    return kinds[0] if len(set(kinds)) == 1 else "mixed"


def head_count(width: int, num_heads: int | None, head_dim: int | None, default: int) -> int:
    """How many heads share `width` channels: as given by their number or by their channels, else `default`.

    Raises:
        ValueError: both are given, or the width cannot be shared so.
    """
    if num_heads is not None and head_dim is not None:
        raise ValueError(f"Give num_heads or head_dim, but num_heads={num_heads} and head_dim={head_dim} were given.")
    if head_dim is not None:
        if not ops.divides(head_dim, width):
            raise ValueError(f"head_dim must divide the width {width}, but head_dim={head_dim} was given.")
        return width // head_dim
    return default if num_heads is None else num_heads


def logits(features: Any, name: str, num_classes: int, initializer: Any) -> Any:
    """A linear head, [B, D] to float32 [B, num_classes]; the features themselves when there are no classes.

    Raises:
        ValueError: a negative number of classes.
    """
    if num_classes < 0:
        raise ValueError(f"num_classes must be 0 (no head) or more, but {num_classes} was given.")
    if num_classes == 0:
        return keras.layers.Activation("linear", dtype="float32", name=name)(features)
    return keras.layers.Dense(num_classes, kernel_initializer=initializer, dtype="float32", name=name)(features)


def residual(x: Any, branch: Any, drop_path: float, name: str, index: int) -> Any:
    """x + branch with stochastic depth on the branch, both [B, ...]."""
    branch = DropPath(drop_path, name=f"{name}_drop_path{index}")(branch)
    return keras.layers.Add(name=f"{name}_add{index}")([x, branch])


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth rates rising linearly from 0 at the first block to `last`, as in timm."""
    return [float(rate) for rate in np.linspace(0.0, last, depth)]


def copy_weights(source: keras.Model, target: keras.Model, new_heads: bool = False) -> None:
    """Copies every weight of `source` into `target` by its path.

    Position embeddings and attention biases are resized to the target's grid (bicubic).

    Args:
        source: any model of this package.
        target: a model of the same family and variant; with `features_only` it takes what it has of a classifier.
        new_heads: leave the weights of the classifier heads as they are, for a target with other classes.

    Raises:
        ValueError: the two models differ in more than image size; lists the weights on either side. `target` is
            then unchanged.
    """
    source_weights, target_weights = (
        {weight.path: weight for weight in model.weights if not (new_heads and weight.path.startswith(HEAD_PREFIX))}
        for model in (source, target)
    )
    if not any(path.startswith(HEAD_PREFIX) for path in target_weights):  # a backbone wants no classifier
        behind = (HEAD_PREFIX, "norm/")
        source_weights = {
            path: weight
            for path, weight in source_weights.items()
            if path in target_weights or not path.startswith(behind)
        }
    carry_weights(source_weights, target_weights, grid_tables(source), grid_tables(target))


def carry_weights(
    source_weights: dict[str, Any],
    target_weights: dict[str, Any],
    old_tables: dict[str, GridTable],
    new_tables: dict[str, GridTable],
) -> None:
    """Assigns weights by path, all or none; tables over a grid are resized to the target's.

    Raises:
        ValueError: the paths or shapes of the two sides differ; lists them.
    """
    problems = [f"only in the source: {path}" for path in source_weights.keys() - target_weights.keys()]
    problems += [f"only in the target: {path}" for path in target_weights.keys() - source_weights.keys()]
    new_values: dict[str, np.ndarray] = {}
    for path in source_weights.keys() & target_weights.keys():
        value = keras.ops.convert_to_numpy(source_weights[path])
        old, new = old_tables.get(path), new_tables.get(path)
        if old is not None and new is not None and old.prefix == new.prefix:
            value = resize_position_embedding(value, old.grid, new.grid, new.prefix)
        if value.shape != tuple(target_weights[path].shape):
            problems.append(f"{path}: {value.shape} in the source, {tuple(target_weights[path].shape)} in the target")
        new_values[path] = value
    if problems:
        raise ValueError("The weights do not fit:\n  " + "\n  ".join(sorted(problems)))
    for path, value in new_values.items():
        target_weights[path].assign(value)


def resize(model: keras.Model, image_size: ImageSize) -> keras.Model:
    """A copy of a model of this package for images of another size, with the same weights and the same scale.

    Position embeddings and attention biases are resized; every `reference_tokens` stays, so that Mobile-Attention keeps
    the scale that the model was trained at.

    Args:
        model: a functional model of images [B, height, width, 3], new or loaded.
        image_size: side in pixels, or (height, width).

    Raises:
        ValueError: a side that the model cannot have.
    """
    old = tuple(model.inputs[0].shape[1:3])
    new = image_sides(image_size, 1)

    def clone(layer: keras.Operation) -> keras.Operation:
        if not isinstance(layer, keras.layers.Layer):
            return layer
        config = layer.get_config()
        if isinstance(
            layer, PositionEmbedding | TokensToMap
        ):  # the patch embedding has refused sides that it cannot divide
            config["grid"] = [
                places * side // before for places, side, before in zip(layer.grid, new, old, strict=True)
            ]
        return layer.__class__.from_config(config)

    source = model.inputs[0]
    images = keras.Input(batch_shape=(source.shape[0], *new, 3), dtype=source.dtype, name=source.name)
    try:
        copy = keras.models.clone_model(model, input_tensors=images, clone_function=clone)
    except ValueError as error:
        raise ValueError(f"{model.name} cannot take images of {new[0]} x {new[1]} pixels: {error}") from error
    copy_weights(model, copy)
    return copy

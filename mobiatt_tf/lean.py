"""Exact rewrites of a trained float model into one that computes the same with less work around its matrix products.

- Scale and offset of a LayerNorm go into the projections that read it: W' = diag(gamma) W, b' = b + beta W.
- Where every writer of a residual stream is a projection, its output is freed of its mean over the channels:
  W' = W - mean(W), b' = b - mean(b). Every reader is a LayerNorm, which subtracts the mean anyway, so nothing changes,
  and a root mean square remains of the LayerNorm (the identity is that of Ashkboos et al., "SliceGPT", ICLR 2024,
  section 3.2).

What either gains is in docs/performance.md. Layers that are not known here keep their LayerNorms.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np

from mobiatt_tf import layers

# The children that read a layer's input.
_READERS: dict[type, tuple[str, ...]] = {
    layers.MobileAttention: ("query", "key", "value"),
    layers.SoftmaxAttention: ("query", "key", "value"),
    layers.LinearAttention: ("query", "key", "value"),
    layers.MLP: ("fc1",),
    layers.DepthwiseMLP: ("fc1",),
    layers.SpatialReduction: ("reduction",),
    keras.layers.Dense: ("",),  # the layer itself
}
# The child that writes a layer's output.
_WRITERS: dict[type, str] = {
    layers.MobileAttention: "out",
    layers.SoftmaxAttention: "out",
    layers.LinearAttention: "out",
    layers.MLP: "fc2",
    layers.DepthwiseMLP: "fc2",
    layers.PatchEmbedding: "projection",
}
# Layers that a scale and an offset of every channel pass unchanged. (Here and below at inference: training with dropout
# in a stream moves its mean, and a root mean square then sees it.)
_CHANNELWISE = (layers.SelectToken, keras.layers.GlobalAveragePooling2D, keras.layers.Dropout)
# Layers whose output has mean 0 over the channels if their inputs and their own table have.
_MEAN_KEEPING = (keras.layers.Add, layers.DropPath, keras.layers.Dropout, layers.ClassToken, layers.PositionEmbedding)
_TABLES: dict[type, str] = {layers.ClassToken: "tokens", layers.PositionEmbedding: "embedding"}


class _Use(NamedTuple):
    """One reader of a tensor: a layer, which of its inputs the tensor is, and the node of the graph."""

    layer: Any
    position: int
    node: Any


def lean(model: keras.Model, centre: bool = True) -> keras.Model:
    """A copy of a functional float model with fewer operators and the same outputs (to 1e-5 of the largest).

    Args:
        model: a functional model of one input; it is not changed, and shares no weights with the copy. Any other kind
            of model, such as a Sequential one, is copied as it is.
        centre: also free residual streams of their mean.

    Raises:
        ValueError: the model has several inputs.
    """
    if len(model.inputs) != 1:
        raise ValueError(f"Only models with one input can be rewritten, but {model.name} has {len(model.inputs)}.")
    if not hasattr(model, "_nodes_by_depth"):
        copy = keras.models.clone_model(model)
        copy.set_weights(model.get_weights())
        return copy
    norms = {norm.name: uses for norm in model.layers if (uses := _projections_behind(model, norm))}
    streams = list(_streams(model)) if centre else []
    centred = {norm.name for stream in streams for norm in stream.norms if norm.name in norms or not _affine(norm)}
    streams = [stream for stream in streams if all(norm.name in centred for norm in stream.norms)]
    centred = {norm.name for stream in streams for norm in stream.norms}

    def bare(layer: keras.Operation) -> keras.Operation:
        if not isinstance(layer, keras.layers.Layer):
            return layer
        config = layer.get_config()
        if layer.name in centred:
            return layers.RootMeanSquareNorm(config["epsilon"], name=layer.name, dtype=config["dtype"])
        if layer.name in norms:
            config |= {"scale": False, "center": False}
        return layer.__class__.from_config(config)

    source = model.inputs[0]
    images = keras.Input(batch_shape=source.shape, dtype=source.dtype, name=source.name)
    copy = keras.models.clone_model(model, input_tensors=images, clone_function=bare)
    copies = {layer.name: twin for layer, twin in zip(model.layers, copy.layers, strict=True)}
    for layer in model.layers:
        if layer.weights and layer.name not in norms:
            copies[layer.name].set_weights(layer.get_weights())
    for name, uses in norms.items():
        for use in uses:
            for child in _reading(copies[use.layer.name], use):
                _absorb(child, model.get_layer(name))
    for stream in streams:
        for layer in stream.writers:
            _centre(copies[layer.name])
    return copy


class _Stream(NamedTuple):
    """A residual stream: the layers that write into it, and the LayerNorms that read it."""

    writers: list[Any]
    norms: list[Any]


def _uses(model: keras.Model, tensor: Any) -> list[_Use]:
    return [
        _Use(node.operation, position, node)
        for nodes in model._nodes_by_depth.values()
        for node in nodes
        for position, source in enumerate(node.input_tensors)
        if source is tensor
    ]


def _inputs(model: keras.Model, layer: Any) -> list[Any]:
    """The tensors that a layer reads in this model; it must stand in it once."""
    nodes = [node for nodes in model._nodes_by_depth.values() for node in nodes if node.operation is layer]
    return list(nodes[0].input_tensors) if len(nodes) == 1 else []


def _is_output(model: keras.Model, tensor: Any) -> bool:
    return any(output is tensor for output in keras.tree.flatten(model.outputs))


def _is_layer_norm(layer: Any) -> bool:
    if type(layer) is not keras.layers.LayerNormalization or getattr(layer, "rms_scaling", False):
        return False
    axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
    return list(axes) in ([-1], [len(layer.output.shape) - 1])


def _affine(norm: Any) -> bool:
    return bool(norm.scale or norm.center)


def _projections_behind(model: keras.Model, norm: Any) -> list[_Use]:
    """Everything that reads a LayerNorm, if that is projections alone and there is something to absorb; else []."""
    if not _is_layer_norm(norm) or not _affine(norm) or len(_inputs(model, norm)) != 1:
        return []
    found: list[_Use] = []
    pending = [norm.output]
    while pending:
        tensor = pending.pop()
        uses = _uses(model, tensor)
        if _is_output(model, tensor) or not all(_can_absorb(use) or _passes(use.layer) for use in uses):
            return []
        pending += [use.layer.output for use in uses if _passes(use.layer)]
        found += [use for use in uses if not _passes(use.layer)]
    return found


def _passes(layer: Any) -> bool:
    once = type(layer) in _CHANNELWISE and len(layer._inbound_nodes) == 1
    return once and getattr(layer, "data_format", "channels_last") == "channels_last"


def _can_absorb(use: _Use) -> bool:
    if type(use.layer) not in _READERS or len(use.layer._inbound_nodes) != 1:
        return False
    arguments = use.node.arguments
    in_order = len(arguments.args) == len(use.node.input_tensors)  # no tensor by name, and none left out before another
    plain = all(
        child.use_bias and len(child.weights) == 2 and getattr(child, "padding", "valid") == "valid"
        for child in _reading(use.layer, use)
    )
    return in_order and plain


def _reading(layer: Any, use: _Use) -> Iterator[Any]:
    """The projections of a layer that read its input in that place; of an attention with one input, all three."""
    names, inputs = _READERS[type(use.layer)], len(use.node.input_tensors)
    if inputs > 1:
        names = names[use.position : use.position + 1] if use.position < inputs - 1 else names[use.position :]
    for name in names:
        yield getattr(layer, name) if name else layer


def _absorb(projection: Any, norm: Any) -> None:
    kernel, bias = (np.asarray(value, "float64") for value in projection.get_weights())  # [..., in, out], [out]
    width = kernel.shape[-2]
    offset = _numpy(norm.beta) if norm.center else np.zeros(width)
    scale = _numpy(norm.gamma) if norm.scale else np.ones(width)
    bias = bias + offset @ kernel.reshape(-1, width, kernel.shape[-1]).sum(axis=0)
    projection.set_weights([(kernel * scale[:, None]).astype("float32"), bias.astype("float32")])


def _centre(layer: Any) -> None:
    if type(layer) in _TABLES:
        table = getattr(layer, _TABLES[type(layer)])
        table.assign(_without_mean(table))
        return
    projection = getattr(layer, _WRITERS[type(layer)])
    projection.set_weights([_without_mean(weight) for weight in projection.weights])


def _without_mean(weight: Any) -> np.ndarray:
    value = _numpy(weight)
    return (value - value.mean(axis=-1, keepdims=True)).astype("float32")


def _numpy(weight: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(weight), "float64")


def _streams(model: keras.Model) -> Iterator[_Stream]:
    """The residual streams whose writers are all known and whose readers are all LayerNorms."""
    seen: set[int] = set()
    for add in model.layers:
        if type(add) is not keras.layers.Add or len(add._inbound_nodes) != 1 or id(add.output) in seen:
            continue
        tensors, writers, norms, whole = {}, [], [], True
        pending = [add.output]
        while pending:
            tensor = pending.pop()
            if id(tensor) in tensors:
                continue
            tensors[id(tensor)] = tensor
            producer = tensor._keras_history.operation
            if type(producer) in _MEAN_KEEPING:
                pending += _inputs(model, producer)
            if type(producer) in _TABLES or type(producer) in _WRITERS:
                writers.append(producer)
            elif type(producer) not in _MEAN_KEEPING:
                whole = False
            whole = whole and not _is_output(model, tensor) and len(producer._inbound_nodes) == 1
            for use in _uses(model, tensor):
                if type(use.layer) in _MEAN_KEEPING:
                    pending += use.node.output_tensors
                elif _is_layer_norm(use.layer):
                    norms.append(use.layer)
                else:
                    whole = False
        seen.update(tensors)
        if whole and norms:
            yield _Stream(writers, norms)

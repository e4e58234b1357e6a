"""How large a model is: parameters, multiply-adds and attention, counted from its layers' shapes."""

import math
from typing import Any

import keras

from mobiatt_tf.layers import ConvAttention, ProjectedAttention
from mobiatt_tf.models import layer_calls


def count_macs(model: keras.Model) -> int:
    """Multiply-adds (MACs) of one image: convolutions, dense layers and the matrix products of attention.

    Elementwise work, norms, pooling and resizing are not counted, as in timm and in the hosts' papers. TensorFlow's
    profiler counts an einsum as 0, so nothing is measured here: every number follows from shapes.

    A layer that the graph calls several times, as a detector's heads for each level, counts each time.

    Args:
        model: a functional model of fixed image size whose weighted layers are Dense, Conv2D, DepthwiseConv2D, norms,
            or layers made of these; layers that multiply activations with each other count that in `mixing_macs`.

    Raises:
        ValueError: a size is open, a layer with a kernel is none of these, or a layer made of others is called again.
    """
    shapes = _shapes_of_shared(model)
    return sum(
        _layer_macs(layer, shape)
        for layer in model._flatten_layers(include_self=False)
        for shape in shapes.get(id(layer)) or [_input_shape(layer)]
    )


def trainable_parameters(model: keras.Model) -> int:
    """Parameters as papers count them: without the statistics of batch norm, which are buffers in PyTorch."""
    return sum(math.prod(weight.shape) for weight in model.trainable_weights)


def attention_stages(model: keras.Model) -> list[dict[str, Any]]:
    """`layers`, `tokens` and `heads` of the attention of each stage that has any; DeiT is one stage.

    EfficientFormerV2's attention between two stages is not among them.
    """
    stages: dict[str, dict[str, Any]] = {}
    for layer in model.layers:
        if isinstance(layer, ProjectedAttention | ConvAttention):
            stage = layer.name.split("_")[0] if layer.name.startswith("stage") else "all"
            tokens = layer.tokens if isinstance(layer, ConvAttention) else layer.query_tokens
            stages.setdefault(stage, {"layers": 0, "tokens": tokens, "heads": layer.num_heads})["layers"] += 1
    return list(stages.values())


def _shapes_of_shared(model: keras.Model) -> dict[int, list[tuple[Any, ...]]]:
    """The input shapes of the layers that the graph calls several times, by the layer's id."""
    calls: dict[int, list[Any]] = {}
    for node in layer_calls(model):
        calls.setdefault(id(node.operation), []).append(node)
    shared = {key: nodes for key, nodes in calls.items() if len(nodes) > 1}
    for nodes in shared.values():
        layer = nodes[0].operation
        inside = layer._flatten_layers(include_self=False) if isinstance(layer, keras.layers.Layer) else []
        if any(getattr(child, "kernel", None) is not None or hasattr(child, "mixing_macs") for child in inside):
            raise ValueError(f"The multiply-adds of {layer.path} are not known: it holds layers and is called again.")
    return {key: [tuple(node.input_tensors[0].shape) for node in nodes] for key, nodes in shared.items()}


def _layer_macs(layer: keras.layers.Layer, shape: tuple[Any, ...]) -> int:
    """The layer's own for an input of that shape, without its children's."""
    macs = layer.mixing_macs() if hasattr(layer, "mixing_macs") else 0
    if isinstance(layer, keras.layers.Dense):
        return macs + math.prod(_closed(layer, shape)[1:]) * layer.units
    if isinstance(layer, keras.layers.DepthwiseConv2D | keras.layers.Conv2D):
        height, width = layer.compute_output_shape(_closed(layer, shape))[1:3]
        # Conv2D: k * k * C_in weights for each of the outputs; DepthwiseConv2D: k * k for each channel.
        return macs + height * width * math.prod(layer.kernel.shape)
    if getattr(layer, "kernel", None) is not None:
        raise ValueError(f"The multiply-adds of {layer.path}, a {type(layer).__name__}, are not known.")
    return macs


def _input_shape(layer: keras.layers.Layer) -> tuple[Any, ...]:
    """The shape the layer was built for."""
    return tuple((layer.get_build_config() or {}).get("input_shape") or ())


def _closed(layer: keras.layers.Layer, shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """The shape itself, where every size but the batch's is known."""
    if not shape or None in shape[1:]:
        raise ValueError(f"{layer.path} was built for {shape or 'an unknown shape'}: build the model at a fixed size.")
    return shape

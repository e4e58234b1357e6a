"""From a float model to one that is trained with the rounding errors of its quantized file."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from mobiatt_tf import layers
from mobiatt_tf.models import layer_calls
from mobiatt_tf.quantization.composites import QUANTIZED_CLASSES, QuantizedClassToken, QuantizedConvBN, quantized_class
from mobiatt_tf.quantization.fake_quant import FakeQuantize
from mobiatt_tf.quantization.policies import Policy, get_policy
from mobiatt_tf.quantization.projections import QuantizedProjection, is_fused

# Layers that compute in float in the file as well, or do not compute at all.
FLOAT_LAYERS: tuple[Any, ...] = (
    keras.layers.InputLayer,
    keras.layers.Activation,
    keras.layers.Add,
    keras.layers.AveragePooling2D,
    keras.layers.BatchNormalization,
    keras.layers.Concatenate,
    keras.layers.Dropout,
    keras.layers.Flatten,
    keras.layers.GlobalAveragePooling1D,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.Identity,
    keras.layers.LayerNormalization,
    keras.layers.MaxPooling2D,
    keras.layers.Multiply,
    keras.layers.Permute,
    keras.layers.ReLU,
    keras.layers.Rescaling,
    keras.layers.Reshape,
    keras.layers.UpSampling2D,
    keras.layers.ZeroPadding2D,
    layers.DropPath,
    layers.LayerScale,
    layers.PositionEmbedding,
    layers.RootMeanSquareNorm,
    layers.SelectToken,
    layers.TokensToMap,
)


def quantize_aware(
    model: keras.Model, policy: str | Policy = "int8", own_layers: Mapping[type, Any] | None = None
) -> keras.Model:
    """A copy of a functional model that computes with the rounding of a policy, ready for `calibrate` and training.

    The copy shares nothing with `model`; weights are carried by their paths. Batch norm behind a convolution in
    `ConvBN` is folded into it, other batch norm is frozen, as in the exported file. It can be trained, saved and loaded
    as any Keras model, also under a strategy and in mixed precision (where int8 steps are rounded to bfloat16).

    A dense layer or convolution that the graph calls several times, as a detector's head for each of its levels, has
    one range for all calls, and keeps the calibrated one in training: a moving average over the calls would tend to
    the mean of the levels and cut off what the largest one holds. Where all that it reads is rounded already, it rounds
    nothing again: each level keeps the steps of its own range, as TFLite's converter writes it. Layers made of
    several, such as `ConvBN` and attention, may be called once.

    Args:
        model: a functional model of this package, or any of Keras' dense, convolution and float layers.
        policy: a key of `POLICIES`, or a `Policy`.
        own_layers: layer classes of your own and the class that quantizes each, see `QuantizedChildren`.

    Raises:
        ValueError: an unknown policy, a model that is quantized already, a layer that is not known, or one that is made
            of several and called several times; names it.
        UserError: tensorflow-model-optimization is not installed.
    """
    policy = get_policy(policy)
    own = dict(own_layers or {})
    calls = Counter(node.operation.name for node in layer_calls(model))
    if is_quantized(model):
        raise ValueError(f"{model.name} is quantized already. Start from the float model.")

    def check_called_once(layer: keras.layers.Layer) -> None:
        if calls[layer.name] > 1:
            raise ValueError(
                f"The layer {layer.name!r} of type {type(layer).__name__} is called {calls[layer.name]} times; only "
                "dense layers and convolutions can be quantized in several places at a time. Give each place its own."
            )

    def quantized(layer: keras.Operation) -> keras.Operation:
        if not isinstance(layer, keras.layers.Layer):
            return layer  # a bare operation such as x + y stays in float
        config = layer.get_config()
        replacement: Any
        if type(layer) in own:
            replacement = own[type(layer)]
            if replacement is not type(layer):
                check_called_once(layer)
            return replacement.from_config(config if replacement is type(layer) else {**config, "policy": policy.name})
        if type(layer) in QUANTIZED_CLASSES:
            replacement = quantized_class(layer)
            if not issubclass(replacement, QuantizedProjection):
                check_called_once(layer)
            elif calls[layer.name] > 1:
                config |= {"follows": False, "rounds_input": not _reads_rounded(model, layer)}
            return replacement.from_config({**config, "policy": policy.name})
        if not isinstance(layer, FLOAT_LAYERS):
            raise ValueError(
                f"quantize_aware does not know the layer {layer.name!r} of type {type(layer).__name__}. Give its "
                "quantized form in own_layers (see mobiatt_tf.quantization.QuantizedChildren), or the type itself as "
                "its own form if it is to stay in float."
            )
        return layer.__class__.from_config(config)

    source = model.inputs[0]
    images = keras.Input(batch_shape=source.shape, dtype=source.dtype, name=source.name)
    copy = keras.models.clone_model(model, input_tensors=images, clone_function=quantized)
    for layer in copy._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False  # Keras then takes the moving statistics in training too
    _carry_weights(model, copy)
    return copy


def _reads_rounded(model: keras.Model, layer: keras.layers.Layer) -> bool:
    """Whether a layer reads, in all its places, what a dense layer or convolution gives with its output in int8."""
    tensors = [tensor for node in layer_calls(model) if node.operation is layer for tensor in node.input_tensors]
    makers = [tensor._keras_history.operation for tensor in tensors]
    return all(
        issubclass(QUANTIZED_CLASSES.get(type(maker), object), QuantizedProjection) and is_fused(maker.activation)
        for maker in makers
    )


def _carry_weights(source: keras.Model, target: keras.Model) -> None:
    values = {weight.path: np.asarray(keras.ops.convert_to_numpy(weight)) for weight in source.weights}
    for layer in source._flatten_layers():
        if type(layer) is layers.ConvBN:
            values[layer.conv.kernel.path], values[layer.conv.bias.path] = folded(layer)
    ranges = {id(weight) for quantizer in quantizers(target) for weight in quantizer.weights}
    for weight in target.weights:
        if id(weight) in ranges:
            continue
        if weight.path not in values:
            raise ValueError(
                f"{source.name} has no weight {weight.path}, which its quantized copy needs. Give the children of "
                "your own layers names, as in Dense(8, name='gate'): Keras numbers the others anew in each copy."
            )
        weight.assign(values[weight.path])


def folded(layer: layers.ConvBN) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias of the one convolution that a `ConvBN` is at inference, float32."""
    bn, conv = layer.bn, layer.conv
    gamma, beta, mean, variance = (
        np.asarray(keras.ops.convert_to_numpy(weight), "float64")
        for weight in (bn.gamma, bn.beta, bn.moving_mean, bn.moving_variance)
    )
    kernel, bias = (np.asarray(keras.ops.convert_to_numpy(weight), "float64") for weight in (conv.kernel, conv.bias))
    factor = gamma / np.sqrt(variance + bn.epsilon)  # [filters]
    by_channel = factor[:, None] if layer.filters is None else factor  # depthwise kernels are [h, w, C, 1]
    return (kernel * by_channel).astype("float32"), ((bias - mean) * factor + beta).astype("float32")


def quantizers(model: keras.Model) -> list[FakeQuantize]:
    """All `FakeQuantize` layers of a model, each once."""
    found = {id(layer): layer for layer in model._flatten_layers() if isinstance(layer, FakeQuantize)}
    return list(found.values())


def projections(model: keras.Model) -> list[QuantizedProjection]:
    """All quantized dense layers and convolutions of a model."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, QuantizedProjection)]


def is_quantized(model: keras.Model) -> bool:
    """Whether the model came out of `quantize_aware`."""
    return bool(projections(model))


def policy_of(model: keras.Model) -> Policy | None:
    """The policy of a quantized model; None of a float one."""
    found = projections(model)
    return found[0].policy if found else None


def bake(model: keras.Model) -> None:
    """Rounds every kernel for good: the form in which a quantized model is exported. The outputs stay the same.

    Raises:
        ValueError: a range was never set, or is not finite; names it.
    """
    check_calibrated(model)
    for projection in projections(model):
        projection.bake()
    for layer in model.layers:
        if isinstance(layer, layers.PositionEmbedding):
            _fold_class_token(layer)


def _fold_class_token(position: layers.PositionEmbedding) -> None:
    """Adds the class token in front of a position embedding to the latter: one table in the file instead of two."""
    nodes = position._inbound_nodes
    source = nodes[0].input_tensors[0]._keras_history.operation
    alone = len(nodes) == len(source._inbound_nodes) == len(source._outbound_nodes) == 1
    if isinstance(source, QuantizedClassToken) and alone and not source.folded:
        embedding = keras.ops.convert_to_numpy(position.embedding).copy()  # [1, count + N, D]
        embedding[:, : source.count] += keras.ops.convert_to_numpy(source.tokens)
        position.embedding.assign(embedding)
        source.tokens.assign(keras.ops.zeros_like(source.tokens))  # a copy of this model adds zeros, nothing twice
        source.folded = True


def check_calibrated(model: keras.Model) -> None:
    """Raises ValueError where a range of the model was never set or is not finite; names it."""
    for quantizer in quantizers(model):
        low, high = quantizer.range
        if not low < high or not np.isfinite([low, high]).all():
            raise ValueError(
                f"{quantizer.path} has the range [{low}, {high}]: it is not calibrated. Call "
                "mobiatt_tf.quantization.calibrate(model, images) with real images first."
            )


def quantized_layers(model: keras.Model) -> list[Any]:
    """The layers of the functional graph that have something quantized in them, in order."""
    return [
        layer
        for layer in model.layers
        if any(isinstance(part, QuantizedProjection | QuantizedConvBN) for part in layer._flatten_layers())
    ]

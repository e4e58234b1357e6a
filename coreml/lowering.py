"""From a Keras model to a MIL program, layer by layer, in the layout that the Neural Engine wants.

coremltools can convert the TensorFlow graph of a Keras model. That graph no longer says which operators are a LayerNorm
or an attention: passes must guess it, and two wrong guesses (see docs/coreml.md) go unnoticed. Here each Keras layer
has one function that writes what it means, and every operator bears the name of its layer.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from coreml import attention, maps
from coreml.calls import Call, calls, outputs_of
from coreml.graph import Correction, Graph, Value, numpy
from coreml.projections import activate, project
from coreml.streams import choose_exponents
from coreml.tools import coremltools, target
from mobiatt_tf import layers
from mobiatt_tf.data import IMAGENET_MEAN, IMAGENET_STD
from mobiatt_tf.models import rebuild
from mobiatt_tf.quantization import policy_of
from mobiatt_tf.quantization.composites import QUANTIZED_CLASSES
from mobiatt_tf.tasks import task_of

INPUT, BOXES, LOGITS, PROBABILITIES = "image", "boxes", "logits", "probabilities"
_STREAM_IMAGES = 16
_IMAGE_SCALE = 2.0**-6  # about 1 / deviation
# Layers that begin with a convolution, which can take in the rest of the image's normalisation.
_CONVOLUTIONS = (keras.layers.Conv2D, layers.ConvBN, layers.OverlapPatchEmbedding, layers.PatchEmbedding)


def lower(
    model: keras.Model, images: np.ndarray, ios: int, float16: bool, scaled: bool | None = None
) -> tuple[Any, dict[str, list[Any]]]:
    """A MIL program of a classifier, a detector or a segmenter, from an RGB image 0..255 to its outputs.

    Args:
        model: a functional model of this package, float or quantized with the policies int8, dynamic or float16; see
            `mobiatt_tf.tasks.task_of` for what it may give.
        images: float32 [N, height, width, 3], normalised; real ones, from which the scale of the residual streams is
            chosen (the first 16 are used).
        ios: 15 to 18; see `least_ios`.
        float16: the precision of tensors and weights, else float32.
        scaled: whether residual streams are scaled; None: in float16 only.

    Returns:
        The program, with the input "image" [1, 3, H, W] and float32 outputs: of a classifier "logits" and
        "probabilities" [1, classes], of a detector "boxes" [1, A, 4] and "logits" [1, A, classes], of a segmenter
        "logits" [1, classes, h, w]. And for each call of a Keras layer (see `calls`) the name of its result in the
        program and the exponent of its scale.

    Raises:
        ValueError: a layer, a setting or outputs that cannot be exported; names them.
        UserError: a weight that float16 cannot hold.
    """
    opset = target(ios)
    if ios < (least := least_ios(model)):
        raise ValueError(f"The quantized model needs iOS {least}, but iOS {ios} was asked for.")
    model = rebuild(model, batch_size=1)
    task, outputs = task_of(model), outputs_of(model)
    builder = _builder()
    scaled = float16 if scaled is None else scaled
    exponents = choose_exponents(model, images[:_STREAM_IMAGES]) if scaled else {}
    height, width = model.input_shape[1:3]
    function_type, program_type = _program_types()
    inputs = {INPUT: builder.placeholder(shape=(1, 3, height, width))}
    names: dict[str, list[Any]] = {}
    taken = {INPUT, BOXES, LOGITS, PROBABILITIES, "classLabel"}

    with function_type(inputs, opset_version=opset) as function:
        graph = Graph(builder, float16)
        values: dict[int, Value] = {id(model.inputs[0]): _image(graph, function.inputs[INPUT])}
        for call in calls(model):
            result = _lower_call(graph, call, values, exponents, taken)
            values[id(call.outputs[0])] = result
            names[call.name] = [result.var.name, result.exponent]
        results = {name: [values[id(tensor)] for tensor in tensors] for name, tensors in outputs.items()}
        function.set_outputs(_OUTPUTS[task](graph, results))
    program = program_type()
    program.add_function("main", function)
    return program, names


def _lower_call(
    graph: Graph, call: Call, values: Mapping[int, Value], exponents: Mapping[int, int], taken: set[str]
) -> Value:
    rule = _rule(call.operation)
    arguments = [values[id(tensor)] for tensor in call.inputs]
    graph.name = _unique_name(call.name, taken)
    graph.shape = tuple(call.outputs[0].shape)
    graph.exponent = exponents.get(id(call.outputs[0]), 0)
    if not isinstance(call.operation, _CONVOLUTIONS):
        arguments = [graph.corrected(argument) for argument in arguments]
    if any(argument.places > 1 for argument in arguments) and rule not in _PLACES_KEPT:
        raise ValueError(
            f"The layer {call.operation.name!r} reads channels that were reshaped to places. Only Concatenate, "
            "Activation and Identity can follow such a Reshape, and the end of the model."
        )
    result = rule(graph, call.operation, *arguments)
    if result.exponent != graph.exponent:
        raise AssertionError(f"{call.name} has exponent {result.exponent} instead of {graph.exponent}.")
    return result


def least_ios(model: keras.Model) -> int:
    """The least iOS that can hold what a model is quantized to; 15 for a float model.

    Raises:
        ValueError: a policy that Core ML cannot hold.
    """
    policy = policy_of(model)
    if policy is None:
        return 15
    if policy.attention:
        raise ValueError(
            f"The policy {policy.name} has an int8 attention core, which is made for TFLite. Train with --policy=int8."
        )
    if policy.activations:
        return 17  # quantize, dequantize
    return 16 if policy.weights == "int8" else 15  # constexpr_affine_dequantize


def _unique_name(name: str, taken: set[str]) -> str:
    """A name that MIL allows and that no other layer has; adds it to `taken`."""
    plain = re.sub(r"\W", "_", name, flags=re.ASCII)
    unique = plain if plain[:1].isalpha() else f"layer_{plain}"
    while unique in taken:
        unique += "_"
    taken.add(unique)
    return unique


def _builder() -> Any:
    coremltools()
    from coremltools.converters.mil import Builder

    return Builder


def _program_types() -> tuple[Any, Any]:
    from coremltools.converters.mil.mil import Function, Program

    return Function, Program


def _image(graph: Graph, image: Any) -> Value:
    """The image 0..255, centred and scaled so that float16 holds it well.

    The mean is rounded to 1/16 and the scale is a power of two: both exact in float16, where the true ones would shift
    every pixel of a channel by the same rounding error. The first convolution takes in what is left. Where it pads, it
    pads with zeros of the centred image, so that the shift (2e-4) misses at the border only.
    """
    mean, deviation = np.asarray(IMAGENET_MEAN) * 255, np.asarray(IMAGENET_STD) * 255
    builder = graph.builder
    rounded = np.round(mean * 16) / 16 if graph.float16 else mean
    x = builder.cast(x=image, dtype="fp16", name="image_float16") if graph.float16 else image
    x = builder.sub(x=x, y=graph.const(rounded[None, :, None, None], "the mean of the images"), name="image_centred")
    x = builder.mul(x=x, y=graph.dtype(_IMAGE_SCALE), name="image_scaled")
    return Value(x, correction=Correction(1 / (deviation * _IMAGE_SCALE), (rounded - mean) / deviation))


def _classifier_outputs(graph: Graph, results: Mapping[str, Sequence[Value]]) -> list[Any]:
    """Logits and probabilities in float32; two heads are averaged, as `DistilledModel` does."""
    builder, heads = graph.builder, results[LOGITS]
    logits = heads[0].var
    if len(heads) == 2:
        total = builder.add(x=heads[0].var, y=heads[1].var, name="logits_sum")
        logits = builder.mul(x=total, y=graph.dtype(0.5), name="logits_mean")
    classes = int(np.prod(logits.shape))
    flat = builder.reshape(x=logits, shape=[1, classes], name="logits_half" if graph.float16 else LOGITS)
    if graph.float16:
        flat = builder.cast(x=flat, dtype="fp32", name=LOGITS)
    return [flat, builder.softmax(x=flat, axis=-1, name=PROBABILITIES)]


def _detector_outputs(graph: Graph, results: Mapping[str, Sequence[Value]]) -> list[Any]:
    """Boxes and logits in float32 as Keras has them: one transpose and one reshape each."""
    builder, outputs = graph.builder, []
    for name, (result,) in results.items():
        _, channels, _, positions = result.shape  # [1, places * C, 1, positions]
        rows = builder.transpose(x=result.var, perm=[0, 2, 3, 1], name=f"{name}_rows")  # [1, 1, positions, places * C]
        shape = [1, positions * result.places, channels // result.places]
        half = f"{name}_half" if graph.float16 else name
        var = builder.reshape(x=rows, shape=shape, name=half)  # [1, A, C]
        outputs.append(builder.cast(x=var, dtype="fp32", name=name) if graph.float16 else var)
    return outputs


def _segmenter_outputs(graph: Graph, results: Mapping[str, Sequence[Value]]) -> list[Any]:
    """The map of logits in float32, [1, classes, h, w]: the program's layout."""
    logits = results[LOGITS][0].var
    if graph.float16:
        return [graph.builder.cast(x=logits, dtype="fp32", name=LOGITS)]
    return [graph.builder.identity(x=logits, name=LOGITS)]


_OUTPUTS: dict[str, Callable[[Graph, Mapping[str, Sequence[Value]]], list[Any]]] = {
    "classification": _classifier_outputs,
    "detection": _detector_outputs,
    "segmentation": _segmenter_outputs,
}


def _activation(graph: Graph, layer: keras.layers.Activation, x: Value) -> Value:
    return dataclasses.replace(activate(graph, x, layer.activation, graph.name), places=x.places)


def _relu(graph: Graph, layer: keras.layers.ReLU, x: Value) -> Value:
    if layer.max_value is not None or layer.negative_slope or layer.threshold:
        raise ValueError(f"{layer.name} has a slope, a threshold or a largest value, which cannot be exported.")
    return activate(graph, x, keras.activations.relu, graph.name)


def _add(graph: Graph, layer: keras.layers.Add, *terms: Value) -> Value:
    total = terms[0]
    for index, term in enumerate(terms[1:], start=2):
        name = graph.name if index == len(terms) else f"{graph.name}_{index}"
        total = Value(graph.builder.add(x=total.var, y=term.var, name=name), total.exponent)
    return total


def _identity(graph: Graph, layer: Any, x: Value) -> Value:
    return x


def _layer_scale(graph: Graph, layer: layers.LayerScale, x: Value) -> Value:
    scale = graph.const(numpy(layer.scale)[None, :, None, None], layer.path)
    return Value(graph.builder.mul(x=x.var, y=scale, name=graph.name), x.exponent)


def _batch_norm(graph: Graph, layer: keras.layers.BatchNormalization, x: Value) -> Value:
    """Batch norm that no convolution precedes."""
    if layer.axis not in (-1, 3):
        raise ValueError(f"{layer.path} normalizes over axis {layer.axis}; only the last can be exported.")
    gamma = numpy(layer.gamma) if layer.scale else np.ones(x.shape[1])
    beta = numpy(layer.beta) if layer.center else np.zeros(x.shape[1])
    # The deviation goes into gamma: float16 would lose small variances.
    gamma = gamma / np.sqrt(numpy(layer.moving_variance) + layer.epsilon)
    var = graph.builder.batch_norm(
        x=x.var,
        mean=graph.const(numpy(layer.moving_mean), layer.path),
        variance=graph.const(np.ones(x.shape[1]), layer.path),
        gamma=graph.const(gamma, layer.path),
        beta=graph.const(beta, layer.path),
        epsilon=graph.dtype(0),
        name=graph.name,
    )
    return Value(var)


def _layer_norm(graph: Graph, layer: keras.layers.LayerNormalization, x: Value) -> Value:
    return graph.layer_norm(x, layer, graph.name)


def _root_mean_square(graph: Graph, layer: layers.RootMeanSquareNorm, x: Value) -> Value:
    return graph.root_mean_square(x, layer, graph.name)


def _projection(graph: Graph, layer: Any, x: Value) -> Value:
    return project(graph, layer, x, graph.name)


def _global_average(graph: Graph, layer: Any, x: Value) -> Value:
    return Value(graph.builder.reduce_mean(x=x.var, axes=[2, 3], keep_dims=True, name=graph.name))  # [1, C, 1, 1]


def _average_pool(graph: Graph, layer: keras.layers.AveragePooling2D, x: Value) -> Value:
    if layer.padding != "valid":
        raise ValueError(f"{layer.name} pads {layer.padding!r}; only 'valid' can be exported.")
    return _pooled(graph, x, layer.pool_size, layer.strides, graph.name)


def _pooled(graph: Graph, x: Value, window: Sequence[int], strides: Sequence[int], name: str) -> Value:
    arguments = {"kernel_sizes": list(window), "strides": list(strides), "pad_type": "valid"}
    return Value(graph.builder.avg_pool(x=x.var, exclude_padding_from_average=True, name=name, **arguments))


def _patch_embedding(graph: Graph, layer: layers.PatchEmbedding, x: Value) -> Value:
    patches = project(graph, layer.projection, x, f"{graph.name}_projection", graph.exponent)  # [1, D, H/p, W/p]
    _, channels, height, width = patches.shape
    return graph.reshape(patches, (1, channels, 1, height * width), graph.name)  # [1, D, 1, N]


def _overlap_patch_embedding(graph: Graph, layer: layers.OverlapPatchEmbedding, x: Value) -> Value:
    padding = layer.patch_size // 2  # PyTorch's
    patches = project(graph, layer.projection, x, f"{graph.name}_projection", padding=padding)
    return graph.layer_norm(patches, layer.norm, graph.name, graph.exponent)


def _class_token(graph: Graph, layer: layers.ClassToken, x: Value) -> Value:
    tokens = numpy(layer.tokens)[0].T[None, :, None, :] * 2.0**-x.exponent  # [1, C, 1, count]
    constant = graph.const(tokens, layer.path)
    return Value(graph.builder.concat(values=[constant, x.var], axis=3, name=graph.name), x.exponent)


def _position_embedding(graph: Graph, layer: layers.PositionEmbedding, x: Value) -> Value:
    table = numpy(layer.embedding)[0].T[None, :, None, :] * 2.0**-x.exponent  # [1, C, 1, N]
    return Value(graph.builder.add(x=x.var, y=graph.const(table, layer.path), name=graph.name), x.exponent)


def _select_token(graph: Graph, layer: layers.SelectToken, x: Value) -> Value:
    begin, end = [0, 0, 0, layer.index], [1, x.shape[1], 1, layer.index + 1]
    return Value(graph.builder.slice_by_index(x=x.var, begin=begin, end=end, name=graph.name))  # [1, C, 1, 1]


def _mlp(graph: Graph, layer: layers.MLP, x: Value) -> Value:
    hidden = project(graph, layer.fc1, x, f"{graph.name}_fc1")
    hidden = Value(graph.builder.gelu(x=hidden.var, mode="EXACT", name=f"{graph.name}_gelu"))
    return project(graph, layer.fc2, hidden, graph.name, graph.exponent)


def _depthwise_mlp(graph: Graph, layer: layers.DepthwiseMLP, x: Value) -> Value:
    hidden = project(graph, layer.fc1, x, f"{graph.name}_fc1")
    if layer.relu:
        hidden = Value(graph.builder.relu(x=hidden.var, name=f"{graph.name}_relu"))
    hidden = project(graph, layer.dwconv, hidden, f"{graph.name}_dwconv")
    hidden = Value(graph.builder.gelu(x=hidden.var, mode="EXACT", name=f"{graph.name}_gelu"))
    return project(graph, layer.fc2, hidden, graph.name, graph.exponent)


def _spatial_reduction(graph: Graph, layer: layers.SpatialReduction, x: Value) -> Value:
    name = graph.name
    if not layer.pool_size:
        return graph.layer_norm(project(graph, layer.reduction, x, f"{name}_reduction"), layer.norm, name)
    if not isinstance(layer.pool, keras.layers.AveragePooling2D):
        raise ValueError(f"{layer.path} pools a map that its grid of {layer.pool_size} does not divide: choose a size.")
    pooled = _pooled(graph, x, layer.pool.pool_size, layer.pool.strides, f"{name}_pool")
    normed = graph.layer_norm(project(graph, layer.reduction, pooled, f"{name}_reduction"), layer.norm, f"{name}_norm")
    return Value(graph.builder.gelu(x=normed.var, mode="EXACT", name=name))


RULES: dict[type, Callable[..., Value]] = {
    keras.layers.Activation: _activation,
    keras.layers.Add: _add,
    keras.layers.AveragePooling2D: _average_pool,
    keras.layers.BatchNormalization: _batch_norm,
    keras.layers.Concatenate: maps.concatenate,
    keras.layers.Conv2D: _projection,
    keras.layers.Dense: _projection,
    keras.layers.DepthwiseConv2D: _projection,
    keras.layers.Dropout: _identity,
    keras.layers.GlobalAveragePooling1D: _global_average,
    keras.layers.GlobalAveragePooling2D: _global_average,
    keras.layers.Identity: _identity,
    keras.layers.LayerNormalization: _layer_norm,
    keras.layers.MaxPooling2D: maps.max_pool,
    keras.layers.ReLU: _relu,
    keras.layers.Reshape: maps.reshape,
    keras.layers.SpatialDropout2D: _identity,
    keras.layers.UpSampling2D: maps.upsample,
    keras.layers.ZeroPadding2D: maps.zero_padding,
    layers.BatchNorm: _batch_norm,
    layers.BiasedConvAttention: attention.lower_conv_attention,
    layers.ClassToken: _class_token,
    layers.ConvBN: _projection,
    layers.DepthwiseMLP: _depthwise_mlp,
    layers.DownsamplingConvAttention: attention.lower_downsampling_attention,
    layers.DropPath: _identity,
    layers.LayerScale: _layer_scale,
    layers.LinearAttention: attention.lower_attention,
    layers.MLP: _mlp,
    layers.MobileAttention: attention.lower_attention,
    layers.MobileConvAttention: attention.lower_conv_attention,
    layers.OverlapPatchEmbedding: _overlap_patch_embedding,
    layers.PatchEmbedding: _patch_embedding,
    layers.PositionEmbedding: _position_embedding,
    layers.RootMeanSquareNorm: _root_mean_square,
    layers.SelectToken: _select_token,
    layers.SoftmaxAttention: attention.lower_attention,
    layers.SpatialReduction: _spatial_reduction,
    layers.StridedDepthwiseResidual: _projection,
    layers.TokensToMap: maps.tokens_to_map,
}
# A quantized layer is lowered as the layer that it quantizes: the projections inside know their ranges.
RULES.update({quantized: RULES[plain] for plain, quantized in QUANTIZED_CLASSES.items()})
# Rules that keep the `places` of their input.
_PLACES_KEPT = (_activation, _identity, maps.concatenate)


def _rule(operation: Any) -> Callable[..., Value]:
    if type(operation) not in RULES:
        known = ", ".join(sorted(layer.__name__ for layer in RULES if not layer.__name__.startswith("Quantized")))
        raise ValueError(
            f"The layer {operation.name!r} of type {type(operation).__name__} cannot be exported to Core ML. Known "
            f"are: {known}. For a layer of your own add a function to coreml.lowering.RULES."
        )
    return RULES[type(operation)]

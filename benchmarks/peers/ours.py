"""This project's side: the networks with their weights, their files, and the graph of their matrix products alone."""

import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

import keras_models
from mobiatt_tf import quantization
from mobiatt_tf.lean import lean
from tflite import convert


def build(family: str, variant: str, image_size: int, head_dim: int | None) -> keras.Model:
    """The Mobile-Attention model with heads of `head_dim` channels, or the softmax host (None), with seeded weights.

    The initial biases, position biases and layer scales are 0, 1 or 1e-5, which would hide a mistake in them: all
    vectors get positive noise.
    """
    keras.utils.set_random_seed(0)
    options: dict[str, Any] = {"attention": "softmax"} if head_dim is None else {"head_dim": head_dim}
    model = keras_models.FAMILIES[family].build(variant, image_size=image_size, **options)
    generator = np.random.default_rng(0)
    for weight in model.weights:
        if len(weight.shape) == 1 or "bias" in weight.path.rpartition("/")[2]:
            weight.assign(weight + 0.1 * np.abs(generator.normal(size=weight.shape)).astype("float32"))
    return model


def tflite_file(model: keras.Model, format: str, images: np.ndarray) -> bytes:
    """As `tflite.convert` writes it for x86; "int8" is calibrated on `images` float32 [N, height, width, 3]."""
    if format in quantization.POLICIES and format not in convert.FORMATS:
        model = quantization.quantize_aware(lean(model), format)
        quantization.calibrate(model, [images])
    return convert.convert(model, format, convert.formulation_for(format, "x86"))


def onnx_file(model: keras.Model) -> bytes:
    """The model as `mobiatt_tf.interop.onnx` writes it, at batch size 1."""
    from mobiatt_tf.interop import onnx

    return bytes(onnx.convert(model, batch_size=1).SerializeToString())


def products(model: keras.Model) -> keras.Model:
    """A graph of the dense layers and convolutions of a model alone, each of the same size, without biases.

    No implementation of the model does without them, so their latency is its floor. Each takes the last result of its
    input's shape: in a transformer they make a chain. An input shape that nothing has produced is cut from the images.
    A convolution of patches that do not overlap is a dense layer. The products of attention itself, of activations with
    each other, are left out.

    Args:
        model: as for `mobiatt_tf.complexity.count_macs`.

    Returns:
        A model of the same input; its output [1, 1] is a sum of one number of every result that no other layer takes.
    """
    (height, width, channels) = model.inputs[0].shape[1:]
    images = keras.Input((height, width, channels), batch_size=1)
    pixels = ops.reshape(images, (1, height * width * channels))
    latest: dict[tuple[int, int], Any] = {(height * width, channels): images}  # positions, channels -> result
    unused: dict[int, Any] = {}

    def taken(positions: int, depth: int) -> Any:
        if (positions, depth) not in latest:
            repeated = ops.concatenate([pixels] * math.ceil(positions * depth / pixels.shape[1]), axis=1)
            latest[positions, depth] = ops.reshape(repeated[:, : positions * depth], (1, positions, depth))
        unused.pop(id(latest[positions, depth]), None)
        return latest[positions, depth]

    def give(result: Any) -> None:
        latest[math.prod(result.shape[1:-1]), result.shape[-1]] = unused[id(result)] = result

    for layer in _in_order(model):
        if not isinstance(layer, keras.layers.Dense | keras.layers.Conv2D | keras.layers.DepthwiseConv2D):
            continue
        shape = layer.get_build_config()["input_shape"]
        positions, depth = math.prod(shape[1:-1]), shape[-1]
        if isinstance(layer, keras.layers.Dense):
            give(_dense(taken(positions, depth), layer.units))
            continue
        depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
        area = math.prod(layer.kernel_size)
        if not depthwise and layer.kernel_size == layer.strides and area > 1:
            give(_dense(taken(positions // area, depth * area), layer.filters))
            continue
        convolution = keras.layers.DepthwiseConv2D if depthwise else keras.layers.Conv2D
        sizes = {} if depthwise else {"filters": layer.filters, "groups": layer.groups}
        arguments = {"strides": layer.strides, "padding": layer.padding, "use_bias": False}
        x = ops.reshape(taken(positions, depth), (1, *shape[1:]))
        give(convolution(kernel_size=layer.kernel_size, **sizes, **arguments)(x))
    ends = [ops.reshape(result, (1, -1))[:, :1] for result in unused.values()]
    return keras.Model(images, sum(ends[1:], ends[0]), name=f"{model.name}_products")


def _in_order(layer: Any) -> Iterator[Any]:
    """The innermost layers, in the order in which they were given to the layers that hold them."""
    for child in layer._layers:
        yield from _in_order(child) if child._layers else (child,)


def _dense(x: Any, units: int) -> Any:
    if len(x.shape) == 4:
        x = ops.reshape(x, (1, -1, x.shape[-1]))
    return keras.layers.Dense(units, use_bias=False)(x)

"""Dense layers and convolutions as convolutions of Core ML: batch norm folded, int8 kernels and ranges carried over."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from coreml.graph import Graph, Value, numpy
from mobiatt_tf import layers, ops
from mobiatt_tf.quantization.aware import folded
from mobiatt_tf.quantization.composites import QuantizedConvBN
from mobiatt_tf.quantization.fake_quant import round_kernel
from mobiatt_tf.quantization.projections import QuantizedProjection, is_fused


def project(graph: Graph, layer: Any, x: Value, name: str, exponent: int = 0, padding: int | None = None) -> Value:
    """A dense layer, a convolution or a `ConvBN`, quantized or not, on [1, C, H, W].

    Args:
        layer: `keras.layers.Dense`, `Conv2D`, `DepthwiseConv2D`, `ConvBN`, `StridedDepthwiseResidual`, or the
            quantized form of one.
        x: the input.
        name: of the result.
        exponent: of the result.
        padding: width of the zeros on all four sides; None takes the layer's own padding.

    Raises:
        ValueError: groups, dilation, a depth multiplier, or an activation that is not known.
    """
    if isinstance(layer, layers.ConvBN):
        padding = layer.kernel_size // 2  # PyTorch's, which is "same" at stride 1
        if isinstance(layer, QuantizedConvBN):
            return _convolve(graph, layer.conv, x, name, exponent, padding)
        kernel, bias = folded(layer)
        depthwise = layer.filters is None
        options = {"strides": layer.strides, "padding": padding, "groups": x.shape[1] if depthwise else 1}
        inner = f"{name}_conv" if layer.activation else name
        result = graph.conv(x, _channels_first(kernel, depthwise), bias, inner, exponent, **options)
        return activate(graph, result, keras.activations.get(layer.activation), name)
    if isinstance(layer, layers.StridedDepthwiseResidual):
        return _convolve(graph, layer, x, name, exponent, 1)
    return _convolve(
        graph, layer, x, name, exponent, getattr(layer, "padding", "valid") if padding is None else padding
    )


def _convolve(graph: Graph, layer: Any, x: Value, name: str, exponent: int, padding: Any) -> Value:
    _check(layer)
    quantized = isinstance(layer, QuantizedProjection)
    depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
    kernel = numpy(layer.effective_kernel() if hasattr(layer, "effective_kernel") else layer.kernel)
    if quantized:  # rounded by the same function as in training: a weight between two steps must not fall elsewhere
        kernel = numpy(round_kernel(layer.effective_kernel(), layer.channel_axis, layer.policy.weights))
    if kernel.ndim == 2:
        kernel = kernel[None, None]  # [1, 1, in, out]
    strides = getattr(layer, "strides", (1, 1))[0]
    if padding == "same" and strides != 1:
        padding = same_widths(x.shape[2:], kernel.shape[:2], (strides, strides))
    options = {
        "strides": strides,
        "padding": padding,
        "groups": x.shape[1] if depthwise else 1,
        "int8": quantized and layer.policy.weights == "int8",
    }
    if quantized:
        x = graph.quantized(x, layer.input_quantizer, f"{name}_input")
    output_quantizer = layer.output_quantizer if quantized else None
    inner = f"{name}_conv" if output_quantizer is not None or not is_linear(layer.activation) else name
    bias = None if layer.bias is None else numpy(layer.bias)
    result = graph.conv(x, _channels_first(kernel, depthwise), bias, inner, exponent, **options)
    if output_quantizer is None:
        return activate(graph, result, layer.activation, name)
    if is_fused(layer.activation):
        result = activate(graph, result, layer.activation, f"{name}_activation")
        return graph.quantized(result, output_quantizer, name)
    rounded = graph.quantized(result, output_quantizer, f"{name}_rounded")
    return activate(graph, rounded, layer.activation, name)


def _channels_first(kernel: np.ndarray, depthwise: bool) -> np.ndarray:
    """[height, width, in, out] to [out, in, height, width], a depthwise [..., C, 1] to [C, 1, height, width]."""
    return kernel.transpose((2, 3, 0, 1) if depthwise else (3, 2, 0, 1))


def same_widths(sides: Sequence[int], kernel: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """TensorFlow's padding "same" in numbers: above, below, left and right; the odd one is below or at right.

    Source: tensorflow/core/framework/kernel_shape_util.cc, GetWindowedOutputSizeVerbose.
    """
    widths: list[int] = []
    for side, extent, stride in zip(sides, kernel, strides, strict=True):
        total = max((-(-side // stride) - 1) * stride + extent - side, 0)
        widths += [total // 2, total - total // 2]
    return tuple(widths)


def _check(layer: Any) -> None:
    supported = {"data_format": "channels_last", "dilation_rate": (1, 1), "groups": 1, "depth_multiplier": 1}
    for setting, value in supported.items():
        if getattr(layer, setting, value) != value:
            raise ValueError(f"{layer.path} has {setting}={getattr(layer, setting)}; only {value} can be exported.")
    strides = getattr(layer, "strides", (1, 1))
    if strides[0] != strides[1]:
        raise ValueError(f"{layer.path} has strides {strides}; only equal ones can be exported.")


def is_linear(activation: Any) -> bool:
    """Whether an activation does nothing."""
    return activation is None or activation is keras.activations.linear


def activate(graph: Graph, x: Value, activation: Any, name: str) -> Value:
    """Applies an activation function of Keras, or `mobiatt_tf.ops.gelu`.

    Raises:
        ValueError: one that is not known, or that cannot be applied to a scaled stream.
    """
    if is_linear(activation):
        return x
    builder, dtype = graph.builder, graph.dtype
    known = {
        ops.gelu: lambda: builder.gelu(x=x.var, mode="EXACT", name=name),
        keras.activations.relu: lambda: builder.relu(x=x.var, name=name),
        keras.activations.relu6: lambda: builder.clip(x=x.var, alpha=dtype(0), beta=dtype(6), name=name),
        keras.activations.sigmoid: lambda: builder.sigmoid(x=x.var, name=name),
        keras.activations.silu: lambda: builder.silu(x=x.var, name=name),
        keras.activations.tanh: lambda: builder.tanh(x=x.var, name=name),
    }
    if activation not in known or x.exponent:
        label = getattr(activation, "__name__", activation)
        raise ValueError(f"The activation {label} cannot be exported to Core ML (at {name}).")
    return Value(known[activation]())

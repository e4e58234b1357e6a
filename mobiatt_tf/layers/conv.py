"""Convolutions as PyTorch pads them, with the batch norm behind them."""

from typing import Any

import keras

from mobiatt_tf.layers.dense import copy_of
from mobiatt_tf.ops import Tensor

# PyTorch's defaults, which every published host keeps; Keras counts the momentum the other way round (torch: 0.1).
BATCH_NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.9


def same_padding(strides: int) -> str:
    """Keras' padding of a convolution that sees `pad_as_torch` of its input."""
    return "same" if strides == 1 else "valid"


def pad_as_torch(x: Tensor, kernel_size: int, strides: int) -> Tensor:
    """Zeros of width kernel_size // 2 on all four sides of [B, H, W, C], where "same" padding would differ.

    At stride 2 TensorFlow's "same" pads an even side at its end only, PyTorch's `padding=k // 2` on both, so the
    windows lie one pixel apart. At stride 1 both pad alike.
    """
    if strides == 1:
        return x
    width = kernel_size // 2
    return keras.ops.pad(x, ((0, 0), (width, width), (width, width), (0, 0)))  # [B, H + 2 w, W + 2 w, C]


def padded_shape(shape: Any, kernel_size: int, strides: int) -> tuple[Any, Any, Any, Any]:
    """The shape of `pad_as_torch(x)` for x of `shape` [B, H, W, C]."""
    margin = 0 if strides == 1 else 2 * (kernel_size // 2)
    height, width = (None if side is None else side + margin for side in shape[1:3])
    return shape[0], height, width, shape[3]


def strided_shape(shape: Any, strides: int) -> tuple[Any, Any, Any]:
    """(batch, height, width) of [B, H, W, C] after a convolution with odd kernel, stride and PyTorch's padding."""
    batch, *sides = shape[:3]
    height, width = (None if side is None else -(-side // strides) for side in sides)
    return batch, height, width


def pytorch_initializer(fan_in: int) -> keras.initializers.Initializer:
    """PyTorch's default for convolutions: uniform within 1 / sqrt(fan_in) (Conv2d.reset_parameters)."""
    limit = fan_in**-0.5
    return keras.initializers.RandomUniform(-limit, limit)


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class BatchNorm(keras.layers.BatchNormalization):
    """Keras' batch norm with PyTorch's epsilon and momentum, synchronized only where that exists.

    Keras refuses `synchronized` on other backends than TensorFlow, and with it every model that was trained so.

    Args:
        synchronized: batch statistics over all devices of a strategy; has no effect on other backends.
    """

    def __init__(
        self,
        epsilon: float = BATCH_NORM_EPSILON,
        momentum: float = BATCH_NORM_MOMENTUM,
        synchronized: bool = False,
        **kwargs: Any,
    ) -> None:
        possible = synchronized and keras.backend.backend() == "tensorflow"
        super().__init__(epsilon=epsilon, momentum=momentum, synchronized=possible, **kwargs)


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class ConvBN(keras.layers.Layer):
    """Convolution with bias, batch norm, and perhaps a ReLU: [B, H, W, C] to [B, ceil(H / s), ceil(W / s), filters].

    Children `conv` and `bn`. Padding is PyTorch's, see `pad_as_torch`.

    Args:
        filters: output channels; None makes it depthwise, with the channels of the input.
        kernel_size: odd side of the kernel.
        strides: step of the window.
        kernel_initializer: of the kernel; None takes PyTorch's default, see `pytorch_initializer`.
        synchronized: batch statistics over all devices of a strategy (TensorFlow only).
        frozen_norm: the batch norm keeps its statistics, scale and offset in training too, as torchvision's
            FrozenBatchNorm2d; a setting of the layer, so that it survives saving.
        activation: None or "relu", behind the batch norm. With the norm folded, a file has one operator for all three.

    Raises:
        ValueError: an even kernel, whose padding PyTorch and this layer would not share, or another activation.
    """

    def __init__(
        self,
        filters: int | None,
        kernel_size: int = 1,
        strides: int = 1,
        kernel_initializer: Any = None,
        synchronized: bool = False,
        frozen_norm: bool = False,
        activation: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, but kernel_size={kernel_size} was given.")
        if activation not in (None, "relu"):
            raise ValueError(f"activation must be None or 'relu', but activation={activation!r} was given.")
        self.filters = filters
        self.kernel_size = kernel_size
        self.strides = strides
        self.kernel_initializer = None if kernel_initializer is None else keras.initializers.get(kernel_initializer)
        self.synchronized = synchronized
        self.frozen_norm = frozen_norm
        self.activation = activation

    def build(self, input_shape: Any) -> None:
        arguments: dict[str, Any] = {
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": same_padding(self.strides),
            "name": "conv",
            "dtype": self.dtype_policy,
        }
        fan_in = self.kernel_size**2 * (input_shape[-1] if self.filters else 1)
        initializer = copy_of(self.kernel_initializer) or pytorch_initializer(fan_in)
        if self.filters is None:
            self.conv = keras.layers.DepthwiseConv2D(depthwise_initializer=initializer, **arguments)
        else:
            self.conv = keras.layers.Conv2D(self.filters, kernel_initializer=initializer, **arguments)
        self.conv.build(padded_shape(input_shape, self.kernel_size, self.strides))
        self.bn = BatchNorm(
            synchronized=self.synchronized, trainable=not self.frozen_norm, name="bn", dtype=self.dtype_policy
        )
        self.bn.build(self.compute_output_shape(input_shape))

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        x = self.conv(pad_as_torch(inputs, self.kernel_size, self.strides))  # [B, ceil(H / s), ceil(W / s), filters]
        x = self.bn(x, training=training)
        return keras.ops.relu(x) if self.activation else x

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (*strided_shape(input_shape, self.strides), self.filters or input_shape[-1])

    def get_config(self) -> dict[str, Any]:
        initializer = self.kernel_initializer
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "kernel_initializer": None if initializer is None else keras.initializers.serialize(initializer),
            "synchronized": self.synchronized,
            "frozen_norm": self.frozen_norm,
            "activation": self.activation,
        }


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class StridedDepthwiseResidual(keras.layers.DepthwiseConv2D):
    """Every second pixel plus a depthwise 3 x 3 convolution around it: [B, H, W, C] to [B, ceil(H/2), ceil(W/2), C].

    With bias and PyTorch's padding. The pixel itself is the centre of its window, so adding it is adding 1 to the
    centre of the kernel: `x[:, ::2, ::2]` would be a STRIDED_SLICE, which XNNPACK leaves outside its partition (seen
    with ai-edge-litert 2.3).
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"kernel_size": 3, "strides": 2, "depthwise_initializer": pytorch_initializer(9), **kwargs})

    def effective_kernel(self) -> Tensor:
        """The kernel with the pixel itself in it, [3, 3, C, 1]."""
        centre = keras.ops.pad(keras.ops.ones((1, 1, 1, 1), self.kernel.dtype), ((1, 1), (1, 1), (0, 0), (0, 0)))
        return self.kernel + centre

    def call(self, inputs: Tensor) -> Tensor:
        kernel = keras.ops.cast(self.effective_kernel(), inputs.dtype)
        x = keras.ops.depthwise_conv(pad_as_torch(inputs, 3, 2), kernel, strides=2, data_format="channels_last")
        return x + keras.ops.cast(self.bias, x.dtype)  # [B, ceil(H/2), ceil(W/2), C]

"""Dense layers and convolutions with fake-quantized input, kernel and output."""

from typing import Any

import keras

from mobiatt_tf.layers import StridedDepthwiseResidual
from mobiatt_tf.layers.conv import pad_as_torch
from mobiatt_tf.ops import Tensor
from mobiatt_tf.quantization.fake_quant import FakeQuantize, round_kernel
from mobiatt_tf.quantization.policies import Policy, get_policy

# TFLite fuses these into an int8 operator; the others follow it in float.
_FUSED_ACTIVATIONS = ("linear", "relu", "relu6")


def is_fused(activation: Any) -> bool:
    """Whether an activation is part of the int8 operator in front of it; None is."""
    return activation is None or keras.activations.serialize(activation) in _FUSED_ACTIVATIONS


class QuantizedProjection(keras.layers.Layer):
    """What the classes below share; stands before the Keras layer in their bases.

    Args:
        policy: see `Policy`.
        rounds_input: False where the input is the rounded output of another projection.
        follows: whether the ranges of activations follow the batches while training, see `FakeQuantize`.
    """

    channel_axis = -1  # of the kernel's output channels

    def __init__(
        self,
        *args: Any,
        policy: str | Policy = "int8",
        rounds_input: bool = True,
        follows: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.policy = get_policy(policy)
        self.rounds_input = rounds_input
        self.follows = follows
        quantizes = self.policy.activations
        self.input_quantizer = (
            FakeQuantize(name="input_quantizer", follows=follows) if quantizes and rounds_input else None
        )
        self.output_quantizer = FakeQuantize(name="output_quantizer", follows=follows) if quantizes else None
        self.baked = False

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        for quantizer in (self.input_quantizer, self.output_quantizer):
            if quantizer is not None:
                quantizer.build(input_shape)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        x = inputs
        if self.input_quantizer is not None:
            x = keras.ops.cast(self.input_quantizer(x, training=training), inputs.dtype)
        kernel = self.effective_kernel()
        if not self.baked:
            kernel = keras.ops.cast(round_kernel(kernel, self.channel_axis, self.policy.weights), inputs.dtype)
        x = self.project(x, kernel)
        if self.bias is not None:
            x = x + keras.ops.cast(self.bias, x.dtype)
        fused = is_fused(self.activation)
        if self.output_quantizer is not None:
            x = self.activation(x) if fused else x
            x = keras.ops.cast(self.output_quantizer(x, training=training), inputs.dtype)
            return x if fused else self.activation(x)
        return self.activation(x)

    def project(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        """The linear map without its bias."""
        raise NotImplementedError

    def effective_kernel(self) -> Tensor:
        """The kernel that is multiplied with, before it is rounded."""
        return self.kernel

    def bake(self) -> None:
        """Writes the rounded kernel into the weights and stops rounding it: the form in which it is exported.

        TFLite's converter refuses the fake-quantized kernel of a dense layer with one range for each channel
        ("mismatched quantized axes"); from the rounded one it derives the same steps.
        """
        rounded = round_kernel(self.effective_kernel(), self.channel_axis, self.policy.weights)
        self.kernel.assign(rounded - (self.effective_kernel() - self.kernel))
        self.baked = True

    def get_config(self) -> dict[str, Any]:
        own = {"policy": self.policy.name, "rounds_input": self.rounds_input, "follows": self.follows}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class QuantizedDense(QuantizedProjection, keras.layers.Dense):
    """`keras.layers.Dense`; see `QuantizedProjection`."""

    def project(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        return keras.ops.matmul(inputs, kernel)  # [..., units]


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class QuantizedConv2D(QuantizedProjection, keras.layers.Conv2D):
    """`keras.layers.Conv2D`; see `QuantizedProjection`."""

    def project(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        return self.convolution_op(inputs, kernel)  # [B, H', W', filters]


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class QuantizedDepthwiseConv2D(QuantizedProjection, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` with one filter for each channel; see `QuantizedProjection`."""

    channel_axis = -2

    def project(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        return keras.ops.depthwise_conv(
            inputs, kernel, strides=self.strides, padding=self.padding, data_format=self.data_format
        )  # [B, H', W', C]


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class QuantizedStridedDepthwiseResidual(QuantizedProjection, StridedDepthwiseResidual):
    """`StridedDepthwiseResidual`; the pixel's own 1 is part of the kernel that is rounded."""

    channel_axis = -2

    def effective_kernel(self) -> Tensor:
        return StridedDepthwiseResidual.effective_kernel(self)

    def project(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        padded = pad_as_torch(inputs, 3, 2)
        return keras.ops.depthwise_conv(padded, kernel, strides=2, data_format="channels_last")  # [B, H', W', C]

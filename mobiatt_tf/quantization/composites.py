"""Layers with children, and what quantizing them means: every projection inside is replaced by a quantized one."""

from typing import Any

import keras

from mobiatt_tf import layers
from mobiatt_tf.formulation import Formulation
from mobiatt_tf.layers.conv import pad_as_torch
from mobiatt_tf.ops import Tensor
from mobiatt_tf.quantization.attention import Int8Mixing
from mobiatt_tf.quantization.policies import Policy, get_policy
from mobiatt_tf.quantization.projections import (
    QuantizedConv2D,
    QuantizedDense,
    QuantizedDepthwiseConv2D,
    QuantizedStridedDepthwiseResidual,
    is_fused,
)


class QuantizedChildren(keras.layers.Layer):
    """Makes the quantized form of a layer that has dense layers or convolutions as children.

    It stands before that layer in the bases of a new class. The layer declares what its projections read:

        class Gate(keras.layers.Layer):
            def quantized_children(self) -> dict[str, str | None]:
                return {"gate": None, "value": None, "out": None}

        @keras.saving.register_keras_serializable(package="mine")
        class QuantizedGate(QuantizedChildren, Gate): ...

        quantize_aware(model, "int8", own_layers={Gate: QuantizedGate})

    Each key is a child, which must have a name of its own. Its value is None, or the name of the child whose output it
    reads unchanged: that is rounded already. Everything else in `call` stays in float.

    Args:
        policy: see `Policy`.
    """

    def __init__(self, *args: Any, policy: str | Policy = "int8", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.policy = get_policy(policy)

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.quantize_children()

    def quantize_children(self) -> None:
        """Replaces the children that `quantized_children()` names by quantized ones; `build` calls it.

        Children that read the same tensor have a range each. The ranges see the same values and stay equal, and the
        converter merges them; it leaves the projections in float where one fake quantization feeds three.

        Raises:
            ValueError: a child that cannot be quantized.
        """
        for name, read in self.quantized_children().items():
            child = getattr(self, name)
            # An activation that TFLite does not fuse follows the rounding: what it gives is float again.
            in_int8 = read is not None and is_fused(getattr(getattr(self, read), "activation", None))
            config = {**child.get_config(), "policy": self.policy.name, "rounds_input": not in_int8}
            replacement = quantized_class(child).from_config(config)
            forget_child(self, name)
            setattr(self, name, replacement)
            replacement.build_from_config(child.get_build_config())

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "policy": self.policy.name}


def forget_child(layer: keras.layers.Layer, name: str) -> None:
    """Removes a child: Keras 3.15 goes on tracking, counting and saving the weights of one that is only overwritten."""
    child = getattr(layer, name)
    delattr(layer, name)
    layer._tracker.untrack(child)


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class QuantizedConvBN(layers.ConvBN):
    """`ConvBN` with batch norm and ReLU folded into the convolution, as the exported graph has it; then quantized.

    Args:
        policy, rounds_input: see `QuantizedProjection`.
    """

    def __init__(self, *args: Any, policy: str | Policy = "int8", rounds_input: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.policy = get_policy(policy)
        self.rounds_input = rounds_input

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        plain = self.conv
        conv = quantized_class(plain).from_config(
            {
                **plain.get_config(),
                "activation": self.activation or "linear",
                "policy": self.policy.name,
                "rounds_input": self.rounds_input,
            }
        )
        forget_child(self, "bn")
        forget_child(self, "conv")
        self.conv = conv
        conv.build_from_config(plain.get_build_config())

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        return self.conv(pad_as_torch(inputs, self.kernel_size, self.strides), training=training)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "policy": self.policy.name, "rounds_input": self.rounds_input}


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class QuantizedClassToken(layers.ClassToken):
    """`ClassToken` as a sum of two padded tensors, the same numbers.

    TFLite's converter makes a concatenation with an int8 tensor int8 as a whole, in the range of that tensor: behind
    the patch embedding the learned token would be rounded in steps that are not its own.

    Args:
        policy: see `Policy`.
    """

    def __init__(self, *args: Any, policy: str | Policy = "int8", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.policy = get_policy(policy)
        self.folded = False  # into the position embedding behind it, see `bake`

    def call(self, inputs: Tensor) -> Tensor:
        if self.folded:
            return keras.ops.pad(inputs, ((0, 0), (self.count, 0), (0, 0)))  # [B, count + N, D]
        tokens = keras.ops.pad(keras.ops.cast(self.tokens, inputs.dtype), ((0, 0), (0, inputs.shape[1]), (0, 0)))
        return keras.ops.pad(inputs, ((0, 0), (self.count, 0), (0, 0))) + tokens  # [B, count + N, D]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "policy": self.policy.name}


class _QuantizedAttention(QuantizedChildren):
    """Attention layers are built for up to three inputs."""

    def build(self, query_shape: Any, key_shape: Any = None, value_shape: Any = None) -> None:
        super(QuantizedChildren, self).build(query_shape, key_shape, value_shape)
        self.quantize_children()


class _QuantizedMixing(keras.layers.Layer):
    """Mobile-Attention, whose core is quantized too if the policy says so; stands before `QuantizedChildren`."""

    def quantize_children(self) -> None:
        super().quantize_children()
        self.core = None
        if self.policy.attention:
            self.core = Int8Mixing(self.epsilon, self.reference_tokens, name="core")
            self.core.build(None)

    def use_formulation(self, chosen: Formulation) -> None:
        if self.core is None:  # an int8 core has a form of its own
            super().use_formulation(chosen)

    def mix_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.core is None:
            return super().mix_tokens(query, key, value)
        return keras.ops.cast(self.core(query, key, value), value.dtype)


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class QuantizedPatchEmbedding(QuantizedChildren, layers.PatchEmbedding):
    """See `QuantizedChildren`."""


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class QuantizedOverlapPatchEmbedding(QuantizedChildren, layers.OverlapPatchEmbedding):
    """See `QuantizedChildren`."""


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class QuantizedSpatialReduction(QuantizedChildren, layers.SpatialReduction):
    """See `QuantizedChildren`."""


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class QuantizedMLP(QuantizedChildren, layers.MLP):
    """See `QuantizedChildren`."""


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class QuantizedDepthwiseMLP(QuantizedChildren, layers.DepthwiseMLP):
    """See `QuantizedChildren`."""


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class QuantizedMobileAttention(_QuantizedMixing, _QuantizedAttention, layers.MobileAttention):
    """See `QuantizedChildren`."""


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class QuantizedSoftmaxAttention(_QuantizedAttention, layers.SoftmaxAttention):
    """See `QuantizedChildren`. Its core stays in float: int8 SOFTMAX has steps of 1/256, too wide for many tokens."""


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class QuantizedLinearAttention(_QuantizedAttention, layers.LinearAttention):
    """See `QuantizedChildren`. Its core stays in float."""


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class QuantizedMobileConvAttention(_QuantizedMixing, QuantizedChildren, layers.MobileConvAttention):
    """See `QuantizedChildren`."""


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class QuantizedBiasedConvAttention(QuantizedChildren, layers.BiasedConvAttention):
    """See `QuantizedChildren`. Its core stays in float."""


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class QuantizedDownsamplingConvAttention(QuantizedChildren, layers.DownsamplingConvAttention):
    """See `QuantizedChildren`. Its core stays in float."""


QUANTIZED_CLASSES: dict[type, Any] = {
    keras.layers.Dense: QuantizedDense,
    keras.layers.Conv2D: QuantizedConv2D,
    keras.layers.DepthwiseConv2D: QuantizedDepthwiseConv2D,
    layers.StridedDepthwiseResidual: QuantizedStridedDepthwiseResidual,
    layers.ConvBN: QuantizedConvBN,
    layers.ClassToken: QuantizedClassToken,
    layers.PatchEmbedding: QuantizedPatchEmbedding,
    layers.OverlapPatchEmbedding: QuantizedOverlapPatchEmbedding,
    layers.SpatialReduction: QuantizedSpatialReduction,
    layers.MLP: QuantizedMLP,
    layers.DepthwiseMLP: QuantizedDepthwiseMLP,
    layers.MobileAttention: QuantizedMobileAttention,
    layers.SoftmaxAttention: QuantizedSoftmaxAttention,
    layers.LinearAttention: QuantizedLinearAttention,
    layers.MobileConvAttention: QuantizedMobileConvAttention,
    layers.BiasedConvAttention: QuantizedBiasedConvAttention,
    layers.DownsamplingConvAttention: QuantizedDownsamplingConvAttention,
}


def quantized_class(layer: Any) -> Any:
    """The class that takes the place of a layer's.

    Raises:
        ValueError: there is none, or it does not cover how the layer is configured.
    """
    if type(layer) not in QUANTIZED_CLASSES:
        raise ValueError(
            f"The layer {layer.path!r} of type {type(layer).__name__} cannot be quantized. Quantizable are "
            f"{', '.join(known.__name__ for known in QUANTIZED_CLASSES)}; for layers of your own see "
            "mobiatt_tf.quantization.QuantizedChildren."
        )
    unsupported = {
        "data_format": "channels_last",
        "dilation_rate": (1, 1),
        "groups": 1,
        "depth_multiplier": 1,
    }
    for name, supported in unsupported.items():
        found = getattr(layer, name, supported)
        if found != supported:
            raise ValueError(f"The layer {layer.path!r} has {name}={found}; only {supported} can be quantized.")
    return QUANTIZED_CLASSES[type(layer)]

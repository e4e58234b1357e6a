"""Mobile-Attention with its products and sums in int8: the same function in a form that integers bear."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from mobiatt_tf.ops import MEAN_SCALE, Tensor, token_count
from mobiatt_tf.quantization.fake_quant import FakeQuantize

# TFLite's int8 LOGISTIC has the output scale 1/256 and no other.
_SIGMOID_RANGE = (0.0, 255.0 / 256.0)

# The tensors that are rounded to int8. XNNPACK multiplies matrices in int8 only if the zero point of the right operand
# is 0: those are symmetric.
_SYMMETRIC = ("weighted_value", "context")
_TENSORS = (
    "key_total",
    "query_total",
    "incoming_terms",
    "incoming_sums",
    "outgoing_terms",
    "outgoing_sums",
    "outgoing",
    "incoming",
    "offered",
    "offered_total",
    "asked",
    "asked_total",
    "conserved_incoming_terms",
    "conserved_incoming_sums",
    "conserved_outgoing_terms",
    "conserved_outgoing_sums",
    "source_weights",
    "sink_weights",
    "weighted_query",
    "mixed",
    *_SYMMETRIC,
)


def mobile_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    quantize: Callable[[str, Tensor], Tensor],
    epsilon: float = 1e-6,
    reference_tokens: int | None = None,
) -> Tensor:
    """`mobiatt_tf.ops.mobile_attention` with `quantize(name, tensor)` around every large product and sum.

    Differences in form, none in function (to 1e-5 of the largest output, without quantization): exp(x) / mean(exp(x))
    for the softmax over tokens times N, because int8 SOFTMAX has the output scale 1/256 and is 0 everywhere from 784
    tokens on; rsqrt(x)^2 for 1 / x, because int8 DIV ends the interpreter where a divisor rounds to 0; the epsilons of
    the inner factors, far below a step, only in the sums that are divided by. The reciprocals and exponentials, one
    number for each head and token, stay in float: XNNPACK takes them only so.

    Args:
        query, key, value: projections before the sigmoid, [B, H, d, N] (value: [B, H, d_v, N]).
        quantize: rounds the tensor of that name; the names are those of `quantized_tensors`.
        epsilon, reference_tokens: see `mobiatt_tf.ops.mobile_attention`.

    Returns:
        [B, H, d_v, N].
    """
    query = quantize("query", ops.sigmoid(query))
    key = quantize("key", ops.sigmoid(key))

    def over_heads(name: str, x: Tensor) -> Tensor:
        return quantize(name, ops.sum(x, axis=1, keepdims=True))  # [B, 1, d, N]

    def over_channels(name: str, x: Tensor, y: Tensor) -> Tensor:
        return quantize(
            f"{name}_sums", ops.sum(quantize(f"{name}_terms", x * y), axis=2, keepdims=True)
        )  # [B, H, 1, N]

    incoming_sums = over_channels("incoming", query, over_heads("key_total", key))
    outgoing_sums = over_channels("outgoing", key, over_heads("query_total", query))
    incoming = ops.square(ops.rsqrt(incoming_sums + epsilon))
    outgoing = ops.square(ops.rsqrt(outgoing_sums + epsilon))
    offered = quantize("offered", key * quantize("outgoing", outgoing))
    asked = quantize("asked", query * quantize("incoming", incoming))
    conserved_incoming = over_channels("conserved_incoming", query, over_heads("offered_total", offered))
    conserved_outgoing = over_channels("conserved_outgoing", key, over_heads("asked_total", asked))

    tokens = token_count(value)
    total = tokens if reference_tokens is None else float(reference_tokens)
    strength = ops.exp(ops.clip(conserved_outgoing, -1.0, 1.0))
    competition = strength * ops.square(ops.rsqrt(ops.mean(strength, axis=-1, keepdims=True)))
    source_weights = quantize("source_weights", competition * (MEAN_SCALE / tokens))
    sink_weights = quantize("sink_weights", incoming * ops.sigmoid(conserved_incoming) * (total / MEAN_SCALE))

    weighted_value = quantize("weighted_value", value * source_weights)
    weighted_query = quantize("weighted_query", query * sink_weights)
    context = quantize("context", ops.matmul(key, ops.transpose(weighted_value, (0, 1, 3, 2))))  # [B, H, d, d_v]
    mixed = quantize("mixed", ops.matmul(ops.transpose(weighted_query, (0, 1, 3, 2)), context))  # [B, H, N, d_v]
    return ops.transpose(mixed, (0, 1, 3, 2))


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class Int8Mixing(keras.layers.Layer):
    """`mobile_attention` with a `FakeQuantize` for each tensor; computes in float32.

    Args:
        epsilon, reference_tokens: see `mobiatt_tf.ops.mobile_attention`.
    """

    def __init__(self, epsilon: float = 1e-6, reference_tokens: int | None = None, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.epsilon = epsilon
        self.reference_tokens = reference_tokens
        self.quantizers = {
            **{name: FakeQuantize(fixed_range=_SIGMOID_RANGE, name=name) for name in ("query", "key")},
            **{name: FakeQuantize(symmetric=name in _SYMMETRIC, name=name) for name in _TENSORS},
        }

    def build(self, query_shape: Any, key_shape: Any = None, value_shape: Any = None) -> None:
        for quantizer in self.quantizers.values():
            quantizer.build(query_shape)  # one range for the whole tensor, whatever its shape

    def call(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        def quantize(name: str, x: Tensor) -> Tensor:
            return self.quantizers[name](x)

        return mobile_attention(query, key, value, quantize, self.epsilon, self.reference_tokens)

    def compute_output_shape(self, query_shape: Any, key_shape: Any, value_shape: Any) -> Any:
        return value_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon, "reference_tokens": self.reference_tokens}

"""Mobile-Attention as pure functions on tensors, and the attentions it is compared with.

Source of every formula: Yao et al., "Mobile Attention: Mobile-Friendly Linear-Attention for Vision Transformers",
ICML 2024 (PMLR 235), in the form of the authors' module (github.com/thuml/MobileAttention). Only `keras.ops` is used,
so the functions run on every Keras backend.

Tokens come last: a tensor of H heads with d channels each over N tokens is [B, H, d, N]. Sums over heads and over
channels then run along outer axes and all elementwise work has the tokens contiguous, which made the exported block
about 1.3 times faster on x86 (XNNPACK, float32) than [B, H, N, d]; see docs/operator.md.
"""

import numbers
from typing import Any, NamedTuple

import keras
from keras import ops

Tensor = Any  # a backend tensor, a KerasTensor, or anything keras.ops converts

# k^T v sums N products. Its terms are weighted to a mean times this power of two, so that in float16 neither the terms
# (about v * 64 / N) vanish nor the sum (about 64 v) overflows, at any N. A power of two costs no precision.
MEAN_SCALE = 64.0

_OPEN_TOKENS = "Multiply-adds need a fixed number of tokens: build the model at a fixed image size."


class Flows(NamedTuple):
    """The four flows of the operator, each [B, H, 1, N] in float32.

    `incoming` and `outgoing` are reciprocals (I and O below): the paper divides by them, the module multiplies.
    """

    incoming: Tensor
    outgoing: Tensor
    conserved_incoming: Tensor
    conserved_outgoing: Tensor


def divides(parts: Any, width: int) -> bool:
    """Whether `parts` is a whole number of at least 1 that divides `width`."""
    return isinstance(parts, numbers.Integral) and int(parts) >= 1 and width % int(parts) == 0


def token_count(x: Tensor) -> Any:
    """N of [..., N]: a Python float where the shape is static, else a float32 scalar tensor."""
    tokens = x.shape[-1]
    return float(tokens) if tokens is not None else ops.cast(ops.shape(x)[-1], "float32")


def flatten_map(x: Tensor) -> Tensor:
    """A feature map [B, H, W, D] of known sides as tokens [B, H * W, D], row by row; tokens [B, N, D] stay."""
    return x if len(x.shape) == 3 else ops.reshape(x, (-1, x.shape[1] * x.shape[2], x.shape[3]))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, D] to heads with tokens last, [B, H, D / H, N]; channel c belongs to head c // (D / H)."""
    tokens, channels = x.shape[1], x.shape[2]
    x = ops.reshape(x, (-1, tokens if tokens is not None else ops.shape(x)[1], num_heads, channels // num_heads))
    return ops.transpose(x, (0, 2, 3, 1))  # [B, H, d, N]


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, d, N] back to [B, N, H * d]."""
    heads, channels, tokens = x.shape[1:]
    x = ops.transpose(x, (0, 3, 1, 2))  # [B, N, H, d]
    return ops.reshape(x, (-1, tokens if tokens is not None else ops.shape(x)[1], heads * channels))


def flows(query: Tensor, key: Tensor, epsilon: float = 1e-6) -> Flows:
    """The information flows between heads at each token.

        I[h,n]  = 1 / sum_d (q[h,n] + eps) (sum_h' k[h',n] + eps)
        O[h,n]  = 1 / sum_d (k[h,n] + eps) (sum_h' q[h',n] + eps)
        I~[h,n] = sum_d (q[h,n] + eps) (sum_h' k[h',n] O[h',n] + eps)
        O~[h,n] = clip(sum_d (k[h,n] + eps) (sum_h' q[h',n] I[h',n] + eps), -1, 1)

    Always computed in float32: next to a sigmoid of 0.5, an epsilon of 1e-6 is lost in 16 bits.

    Args:
        query: sigmoid of the query projection, [B, H, d, N], any float dtype.
        key: sigmoid of the key projection, [B, H, d, N]; token n of the key is paired with token n of the query.
        epsilon: the eps above.
    """
    query = ops.cast(query, "float32")
    key = ops.cast(key, "float32")
    shifted_query = query + epsilon
    shifted_key = key + epsilon

    def over_heads(x: Tensor) -> Tensor:
        return ops.sum(x, axis=1, keepdims=True) + epsilon  # [B, 1, d, N]

    def over_channels(x: Tensor) -> Tensor:
        return ops.sum(x, axis=2, keepdims=True)  # [B, H, 1, N]

    incoming = 1.0 / over_channels(shifted_query * over_heads(key))
    outgoing = 1.0 / over_channels(shifted_key * over_heads(query))
    conserved_incoming = over_channels(shifted_query * over_heads(key * outgoing))
    conserved_outgoing = over_channels(shifted_key * over_heads(query * incoming))
    return Flows(incoming, outgoing, conserved_incoming, ops.clip(conserved_outgoing, -1.0, 1.0))


def allocation(conserved_incoming: Tensor) -> Tensor:
    """A = sigmoid(I~): how much of the mixed values each head lets through at each token, [B, H, 1, N] in (0, 1)."""
    return ops.sigmoid(conserved_incoming)


def competition(conserved_outgoing: Tensor) -> Tensor:
    """C = N softmax(O~) over the TOKENS: how strongly each token offers its value, [B, H, 1, N], 1 on average."""
    return ops.softmax(conserved_outgoing, axis=-1) * token_count(conserved_outgoing)


def flows_by_name(query: Tensor, key: Tensor, epsilon: float = 1e-6) -> dict[str, Tensor]:
    """What the heads do at each token, for pictures and parity.

    Args:
        query, key: projections before the sigmoid, [B, H, d, N].
        epsilon: see `flows`.

    Returns:
        `incoming`, `outgoing`, `conserved_incoming`, `conserved_outgoing`, `allocation` and `competition` by name, each
        float32 [B, H, N].
    """
    flow = flows(ops.sigmoid(query), ops.sigmoid(key), epsilon)
    by_name = {
        **flow._asdict(),
        "allocation": allocation(flow.conserved_incoming),
        "competition": competition(flow.conserved_outgoing),
    }
    return {name: ops.squeeze(tensor, axis=2) for name, tensor in by_name.items()}  # [B, H, N]


def mix(query: Tensor, key: Tensor, value: Tensor, source_weights: Tensor, sink_weights: Tensor) -> Tensor:
    """Linear attention with per-token weights on both sides: sink * (query @ (key^T (value * source))).

    Args:
        query, key: [B, H, d, N].
        value: [B, H, d_v, N].
        source_weights, sink_weights: float32, broadcast to [B, H, 1, N]; multiplied in float32, then cast.

    Returns:
        [B, H, d_v, N] in the dtype of `value`.
    """
    dtype = value.dtype
    weighted_value = ops.cast(ops.cast(value, "float32") * source_weights, dtype)
    weighted_query = ops.cast(ops.cast(query, "float32") * sink_weights, dtype)
    context = ops.matmul(weighted_value, ops.transpose(key, (0, 1, 3, 2)))  # [B, H, d_v, d]
    return ops.matmul(context, weighted_query)  # [B, H, d_v, N]


def mobile_attention(
    query: Tensor, key: Tensor, value: Tensor, epsilon: float = 1e-6, reference_tokens: int | None = None
) -> Tensor:
    """The published operator between its projections: A * ((q * I) (k^T (v * C))).

    Its output grows with the number of tokens (about 0.73 N / H times the mean value), so a network trained at one
    resolution breaks at another. `reference_tokens` rescales it by reference_tokens / N.

    Args:
        query, key, value: projections before the sigmoid, [B, H, d, N] (value: [B, H, d_v, N]).
        epsilon: see `flows`.
        reference_tokens: the number of tokens at which the result equals the published one exactly; None gives the
            published result at every N.

    Returns:
        [B, H, d_v, N].
    """
    query = ops.sigmoid(query)
    key = ops.sigmoid(key)
    flow = flows(query, key, epsilon)
    tokens = token_count(value)
    total = tokens if reference_tokens is None else float(reference_tokens)
    # 1 / N makes key^T value a mean; the factor N returns in the other weight.
    source_weights = competition(flow.conserved_outgoing) * (MEAN_SCALE / tokens)
    sink_weights = flow.incoming * allocation(flow.conserved_incoming) * (total / MEAN_SCALE)
    return mix(query, key, value, source_weights, sink_weights)


def attention_logits(query: Tensor, key: Tensor) -> Tensor:
    """q^T k / sqrt(d) of [B, H, d, N] and [B, H, d, M], float32 [B, H, N, M]."""
    scaled_query = query * (query.shape[2] ** -0.5)
    logits = ops.matmul(ops.transpose(scaled_query, (0, 1, 3, 2)), key)  # [B, H, N, M]
    return ops.cast(logits, "float32")


def weighted_values(weights: Tensor, value: Tensor) -> Tensor:
    """Sums of the values [B, H, d_v, M] with the weights [B, H, N, M] of the same dtype, [B, H, d_v, N]."""
    return ops.matmul(value, ops.transpose(weights, (0, 1, 3, 2)))


def softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention (Vaswani et al., 2017): softmax over keys of q^T k / sqrt(d), in float32.

    Args:
        query: [B, H, d, N].
        key, value: [B, H, d, M] and [B, H, d_v, M].

    Returns:
        [B, H, d_v, N] in the dtype of `value`.
    """
    weights = ops.cast(ops.softmax(attention_logits(query, key), axis=-1), value.dtype)  # [B, H, N, M]
    return weighted_values(weights, value)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Linear attention with the feature map elu(x) + 1 (Katharopoulos et al., "Transformers are RNNs", ICML 2020).

    Args:
        query: [B, H, d, N].
        key, value: [B, H, d, M] and [B, H, d_v, M].
        epsilon: added to the normaliser.

    Returns:
        [B, H, d_v, N] in the dtype of `value`.
    """
    query = ops.elu(query) + 1.0
    key = ops.elu(key) + 1.0
    key_mean = ops.mean(ops.cast(key, "float32"), axis=-1, keepdims=True)  # [B, H, d, 1]
    normalizer = ops.sum(ops.cast(query, "float32") * key_mean, axis=2, keepdims=True) + epsilon  # [B, H, 1, N]
    return mix(query, key, value, MEAN_SCALE / token_count(key), 1.0 / (MEAN_SCALE * normalizer))


def linear_mixing_macs(
    query_tokens: int | None, key_tokens: int | None, num_heads: int, key_dim: int, value_dim: int
) -> int:
    """Multiply-adds of key^T value and query (key^T value); `key_dim` and `value_dim` are the widths of all heads.

    Raises:
        ValueError: a number of tokens is open.
    """
    if query_tokens is None or key_tokens is None:
        raise ValueError(_OPEN_TOKENS)
    return (query_tokens + key_tokens) * key_dim * value_dim // num_heads


def softmax_mixing_macs(query_tokens: int | None, key_tokens: int | None, key_dim: int, value_dim: int) -> int:
    """Multiply-adds of query key^T and weights value; arguments and errors as above."""
    if query_tokens is None or key_tokens is None:
        raise ValueError(_OPEN_TOKENS)
    return query_tokens * key_tokens * (key_dim + value_dim)


@keras.saving.register_keras_serializable(package="mobiatt_tf")
def gelu(x: Tensor) -> Tensor:
    """Exact GELU, x/2 (1 + erf(x / sqrt 2)) (Hendrycks and Gimpel, 2016).

    Written with erf because `keras.ops.gelu` lowers to Erfc in TensorFlow 2.21, which coremltools cannot convert and
    tf2onnx converts to an invalid graph. TFLite still fuses this form into one GELU.
    """
    return 0.5 * x * (1.0 + ops.erf(x * 2.0**-0.5))

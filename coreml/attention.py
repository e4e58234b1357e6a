"""Attention in the layout of the Neural Engine: heads [1, heads, d, N], no transpose, nothing wider than rank 4."""

from typing import Any

import numpy as np

from coreml.graph import Graph, Value, numpy
from coreml.projections import project
from mobiatt_tf import layers
from mobiatt_tf.layers.conv_attention import bias_of
from mobiatt_tf.ops import MEAN_SCALE

# Smallest number that is added to a flow before its reciprocal in float16: 1 / 2^-15 is still a number there.
_FLOAT16_EPSILON = 2.0**-15


def split_heads(graph: Graph, x: Value, num_heads: int, name: str) -> Any:
    """[1, C, H, W] as heads with tokens last, [1, heads, C / heads, H * W]."""
    _, channels, height, width = x.shape
    return graph.reshape(x, (1, num_heads, channels // num_heads, height * width), name).var


def mobile_mixing(
    graph: Graph, query: Any, key: Any, value: Any, epsilon: float, reference_tokens: int | None, name: str
) -> Any:
    """`mobiatt_tf.ops.mobile_attention` on heads [1, heads, d, N].

    The epsilons inside the sums (1e-6 beside a sigmoid) are left out, the one that is divided by stays: coremltools'
    `inverse` adds it, and adds 1e-4 where it is not told otherwise. Seen against the published form: 1e-6 of max|out|.
    """
    builder, dtype = graph.builder, graph.dtype
    query = builder.sigmoid(x=query, name=f"{name}_query_gate")
    key = builder.sigmoid(x=key, name=f"{name}_key_gate")

    def over_heads(x: Any, part: str) -> Any:
        return builder.reduce_sum(x=x, axes=[1], keep_dims=True, name=f"{name}_{part}_total")  # [1, 1, d, N]

    def over_channels(x: Any, total: Any, part: str) -> Any:
        terms = builder.mul(x=x, y=total, name=f"{name}_{part}_terms")  # [1, heads, d, N]
        return builder.reduce_sum(x=terms, axes=[2], keep_dims=True, name=f"{name}_{part}_sum")  # [1, heads, 1, N]

    def reciprocal(x: Any, part: str) -> Any:
        added = dtype(max(epsilon, _FLOAT16_EPSILON) if graph.float16 else epsilon)
        return builder.inverse(x=x, epsilon=added, name=f"{name}_{part}")

    def scaled(x: Any, factor: Any, part: str) -> Any:
        return builder.mul(x=x, y=factor, name=f"{name}_{part}")

    incoming = reciprocal(over_channels(query, over_heads(key, "key"), "incoming"), "incoming")
    outgoing = reciprocal(over_channels(key, over_heads(query, "query"), "outgoing"), "outgoing")
    offered = over_heads(scaled(key, outgoing, "offered"), "offered")
    asking = scaled(query, incoming, "asked")
    conserved_incoming = over_channels(query, offered, "conserved_incoming")
    conserved_outgoing = over_channels(key, over_heads(asking, "asked"), "conserved_outgoing")

    tokens = value.shape[-1]
    total = tokens if reference_tokens is None else reference_tokens
    clipped = builder.clip(x=conserved_outgoing, alpha=dtype(-1), beta=dtype(1), name=f"{name}_clip")
    competition = builder.softmax(x=clipped, axis=-1, name=f"{name}_competition")  # over the tokens, [1, heads, 1, N]
    source = scaled(competition, dtype(MEAN_SCALE), "source")
    allocation = builder.sigmoid(x=conserved_incoming, name=f"{name}_allocation")
    sink = scaled(allocation, dtype(total / MEAN_SCALE), "sink")

    weighted_value = scaled(value, source, "weighted_value")  # [1, heads, d_v, N]
    weighted_query = scaled(asking, sink, "weighted_query")  # [1, heads, d, N]
    context = builder.matmul(x=weighted_value, y=key, transpose_y=True, name=f"{name}_context")  # [1, heads, d_v, d]
    return builder.matmul(x=context, y=weighted_query, name=f"{name}_mixed")  # [1, heads, d_v, N]


def softmax_weights(graph: Graph, query: Any, key: Any, name: str, bias: np.ndarray | None = None) -> Any:
    """Logits q^T k / sqrt(d) (+ bias) of heads [1, heads, d, N] and [1, heads, d, M], [1, heads, N, M]."""
    builder = graph.builder
    factor = graph.dtype(query.shape[2] ** -0.5)
    scaled = builder.mul(x=query, y=factor, name=f"{name}_scaled_query")
    logits = builder.matmul(x=scaled, y=key, transpose_x=True, name=f"{name}_logits")
    if bias is None:
        return logits
    return builder.add(x=logits, y=graph.const(bias, f"the biases of {name}"), name=f"{name}_biased_logits")


def weighted_values(graph: Graph, weights: Any, value: Any, name: str) -> Any:
    """Values [1, heads, d_v, M] summed with weights [1, heads, N, M], [1, heads, d_v, N]."""
    return graph.builder.matmul(x=value, y=weights, transpose_y=True, name=f"{name}_mixed")


def softmax_mixing(graph: Graph, query: Any, key: Any, value: Any, name: str) -> Any:
    """`mobiatt_tf.ops.softmax_attention`."""
    logits = softmax_weights(graph, query, key, name)
    return weighted_values(graph, graph.builder.softmax(x=logits, axis=-1, name=f"{name}_weights"), value, name)


def linear_mixing(graph: Graph, query: Any, key: Any, value: Any, name: str, epsilon: float = 1e-6) -> Any:
    """`mobiatt_tf.ops.linear_attention`."""
    builder, dtype = graph.builder, graph.dtype

    def feature(x: Any, part: str) -> Any:
        return builder.add(
            x=builder.elu(x=x, alpha=dtype(1), name=f"{name}_{part}_elu"), y=dtype(1), name=f"{name}_{part}_feature"
        )

    query, key = feature(query, "query"), feature(key, "key")
    mean = builder.reduce_mean(x=key, axes=[3], keep_dims=True, name=f"{name}_key_mean")  # [1, heads, d, 1]
    terms = builder.mul(x=query, y=mean, name=f"{name}_normalizer_terms")
    normalizer = builder.reduce_sum(x=terms, axes=[2], keep_dims=True, name=f"{name}_normalizer")  # [1, heads, 1, N]
    added = dtype(max(epsilon, _FLOAT16_EPSILON) if graph.float16 else epsilon)
    sink = builder.inverse(x=normalizer, epsilon=added, name=f"{name}_sink")
    # A mean over the tokens, times MEAN_SCALE so that float16 holds its terms; see mobiatt_tf.ops.
    weighted_value = builder.mul(x=value, y=dtype(MEAN_SCALE / key.shape[-1]), name=f"{name}_weighted_value")
    weighted_query = builder.mul(
        x=builder.mul(x=query, y=sink, name=f"{name}_normalized_query"),
        y=dtype(1 / MEAN_SCALE),
        name=f"{name}_weighted_query",
    )
    context = builder.matmul(x=weighted_value, y=key, transpose_y=True, name=f"{name}_context")
    return builder.matmul(x=context, y=weighted_query, name=f"{name}_mixed")


def lower_attention(graph: Graph, layer: layers.ProjectedAttention, query: Value, *others: Value) -> Value:
    """Any of `mobiatt_tf.layers.ATTENTIONS`, on tokens or maps; keys and values may be others."""
    name = graph.name
    key = others[0] if others else query
    value = others[1] if len(others) > 1 else key
    query_heads, key_heads, value_heads = (
        split_heads(
            graph, project(graph, child, x, f"{name}_{child.name}"), layer.num_heads, f"{name}_{child.name}_heads"
        )
        for child, x in ((layer.query, query), (layer.key, key), (layer.value, value))
    )
    if isinstance(layer, layers.MobileAttention):
        mixed = mobile_mixing(graph, query_heads, key_heads, value_heads, layer.epsilon, layer.reference_tokens, name)
    elif isinstance(layer, layers.SoftmaxAttention):
        mixed = softmax_mixing(graph, query_heads, key_heads, value_heads, name)
    else:
        mixed = linear_mixing(graph, query_heads, key_heads, value_heads, name)
    merged = graph.reshape(Value(mixed), (1, -1, *query.shape[2:]), f"{name}_merged")  # [1, C, H, W]
    return project(graph, layer.out, merged, name, graph.exponent)


def lower_conv_attention(graph: Graph, layer: layers.ConvAttention, x: Value) -> Value:
    """EfficientFormerV2's attention, with Mobile-Attention or with biased softmax and talking heads."""
    name = graph.name
    if layer.strides > 1:
        x = project(graph, layer.stride_conv, x, f"{name}_stride_conv")
    value = project(graph, layer.value, x, f"{name}_value")
    projected = (
        project(graph, layer.query, x, f"{name}_query"),
        project(graph, layer.key, x, f"{name}_key"),
        value,
    )
    query, key, values = (
        split_heads(graph, tensor, layer.num_heads, f"{name}_{part}_heads")
        for tensor, part in zip(projected, ("query", "key", "value"), strict=True)
    )
    if isinstance(layer, layers.MobileConvAttention):
        mixed = mobile_mixing(graph, query, key, values, layer.epsilon, layer.reference_tokens, name)
    else:
        bias = numpy(bias_of(layer.attention_bias, layer.bias_index))
        logits = softmax_weights(graph, query, key, name, bias)
        logits = _talk(graph, logits, layer.talking_head1, f"{name}_talking_head1")
        weights = graph.builder.softmax(x=logits, axis=-1, name=f"{name}_weights")
        weights = _talk(graph, weights, layer.talking_head2, f"{name}_talking_head2")
        mixed = weighted_values(graph, weights, values, name)
    return _finish(graph, layer, mixed, value, 2 if layer.strides > 1 else 1)


def lower_downsampling_attention(graph: Graph, layer: layers.DownsamplingConvAttention, x: Value) -> Value:
    """EfficientFormerV2's attention of every second pixel over all."""
    name = graph.name
    coarse = project(graph, layer.query_local, x, f"{name}_query_local")  # [1, C, H/2, W/2]
    value = project(graph, layer.value, x, f"{name}_value")
    query = split_heads(
        graph, project(graph, layer.query, coarse, f"{name}_query"), layer.num_heads, f"{name}_query_heads"
    )
    key = split_heads(graph, project(graph, layer.key, x, f"{name}_key"), layer.num_heads, f"{name}_key_heads")
    values = split_heads(graph, value, layer.num_heads, f"{name}_value_heads")
    logits = softmax_weights(graph, query, key, name, numpy(bias_of(layer.attention_bias, layer.bias_index)))
    weights = graph.builder.softmax(x=logits, axis=-1, name=f"{name}_weights")  # [1, heads, N/4, N]
    return _finish(graph, layer, weighted_values(graph, weights, values, name), value, 1)


def _finish(graph: Graph, layer: Any, mixed: Any, value: Value, upsampling: int) -> Value:
    """What follows the mixing in both: add the local convolution of the values, enlarge, GELU, project."""
    name, builder = graph.name, graph.builder
    local = project(graph, layer.value_local, value, f"{name}_value_local")  # [1, C, h, w]
    merged = graph.reshape(Value(mixed), local.shape, f"{name}_merged")
    x = builder.add(x=merged.var, y=local.var, name=f"{name}_with_local")
    if upsampling > 1:
        factor = np.float32(upsampling)
        x = builder.upsample_bilinear(
            x=x, scale_factor_height=factor, scale_factor_width=factor, align_corners=False, name=f"{name}_upsample"
        )
    x = builder.gelu(x=x, mode="EXACT", name=f"{name}_gelu")
    return project(graph, layer.out, Value(x), name, graph.exponent)


def _talk(graph: Graph, x: Any, weights: tuple[Any, Any], name: str) -> Any:
    """A linear map over the heads of [1, heads, N, M]: a 1 x 1 convolution, with the heads as channels."""
    kernel, bias = weights
    weight = numpy(kernel).T[:, :, None, None]  # [out, in, 1, 1]
    return graph.conv(Value(x), weight, numpy(bias), name).var

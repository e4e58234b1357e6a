"""How Mobile-Attention is written into an exported graph: the same function, in the form that phones run fastest.

Training keeps the equations of `mobiatt_tf.ops`. What differs here, and why (docs/performance.md has the measurements):

- Key^T value is one matrix product for several heads at once, and what lies between different heads is set to 0. Eight
  channels a head fill a quarter of a processor's registers.
- The competition weights the key, not the value, so that the value needs no transposition to tokens-last: a
  permutation of whole rows is enough.
- Long sequences are cut into chunks of tokens, whose tensors stay in the cache. Only key^T value and the sum over the
  competition's exponentials join the chunks.
- sum_d (q + eps) (K + eps) is written as sum_d q (K + eps) + eps sum_d (K + eps), so that epsilon costs operations on
  what is left after a sum over heads, not on whole tensors. (Without the second term heads whose sigmoids are all
  below .01 would differ by more than a part in ten thousand.) The lower clip is gone: it never acts on sums of products
  of sigmoids.
- Query, key and value can be one projection: a file with dynamic quantization then rounds its input once, not thrice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from mobiatt_tf.ops import MEAN_SCALE, Tensor, merge_heads


@dataclass(frozen=True)
class Formulation:
    """The choices; each gives the same function.

    Attributes:
        group_width: most channels of the heads that share a matrix product; see `heads_in_group`.
        chunk_tokens: about how many tokens are computed at a time, where the sequence is cut at all.
        chunk_from: tokens times channels from which a sequence is cut.
        most_chunks: chunks of a sequence at most. Each adds some 30 operators to the file; at 2048 x 2048 pixels the
            first stage of PVTv2 has 262,144 tokens, and with 512 chunks a block TensorFlow's converter takes hours.
        joint_projection: query, key and value in one matrix product.
    """

    group_width: int = 16
    chunk_tokens: int = 512
    chunk_from: int = 1024 * 192
    most_chunks: int = 32
    joint_projection: bool = False

    def __post_init__(self) -> None:
        for name in ("group_width", "chunk_tokens", "chunk_from", "most_chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but {name}={getattr(self, name)} was given.")

    def chunks(self, tokens: int, width: int) -> list[tuple[int, int]]:
        """(start, stop) of each chunk of `tokens` tokens with `width` channels: one, or several of nearly equal size.

        >>> Formulation(chunk_tokens=4, chunk_from=1).chunks(10, 8)
        [(0, 4), (4, 7), (7, 10)]
        """
        wanted = min(-(-tokens // self.chunk_tokens), self.most_chunks)
        count = wanted if tokens * width >= self.chunk_from else 1
        sizes = [len(part) for part in np.array_split(np.arange(tokens), count)]
        stops = np.cumsum(sizes)
        return [(int(stop - size), int(stop)) for size, stop in zip(sizes, stops, strict=True)]


def heads_in_group(num_heads: int, head_dim: int, group_width: int) -> int:
    """The most heads that divide `num_heads` and have together at most `group_width` channels, at least 1."""
    fitting = [heads for heads in range(1, num_heads + 1) if num_heads % heads == 0 and heads * head_dim <= group_width]
    return max(fitting, default=1)


def mobile_attention(
    project: Callable[[int, int], tuple[Tensor, Tensor, Tensor]],
    chunks: list[tuple[int, int]],
    num_heads: int,
    group_width: int,
    epsilon: float = 1e-6,
    reference_tokens: int | None = None,
) -> list[Tensor]:
    """`mobiatt_tf.ops.mobile_attention` of token sequences, chunk by chunk; equal to it to 1e-5 of the largest output.

    Args:
        project: gives query, key and value before the sigmoid for the tokens start to stop: [B, n, Dk], [B, n, Dk],
            [B, n, Dv], all sizes but B known.
        chunks: see `Formulation.chunks`.
        num_heads: heads of both widths.
        group_width: see `Formulation`; it counts channels of the value.
        epsilon, reference_tokens: see `mobiatt_tf.ops.mobile_attention`.

    Returns:
        [B, n, Dv] for each chunk, before the output projection.
    """
    tokens = chunks[-1][1]
    total = float(tokens if reference_tokens is None else reference_tokens)
    context: Any = None
    strength_mean: Any = None
    queries = []
    for start, stop in chunks:
        query, key, value = project(start, stop)
        groups = num_heads // heads_in_group(num_heads, value.shape[-1] // num_heads, group_width)
        query, allocation, key, conserved_outgoing = _flows(query, key, num_heads, epsilon)
        weighted_query = ops.cast(query * (allocation * (total / MEAN_SCALE)), value.dtype)
        queries.append(_rows_by_group(weighted_query, groups))  # [B * G, n, g dk]
        if len(chunks) == 1:
            weights = ops.softmax(conserved_outgoing, axis=-1)  # [B, H, 1, N]
        else:
            strength = ops.exp(conserved_outgoing)  # at most e: nothing to subtract before
            mean = ops.mean(strength, axis=-1, keepdims=True) * ((stop - start) / tokens)  # [B, H, 1, 1]
            strength_mean = mean if strength_mean is None else strength_mean + mean
            weights = strength * (1.0 / tokens)
        weighted_key = ops.cast(key * (weights * MEAN_SCALE), value.dtype)
        weighted_key = ops.reshape(weighted_key, (-1, queries[-1].shape[-1], stop - start))
        part = ops.matmul(weighted_key, _split(value, groups))  # [B * G, g dk, g dv]
        context = part if context is None else context + part
    if strength_mean is not None:
        by_head = ops.reshape(context, (-1, num_heads, query.shape[2], context.shape[-1]))  # [B, H, dk, g dv]
        scaled = ops.cast(ops.cast(by_head, "float32") * (1.0 / strength_mean), context.dtype)
        context = ops.reshape(scaled, (-1, *context.shape[1:]))
    context = context * ops.cast(_same_head(num_heads // groups, *context.shape[1:]), context.dtype)
    return [_join(ops.matmul(query, context), groups) for query in queries]


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int, bias: Tensor | None = None) -> Tensor:
    """`mobiatt_tf.ops.softmax_attention` of projections, [B, N, D], [B, M, D] and [B, M, Dv], to [B, N, Dv].

    Queries and values are rows, keys columns: no product has a transposed operand.

    Args:
        query, key, value: projections; all sizes but B known.
        num_heads: heads of all three.
        bias: added to the logits, [1, H, N, M].
    """

    def heads(x: Tensor, axes: tuple[int, ...]) -> Tensor:
        return ops.transpose(ops.reshape(x, (-1, x.shape[1], num_heads, x.shape[2] // num_heads)), axes)

    rows, columns = (0, 2, 1, 3), (0, 2, 3, 1)
    scaled_query = query * ((query.shape[2] // num_heads) ** -0.5)
    logits = ops.matmul(heads(scaled_query, rows), heads(key, columns))  # [B, H, N, M]
    logits = ops.cast(logits, "float32")
    weights = ops.softmax(logits if bias is None else logits + bias, axis=-1)
    mixed = ops.transpose(ops.matmul(ops.cast(weights, value.dtype), heads(value, rows)), rows)  # [B, N, H, dv]
    return ops.reshape(mixed, (-1, query.shape[1], value.shape[2]))


def _flows(query: Tensor, key: Tensor, num_heads: int, epsilon: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of projections [B, n, Dk]: query times I, A, key, and O~ before the softmax.

    The two tensors are [B, H, dk, n] and the two flows [B, H, 1, n], in float32 under any policy; the equations stand
    in `mobiatt_tf.ops.flows`.
    """

    def heads(x: Tensor) -> Tensor:
        split = ops.reshape(x, (-1, x.shape[1], num_heads, x.shape[2] // num_heads))
        # In this order the converter moves the transposition in front of an int8 file's DEQUANTIZE: fewer bytes.
        return ops.cast(ops.sigmoid(ops.transpose(split, (0, 2, 3, 1))), "float32")  # [B, H, dk, n]

    def over_channels(x: Tensor) -> Tensor:
        return ops.sum(x, axis=2, keepdims=True)

    def between(own: Tensor, others: Tensor) -> Tensor:
        total = ops.sum(others, axis=1, keepdims=True) + epsilon  # [B, 1, dk, n]
        return over_channels(own * total) + epsilon * over_channels(total)  # [B, H, 1, n]

    query, key = heads(query), heads(key)
    outgoing = 1.0 / between(key, query)
    incoming = 1.0 / between(query, key)
    asked = query * incoming
    conserved_incoming = between(query, key * outgoing)
    conserved_outgoing = between(key, asked)
    return asked, ops.sigmoid(conserved_incoming), key, ops.minimum(conserved_outgoing, 1.0)


def _split(x: Tensor, parts: int) -> Tensor:
    """[B, n, D] to [B * parts, n, D / parts]."""
    _, tokens, channels = x.shape
    split = ops.transpose(ops.reshape(x, (-1, tokens, parts, channels // parts)), (0, 2, 1, 3))
    return ops.reshape(split, (-1, tokens, channels // parts))


def _join(x: Tensor, parts: int) -> Tensor:
    """[B * parts, n, d] to [B, n, parts * d]."""
    _, tokens, width = x.shape
    split = ops.transpose(ops.reshape(x, (-1, parts, tokens, width)), (0, 2, 1, 3))  # [B, n, parts, d]
    return ops.reshape(split, (-1, tokens, parts * width))


def _rows_by_group(x: Tensor, groups: int) -> Tensor:
    """[B, H, d, n] to [B * G, n, H d / G].

    A reshape stands behind the transposition: TFLite's converter makes a transposition right in front of a matrix
    product into its adj_x, which costs more on ARM and does not prepare in float16 (ai-edge-litert 2.3).
    """
    _, heads, channels, tokens = x.shape
    width = heads * channels // groups
    if groups == 1:  # the converter would swap the reshape and the transposition
        return merge_heads(x)
    rows = ops.transpose(ops.reshape(x, (-1, groups, width, tokens)), (0, 1, 3, 2))  # [B, G, n, width]
    return ops.reshape(rows, (-1, tokens, width))


def _same_head(heads: int, key_width: int, value_width: int) -> Any:
    """1 where a channel of the key and one of the value belong to the same head, else 0: [key_width, value_width]."""
    return np.kron(np.eye(heads), np.ones((key_width // heads, value_width // heads))).astype("float32")


def joint_weights(projections: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Kernel [D, sum of units] and bias of dense layers that read the same tensor, as one."""
    kernels, biases = (
        [keras.ops.convert_to_numpy(getattr(projection, name)) for projection in projections]
        for name in ("kernel", "bias")
    )
    return np.concatenate(kernels, axis=-1), np.concatenate(biases)

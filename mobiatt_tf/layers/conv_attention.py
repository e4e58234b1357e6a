"""EfficientFormerV2's attention on feature maps, and the same block with Mobile-Attention.

Source of the blocks: Attention4D and Attention4DDownsample in models/efficientformer_v2.py of
github.com/snap-research/EfficientFormer. Projections are 1 x 1 convolutions with batch norm; a depthwise convolution of
the values is added to what the heads mix; GELU stands before the output projection.
"""

import abc
from typing import Any

import keras
import numpy as np

from mobiatt_tf import formulation, ops
from mobiatt_tf.layers.attention import check_mobile_arguments
from mobiatt_tf.layers.conv import ConvBN, StridedDepthwiseResidual, padded_shape, strided_shape
from mobiatt_tf.layers.embedding import GridTable
from mobiatt_tf.ops import Tensor


class ConvAttention(keras.layers.Layer, abc.ABC):
    """What the attentions of this file share; a subclass mixes the tokens in `mix_tokens`.

    [B, H, W, C] to [B, H, W, C]. Children `query`, `key`, `value`, `value_local`, `out`, and `stride_conv` where
    `strides` is 2: the tokens are then those of the halved map, and the result is enlarged again (bilinear).

    Args:
        num_heads: heads; must divide both widths.
        key_dim: width of query and key over all heads.
        value_dim: width of the value over all heads.
        strides: 1, or 2 to attend at half the resolution; both sides of the map must then be even.
        synchronized, frozen_norm: see `ConvBN`.

    Raises:
        ValueError: heads that divide no width, or a map of unknown or odd sides.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        strides: int = 1,
        synchronized: bool = False,
        frozen_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_heads(num_heads, key_dim, value_dim)
        if strides not in (1, 2):
            raise ValueError(f"strides must be 1 or 2, but strides={strides} was given.")
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.strides = strides
        self.synchronized = synchronized
        self.frozen_norm = frozen_norm

    def build(self, input_shape: Any) -> None:
        if len(input_shape) != 4 or None in input_shape[1:] or any(side % self.strides for side in input_shape[1:3]):
            raise ValueError(
                f"{type(self).__name__} takes feature maps [batch, height, width, channels] of known height and width, "
                f"each a multiple of {self.strides}, but the shape is {tuple(input_shape)}."
            )
        channels = input_shape[-1]
        batch, height, width = strided_shape(input_shape, self.strides)
        self.grid = (height, width)
        inner_shape = (batch, height, width, channels)

        def conv(name: str, filters: int | None, shape: Any, **arguments: Any) -> ConvBN:
            return built_conv(self, name, filters, shape, **arguments)

        if self.strides > 1:
            self.stride_conv = conv("stride_conv", None, input_shape, kernel_size=3, strides=self.strides)
            self.upsample = keras.layers.UpSampling2D(
                self.strides, interpolation="bilinear", name="upsample", dtype=self.dtype_policy
            )
        self.query = conv("query", self.key_dim, inner_shape)
        self.key = conv("key", self.key_dim, inner_shape)
        self.value = conv("value", self.value_dim, inner_shape)
        self.value_local = conv("value_local", None, (batch, height, width, self.value_dim), kernel_size=3)
        self.out = conv("out", channels, (*input_shape[:3], self.value_dim))

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        x = self.stride_conv(inputs, training=training) if self.strides > 1 else inputs  # [B, h, w, C]
        value = self.value(x, training=training)  # [B, h, w, value_dim]
        query, key = self.query(x, training=training), self.key(x, training=training)  # [B, h, w, key_dim]
        mixed = self.attend(*(ops.flatten_map(tensor) for tensor in (query, key, value)))  # [B, N, value_dim]
        x = keras.ops.reshape(mixed, (-1, *self.grid, self.value_dim))  # [B, h, w, value_dim]
        x = x + self.value_local(value, training=training)
        if self.strides > 1:
            x = self.upsample(x)  # [B, H, W, value_dim]
        return self.out(ops.gelu(x), training=training)  # [B, H, W, C]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The mixing of projected tokens, [B, N, key_dim] twice and [B, N, value_dim], to [B, N, value_dim]."""
        return ops.merge_heads(self.mix_tokens(*(ops.split_heads(x, self.num_heads) for x in (query, key, value))))

    @abc.abstractmethod
    def mix_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, heads, d, N] for each of the three to [B, heads, d_v, N]."""

    @abc.abstractmethod
    def mixing_macs(self) -> int:
        """Multiply-adds of the matrix products in `mix_tokens` for one example; the layer must be built."""

    @property
    def tokens(self) -> int:
        """How many tokens attend; the layer must be built."""
        return self.grid[0] * self.grid[1]

    def quantized_children(self) -> dict[str, str | None]:
        """See `mobiatt_tf.quantization.QuantizedChildren`."""
        read = "stride_conv" if self.strides > 1 else None
        first: dict[str, str | None] = {"stride_conv": None} if self.strides > 1 else {}
        return {**first, "query": read, "key": read, "value": read, "value_local": "value", "out": None}

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "strides": self.strides,
            "synchronized": self.synchronized,
            "frozen_norm": self.frozen_norm,
        }


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class BiasedConvAttention(ConvAttention):
    """The published Attention4D: softmax attention with position biases and talking heads; see `ConvAttention`.

    `attention_bias` [1, N, heads] holds one number for each distance (|dy|, |dx|) on the map; `talking_head1` mixes the
    heads' logits before the softmax, `talking_head2` their weights after it (Shazeer et al., 2020).
    """

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        heads = self.num_heads
        shape = (1, self.tokens, heads)
        self.attention_bias = self.add_weight(name="attention_bias", shape=shape, initializer="zeros")
        for name in ("talking_head1", "talking_head2"):
            # PyTorch's default for a 1 x 1 convolution over the heads.
            kernel = self.add_weight(
                name=f"{name}_kernel",
                shape=(heads, heads),
                initializer=keras.initializers.RandomUniform(-(heads**-0.5), heads**-0.5),
            )
            bias = self.add_weight(name=f"{name}_bias", shape=(heads,), initializer="zeros")
            setattr(self, name, (kernel, bias))
        self.bias_index = bias_index(self.grid, stride=1)

    def mix_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = ops.attention_logits(query, key) + bias_of(self.attention_bias, self.bias_index)  # [B, heads, N, N]
        weights = keras.ops.softmax(self._talk(logits, *self.talking_head1), axis=-1)
        weights = keras.ops.cast(self._talk(weights, *self.talking_head2), value.dtype)
        return ops.weighted_values(weights, value)

    def _talk(self, x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        """A linear map over the heads, float32 [B, heads, N, N] to the same shape."""
        shape = (-1, self.num_heads, self.tokens, self.tokens)
        flat = keras.ops.reshape(x, (-1, self.num_heads, self.tokens**2))  # [B, heads, N * N]
        kernel, bias = keras.ops.cast(kernel, "float32"), keras.ops.cast(bias, "float32")
        mixed = keras.ops.matmul(keras.ops.transpose(kernel), flat) + keras.ops.reshape(bias, (1, -1, 1))
        return keras.ops.reshape(mixed, shape)

    def mixing_macs(self) -> int:
        talking = 2 * self.num_heads**2 * self.tokens**2
        return ops.softmax_mixing_macs(self.tokens, self.tokens, self.key_dim, self.value_dim) + talking

    def grid_table(self) -> GridTable:
        """The weight that depends on the image size."""
        return GridTable(self.attention_bias, self.grid)


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class MobileConvAttention(ConvAttention):
    """Mobile-Attention in the place of Attention4D's logits, biases, talking heads and softmax; see `ConvAttention`.

    Args:
        reference_tokens: see `mobiatt_tf.MobileAttention`; counts the tokens of the halved map if `strides` is 2.
        epsilon: see `mobiatt_tf.MobileAttention`.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        strides: int = 1,
        synchronized: bool = False,
        reference_tokens: int | None = None,
        epsilon: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_heads, key_dim, value_dim, strides, synchronized, **kwargs)
        check_mobile_arguments(epsilon, reference_tokens)
        self.reference_tokens = reference_tokens
        self.epsilon = epsilon
        self.formulation: formulation.Formulation | None = None

    def mix_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.mobile_attention(query, key, value, self.epsilon, self.reference_tokens)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.formulation is None:
            return super().attend(query, key, value)
        chunks = self.formulation.chunks(self.tokens, self.value_dim)

        def project(start: int, stop: int) -> tuple[Tensor, ...]:
            tensors = query, key, value
            return tensors if len(chunks) == 1 else tuple(tensor[:, start:stop] for tensor in tensors)

        arguments = self.num_heads, self.formulation.group_width, self.epsilon, self.reference_tokens
        mixed = formulation.mobile_attention(project, chunks, *arguments)
        return mixed[0] if len(mixed) == 1 else keras.ops.concatenate(mixed, axis=1)

    def use_formulation(self, chosen: formulation.Formulation) -> None:
        """Mixes in that form from now on; for exports, see `mobiatt_tf.formulation.Formulation`."""
        self.formulation = chosen

    def mixing_macs(self) -> int:
        return ops.linear_mixing_macs(self.tokens, self.tokens, self.num_heads, self.key_dim, self.value_dim)

    def introspect(self, inputs: Tensor) -> dict[str, Tensor]:
        """What the heads do at each token of [B, H, W, C]; see `mobiatt_tf.MobileAttention.introspect`."""
        x = self.stride_conv(inputs, training=False) if self.strides > 1 else inputs
        maps = (conv(x, training=False) for conv in (self.query, self.key))  # [B, h, w, key_dim]
        query, key = (ops.split_heads(ops.flatten_map(tensor), self.num_heads) for tensor in maps)
        return ops.flows_by_name(query, key, self.epsilon)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "reference_tokens": self.reference_tokens, "epsilon": self.epsilon}


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class DownsamplingConvAttention(keras.layers.Layer):
    """The published Attention4DDownsample: every second pixel asks, all answer; [B, H, W, C] to [B, H/2, W/2, filters].

    Children `query_local`, `query`, `key`, `value`, `value_local`, `out`; `attention_bias` as in `BiasedConvAttention`.
    Queries and keys differ in number, so Mobile-Attention, which pairs them, cannot take its place.

    Args:
        filters: channels of the result.
        num_heads: heads.
        key_dim: width of query and key over all heads.
        value_dim: width of the value over all heads.
        synchronized, frozen_norm: see `ConvBN`.

    Raises:
        ValueError: heads that do not divide the widths, or a map of unknown sides.
    """

    def __init__(
        self,
        filters: int,
        num_heads: int = 8,
        key_dim: int = 128,
        value_dim: int = 512,
        synchronized: bool = False,
        frozen_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_heads(num_heads, key_dim, value_dim)
        self.filters = filters
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.synchronized = synchronized
        self.frozen_norm = frozen_norm
        self.formulation: formulation.Formulation | None = None  # of exports

    def build(self, input_shape: Any) -> None:
        if len(input_shape) != 4 or None in input_shape[1:]:
            raise ValueError(
                f"{type(self).__name__} takes feature maps [batch, height, width, channels] of known height and width, "
                f"but the shape is {tuple(input_shape)}."
            )

        def conv(name: str, filters: int | None, shape: Any, **arguments: Any) -> ConvBN:
            return built_conv(self, name, filters, shape, **arguments)

        batch, height, width = strided_shape(input_shape, 2)
        self.grid, self.coarse_grid = tuple(input_shape[1:3]), (height, width)
        self.query_local = StridedDepthwiseResidual(name="query_local", dtype=self.dtype_policy)
        self.query_local.build(padded_shape(input_shape, 3, 2))
        self.query = conv("query", self.key_dim, (batch, height, width, input_shape[-1]))
        self.key = conv("key", self.key_dim, input_shape)
        self.value = conv("value", self.value_dim, input_shape)
        value_shape = (*input_shape[:3], self.value_dim)
        self.value_local = conv("value_local", None, value_shape, kernel_size=3, strides=2)
        self.out = conv("out", self.filters, (batch, height, width, self.value_dim))
        shape = (1, self.grid[0] * self.grid[1], self.num_heads)
        self.attention_bias = self.add_weight(name="attention_bias", shape=shape, initializer="zeros")
        self.bias_index = bias_index(self.grid, stride=2)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        coarse = self.query_local(inputs)  # [B, H/2, W/2, C]
        value = self.value(inputs, training=training)  # [B, H, W, value_dim]
        tensors = self.query(coarse, training=training), self.key(inputs, training=training), value
        mixed = self.attend(*(ops.flatten_map(x) for x in tensors))  # [B, N/4, value_dim]
        x = keras.ops.reshape(mixed, (-1, *self.coarse_grid, self.value_dim))  # [B, H/2, W/2, value_dim]
        x = x + self.value_local(value, training=training)
        return self.out(ops.gelu(x), training=training)  # [B, H/2, W/2, filters]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The mixing of projected tokens, [B, N/4, key_dim], [B, N, key_dim], [B, N, value_dim] to the last's width."""
        bias = bias_of(self.attention_bias, self.bias_index)  # [1, heads, N/4, N]
        if self.formulation is not None:
            return formulation.softmax_attention(query, key, value, self.num_heads, bias)
        queries, keys, values = (ops.split_heads(x, self.num_heads) for x in (query, key, value))
        weights = keras.ops.softmax(ops.attention_logits(queries, keys) + bias, axis=-1)  # [B, heads, N/4, N]
        return ops.merge_heads(ops.weighted_values(keras.ops.cast(weights, values.dtype), values))

    def use_formulation(self, chosen: formulation.Formulation) -> None:
        """Writes the products without transposed operands from now on; for exports."""
        self.formulation = chosen

    def mixing_macs(self) -> int:
        """Multiply-adds of the matrix products of the attention for one example; the layer must be built."""
        queries, keys = self.coarse_grid[0] * self.coarse_grid[1], self.grid[0] * self.grid[1]
        return ops.softmax_mixing_macs(queries, keys, self.key_dim, self.value_dim)

    def grid_table(self) -> GridTable:
        """The weight that depends on the image size."""
        return GridTable(self.attention_bias, self.grid)

    def quantized_children(self) -> dict[str, str | None]:
        """See `mobiatt_tf.quantization.QuantizedChildren`."""
        return {
            "query_local": None,
            "query": "query_local",
            "key": None,
            "value": None,
            "value_local": "value",
            "out": None,
        }

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (*strided_shape(input_shape, 2), self.filters)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "filters": self.filters,
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "synchronized": self.synchronized,
            "frozen_norm": self.frozen_norm,
        }


def check_heads(num_heads: int, key_dim: int, value_dim: int) -> None:
    """Raises ValueError where the heads cannot share the two widths evenly."""
    if not (ops.divides(num_heads, key_dim) and ops.divides(num_heads, value_dim)):
        raise ValueError(
            "num_heads must be a whole number that divides the width of the keys and of the values, but "
            f"num_heads={num_heads}, key_dim={key_dim} and value_dim={value_dim} were given."
        )


def built_conv(parent: Any, name: str, filters: int | None, shape: Any, **arguments: Any) -> ConvBN:
    """A `ConvBN` child for inputs of `shape`, with the precision and the batch norm settings of its parent."""
    norm: dict[str, Any] = {"synchronized": parent.synchronized, "frozen_norm": parent.frozen_norm}
    conv = ConvBN(filters, name=name, dtype=parent.dtype_policy, **norm, **arguments)
    conv.build(shape)
    return conv


def bias_index(grid: tuple[int, int], stride: int) -> np.ndarray:
    """Which row of a bias table belongs to each query and key: |dy| * width + |dx|, int32 [queries, keys].

    Args:
        grid: (height, width) of the keys' map; every place is a key.
        stride: queries stand at every `stride`-th row and column.
    """
    rows, columns = np.mgrid[: grid[0], : grid[1]]
    keys = np.stack([rows.ravel(), columns.ravel()])  # [2, keys]
    queries = np.stack([rows[::stride, ::stride].ravel(), columns[::stride, ::stride].ravel()])  # [2, queries]
    distance = np.abs(queries[:, :, None] - keys[:, None, :])  # [2, queries, keys]
    return (distance[0] * grid[1] + distance[1]).astype("int32")


def bias_of(table: Tensor, index: np.ndarray) -> Tensor:
    """The biases of all pairs, float32 [1, heads, queries, keys], from a table [1, N, heads]."""
    by_head = keras.ops.transpose(keras.ops.cast(table[0], "float32"))  # [heads, N]
    biases = keras.ops.take(by_head, index.ravel(), axis=1)  # [heads, queries * keys]
    return keras.ops.reshape(biases, (1, -1, *index.shape))

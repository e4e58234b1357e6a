"""From an image to a sequence of tokens: patches, class tokens, positions."""

from typing import Any, NamedTuple

import keras
import numpy as np

from mobiatt_tf.layers.conv import pad_as_torch, padded_shape, same_padding, strided_shape
from mobiatt_tf.layers.dense import built_dense, copy_of
from mobiatt_tf.ops import Tensor


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class PatchEmbedding(keras.layers.Layer):
    """Projects non-overlapping patches, [B, height, width, C] to [B, (height / p) (width / p), D]; child `projection`.

    Args:
        patch_size: side p of a patch in pixels.
        embed_dim: width D of a token.
        kernel_initializer: initializer of the projection.
        dense: the projection is a dense layer over whole patches with kernel [p * p * C, D] instead of a convolution
            with kernel [p, p, C, D]: the same numbers in the same order. XNNPACK gathers the pixels of every window of
            a convolution through pointers, and one transposition is faster; exports use it.

    Raises:
        ValueError: the image's sides are unknown or not multiples of the patch size.
    """

    def __init__(
        self,
        patch_size: int,
        embed_dim: int,
        kernel_initializer: Any = "glorot_uniform",
        dense: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.dense = dense

    def build(self, input_shape: Any) -> None:
        height, width = self._grid(input_shape)
        if self.dense:
            shape = (input_shape[0], height * width, self.patch_size**2 * input_shape[-1])
            self.projection = built_dense(
                "projection", self.embed_dim, shape, self.kernel_initializer, self.dtype_policy
            )
            return
        self.projection = keras.layers.Conv2D(
            self.embed_dim,
            self.patch_size,
            strides=self.patch_size,
            kernel_initializer=self.kernel_initializer,
            name="projection",
            dtype=self.dtype_policy,
        )
        self.projection.build(input_shape)

    def call(self, inputs: Tensor) -> Tensor:
        height, width = self._grid(inputs.shape)
        if self.dense:
            return self.projection(_cut(inputs, self.patch_size))  # [B, N, D]
        patches = self.projection(inputs)  # [B, height / p, width / p, D]
        return keras.ops.reshape(patches, (-1, height * width, self.embed_dim))  # [B, N, D]

    def quantized_children(self) -> dict[str, str | None]:
        """See `mobiatt_tf.quantization.QuantizedChildren`."""
        return {"projection": None}

    def compute_output_shape(self, input_shape: Any) -> Any:
        height, width = self._grid(input_shape)
        return (input_shape[0], height * width, self.embed_dim)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "patch_size": self.patch_size,
            "embed_dim": self.embed_dim,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "dense": self.dense,
        }

    def _grid(self, input_shape: Any) -> tuple[int, int]:
        if len(input_shape) != 4:
            raise ValueError(f"Images must be [batch, height, width, channels], but the shape is {tuple(input_shape)}.")
        height, width = input_shape[1:3]
        if not height or not width or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"Both sides of the image must be multiples of the patch size {self.patch_size}, but the image is "
                f"{height} x {width}."
            )
        return height // self.patch_size, width // self.patch_size


def _cut(images: Tensor, side: int) -> Tensor:
    """[B, height, width, C] to the pixels of each patch, row by row: [B, N, side * side * C]."""
    _, height, width, channels = images.shape
    rows, columns = height // side, width // side
    split = keras.ops.reshape(images, (-1, side, columns, side * channels))  # [B * rows, side, columns, side * C]
    patches = keras.ops.transpose(split, (0, 2, 1, 3))  # [B * rows, columns, side, side * C]
    return keras.ops.reshape(patches, (-1, rows * columns, side * side * channels))


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class OverlapPatchEmbedding(keras.layers.Layer):
    """PVTv2's patch embedding: strided convolution with overlapping windows, then LayerNorm with epsilon 1e-5.

    [B, H, W, C] to [B, ceil(H / s), ceil(W / s), D]; children `projection` and `norm`; padding is PyTorch's. Source:
    OverlapPatchEmbed in pvt_v2.py of github.com/whai362/PVT.

    Args:
        patch_size: odd side of the window.
        strides: step of the window.
        embed_dim: width D of a token.
        kernel_initializer: initializer of the convolution.
    """

    def __init__(
        self,
        patch_size: int,
        strides: int,
        embed_dim: int,
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.strides = strides
        self.embed_dim = embed_dim
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape: Any) -> None:
        self.projection = keras.layers.Conv2D(
            self.embed_dim,
            self.patch_size,
            strides=self.strides,
            padding=same_padding(self.strides),
            kernel_initializer=copy_of(self.kernel_initializer),
            name="projection",
            dtype=self.dtype_policy,
        )
        self.projection.build(padded_shape(input_shape, self.patch_size, self.strides))
        self.norm = keras.layers.LayerNormalization(epsilon=1e-5, name="norm", dtype=self.dtype_policy)
        self.norm.build(self.compute_output_shape(input_shape))

    def call(self, inputs: Tensor) -> Tensor:
        x = self.projection(pad_as_torch(inputs, self.patch_size, self.strides))  # [B, ceil(H / s), ceil(W / s), D]
        return self.norm(x)

    def quantized_children(self) -> dict[str, str | None]:
        """See `mobiatt_tf.quantization.QuantizedChildren`."""
        return {"projection": None}

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (*strided_shape(input_shape, self.strides), self.embed_dim)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "patch_size": self.patch_size,
            "strides": self.strides,
            "embed_dim": self.embed_dim,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class ClassToken(keras.layers.Layer):
    """Prepends `count` learned tokens, [B, N, D] to [B, count + N, D]: the class token, then the distillation token.

    Args:
        count: number of tokens.
        initializer: initializer of the tokens.
    """

    def __init__(self, count: int = 1, initializer: Any = "zeros", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.count = count
        self.initializer = keras.initializers.get(initializer)

    def build(self, input_shape: Any) -> None:
        self.tokens = self.add_weight(
            name="tokens", shape=(1, self.count, input_shape[-1]), initializer=self.initializer, trainable=True
        )

    def call(self, inputs: Tensor) -> Tensor:
        tokens = keras.ops.cast(self.tokens, inputs.dtype)
        tokens = keras.ops.broadcast_to(tokens, (keras.ops.shape(inputs)[0], self.count, inputs.shape[-1]))
        return keras.ops.concatenate([tokens, inputs], axis=1)  # [B, count + N, D]

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (input_shape[0], None if input_shape[1] is None else input_shape[1] + self.count, input_shape[2])

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "count": self.count,
            "initializer": keras.initializers.serialize(self.initializer),
        }


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class SelectToken(keras.layers.Layer):
    """Token `index` of the sequence, [B, N, D] to [B, D].

    Args:
        index: position of the token, 0 for the class token.
    """

    def __init__(self, index: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.index = index

    def call(self, inputs: Tensor) -> Tensor:
        # A slice that drops the axis is a STRIDED_SLICE with a shrink mask, which XNNPACK leaves outside its
        # partition (seen with ai-edge-litert 2.3); a slice that keeps it, followed by a reshape, stays inside.
        token = inputs[:, self.index : self.index + 1]  # [B, 1, D]
        return keras.ops.reshape(token, (-1, inputs.shape[-1]))  # [B, D]

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (input_shape[0], input_shape[2])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "index": self.index}


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class PositionEmbedding(keras.layers.Layer):
    """Adds a learned embedding to every token, [B, prefix + height * width, D].

    Args:
        grid: (height, width) of the patch grid in tokens; kept so that the weights can be resized to another image.
        prefix: number of class and distillation tokens in front, which have no place in the image.
        initializer: initializer of the embedding.
    """

    def __init__(self, grid: tuple[int, int], prefix: int = 0, initializer: Any = "zeros", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.grid = (int(grid[0]), int(grid[1]))
        self.prefix = prefix
        self.initializer = keras.initializers.get(initializer)

    def build(self, input_shape: Any) -> None:
        tokens = self.prefix + self.grid[0] * self.grid[1]
        if input_shape[1] != tokens:
            raise ValueError(
                f"A grid of {self.grid[0]} x {self.grid[1]} with {self.prefix} tokens in front has {tokens} tokens, "
                f"but the input is {tuple(input_shape)}."
            )
        self.embedding = self.add_weight(
            name="embedding", shape=(1, tokens, input_shape[-1]), initializer=self.initializer, trainable=True
        )

    def call(self, inputs: Tensor) -> Tensor:
        return inputs + keras.ops.cast(self.embedding, inputs.dtype)

    def grid_table(self) -> "GridTable":
        """The weight that depends on the image size."""
        return GridTable(self.embedding, self.grid, self.prefix)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "grid": list(self.grid),
            "prefix": self.prefix,
            "initializer": keras.initializers.serialize(self.initializer),
        }


class GridTable(NamedTuple):
    """A weight [1, prefix + height * width, C] with a row for each place of a grid, and that grid."""

    weight: Any
    grid: tuple[int, int]
    prefix: int = 0


def grid_tables(model: keras.Model) -> dict[str, GridTable]:
    """The weights of a model that depend on the image size, by path: position embeddings and attention biases.

    Layers name theirs in a method `grid_table`.
    """
    tables = [layer.grid_table() for layer in model.layers if hasattr(layer, "grid_table")]
    return {table.weight.path: table for table in tables}


def resize_position_embedding(
    embedding: np.ndarray, grid: tuple[int, int], new_grid: tuple[int, int], prefix: int = 0
) -> np.ndarray:
    """Resizes a learned table over a grid: bicubic, antialiased, as timm's resample_abs_pos_embed.

    Args:
        embedding: float [1, prefix + height * width, D].
        grid: (height, width) of `embedding`, in tokens.
        new_grid: (height, width) wanted, in tokens.
        prefix: leading tokens that are carried over unchanged.

    Returns:
        float32 [1, prefix + new height * new width, D].

    Raises:
        ValueError: `embedding` does not have prefix + height * width tokens.
    """
    tokens = prefix + grid[0] * grid[1]
    if embedding.ndim != 3 or embedding.shape[:2] != (1, tokens):
        raise ValueError(
            f"A {grid[0]} x {grid[1]} grid with {prefix} tokens in front needs an embedding of shape "
            f"(1, {tokens}, D), but {embedding.shape} was given."
        )
    if tuple(grid) == tuple(new_grid):
        return embedding.astype("float32")
    image = embedding[:, prefix:].reshape(1, *grid, -1)  # [1, height, width, D]
    resized = keras.ops.image.resize(
        image.astype("float32"), new_grid, interpolation="bicubic", antialias=True, data_format="channels_last"
    )
    flat = keras.ops.convert_to_numpy(resized).reshape(1, new_grid[0] * new_grid[1], -1)  # [1, new N, D]
    return np.concatenate([embedding[:, :prefix].astype("float32"), flat], axis=1)

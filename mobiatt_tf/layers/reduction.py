"""PVTv2's two ways to shorten the sequence of keys and values; only its softmax attention needs them."""

from typing import Any

import keras

from mobiatt_tf import ops
from mobiatt_tf.layers.dense import copy_of
from mobiatt_tf.ops import Tensor

_EPSILON = 1e-5  # nn.LayerNorm's default, which pvt_v2.py leaves as it is here


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class SpatialReduction(keras.layers.Layer):
    """Keys and values from a coarser map: [B, H, W, C] to [B, H / ratio, W / ratio, C], or to [B, pool, pool, C].

    With `ratio` a convolution of that size and stride, then LayerNorm. With `pool_size` (the "linear" variants) an
    average over a grid of fixed size, a 1 x 1 convolution, LayerNorm and GELU. Children `reduction` and `norm`. Source:
    Attention in pvt_v2.py of github.com/whai362/PVT.

    Args:
        ratio: side and stride of the convolution; None with `pool_size`.
        pool_size: side of the pooled grid; None with `ratio`.
        kernel_initializer: initializer of the convolution.

    Raises:
        ValueError: both or neither of `ratio` and `pool_size`.
    """

    def __init__(
        self,
        ratio: int | None = None,
        pool_size: int | None = None,
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (ratio is None) == (pool_size is None):
            raise ValueError(f"Give either ratio or pool_size, but ratio={ratio} and pool_size={pool_size} were given.")
        self.ratio = ratio
        self.pool_size = pool_size
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape: Any) -> None:
        channels = input_shape[-1]
        side = self.ratio or 1
        self.reduction = keras.layers.Conv2D(
            channels,
            side,
            strides=side,
            kernel_initializer=copy_of(self.kernel_initializer),
            name="reduction",
            dtype=self.dtype_policy,
        )
        self.norm = keras.layers.LayerNormalization(epsilon=_EPSILON, name="norm", dtype=self.dtype_policy)
        if self.pool_size:
            sides = input_shape[1:3]
            if None in sides or any(side % self.pool_size for side in sides):
                self.pool = keras.layers.AdaptiveAveragePooling2D(self.pool_size, name="pool", dtype=self.dtype_policy)
            else:  # the same, and one operator for the exporters: the layer above becomes GATHERs in TFLite
                window = tuple(side // self.pool_size for side in sides)
                self.pool = keras.layers.AveragePooling2D(window, name="pool", dtype=self.dtype_policy)
            self.reduction.build(self.compute_output_shape(input_shape))
        else:
            self.reduction.build(input_shape)
        self.norm.build(self.compute_output_shape(input_shape))

    def call(self, inputs: Tensor) -> Tensor:
        if self.pool_size:
            pooled = self.pool(inputs)  # [B, pool, pool, C]
            return ops.gelu(self.norm(self.reduction(pooled)))
        return self.norm(self.reduction(inputs))  # [B, H / ratio, W / ratio, C]

    def quantized_children(self) -> dict[str, str | None]:
        """See `mobiatt_tf.quantization.QuantizedChildren`."""
        return {"reduction": None}

    def compute_output_shape(self, input_shape: Any) -> Any:
        if self.pool_size:
            return (input_shape[0], self.pool_size, self.pool_size, input_shape[-1])
        sides = (None if side is None else side // self.ratio for side in input_shape[1:3])
        return (input_shape[0], *sides, input_shape[-1])

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "ratio": self.ratio,
            "pool_size": self.pool_size,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }

"""The two-layer perceptron of a transformer block."""

from typing import Any

import keras

from mobiatt_tf import ops
from mobiatt_tf.layers.dense import built_dense, copy_of
from mobiatt_tf.ops import Tensor


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class MLP(keras.layers.Layer):
    """Dense, exact GELU, Dense, with dropout after each; children `fc1` and `fc2` as in timm.

    Args:
        hidden_dim: width between the two.
        dropout: rate of both dropouts.
        kernel_initializer: initializer of both kernels.
    """

    def __init__(
        self, hidden_dim: int, dropout: float = 0.0, kernel_initializer: Any = "glorot_uniform", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_dim = hidden_dim
        self.dropout = dropout
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape: Any) -> None:
        hidden_shape = (*input_shape[:-1], self.hidden_dim)
        self.fc1 = built_dense("fc1", self.hidden_dim, input_shape, self.kernel_initializer, self.dtype_policy)
        self.fc2 = built_dense("fc2", input_shape[-1], hidden_shape, self.kernel_initializer, self.dtype_policy)
        self.dropout1 = keras.layers.Dropout(self.dropout, name="dropout1", dtype=self.dtype_policy)
        self.dropout2 = keras.layers.Dropout(self.dropout, name="dropout2", dtype=self.dtype_policy)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        hidden = self.dropout1(ops.gelu(self.fc1(inputs)), training=training)  # [..., hidden_dim]
        return self.dropout2(self.fc2(hidden), training=training)  # [..., D]

    def quantized_children(self) -> dict[str, str | None]:
        """See `mobiatt_tf.quantization.QuantizedChildren`."""
        return {"fc1": None, "fc2": None}

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class DepthwiseMLP(keras.layers.Layer):
    """PVTv2's MLP on feature maps: Dense, depthwise 3 x 3, exact GELU, Dense; [B, H, W, C] to [B, H, W, C].

    Children `fc1`, `dwconv` and `fc2` as in timm. Source: pvt_v2.py of github.com/whai362/PVT.

    Args:
        hidden_dim: width between the two Dense layers.
        relu: a ReLU after the first, as in the "linear" variants.
        dropout: rate after GELU and after the last layer.
        kernel_initializer: of the two Dense kernels.
        depthwise_initializer: of the depthwise kernel.
    """

    def __init__(
        self,
        hidden_dim: int,
        relu: bool = False,
        dropout: float = 0.0,
        kernel_initializer: Any = "glorot_uniform",
        depthwise_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_dim = hidden_dim
        self.relu = relu
        self.dropout = dropout
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.depthwise_initializer = keras.initializers.get(depthwise_initializer)

    def build(self, input_shape: Any) -> None:
        hidden_shape = (*input_shape[:-1], self.hidden_dim)
        self.fc1 = built_dense("fc1", self.hidden_dim, input_shape, self.kernel_initializer, self.dtype_policy)
        self.dwconv = keras.layers.DepthwiseConv2D(
            3,
            padding="same",
            depthwise_initializer=copy_of(self.depthwise_initializer),
            name="dwconv",
            dtype=self.dtype_policy,
        )
        self.dwconv.build(hidden_shape)
        self.fc2 = built_dense("fc2", input_shape[-1], hidden_shape, self.kernel_initializer, self.dtype_policy)
        self.dropout1 = keras.layers.Dropout(self.dropout, name="dropout1", dtype=self.dtype_policy)
        self.dropout2 = keras.layers.Dropout(self.dropout, name="dropout2", dtype=self.dtype_policy)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        hidden = self.fc1(inputs)  # [B, H, W, hidden_dim]
        if self.relu:
            hidden = keras.ops.relu(hidden)
        hidden = self.dropout1(ops.gelu(self.dwconv(hidden)), training=training)
        return self.dropout2(self.fc2(hidden), training=training)  # [B, H, W, C]

    def quantized_children(self) -> dict[str, str | None]:
        """See `mobiatt_tf.quantization.QuantizedChildren`."""
        return {"fc1": None, "dwconv": None if self.relu else "fc1", "fc2": None}

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "relu": self.relu,
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "depthwise_initializer": keras.initializers.serialize(self.depthwise_initializer),
        }

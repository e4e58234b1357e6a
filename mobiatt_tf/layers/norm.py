"""The normalisation that remains of LayerNorm where its input has mean 0 and its scale and offset stand elsewhere."""

from typing import Any

import keras

from mobiatt_tf.ops import Tensor


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class RootMeanSquareNorm(keras.layers.Layer):
    """x / sqrt(mean(x^2) + epsilon) over the channels, [..., C] to [..., C], in float32 under any policy.

    Equals LayerNorm without scale and offset where the channels have mean 0 (Zhang and Sennrich, "Root Mean Square
    Layer Normalization", NeurIPS 2019, section 3); see `mobiatt_tf.lean`.

    Args:
        epsilon: added to the mean of the squares.
    """

    def __init__(self, epsilon: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def call(self, inputs: Tensor) -> Tensor:
        x = keras.ops.cast(inputs, "float32")
        mean_square = keras.ops.mean(keras.ops.square(x), axis=-1, keepdims=True)  # [..., 1]
        return keras.ops.cast(x * keras.ops.rsqrt(mean_square + self.epsilon), inputs.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon}

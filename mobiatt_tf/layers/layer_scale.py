"""A learned scale for each channel of a residual branch."""

from typing import Any

import keras

from mobiatt_tf.ops import Tensor


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class LayerScale(keras.layers.Layer):
    """Multiplies every channel by a learned number, [..., C] to [..., C] (Touvron et al., "CaiT", ICCV 2021).

    Args:
        initial_value: of every channel, small so that deep networks start near the identity.
    """

    def __init__(self, initial_value: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.initial_value = initial_value

    def build(self, input_shape: Any) -> None:
        self.scale = self.add_weight(
            name="scale", shape=(input_shape[-1],), initializer=keras.initializers.Constant(self.initial_value)
        )

    def call(self, inputs: Tensor) -> Tensor:
        return inputs * keras.ops.cast(self.scale, inputs.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "initial_value": self.initial_value}

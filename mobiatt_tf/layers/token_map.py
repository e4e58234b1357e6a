"""From a sequence of tokens back to a map."""

from typing import Any

import keras

from mobiatt_tf.ops import Tensor


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class TokensToMap(keras.layers.Layer):
    """Tokens of an image as a map, without those in front: [B, prefix + height * width, D] to [B, height, width, D].

    Args:
        grid: (height, width) of the map, in tokens.
        prefix: number of class and distillation tokens in front, which have no place in the image.

    Raises:
        ValueError: the input has another number of tokens.
    """

    def __init__(self, grid: tuple[int, int], prefix: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.grid = (int(grid[0]), int(grid[1]))
        self.prefix = prefix

    def build(self, input_shape: Any) -> None:
        tokens = self.prefix + self.grid[0] * self.grid[1]
        if len(input_shape) != 3 or input_shape[1] != tokens:
            raise ValueError(
                f"A grid of {self.grid[0]} x {self.grid[1]} with {self.prefix} tokens in front has {tokens} tokens, "
                f"but the input is {tuple(input_shape)}."
            )

    def call(self, inputs: Tensor) -> Tensor:
        return keras.ops.reshape(inputs[:, self.prefix :], (-1, *self.grid, inputs.shape[-1]))  # [B, height, width, D]

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (input_shape[0], *self.grid, input_shape[-1])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "grid": list(self.grid), "prefix": self.prefix}

"""Stochastic depth, which Keras does not ship."""

from typing import Any

import keras

from mobiatt_tf.ops import Tensor


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class DropPath(keras.layers.Dropout):
    """Drops the whole residual branch of a sample while training (Huang et al., "Deep Networks with Stochastic Depth").

    Kept branches are divided by 1 - rate. It is Keras' Dropout with one draw for each sample.

    Args:
        rate: probability of dropping a branch, in [0, 1).
        seed: seed of the draws.
    """

    def __init__(self, rate: float, seed: int | None = None, **kwargs: Any) -> None:
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"The drop path rate must be in [0, 1), but {rate} was given.")
        kwargs.pop("noise_shape", None)
        super().__init__(rate, seed=seed, **kwargs)

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        if not training or self.rate == 0.0:
            return inputs
        one_draw_a_sample = (keras.ops.shape(inputs)[0],) + (1,) * (len(inputs.shape) - 1)
        return keras.random.dropout(inputs, self.rate, noise_shape=one_draw_a_sample, seed=self.seed_generator)

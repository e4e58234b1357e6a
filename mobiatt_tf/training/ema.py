"""An exponential moving average of all of a model's weights."""

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf


def decay_at(step: tf.Tensor | int, decay: float, warmup: bool) -> tf.Tensor:
    """The decay at a step, counted from 0: `decay`, or min(decay, (1 + step) / (10 + step)) under warm-up.

    Source of the warm-up: `num_updates` of tf.train.ExponentialMovingAverage.
    """
    count = tf.cast(step, tf.float32)
    return tf.minimum(decay, (1.0 + count) / (10.0 + count)) if warmup else tf.constant(decay, tf.float32)


class WeightAverage:
    """The moving average of a model's weights: trainable ones and batch-norm statistics alike.

    Keras' own `use_ema` averages the trainable weights only, and its statistics then belong to other weights. Seeds and
    other integers are not averaged.

    Args:
        model: a built model. Construct the average under the strategy's scope.
        decay: in [0, 1).
        warmup: see `decay_at`.
    """

    def __init__(self, model: keras.Model, decay: float, warmup: bool = True) -> None:
        self.decay = decay
        self.warmup = warmup
        # `.value` of a Keras variable is the tf.Variable, mirrored over the devices under a strategy.
        self._weights = [weight.value for weight in model.weights if weight.value.dtype.is_floating]
        self.averages = [
            tf.Variable(tf.cast(weight.numpy(), tf.float32), trainable=False, name=f"average_{index}")
            for index, weight in enumerate(self._weights)
        ]

    def update(self, step: tf.Tensor) -> None:
        """Moves the averages towards the weights. Call it after step number `step` (from 0), outside `strategy.run`."""
        share = 1.0 - decay_at(step, self.decay, self.warmup)

        def move(average: tf.Variable, weight: tf.Variable) -> tf.Tensor:
            return average.assign_add(share * (tf.cast(weight, tf.float32) - average))

        # extended.update runs where each copy lives: no communication between the devices.
        strategy = tf.distribute.get_strategy()
        for average, weight in zip(self.averages, self._weights, strict=True):
            strategy.extended.update(average, move, args=(weight,), group=False)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averages inside the block, and exactly its own weights again after it."""
        own = [tf.identity(weight) for weight in self._weights]
        try:
            for weight, average in zip(self._weights, self.averages, strict=True):
                weight.assign(tf.cast(average, weight.dtype))
            yield
        finally:
            for weight, value in zip(self._weights, own, strict=True):
                weight.assign(value)

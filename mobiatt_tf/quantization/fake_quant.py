"""Fake quantization: float tensors that hold only what int8 can hold, with straight-through gradients."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from mobiatt_tf.errors import UserError
from mobiatt_tf.ops import Tensor


class Observer:
    """Collects the range of a tensor over batches: the means of the batches' minima and maxima.

    That is what tfmot's moving average tends to while training, so calibration and training agree. Where a batch comes
    by several times, as in the head that a detector calls for each of its levels, its extremes are those over all
    calls: a mean over the levels would cut off what the largest one holds.
    """

    def __init__(self) -> None:
        self.minima: list[float] = []
        self.maxima: list[float] = []
        self._in_batch = False

    def see(self, x: Tensor) -> None:
        """Takes in what one call has."""
        values = keras.ops.convert_to_numpy(x)
        if not self._in_batch:
            self.minima.append(np.inf)
            self.maxima.append(-np.inf)
            self._in_batch = True
        # NumPy's, unlike Python's, keep what is not a number.
        self.minima[-1] = float(np.minimum(self.minima[-1], values.min()))
        self.maxima[-1] = float(np.maximum(self.maxima[-1], values.max()))

    def end_batch(self) -> None:
        """What comes now is another batch."""
        self._in_batch = False

    def range(self, symmetric: bool) -> tuple[float, float]:
        """(minimum, maximum); it contains 0, as TFLite asks."""
        low, high = min(float(np.mean(self.minima)), 0.0), max(float(np.mean(self.maxima)), 0.0)
        if symmetric:
            high = max(high, -low)
            low = -high
        return low, high


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class FakeQuantize(keras.layers.Layer):
    """Rounds a tensor to 8 bits and back; the range follows the batches while training.

    Around tfmot's MovingAverageQuantizer (decay .999). Its variables `range_min` and `range_max` start at 0, which
    means "not calibrated": training then fails with a message (under XLA its loss is NaN), and so do exports; see
    `mobiatt_tf.quantization.calibrate`.

    Computes in float32 whatever the precision of the model, and returns float32.

    Args:
        symmetric: the range is [-r, r] and the zero point 0; XNNPACK multiplies matrices in int8 only if that of the
            right operand is 0.
        fixed_range: a range that neither calibration nor training changes.
        follows: False keeps the range that calibration found in training too.
    """

    def __init__(
        self,
        symmetric: bool = False,
        fixed_range: tuple[float, float] | None = None,
        follows: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.symmetric = symmetric
        self.fixed_range = None if fixed_range is None else (float(fixed_range[0]), float(fixed_range[1]))
        self.follows = follows
        self.observer: Observer | None = None

    def build(self, input_shape: Any) -> None:
        self._quantizer = moving_average_quantizer(self.symmetric)
        self._ranges = self._quantizer.build(input_shape, "range", _Keras2Owner(self))
        if self.fixed_range:
            self.set_range(*self.fixed_range)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        if self.observer is not None:
            self.observer.see(inputs)
            return inputs
        import tensorflow as tf

        ranges = {name: variable.value for name, variable in self._ranges.items()}
        moves = bool(training) and self.fixed_range is None
        if moves:  # also without following: a range that was never set must not go unnoticed
            message = f"{self.path} is not calibrated. Call mobiatt_tf.quantization.calibrate(model, images) first."
            check = tf.debugging.assert_greater(ranges["max_var"], ranges["min_var"], message)
            with tf.control_dependencies([check] if check is not None else []):  # None: it ran eagerly
                # XLA leaves assertions out: there the loss becomes NaN.
                inputs = tf.where(ranges["max_var"] > ranges["min_var"], inputs, np.nan)
        return self._quantizer(inputs, moves and self.follows, ranges)

    @property
    def range(self) -> tuple[float, float]:
        """(minimum, maximum) of what it can represent."""
        return float(self._ranges["min_var"].numpy()), float(self._ranges["max_var"].numpy())

    def set_range(self, low: float, high: float) -> None:
        """Replaces the range."""
        self._ranges["min_var"].assign(low)
        self._ranges["max_var"].assign(high)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        own = {"symmetric": self.symmetric, "fixed_range": self.fixed_range, "follows": self.follows}
        return {**super().get_config(), **own}


class _Keras2Owner:
    """What tfmot's quantizers expect of a layer, on a Keras 3 layer: `add_weight` with the name first."""

    def __init__(self, layer: keras.layers.Layer) -> None:
        self._layer = layer

    def add_weight(self, name: str, initializer: Any = None, trainable: bool = False, shape: Any = None) -> Any:
        # Not their own start, plus and minus 6: .42 of relative error on this network after 126 steps.
        return self._layer.add_weight(name=name, shape=shape or (), initializer="zeros", trainable=trainable)


def moving_average_quantizer(symmetric: bool) -> Any:
    """tfmot's quantizer of activations: 8 bits per tensor.

    Raises:
        UserError: tensorflow-model-optimization is not installed.
    """
    import tensorflow as tf

    # `tf.keras` is made when it is first used, and tfmot's import uses it as Keras 2. Make it Keras 3 before.
    getattr(tf, "keras").version()  # noqa: B009 (our own check forbids the attribute)
    # tfmot asks distutils for TensorFlow's version, which warns.
    with _environment_restored(), warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        try:
            from tensorflow_model_optimization.python.core.quantization.keras import quantizers
        except ImportError as error:
            raise UserError(
                "Quantization needs tensorflow-model-optimization: pip install mobiatt-tf[quantization]."
            ) from error
    return quantizers.MovingAverageQuantizer(num_bits=8, per_axis=False, symmetric=symmetric, narrow_range=symmetric)


@contextlib.contextmanager
def _environment_restored() -> Iterator[None]:
    """Importing tfmot sets TF_USE_LEGACY_KERAS, which turns `tf.keras` of the whole process into Keras 2."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def round_kernel(kernel: Tensor, axis: int, precision: str) -> Tensor:
    """The nearest kernel that the file can hold, with a straight-through gradient.

    int8 is per channel: the largest magnitude of a channel is 127 steps, so a converter that derives the steps anew
    from the result finds the same. No tfmot quantizer, because those keep the ranges in variables, which a moving
    average of the weights would move apart from the weights.

    Args:
        kernel: float [...].
        axis: of the output channels; the last one, or the one before it for depthwise kernels [h, w, channels, 1].
        precision: "int8" or "float16".

    Returns:
        float32, same shape.
    """
    import tensorflow as tf

    kernel = tf.cast(kernel, tf.float32)
    if precision == "float16":
        rounded = tf.cast(tf.cast(kernel, tf.float16), tf.float32)
    else:
        flat = tf.reshape(
            kernel, (-1, kernel.shape[axis])
        )  # [inputs, channels]; an axis behind the channels has size 1
        limit = tf.maximum(tf.reduce_max(tf.abs(flat), axis=0), 1e-12)  # [channels]
        flat = tf.quantization.fake_quant_with_min_max_vars_per_channel(flat, -limit, limit, narrow_range=True)
        rounded = tf.reshape(flat, kernel.shape)
    # Its own gradient is 0 where rounding puts the limit below the channel's largest weight.
    return kernel + tf.stop_gradient(rounded - kernel)

"""Rounding of kernels and of activations."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mobiatt_tf.quantization.fake_quant import FakeQuantize, round_kernel
from tests.quantization.small import noise, run_python, to_numpy

# Kernels [inputs, channels] of decimal numbers, zeros among them, from .0001 to 100.
KERNELS = arrays(np.int32, st.tuples(st.integers(1, 12), st.integers(1, 5)), elements=st.integers(-(10**6), 10**6)).map(
    lambda numbers: (numbers * 1e-4).astype("float32")
)
LAST_PLACE = 2.5e-7  # of float32: two units in the last place, relative
RANGES = st.tuples(st.floats(-50, 0), st.floats(0.01, 50))


def rounded(kernel: np.ndarray, axis: int = -1, precision: str = "int8") -> np.ndarray:
    return to_numpy(round_kernel(kernel, axis, precision))


def steps_of(kernel: np.ndarray) -> np.ndarray:
    """One int8 step of each channel of [inputs, channels]; 1 where a channel is 0 everywhere."""
    limit = np.abs(kernel).max(axis=0)
    return np.where(limit > 0, limit, 127) / 127


def quantizer(low: float, high: float, **arguments: Any) -> FakeQuantize:
    layer = FakeQuantize(**arguments)
    layer.build((None,))
    layer.set_range(low, high)
    return layer


@settings(max_examples=40)
@given(kernel=KERNELS)
def test_int8_kernels_lie_on_the_grid_of_their_channel_and_nowhere_far(kernel: np.ndarray) -> None:
    result, step = rounded(kernel), steps_of(kernel)
    assert result.dtype == np.float32
    np.testing.assert_array_less(np.abs(result - kernel), 0.5001 * step * np.ones_like(kernel))
    whole = result / step
    np.testing.assert_allclose(whole, np.round(whole), atol=1e-4)
    assert np.abs(whole).max() < 127.001


@settings(max_examples=40)
@given(kernel=KERNELS)
def test_the_largest_weight_of_a_channel_stays(kernel: np.ndarray) -> None:
    np.testing.assert_allclose(np.abs(rounded(kernel)).max(axis=0), np.abs(kernel).max(axis=0), rtol=LAST_PLACE)


@settings(max_examples=40)
@given(kernel=KERNELS, precision=st.sampled_from(["int8", "float16"]))
def test_rounding_twice_is_rounding_once(kernel: np.ndarray, precision: str) -> None:
    once = rounded(kernel, precision=precision)
    np.testing.assert_allclose(rounded(once, precision=precision), once, rtol=LAST_PLACE, atol=0)


def test_each_channel_has_its_own_steps_in_depthwise_kernels_too() -> None:
    scales = np.float32([1e-3, 1, 100, 0])  # with one range for all, the first channel would be 0 everywhere
    kernel = noise(3, 3, 4, 1) * scales[:, None]
    result = rounded(kernel, axis=-2)
    assert result.shape == kernel.shape
    np.testing.assert_array_equal(result.reshape(9, 4), rounded(kernel.reshape(9, 4)))
    error = np.abs(result - kernel).max(axis=(0, 1, 3))
    assert np.all(error[:3] > 0)
    assert np.all(error <= 0.5001 * np.abs(kernel).max(axis=(0, 1, 3)) / 127)


def test_convolution_kernels_have_their_channels_last() -> None:
    kernel = noise(3, 3, 5, 4)
    np.testing.assert_array_equal(rounded(kernel).reshape(45, 4), rounded(kernel.reshape(45, 4)))


@settings(max_examples=20)
@given(kernel=KERNELS)
def test_float16_kernels_are_those_that_float16_holds(kernel: np.ndarray) -> None:
    result = rounded(kernel, precision="float16")
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, kernel.astype("float16").astype("float32"))


@pytest.mark.parametrize("precision", ["int8", "float16"])
def test_kernel_gradients_pass_straight_through(precision: str) -> None:
    """For every weight, the largest of a channel too: that one sets the steps, so it must not get stuck."""
    kernel = tf.constant(noise(16, 4096))
    weights = noise(16, 4096, seed=1)
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        total = tf.reduce_sum(round_kernel(kernel, -1, precision) * weights)
    np.testing.assert_allclose(tape.gradient(total, kernel), weights, rtol=1e-6)


@settings(max_examples=30)
@given(limits=RANGES)
def test_activations_take_256_values_and_0_is_one_of_them(limits: tuple[float, float]) -> None:
    low, high = limits
    margin = (high - low) / 2
    inputs = np.linspace(low - margin, high + margin, 5001, dtype="float32")
    values = np.unique(to_numpy(quantizer(low, high)(inputs)))
    assert 250 < len(values) <= 256
    assert values[0] <= 0 <= values[-1]
    assert to_numpy(quantizer(low, high)(np.zeros(3, "float32"))).tolist() == [0, 0, 0]
    assert 0 in values
    np.testing.assert_allclose(np.diff(values), (high - low) / 255, rtol=1e-3)


@settings(max_examples=30)
@given(limits=RANGES)
def test_the_error_is_half_a_step_inside_the_range(limits: tuple[float, float]) -> None:
    low, high = limits
    step = (high - low) / 255
    # The range is moved by up to half a step, so that 0 is on the grid: at its very ends the error may be one step.
    inside = np.linspace(low + step, high - step, 2001, dtype="float32")
    assert np.abs(to_numpy(quantizer(low, high)(inside)) - inside).max() <= 0.501 * step
    ends = np.float32([low, high])
    assert np.abs(to_numpy(quantizer(low, high)(ends)) - ends).max() <= 1.001 * step


def test_what_lies_outside_the_range_is_clipped_and_gets_no_gradient() -> None:
    inputs = tf.constant([-9.0, -0.5, 0.0, 0.7, 9.0])
    layer = quantizer(-1, 1)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        output = layer(inputs)
    assert np.abs(output).max() < 1.01
    assert tape.gradient(output, inputs).numpy().tolist() == [0, 1, 1, 1, 0]


def test_symmetric_ranges_round_both_signs_alike_and_stay_symmetric() -> None:
    inputs = noise(1000)
    layer = quantizer(-2, 2, symmetric=True)
    np.testing.assert_array_equal(to_numpy(layer(-inputs)), -to_numpy(layer(inputs)))
    values = np.unique(to_numpy(layer(np.linspace(-3, 3, 5001, dtype="float32"))))
    assert len(values) == 255  # -127 .. 127
    layer(np.abs(inputs) * 10, training=True)
    low, high = layer.range
    assert low == -high
    assert high > 2


def test_ranges_follow_the_batches_in_training_only() -> None:
    inputs = noise(1000) * 5
    layer = quantizer(-1, 2)
    layer(inputs, training=False)
    layer(inputs)
    assert layer.range == (-1, 2)
    layer(inputs, training=True)
    expected = (-0.999 + 0.001 * inputs.min(), 0.999 * 2 + 0.001 * inputs.max())
    np.testing.assert_allclose(layer.range, expected, rtol=1e-6)
    layer(np.abs(inputs) + 1, training=True)  # a batch without 0 counts as one that reaches to 0
    assert layer.range[0] == pytest.approx(0.999 * expected[0], rel=1e-6)


def test_fixed_ranges_stay() -> None:
    layer = FakeQuantize(fixed_range=(0, 255 / 256))
    layer.build((None,))
    output = to_numpy(layer(noise(1000) * 5, training=True))
    assert layer.range == (0, 255 / 256)
    np.testing.assert_array_equal(output * 256, np.round(output * 256))  # TFLite's only scale of a sigmoid


@pytest.mark.parametrize("compiled", [False, True])
def test_training_without_calibration_is_refused(compiled: bool) -> None:
    layer = FakeQuantize(name="rounding")
    layer.build((None,))

    def step(x: tf.Tensor) -> tf.Tensor:
        return layer(x, training=True)

    with pytest.raises(tf.errors.InvalidArgumentError, match=r"rounding is not calibrated\. Call .*calibrate"):
        (tf.function(step) if compiled else step)(tf.constant(noise(10)))
    assert layer.range == (0, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_activations_are_rounded_in_float32(dtype: str) -> None:
    layer = quantizer(-2, 2)
    assert keras.backend.standardize_dtype(layer(tf.cast(noise(10), dtype)).dtype) == "float32"
    assert all(weight.dtype == "float32" for weight in layer.weights)


def test_configuration_comes_back() -> None:
    layer = FakeQuantize(symmetric=True, fixed_range=(-1, 1), name="rounding")
    copy = FakeQuantize.from_config(layer.get_config())
    copy.build((None,))
    assert (copy.symmetric, copy.fixed_range, copy.range, copy.name) == (True, (-1, 1), (-1, 1), "rounding")


PROGRAM = """
import os, sys
import mobiatt_tf.quantization
from mobiatt_tf.errors import UserError
from mobiatt_tf.quantization.fake_quant import FakeQuantize
package = "tensorflow_model_optimization"
assert package not in sys.modules
sys.modules[package] = None
try:
    FakeQuantize().build(())
except UserError as error:
    print(error)
del sys.modules[package]
before = dict(os.environ)
FakeQuantize().build(())
import tensorflow as tf
assert package in sys.modules
assert dict(os.environ) == before, set(os.environ) ^ set(before)
print("TF_USE_LEGACY_KERAS" in os.environ, tf.keras.__version__, tf.keras.layers.Layer.__module__)
"""


@pytest.mark.slow
def test_building_a_layer_loads_tfmot_and_leaves_keras_3() -> None:
    missing, after = run_python("-c", PROGRAM).splitlines()
    assert "pip install mobiatt-tf[quantization]" in missing
    legacy, version, module = after.split()
    assert legacy == "False"
    assert version.startswith("3.")
    assert module.startswith("keras.src")

"""Mobile-Attention in the form that integers bear."""

from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobiatt_tf import ops
from mobiatt_tf.layers import MobileAttention
from mobiatt_tf.quantization import calibrate, quantize_aware
from mobiatt_tf.quantization.attention import Int8Mixing, mobile_attention
from tests.quantization.small import noise, relative_error, to_numpy


def unrounded(_: str, x: Any) -> Any:
    return x


def largest_error(shape: tuple[int, ...], value_dim: int, seed: int = 0, **arguments: Any) -> float:
    """Between the two forms without rounding, relative to the largest output."""
    query, key = noise(*shape, seed=seed), noise(*shape, seed=seed + 1)
    value = noise(*shape[:2], value_dim, shape[3], seed=seed + 2)
    expected = to_numpy(ops.mobile_attention(query, key, value, **arguments))
    actual = to_numpy(mobile_attention(query, key, value, unrounded, **arguments))
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@settings(max_examples=20)
@given(
    heads=st.integers(1, 8),
    dim=st.sampled_from([8, 16]),
    value_dim=st.integers(1, 20),
    tokens=st.integers(2, 60),
    reference_tokens=st.sampled_from([None, 1, 49, 196]),
    seed=st.integers(0, 10_000),
)
def test_equals_the_operator(
    heads: int, dim: int, value_dim: int, tokens: int, reference_tokens: int | None, seed: int
) -> None:
    assert largest_error((2, heads, dim, tokens), value_dim, seed, reference_tokens=reference_tokens) < 1e-5


@pytest.mark.parametrize("shape", [(1, 8, 8, 784), (1, 2, 16, 784), (2, 24, 8, 197)])
@pytest.mark.parametrize("reference_tokens", [None, 196])
def test_equals_the_operator_at_many_tokens(shape: tuple[int, ...], reference_tokens: int | None) -> None:
    assert largest_error(shape, shape[2], reference_tokens=reference_tokens) < 1e-5


def test_another_epsilon_is_used_in_the_sums() -> None:
    assert largest_error((2, 4, 8, 49), 8, epsilon=1e-9) < 1e-5
    query, key, value = (noise(1, 2, 8, 5, seed=seed) for seed in range(3))
    plain, large = (mobile_attention(query, key, value, unrounded, epsilon) for epsilon in (1e-6, 1.0))
    assert relative_error(plain, large) > 0.01


def test_every_tensor_is_rounded_once_and_by_its_own_range() -> None:
    names: list[str] = []

    def remember(name: str, x: Any) -> Any:
        names.append(name)
        return x

    mobile_attention(*(noise(1, 2, 4, 5, seed=seed) for seed in range(3)), remember)
    assert len(names) == len(set(names))
    assert set(names) == Int8Mixing().quantizers.keys()


@pytest.mark.parametrize("tokens", [49, 784])
def test_rounded_attention_stays_near_the_operator(tokens: int) -> None:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((tokens, 32), name="tokens")
    model = keras.Model(inputs, MobileAttention(4, name="attention")(inputs))
    x = noise(4, tokens, 32)
    full, plain = (quantize_aware(model, policy) for policy in ("int8_full", "int8"))
    for copy in (full, plain):
        calibrate(copy, [x])
    error = relative_error(model(x), full(x))
    assert relative_error(model(x), plain(x)) < error < 0.1
    assert len({weight.path for weight in full.weights}) == len(full.weights) == len(plain.weights) + 2 * 24


def test_configuration_comes_back_and_the_core_is_float32() -> None:
    core = Int8Mixing(epsilon=1e-5, reference_tokens=49, dtype="mixed_bfloat16")
    assert core.compute_dtype == "float32"
    copy = Int8Mixing.from_config(core.get_config())
    assert (copy.epsilon, copy.reference_tokens) == (1e-5, 49)
    assert copy.compute_output_shape((2, 4, 8, 9), (2, 4, 8, 9), (2, 4, 6, 9)) == (2, 4, 6, 9)

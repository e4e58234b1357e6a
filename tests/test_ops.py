"""Properties of the operator's pure functions."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobiatt_tf import ops

to_numpy = keras.ops.convert_to_numpy

SHAPES = st.tuples(st.integers(1, 2), st.sampled_from([1, 2, 5]), st.sampled_from([1, 3, 8]), st.integers(2, 40))


def random_heads(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> tuple[np.ndarray, ...]:
    """Query, key and value [B, H, d, N] before the sigmoid."""
    generator = np.random.default_rng(seed)
    return tuple((scale * generator.normal(size=shape)).astype("float32") for _ in range(3))


def published_form(query: np.ndarray, key: np.ndarray, value: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    """The equations of docs/operator.md word for word, in float64, tokens before channels as published."""
    q, k, v = (x.astype("float64").transpose(0, 1, 3, 2) for x in (query, key, value))  # [B, H, N, d]
    q, k = 1 / (1 + np.exp(-q)), 1 / (1 + np.exp(-k))
    tokens = q.shape[2]
    incoming = 1 / ((q + epsilon) * (k.sum(1, keepdims=True) + epsilon)).sum(-1, keepdims=True)
    outgoing = 1 / ((k + epsilon) * (q.sum(1, keepdims=True) + epsilon)).sum(-1, keepdims=True)
    conserved_sink = ((q + epsilon) * ((k * outgoing).sum(1, keepdims=True) + epsilon)).sum(-1, keepdims=True)
    conserved_source = ((k + epsilon) * ((q * incoming).sum(1, keepdims=True) + epsilon)).sum(-1, keepdims=True)
    conserved_source = np.clip(conserved_source, -1, 1)
    exponential = np.exp(conserved_source)
    competition = tokens * exponential / exponential.sum(2, keepdims=True)
    mixed = (q * incoming) @ (k.transpose(0, 1, 3, 2) @ (v * competition)) / (1 + np.exp(-conserved_sink))
    return mixed.transpose(0, 1, 3, 2)  # [B, H, d, N]


@settings(deadline=None, max_examples=15)
@given(shape=SHAPES, seed=st.integers(0, 10_000))
def test_equals_the_published_equations_at_any_shape(shape: tuple[int, ...], seed: int) -> None:
    heads = random_heads(shape, seed)
    expected = published_form(*heads)
    actual = to_numpy(ops.mobile_attention(*heads))
    assert np.max(np.abs(actual - expected)) <= 1e-5 * np.max(np.abs(expected))


@settings(deadline=None, max_examples=10)
@given(heads=st.sampled_from([1, 2, 4]), tokens=st.integers(1, 9), seed=st.integers(0, 10_000))
def test_merging_undoes_splitting(heads: int, tokens: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(2, tokens, 8)).astype("float32")
    split = ops.split_heads(x, heads)
    assert tuple(split.shape) == (2, heads, 8 // heads, tokens)
    np.testing.assert_array_equal(to_numpy(ops.merge_heads(split)), x)


@settings(deadline=None, max_examples=10)
@given(shape=SHAPES, seed=st.integers(0, 10_000))
def test_permuting_tokens_permutes_the_output(shape: tuple[int, ...], seed: int) -> None:
    heads = random_heads(shape, seed)
    order = np.random.default_rng(seed).permutation(shape[-1])
    plain = to_numpy(ops.mobile_attention(*heads))[..., order]
    permuted = to_numpy(ops.mobile_attention(*(x[..., order] for x in heads)))
    np.testing.assert_allclose(permuted, plain, rtol=1e-4, atol=1e-5 * np.abs(plain).max())


@settings(deadline=None, max_examples=10)
@given(shape=SHAPES, seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_flows_are_conserved_and_bounded(shape: tuple[int, ...], seed: int, scale: float) -> None:
    query, key, _ = (1 / (1 + np.exp(-x)) for x in random_heads(shape, seed, scale))
    flow = ops.flows(query, key)
    for part in flow:
        assert tuple(part.shape) == (shape[0], shape[1], 1, shape[3])
        assert np.all(to_numpy(part) > 0)
    assert np.all(to_numpy(flow.conserved_outgoing) <= 1)
    # What all heads send to all heads is conserved: the conserved sinks average one over heads.
    np.testing.assert_allclose(to_numpy(flow.conserved_incoming).mean(axis=1), 1, atol=1e-2)
    competition = to_numpy(ops.competition(flow.conserved_outgoing))
    np.testing.assert_allclose(competition.mean(axis=-1), 1, rtol=1e-5)
    allocation = to_numpy(ops.allocation(flow.conserved_incoming))
    assert np.all((allocation > 0.5) & (allocation < 1))


def test_one_head_has_no_competition() -> None:
    query, key, _ = random_heads((2, 1, 8, 30))
    flow = ops.flows(keras.ops.sigmoid(query), keras.ops.sigmoid(key))
    np.testing.assert_allclose(to_numpy(ops.competition(flow.conserved_outgoing)), 1, rtol=1e-5)


def test_reference_tokens_scale_the_output() -> None:
    heads = random_heads((1, 4, 8, 100))
    published = to_numpy(ops.mobile_attention(*heads))
    np.testing.assert_array_equal(to_numpy(ops.mobile_attention(*heads, reference_tokens=100)), published)
    quarter = to_numpy(ops.mobile_attention(*heads, reference_tokens=25))
    np.testing.assert_allclose(quarter, published / 4, rtol=1e-6)


def test_repeating_the_tokens_changes_nothing_with_reference_tokens() -> None:
    """Every token twice: the published sum doubles, the rescaled one stays (what higher resolution does)."""
    heads = random_heads((1, 4, 8, 50))
    twice = [np.concatenate([x, x], axis=-1) for x in heads]
    once = to_numpy(ops.mobile_attention(*heads, reference_tokens=50))
    np.testing.assert_allclose(
        to_numpy(ops.mobile_attention(*twice, reference_tokens=50))[..., :50], once, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(to_numpy(ops.mobile_attention(*twice))[..., :50], 2 * once, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 3e-3), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_sixteen_bits_survive_3136_tokens(dtype: str, tolerance: float, scale: float) -> None:
    """N = 3136 (PVTv2's first stage at 224): no overflow, epsilon not lost, close to float64."""
    query, key, value = random_heads((1, 16, 4, 3136))
    value = value * scale
    rounded = [to_numpy(keras.ops.cast(keras.ops.cast(x, dtype), "float32")) for x in (query, key, value)]
    expected = published_form(*rounded)
    output = ops.mobile_attention(*(keras.ops.cast(x, dtype) for x in (query, key, value)))
    assert keras.backend.standardize_dtype(output.dtype) == dtype
    output = to_numpy(keras.ops.cast(output, "float32"))
    assert np.all(np.isfinite(output))
    assert np.max(np.abs(output - expected)) <= tolerance * np.max(np.abs(expected))


def test_flows_in_sixteen_bits_equal_flows_in_float32() -> None:
    """With all sigmoids at 0 only epsilon is left: 1 / (d eps (H 0 + eps)) needs float32, in float16 it is infinite."""
    zeros = np.zeros((1, 2, 4, 3), "float16")
    flow = ops.flows(zeros, zeros, epsilon=1e-6)
    np.testing.assert_allclose(to_numpy(flow.incoming), 1 / (4 * 1e-12), rtol=1e-5)
    with np.errstate(divide="ignore"):
        assert np.isinf(1 / np.sum(np.float16(1e-6) * np.float16(1e-6) * np.ones(4, "float16")))


def test_softmax_attention_equals_its_definition() -> None:
    query, key, value = random_heads((2, 3, 8, 17))
    logits = np.einsum("bhdn,bhdm->bhnm", query, key) / np.sqrt(8)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("bhnm,bhdm->bhdn", weights, value)
    np.testing.assert_allclose(to_numpy(ops.softmax_attention(query, key, value)), expected, rtol=1e-4, atol=1e-5)


def test_linear_attention_equals_its_definition() -> None:
    query, key, value = random_heads((2, 3, 8, 17))
    phi_query, phi_key = (np.where(x > 0, x + 1, np.exp(x)) for x in (query, key))
    weights = np.einsum("bhdn,bhdm->bhnm", phi_query, phi_key)
    expected = np.einsum("bhnm,bhdm->bhdn", weights / weights.sum(-1, keepdims=True), value)
    np.testing.assert_allclose(to_numpy(ops.linear_attention(query, key, value)), expected, rtol=1e-4, atol=1e-5)


def test_gelu_is_the_exact_one() -> None:
    x = np.linspace(-5, 5, 101).astype("float32")
    np.testing.assert_allclose(to_numpy(ops.gelu(x)), to_numpy(keras.ops.gelu(x, approximate=False)), atol=2e-6)

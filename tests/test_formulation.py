"""Every way of writing Mobile-Attention into a graph is the same function."""

import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_models import DeiTMobiAtt
from mobiatt_tf import quantization
from mobiatt_tf.formulation import Formulation, heads_in_group
from mobiatt_tf.layers import DownsamplingConvAttention, MobileAttention, MobileConvAttention, SoftmaxAttention

to_numpy = keras.ops.convert_to_numpy
GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))

FORMULATIONS: dict[str, dict[str, Any]] = {  # chunk_tokens as a share of the tokens
    "grouped": {},
    "single heads": {"group_width": 1},
    "all heads together": {"group_width": 10_000},
    "joint projection": {"joint_projection": True},
    "chunks": {"chunk_tokens": 0.3, "chunk_from": 1},
    "chunks, joint projection": {"chunk_tokens": 0.3, "chunk_from": 1, "joint_projection": True},
}


def formulation(name: str, tokens: int) -> Formulation:
    choices = dict(FORMULATIONS[name])
    if "chunk_tokens" in choices:
        choices["chunk_tokens"] = math.ceil(tokens * choices["chunk_tokens"])
    return Formulation(**choices)


def make_quantized(policy: str) -> keras.Model:
    return quantization.quantize_aware(DeiTMobiAtt("quickstart"), policy)


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", FORMULATIONS)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_equals_the_published_operator(path: Path, name: str) -> None:
    golden = np.load(path)
    x = golden["x"].astype("float32")
    layer = MobileAttention(
        int(golden["num_heads"]), golden["query_kernel"].shape[1], golden["out_kernel"].shape[1], dropout=0.0
    )
    layer.build(x.shape)
    for child in ("query", "key", "value", "out"):
        getattr(layer, child).set_weights([golden[f"{child}_kernel"], golden[f"{child}_bias"]])
    layer.use_formulation(formulation(name, x.shape[1]))
    assert relative(to_numpy(layer(x)), golden["y"]) < 1e-5


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(2, 40),
    heads=st.integers(1, 6),
    key_dim=st.integers(1, 5),
    value_factor=st.integers(1, 4),
    group_width=st.integers(1, 64),
    chunk_tokens=st.integers(4, 40),
    reference_tokens=st.none() | st.integers(1, 100),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_any_cut_give_the_same(
    tokens: int,
    heads: int,
    key_dim: int,
    value_factor: int,
    group_width: int,
    chunk_tokens: int,
    reference_tokens: int | None,
    seed: int,
) -> None:
    """Also with values wider than keys, as EfficientFormerV2 has them."""
    random = np.random.default_rng(seed)
    width = heads * key_dim
    layer = MobileConvAttention(heads, width, width * value_factor, reference_tokens=reference_tokens)
    x = random.normal(size=(2, 1, tokens, 4)).astype("float32")
    layer.build(x.shape)
    maps = [random.normal(0, 2, (2, tokens, size)).astype("float32") for size in (width, width, width * value_factor)]
    expected = to_numpy(layer.attend(*maps))
    layer.use_formulation(Formulation(group_width, chunk_tokens, chunk_from=1))
    assert relative(to_numpy(layer.attend(*maps)), expected) < 2e-5


@given(
    tokens=st.integers(1, 20_000), chunk_tokens=st.integers(1, 5_000), width=st.integers(1, 64), most=st.integers(1, 64)
)
def test_chunks_cover_every_token_once_and_are_nearly_equal(
    tokens: int, chunk_tokens: int, width: int, most: int
) -> None:
    chunks = Formulation(chunk_tokens=chunk_tokens, chunk_from=100_000, most_chunks=most).chunks(tokens, width)
    assert [start for start, _ in chunks] == [0, *(stop for _, stop in chunks[:-1])]
    assert chunks[-1][1] == tokens
    sizes = [stop - start for start, stop in chunks]
    assert max(sizes) - min(sizes) <= 1
    wanted = 1 if tokens * width < 100_000 else min(math.ceil(tokens / chunk_tokens), most)
    assert len(chunks) == wanted
    assert wanted in (1, most) or max(sizes) <= chunk_tokens


@given(num_heads=st.integers(1, 96), head_dim=st.integers(1, 64), group_width=st.integers(1, 256))
def test_groups_hold_whole_heads(num_heads: int, head_dim: int, group_width: int) -> None:
    heads = heads_in_group(num_heads, head_dim, group_width)
    assert num_heads % heads == 0
    assert heads == 1 or heads * head_dim <= group_width


@pytest.mark.parametrize("name", ["group_width", "chunk_tokens", "chunk_from", "most_chunks"])
def test_wrong_choices_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, but {name}=0"):
        Formulation(**{name: 0})


def test_attention_of_one_sequence_to_another_keeps_the_published_form() -> None:
    layer = MobileAttention(4)
    query, key = (np.random.default_rng(seed).normal(size=(1, 9, 16)).astype("float32") for seed in (0, 1))
    expected = to_numpy(layer(query, key))
    layer.use_formulation(Formulation(joint_projection=True))
    np.testing.assert_array_equal(to_numpy(layer(query, key)), expected)


@pytest.mark.parametrize("keys", [None, 5])
def test_softmax_attention_is_the_same(keys: int | None) -> None:
    layer = SoftmaxAttention(4)
    random = np.random.default_rng(0)
    query = random.normal(size=(2, 9, 16)).astype("float32")
    others = () if keys is None else (random.normal(size=(2, keys, 16)).astype("float32"),)
    expected = to_numpy(layer(query, *others))
    for joint in (False, True):
        layer.use_formulation(Formulation(joint_projection=joint))
        assert relative(to_numpy(layer(query, *others)), expected) < 1e-5


def test_one_layer_serves_sequences_of_several_lengths() -> None:
    layer = MobileAttention(2)
    sequences = [np.random.default_rng(0).normal(size=(1, tokens, 8)).astype("float32") for tokens in (6, 13)]
    expected = [to_numpy(layer(x)) for x in sequences]
    layer.use_formulation(Formulation(chunk_tokens=4, chunk_from=1))
    for x, y in zip(sequences, expected, strict=True):
        assert relative(to_numpy(layer(x)), y) < 1e-5


def test_projections_that_cannot_be_joined_are_not() -> None:
    layer = SoftmaxAttention(4)
    query, key = np.zeros((1, 9, 16), "float32"), np.zeros((1, 5, 8), "float32")
    layer(query, key)
    layer.use_formulation(Formulation(joint_projection=True))
    assert layer.joint is None
    twin = make_quantized("int8").get_layer("block0_attention")
    twin.use_formulation(Formulation(joint_projection=True))
    assert twin.joint is None  # its projections round


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_downsampling_attention_in_half_precision(dtype: str) -> None:
    layer = DownsamplingConvAttention(8, 2, 8, 16, dtype=dtype)
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 8)).astype("float32")
    expected = to_numpy(keras.ops.cast(layer(x), "float32"))
    layer.use_formulation(Formulation())
    assert relative(to_numpy(keras.ops.cast(layer(x), "float32")), expected) < 3e-2


def test_half_precision_holds_long_sequences() -> None:
    """Sums over 12,544 tokens stay far below float16's 65504, in one chunk and in many."""
    x = np.random.default_rng(0).normal(size=(1, 12_544, 16)).astype("float32")
    for chosen in (Formulation(), Formulation(chunk_tokens=4000, chunk_from=1)):
        layer = MobileAttention(2, reference_tokens=196, dtype="float16", name="b")
        reference = MobileAttention(2, reference_tokens=196, name="c")
        for each in (layer, reference):
            each.build(x.shape)
        layer.set_weights(reference.get_weights())
        expected = to_numpy(reference(x))
        layer.use_formulation(chosen)
        assert relative(to_numpy(layer(x)).astype("float32"), expected) < 2e-2

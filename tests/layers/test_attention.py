"""The attention layers: shapes, errors, precisions, compilation, saving, introspection."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from mobiatt_tf import LinearAttention, MobileAttention, SoftmaxAttention, ops

ALL = [MobileAttention, SoftmaxAttention, LinearAttention]
to_numpy = keras.ops.convert_to_numpy


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@pytest.mark.parametrize("kind", ALL)
def test_shape_parameters_and_children(kind: type) -> None:
    layer = kind(4, model_dim=16, output_dim=24)
    x = tokens(2, 9, 8)
    assert tuple(layer(x).shape) == (2, 9, 24) == layer.compute_output_shape((2, 9, 8))
    assert layer.count_params() == 3 * (8 * 16 + 16) + 16 * 24 + 24
    for name, shape in {"query": (8, 16), "key": (8, 16), "value": (8, 16), "out": (16, 24)}.items():
        child = getattr(layer, name)
        assert isinstance(child, keras.layers.Dense)
        assert tuple(child.kernel.shape) == shape


@pytest.mark.parametrize("kind", ALL)
def test_projections_start_different(kind: type) -> None:
    layer = kind(4)
    layer.build((1, 5, 16))
    kernels = [to_numpy(getattr(layer, name).kernel) for name in ("query", "key", "value", "out")]
    assert len({kernel.tobytes() for kernel in kernels}) == 4


@pytest.mark.parametrize("kind", ALL)
def test_separate_inputs(kind: type) -> None:
    layer = kind(2, dropout=0.0)
    query, key, value = (tokens(2, 7, 8, seed=seed) for seed in range(3))
    separate = to_numpy(layer(query, key, value))
    assert separate.shape == (2, 7, 8)
    assert np.abs(separate - to_numpy(layer(query))).max() > 1e-3
    np.testing.assert_array_equal(to_numpy(layer(query, key)), to_numpy(layer(query, key, key)))


def test_mobile_attention_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match=r"query has 49 and key 196\. Use SoftmaxAttention"):
        MobileAttention(2)(tokens(1, 49, 8), tokens(1, 196, 8))


@pytest.mark.parametrize("kind", [SoftmaxAttention, LinearAttention])
def test_others_take_unequal_lengths(kind: type) -> None:
    assert tuple(kind(2)(tokens(1, 49, 8), tokens(1, 196, 8)).shape) == (1, 49, 8)


@pytest.mark.parametrize("kind", ALL)
def test_key_and_value_of_unequal_lengths_are_refused(kind: type) -> None:
    with pytest.raises(ValueError, match="key has 5 and value 6"):
        kind(2)(tokens(1, 5, 8), tokens(1, 5, 8), tokens(1, 6, 8))


def test_lengths_are_checked_again_after_building() -> None:
    layer = MobileAttention(2)
    layer(tokens(1, 5, 8))
    with pytest.raises(ValueError, match="query has 5 and key 6"):
        layer(tokens(1, 5, 8), tokens(1, 6, 8))


@pytest.mark.parametrize("kind", ALL)
def test_unequal_batches_and_no_tokens_are_refused(kind: type) -> None:
    with pytest.raises(ValueError, match="must have the same batch size"):
        kind(2)(tokens(2, 5, 8), tokens(1, 5, 8))
    with pytest.raises(ValueError, match="at least one token"):
        kind(2)(tokens(1, 0, 8))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("shape", [(2, 8), (2, 3, 3, 3, 8)])
def test_wrong_rank_is_refused(kind: type, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"as \[batch, tokens, channels\] or as a feature map .* query has shape"):
        kind(2)(tokens(*shape))


@pytest.mark.parametrize("kind", ALL)
def test_a_feature_map_is_its_tokens_row_by_row(kind: type) -> None:
    layer = kind(2)
    maps = tokens(2, 3, 5, 8)
    flat = to_numpy(layer(maps.reshape(2, 15, 8)))
    np.testing.assert_allclose(to_numpy(layer(maps)), flat.reshape(2, 3, 5, 8), rtol=1e-5, atol=1e-6)
    assert layer.compute_output_shape((2, 3, 5, 8)) == (2, 3, 5, 8)
    with pytest.raises(ValueError, match="height and width of a feature map must be known"):
        kind(2)(keras.Input((None, 5, 8)))


@pytest.mark.parametrize("kind", [SoftmaxAttention, LinearAttention])
def test_keys_may_come_from_a_coarser_map(kind: type) -> None:
    layer = kind(2)
    fine, coarse = tokens(2, 4, 6, 8), tokens(2, 2, 3, 8)
    flat = to_numpy(layer(fine.reshape(2, 24, 8), coarse.reshape(2, 6, 8)))
    np.testing.assert_allclose(to_numpy(layer(fine, coarse)), flat.reshape(2, 4, 6, 8), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ALL)
def test_heads_that_do_not_divide_are_refused(kind: type) -> None:
    with pytest.raises(
        ValueError, match=r"num_heads=5 and model_dim=12 were given\. Allowed for 12: 1, 2, 3, 4, 6, 12"
    ):
        kind(5, model_dim=12)
    with pytest.raises(ValueError, match="num_heads=3 and model_dim=8"):
        kind(3)(tokens(1, 4, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 0}, "num_heads must be a whole number of at least 1"),
        ({"num_heads": 2.0}, "num_heads must be a whole number"),
        ({"num_heads": 2, "output_dim": -1}, "output_dim must be a whole number of at least 1"),
        ({"num_heads": 2, "dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"num_heads": 2, "epsilon": -1e-6}, "epsilon must not be negative"),
        ({"num_heads": 2, "reference_tokens": 0}, "reference_tokens must be None or at least 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MobileAttention(**arguments)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(("policy", "tolerance"), [("mixed_bfloat16", 0.04), ("mixed_float16", 0.004)])
def test_mixed_precision_stays_close_at_3136_tokens(kind: type, policy: str, tolerance: float) -> None:
    x = tokens(1, 3136, 32)
    full, mixed = kind(8, dropout=0.0, dtype="float32"), kind(8, dropout=0.0, dtype=policy)
    expected = to_numpy(full(x))
    mixed.build(x.shape)
    mixed.set_weights(full.get_weights())
    output = mixed(x)
    assert keras.backend.standardize_dtype(output.dtype) == policy.removeprefix("mixed_")
    assert all(weight.dtype == "float32" for weight in mixed.weights)
    output = to_numpy(keras.ops.cast(output, "float32"))
    assert np.isfinite(output).all()
    assert np.abs(output - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("kind", ALL)
def test_jit_compile(kind: type) -> None:
    layer = kind(4, dropout=0.0)
    x = tokens(2, 10, 16)
    expected = to_numpy(layer(x))
    compiled = tf.function(lambda x: layer(x, training=True), jit_compile=True)
    np.testing.assert_allclose(to_numpy(compiled(x)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_open_token_and_batch_dimensions(kind: type) -> None:
    layer = kind(4, dropout=0.0)
    inputs = keras.Input((None, 16))
    model = keras.Model(inputs, layer(inputs))
    for batch, count in ((1, 5), (3, 12)):
        x = tokens(batch, count, 16)
        np.testing.assert_allclose(to_numpy(model(x)), to_numpy(layer(x)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ALL)
def test_saved_and_loaded(kind: type, tmp_path: Path) -> None:
    special = {"epsilon": 1e-5, "reference_tokens": 40} if kind is MobileAttention else {}
    inputs = keras.Input((10, 8))
    model = keras.Model(inputs, kind(4, 16, 12, dropout=0.1, **special)(inputs))
    x = tokens(2, 10, 8)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))
    assert loaded.layers[1].get_config() == model.layers[1].get_config()


def test_dropout_follows_the_projection_and_acts_in_training_only() -> None:
    layer = MobileAttention(2, dropout=0.5)
    x = tokens(4, 16, 32)
    evaluated = to_numpy(layer(x, training=False))
    np.testing.assert_array_equal(evaluated, to_numpy(layer(x)))
    trained = to_numpy(layer(x, training=True))
    kept = trained != 0
    assert 0.35 < 1 - kept.mean() < 0.65
    np.testing.assert_allclose(trained[kept], 2 * evaluated[kept], rtol=1e-5)


def test_introspection_names_what_the_call_uses() -> None:
    layer = MobileAttention(4, dropout=0.0)
    x = tokens(2, 11, 16)
    output = to_numpy(layer(x))
    seen = {name: to_numpy(value) for name, value in layer.introspect(x).items()}
    assert set(seen) == {
        "incoming", "outgoing", "conserved_incoming", "conserved_outgoing", "allocation", "competition"
    }  # fmt: skip
    assert all(value.shape == (2, 4, 11) and value.dtype == np.float32 for value in seen.values())
    # The parts put together by hand give the layer's output.
    query, key, value = (to_numpy(part) for part in layer.project(x))
    query, key = 1 / (1 + np.exp(-query)), 1 / (1 + np.exp(-key))
    context = np.einsum("bhdn,bhn,bhen->bhde", key, seen["competition"], value)
    mixed = np.einsum("bhn,bhdn,bhde->bhen", seen["allocation"] * seen["incoming"], query, context)
    by_hand = to_numpy(layer.out(ops.merge_heads(mixed.astype("float32"))))
    np.testing.assert_allclose(output, by_hand, rtol=1e-4, atol=1e-4 * np.abs(by_hand).max())


def test_trains_under_mixed_float16_with_jit() -> None:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((49, 16))
    hidden = MobileAttention(4, dtype="mixed_float16")(inputs)
    outputs = keras.layers.Dense(1, dtype="float32")(keras.layers.GlobalAveragePooling1D()(hidden))
    model = keras.Model(inputs, outputs)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01))
    model.compile(optimizer, loss="mse", jit_compile=True)
    x = tokens(64, 49, 16)
    target = x.mean(axis=(1, 2), keepdims=True)[:, 0] * 10
    losses = model.fit(x, target, epochs=15, verbose=0).history["loss"]
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0] / 2

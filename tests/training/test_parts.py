"""Recipes, strategies, schedule, weight decay, average and loss."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_models
from mobiatt_tf import training
from mobiatt_tf.training.ema import WeightAverage, decay_at
from mobiatt_tf.training.losses import classification_loss, inference_logits
from mobiatt_tf.training.optimizer import is_decayed, make_optimizer, make_schedule
from tests.training import small


def test_unknown_names_list_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="allowed are one, mirrored"):
        training.make_strategy("two")
    with pytest.raises(ValueError, match="allowed are paper, deit, pvt_v2, efficientformer_v2, fine_tune, quickstart"):
        training.make_recipe("newspaper")
    with pytest.raises(ValueError, match=r"no field epoch; its fields are epochs"):
        training.make_recipe("paper", epoch=3)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"warmup_epochs": 5},
        {"label_smoothing": 1.0},
        {"ema_decay": -0.1},
        {"minimum_learning_rate": 1.0},
        {"precision": "float16"},
        {"augmentation": "bogus"},
        {"layer_decay": 0.0},
        {"layer_decay": 1.1},
        {"adaptive_clip": -0.1},
        {"distillation": "soft"},
        {"distillation_share": 1.1},
    ],
)
def test_recipe_refuses(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        small.recipe(**change)


@settings(max_examples=20)
@given(
    epochs=st.integers(1, 6),
    steps=st.integers(1, 6),
    warmup=st.floats(0, 1),
    peak=st.floats(1e-5, 1.0),
    end=st.floats(0, 1),
)
def test_schedule_rises_to_the_peak_and_falls_to_the_minimum(
    epochs: int, steps: int, warmup: float, peak: float, end: float
) -> None:
    recipe = small.recipe(
        epochs=epochs,
        warmup_epochs=warmup * epochs,
        learning_rate=peak,
        warmup_learning_rate=peak / 100,
        minimum_learning_rate=peak * end,
    )
    schedule = make_schedule(recipe, steps)
    rates = np.array([float(schedule(step)) for step in range(epochs * steps)])
    top = min(round(warmup * epochs * steps), epochs * steps - 1)
    assert np.all(rates <= peak * (1 + 1e-5))
    assert float(schedule(top)) == pytest.approx(peak, rel=1e-5)
    assert np.all(np.diff(rates[: top + 1]) > 0)
    assert np.all(np.diff(rates[top:]) <= peak * 1e-6)
    if top < epochs * steps - 1:
        assert float(schedule(epochs * steps - 1)) == pytest.approx(peak * end, rel=1e-4, abs=peak * 1e-6)


def test_deit_decays_kernels_and_nothing_else() -> None:
    model = keras_models.DeiTMobiAtt(variant="quickstart", num_classes=10, distilled=True)
    decayed = {v.path for v in model.trainable_variables if is_decayed(v.path, len(v.shape))}
    spared = {v.path for v in model.trainable_variables} - decayed
    assert decayed
    assert all(path.endswith("kernel") for path in decayed)
    assert not any(path.endswith("kernel") for path in spared)
    assert any("position_embedding" in path for path in spared)
    assert any("class_token" in path for path in spared)


def test_optimizer_moves_only_the_decayed_by_decay_alone() -> None:
    """With gradients of zero AdamW changes exactly what decays, by learning rate times weight decay."""
    model = small.make_model()
    for variable in model.trainable_variables:
        variable.assign(keras.ops.ones_like(variable))
    optimizer = make_optimizer(small.recipe(warmup_epochs=0.0, weight_decay=0.5), 6, model)
    optimizer.apply([tf.zeros(variable.shape) for variable in model.trainable_variables], model.trainable_variables)
    for variable in model.trainable_variables:
        expected = 1 - 1e-2 * 0.5 if variable.name == "kernel" else 1.0
        np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-6, err_msg=variable.path)


def test_average_follows_all_float_weights_and_gives_them_back() -> None:
    model = small.make_model()
    generator = np.random.default_rng(0)
    average = WeightAverage(model, decay=0.9)
    expected = [weight.numpy().astype(np.float64) for weight in model.weights]
    assert any("moving_variance" in weight.path for weight in model.weights)
    for step in range(30):
        for weight in model.weights:
            weight.assign(generator.normal(size=weight.shape).astype(np.float32))
        average.update(tf.constant(step))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = [decay * old + (1 - decay) * w.numpy() for old, w in zip(expected, model.weights, strict=True)]
    own = [weight.numpy() for weight in model.weights]
    with average.applied():
        for weight, value in zip(model.weights, expected, strict=True):
            np.testing.assert_allclose(weight.numpy(), value, atol=1e-5)
    with pytest.raises(RuntimeError, match="stop"), average.applied():
        raise RuntimeError("stop")
    for weight, value in zip(model.weights, own, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)


def test_decay_without_warmup_is_constant() -> None:
    assert float(decay_at(0, 0.9, warmup=False)) == pytest.approx(0.9)
    assert float(decay_at(0, 0.9, warmup=True)) == pytest.approx(0.1)


@given(smoothing=st.floats(0, 0.9), seed=st.integers(0, 99))
def test_loss_is_keras_loss(smoothing: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(5, 4)).astype(np.float32) * 3
    labels = generator.integers(0, 4, 5).astype(np.int32)
    expected = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing, reduction="none")(
        np.eye(4, dtype=np.float32)[labels], logits
    )
    np.testing.assert_allclose(
        classification_loss(logits, tf.constant(labels), smoothing), expected, rtol=2e-5, atol=1e-6
    )
    soft = tf.constant(np.eye(4, dtype=np.float32)[labels])
    np.testing.assert_allclose(classification_loss(logits, soft, smoothing), expected, rtol=2e-5, atol=1e-6)


def test_two_heads_learn_and_answer_together() -> None:
    first, second = tf.constant([[1.0, 2.0]]), tf.constant([[3.0, -1.0]], tf.bfloat16)
    label = tf.constant([1])
    both = classification_loss((first, second), label)
    assert both.dtype == tf.float32
    mean = (classification_loss(first, label) + classification_loss(second, label)) / 2
    np.testing.assert_allclose(both, mean, rtol=1e-6)
    np.testing.assert_allclose(inference_logits((first, second)), [[2.0, 0.5]])

"""Semantic FPN: its head by hand, sizes, dropout, gradients, errors."""

from typing import Any

import keras
import numpy as np
import pytest

import keras_models
from mobiatt_tf.complexity import count_macs, trainable_parameters
from tests.models.dense import FAMILIES, awake, images, toy
from tests.quantization.small import randomize_norms

to_numpy = keras.ops.convert_to_numpy


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_have_the_places_of_the_first_stage(family: str) -> None:
    model = toy("segmentation", family)
    assert model.name == f"semantic_fpn_{family}_quickstart_mobile"
    assert model(images()).shape == (2, 24, 32, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "parameters", "macs"), [("b0", 7.6, 25.0), ("b1", 17.8, 34.2)])
def test_published_counts(variant: str, parameters: float, macs: float) -> None:
    """Millions and billions of PVTv2 with Semantic FPN at 512 x 512, as Zhang et al. (EMOv2, 2024) list them."""
    model = keras_models.SemanticFPNMobiAtt("pvt_v2", variant, attention="softmax")
    assert trainable_parameters(model) / 1e6 == pytest.approx(parameters, abs=0.06)
    assert count_macs(model) / 1e9 == pytest.approx(macs, abs=0.1)


def test_the_head_by_hand() -> None:
    """As FPNHead of mmsegmentation, from the layers' weights: convolutions, batch norm, ReLU, bilinear, sum, 1 x 1."""
    model = awake(toy("segmentation", "pvt_v2"))
    randomize_norms(model)
    pyramid = keras.Model(model.input, [model.get_layer(f"fpn_output{stage}").output for stage in (1, 2, 3, 4)])
    total: Any = 0
    for stage, x in enumerate(pyramid(images()), start=1):
        for step in range(max(1, stage - 1)):
            layer = model.get_layer(f"segment_stage{stage}_conv{step}")
            x = keras.ops.conv(x, layer.conv.kernel, padding="same") + layer.conv.bias
            gamma, beta, mean, variance = (to_numpy(w) for w in layer.bn.weights)
            x = keras.ops.relu((x - mean) / np.sqrt(variance + 1e-5) * gamma + beta)
            if stage > 1:
                size = (2 * x.shape[1], 2 * x.shape[2])
                x = keras.ops.image.resize(x, size, interpolation="bilinear", data_format="channels_last")
        total = total + x  # [B, 24, 32, 8]
    kernel, bias = model.get_layer("segment_logits").get_weights()
    expected = to_numpy(total) @ kernel[0, 0] + bias
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(model(images()), expected, atol=1e-4 * np.abs(expected).max())


def test_dropout_takes_whole_channels_and_only_in_training() -> None:
    model = toy("segmentation", "pvt_v2", dropout=0.5, drop_path=0.0)
    layer = model.get_layer("segment_dropout")
    x = np.ones((4, 3, 2, 8), "float32")
    dropped = to_numpy(layer(x, training=True))
    assert set(np.unique(dropped)) == {0, 2}
    assert all(len(np.unique(dropped[n, :, :, c])) == 1 for n in range(4) for c in range(8))
    np.testing.assert_array_equal(layer(x, training=False), x)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_learns(family: str) -> None:
    import tensorflow as tf

    model = awake(toy("segmentation", family, drop_path=0.0))
    labels = np.random.default_rng(0).integers(0, 3, (2, 24, 32))
    with tf.GradientTape() as tape:
        logits = model(images(), training=True)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
    gradients = tape.gradient(loss, [weight.value for weight in model.trainable_weights])
    still = [
        weight.path
        for weight, gradient in zip(model.trainable_weights, gradients, strict=True)
        if gradient is None or not np.any(gradient)
    ]
    assert still == []


@pytest.mark.parametrize("arguments", [{"num_classes": 0}, {"channels": 0}, {"head_channels": 0}])
def test_numbers_that_cannot_be_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="A segmenter needs num_classes, channels and head_channels of 1 or more"):
        keras_models.SemanticFPNMobiAtt(**arguments)

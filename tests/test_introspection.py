"""Flows of a whole model by layer name."""

import keras
import numpy as np
import pytest

from keras_models import DeiTMobiAtt
from mobiatt_tf import MobileAttention
from mobiatt_tf.introspection import model_flows


def test_every_block_shows_what_it_does() -> None:
    model = DeiTMobiAtt("quickstart", num_classes=3)
    images = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype("float32")
    seen = model_flows(model, images)
    assert list(seen) == [f"block{index}_attention" for index in range(4)]
    tokens = model.get_layer("position_embedding").embedding.shape[1]
    heads = model.get_layer("block0_attention").num_heads
    for flows in seen.values():
        assert all(value.shape == (2, heads, tokens) for value in flows.values())
        np.testing.assert_allclose(flows["competition"].mean(axis=-1), 1, rtol=1e-4)


def test_the_last_block_sees_what_the_model_computes() -> None:
    """Run the model up to the last block by hand and ask its layer directly."""
    model = DeiTMobiAtt("quickstart", num_classes=3)
    images = np.random.default_rng(0).normal(size=(1, 28, 28, 3)).astype("float32")
    normed = keras.Model(model.input, model.get_layer("block3_norm1").output)(images)
    by_hand = model.get_layer("block3_attention").introspect(normed)
    for name, value in model_flows(model, images)["block3_attention"].items():
        np.testing.assert_allclose(value, keras.ops.convert_to_numpy(by_hand[name]), rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_single_layer_with_query_and_key(batch: int) -> None:
    """One layer only, and inputs of different widths."""
    query, key = keras.Input((9, 32)), keras.Input((9, 16))
    layer = MobileAttention(4)
    model = keras.Model([query, key], layer(query, key))
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=(batch, 9, width)).astype("float32") for width in (32, 16)]
    (flows,) = model_flows(model, arrays).values()
    expected = layer.introspect(*arrays)
    for name, value in flows.items():
        np.testing.assert_allclose(value, keras.ops.convert_to_numpy(expected[name]), rtol=1e-5)


def test_a_layer_called_twice_is_refused() -> None:
    inputs = keras.Input((9, 16))
    layer = MobileAttention(4, name="twice")
    with pytest.raises(ValueError, match="twice is called more than once"):
        model_flows(keras.Model(inputs, layer(layer(inputs))), np.zeros((1, 9, 16), "float32"))


def test_a_model_without_the_operator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no MobileAttention layer; its layers are .*SoftmaxAttention"):
        model_flows(DeiTMobiAtt("quickstart", num_classes=3, attention="softmax"), np.zeros((1, 28, 28, 3)))

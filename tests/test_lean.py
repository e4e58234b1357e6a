"""Lean models compute the same with less."""

from collections import Counter
from typing import Any

import keras
import numpy as np
import pytest

from keras_models import DeiTMobiAtt, EfficientFormerV2MobiAtt, PVTv2MobiAtt
from mobiatt_tf import layers
from mobiatt_tf.lean import lean
from mobiatt_tf.models import rebuild

to_numpy = keras.ops.convert_to_numpy

MODELS: dict[str, tuple[Any, dict[str, Any], int, int]] = {  # with the LayerNorms that stay whole, and those replaced
    "deit": (DeiTMobiAtt, {}, 0, 9),
    "deit_softmax": (DeiTMobiAtt, {"attention": "softmax"}, 0, 9),
    "deit_linear": (DeiTMobiAtt, {"attention": "linear"}, 0, 9),
    "deit_distilled": (DeiTMobiAtt, {"distilled": True}, 0, 9),
    "deit_without_head": (DeiTMobiAtt, {"num_classes": 0}, 1, 0),
    "deit_features": (DeiTMobiAtt, {"features_only": True}, 1, 0),
    "pvt_v2": (PVTv2MobiAtt, {}, 3, 0),
    "pvt_v2_softmax": (PVTv2MobiAtt, {"attention": "softmax"}, 3, 0),
    "pvt_v2_features": (PVTv2MobiAtt, {"features_only": True}, 4, 0),
    "efficientformer_v2": (EfficientFormerV2MobiAtt, {}, 0, 0),
}


def drawn(builder: Any, arguments: dict[str, Any]) -> tuple[keras.Model, np.ndarray]:
    """A model with every weight drawn, no scale at 1 and no offset at 0, and two images."""
    model = builder("quickstart", **arguments)
    random = np.random.default_rng(0)
    for weight in model.weights:
        values = random.normal(0, 0.2, weight.shape)
        if weight.path.endswith(("gamma", "variance")):
            values = random.uniform(0.5, 1.5, weight.shape)
        weight.assign(values)
    return model, random.normal(size=(2, *model.input_shape[1:])).astype("float32")


def error(model: Any, other: Any, images: np.ndarray) -> float:
    pairs = zip(keras.tree.flatten(model(images)), keras.tree.flatten(other(images)), strict=True)
    return max(float(np.abs(to_numpy(a) - to_numpy(b)).max() / np.abs(to_numpy(a)).max()) for a, b in pairs)


@pytest.mark.parametrize("name", MODELS)
def test_same_outputs_with_fewer_norms(name: str) -> None:
    builder, arguments, whole, replaced = MODELS[name]
    model, images = drawn(builder, arguments)
    before = [weight.copy() for weight in model.get_weights()]
    copy = lean(model)
    assert error(model, copy, images) < 1e-5
    norms = [layer for layer in copy.layers if isinstance(layer, keras.layers.LayerNormalization)]
    assert sum(norm.scale for norm in norms) == whole
    assert sum(isinstance(layer, layers.RootMeanSquareNorm) for layer in copy.layers) == replaced
    assert type(copy) is type(model)
    for weight, value in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, value)  # the original is left alone
    assert error(copy, lean(copy), images) < 1e-5  # and once more changes nothing
    assert error(model, lean(model, centre=False), images) < 1e-5


def test_batch_precision_and_names_stay() -> None:
    model = DeiTMobiAtt("quickstart", batch_size=1, dtype="mixed_bfloat16")
    copy = lean(model)
    assert copy.input_shape[0] == 1
    assert [layer.name for layer in copy.layers] == [layer.name for layer in model.layers]
    assert copy.get_layer("block0_norm1").compute_dtype == "bfloat16"


def pooled(x: Any, norm: Any, bias: bool = True) -> Any:
    return keras.layers.Dense(3, use_bias=bias)(keras.layers.GlobalAveragePooling2D()(norm(x)))


@pytest.mark.parametrize("case", ["read by an activation", "no bias", "normalises another axis", "an output itself"])
def test_what_cannot_be_folded_stays(case: str) -> None:
    images = keras.Input((8, 8, 4))
    norm = keras.layers.LayerNormalization(axis=1 if case == "normalises another axis" else -1)
    outputs = pooled(images, norm, bias=case != "no bias")
    if case == "read by an activation":
        outputs = [outputs, keras.layers.ReLU()(norm.output)]
    if case == "an output itself":
        outputs = [outputs, norm.output]
    model = keras.Model(images, outputs)
    for weight in norm.weights:
        weight.assign(np.random.default_rng(0).normal(1, 0.3, weight.shape))
    copy = lean(model)
    assert Counter(type(layer) for layer in copy.layers) == Counter(type(layer) for layer in model.layers)
    assert error(model, copy, np.random.default_rng(1).normal(size=(2, 8, 8, 4)).astype("float32")) < 1e-6


def test_patches_through_a_dense_layer_are_the_same() -> None:
    model = DeiTMobiAtt("quickstart", image_size=(28, 42))
    images = np.random.default_rng(0).normal(size=(2, 28, 42, 3)).astype("float32")
    copy = rebuild(model, batch_size=None, dense_patches=True)
    assert isinstance(copy.get_layer("patch_embedding").projection, keras.layers.Dense)
    assert error(model, copy, images) < 1e-5

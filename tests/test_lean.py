"""Lean models compute the same with less."""

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


class OwnDropout(keras.layers.Dropout):
    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return inputs + 1.0


class OwnAdd(keras.layers.Add):
    def _merge_function(self, inputs: Any) -> Any:
        return inputs[0] + 2.0 * inputs[1] + 1.0


def dense_behind(norm: Any, x: Any, **arguments: Any) -> Any:
    return keras.layers.Dense(3, **arguments)(norm(x))


def shared_dropout(x: Any, norm: Any) -> Any:
    dropout = keras.layers.Dropout(0.1)
    return keras.layers.Dense(3)(dropout(norm(keras.layers.Dense(8)(dropout(x)))))


def own_stream(x: Any, norm: Any, add: Any) -> Any:
    x = add([x, layers.MLP(16)(keras.layers.LayerNormalization()(x))])
    return keras.layers.Dense(3)(norm(x))


def norm_by_name(x: Any, norm: Any, names: tuple[str, ...]) -> Any:
    """An attention that gets its tensors by name, in another order."""
    tensors = {"query": x, "key": keras.layers.Dense(8)(x), "value": keras.layers.Dense(8)(x)}
    tensors[names[0]] = norm(x)
    return layers.SoftmaxAttention(2)(**{name: tensors[name] for name in names})


NORM: dict[str, Any] = {
    "read by an activation": lambda x, norm: [dense_behind(norm, x), keras.layers.ReLU()(norm.output)],
    "an output itself": lambda x, norm: [dense_behind(norm, x), norm.output],
    "no bias": lambda x, norm: dense_behind(norm, x, use_bias=False),
    "a dropout that is used twice": shared_dropout,
    "a dropout of its own": lambda x, norm: keras.layers.Dense(3)(OwnDropout(0.1)(norm(x))),
    "an addition of its own": lambda x, norm: own_stream(x, norm, OwnAdd()),
    "a user's layer in the stream": lambda x, norm: own_stream(keras.layers.Dense(8)(x), norm, keras.layers.Add()),
    "value by name": lambda x, norm: norm_by_name(x, norm, ("value", "query", "key")),
    "key by name": lambda x, norm: norm_by_name(x, norm, ("key", "value", "query")),
}


@pytest.mark.parametrize("case", NORM)
def test_what_cannot_be_folded_stays_the_same(case: str) -> None:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((9, 8))
    model = keras.Model(inputs, NORM[case](inputs, keras.layers.LayerNormalization(name="norm")))
    for weight in model.weights:
        if len(weight.shape) == 1:
            weight.assign(np.random.default_rng(0).normal(1, 0.5, weight.shape))
    copy = lean(model)
    assert error(model, copy, np.random.default_rng(1).normal(size=(2, 9, 8)).astype("float32")) < 1e-5
    assert not any(isinstance(layer, layers.RootMeanSquareNorm) for layer in copy.layers)


@pytest.mark.parametrize("arguments", [{"axis": 1}, {"rms_scaling": True}, {"axis": [1, 2]}])
@pytest.mark.filterwarnings("ignore:.*rms_scaling")
def test_other_norms_stay(arguments: dict[str, Any]) -> None:
    inputs = keras.Input((9, 8))
    norm = keras.layers.LayerNormalization(**arguments)
    model = keras.Model(inputs, dense_behind(norm, inputs))
    norm.set_weights([np.random.default_rng(0).normal(1, 0.3, weight.shape) for weight in norm.weights])
    assert error(model, lean(model), np.random.default_rng(1).normal(size=(2, 9, 8)).astype("float32")) < 1e-6


def test_other_kinds_of_models() -> None:
    sequential = keras.Sequential([keras.Input((9, 8)), keras.layers.LayerNormalization(), keras.layers.Dense(3)])
    x = np.random.default_rng(0).normal(size=(2, 9, 8)).astype("float32")
    assert error(sequential, lean(sequential), x) == 0
    first, second = keras.Input((4,)), keras.Input((4,))
    with pytest.raises(ValueError, match="Only models with one input can be rewritten"):
        lean(keras.Model([first, second], first + second))


def test_patches_through_a_dense_layer_are_the_same() -> None:
    model = DeiTMobiAtt("quickstart", image_size=(28, 42))
    images = np.random.default_rng(0).normal(size=(2, 28, 42, 3)).astype("float32")
    copy = rebuild(model, batch_size=None, dense_patches=True)
    assert isinstance(copy.get_layer("patch_embedding").projection, keras.layers.Dense)
    assert error(model, copy, images) < 1e-5

"""RetinaNet: the same function as keras_hub's, places and anchors, start values, gradients, counts, errors."""

from typing import Any

import keras
import numpy as np
import pytest

import keras_models
from keras_models.hub import as_keras_hub
from mobiatt_tf.complexity import count_macs
from tests.models.dense import FAMILIES, awake, images, toy

to_numpy = keras.ops.convert_to_numpy


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", [48, 64])
def test_outputs_are_those_of_keras_hub(family: str, side: int) -> None:
    """With levels whose sides are odd (48: 12, 6, 3, 2, 1) and even."""
    detector = awake(toy("detection", family, image_size=side, channels=256))
    twin = as_keras_hub(detector)
    inputs = images(2, (side, side))
    ours, theirs = detector(inputs), twin(inputs)
    for mine, hub in (("boxes", "bbox_regression"), ("logits", "cls_logits")):
        scale = float(np.abs(ours[mine]).max())
        assert scale > 0.1
        np.testing.assert_allclose(ours[mine], theirs[hub], atol=1e-5 * scale)
    anchors = np.concatenate([to_numpy(x) for x in twin.anchor_generator(inputs).values()])
    assert anchors.shape == ours["boxes"].shape[1:]
    assert twin.count_params() == detector.count_params()
    assert set(twin.decode_predictions(theirs, inputs)) >= {"boxes", "labels", "confidence"}


def test_keras_hub_takes_square_images_and_256_channels_only() -> None:
    with pytest.raises(ValueError, match="has 16 channels and images of 48 x 64"):
        as_keras_hub(toy("detection", "pvt_v2"))
    with pytest.raises(ValueError, match="is no detector"):
        as_keras_hub(toy("segmentation", "pvt_v2"))


@pytest.mark.parametrize("family", FAMILIES)
def test_places_of_all_levels_are_there(family: str) -> None:
    """48 x 64 with strides 4 to 64: 12 x 16, 6 x 8, 3 x 4, 2 x 2 and 1 x 1, nine anchors each."""
    model = toy("detection", family)
    assert model.name == f"retinanet_{family}_quickstart_mobile"
    assert model.inputs[0].name == "images"
    assert model.output_names == ["boxes", "logits"]
    result = model(images())
    count = 9 * (192 + 48 + 12 + 4 + 1)
    assert {name: tuple(x.shape) for name, x in result.items()} == {"boxes": (2, count, 4), "logits": (2, count, 3)}


def test_levels_follow_each_other_from_fine_to_coarse_row_by_row() -> None:
    """A head that says the same everywhere but at one place of one level moves the nine anchors of that place."""
    model = toy("detection", "pvt_v2", head_depth=0)
    for name in ("fpn_output3", "class_head_output"):
        layer = model.get_layer(name)
        layer.kernel.assign(np.zeros(layer.kernel.shape))
    before = to_numpy(model(images(1))["logits"])
    last = model.get_layer("class_head_output")
    kernel = np.zeros(last.kernel.shape, "float32")
    kernel[1, 1, 0] = 1  # every anchor and class is the level's first channel at its place
    last.kernel.assign(kernel)
    change = to_numpy(model(images(1))["logits"]) - before
    assert not change[0, 9 * 192 : 9 * 240].any()  # the level that was silenced
    assert change[0, : 9 * 192].any()
    levels = keras.Model(model.input, model.get_layer("fpn_output2").output)(images(1))
    expected = to_numpy(levels)[0, :, :, 0].repeat(9)  # row by row, nine anchors a place
    np.testing.assert_allclose(change[0, : 9 * 192, 1], expected, atol=1e-4)


def test_training_starts_with_one_object_in_a_hundred() -> None:
    model = toy("detection", "efficientformer_v2")
    result = model(images())
    probability = 1 / (1 + np.exp(-to_numpy(result["logits"])))
    assert np.abs(probability - 0.01).max() < 0.005
    np.testing.assert_array_equal(model.get_layer("box_head_output").bias, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_learns_from_boxes_and_classes(family: str) -> None:
    import tensorflow as tf

    model = awake(toy("detection", family, drop_path=0.0))
    with tf.GradientTape() as tape:
        result = model(images(), training=True)
        loss = sum(tf.reduce_mean(tf.square(x - 1)) for x in result.values())
    gradients = tape.gradient(loss, [weight.value for weight in model.trainable_weights])
    still = [
        weight.path
        for weight, gradient in zip(model.trainable_weights, gradients, strict=True)
        if gradient is None or not np.any(gradient)
    ]
    assert still == []


def test_heads_count_for_every_level() -> None:
    model = toy("detection", "pvt_v2")
    without = toy("detection", "pvt_v2", head_depth=0)
    places = 192 + 48 + 12 + 4 + 1
    assert count_macs(model) - count_macs(without) == 2 * 2 * places * 9 * 16 * 16  # two heads of two convolutions


@pytest.mark.parametrize("arguments", [{"num_classes": 0}, {"channels": 0}, {"head_depth": -1}])
def test_numbers_that_cannot_be_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="A detector needs num_classes and channels of 1 or more"):
        keras_models.RetinaNetMobiAtt(**arguments)

"""Detectors and segmenters alike: maps of the three families, sizes, precision, saving, frozen norms, start weights."""

import dataclasses
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_models
from keras_models import deit
from keras_models.pyramid import Pyramid, feature_pyramid, pyramid
from mobiatt_tf.interop import start_from
from mobiatt_tf.layers import MobileAttention, MobileConvAttention, TokensToMap
from mobiatt_tf.lean import lean
from mobiatt_tf.models import DENSE_PREFIXES, load_trained, rebuild
from tests.models.dense import FAMILIES, SIDES, TASKS, awake, images, outputs, toy

_OTHER_SCALE = r"reference_tokens=256, but .* has 1024: .* set to that of the source, .* 32 x 32 pixels"
to_numpy = keras.ops.convert_to_numpy
EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EACH_TASK = pytest.mark.parametrize("task", TASKS)
# Of each task on one family, so that both and all three are there.
MIXED = pytest.mark.parametrize(
    ("task", "family"), [("detection", "deit"), ("segmentation", "pvt_v2"), ("detection", "efficientformer_v2")]
)


def maps_of(family: str, **arguments: Any) -> Pyramid:
    return pyramid(family, "quickstart", **{"image_size": SIDES, "training_size": 64, **arguments})


@EACH_FAMILY
def test_four_maps_have_the_strides_they_say(family: str) -> None:
    found = maps_of(family)
    assert found.strides == [2, 4, 8, 16]
    assert [tuple(x.shape[1:3]) for x in found.maps] == [(48 // stride, 64 // stride) for stride in found.strides]
    assert found.label == f"{family}_quickstart_mobile"


@pytest.mark.slow
@EACH_FAMILY
def test_published_variants_have_strides_4_to_32(family: str) -> None:
    found = pyramid(family, None, 64)
    assert found.strides == [4, 8, 16, 32]
    assert [x.shape[1] for x in found.maps] == [16, 8, 4, 2]


def test_maps_are_the_ends_of_the_stages() -> None:
    features = keras_models.PVTv2MobiAtt("quickstart", image_size=SIDES, training_size=64, features_only=True)
    model = toy("segmentation", "pvt_v2")
    keras_models.start_from_classifier(features, model)
    ends = keras.Model(model.input, [model.get_layer(f"fpn_lateral{stage}").input for stage in (1, 2, 3, 4)])
    expected = features(images())
    for stage, actual in enumerate(ends(images()), start=1):
        np.testing.assert_allclose(actual, expected[f"stage{stage}"], atol=1e-5)


def test_the_simple_pyramid_reads_deits_last_tokens_in_their_places() -> None:
    model = toy("detection", "deit")
    ends = keras.Model(model.input, [model.get_layer("norm").output, model.get_layer("fpn_lateral3").input])
    tokens, last = (to_numpy(x) for x in ends(images()))
    assert last.shape == (2, 6, 8, 64)
    for row, column in ((0, 0), (2, 5), (5, 7)):
        np.testing.assert_array_equal(last[:, row, column], tokens[:, 1 + row * 8 + column])
    coarse = keras.Model(model.input, model.get_layer("fpn_lateral4").input)(images())
    np.testing.assert_array_equal(coarse, last.reshape(2, 3, 2, 4, 2, 64).max(axis=(2, 4)))


def test_the_pyramid_network_adds_from_the_coarsest_down() -> None:
    """By hand, from the layers' weights: lateral + enlarged coarser sum, then 3 x 3."""
    sides = ((8, 12), (4, 6), (2, 3))
    inputs = [keras.Input((*side, channels)) for side, channels in zip(sides, (3, 5, 4), strict=True)]
    model = keras.Model(inputs, feature_pyramid(inputs, 6, 2))
    maps = [np.random.default_rng(0).normal(size=(1, *x.shape[1:])).astype("float32") for x in inputs]
    layers = {layer.name: layer for layer in model.layers}
    total, expected = None, []
    for stage in (4, 3, 2):
        kernel, bias = layers[f"fpn_lateral{stage}"].get_weights()
        lateral = maps[stage - 2] @ kernel[0, 0] + bias
        total = lateral if total is None else lateral + total.repeat(2, axis=1).repeat(2, axis=2)
        expected.insert(0, to_numpy(layers[f"fpn_output{stage}"](total)))
    for actual, wanted in zip(model(maps), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "resnet"}, "no family 'resnet'. Choose one of deit, pvt_v2"),
        ({"family": "pvt_v2", "variant": "b9"}, "pvt_v2 has no variant 'b9'. Choose one of b0"),
        ({"family": "pvt_v2", "image_size": 1333}, "positive multiple of 32, but 1333"),
        ({"family": "deit", "image_size": 48}, "positive multiple of 32, but 48"),
        ({"family": "efficientformer_v2", "attention": "linear"}, "no attention 'linear'"),
    ],
)
@EACH_TASK
def test_what_there_is_not_is_refused(task: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keras_models.DENSE[task](**{"image_size": 64, **arguments})


def test_patches_without_a_whole_quarter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(deit.VARIANTS, "odd", dataclasses.replace(deit.VARIANTS["quickstart"], patch_size=6))
    with pytest.raises(ValueError, match="patches of odd are 6 pixels wide, no multiple of 4"):
        pyramid("deit", "odd", 48)


def test_a_map_of_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="2 x 3 with 1 tokens in front has 7 tokens"):
        TokensToMap((2, 3), 1)(np.zeros((1, 6, 4), "float32"))


@MIXED
def test_saving_and_rewriting_keep_outputs_and_their_names(task: str, family: str, tmp_path: Path) -> None:
    model = awake(toy(task, family))
    model.save(tmp_path / "model.keras")
    expected = outputs(model, images(1))
    fixed = rebuild(model, batch_size=1, dense_patches=True)
    for copy in (load_trained(tmp_path / "model.keras"), fixed, lean(fixed)):
        assert copy.output_names == model.output_names
        assert copy.name == model.name
        for actual, wanted in zip(outputs(copy, images(1)), expected, strict=True):
            np.testing.assert_allclose(actual, wanted, atol=1e-5 * np.abs(wanted).max())


@MIXED
def test_resizing_keeps_weights_and_scale(task: str, family: str) -> None:
    model = awake(toy(task, family))
    larger = keras_models.resize(model, (64, 80))
    counts = [
        [x.reference_tokens for x in m.layers if isinstance(x, MobileAttention | MobileConvAttention)]
        for m in (model, larger)
    ]
    assert counts[0] == counts[1] != []
    assert larger.name == model.name
    found = outputs(larger, images(1, (64, 80)))
    assert all(np.isfinite(x).all() for x in found)
    # 64 x 80 with strides 4, 8, ...: 16 x 20, 8 x 10, 4 x 5, 2 x 3 and 1 x 2 places.
    assert found[0].shape[1:] == ((9 * (320 + 80 + 20 + 6 + 2), 4) if task == "detection" else (32, 40, 3))
    back = keras_models.resize(larger, SIDES)
    if family != "deit":  # whose position embedding is interpolated
        for actual, wanted in zip(outputs(back, images(1)), outputs(model, images(1)), strict=True):
            np.testing.assert_allclose(actual, wanted, atol=1e-4)


@EACH_TASK
def test_outputs_are_float32_in_mixed_precision(task: str) -> None:
    result = toy(task, "efficientformer_v2", dtype="mixed_bfloat16")(images())
    assert {x.dtype.name for x in keras.tree.flatten(result)} == {"float32"}


@EACH_TASK
def test_frozen_batch_norm_stays_frozen_in_training_and_in_files(task: str, tmp_path: Path) -> None:
    model = toy(task, "efficientformer_v2", freeze_batch_norm=True)
    model.save(tmp_path / "model.keras")
    for copy in (model, load_trained(tmp_path / "model.keras"), keras_models.resize(model, 64)):
        norms = {x.path: x for x in copy._flatten_layers() if isinstance(x, keras.layers.BatchNormalization)}
        assert len(norms) > 20
        learning = {path for path, norm in norms.items() if norm.trainable}
        assert learning == {path for path in norms if path.startswith("segment_")}
        assert all(norm.trainable_weights == [] for path, norm in norms.items() if path not in learning)
    before = {weight.path: to_numpy(weight).copy() for weight in model.non_trainable_weights}
    model(images(), training=True)
    moved = {path for path, value in before.items() if not np.array_equal(value, to_numpy(_weight(model, path)))}
    statistics = [path for path in moved if "moving" in path]
    assert all(path.startswith("segment_") for path in statistics)
    assert bool(statistics) == (task == "segmentation")


def test_synchronized_batch_norm_reaches_backbone_and_head() -> None:
    model = toy("segmentation", "efficientformer_v2", synchronized_batch_norm=True)
    norms = [x for x in model._flatten_layers() if isinstance(x, keras.layers.BatchNormalization)]
    assert all(norm.synchronized for norm in norms)


def _weight(model: keras.Model, path: str) -> Any:
    return next(weight for weight in model.weights if weight.path == path)


def _classifier(family: str, **arguments: Any) -> keras.Model:
    own = {"patch_size": 8} if family == "deit" else {}
    return keras_models.FAMILIES[family].build("quickstart", **{"image_size": 64, "num_classes": 5, **own, **arguments})


def _same_backbone(source: keras.Model, target: keras.Model) -> None:
    """All weights before the classifier are equal, but for the tables that follow the image size."""
    values = {weight.path: to_numpy(weight) for weight in source.weights}
    compared = 0
    for weight in target.weights:
        if not weight.path.startswith(DENSE_PREFIXES) and values[weight.path].shape == weight.shape:
            np.testing.assert_array_equal(values[weight.path], weight)
            compared += 1
    assert compared > 30


@EACH_FAMILY
def test_a_classifier_gives_its_backbone(family: str) -> None:
    source, target = _classifier(family), toy("detection", family)
    heads = {w.path: to_numpy(w).copy() for w in target.weights if w.path.startswith(DENSE_PREFIXES)}
    keras_models.start_from_classifier(source, target)
    _same_backbone(source, target)
    for path, value in heads.items():
        np.testing.assert_array_equal(value, _weight(target, path))
    segmenter = toy("segmentation", family)
    keras_models.start_from_classifier(target, segmenter)
    _same_backbone(target, segmenter)


@EACH_FAMILY
def test_a_classifiers_file_gives_its_backbone(family: str, tmp_path: Path) -> None:
    source, target = _classifier(family), toy("segmentation", family)
    source.save(tmp_path / "classifier.keras")
    report = start_from(target, tmp_path / "classifier.keras")
    _same_backbone(source, target)
    assert set(report.new) == {w.path for w in target.weights if w.path.startswith(DENSE_PREFIXES)}


def test_a_backbone_of_another_scale_is_refused(tmp_path: Path) -> None:
    source, target = _classifier("pvt_v2", image_size=32), toy("detection", "pvt_v2")
    before = target.get_weights()
    with pytest.raises(ValueError, match=_OTHER_SCALE):
        keras_models.start_from_classifier(source, target)
    source.save(tmp_path / "classifier.keras")
    with pytest.raises(ValueError, match=_OTHER_SCALE):
        start_from(target, tmp_path / "classifier.keras")
    assert all(np.array_equal(old, new) for old, new in zip(before, target.get_weights(), strict=True))


def test_another_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match="only in the source: stage1_"):
        keras_models.start_from_classifier(_classifier("pvt_v2"), toy("detection", "efficientformer_v2"))
    with pytest.raises(ValueError, match=r"no detector and no segmenter: use keras_models\.copy_weights"):
        keras_models.start_from_classifier(_classifier("pvt_v2"), _classifier("pvt_v2"))

"""Detectors and segmenters with the rounding of int8: shared heads, folded ReLU, training, saving."""

import functools
from pathlib import Path

import keras
import numpy as np
import pytest

from mobiatt_tf import quantization
from mobiatt_tf.layers import ConvBN
from mobiatt_tf.models import load_trained, rebuild
from mobiatt_tf.verification import photographs
from tests.models.dense import FAMILIES, SIDES, TASKS, awake, outputs, toy
from tests.quantization.small import calibrated, randomize_norms, relative_error

_QUICK = (("detection", "pvt_v2"), ("segmentation", "efficientformer_v2"))


@functools.cache
def pictures(count: int = 4) -> np.ndarray:
    return photographs(SIDES, count)


@functools.cache
def float_model(task: str, family: str) -> keras.Model:
    model = awake(toy(task, family))
    randomize_norms(model)
    return model


@functools.cache
def quantized_model(task: str, family: str) -> keras.Model:
    return calibrated(float_model(task, family), "int8", pictures())


@pytest.mark.parametrize(
    ("task", "family"),
    [
        pytest.param(task, family, marks=[] if (task, family) in _QUICK else pytest.mark.slow)
        for task in TASKS
        for family in FAMILIES
    ],
)
def test_rounded_outputs_are_near_and_stay_when_baked_and_saved(task: str, family: str, tmp_path: Path) -> None:
    model, copy = float_model(task, family), calibrated(float_model(task, family), "int8", pictures())
    expected, rounded = outputs(model, pictures()), outputs(copy, pictures())
    for wanted, actual in zip(expected, rounded, strict=True):
        wanted, actual = (x - np.mean(wanted) for x in (wanted, actual))  # the prior of the logits says nothing
        assert 0 < relative_error(wanted, actual) < 0.2
    copy.save(tmp_path / "model.keras")
    quantization.bake(copy)
    again = rebuild(load_trained(tmp_path / "model.keras"), batch_size=None)
    for other in (copy, again):
        for before, after in zip(rounded, outputs(other, pictures()), strict=True):
            np.testing.assert_allclose(before, after, atol=1e-3 * np.abs(before).max())


def test_a_shared_head_has_one_range_over_all_levels() -> None:
    """The lowest and highest of what the float layer gives on any level; calibrated on one batch."""
    model, copy = float_model("detection", "pvt_v2"), quantized_model("detection", "pvt_v2")
    for name in ("box_head_conv1", "class_head_output"):
        nodes = model.get_layer(name)._inbound_nodes
        assert len(nodes) == 5
        levels = keras.Model(model.input, [node.output_tensors[0] for node in nodes])(pictures())
        low, high = copy.get_layer(name).output_quantizer.range
        spans = [(float(np.min(x)), float(np.max(x))) for x in levels]
        # Kernels are rounded while calibrating, so not to the last digit.
        assert low == pytest.approx(min(0.0, *(x[0] for x in spans)), rel=0.05)
        assert high == pytest.approx(max(0.0, *(x[1] for x in spans)), rel=0.05)
        assert len({round(x[1], 3) for x in spans}) == 5


def test_a_shared_head_reads_each_level_in_the_steps_of_that_level() -> None:
    """Rounding all levels once more in one range was .2 off the int8 file, which does not."""
    copy = quantized_model("detection", "pvt_v2")
    for head in ("box_head", "class_head"):
        assert copy.get_layer(f"{head}_conv0").input_quantizer is None
        assert copy.get_layer(f"{head}_output").input_quantizer is None
    steps = [np.ptp(copy.get_layer(f"fpn_output{stage}").output_quantizer.range) for stage in (2, 3, 4)]
    assert len({round(float(step), 4) for step in steps}) == 3


def test_a_shared_layer_rounds_what_nothing_else_has_rounded() -> None:
    images = keras.Input((8, 8, 3))
    shared = keras.layers.Conv2D(4, 1, name="shared")
    halves = [shared(keras.layers.Activation("tanh")(images)), shared(images)]
    copy = quantization.quantize_aware(keras.Model(images, keras.layers.Add()(halves)))
    assert copy.get_layer("shared").input_quantizer is not None


def test_ranges_of_a_shared_head_stay_in_training_and_others_follow() -> None:
    copy = calibrated(float_model("detection", "pvt_v2"), "int8", pictures())
    shared = copy.get_layer("box_head_conv0").output_quantizer
    alone = copy.get_layer("fpn_output2").output_quantizer
    before = (shared.range, alone.range)
    copy(3 * pictures(), training=True)
    assert shared.range == before[0]
    assert alone.range != before[1]


def test_norm_and_relu_are_part_of_the_convolution() -> None:
    model, copy = float_model("segmentation", "pvt_v2"), quantized_model("segmentation", "pvt_v2")
    layer = copy.get_layer("segment_stage1_conv0")
    assert not any(isinstance(x, keras.layers.BatchNormalization) for x in layer._flatten_layers())
    assert layer.conv.activation is keras.activations.relu
    low, high = layer.conv.output_quantizer.range
    assert low == 0 < high
    ends = [keras.Model(x.input, x.get_layer(layer.name).output)(pictures()) for x in (model, copy)]
    assert float(np.min(ends[1])) == 0
    assert relative_error(*ends) < 0.1


def test_only_relu_can_stand_behind_a_norm() -> None:
    with pytest.raises(ValueError, match="None or 'relu', but activation='gelu'"):
        ConvBN(4, activation="gelu")


def test_a_layer_made_of_several_cannot_be_shared() -> None:
    images = keras.Input((8, 8, 4))
    shared = ConvBN(4, activation="relu", name="shared")
    with pytest.raises(ValueError, match=r"'shared' of type ConvBN is called 2 times; only dense layers and convol"):
        quantization.quantize_aware(keras.Model(images, shared(shared(images))), "int8")
    quantization.quantize_aware(keras.Model(images, shared(images)), "int8")


def test_layer_errors_need_the_model_it_was_made_from() -> None:
    with pytest.raises(ValueError, match=r"was not made from .*, which has no layer .*class_head_output"):
        quantization.layer_errors(
            float_model("segmentation", "pvt_v2"), quantized_model("detection", "pvt_v2"), pictures()
        )


def test_every_quantized_layer_has_an_error_of_its_own() -> None:
    errors = quantization.layer_errors(
        float_model("detection", "pvt_v2"), quantized_model("detection", "pvt_v2"), pictures()
    )
    assert {"box_head_conv0", "class_head_output", "fpn_lateral2", "fpn_output6"} <= errors.keys()
    assert all(0 < error < 0.2 for error in errors.values())

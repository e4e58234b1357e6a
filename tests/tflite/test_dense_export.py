"""Detectors and segmenters as .tflite files: the files equal their Keras models and are one XNNPACK partition."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_models import DENSE
from mobiatt_tf import quantization, verification
from mobiatt_tf.errors import UserError
from tests.tflite.int8_ops import int8_operators
from tflite import convert, export, inspect
from tflite.upsampling import with_concatenations
from tflite.verify import TOLERANCES, FileRunner, verify

ROOT = Path(__file__).parents[2]
SIZE = (64, 64)
CLASSES = 3
TASKS = pytest.mark.parametrize("task", ["detection", "segmentation"])


def small(task: str, family: str = "pvt_v2", classes: int = CLASSES, gain: float = 1.0) -> keras.Model:
    """A narrow model with random weights; a detector's heads give nearly nothing unless they get a gain."""
    keras.utils.set_random_seed(0)
    width: dict[str, Any] = {"head_depth": 2} if task == "detection" else {"head_channels": 8}
    model = DENSE[task](
        family, "quickstart", image_size=SIZE, num_classes=classes, channels=16, training_size=64, **width
    )
    for weight in model.weights:
        if weight.path.startswith(("box_head_", "class_head_")) and weight.path.endswith("kernel"):
            weight.assign(weight * gain)
    return model


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return verification.photographs(SIZE, 6)


def quantized(model: keras.Model, images: np.ndarray, policy: str = "int8") -> keras.Model:
    copy = quantization.quantize_aware(model, policy)
    quantization.calibrate(copy, [images])
    return copy


@pytest.mark.slow
@TASKS
@pytest.mark.parametrize(
    ("family", "formats"),
    [
        ("pvt_v2", ("float32", "float16", "dynamic", "int8")),
        ("deit", ("float32", "int8")),
        ("efficientformer_v2", ("float32", "int8")),
    ],
)
def test_files_equal_their_models_in_one_partition(
    task: str, family: str, formats: tuple[str, ...], images: np.ndarray, tmp_path: Path
) -> None:
    model = small(task, family)
    for format in formats:
        source = quantized(model, images) if format == "int8" else model
        result = export.export(source, tmp_path / "model.tflite", None if format == "int8" else format, images, runs=2)
        names = {"boxes", "logits"} if task == "detection" else {"output_0"}
        found = result.description
        assert [set(entry.outputs) for entry in found.signatures] == [names]
        assert found.flex_ops == ()
        assert found.custom_ops == ()
        assert found.max_rank <= 4
        assert not {"TILE", "BROADCAST_TO", "RESIZE_NEAREST_NEIGHBOR"} & found.op_counts.keys()
        undelegated = found.undelegated_ops
        assert undelegated is not None
        if format == "dynamic":  # int8 weights of depthwise convolutions, as in classifiers
            assert undelegated.keys() == {"DEPTHWISE_CONV_2D"}
        else:
            assert undelegated == {}
            assert found.delegate_partitions == 1
        check = result.comparison
        assert isinstance(check, verification.DenseComparison)
        assert check.passed
        assert check.images == len(images)
        assert check.output_errors.keys() == ({"boxes", "logits"} if task == "detection" else {"logits"})
        assert max(check.output_errors.values()) == check.max_relative_error
        if format == "int8":
            assert {tensor.dtype for tensor in (*found.inputs, *found.outputs)} == {"int8"}
            assert len({tensor.scale for tensor in found.outputs}) == len(names)  # each in its own range
            operators = int8_operators(tmp_path / "model.tflite")
            assert not {"RELU", "GELU", "SOFTMAX", "LOGISTIC"} & operators.keys()
            assert operators["CONV_2D"] == found.op_counts["CONV_2D"]
        written = json.loads((tmp_path / "model.json").read_text())
        assert written["task"] == task
        assert written["verification"]["output_errors"] == check.output_errors


@pytest.mark.slow
def test_the_relu_of_a_head_is_part_of_its_int8_convolutions(images: np.ndarray, tmp_path: Path) -> None:
    """Twice two convolutions on five levels with one ReLU each; the only one of its own is in front of the last map."""
    path = tmp_path / "model.tflite"
    path.write_bytes(convert.convert(quantized(small("detection"), images)))
    operators = inspect.describe(path).op_counts
    assert operators.get("RELU", 0) == 1
    assert operators["CONV_2D"] >= 2 * (2 + 1) * 5


def test_a_shared_head_has_one_range_that_holds_all_levels(images: np.ndarray) -> None:
    model = small("detection", gain=6.0)
    copy = quantized(model, images)
    layer = next(layer for layer in copy.layers if layer.name == "class_head_output")
    assert len(layer._inbound_nodes) == 5
    logits = keras.ops.convert_to_numpy(model(images)["logits"])
    low, high = layer.output_quantizer.range
    assert low == pytest.approx(min(logits.min(), 0), rel=2e-2)
    assert high == pytest.approx(max(logits.max(), 0), rel=2e-2, abs=1e-2)
    assert not layer.follows
    assert next(one for one in copy.layers if one.name == "fpn_output2").follows
    copy(images[:2] * 0.1, training=True)
    assert layer.output_quantizer.range == (low, high)
    again = type(layer).from_config(layer.get_config())
    assert not again.output_quantizer.follows


@pytest.mark.slow
def test_the_file_runner_names_outputs_by_the_signature(images: np.ndarray, tmp_path: Path) -> None:
    model = small("detection")
    (tmp_path / "model.tflite").write_bytes(convert.convert(model))
    runner = FileRunner(tmp_path / "model.tflite")
    found = runner(images[:2])
    expected = model(images[:2])
    assert runner.image_size == SIZE
    assert found.keys() == {"boxes", "logits"}
    for name, values in found.items():
        assert values.shape == expected[name].shape
        np.testing.assert_allclose(values, keras.ops.convert_to_numpy(expected[name]), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@TASKS
def test_the_file_of_another_model_is_noticed(task: str, images: np.ndarray, tmp_path: Path) -> None:
    model = small(task)
    (tmp_path / "model.tflite").write_bytes(convert.convert(model))
    assert verify(tmp_path / "model.tflite", model, images[:2], None, TOLERANCES["float32"]).passed
    for weight in model.weights:
        if weight.path in ("class_head_output/bias", "segment_logits/bias"):
            weight.assign(weight + 0.05 * np.arange(weight.shape[0]))
    assert not verify(tmp_path / "model.tflite", model, images[:2], None, TOLERANCES["float32"]).passed
    with pytest.raises(ValueError, match="was not made from this model"):
        verify(tmp_path / "model.tflite", small(task, classes=4), images[:2], None, 1.0)


@pytest.mark.slow
def test_a_file_that_does_not_match_is_not_left_behind(
    images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOLERANCES, "float16", 1e-9)
    with pytest.raises(UserError, match=r"differs from its Keras model by .* of the largest of boxes and .* logits"):
        export.export(small("detection"), tmp_path / "model.tflite", "float16", images[:2])
    assert list(tmp_path.iterdir()) == []


def test_nearest_upsampling_is_the_same_function_in_concatenations() -> None:
    source = keras.Input(batch_shape=(1, 3, 5, 2))
    x = keras.layers.UpSampling2D((2, 3), name="nearest")(source)
    x = keras.layers.UpSampling2D(2, interpolation="bilinear", name="bilinear")(x)
    model = keras.Model(source, keras.layers.Conv2D(2, 1)(x))
    copy = with_concatenations(model)
    values = np.random.default_rng(0).normal(size=(1, 3, 5, 2)).astype("float32")
    np.testing.assert_array_equal(*(keras.ops.convert_to_numpy(each(values)) for each in (model, copy)))
    assert type(copy.get_layer("bilinear")) is keras.layers.UpSampling2D
    assert type(copy.get_layer("nearest")) is not keras.layers.UpSampling2D
    assert with_concatenations(copy) is copy


def test_a_bias_with_one_number_for_all_channels_survives_int8(tmp_path: Path) -> None:
    """TensorFlow's converter quantizes such a bias by the scale of the first channel alone."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    layer = keras.layers.Conv2D(
        5, 1, bias_initializer=keras.initializers.Constant(-4.6), kernel_initializer="glorot_normal"
    )
    model = keras.Model(inputs, layer(inputs))
    images = verification.photographs((8, 8), 4)
    result = export.export(quantized(model, images), tmp_path / "model.tflite", None, images, runs=1)
    assert result.comparison.max_relative_error < 0.02
    assert result.task == "segmentation"


def detections(*logits: tuple[float, ...]) -> dict[str, np.ndarray]:
    """Outputs for one image with an anchor for each row of logits, and boxes of 1."""
    values = np.asarray([logits], "float32")
    return {"boxes": np.ones((1, len(logits), 4), "float32"), "logits": values}


def compared(expected: dict[str, np.ndarray], actual: dict[str, np.ndarray], **bounds: float) -> Any:
    """Of outputs without models around them."""
    images = np.zeros((1, 8, 8, 3), "float32")
    return verification.compare_dense(lambda _: expected, lambda _: actual, images, **{"tolerance": 0.1, **bounds})


def test_a_detector_that_finds_less_or_more_does_not_agree() -> None:
    generator = np.random.default_rng(0)
    found = detections(*np.clip(generator.normal(-6, 2, (400, 4)), -14, 4))
    lower = {**found, "logits": found["logits"] - np.float32(1.4)}
    for one, other in ((found, lower), (lower, found)):
        check = compared(one, other, tolerance=0.2, least_agreement=0.98)
        assert check.max_relative_error < 0.2
        assert check.agreement < 0.7
        assert not check.passed
    near = {**found, "logits": found["logits"] - np.float32(0.1)}
    assert compared(found, near, least_agreement=0.98).agreement == 1
    assert compared(detections((-9, -9)), detections((2, -9)), tolerance=2).places == 1  # what only the file finds


def test_boxes_count_where_objects_are() -> None:
    expected = detections((2, -9), (-1, -9), (-9, -9))
    expected["boxes"][0, 2] = 100  # far out, and nothing there
    actual = {name: values.copy() for name, values in expected.items()}
    actual["boxes"][0, 1] = 3  # above .05 only
    assert compared(expected, actual).box_error == 0
    actual["boxes"][0, 0] = 1.5
    check = compared(expected, actual)
    assert check.output_errors["boxes"] == pytest.approx(0.02)
    assert (check.box_error, check.passed) == (pytest.approx(0.5), False)
    assert compared(expected, actual, box_tolerance=0.6).passed
    expected["logits"][0, 0] = actual["logits"][0, 0] = (-1, -9)  # nothing above .5: those above .05
    assert compared(expected, actual).box_error == pytest.approx(2)
    nothing = detections((-9, -9))
    assert compared(nothing, nothing).box_error is None
    actual["boxes"][0, 0] = np.nan
    assert not compared(expected, actual, tolerance=np.inf, box_tolerance=1e9).passed


def test_swapped_outputs_of_the_same_shape_do_not_pass() -> None:
    """With four classes boxes and logits have one shape: only their numbers tell them apart."""
    generator = np.random.default_rng(0)
    found = detections(*generator.normal(-5, 3, (200, 4)))
    found["boxes"][:] = generator.normal(0, 1, found["boxes"].shape)
    check = compared(found, {"boxes": found["logits"], "logits": found["boxes"]}, tolerance=np.inf, box_tolerance=0.2)
    assert check.agreement < 0.5
    assert check.box_error > 1
    assert not check.passed
    assert not compared(found, {"boxes": found["logits"], "logits": found["boxes"]}, tolerance=0.2).passed


@pytest.mark.slow
def test_a_file_with_its_outputs_swapped_is_not_written(
    images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small("detection", classes=4)
    call = FileRunner.__call__

    def swapped(runner: FileRunner, pictures: np.ndarray) -> Any:
        found = call(runner, pictures)
        return {"boxes": found["logits"], "logits": found["boxes"]}

    monkeypatch.setattr(FileRunner, "__call__", swapped)
    with pytest.raises(UserError, match="differs from its Keras model"):
        export.export(model, tmp_path / "model.tflite", "float32", images[:2])
    assert list(tmp_path.iterdir()) == []


def test_agreement_counts_anchors_that_hold_something() -> None:
    expected = {"boxes": np.zeros((1, 4, 4), "float32"), "logits": np.full((1, 4, 2), -9, "float32")}
    expected["logits"][0, 0] = (2, -9)
    expected["logits"][0, 1] = (-2.9, -9)  # .052
    actual = {name: values.copy() for name, values in expected.items()}
    actual["logits"][0, 1] = (-9, -2.9)
    actual["logits"][0, 3] = (-9, -8.9)  # background may change
    check = verification.compare(expected, actual, None, 0.1)
    assert isinstance(check, verification.DenseComparison)
    assert (check.agreement, check.places) == (0.5, 2)
    assert check.output_errors == {"boxes": 0.0, "logits": pytest.approx(6.1 / 9)}
    expected["logits"][:] = -9  # nothing anywhere: the errors alone count
    check = verification.compare(expected, {**expected, "logits": expected["logits"] - [0, 1]}, None, 0.2)
    assert isinstance(check, verification.DenseComparison)
    assert (check.agreement, check.places, check.passed) == (1.0, 0, True)


def test_not_a_number_does_not_pass() -> None:
    expected = np.ones((1, 2, 2, 3), "float32")
    actual = expected.copy()
    actual[0, 1, 1, 1] = np.nan
    images = np.zeros((2, 2048, 1024, 3), "float32")  # too large to go together
    for outputs in ([actual, expected], [expected, actual]):
        stream = iter(outputs)
        check = verification.compare_dense(lambda _: expected, functools.partial(_next_of, stream), images, 1.0)
        assert not check.passed


def _next_of(stream: Iterator[np.ndarray], _: np.ndarray) -> np.ndarray:
    return next(stream)


def test_images_are_needed_and_outputs_must_be_known() -> None:
    with pytest.raises(ValueError, match="no images to compare on"):
        verification.compare_dense(lambda x: x, lambda x: x, np.zeros((0, 8, 8, 3), "float32"), 1.0)
    inputs = keras.Input((8, 8, 3))
    two = keras.Model(inputs, {"first": keras.layers.Conv2D(4, 1)(inputs), "second": inputs}, name="two")
    with pytest.raises(ValueError, match="one output can be exported, but two has 2; detectors have boxes and logits"):
        convert.convert(two)


@pytest.mark.slow
def test_command_line_writes_an_untrained_detector(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tflite.export", "--task=detection", "--model=pvt_v2", "--variant=quickstart"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "--image_size=64", "--check_images=2", f"--output={tmp_path / 'model.tflite'}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "anchors of 2 real images" in result.stdout
    written = json.loads((tmp_path / "model.json").read_text())
    assert (written["task"], written["classes"]) == ("detection", None)

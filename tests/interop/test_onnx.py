"""ONNX: named ends, any batch or a fixed one, the same logits in onnxruntime, and nothing kept that differs."""

import json
from pathlib import Path

import keras
import numpy as np
import onnx
import pytest

import mobiatt_tf.interop.onnx as exporter
from keras_models import FAMILIES
from mobiatt_tf import data, quantization, verification
from mobiatt_tf.errors import UserError
from tests.models.dense import toy
from tests.processes import run_module

to_numpy = keras.ops.convert_to_numpy


def digits(size: tuple[int, int], count: int = 9) -> tuple[np.ndarray, np.ndarray]:
    return verification.dataset_images(data.load("digits"), size, count)


def build(family: str, **arguments: object) -> keras.Model:
    keras.utils.set_random_seed(0)
    return FAMILIES[family].build("quickstart", **{"num_classes": 10, **arguments})  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["mobile", "softmax"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_keras_at_any_batch(family: str, attention: str, tmp_path: Path) -> None:
    model = build(family, attention=attention)
    images, labels = digits(model.input_shape[1:3])
    result = exporter.export(model, tmp_path / "model.onnx", images, labels)
    assert result.comparison.max_relative_error < 1e-4
    assert result.comparison.agreement == 1
    assert not result.quantized
    proto = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import if entry.domain == ""] == [("", 17)]
    assert [(value.name, value.type.tensor_type.shape.dim[0].dim_param) for value in proto.graph.input] == [
        ("images", "batch")
    ]
    assert [value.name for value in proto.graph.output] == ["logits"]
    expected = to_numpy(model(images))
    for count in (1, 4, 9):
        actual = exporter.run_file(tmp_path / "model.onnx", images[:count])
        assert np.abs(actual - expected[:count]).max() < 1e-4 * np.abs(expected).max()
    report = json.loads((tmp_path / "model.onnx.json").read_text())
    assert report["verification"]["passed"] is True
    assert report["verification"]["images"] == 9
    assert report["versions"]["tf2onnx"]


@pytest.mark.slow
def test_a_fixed_batch_and_a_distilled_model_in_half_precision(tmp_path: Path) -> None:
    model = build("efficientformer_v2", distilled=True, dtype="mixed_bfloat16")
    images, labels = digits((32, 32), count=5)
    result = exporter.export(model, tmp_path / "model.onnx", images, labels, batch_size=2)  # 5 = 2 + 2 + 1
    assert result.comparison.passed
    shape = onnx.load(tmp_path / "model.onnx").graph.input[0].type.tensor_type.shape
    assert [dim.dim_value for dim in shape.dim] == [2, 32, 32, 3]


@keras.saving.register_keras_serializable(package="tests")
class FakeQuantize(keras.layers.Layer):
    """int8 over a fixed range, as quantization-aware training leaves it in the graph."""

    def call(self, inputs):
        return keras.quantizers.fake_quant_with_min_max_vars(inputs, -4.0, 4.0, num_bits=8)


@pytest.mark.slow
def test_fake_quantization_becomes_quantize_and_dequantize(tmp_path: Path) -> None:
    images = keras.Input((8, 8, 3))
    x = FakeQuantize()(keras.layers.Conv2D(8, 3, activation="relu")(FakeQuantize()(images)))
    model = keras.Model(images, keras.layers.Dense(4)(keras.layers.GlobalAveragePooling2D()(x)))
    result = exporter.export(model, tmp_path / "model.onnx", digits((8, 8))[0])
    assert result.quantized
    assert result.op_counts["QuantizeLinear"] == result.op_counts["DequantizeLinear"] == 2
    assert result.comparison.tolerance == exporter.QUANTIZED_TOLERANCE


def test_a_file_that_differs_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "TOLERANCE", 0.0)
    images = keras.Input((8, 8, 3))
    model = keras.Model(images, keras.layers.Dense(4)(keras.layers.GlobalAveragePooling2D()(images)))
    with pytest.raises(UserError, match=r"differs from its Keras model by .* more than the allowed 0e\+00"):
        exporter.export(model, tmp_path / "model.onnx", digits((8, 8))[0] * np.float32(1.1))
    assert list(tmp_path.iterdir()) == []


class Gamma(keras.layers.Layer):
    """ONNX has no such operator."""

    def call(self, inputs):
        import tensorflow as tf

        return tf.math.lgamma(inputs)


def test_what_onnx_does_not_have_is_one_error(tmp_path: Path) -> None:
    images = keras.Input((8, 8, 3))
    model = keras.Model(images, keras.layers.GlobalAveragePooling2D()(Gamma()(images)))
    with pytest.raises(UserError, match=r"cannot load|cannot convert") as error:
        exporter.export(model, tmp_path / "model.onnx", digits((8, 8))[0])
    assert "Lgamma" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deit", "efficientformer_v2"])
def test_a_model_for_quantization_aware_training_becomes_qdq(family: str, tmp_path: Path) -> None:
    model = build(family)
    images, labels = digits(model.input_shape[1:3])
    quantized = quantization.quantize_aware(model)
    quantization.calibrate(quantized, [images])
    result = exporter.export(quantized, tmp_path / "model.onnx", images, labels)
    assert result.comparison.max_relative_error < exporter.QUANTIZED_TOLERANCE
    assert result.quantized
    rounded = len(quantization.quantized_layers(quantized))
    assert result.op_counts["QuantizeLinear"] == result.op_counts["DequantizeLinear"] >= 2 * rounded


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    """A saved PVTv2: its layers must be known to a program that never imports keras_models."""
    build("pvt_v2").save(tmp_path / "model.keras")
    done = run_module(
        "mobiatt_tf.interop.onnx", f"--checkpoint={tmp_path}", f"--output={tmp_path}/model.onnx", "--check_images=4"
    )
    assert done.returncode == 0, done.stderr
    assert "same class on 100.00% of 4 real images" in done.stdout
    assert "crops of two photographs" in done.stdout
    for flags, message in (
        ([f"--checkpoint={tmp_path}", f"--output={tmp_path}/model.bin"], "must end in .onnx"),
        ([f"--checkpoint={tmp_path}/absent", f"--output={tmp_path}/other.onnx"], "There is no model at"),
        ([f"--checkpoint={tmp_path}", f"--output={tmp_path}/o.onnx", "--dataset=nowhere"], "no dataset or directory"),
    ):
        failed = run_module("mobiatt_tf.interop.onnx", *flags)
        assert failed.returncode == 1
        assert message in failed.stderr
        assert "Traceback" not in failed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.keras", "model.onnx", "model.onnx.json"]


def test_detectors_and_segmenters_are_refused() -> None:
    for task, shape in (("detection", r"\(None, 2313, 4\)"), ("segmentation", r"\(None, 24, 32, 3\)")):
        with pytest.raises(UserError, match=rf"Only classifiers can be exported to ONNX, but .*{shape}"):
            exporter.convert(toy(task, "pvt_v2"))

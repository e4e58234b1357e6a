"""Quantized files: structure of all families, accuracy of a trained model on its whole test set, refusals."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_models import FAMILIES, DeiTMobiAtt
from mobiatt_tf import data, quantization, training, verification
from mobiatt_tf.errors import UserError
from mobiatt_tf.models import rebuild
from tests.tflite.int8_ops import int8_operators
from tests.training.small import make_dataset, make_model, recipe
from tflite import convert, export, inspect, qat, quantize

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "runs" / "quickstart" / "train"


def calibrated(model: keras.Model, policy: str, images: np.ndarray) -> keras.Model:
    copy = quantization.quantize_aware(model, policy)
    quantization.calibrate(copy, [images])
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["int8", "int8_full", "dynamic", "float16"])
@pytest.mark.parametrize(
    ("family", "attention"),
    [("deit", "mobile"), ("deit", "softmax"), ("pvt_v2", "mobile"), ("efficientformer_v2", "mobile")],
)
def test_file_equals_the_fake_quantized_model(family: str, attention: str, policy: str, tmp_path: Path) -> None:
    keras.utils.set_random_seed(1)
    model = FAMILIES[family].build("quickstart", num_classes=10, attention=attention)
    images = verification.photographs(model.input_shape[1:3], 24)
    result = export.export(calibrated(model, policy, images), tmp_path / "model.tflite", None, images, runs=3)
    assert result.format == policy
    assert result.comparison.max_relative_error < 0.1
    operators = int8_operators(result.path)
    assert not {"SOFTMAX", "DIV", "GELU"} & operators.keys()
    assert ("BATCH_MATMUL" in operators) == (policy == "int8_full" and attention == "mobile")
    if policy.startswith("int8"):
        assert result.description.delegate_partitions == 1
        assert result.description.undelegated_ops == {}
        assert result.description.inputs[0].dtype == result.description.outputs[0].dtype == "int8"
        projections = [w for w in model.weights if w.path.endswith("kernel") and "talking" not in w.path]
        assert sum(operators[name] for name in ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")) == len(projections)


@pytest.mark.slow
def test_deit_tiny_at_224_is_one_partition_and_small(tmp_path: Path) -> None:
    """The latency against dynamic range is measured by benchmarks/quantization.py."""
    model = DeiTMobiAtt("tiny")
    images = verification.photographs((224, 224), 8)
    sizes = {}
    for name, source in (("float32", model), ("int8", calibrated(model, "int8", images))):
        path = tmp_path / f"{name}.tflite"
        path.write_bytes(convert.convert(source))
        sizes[name] = path.stat().st_size
    description = inspect.describe(tmp_path / "int8.tflite")
    assert description.delegate_partitions == 1
    assert description.undelegated_ops == {}
    assert description.max_rank <= 4
    assert sizes["int8"] <= 0.27 * sizes["float32"]
    assert not {"SOFTMAX", "DIV", "GELU", "LOGISTIC"} & int8_operators(tmp_path / "int8.tflite").keys()


@pytest.fixture(scope="module")
def trained() -> tuple[keras.Model, data.Dataset]:
    """The quickstart's model, which `make pytest` trains first, and its dataset."""
    dataset = verification.dataset_of(str(QUICKSTART), None, None)
    return quantize.load_float(str(QUICKSTART), dataset), dataset


@pytest.mark.slow
def test_calibrated_files_of_a_trained_model_on_its_whole_test_set(
    trained: tuple[keras.Model, data.Dataset], tmp_path: Path
) -> None:
    model, dataset = trained
    report = quantize.quantize(model, dataset, ["int8", "int8_full", "dynamic", "tf_int8"], tmp_path, runs=5)
    rows = {row["name"]: row for row in report["rows"]}
    top1 = rows["Keras float32"]["top1"]
    assert report["test_images"] == len(dataset.test)
    assert rows["float32.tflite"]["top1"] == pytest.approx(top1, abs=2e-4)
    assert rows["int8.tflite"]["top1"] >= top1 - 0.005
    assert abs(rows["int8.tflite"]["top1"] - rows["Keras fake-quant"]["top1"]) <= 0.002
    assert rows["int8.tflite"]["agreement_with_fake_quant"] >= 0.995
    assert rows["int8_full.tflite"]["top1"] >= top1 - 0.01
    assert rows["int8_full.tflite"]["agreement_with_fake_quant"] >= 0.99
    assert rows["dynamic.tflite"]["agreement_with_fake_quant"] is None
    assert {"int8.tflite", "int8_full.tflite", "dynamic.tflite", "float32.tflite", "report.json", "report.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    # TensorFlow's own int8 does not bear this operator: it ends on a division by 0 or loses most of the accuracy.
    naive = rows.get("tf_int8.tflite")
    assert "tf_int8.tflite" in report["failures"] or naive["refused"]
    assert not (tmp_path / "tf_int8.tflite").exists()
    assert not list(tmp_path.glob(".candidates.*"))
    with pytest.raises(UserError, match="tf_int8"):
        quantize.finish(report, tmp_path)


@pytest.mark.slow
def test_a_file_that_loses_too_much_is_refused_and_its_layer_named(
    trained: tuple[keras.Model, data.Dataset], tmp_path: Path
) -> None:
    model, dataset = trained
    dataset = quantize.limited(dataset, 300)
    twin = quantization.calibrated_copy(model, "int8", dataset, 64)
    damaged = next(layer for layer in quantization.quantized_layers(twin) if layer.name == "block1_mlp")
    damaged.fc2.input_quantizer.set_range(0.0, 1e-3)
    paths = {name: tmp_path / f"candidate_{name}" for name in ("float32.tflite", "int8.tflite")}
    for path, source in zip(paths.values(), (model, twin), strict=True):
        path.write_bytes(convert.convert(source))
    output = tmp_path / "output"
    output.mkdir()
    (output / "int8.tflite").write_bytes(b"of an earlier run")
    report = quantize.compare_and_keep(model, {"int8.tflite": twin}, dataset, paths, output, 0.001, runs=3)
    refused = {row["name"]: row["refused"] for row in report["rows"]}
    assert refused["float32.tflite"] is None
    assert "The layer that loses most is block1_mlp" in refused["int8.tflite"]
    assert next(iter(report["layer_errors"])) == "block1_mlp"
    assert not (output / "int8.tflite").exists()
    assert json.loads((output / "report.json").read_text())["rows"] == report["rows"]
    with pytest.raises(UserError, match=r"loses .* points, more than the allowed 0\.10"):
        quantize.finish(report, output)


@pytest.mark.slow
def test_fine_tuning_goes_on_from_its_checkpoint_and_its_file_is_kept(tmp_path: Path) -> None:
    """A small model of plain Keras layers: convolution, frozen batch norm, ReLU, layer norm, dense."""
    dataset = make_dataset()
    model = make_model()
    model.save(tmp_path / "float.keras")
    arguments = (str(tmp_path / "float.keras"), dataset, "int8", recipe(epochs=2), tmp_path / "train")
    strategy = training.make_strategy("one")
    results = qat.fine_tune(*arguments, strategy, calibration_images=64)
    assert results["model"]["policy"] == "int8"
    for name in ("results.json", "model.keras"):
        (tmp_path / "train" / name).unlink()
    again = qat.fine_tune(*arguments, strategy, calibration_images=64)
    assert again["top1"] == results["top1"]
    assert again["loss"] == pytest.approx(results["loss"], rel=1e-6)
    twin = keras.saving.load_model(tmp_path / "train" / "model.keras")
    quantization.check_calibrated(twin)
    images = np.concatenate([images for images, _ in data.calibration_batches(dataset, (8, 8), 64)])
    path = tmp_path / "int8.tflite"
    comparison = export.export(rebuild(twin, None), path, None, images, runs=3).comparison
    assert comparison.passed
    with pytest.raises(UserError, match=r"policy: int8 there, dynamic now"):
        qat.fine_tune(arguments[0], dataset, "dynamic", *arguments[3:], strategy, calibration_images=64)


def test_models_that_do_not_fit_are_errors(tmp_path: Path) -> None:
    dataset = make_dataset()
    path = tmp_path / "other.keras"
    DeiTMobiAtt("quickstart", num_classes=10).save(path)
    with pytest.raises(UserError, match="has 10 classes, the dataset colours has 3: it is the checkpoint of another"):
        quantize.load_float(str(path), dataset)
    quantized = quantization.quantize_aware(make_model(), "dynamic")
    quantized.save(path)
    with pytest.raises(UserError, match="is quantized already"):
        quantize.load_float(str(path), dataset)
    with pytest.raises(UserError, match="Give --dataset"):
        verification.dataset_of(str(path), None, None)
    with pytest.raises(ValueError, match="was quantized for dynamic; it cannot be written as float32"):
        convert.convert(quantized, "float32")
    with pytest.raises(ValueError, match=r"tflite.quantize --method=int8"):
        convert.convert(make_model(), "int8")
    with pytest.raises(ValueError, match="is not calibrated"):
        convert.convert(quantization.quantize_aware(make_model(), "int8"))


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_command_lines_say_what_is_wrong(tmp_path: Path) -> None:
    common = (f"--checkpoint={QUICKSTART}", f"--output_dir={tmp_path}")
    assert "choose from dynamic, float16, int8" in run("tflite.quantize", *common, "--method=int4").stderr
    assert (
        "There is no model at" in run("tflite.quantize", "--checkpoint=nowhere", "--dataset=digits", common[1]).stderr
    )
    assert "epochs" in run("tflite.qat", *common, "--epochs=0").stderr
    assert not any(tmp_path.iterdir())
    shutil.rmtree(tmp_path)

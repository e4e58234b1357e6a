"""Export: the file equals the Keras model, is one XNNPACK partition, and is not left behind when it should not be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import tflite.verify
from keras_models import DeiTMobiAtt
from mobiatt_tf import data, ops, verification
from mobiatt_tf.errors import UserError
from mobiatt_tf.models import rebuild
from tflite import convert, export, inspect

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model() -> keras.Model:
    keras.utils.set_random_seed(0)
    return DeiTMobiAtt("quickstart", num_classes=10)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Real images: scikit-learn's digits at 28 x 28."""
    return verification.dataset_images(data.load("digits"), (28, 28), 40)


@pytest.mark.slow
@pytest.mark.parametrize("format", convert.FORMATS)
@pytest.mark.parametrize("attention", ["mobile", "softmax", "linear"])
def test_file_equals_the_model_in_one_partition(
    attention: str, format: str, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    model = DeiTMobiAtt("quickstart", num_classes=10, attention=attention)
    result = export.export(model, tmp_path / "model.tflite", format, *digits)
    assert result.comparison.passed
    assert result.comparison.images == 40
    assert result.description.delegate_partitions == 1
    assert result.description.undelegated_ops == {}
    assert result.description.max_rank <= 4
    # A second interpreter on the written file, in the same process, agrees with the model.
    outputs = tflite.verify.run_file(tmp_path / "model.tflite", digits[0][:3])
    expected = keras.ops.convert_to_numpy(model(digits[0][:3]))
    assert np.abs(outputs - expected).max() <= tflite.verify.TOLERANCES[format] * np.abs(expected).max()
    written = json.loads((tmp_path / "model.json").read_text())
    assert written["verification"]["passed"] is True
    assert written["description"]["op_counts"]["FULLY_CONNECTED"] >= 4 * 4
    assert "TILE" not in written["description"]["op_counts"]
    assert "BROADCAST_TO" not in written["description"]["op_counts"]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["mobile", "softmax"])
def test_deit_tiny_at_224_is_one_partition_without_flex(attention: str, tmp_path: Path) -> None:
    model = DeiTMobiAtt("tiny", attention=attention)
    images = verification.photographs((224, 224), 4)
    result = export.export(model, tmp_path / "tiny.tflite", "float32", images, runs=3)
    assert result.description.delegate_partitions == 1
    assert result.description.undelegated_ops == {}
    assert result.description.flex_ops == ()
    assert result.comparison.max_relative_error < 1e-5
    assert result.comparison.agreement == 1


@pytest.mark.slow
def test_sizes_shrink_with_the_format(
    model: keras.Model, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    sizes = {}
    for format in convert.FORMATS:
        export.export(model, tmp_path / f"{format}.tflite", format, *digits, runs=1)
        sizes[format] = (tmp_path / f"{format}.tflite").stat().st_size
    assert sizes["float16"] < 0.65 * sizes["float32"]
    assert sizes["dynamic"] < 0.5 * sizes["float32"]


def test_rebuilding_shares_nothing_and_fixes_the_batch(
    model: keras.Model, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    copy = rebuild(model, batch_size=1)
    assert copy.input_shape == (1, 28, 28, 3)
    image = digits[0][:1]
    before = keras.ops.convert_to_numpy(model(image))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(copy(image)), before, rtol=1e-5, atol=1e-6)
    copy.get_layer("head").set_weights([np.zeros((64, 10)), np.zeros(10)])
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model(image)), before)


def test_a_model_trained_in_bfloat16_is_rebuilt_in_float32() -> None:
    copy = rebuild(DeiTMobiAtt("quickstart", num_classes=10, dtype="mixed_bfloat16"), batch_size=1)
    layers = [layer for layer in copy._flatten_layers() if hasattr(layer, "compute_dtype") and layer is not copy]
    assert {layer.compute_dtype for layer in layers} == {"float32"}


@pytest.mark.slow
def test_distilled_model_exports_the_mean_of_its_heads(digits: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    model = DeiTMobiAtt("quickstart", num_classes=10, distilled=True)
    result = export.export(model, tmp_path / "model.tflite", "float32", *digits, runs=1)
    assert result.comparison.passed
    assert [tensor.shape for tensor in result.description.outputs] == [(1, 10)]


@pytest.mark.slow
def test_a_file_that_does_not_match_is_not_left_behind(
    model: keras.Model, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tflite.verify.TOLERANCES, "dynamic", 1e-9)  # int8 weights cannot be that close
    with pytest.raises(UserError, match=r"differs from its Keras model by .* more than the allowed 1e-09"):
        export.export(model, tmp_path / "model.tflite", "dynamic", *digits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_wrong_outputs_are_noticed(model: keras.Model, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    """The file of one model against another model with the same shape."""
    export.export(model, tmp_path / "model.tflite", "float32", *digits, runs=1)
    other = DeiTMobiAtt("quickstart", num_classes=10)
    check = tflite.verify.verify(tmp_path / "model.tflite", other, *digits, tolerance=1e-5)
    assert not check.passed


def test_not_a_number_does_not_pass() -> None:
    check = verification.Comparison(1, float("nan"), 1.0, 1e-5, None, None)
    assert not check.passed


class InverseErrorFunction(keras.layers.Layer):
    """LiteRT has no such operator."""

    def call(self, inputs: object) -> object:
        return keras.ops.erfinv(inputs)


def test_operators_outside_litert_are_refused(tmp_path: Path) -> None:
    inputs = keras.Input((8, 8, 3), name="images")
    model = keras.Model(inputs, keras.layers.Flatten()(InverseErrorFunction()(inputs)), name="inverse")
    with pytest.raises(UserError, match="TensorFlow cannot convert inverse to TFLite: "):
        export.export(model, tmp_path / "x.tflite", "float32", np.zeros((1, 8, 8, 3), "float32"))
    assert list(tmp_path.iterdir()) == []


def test_several_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match="one output can be exported, but features has 6"):
        convert.convert(DeiTMobiAtt("quickstart", features_only=True, name="features"))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_a_model_trained_in_sixteen_bits_exports(
    policy: str, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    model = DeiTMobiAtt("quickstart", num_classes=10, dtype=policy)
    result = export.export(model, tmp_path / "model.tflite", "float32", *digits, runs=1)
    assert result.comparison.max_relative_error < 1e-5


@pytest.mark.slow
def test_an_export_stopped_before_its_end_leaves_the_old_pair(
    model: keras.Model, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    export.export(model, tmp_path / "model.tflite", "float32", *digits, runs=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="runs"):  # the plan of the latency run, the last step, is refused
        export.export(model, tmp_path / "model.tflite", "dynamic", *digits, runs=0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_gelu_is_fused(tmp_path: Path) -> None:
    inputs = keras.Input((4, 4, 2), name="images")
    x = keras.layers.Dense(4)(keras.layers.Flatten()(inputs))
    model = keras.Model(inputs, GELU()(x))
    (tmp_path / "gelu.tflite").write_bytes(convert.convert(model))
    assert inspect.describe(tmp_path / "gelu.tflite").op_counts.get("GELU") == 1


class GELU(keras.layers.Layer):
    def call(self, inputs: object) -> object:
        return ops.gelu(inputs)


def test_unknown_format_and_open_sizes_are_refused(model: keras.Model) -> None:
    with pytest.raises(ValueError, match=r"no format 'int4'\. Choose one of float32, float16, dynamic"):
        convert.convert(model, "int4")
    inputs = keras.Input((None, None, 3))
    with pytest.raises(ValueError, match="one input of fixed height and width"):
        convert.convert(keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(inputs)))


def test_photographs_are_real_and_repeatable() -> None:
    first, again = (verification.photographs((32, 48), 6) for _ in range(2))
    assert first.shape == (6, 32, 48, 3)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, again)
    assert np.std(first, axis=(1, 2, 3)).min() > 0.1
    assert -2.2 < first.min() < first.max() < 2.7


def run_export(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tflite.export", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_command_line_from_a_keras_file(model: keras.Model, tmp_path: Path) -> None:
    model.save(tmp_path / "model.keras")
    result = run_export(
        f"--checkpoint={tmp_path / 'model.keras'}", f"--output={tmp_path / 'out.tflite'}", "--dataset=digits",
        "--check_images=20",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "1 partition" in result.stdout
    assert "of 20 real images" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.keras", "out.json", "out.tflite"]


@pytest.mark.slow
def test_command_line_at_another_image_size(model: keras.Model, tmp_path: Path) -> None:
    model.save(tmp_path / "model.keras")
    arguments = [f"--checkpoint={tmp_path / 'model.keras'}", f"--output={tmp_path / 'out.tflite'}", "--dataset=digits"]
    result = run_export(*arguments, "--check_images=5", "--image_size=42x28")
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert [tensor["shape"] for tensor in written["description"]["inputs"]] == [[1, 42, 28, 3]]
    refused = run_export(*arguments, "--image_size=30")
    assert refused.returncode == 1
    assert (
        "cannot take images of 30 x 30 pixels: Both sides of the image must be multiples of the patch size 7"
        in refused.stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint=nowhere", "--output=x.tflite"], "There is no model at"),
        (["--checkpoint=broken.keras", "--output=x.tflite"], "cannot be read as a Keras model"),
        (["--output=x.tflite"], "Give --checkpoint="),
        (["--variant=quickstart", "--output=x.bin"], "must end in .tflite"),
        (["--variant=tiny", "--checkpoint=broken.keras", "--output=x.tflite"], "does not go with --checkpoint"),
        (["--variant=enormous", "--output=x.tflite"], "no DeiT variant 'enormous'"),
    ],
)
def test_command_line_errors_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.keras").write_bytes(b"PK\x03\x04 not a whole zip file")
    result = run_export(*arguments, cwd=tmp_path)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["broken.keras"]

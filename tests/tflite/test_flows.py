"""Files with flows: every output equals the Keras model's, the .json says where each is, and nothing wrong is left."""

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_models import FAMILIES, DeiTMobiAtt, PVTv2MobiAtt, resize
from mobiatt_tf import data, quantization, verification
from mobiatt_tf.errors import UserError
from mobiatt_tf.introspection import model_flows
from tests.processes import run_module
from tflite import classes, flows, inspect


def _shaken(model: keras.Model, seed: int = 0) -> keras.Model:
    """The model with larger weights than untrained ones have, whose flows hardly differ from token to token."""
    generator = np.random.default_rng(seed)
    model.set_weights(
        [value + generator.normal(0, 0.15, value.shape) * (value.ndim > 1) for value in model.get_weights()]
    )
    return model


def _written(model: keras.Model, directory: Path) -> tuple[Path, dict[str, Any], np.ndarray]:
    images = verification.photographs(model.input_shape[1:3], 6)
    path = directory / "flows.tflite"
    return path, flows.write(model, path, images, classes.metadata(model, None)), images


def _assert_equal(model: keras.Model, path: Path, report: dict[str, Any], images: np.ndarray) -> None:
    """Every output of the file against the model as it was given, not as it was rebuilt."""
    found = flows.run_file(path, images)
    logits = keras.ops.convert_to_numpy(model(images, training=False))
    np.testing.assert_allclose(found["logits"], logits, atol=1e-5 * np.abs(logits).max())
    seen = model_flows(model, images)
    assert list(seen) == [layer["layer"] for layer in report["flows"]]
    assert len(found) == 1 + 2 * len(seen)
    for layer in report["flows"]:
        tokens = layer["prefix"] + layer["grid"][0] * layer["grid"][1]
        for name in ("competition", "allocation"):
            expected = seen[layer["layer"]][name]
            assert found[layer[name]].shape == (6, layer["heads"], tokens)
            # In units of how much the flow varies: closer than any colour of a picture can show.
            np.testing.assert_allclose(found[layer[name]], expected, atol=1e-3 * expected.std())


@pytest.fixture(scope="module")
def deit(tmp_path_factory: pytest.TempPathFactory) -> tuple[keras.Model, Path, dict[str, Any], np.ndarray]:
    """A DeiT for images of 28 x 42, its file, its report and the images."""
    keras.utils.set_random_seed(0)
    model = _shaken(DeiTMobiAtt("quickstart", image_size=(28, 42), num_classes=7))
    return model, *_written(model, tmp_path_factory.mktemp("flows"))


def test_the_file_equals_the_model(deit: tuple[keras.Model, Path, dict[str, Any], np.ndarray]) -> None:
    model, path, report, images = deit
    _assert_equal(model, path, report, images)
    assert [layer["layer"] for layer in report["flows"]] == [f"block{index}_attention" for index in range(4)]
    assert report["flows"][1] == {
        "layer": "block1_attention",
        "competition": "competition_1",
        "allocation": "allocation_1",
        "prefix": 1,
        "grid": [4, 6],
        "heads": 8,
    }
    assert report["verification"]["images"] == 6
    assert max(report["verification"]["max_relative_errors"].values()) < flows.TOLERANCE


def test_the_file_is_one_partition_with_named_outputs(
    deit: tuple[keras.Model, Path, dict[str, Any], np.ndarray],
) -> None:
    description = inspect.describe(deit[1])
    assert description.delegate_partitions == 1
    (signature,) = description.signatures
    assert signature.inputs == ("images",)
    assert {"logits", "competition_0", "allocation_3"} < set(signature.outputs)


def test_the_sidecar_belongs_to_its_file(
    deit: tuple[keras.Model, Path, dict[str, Any], np.ndarray], tmp_path: Path
) -> None:
    _, path, report, _ = deit
    assert flows.read_sidecar(path) == report == json.loads(path.with_suffix(".json").read_text())
    copy = tmp_path / "copy.tflite"
    copy.write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"no file .*copy.json"):
        flows.read_sidecar(copy)
    sidecar = copy.with_suffix(".json")
    sidecar.write_text(json.dumps({**report, "kind": "export"}))
    with pytest.raises(UserError, match=r"does not describe a file with flows.*tflite.flows"):
        flows.read_sidecar(copy)
    sidecar.write_text(json.dumps(report))
    copy.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match="not the file"):
        flows.read_sidecar(copy)
    with pytest.raises(UserError, match="There is no file"):
        flows.read_sidecar(tmp_path / "none.tflite")


def test_a_file_that_does_not_match_is_not_left_behind(tmp_path: Path) -> None:
    """A model whose logits are no numbers agrees with nothing, itself included."""
    model = DeiTMobiAtt("quickstart", num_classes=3)
    head = model.get_layer("head")
    head.set_weights([np.full_like(value, np.nan) for value in head.get_weights()])
    (tmp_path / "flows.tflite").write_bytes(b"old")
    with pytest.raises(UserError, match=r"1 outputs .*logits by nan.*Nothing was written"):
        _written(model, tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("flows.tflite", b"old")]


@pytest.mark.slow
def test_the_heads_of_a_distilled_model_are_averaged(tmp_path: Path) -> None:
    model = _shaken(DeiTMobiAtt("quickstart", num_classes=5, distilled=True))
    path, report, images = _written(model, tmp_path)
    _assert_equal(model, path, report, images)
    assert {layer["prefix"] for layer in report["flows"]} == {2}
    assert len(report["classify"]["classes"]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("family", ["pvt_v2", "efficientformer_v2"])
def test_pyramids(family: str, tmp_path: Path) -> None:
    """Grids that shrink from stage to stage, and in EfficientFormerV2 tokens of a halved map."""
    model = _shaken(FAMILIES[family].build("quickstart", image_size=(64, 32), num_classes=4))
    path, report, images = _written(model, tmp_path)
    _assert_equal(model, path, report, images)
    grids = {
        "pvt_v2": [[32, 16], [16, 8], [8, 4], [4, 2]],
        "efficientformer_v2": [[4, 2], [4, 2]],
    }
    assert [layer["grid"] for layer in report["flows"]] == grids[family]
    assert {layer["prefix"] for layer in report["flows"]} == {0}


def test_only_layers_of_mobile_attention_are_shown() -> None:
    model = PVTv2MobiAtt("quickstart", num_classes=3, attention=("mobile", "mobile", "softmax", "softmax"))
    assert [layer.layer for layer in flows.layers_of(model)] == ["stage1_block0_attention", "stage2_block0_attention"]


def test_a_resized_model_has_other_grids() -> None:
    model = resize(DeiTMobiAtt("quickstart", num_classes=3), (56, 28))
    assert {layer.grid for layer in flows.layers_of(model)} == {(8, 4)}


def test_tokens_of_no_image_are_refused() -> None:
    from mobiatt_tf import MobileAttention

    inputs = keras.Input((9, 16))
    model = keras.Model(inputs, MobileAttention(4, name="alone")(inputs))
    with pytest.raises(UserError, match="Nothing says where in the image the 9 tokens of alone lie"):
        flows.layers_of(model)


def test_a_quantized_model_is_refused() -> None:
    quantized = quantization.quantize_aware(DeiTMobiAtt("quickstart", num_classes=3), "int8")
    with pytest.raises(UserError, match=r"quantized for int8.*Give the checkpoint that it was made from"):
        flows.with_flows(quantized)


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    mobile, softmax = tmp_path / "mobile.keras", tmp_path / "softmax.keras"
    DeiTMobiAtt("quickstart", num_classes=10).save(mobile)
    DeiTMobiAtt("quickstart", num_classes=10, attention="softmax").save(softmax)
    output = tmp_path / "flows.tflite"

    def run(*arguments: str) -> tuple[int, str, str]:
        done = run_module("tflite.flows", *arguments)
        return done.returncode, done.stdout, done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""

    status, _, error = run(f"--checkpoint={softmax}", f"--output={output}")
    assert (status, output.exists()) == (1, False)
    assert error.startswith("error: ")
    assert "no layer of Mobile-Attention" in error
    status, _, error = run(f"--checkpoint={mobile}", f"--output={tmp_path / 'flows.bin'}")
    assert status == 1
    assert "must end in .tflite" in error
    status, text, _ = run(f"--checkpoint={mobile}", "--dataset=digits", f"--output={output}", "--check_images=8")
    assert status == 0
    assert "flows of 4 layers, checked on 8 images (test images of digits)" in text
    report = flows.read_sidecar(output)
    assert report["classify"]["classes"] == list("0123456789")
    assert flows.run_file(output, verification.dataset_images(data.load("digits"), (28, 28), 2)[0])["logits"].shape == (
        2,
        10,
    )

"""A trained model at other image sizes: `reference_tokens` keeps its scale, without it the logits drift."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_models
from mobiatt_tf import data
from mobiatt_tf.layers import MobileAttention
from mobiatt_tf.models import load_trained
from tests.training.small import ROOT
from tflite import convert
from tflite.verify import run_file
from tools.resolution import compare_sizes

to_numpy = keras.ops.convert_to_numpy


@pytest.fixture(scope="module")
def trained() -> Path:
    """DeiT on random crops of Fashion-MNIST, as ImageNet models are trained: objects of all sizes.

    The command of docs/models.md, which returns at once where that has been run.
    """
    command = [sys.executable, "train_tpu_gpu.py", "--recipe=quickstart", "--variant=quickstart", "--jit_compile"]
    flags = ["--augmentation=resized_crop", "--limit_train=20480", "--epochs=5", "--output_dir=runs/crops"]
    subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, check=True, timeout=900)
    return ROOT / "runs" / "crops"


@pytest.mark.slow
def test_a_trained_model_keeps_its_scale_at_other_sizes(trained: Path) -> None:
    model, dataset = load_trained(trained), data.load("fashion_mnist")
    assert json.loads((trained / "results.json").read_text())["top1"] > 0.6
    rescaled = compare_sizes(model, dataset, [1, 1.5, 2], 1000)
    published = compare_sizes(model, dataset, [1, 1.5, 2], 1000, rescaled=False)
    assert [row["size"] for row in rescaled] == [(28, 28), (42, 42), (56, 56)]
    assert rescaled[0]["drift"] == published[0]["drift"] == 0
    assert rescaled[0]["top1"] == published[0]["top1"]  # at the trained size the two are the same function
    for with_tokens, without in zip(rescaled[1:], published[1:], strict=True):
        assert with_tokens["drift"] < 0.75
        assert without["drift"] > 1.3 * with_tokens["drift"]
        assert with_tokens["top1"] > without["top1"] + 0.05


def attention_scale(model: keras.Model, image_size: tuple[int, int]) -> float:
    """Mean absolute output of the first block's token mixing for tokens that do not depend on the image."""
    layer = next(layer for layer in model.layers if isinstance(layer, MobileAttention))
    tokens = int(np.prod(layer.input.shape[1:-1]))
    row = np.random.default_rng(0).normal(size=(1, 1, layer.query.kernel.shape[0])).astype("float32")
    projected = layer.project(np.tile(row, (1, tokens, 1)))
    return float(np.abs(to_numpy(layer.mix_tokens(*projected))).mean())


@pytest.mark.parametrize("family", ["deit", "pvt_v2"])
def test_the_scale_survives_resizing_saving_and_loading(family: str, tmp_path: Path) -> None:
    build = functools.partial(keras_models.FAMILIES[family].build, "quickstart", num_classes=3)
    model = build()
    side = model.input_shape[1]
    larger = keras_models.resize(model, 2 * side)
    larger.save(tmp_path / "model.keras")
    loaded = load_trained(tmp_path / "model.keras")
    trained_at = build(image_size=2 * side, training_size=side)
    keras_models.copy_weights(larger, trained_at)
    published = build(image_size=2 * side)
    keras_models.copy_weights(larger, published)
    scale = attention_scale(model, (side, side))
    for other in (larger, loaded, trained_at):
        assert attention_scale(other, (2 * side, 2 * side)) == pytest.approx(scale, rel=1e-4)
    assert attention_scale(published, (2 * side, 2 * side)) > 3.5 * scale


@pytest.mark.slow
def test_the_scale_survives_the_export(tmp_path: Path) -> None:
    model = keras_models.resize(keras_models.FAMILIES["pvt_v2"].build("quickstart", num_classes=3), 64)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype("float32")
    (tmp_path / "model.tflite").write_bytes(convert.convert(model))
    expected = to_numpy(model(images))
    outputs = run_file(tmp_path / "model.tflite", images)
    np.testing.assert_allclose(outputs, expected, atol=1e-5 * np.abs(expected).max())
    for layer in model.layers:
        if hasattr(layer, "reference_tokens"):
            layer.reference_tokens = None
    assert np.abs(to_numpy(model(images)) - expected).max() > 1e-3 * np.abs(expected).max()

"""Each family trains from the command line, on several devices too, and starts from given weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from coreml import export as coreml_export
from keras_models import FAMILIES
from mobiatt_tf import data, verification
from mobiatt_tf.interop import save_pytorch
from mobiatt_tf.models import load_trained
from tests.training.small import ROOT, read_lines
from tflite import export

pytestmark = pytest.mark.slow


def start(output: Path, *flags: str) -> subprocess.Popen[str]:
    """train_tpu_gpu.py with the quickstart's recipe and variant, as a process."""
    program = [sys.executable, "train_tpu_gpu.py", "--recipe=quickstart", "--variant=quickstart"]
    return subprocess.Popen(
        [*program, f"--output_dir={output}", *flags],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Waits for its end; what it printed."""
    printed, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return printed


def call(output: Path, *flags: str) -> str:
    """Runs train_tpu_gpu.py to its end; what it prints."""
    return finish(start(output, *flags))


@pytest.mark.parametrize("family", ["pvt_v2", "efficientformer_v2"])
def test_learns_fashion_mnist_and_passes_the_gates_of_both_exporters(family: str, tmp_path: Path) -> None:
    call(tmp_path, f"--model={family}", "--dataset=fashion_mnist", "--epochs=1")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["images"] == 10_000
    assert results["top1"] > 0.85
    model = load_trained(tmp_path)
    images, labels = verification.dataset_images(data.load("fashion_mnist"), (32, 32), 500)
    exported = export.export(model, tmp_path / "model.tflite", "float32", images, labels, runs=3)
    assert exported.description.delegate_partitions == 1
    assert exported.comparison.agreement == 1
    assert exported.comparison.file_top1 > 0.82
    # The gates of Core ML: float16, iOS 15, at least 200 real images.
    package = coreml_export.export(model, tmp_path / "model.mlpackage", images[:200], labels[:200], ios=15)
    comparisons = package.verification.comparisons
    assert comparisons["typed"].max_relative_error < 1e-2
    assert comparisons["float16"].max_relative_error < 2e-2
    assert min(comparison.agreement for comparison in comparisons.values()) >= 0.99
    assert comparisons["typed"].file_top1 > 0.8


@pytest.mark.parametrize("family", FAMILIES)
def test_larger_images_and_short_runs(family: str, tmp_path: Path) -> None:
    side = 56 if family == "deit" else 64
    flags = ["--dataset=digits", "--limit_train=128", "--limit_test=50", "--batch_size=32", "--epochs=2"]
    call(tmp_path, f"--model={family}", f"--image_size={side}", "--head_dim=4", *flags)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["model"]["input_shape"] == [side, side, 3]
    assert results["model"]["head_dim"] == 4
    losses = [line["loss"] for line in read_lines(tmp_path) if line["kind"] == "train"]
    assert losses[-1] < losses[0]


def test_two_devices_see_the_batch_norm_of_one(tmp_path: Path) -> None:
    flags = ["--model=efficientformer_v2", "--dataset=digits", "--limit_train=64", "--limit_test=20", "--batch_size=16"]
    flags += ["--epochs=1", "--log_every=1"]
    two_devices = ("--strategy=mirrored", "--logical_devices=2")
    for process in [start(tmp_path / "one", *flags), start(tmp_path / "two", *flags, *two_devices)]:
        finish(process)
    one, two = (
        [line["loss"] for line in read_lines(tmp_path / name) if line["kind"] == "train"] for name in ("one", "two")
    )
    assert len(one) == 4
    np.testing.assert_allclose(two, one, atol=1e-4)
    norms = [
        layer
        for layer in load_trained(tmp_path / "two")._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    assert len(norms) > 10
    assert all(norm.synchronized for norm in norms)


@pytest.mark.parametrize("family", FAMILIES)
def test_fine_tuning_starts_from_the_softmax_host(family: str, tmp_path: Path) -> None:
    keras.utils.set_random_seed(3)
    host = FAMILIES[family].build("quickstart", num_classes=7, attention="softmax")
    save_pytorch(host, tmp_path / "host.safetensors")
    flags = ["--dataset=digits", "--limit_train=64", "--limit_test=20", "--batch_size=32", "--epochs=1"]
    flags += ["--learning_rate=1e-12", "--warmup_epochs=0", "--warmup_learning_rate=0", "--minimum_learning_rate=0"]
    said = call(tmp_path / "tuned", f"--model={family}", f"--start_from={tmp_path / 'host.safetensors'}", *flags)
    assert "weights carried over" in said
    assert "2 new (initial values kept): head/kernel, head/bias" in said
    assert json.loads((tmp_path / "tuned" / "results.json").read_text())["model"]["started_from"]
    (tmp_path / "host.safetensors").unlink()  # a run holds its own weights
    again = call(tmp_path / "tuned", f"--model={family}", f"--start_from={tmp_path / 'host.safetensors'}", *flags)
    assert "carried over" not in again
    # With a learning rate of nearly nothing, the trained weights are still the host's.
    host_weights, tuned = (
        {weight.path: keras.ops.convert_to_numpy(weight) for weight in model.trainable_weights}
        for model in (host, load_trained(tmp_path / "tuned"))
    )
    same = [path for path in tuned if not path.startswith("head/")]
    assert len(same) > 20
    for path in same:
        np.testing.assert_allclose(tuned[path], host_weights[path], atol=1e-6, err_msg=path)

"""train_tpu_gpu.py as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.small import ROOT

pytestmark = pytest.mark.slow


def call(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "train_tpu_gpu.py", "--dataset=digits", "--variant=quickstart", *flags],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_trains_and_evaluates_what_it_has_trained(tmp_path: Path) -> None:
    trained = call(
        f"--output_dir={tmp_path}", "--limit_train=96", "--limit_test=40", "--batch_size=32", "--epochs=2",
        "--augmentation=crop", "--image_size=21x14", "--attention=softmax,mobile,mobile,softmax",
        "--num_heads=2",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["step"] == 6
    assert results["recipe"]["augmentation"] == "crop"
    assert results["model"]["input_shape"] == [21, 14, 3]
    assert results["model"]["attention"] == ["softmax", "mobile", "mobile", "softmax"]
    # No batch of 128 needs to be filled for this.
    evaluated = call(f"--output_dir={tmp_path}", "--limit_train=10", "--limit_test=40", "--evaluate_only")
    assert evaluated.returncode == 0, evaluated.stderr
    assert f"top-1 {results['top1']:.2%}" in evaluated.stdout
    assert "on 40 images of digits" in evaluated.stdout
    model = tmp_path / "model.keras"
    model.write_bytes(model.read_bytes()[:-1000])
    damaged = call(f"--output_dir={tmp_path}", "--evaluate_only")
    assert damaged.returncode == 1
    assert f"error: {model} cannot be read as a Keras model" in damaged.stderr
    assert "Traceback" not in damaged.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_size=12by8"], "--image_size=12by8 is not a size"),
        (["--limit_train=10"], "10 training images do not fill one batch of 128"),
        (["--strategy=mirrored", "--logical_devices=3"], "128 images cannot be split evenly over 3 devices"),
        (["--evaluate_only"], "There is no model at"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], message: str, tmp_path: Path) -> None:
    result = call(f"--output_dir={tmp_path}/run", *flags)
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()

"""The emulated phone and small real .tflite files."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import pytest
import tensorflow as tf

from tests.processes import ROOT, missing
from tools.phone.emulated import EmulatedPhone, unavailable


@pytest.fixture(scope="session")
def toolchain() -> None:
    """What tools/phone/setup.sh makes."""
    if reason := unavailable():
        missing(f"No phone can be emulated here: {reason}")
    done = subprocess.run(
        ["sh", ROOT / "tools/phone/setup.sh"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        missing(done.stderr.strip().splitlines()[-1])


@pytest.fixture
def phone(toolchain: None) -> Iterator[EmulatedPhone]:
    """An x86_64 phone, which needs no emulation of the processor."""
    with EmulatedPhone("x86_64") as phone:
        yield phone


@pytest.fixture
def arm_phone(toolchain: None) -> Iterator[EmulatedPhone]:
    """An arm64-v8a phone in QEMU."""
    if reason := unavailable("arm64-v8a"):
        missing(f"No arm64-v8a phone can be emulated here: {reason}")
    with EmulatedPhone("arm64-v8a") as phone:
        yield phone


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Small models by name: "dense" and "wide" (all XNNPACK's), "power" (not POW), "flex" (no builtin operator)."""
    directory = tmp_path_factory.mktemp("models")

    def converted(name: str) -> Path:
        path = directory / f"{name}.tflite"
        if not path.exists():
            path.write_bytes(_convert(name))
        return path

    return converted


def _convert(name: str) -> bytes:
    # Large enough to take several of the microseconds in which benchmark_model counts.
    x = keras.Input((64, 64), batch_size=1)
    y = keras.layers.Dense(256 if name == "wide" else 64, activation="relu")(x)  # (1, 64, units)
    if name == "power":
        y = keras.ops.power(keras.ops.abs(y) + 1.0, keras.ops.sigmoid(x[..., :1]))
    if name == "flex":
        y = keras.ops.inv(y)  # (1, 64, 64)
    converter = tf.lite.TFLiteConverter.from_keras_model(keras.Model(x, keras.layers.Dense(4)(y)))
    if name == "flex":
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS]
    content: bytes = converter.convert()
    return content

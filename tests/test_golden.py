"""The layer against the authors' published module: shared inputs and weights, its outputs and gradients.

Runs on whichever Keras backend is loaded; test_backends.py runs this file again on the other ones.
"""

from pathlib import Path

import keras
import numpy as np
import pytest

from mobiatt_tf import MobileAttention
from tests.gradients import gradients

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))
PROJECTIONS = ("query", "key", "value", "out")


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    with np.load(request.param) as file:
        return dict(file)


@pytest.fixture
def layer(golden: dict[str, np.ndarray]) -> MobileAttention:
    layer = MobileAttention(
        int(golden["num_heads"]), golden["query_kernel"].shape[1], golden["out_kernel"].shape[1], dtype="float32"
    )
    layer.build(golden["x"].shape)
    for name in PROJECTIONS:
        getattr(layer, name).set_weights([golden[f"{name}_kernel"], golden[f"{name}_bias"]])
    return layer


def test_six_golden_files_are_there() -> None:
    assert len(GOLDEN) == 6


def test_output_equals_the_published_module(layer: MobileAttention, golden: dict[str, np.ndarray]) -> None:
    output = keras.ops.convert_to_numpy(layer(golden["x"]))
    assert relative_error(output, golden["y"]) < 1e-5


def test_separate_query_key_value_equal_one_input(layer: MobileAttention, golden: dict[str, np.ndarray]) -> None:
    x = golden["x"]
    output = keras.ops.convert_to_numpy(layer(x, x, x, training=False))
    assert relative_error(output, golden["y"]) < 1e-5


def test_gradients_equal_the_published_module(layer: MobileAttention, golden: dict[str, np.ndarray]) -> None:
    kernels = [getattr(layer, name).kernel for name in PROJECTIONS]
    dx, dkernels = gradients(lambda x: layer(x, training=False), golden["x"], kernels, golden["g"])
    assert relative_error(dx, golden["dx"]) < 1e-4
    for name, gradient in zip(PROJECTIONS, dkernels, strict=True):
        assert relative_error(gradient, golden[f"d_{name}_kernel"]) < 1e-4, name

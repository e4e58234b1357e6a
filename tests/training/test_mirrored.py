"""Two devices compute what one computes."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.training import small

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mirrored")
    process = small.start("mirrored", directory)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return directory


@pytest.mark.parametrize("suffix", ["", "_clipped", "_everything"])
def test_losses_are_those_of_one_device(runs: Path, suffix: str) -> None:
    one, two = small.losses(runs / f"one{suffix}"), small.losses(runs / f"two{suffix}")
    assert len(one) == 20
    assert one[-1] < one[0]
    np.testing.assert_allclose(two, one, atol=1e-5)


def test_masks_of_dropout_and_drop_path_go_by_the_place_in_the_batch(runs: Path) -> None:
    """Two devices draw what one device draws in two parts; layer-wise decay and two heads are the same, too."""
    one, two = small.losses(runs / "one_deit"), small.losses(runs / "two_deit")
    assert len(one) == 6
    np.testing.assert_allclose(two, one, atol=1e-5)


def test_bfloat16_differs_by_its_rounding_alone(runs: Path) -> None:
    """Each device rounds its own share of a gradient to 8 bits, so that only the first losses are the same."""
    one, two = small.losses(runs / "one_bfloat16"), small.losses(runs / "two_bfloat16")
    assert abs(two[0] - one[0]) < 1e-5
    np.testing.assert_allclose(two, one, rtol=2**-8)


@pytest.mark.parametrize("name", ["one", "mirrored"])
def test_gradients_are_those_of_the_whole_batch(runs: Path, name: str) -> None:
    """AdamW hides a constant factor in the gradient from the losses above."""
    gradients = json.loads((runs / "gradients.json").read_text())
    assert len(gradients[name]) == 7  # convolution, two of each norm, head kernel and bias
    for gradient, expected in zip(gradients[name], gradients["tape"], strict=True):
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_clipping_changes_the_run(runs: Path) -> None:
    assert np.abs(small.losses(runs / "one_clipped") - small.losses(runs / "one")).max() > 1e-3


def test_evaluation_counts_every_image_once(runs: Path) -> None:
    one, two = (json.loads((runs / name / "results.json").read_text()) for name in ("one", "two"))
    assert (one["devices"], two["devices"]) == (1, 2)
    assert two["images"] == 23  # 23 images in batches of 16: the last one does not fill its batch
    assert two["confusion_matrix"] == one["confusion_matrix"]
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)


def test_devices_draw_different_dropout(runs: Path) -> None:
    masks = json.loads((runs / "masks.json").read_text())  # [step][device][element]
    flat = [tuple(device) for step in masks for device in step]
    assert len(flat) == 6
    assert len(set(flat)) == 6  # another mask on each device and in each step
    assert 0.3 < np.mean(flat) < 0.7

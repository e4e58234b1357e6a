"""The benchmark of feeding: its files, its summary, and its workers for real."""

import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import feeding
from mobiatt_tf.errors import UserError


def test_photographs_are_like_imagenet_s(tmp_path):
    feeding.write_photographs(tmp_path, 4)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["000.jpg", "001.jpg", "002.jpg", "003.jpg"]
    for file in files:
        with Image.open(file) as image:
            assert image.width == 500
            assert 333 <= image.height < 418
            assert np.asarray(image).std() > 20
        assert 20_000 < file.stat().st_size < 200_000


def test_summary_pairs_rounds():
    found = {
        "decode": {"mobiatt_tf": [0.001, 0.002, 0.004], "albumentations": [0.002, 0.006, 0.004]},
        "crop": {"mobiatt_tf": [0.01] * 3},
        "rand_augment": {"mobiatt_tf": [0.001] * 3, "keras": [0.04, 0.05, 0.06]},
        "full": {"mobiatt_tf": [0.004, 0.005, 0.003]},
    }
    rows = feeding.summary(found)
    assert rows["decode"]["images_per_second"] == {"mobiatt_tf": 500, "albumentations": 250}
    assert rows["decode"]["times_as_fast_as"]["albumentations"]["median"] == 2  # of 2, 3 and 1
    assert rows["full"]["times_as_fast_as"]["keras.layers.RandAugment alone"]["median"] == pytest.approx(10)
    text = feeding.table({"stages": rows})
    assert "| RandAugment alone, 224 | 1000 |  | 20 | keras: 50.00 |" in text


@pytest.mark.slow
def test_our_worker_feeds_every_stage(tmp_path):
    feeding.write_photographs(tmp_path, 3)
    script = str(feeding.ROOT / "benchmarks" / "feeding_worker.py")
    core = max(feeding.os.sched_getaffinity(0))
    with feeding.Worker("mobiatt_tf", [sys.executable, script, "mobiatt_tf", str(tmp_path)], core) as worker:
        for stage in feeding.STAGES:
            assert worker.seconds(stage, 32) > 0


def test_a_worker_that_ends_says_why():
    command = [sys.executable, "-c", "raise ValueError('no such image')"]
    with (
        feeding.Worker("peer", command, max(feeding.os.sched_getaffinity(0))) as worker,
        pytest.raises(UserError, match="peer stopped at decode: ValueError: no such image"),
    ):
        worker.seconds("decode", 32)

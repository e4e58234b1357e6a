"""A detector's run that was stopped in mid-epoch goes on to what it would have been (python -m MODULE DIRECTORY)."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from mobiatt_tf import training
from mobiatt_tf.tasks.detection import Detection
from tests.tasks.pictures import dataset, detection_split
from tests.tasks.toys import SIZES, make_detector, recipe
from tests.training import small

STEPS = 10  # of an epoch
EPOCHS = 3


class Stopped(Detection):
    """Detection in which this process gets SIGTERM while the second epoch is under way."""

    def batches(self, *arguments: Any, epoch: int, **options: Any) -> tf.data.Dataset:
        found = super().batches(*arguments, epoch=epoch, **options)

        def count(index: np.int64) -> np.int64:
            if epoch == 1 and index == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return index

        def passed_on(index: tf.Tensor, element: Any) -> Any:
            with tf.control_dependencies([tf.numpy_function(count, [index], tf.int64)]):
                return tf.nest.map_structure(tf.identity, element)

        return found.enumerate().map(passed_on)


def run(directory: Path) -> None:
    """A run in "whole", and one in "resumed" that is stopped and started again, deterministic to the bit."""
    tf.config.experimental.enable_op_determinism()
    split = detection_split(directory / "images", SIZES * 4)
    settings = recipe(
        epochs=EPOCHS,
        batch_size=2,
        flip=0.5,
        scale_low=0.5,
        scale_high=1.5,
        photometric=True,
        ema_decay=0.9,
        clip_norm=1.0,
    )

    def train(name: str, task: Detection) -> None:
        keras.utils.clear_session()  # the same names of layers, which checkpoints hold, in each run
        training.train(
            make_detector,
            dataset(split, split.take(5)),
            settings,
            directory / name,
            training.make_strategy("one"),
            cadence=training.Cadence(log_every=1),
            task=task,
        )

    train("whole", Detection())
    try:
        train("resumed", Stopped())
    except training.TrainingInterrupted as interruption:
        print(interruption)
    train("resumed", Detection())


@pytest.mark.slow
def test_a_detector_stopped_in_mid_epoch_goes_on_bit_by_bit(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "tests.tasks.test_training", str(tmp_path)],
        cwd=small.ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    stopped = int(process.stdout.split("saved at step ")[1].split()[0])
    assert STEPS < stopped < 2 * STEPS
    assert f"Going on after step {stopped} " in process.stderr
    assert len(np.unique(small.losses(tmp_path / "whole"))) == STEPS * EPOCHS
    small.assert_same_run(tmp_path / "resumed", tmp_path / "whole")


if __name__ == "__main__":
    run(Path(sys.argv[1]))

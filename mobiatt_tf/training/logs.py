"""What a run leaves to look at: log.jsonl, TensorBoard events, curves.png, progress; and facts about the machine."""

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf
from absl import logging
from tqdm import tqdm

from mobiatt_tf import files
from mobiatt_tf.errors import UserError
from mobiatt_tf.machine import cpu_name, usable_cores
from mobiatt_tf.training.disk import disk_errors

_PLAIN_SECONDS = 10.0  # between two progress lines when standard error is not a terminal


class RunLog:
    """Appends JSON lines and mirrors them as TensorBoard events. A context manager.

    Lines have "kind" "train" (step, epoch, loss: mean over the steps since the last line, learning_rate: of the last
    step, images_per_second) or "evaluation" (step, epoch, images and what the task measures, such as loss, top1, top5).

    Args:
        directory: of the run. What follows the first `keep_bytes` of its log.jsonl belongs to steps that a kill has
            undone: it is dropped, and the TensorBoard events are written anew from the lines that stay.
        keep_bytes: as `tell` gave it when the checkpoint was written.

    Raises:
        UserError: from every method, when the disk is full or cannot be written.
    """

    def __init__(self, directory: Path, keep_bytes: int = 0) -> None:
        self._path = directory / "log.jsonl"
        events = directory / "tensorboard"
        with self._disk_errors():
            self._path.touch()
            if (size := self._path.stat().st_size) < keep_bytes:
                logging.warning(
                    "%s has %d bytes, its checkpoint saw %d: lines are missing.", self._path, size, keep_bytes
                )
            os.truncate(self._path, min(size, keep_bytes))
            for path in events.glob("events.out.tfevents.*"):
                path.unlink()
            self._writer = tf.summary.create_file_writer(str(events))
            for line in read_log(self._path):
                self._to_tensorboard(line)
            self._file = open(self._path, "a")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A full disk refuses the last bytes again on closing: that must not hide the error that is on its way.
        with contextlib.suppress(UserError) if kind else contextlib.nullcontext(), self._disk_errors():
            try:
                self._file.close()
            finally:
                self._writer.close()

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line; it is in the file, whole, when this returns."""
        with self._disk_errors():
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            self._to_tensorboard(line)

    def tell(self) -> int:
        """Length of the file in bytes, all of it on the disk."""
        with self._disk_errors():
            os.fsync(self._file.fileno())
            self._writer.flush()
            return self._path.stat().st_size

    def _disk_errors(self) -> contextlib.AbstractContextManager[None]:
        return disk_errors("The log", self._path.parent)

    def _to_tensorboard(self, line: dict[str, Any]) -> None:
        # tf.summary.scalar needs the tensorboard package, which TensorFlow no longer brings; tf.summary.write does not.
        metadata = tf.compat.v1.SummaryMetadata(plugin_data={"plugin_name": "scalars"})
        with self._writer.as_default():
            for name, value in line.items():
                if name not in ("kind", "step", "images") and value is not None:
                    tf.summary.write(f"{line['kind']}/{name}", float(value), step=line["step"], metadata=metadata)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; a last line that a kill has cut off is left out."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class ProgressBar:
    """Progress and ETA of the whole run on standard error: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, total: int, done: int, shown: bool = True) -> None:
        self._shown = shown
        self._plain = shown and not sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            dynamic_ncols=True,
            disable=not shown or self._plain,
            file=sys.stderr,
        )
        self._total = total
        self._first = self._done = done
        self._start = self._last_print = time.monotonic()
        self._text = ""

    def advance(self, steps: int, loss: float) -> None:
        """Counts `steps` more steps, the last of which had this loss."""
        self._done += steps
        self._bar.update(steps)
        self._bar.set_postfix_str(f"loss {loss:.4f} {self._text}")
        now = time.monotonic()
        if self._plain and (now - self._last_print > _PLAIN_SECONDS or self._done == self._total):
            seconds = (now - self._start) * (self._total - self._done) / (self._done - self._first)
            eta = time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"
            done = f"step {self._done}/{self._total} ({self._done / self._total:.0%})"
            print(f"{done}, loss {loss:.4f}, ETA {eta} {self._text}", file=sys.stderr, flush=True)
            self._last_print = now

    def note(self, text: str) -> None:
        """Shows a text beside the loss from now on."""
        self._text = text

    def say(self, text: str) -> None:
        """Prints a line beside the bar."""
        if self._shown:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


def plot_curves(lines: list[dict[str, Any]], target: Path, measures: Mapping[str, str]) -> None:
    """Draws loss, learning rate and test results over the epochs to a PNG file.

    Args:
        lines: of log.jsonl.
        target: the file.
        measures: label and key of each test result, shares in [0, 1]; see `Task.curves`.
    """
    from matplotlib.figure import Figure  # here, because matplotlib takes a second to load

    training = [line for line in lines if line["kind"] == "train"]
    tests = [line for line in lines if line["kind"] == "evaluation"]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (title, curves) in zip(
        figure.subplots(1, 3),
        {
            "loss": [("training", training, "loss", 1), ("test", tests, "loss", 1)],
            "learning rate": [("", training, "learning_rate", 1)],
            "test (%)": [(label, tests, key, 100) for label, key in measures.items()],
        }.items(),
        strict=True,
    ):
        for label, points, key, scale in curves:
            points = [point for point in points if point.get(key) is not None]
            if points:
                marker = "." if points[0]["kind"] == "evaluation" else ""
                values = [point[key] * scale for point in points]
                axes.plot([point["epoch"] for point in points], values, marker=marker, label=label)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        if any(line.get_label() and not line.get_label().startswith("_") for line in axes.lines):
            axes.legend()
    with files.atomic_path(target) as temporary:
        figure.savefig(temporary, dpi=120)


def machine(strategy: tf.distribute.Strategy) -> dict[str, Any]:
    """Device, number of devices, CPU threads and versions: what a figure needs beside it."""
    gpus = [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.list_physical_devices("GPU")]
    return {
        "device": gpus[0].get("device_name", "GPU") if gpus else cpu_name(),
        "devices": strategy.num_replicas_in_sync,
        "strategy": type(strategy).__name__,
        "cpu_threads": tf.config.threading.get_intra_op_parallelism_threads() or usable_cores(),
        "versions": {
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
        },
    }

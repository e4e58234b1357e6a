"""Checkpoints that are either whole or not there, and the lock that keeps a directory to one process."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from mobiatt_tf import files
from mobiatt_tf.errors import UserError
from mobiatt_tf.training.disk import disk_errors
from mobiatt_tf.training.ema import WeightAverage
from mobiatt_tf.training.recipes import Recipe

_MANIFEST = re.compile(r"step_\d{9,}\.json")
# TensorFlow's files of a checkpoint; then the directory in which it gathers them, and atomic_path's temporary manifest.
_CHECKPOINT_FILE = re.compile(r"(step_\d{9,})\.(?:index|data-).*")
_TEMPORARY = re.compile(r"step_\d{9,}_temp.*|\.step_\d{9,}\.\d+\.partial\.json")

# What a run leaves in its directory beside run.json.
_OUTPUTS = (
    "checkpoints",
    "curves.png",
    "failed_step.json",
    "log.jsonl",
    "model.keras",
    "results.json",
    "skipped_files.txt",
    "tensorboard",
)


@dataclass(frozen=True)
class Progress:
    """What a checkpoint knows beside the weights.

    Attributes:
        step: steps done since the start of the run.
        log_bytes: length of log.jsonl at that moment; what was written later is dropped on resume.
        window_losses: losses of the steps since the last log line.
        train_seconds: time spent in training steps so far, over all processes.
        devices: that shared a batch; 0 if that is not known.
    """

    step: int = 0
    log_bytes: int = 0
    window_losses: tuple[float, ...] = field(default=())
    train_seconds: float = 0.0
    devices: int = 0


class Checkpoints:
    """Keeps the newest checkpoints of a run: weights, optimizer, moving average and `Progress`.

    A checkpoint is TensorFlow's files plus a manifest with their sizes and SHA-256, which is renamed into place last.
    Seeds are no part of it: the loop derives them from the recipe's seed and the step.

    Args:
        directory: of these checkpoints. Files named like parts of a checkpoint that has no manifest are left-overs of
            a kill and are removed; all others stay.
        model: a built model.
        optimizer: built on the model.
        average: the moving average, if there is one.
        keep: how many to keep.
    """

    def __init__(
        self,
        directory: Path,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        average: WeightAverage | None,
        keep: int = 3,
    ) -> None:
        self._directory = directory
        self._keep = keep
        self._weights = [weight.value for weight in model.weights]
        self._checkpoint = tf.train.Checkpoint(
            weights=self._weights,
            optimizer=[variable.value for variable in optimizer.variables],
            averages=average.averages if average else [],
        )
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{directory} cannot be made ({error.strerror}). Choose another output directory."
            ) from error

    def newest(self) -> Path | None:
        """The manifest of the newest checkpoint, whole or not."""
        return max(self._manifests(), default=None, key=_step_of)

    def save(self, progress: Progress) -> Path:
        """Writes a checkpoint and drops the oldest beyond `keep`. Returns its manifest.

        Raises:
            UserError: a weight is not finite (nothing is written), or the disk refuses.
        """
        if not all(bool(tf.reduce_all(tf.math.is_finite(w))) for w in self._weights if w.dtype.is_floating):
            raise UserError(f"A weight is not finite after step {progress.step}. {self.advice()}")
        name = f"step_{progress.step:09d}"
        with disk_errors(f"The checkpoint of step {progress.step}", self._directory):
            self._checkpoint.write(str(self._directory / name))
            written = sorted(self._directory.glob(f"{name}.index")) + sorted(self._directory.glob(f"{name}.data-*"))
            manifest = {
                "progress": dataclasses.asdict(progress),
                "files": {path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)} for path in written},
            }
            for path in written:  # the content must be on the disk before the manifest that vouches for it
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            files.write_json(self._directory / f"{name}.json", manifest)
        for old in self._manifests()[: -self._keep]:
            old.unlink()
        self._remove_strays()
        return self._directory / f"{name}.json"

    def restore(self) -> Progress | None:
        """Loads the newest whole checkpoint; None when there is none at all.

        A damaged checkpoint is named in a warning, removed, and the one before it is taken.

        Raises:
            UserError: there were checkpoints, but none of them is whole.
        """
        damaged = []
        for manifest in reversed(self._manifests()):
            content, damage = _read(manifest)
            if damage:
                logging.warning("Checkpoint %s is damaged (%s) and is left out.", manifest.with_suffix(""), damage)
                damaged.append(manifest)
                continue
            status = self._checkpoint.read(str(manifest.with_suffix("")))
            status.assert_consumed().assert_existing_objects_matched()
            for path in damaged:
                path.unlink()
            self._remove_strays()
            progress = content["progress"]
            return Progress(**{**progress, "window_losses": tuple(progress["window_losses"])})
        if damaged:
            raise UserError(
                f"None of the {len(damaged)} checkpoints in {self._directory} is whole. "
                f"Remove {self._directory.parent} to start anew, or choose another output directory."
            )
        self._remove_strays()
        return None

    def advice(self) -> str:
        """What to do about a run that diverged."""
        newest = self.newest()
        last = f"The last good checkpoint is {newest.with_suffix('')}" if newest else "There is no checkpoint yet"
        return f"{last}. Start anew in another directory with a lower learning_rate, a longer warm-up or clip_norm=1."

    def _manifests(self) -> list[Path]:
        """By step, oldest first."""
        return sorted((path for path in self._directory.iterdir() if _MANIFEST.fullmatch(path.name)), key=_step_of)

    def _remove_strays(self) -> None:
        whole = {path.stem for path in self._manifests()}
        for path in self._directory.iterdir():
            part = _CHECKPOINT_FILE.fullmatch(path.name)
            if _TEMPORARY.fullmatch(path.name) or (part and part[1] not in whole):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _step_of(manifest: Path) -> int:
    return int(manifest.stem.removeprefix("step_"))


def _read(manifest: Path) -> tuple[dict[str, Any], str]:
    """The manifest's content, and what is wrong with the checkpoint ("" if it is whole)."""
    try:
        content = json.loads(manifest.read_text())
        for name, expected in content["files"].items():
            path = manifest.with_name(name)
            if not path.exists():
                return content, f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return content, f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if files.sha256(path) != expected["sha256"]:
                return content, f"the content of {name} has changed"
        Progress(**content["progress"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return {}, f"{manifest.name} cannot be read: {error}"
    return content, ""


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps the directory to this process. The kernel frees the lock when the process ends, however it ends.

    Raises:
        UserError: another process holds it, or the directory cannot be written.
    """
    try:
        lock = files.take_lock(directory)
    except BlockingIOError as error:
        raise UserError(
            f"Process {error.strerror or 'unknown'} is already training in {directory}. "
            "Wait for it, stop it, or choose another output directory."
        ) from None
    except OSError as error:
        raise UserError(f"{directory} cannot be used ({error.strerror}). Choose another output directory.") from error
    with lock:
        yield


def check_same_run(directory: Path, run: dict[str, Any]) -> None:
    """Writes what identifies a run to run.json, or compares it with what is there.

    The name of the dataset is written down but not compared: a folder has many paths, and the fingerprint tells data
    apart. A run that has left nothing yet may be replaced, so that a first start that failed does not stand in the way.

    Raises:
        UserError: the directory belongs to another run (the differing fields are listed), or holds files of the names
            that a run writes and no run.json.
    """
    path = directory / "run.json"
    run = json.loads(json.dumps(run))  # as it reads back: tuples become lists
    if not path.exists():
        if foreign := [name for name in _OUTPUTS if _holds_something(directory / name)]:
            raise UserError(
                f"{directory} holds {', '.join(foreign)} but no run.json: this is no training run to resume, and "
                "training would overwrite what is there. Choose another output directory."
            )
        files.write_json(path, run)
        return
    known = files.read_json(path)
    if known == run:
        return
    if isinstance(known, dict) and isinstance(known.get("recipe"), dict):
        # Fields that a later version has added were off before.
        known["recipe"] = {**{name: run["recipe"][name] for name in _added_fields(run)}, **known["recipe"]}
    before, now = _flatten(known), _flatten(run)
    differing = [
        f"{name}: {before.get(name, 'absent')} there, {now.get(name, 'absent')} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name != "dataset.name"
    ]
    is_run = isinstance(known, dict) and known.keys() == run.keys()
    if differing and not (is_run and _has_left_nothing(directory)):
        raise UserError(
            f"{directory} holds a run that differs from this one ({'; '.join(differing)}). "
            "Use the same settings to resume it, or another output directory to start a new run."
        )
    files.write_json(path, run)


def _added_fields(run: dict[str, Any]) -> list[str]:
    """Fields of the recipe that have their default value: in these, a recipe that lacks them is the same."""
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    return [name for name, value in run["recipe"].items() if name in defaults and defaults[name] == value]


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _has_left_nothing(directory: Path) -> bool:
    """Whether a run has neither a checkpoint nor a log line, nor a model of an epoch whose log has been removed."""
    log = directory / "log.jsonl"
    return not (
        any((directory / "checkpoints").glob("step_*.json"))
        or (log.exists() and log.stat().st_size)
        or (directory / "model.keras").exists()
    )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        name: leaf
        for key, child in value.items()
        for name, leaf in _flatten(child, f"{prefix}.{key}" if prefix else key).items()
    }

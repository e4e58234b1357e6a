"""The training loop: any strategy, resumes exactly, leaves nothing half written."""

import contextlib
import dataclasses
import hashlib
import math
import statistics
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from mobiatt_tf import data, files
from mobiatt_tf.errors import UserError
from mobiatt_tf.models import dtype_policy
from mobiatt_tf.training.checkpoints import Checkpoints, Progress, check_same_run, locked
from mobiatt_tf.training.ema import WeightAverage
from mobiatt_tf.training.evaluate import Evaluation, Evaluator, class_count
from mobiatt_tf.training.interrupts import StopSignals, TrainingInterrupted
from mobiatt_tf.training.logs import ProgressBar, RunLog, machine, plot_curves, read_log
from mobiatt_tf.training.optimizer import make_optimizer, make_schedule
from mobiatt_tf.training.recipes import Recipe
from mobiatt_tf.training.step import make_run_steps
from mobiatt_tf.training.strategy import distribute

_CHUNK_SECONDS = 0.5  # between two looks at the clock and at the signals
_SKIPPED = "skipped_files.txt"
_PLOT_SECONDS = 60.0  # a picture takes a second, which may be more than an epoch does


@dataclass(frozen=True)
class Cadence:
    """How often a run reports and saves; it changes nothing in what the run computes.

    Attributes:
        log_every: steps between two log lines; the end of an epoch writes one too.
        evaluate_every: epochs between two evaluations; the end of the run is always evaluated.
        checkpoint_seconds: a checkpoint is written when this much time has passed, and at the end of every epoch.
        checkpoint_steps: also when the step is a multiple of this; 0 for never.
    """

    log_every: int = 50
    evaluate_every: int = 1
    checkpoint_seconds: float = 600.0
    checkpoint_steps: int = 0

    def __post_init__(self) -> None:
        for name, low in (("log_every", 1), ("evaluate_every", 1), ("checkpoint_seconds", 0), ("checkpoint_steps", 0)):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}.")


def steps_per_epoch(dataset: data.Dataset, recipe: Recipe, strategy: tf.distribute.Strategy) -> int:
    """Steps of one epoch; the images that do not fill a last batch are left out (others in each epoch).

    Raises:
        ValueError: the batch does not divide over the devices, or is larger than the training split.
    """
    replicas = strategy.num_replicas_in_sync
    if recipe.batch_size % replicas:
        raise ValueError(f"The batch of {recipe.batch_size} images cannot be split evenly over {replicas} devices.")
    return data.steps_per_epoch(dataset.train, recipe.batch_size)


def train(
    build_model: Callable[[], keras.Model],
    dataset: data.Dataset,
    recipe: Recipe,
    output_dir: str | Path,
    strategy: tf.distribute.Strategy,
    *,
    model_config: dict[str, Any] | None = None,
    cadence: Cadence | None = None,
    jit_compile: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Trains a classifier, or goes on with the run that `output_dir` holds, and returns what results.json says.

    The run is a function of the recipe, the dataset and the model: data order, augmentation, dropout and stochastic
    depth are derived from (seed, step), so a run that was stopped or killed goes on to the same losses. Sets Keras' and
    TensorFlow's global seed. Randomness of a layer must come from a `keras.random.SeedGenerator`.

    `output_dir` gets run.json (what identifies the run), log.jsonl, tensorboard/, checkpoints/, and after every
    evaluation model.keras (the weights that were evaluated: the moving average if it is on), results.json, curves.png;
    skipped_files.txt lists the images that the dataset leaves out, with the reasons, if there are any.

    Args:
        build_model: makes a built model of images float32 [B, H, W, 3] to logits [B, classes]; called once, under the
            strategy's scope and the recipe's precision.
        dataset: training and test split.
        recipe: the numbers.
        output_dir: of this run alone.
        strategy: from `make_strategy`, or any other.
        model_config: JSON values that name the model in run.json and results.json.
        cadence: how often to log, evaluate and save.
        jit_compile: compile the forward and backward pass with XLA.
        show_progress: progress on standard error.

    Raises:
        ValueError: the arguments do not fit together (batch and devices, classes, image size).
        UserError: the directory belongs to another run or process or holds files of something else, the disk is full,
            or the loss is not finite.
        TrainingInterrupted: SIGTERM or Ctrl-C; a checkpoint has been written.
    """
    output_dir = files.user_path(output_dir)
    steps_per_epoch(dataset, recipe, strategy)  # complains before anything is written
    with locked(output_dir), StopSignals() as signals, strategy.scope():
        keras.utils.set_random_seed(recipe.seed)
        with dtype_policy(recipe.precision):
            model = build_model()
        _check(model, dataset, strategy, jit_compile)
        identity = _identify(model, dataset, recipe, model_config or {})
        check_same_run(output_dir, identity)
        if dataset.skipped:
            text = "".join(f"{line}\n" for line in dataset.skipped)
            files.write_bytes(output_dir / _SKIPPED, text.encode(errors="surrogateescape"))
        else:
            (output_dir / _SKIPPED).unlink(missing_ok=True)
        run = _Run(model, dataset, recipe, output_dir, strategy, cadence or Cadence(), signals, jit_compile)
        return run.finish(identity, show_progress)


class _Run:
    """The state of a run: `step` steps are done, `window` holds the losses since the last log line."""

    def __init__(
        self,
        model: keras.Model,
        dataset: data.Dataset,
        recipe: Recipe,
        output_dir: Path,
        strategy: tf.distribute.Strategy,
        cadence: Cadence,
        signals: StopSignals,
        jit_compile: bool,
    ) -> None:
        self.model, self.dataset, self.recipe, self.strategy = model, dataset, recipe, strategy
        self.output_dir, self.cadence, self.signals = output_dir, cadence, signals
        self.steps_per_epoch = steps_per_epoch(dataset, recipe, strategy)
        self.total_steps = recipe.epochs * self.steps_per_epoch
        self.schedule = make_schedule(recipe, self.steps_per_epoch)
        optimizer = make_optimizer(recipe, self.steps_per_epoch, model)
        self.average = WeightAverage(model, recipe.ema_decay, recipe.ema_warmup) if recipe.ema_decay else None
        self.run_steps = make_run_steps(model, optimizer, self.average, recipe, strategy, jit_compile)
        self.evaluator = Evaluator(model, strategy, recipe.batch_size)

        self.checkpoints = Checkpoints(output_dir / "checkpoints", model, optimizer, self.average)
        progress = self.checkpoints.restore() or Progress()
        self.step, self.log_bytes = progress.step, progress.log_bytes
        self.window, self.train_seconds = list(progress.window_losses), progress.train_seconds
        self.saved_at, self.plotted_at = time.monotonic(), -math.inf
        # Since the last log line; the first chunk compiles and is left out.
        self.timed_steps, self.timed_seconds = 0, 0.0
        self.seconds_per_step: float | None = None

    def finish(self, identity: dict[str, Any], show_progress: bool) -> dict[str, Any]:
        """Runs all steps that are left. Returns the results."""
        if self.step == self.total_steps and (done := _finished_results(self.output_dir, self.total_steps)):
            return done
        results: dict[str, Any] = {}
        with (
            RunLog(self.output_dir, self.log_bytes) as self.log,
            contextlib.closing(ProgressBar(self.total_steps, self.step, show_progress)) as self.bar,
        ):
            if self.step:
                self.bar.say(f"Going on after step {self.step} of {self.total_steps}.")
            # The checkpoint at the end of an epoch is written before the evaluation: on resume that comes first.
            if self.step and self.step % self.steps_per_epoch == 0 and self._evaluation_due():
                results = self._evaluate(identity)
            while self.step < self.total_steps:
                self._train_epoch()
                if self._evaluation_due():
                    results = self._evaluate(identity)
        return results

    def _train_epoch(self) -> None:
        """Runs the steps that are left of the current epoch and saves a checkpoint at its end."""
        epoch, first_step = divmod(self.step, self.steps_per_epoch)
        batches = data.train_batches(
            self.dataset.train,
            image_size=_image_size(self.model),
            batch_size=self.recipe.batch_size,
            seed=self.recipe.seed,
            epoch=epoch,
            first_step=first_step,
            augmentation=self.recipe.augmentation,
        )
        iterator = distribute(self.strategy, batches)
        end = (epoch + 1) * self.steps_per_epoch
        while self.step < end:
            self._train_chunk(iterator, end)
            if self.step % self.cadence.log_every == 0 or self.step == end:
                self._log_window()
            if self.step == end or self._checkpoint_due() or self.signals.received:
                self._save()
            if self.signals.received:
                raise TrainingInterrupted(self.signals.received, self.step, self.total_steps)

    def _train_chunk(self, iterator: Iterator[Any], end: int) -> None:
        """Runs about half a second of steps, not past the next line, checkpoint or end of the epoch."""
        left = [end - self.step] + [
            every - self.step % every for every in (self.cadence.log_every, self.cadence.checkpoint_steps) if every
        ]
        wanted = _CHUNK_SECONDS / self.seconds_per_step if self.seconds_per_step else 1
        count = max(1, min(*left, int(wanted)))
        start = time.monotonic()
        losses = self.run_steps(iterator, tf.constant(count)).numpy().tolist()
        seconds = time.monotonic() - start
        for offset, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise UserError(f"The loss of step {self.step + offset + 1} is {loss}. {self.checkpoints.advice()}")
        if self.seconds_per_step is not None:
            self.timed_steps += count
            self.timed_seconds += seconds
        # The first call compiles and says nothing about the time of a step: take one more step alone.
        self.seconds_per_step = _CHUNK_SECONDS if self.seconds_per_step is None else seconds / count
        self.step += count
        self.window += losses
        self.train_seconds += seconds
        self.bar.advance(count, losses[-1])

    def _log_window(self) -> None:
        """Writes the log line of the steps since the last one."""
        timed = self.timed_seconds > 0
        self.log.write(
            {
                "kind": "train",
                "step": self.step,
                "epoch": round(self.step / self.steps_per_epoch, 4),
                "loss": math.fsum(self.window) / len(self.window),
                "learning_rate": float(self.schedule(self.step - 1)),
                "images_per_second": self.timed_steps * self.recipe.batch_size / self.timed_seconds if timed else None,
            }
        )
        self.window = []
        self.timed_steps, self.timed_seconds = 0, 0.0

    def _checkpoint_due(self) -> bool:
        every = self.cadence.checkpoint_steps
        late = time.monotonic() - self.saved_at >= self.cadence.checkpoint_seconds
        return late or bool(every and self.step % every == 0)

    def _save(self) -> None:
        progress = Progress(self.step, self.log.tell(), tuple(self.window), self.train_seconds)
        self.checkpoints.save(progress)
        self.saved_at = time.monotonic()

    def _evaluation_due(self) -> bool:
        return self.step == self.total_steps or self.step // self.steps_per_epoch % self.cadence.evaluate_every == 0

    def _evaluate(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Evaluates, writes the log line, model.keras, curves.png and results.json; returns the results."""

        def stop() -> None:
            if self.signals.received:  # the checkpoint of this step is written already
                raise TrainingInterrupted(self.signals.received, self.step, self.total_steps)

        with self.average.applied() if self.average else contextlib.nullcontext():
            evaluation = self.evaluator(self.dataset.test, stop)
            with files.atomic_path(self.output_dir / "model.keras") as temporary:
                self.model.save(temporary)
        self.log.write(_evaluation_line(evaluation, self.step, self.step // self.steps_per_epoch))
        self.bar.note(f"top-1 {evaluation.top1:.2%} after epoch {self.step // self.steps_per_epoch}")
        lines = read_log(self.output_dir / "log.jsonl")
        if self.step == self.total_steps or time.monotonic() - self.plotted_at > _PLOT_SECONDS:
            plot_curves(lines, self.output_dir / "curves.png")
            self.plotted_at = time.monotonic()
        speeds = [line["images_per_second"] for line in lines if line.get("images_per_second")]
        results = {
            "step": self.step,
            "epochs": self.step // self.steps_per_epoch,
            **evaluation.to_json(self.dataset.class_names),
            "weights": "moving average" if self.average else "last step",
            "train_seconds": self.train_seconds,
            "train_images_per_second": statistics.median(speeds) if speeds else None,
            **machine(self.strategy),
            "skipped_files": len(self.dataset.skipped),
            "skipped_files_list": _SKIPPED if self.dataset.skipped else None,
            **identity,
        }
        files.write_json(self.output_dir / "results.json", results)
        return results


def _evaluation_line(evaluation: Evaluation, step: int, epoch: int) -> dict[str, Any]:
    return {
        "kind": "evaluation",
        "step": step,
        "epoch": epoch,
        "images": evaluation.count,
        "loss": evaluation.loss,
        "top1": evaluation.top1,
        "top5": evaluation.top5,
    }


def _finished_results(output_dir: Path, total_steps: int) -> dict[str, Any] | None:
    """The results of a run that is complete: results.json of the last step, and beside it a whole model.keras."""
    try:
        results = files.read_json(output_dir / "results.json")
    except UserError:  # missing or damaged: written anew
        return None
    whole = isinstance(results, dict) and results.get("step") == total_steps and _is_whole(output_dir / "model.keras")
    return results if whole else None


def _is_whole(archive: Path) -> bool:
    """Whether the file is a zip archive in which every checksum is right."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return opened.testzip() is None
    except Exception:  # OSError, BadZipFile, NotImplementedError, zlib.error ...: as the damage has it
        return False


def _image_size(model: keras.Model) -> tuple[int, int]:
    height, width = model.input_shape[1:3]
    return height, width


def _check(model: keras.Model, dataset: data.Dataset, strategy: tf.distribute.Strategy, jit_compile: bool) -> None:
    """Raises ValueError where model, data and devices do not fit together."""
    if len(model.input_shape) != 4 or None in model.input_shape[1:] or model.input_shape[3] != 3:
        raise ValueError(
            f"The model takes {model.input_shape}; it must take (None, height, width, 3) with fixed numbers."
        )
    if class_count(model) != len(dataset.class_names):
        raise ValueError(
            f"The model has {class_count(model)} classes, the dataset {dataset.name} has {len(dataset.class_names)}."
        )
    if strategy.num_replicas_in_sync > 1:
        norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
        if jit_compile and any(norm.synchronized for norm in norms):
            raise ValueError(
                "XLA cannot compile synchronized batch norm over several devices: set jit_compile to False."
            )
        if any(not norm.synchronized for norm in norms):
            logging.warning(
                "Batch norm sees one device's share of the batch, and the statistics of the first device are saved: "
                "build the model with synchronized batch norm to get the results of one device."
            )


def _identify(
    model: keras.Model, dataset: data.Dataset, recipe: Recipe, model_config: dict[str, Any]
) -> dict[str, Any]:
    """What must be equal for two processes to be parts of one run."""
    return {
        "recipe": dataclasses.asdict(recipe),
        "dataset": {
            "name": dataset.name,
            "classes": len(dataset.class_names),
            "train_images": len(dataset.train),
            "test_images": len(dataset.test),
            "fingerprint": _fingerprint(dataset),
        },
        "model": {**model_config, "input_shape": list(model.input_shape[1:]), "parameters": model.count_params()},
    }


def _fingerprint(dataset: data.Dataset) -> str:
    """16 hexadecimal digits of SHA-256 over labels and pixels, or over labels and class, name and size of each file."""
    digest = hashlib.sha256()
    for split in (dataset.train, dataset.test):
        digest.update(split.labels.tobytes())
        if split.images is not None:
            digest.update(split.images.tobytes())
        for name, label in zip(split.files or (), split.labels, strict=False):
            path = Path(name)
            entry = f"{dataset.class_names[label]}/{path.name} {path.stat().st_size}\n"
            digest.update(entry.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]

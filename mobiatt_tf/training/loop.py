"""The training loop: any strategy, resumes exactly, leaves nothing half written."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
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
from mobiatt_tf.training.distillation import Teacher
from mobiatt_tf.training.ema import WeightAverage
from mobiatt_tf.training.identity import check, finished_results, identify, steps_per_epoch, total_steps
from mobiatt_tf.training.interrupts import StopSignals, TrainingInterrupted
from mobiatt_tf.training.logs import ProgressBar, RunLog, machine, plot_curves, read_log
from mobiatt_tf.training.optimizer import make_optimizer, make_schedule
from mobiatt_tf.training.recipes import Recipe
from mobiatt_tf.training.step import make_run_steps
from mobiatt_tf.training.strategy import distribute
from mobiatt_tf.training.task import Classification, Result, Task
from mobiatt_tf.training.workers import Workers

_CHUNK_SECONDS = 0.5  # between two looks at the clock and at the signals
_SKIPPED = "skipped_files.txt"
_FAILED_STEP = "failed_step.json"
_NAMES_SHOWN = 5
_STEPS_READ_AHEAD = 256
# What TensorFlow raises for an image that is gone, cut off, or has a wrong checksum.
_UNREADABLE = (
    tf.errors.DataLossError,
    tf.errors.InvalidArgumentError,
    tf.errors.NotFoundError,
    tf.errors.OutOfRangeError,
    tf.errors.PermissionDeniedError,
)
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


def train(
    build_model: Callable[[], keras.Model],
    dataset: Any,
    recipe: Recipe,
    output_dir: str | Path,
    strategy: tf.distribute.Strategy,
    *,
    model_config: dict[str, Any] | None = None,
    cadence: Cadence | None = None,
    jit_compile: bool = False,
    show_progress: bool = True,
    build_teacher: Callable[[], Teacher] | None = None,
    task: Task | None = None,
) -> dict[str, Any]:
    """Trains a model, or goes on with the run that `output_dir` holds, and returns what results.json says.

    The run is a function of the recipe, the dataset and the model: data order, augmentation, dropout and stochastic
    depth are derived from (seed, step), so a run that was stopped or killed goes on to the same losses. Sets Keras' and
    TensorFlow's global seed. Randomness of a layer must come from a `keras.random.SeedGenerator`.

    `output_dir` gets run.json (what identifies the run), log.jsonl, tensorboard/, checkpoints/, and after every
    evaluation model.keras (the weights that were evaluated: the moving average if it is on), results.json, curves.png;
    skipped_files.txt lists the images that the dataset leaves out, with the reasons, if there are any, and
    failed_step.json the images of a step whose loss was not finite.

    Under a strategy of several processes each of them calls this with the same arguments, and `output_dir` lies on a
    disk that all of them see. The first one (the chief) writes; all take the same steps, stop together and return the
    same but for the speed, which is the chief's to know.

    Args:
        build_model: makes a built model of images float32 [B, H, W, 3] to what the task wants (classification: logits
            [B, classes]); called once, under the strategy's scope and the recipe's precision.
        dataset: training and test split, of the kind that the task takes.
        recipe: the numbers.
        output_dir: of this run alone.
        strategy: from `make_strategy`.
        model_config: JSON values that name the model in run.json and results.json.
        cadence: how often to log, evaluate and save.
        jit_compile: compile the forward and backward pass with XLA.
        show_progress: progress on standard error.
        build_teacher: makes the teacher of a recipe with distillation; called once, under the strategy's scope.
        task: from `mobiatt_tf.tasks.make_task`; None: classification.

    Raises:
        ValueError: the arguments do not fit together (batch and devices, classes, image size, teacher).
        UserError: the directory belongs to another run or process or holds files of something else, the disk is full,
            the loss is not finite, or another worker has gone.
        TrainingInterrupted: SIGTERM or Ctrl-C; a checkpoint has been written.
    """
    output_dir = files.user_path(output_dir)
    task = task or Classification()
    task.check_recipe(recipe)
    steps_per_epoch(dataset, recipe, strategy)  # complains before anything is written
    workers = Workers(strategy)
    with (
        locked(output_dir) if workers.is_chief else contextlib.nullcontext(),
        StopSignals() as signals,
        workers.lost_peers(f"Start all of them again: the run goes on from the newest checkpoint in {output_dir}."),
        strategy.scope(),
    ):
        keras.utils.set_random_seed(recipe.seed)
        with dtype_policy(recipe.precision):
            model = build_model()
        check(model, strategy, jit_compile)
        task.check_model(model, dataset)
        teacher = build_teacher() if build_teacher else None
        identity = identify(model, dataset, recipe, model_config or {}, task.name)
        workers.require_same(identity)
        if workers.is_chief:
            check_same_run(output_dir, identity)
            _note_skipped(output_dir, dataset)
        run = _Run(
            model, dataset, recipe, output_dir, strategy, workers, cadence or Cadence(), signals, jit_compile, teacher,
            task,
        )  # fmt: skip
        return run.finish(identity, show_progress)


def _note_skipped(output_dir: Path, dataset: Any) -> None:
    if dataset.skipped:
        text = "".join(f"{line}\n" for line in dataset.skipped)
        files.write_bytes(output_dir / _SKIPPED, text.encode(errors="surrogateescape"))
    else:
        (output_dir / _SKIPPED).unlink(missing_ok=True)


class _Run:
    """The state of a run: `step` steps are done, `window` holds the losses since the last log line."""

    def __init__(
        self,
        model: keras.Model,
        dataset: Any,
        recipe: Recipe,
        output_dir: Path,
        strategy: tf.distribute.Strategy,
        workers: Workers,
        cadence: Cadence,
        signals: StopSignals,
        jit_compile: bool,
        teacher: Teacher | None,
        task: Task,
    ) -> None:
        self.model, self.dataset, self.recipe, self.strategy = model, dataset, recipe, strategy
        self.output_dir, self.workers, self.cadence, self.signals = output_dir, workers, cadence, signals
        self.task = task
        self.steps_per_epoch = steps_per_epoch(dataset, recipe, strategy)
        self.total_steps = total_steps(recipe, self.steps_per_epoch)
        self.schedule = make_schedule(recipe, self.steps_per_epoch)
        optimizer = make_optimizer(recipe, self.steps_per_epoch, model)
        self.average = WeightAverage(model, recipe.ema_decay, recipe.ema_warmup) if recipe.ema_decay else None
        losses = task.losses(model, recipe, teacher)
        self.run_steps = make_run_steps(model, optimizer, self.average, recipe, strategy, jit_compile, teacher, losses)
        self.evaluator = task.evaluator(model, dataset, strategy, recipe)

        self.checkpoints = Checkpoints(output_dir / "checkpoints", model, optimizer, self.average)
        progress = self._restore()
        self.step, self.log_bytes = progress.step, progress.log_bytes
        self.window, self.train_seconds = list(progress.window_losses), progress.train_seconds
        self.saved_at, self.plotted_at = time.monotonic(), -math.inf
        # Since the last log line; the first chunk compiles and is left out.
        self.timed_steps, self.timed_seconds = 0, 0.0
        self.seconds_per_step: float | None = None
        self.next_count, self.stop_signal, self.is_late = 1, 0, False  # what all workers agree on, see _agree

    def _restore(self) -> Progress:
        """The newest whole checkpoint, in every worker the same. The chief goes first: it removes what is damaged."""
        for turn in (True, False):
            if self.workers.is_chief is turn:
                progress = self.checkpoints.restore() or Progress()
            self.workers.wait()
        if (steps := self.workers.gather([progress.step])[:, 0]).min() < steps.max():
            found = ", ".join(f"{int(step)}" for step in steps)
            raise UserError(
                f"The workers find checkpoints of different steps ({found}) in {self.output_dir}: the output directory "
                "must lie on a disk that all of them share."
            )
        if progress.devices not in (0, devices := self.strategy.num_replicas_in_sync):
            logging.warning(
                "The run was on %d devices and goes on with %d: dropout and drop path draw other masks from here on.",
                progress.devices,
                devices,
            )
        return progress

    def finish(self, identity: dict[str, Any], show_progress: bool) -> dict[str, Any]:
        """Runs all steps that are left. Returns the results."""
        done = finished_results(self.output_dir, self.total_steps) if self.step == self.total_steps else None
        if self.workers.from_chief(done is not None) and done:
            return done
        results: dict[str, Any] = {}
        show_progress = show_progress and self.workers.is_chief
        with (
            RunLog(self.output_dir, self.log_bytes) if self.workers.is_chief else contextlib.nullcontext() as self.log,
            contextlib.closing(ProgressBar(self.total_steps, self.step, show_progress)) as self.bar,
        ):
            if self.step:
                self.bar.say(f"Going on after step {self.step} of {self.total_steps}.")
            # The checkpoint at the end of an epoch is written before the evaluation: on resume that comes first.
            ends = self.step % self.steps_per_epoch == 0 or self.step == self.total_steps
            if self.step and ends and self._evaluation_due():
                results = self._evaluate(identity)
            while self.step < self.total_steps:
                self._train_epoch()
                if self._evaluation_due():
                    results = self._evaluate(identity)
        self.workers.wait()  # nobody leaves before the chief has written the results
        return results

    def _train_epoch(self) -> None:
        """Runs the steps that are left of the current epoch and saves a checkpoint at its end."""
        epoch, first_step = divmod(self.step, self.steps_per_epoch)
        iterator = distribute(
            self.strategy,
            lambda replica_count, replicas: self.task.batches(
                self.dataset,
                self.recipe,
                image_size=_image_size(self.model),
                epoch=epoch,
                first_step=first_step,
                replica_count=replica_count,
                replicas=replicas,
            ),
        )
        end = min((epoch + 1) * self.steps_per_epoch, self.total_steps)
        while self.step < end:
            self._train_chunk(iterator, end)
            self._agree()
            if self.step % self.cadence.log_every == 0 or self.step == end:
                self._log_window()
            if self.step == end or self._checkpoint_due() or self.stop_signal:
                self._save()
            if self.stop_signal:
                raise TrainingInterrupted(self.stop_signal, self.step, self.total_steps)

    def _train_chunk(self, iterator: Iterator[Any], end: int) -> None:
        """Runs about half a second of steps, not past the next line, checkpoint or end of the epoch."""
        left = [end - self.step] + [
            every - self.step % every for every in (self.cadence.log_every, self.cadence.checkpoint_steps) if every
        ]
        count = max(1, min(*left, self.next_count))
        start = time.monotonic()
        with self._damage_named(self.dataset.train, self._coming_images):
            losses = self.run_steps(iterator, tf.constant(count)).numpy().tolist()
        seconds = time.monotonic() - start
        for offset, loss in enumerate(losses):
            if not math.isfinite(loss):
                self._fail(self.step + offset, loss)
        if self.seconds_per_step is not None:
            self.timed_steps += count
            self.timed_seconds += seconds
        # The first call compiles and says nothing about the time of a step: take one more step alone.
        self.seconds_per_step = _CHUNK_SECONDS if self.seconds_per_step is None else seconds / count
        self.step += count
        self.window += losses
        self.train_seconds += seconds
        self.bar.advance(count, losses[-1])

    @contextlib.contextmanager
    def _damage_named(self, split: Any, indices: Callable[[], Iterable[int]]) -> Iterator[None]:
        """Names the image that could be read when the run began and cannot be read now."""
        try:
            yield
        except _UNREADABLE as error:
            found = data.first_unreadable(split, indices())
            if not found:
                raise
            raise UserError(
                f"The image {found[0]} can no longer be read ({found[1]}). Put the file back and give the same command "
                "again: it goes on from the newest checkpoint."
            ) from error

    def _coming_images(self) -> list[int]:
        """The images of the next steps of this epoch, as far ahead as they may have been read."""
        epoch, step = divmod(self.step, self.steps_per_epoch)
        examples, _ = data.epoch_order(
            len(self.dataset.train), self.recipe.batch_size, self.recipe.seed, epoch, self.recipe.repeats
        )
        return list(dict.fromkeys(examples[step : step + _STEPS_READ_AHEAD].ravel().tolist()))

    def _agree(self) -> None:
        """What depends on clocks and signals, decided alike in all workers: the chief's clock, anybody's signal."""
        assert self.seconds_per_step is not None
        wanted = max(1, int(_CHUNK_SECONDS / max(self.seconds_per_step, 1e-6)))
        late = time.monotonic() - self.saved_at >= self.cadence.checkpoint_seconds
        table = self.workers.gather([wanted, self.signals.received, late])  # [workers, 3]
        self.next_count, self.stop_signal = int(table[0, 0]), int(table[:, 1].max())
        self.is_late = bool(table[0, 2])

    def _fail(self, step: int, loss: float) -> None:
        """Stops the run after a loss that is not finite, and says which images were in the step (counted from 0)."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        names = data.step_names(
            self.dataset.train,
            self.recipe.batch_size,
            self.recipe.seed,
            epoch,
            step_of_epoch,
            self.recipe.repeats,
        )
        target = self.output_dir / _FAILED_STEP
        if self.workers.is_chief:
            files.write_json(target, {"step": step + 1, "loss": str(loss), "images": names})
        shown = ", ".join(names[:_NAMES_SHOWN])
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        raise UserError(
            f"The loss of step {step + 1} is {loss}; its images are {shown}{more} (all in {target}). "
            f"{self.checkpoints.advice()}"
        )

    def _log_window(self) -> None:
        """Writes the log line of the steps since the last one."""
        timed = self.timed_seconds > 0
        if self.log:
            self.log.write(
                {
                    "kind": "train",
                    "step": self.step,
                    "epoch": round(self.step / self.steps_per_epoch, 4),
                    "loss": math.fsum(self.window) / len(self.window),
                    "learning_rate": float(self.schedule(self.step - 1)),
                    "images_per_second": self.timed_steps * self.recipe.batch_size / self.timed_seconds
                    if timed
                    else None,
                }
            )
        self.window = []
        self.timed_steps, self.timed_seconds = 0, 0.0

    def _checkpoint_due(self) -> bool:
        every = self.cadence.checkpoint_steps
        return self.is_late or bool(every and self.step % every == 0)

    def _save(self) -> None:
        devices = self.strategy.num_replicas_in_sync
        if self.log:
            self.checkpoints.save(Progress(self.step, self.log.tell(), tuple(self.window), self.train_seconds, devices))
        self.saved_at = time.monotonic()

    def _evaluation_due(self) -> bool:
        return self.step == self.total_steps or self.step // self.steps_per_epoch % self.cadence.evaluate_every == 0

    def _evaluate(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Evaluates; the chief writes the log line, model.keras, curves.png and results.json. Returns the results."""

        def stop() -> None:
            # The checkpoint of this step is written already. Several workers finish the evaluation together.
            if self.signals.received and self.workers.count == 1:
                raise TrainingInterrupted(self.signals.received, self.step, self.total_steps)

        with self.average.applied() if self.average else contextlib.nullcontext():
            with self._damage_named(self.dataset.test, lambda: range(len(self.dataset.test))):
                evaluation = self.evaluator(self.dataset.test, stop)
            if self.log:
                with files.atomic_path(self.output_dir / "model.keras") as temporary:
                    self.model.save(temporary)
        results = self._results(evaluation, identity)
        if self.log:
            self._write_results(self.log, evaluation, results)
        return results

    def _write_results(self, log: RunLog, evaluation: Result, results: dict[str, Any]) -> None:
        epoch: float = self.step // self.steps_per_epoch
        if self.step % self.steps_per_epoch:  # the end of a run of steps
            epoch = round(self.step / self.steps_per_epoch, 4)
        log.write({"kind": "evaluation", "step": self.step, "epoch": epoch, **evaluation.to_line()})
        self.bar.note(f"{evaluation.summary()} after epoch {epoch}")
        lines = read_log(self.output_dir / "log.jsonl")
        if self.step == self.total_steps or time.monotonic() - self.plotted_at > _PLOT_SECONDS:
            plot_curves(lines, self.output_dir / "curves.png", self.task.curves)
            self.plotted_at = time.monotonic()
        speeds = [line["images_per_second"] for line in lines if line.get("images_per_second")]
        results["train_images_per_second"] = statistics.median(speeds) if speeds else None
        files.write_json(self.output_dir / "results.json", results)

    def _results(self, evaluation: Result, identity: dict[str, Any]) -> dict[str, Any]:
        return {
            "step": self.step,
            "epochs": self.step // self.steps_per_epoch,
            **evaluation.to_json(self.dataset.class_names),
            "weights": "moving average" if self.average else "last step",
            "train_seconds": self.train_seconds,
            "train_images_per_second": None,
            **machine(self.strategy),
            "skipped_files": len(self.dataset.skipped),
            "skipped_files_list": _SKIPPED if self.dataset.skipped else None,
            **identity,
        }


def _image_size(model: keras.Model) -> tuple[int, int]:
    height, width = model.input_shape[1:3]
    return height, width

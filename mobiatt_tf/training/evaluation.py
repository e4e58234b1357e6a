"""The command `python -m mobiatt_tf.training.evaluate`: checkpoints and exported files on one test set, side by side.

Example:
    python -m mobiatt_tf.training.evaluate --graph=runs/quickstart/train,runs/export/model.tflite \\
        --output_dir=runs/evaluation

All graphs see the same images, prepared for their own input size, and all numbers come from their outputs by the same
code: top-1, calibration and more for classifiers, COCO's AP for detectors, mIoU for segmenters. Stopped by Ctrl-C or
SIGTERM, the same command goes on where it was (with detectors and segmenters at the graph where it was).
"""

import contextlib
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from absl import flags, logging
from tqdm import tqdm

from mobiatt_tf import data, files, tasks
from mobiatt_tf.errors import UserError
from mobiatt_tf.machine import usable_cores
from mobiatt_tf.training import dense_evaluation, evaluation_report, graphs, metrics
from mobiatt_tf.training.evaluator import Evaluation
from mobiatt_tf.training.graphs import Graph
from mobiatt_tf.training.identity import add_split, fingerprint
from mobiatt_tf.training.interrupts import Interrupted, StopSignals
from mobiatt_tf.training.logs import machine
from mobiatt_tf.training.strategy import make_strategy
from mobiatt_tf.verification import dataset_of_run, warn_of_other_classes

_UNFINISHED = "unfinished"  # the directory with the logits of a run that was stopped
_SAVE_EVERY = 64  # batches between two writes of the logits so far


class EvaluationInterrupted(Interrupted):
    """A signal stopped the evaluation after the logits so far were written."""

    def __init__(self, signal_number: int, graph: Graph, done: int, total: int) -> None:
        text = f"{done} of {total} images of {graph.path} are done; the same command goes on there."
        super().__init__(signal_number, text)


@dataclass(frozen=True)
class Result:
    """One graph on the test set.

    Attributes:
        graph: what was run.
        evaluation: loss, top-1, top-5, confusion.
        calibration: of its probabilities.
        agreement: share of the images with the first graph's prediction, in [0, 1].
    """

    graph: Graph
    evaluation: Evaluation
    calibration: metrics.Calibration
    agreement: float

    def to_json(self, class_names: Sequence[str]) -> dict[str, Any]:
        """The same names for every format."""
        return {
            "graph": str(self.graph.path),
            "format": self.graph.format,
            "weights": self.graph.weights,
            "image_size": list(self.graph.image_size),
            "size_bytes": self.graph.size_bytes,
            "sha256": self.graph.sha256,
            "runtime": self.graph.runtime,
            "agreement_with_first": self.agreement,
            **metrics.to_json(self.evaluation, self.calibration, class_names),
        }


def evaluate(
    found: Sequence[Graph],
    split: data.Split,
    class_names: Sequence[str],
    work_dir: Path,
    signals: StopSignals | None = None,
    progress: bool = False,
) -> list[Result]:
    """Runs every graph over the split, one after the other.

    Args:
        found: the graphs, see `graphs.load`.
        split: images and labels; every graph gets them at its own image size.
        class_names: of the dataset.
        work_dir: where logits are kept until all graphs are through; a later call with the same graphs and images goes
            on from them. Other files there stay.
        signals: looked at between batches.
        progress: a bar with the time left for each graph, on standard error.

    Raises:
        UserError: there are no images, a graph has another number of classes, or gives logits that are not finite.
        EvaluationInterrupted: a signal came; what was done is in `work_dir`.
    """
    if not len(split):
        raise UserError("There is nothing to evaluate: the dataset has no test images.")
    for graph in found:
        if graph.classes != len(class_names):
            raise UserError(
                f"{graph.path} has {graph.classes} classes, but the dataset has {len(class_names)}. Give --dataset, "
                "the data that it was trained on."
            )
    results: list[Result] = []
    kept = [work_dir / f"{_key(graph, split, class_names)}.npy" for graph in found]
    first: np.ndarray | None = None  # the first graph's predictions, int64 [N]
    for graph, path in zip(found, kept, strict=True):
        logits = _logits(graph, split, path, signals or StopSignals(), progress)
        try:
            evaluation = metrics.evaluation(logits, split.labels)
            calibration = metrics.calibration(logits, split.labels)
        except ValueError as error:  # not finite
            raise UserError(f"{graph.path} cannot be evaluated: {error}") from error
        # An int8 softmax has steps of 1/256, so that the sum is 1 but for a few of them.
        if (logits >= 0).all() and (np.abs(logits.sum(axis=1) - 1) < 0.05).all():
            raise UserError(f"{graph.path} gives probabilities, not logits. Export it without the softmax at its end.")
        predictions = logits.argmax(-1)
        first = predictions if first is None else first
        results.append(Result(graph, evaluation, calibration, float(np.mean(predictions == first))))
    with contextlib.suppress(OSError):  # the results count, and the directory may hold other files
        for path in kept:
            path.unlink(missing_ok=True)
        work_dir.rmdir()
    return results


def _logits(graph: Graph, split: data.Split, path: Path, signals: StopSignals, progress: bool) -> np.ndarray:
    """float32 [N, classes]; those that an earlier process has left in the file `path` are not computed again."""
    parts = [_read_logits(path, len(split), graph.classes)]
    done = len(parts[0])
    interval = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=len(split), initial=done, desc=graph.path.name, unit="image", disable=not progress, mininterval=interval
    ) as bar:
        if done < len(split):
            rest = split.select(np.arange(done, len(split)))
            batches = data.test_batches(rest, image_size=graph.image_size, batch_size=graph.step)
            for number, (images, _) in enumerate(batches.as_numpy_iterator(), start=1):
                parts.append(graph.predict(images))
                done += len(images)
                bar.update(len(images))
                if signals.received or number % _SAVE_EVERY == 0:
                    _write_logits(path, parts)
                if signals.received:
                    raise EvaluationInterrupted(signals.received, graph, done, len(split))
            _write_logits(path, parts)
    return np.concatenate(parts)


def _key(graph: Graph, split: data.Split, class_names: Sequence[str]) -> str:
    """A name for these logits: everything that they depend on."""
    names = [split.name_of(index) for index in range(len(split))]
    content = [graph.sha256, graph.format, graph.weights, graph.runtime, graph.image_size, names]
    digest = hashlib.sha256(json.dumps(content).encode())
    digest.update(bytes([split.whole_images]))
    add_split(digest, split, class_names)
    return digest.hexdigest()[:32]


def _read_logits(path: Path, count: int, classes: int) -> np.ndarray:
    nothing = np.zeros((0, classes), np.float32)
    if not path.exists():
        return nothing
    try:
        logits = np.load(path)
    except (OSError, ValueError, EOFError):
        logits = None
    if logits is None or logits.ndim != 2 or logits.shape[1] != classes or len(logits) > count:
        logging.warning("%s is damaged; its images are computed again.", path)
        return nothing
    return logits


def _write_logits(path: Path, parts: list[np.ndarray]) -> None:
    with files.atomic_path(path) as temporary:
        np.save(temporary, np.concatenate(parts))


def load_graphs(paths: Sequence[str], batch_size: int, num_threads: int, weights: Sequence[str | None]) -> list[Graph]:
    """`graphs.load` of each; a checkpoint once for each of `weights`.

    Raises:
        UserError: see `graphs.load`.
    """
    found: list[Graph] = []
    for path in paths:
        first = graphs.load(path, batch_size, num_threads, weights[0])
        others = weights[1:] if first.weights is not None else ()
        found += [first, *(graphs.load(path, batch_size, num_threads, each) for each in others)]
    return found


def dataset_for(paths: Sequence[str], name: str | None, cache_dir: str | None, task: str = "classification") -> Any:
    """The dataset of that name or directory, else that of the first graph which belongs to a training run.

    Returns:
        As `tasks.load_dataset` does.

    Raises:
        UserError: neither is known, or it cannot be had.
    """
    for path in paths:
        name = name or dataset_of_run(_run_of(path))
    if name is None:
        raise UserError("Give --dataset: none of the graphs says what it was trained on.")
    try:
        return tasks.load_dataset(task, name, cache_dir)
    except ValueError as error:
        raise UserError(str(error)) from error


def _run_of(path: str) -> Path:
    """The directory of the training run that a graph belongs to, where it belongs to one."""
    run = files.user_path(path)
    return run.parents[1] if run.parent.name == "checkpoints" else run


def chosen_images(split: Any, limit: int | None) -> Any:
    """The whole split, or `limit` images spread evenly over it."""
    if limit is None or limit >= len(split):
        return split
    return split.select(np.linspace(0, len(split) - 1, limit).astype(int))


def check_flags(paths: Sequence[str], weights: Sequence[str], output_dir: Path) -> None:
    """Raises UserError, before anything is computed, for a value of a flag that is not allowed.

    Args:
        paths: of --graph.
        weights: of --weights.
        output_dir: of --output_dir; it need not exist.
    """
    if not paths:
        raise UserError(f"--graph is empty: give {graphs.WHAT}, or several, separated by commas.")
    if not all(path.strip() for path in paths):
        raise UserError(f"--graph={','.join(paths)} has an empty name. Give a path before and after every comma.")
    if unknown := set(weights) - set(graphs.WEIGHTS):
        raise UserError(f"--weights={','.join(sorted(unknown))}: allowed are {', '.join(graphs.WEIGHTS)}.")
    try:
        there = next(path for path in (output_dir, *output_dir.parents) if path.exists())
        if not there.is_dir():
            raise UserError(f"--output_dir={output_dir} cannot be written: {there} is a file. Give a directory.")
        with tempfile.TemporaryFile(dir=there):
            pass  # a file can be made where the directory is, or will be
    except OSError as error:
        raise UserError(
            f"--output_dir={output_dir} cannot be written: {error.strerror or error}. Choose another one."
        ) from error


def main(_: Sequence[str]) -> None:
    """Evaluates as the flags say."""
    values = flags.FLAGS
    num_threads = values.num_threads or usable_cores()
    tf.config.threading.set_intra_op_parallelism_threads(num_threads)
    output_dir = files.user_path(values.output_dir)
    check_flags(values.graph, values.weights, output_dir)
    found = load_graphs(values.graph, values.batch_size, num_threads, values.weights or [None])
    task = dense_evaluation.common_task(found)
    dense_evaluation.check_inference(found, values.inference)
    dataset = dataset_for(values.graph, values.dataset, values.cache_dir, task)
    for path in values.graph:
        warn_of_other_classes(_run_of(path), dataset)
    split = chosen_images(dataset.test, values.limit)
    work_dir = output_dir / _UNFINISHED
    classified: list[Result] = []
    described: list[dict[str, Any]]  # what evaluation.json says of each graph
    with StopSignals() as signals:
        try:
            if task == "classification":
                classified = evaluate(found, split, dataset.class_names, work_dir, signals, progress=True)
                described = [result.to_json(dataset.class_names) for result in classified]
            else:
                described = dense_evaluation.evaluate(
                    found, dataset, split, work_dir, signals, progress=True, inference=values.inference
                )
        except Interrupted as interruption:
            print(interruption, file=sys.stderr)
            sys.exit(interruption.exit_status)
    content = {
        **({} if task == "classification" else {"task": task}),  # absent in files from before there were others
        "dataset": {
            "name": dataset.name,
            "classes": list(dataset.class_names),
            "test_images": len(dataset.test),
            "evaluated_images": len(split),
            "fingerprint": fingerprint(dataset),
        },
        **machine(make_strategy("one")),
        "num_threads": num_threads,
        "batch_size": values.batch_size,
        "results": described,
    }
    if task == "classification":
        print(evaluation_report.format_table(content))
        confusions = [result.evaluation.confusion for result in classified]
        written = evaluation_report.write(content, confusions, output_dir)
    else:
        print(dense_evaluation.format_table(content))
        written = dense_evaluation.write(content, output_dir)
    for path in written:
        print(f"Wrote {path}")


def define_flags() -> None:
    """The command line's flags."""
    flags.DEFINE_list("graph", None, f"What to evaluate, separated by commas: {graphs.WHAT}.", required=True)
    flags.DEFINE_string("dataset", None, "Name or directory; without it that of the first graph's training run.")
    flags.DEFINE_string("cache_dir", None, "Where downloads of --dataset are kept.")
    flags.DEFINE_integer("batch_size", 64, "Images at a time, where the graph allows it.", lower_bound=1)
    flags.DEFINE_integer("limit", None, "Only so many test images, spread evenly; without it all.", lower_bound=1)
    flags.DEFINE_integer("num_threads", None, "Of each runtime; without it the cores at hand.", lower_bound=1)
    flags.DEFINE_list(
        "weights", [], "Of checkpoints: average, last, or both; without it the moving average where there is one."
    )
    flags.DEFINE_enum(
        "inference",
        "sliding",
        dense_evaluation.INFERENCES,
        "Segmenters: in windows of the input's size, or every image at its own size (Keras models and checkpoints).",
    )
    flags.DEFINE_string("output_dir", "runs/evaluation", "Where evaluation.json and evaluation.png go.")

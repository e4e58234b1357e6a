"""Detectors and segmenters on one test set, side by side: the part of `mobiatt_tf.training.evaluation` for them."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mobiatt_tf import files
from mobiatt_tf.errors import UserError
from mobiatt_tf.training import evaluation_report
from mobiatt_tf.training.graphs import Graph
from mobiatt_tf.training.interrupts import Interrupted, StopSignals

# Headings of the table and keys of the JSON, shares in [0, 1].
_COLUMNS = {
    "detection": {
        "AP": "ap",
        "AP50": "ap50",
        "AP75": "ap75",
        "small": "ap_small",
        "medium": "ap_medium",
        "large": "ap_large",
    },
    "segmentation": {"mIoU": "miou", "pixels": "pixel_accuracy"},
}
_SCORES = {"detection": ("ap", "ap50"), "segmentation": ("iou",)}  # of each class, in the picture
INFERENCES = ("sliding", "whole")  # of segmenters
_KEPT_SIZES = 8  # of one network, see `Graph.of_size`: each takes seconds to make and has weights of its own


def common_task(found: Sequence[Graph]) -> str:
    """What all graphs do.

    Raises:
        UserError: not all do the same.
    """
    tasks = list(dict.fromkeys(graph.task for graph in found))
    if len(tasks) > 1:
        named = ", ".join(f"{graph.path}: {graph.task}" for graph in found)
        raise UserError(f"These cannot be compared: {named}. Give --graph models of one task.")
    return tasks[0]


def check_inference(found: Sequence[Graph], inference: str) -> None:
    """Whether all graphs can be measured so.

    Raises:
        UserError: there is no such inference; whole images are asked of detectors or classifiers, or of a file, which
            has one size of input.
    """
    if inference not in INFERENCES:
        raise UserError(f"There is no inference {inference!r}. Choose one of {', '.join(INFERENCES)}.")
    if inference == "sliding":
        return
    for graph in found:
        if graph.task != "segmentation":
            raise UserError(f"--inference=whole is for segmenters; {graph.path} does {graph.task}. Leave it out.")
        if graph.of_size is None:
            raise UserError(
                f"--inference=whole runs every image at its own size, but {graph.path} has one size of input. Give the "
                "Keras model, or take --inference=sliding."
            )


def evaluate(
    found: Sequence[Graph],
    dataset: Any,
    split: Any,
    work_dir: Path,
    signals: StopSignals | None = None,
    progress: bool = False,
    inference: str = "sliding",
) -> list[dict[str, Any]]:
    """Runs every graph over the split, one after the other.

    Args:
        found: detectors or segmenters, see `graphs.load`.
        dataset: a `data.dense.DenseDataset`, which names the classes.
        split: images with boxes or labels.
        work_dir: where the results of whole graphs are kept until all are through; a later call takes them from there.
        signals: looked at between images.
        progress: a bar with the time left for each graph, on standard error.
        inference: of segmenters, one of `INFERENCES`; both at the short side of the graph's input. "whole" runs every
            image at its own size, both sides rounded up to multiples of 32.

    Returns:
        For each graph what evaluation.json says of it.

    Raises:
        UserError: there are no images or nothing to measure, a graph has another number of classes, it cannot be
            measured so, or its outputs are not finite.
        Interrupted: a signal came.
    """
    if not len(split):
        raise UserError("There is nothing to evaluate: the dataset has no test images.")
    for graph in found:
        if graph.classes != len(dataset.class_names):
            raise UserError(
                f"{graph.path} has {graph.classes} classes, but the dataset has {len(dataset.class_names)}. Give "
                "--dataset, the data that it was trained on."
            )
    check_inference(found, inference)
    kept = [work_dir / f"{_key(graph, dataset, split, inference)}.json" for graph in found]
    results = []
    for graph, path in zip(found, kept, strict=True):
        if not path.is_file():
            files.write_json(path, _evaluate(graph, dataset, split, signals or StopSignals(), progress, inference))
        results.append({**_about(graph, inference), **files.read_json(path)})
    with contextlib.suppress(OSError):  # the results count, and the directory may hold other files
        for path in kept:
            path.unlink(missing_ok=True)
        work_dir.rmdir()
    return results


def _evaluate(
    graph: Graph, dataset: Any, split: Any, signals: StopSignals, progress: bool, inference: str
) -> dict[str, Any]:
    def stop() -> None:
        if signals.received:
            text = f"the same command starts with {graph.path}; what was done before is kept."
            raise Interrupted(signals.received, text)

    common: dict[str, Any] = {"stop": stop, "progress": progress}
    measure: Callable[[], Any]
    if graph.task == "detection":
        from mobiatt_tf.tasks import detection

        def measure() -> Any:
            return detection.evaluate_outputs(
                graph.predict, dataset, split, graph.image_size, batch_size=graph.step, **common
            )
    else:
        from mobiatt_tf.tasks import segmentation

        def measure() -> Any:
            if inference == "whole":
                assert graph.of_size is not None  # see `check_inference`
                of_size = functools.lru_cache(_KEPT_SIZES)(graph.of_size)
                return segmentation.evaluate_whole(of_size, dataset, split, min(graph.image_size), **common)
            batch_size = graph.step if graph.of_size else 1  # a file runs one after the other, whatever it is given
            return segmentation.evaluate_outputs(
                graph.predict, dataset, split, graph.image_size, batch_size=batch_size, **common
            )

    try:
        found: dict[str, Any] = measure().to_json(dataset.class_names)
    except ValueError as error:
        raise UserError(f"{graph.path} cannot be evaluated: {error}") from error
    return found


def _about(graph: Graph, inference: str) -> dict[str, Any]:
    return {
        **({"inference": inference} if graph.task == "segmentation" else {}),
        "graph": str(graph.path),
        "format": graph.format,
        "weights": graph.weights,
        "image_size": list(graph.image_size),
        "size_bytes": graph.size_bytes,
        "sha256": graph.sha256,
        "runtime": graph.runtime,
    }


def _key(graph: Graph, dataset: Any, split: Any, inference: str) -> str:
    """A name for a result: everything that it depends on."""
    of_graph = [graph.sha256, graph.format, graph.weights, graph.runtime, graph.image_size]
    content = [*of_graph, list(dataset.class_names), inference]
    digest = hashlib.sha256(json.dumps(content).encode())
    digest.update(split.fingerprint())
    return digest.hexdigest()[:32]


def format_table(content: dict[str, Any]) -> str:
    """One line for each graph; of what `write` writes to JSON."""
    results, dataset = content["results"], content["dataset"]
    names = evaluation_report.short_names(results)
    width = max(len("graph"), *(len(name) for name in names))
    columns = _COLUMNS[content["task"]]
    inference = results[0].get("inference")  # of segmenters
    heads = "".join(f"{head:>9}" for head in columns)
    lines = [
        f"{dataset['evaluated_images']} of {dataset['test_images']} test images of {dataset['name']}, "
        f"{dataset['fingerprint']}; {content['device']}, {content['num_threads']} threads"
        + (f"; {inference} inference" if inference else ""),
        f"{'graph':<{width}}{heads}{'size':>12}",
    ]
    for name, result in zip(names, results, strict=True):
        shares = "".join(f"{'-' if result[key] is None else f'{result[key]:.2%}':>9}" for key in columns.values())
        lines.append(f"{name:<{width}}{shares}{result['size_bytes'] / 1e3:>9,.0f} kB")
    return "\n".join(lines)


def write(content: dict[str, Any], output_dir: Path) -> list[Path]:
    """Writes evaluation.json and evaluation.png (the scores of each class), and returns their paths.

    Raises:
        UserError: the disk refuses.
    """
    table, picture = output_dir / "evaluation.json", output_dir / "evaluation.png"
    files.write_json(table, content)
    with files.atomic_path(picture) as temporary:
        _draw(content, temporary)
    return [table, picture]


def _draw(content: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure  # here, because matplotlib takes a second to load

    results, scores = content["results"], _SCORES[content["task"]]
    names, classes = evaluation_report.short_names(results), content["dataset"]["classes"]
    figure = Figure(figsize=(10, 3.6 * len(scores) + 0.4), layout="constrained")
    for axes, score in zip(figure.subplots(len(scores), 1, squeeze=False)[:, 0], scores, strict=True):
        evaluation_report.draw_scores(axes, score, classes, names, results)
    figure.suptitle(
        f"{content['dataset']['evaluated_images']} test images of {content['dataset']['name']}; {content['device']}, "
        f"{content['num_threads']} threads, TensorFlow {content['versions']['tensorflow']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=100)

"""What models are trained for beside classification: detection and segmentation, each with its loss and measure.

Example:
    >>> from mobiatt_tf import tasks, training
    >>> dataset = tasks.load_dataset("detection", "tfds:coco/2017")
    >>> training.train(build_model, dataset, recipe, "runs/coco", strategy, task=tasks.make_task("detection"))
"""

import os
from typing import Any

import keras

TASKS = ("classification", "detection", "segmentation")


def make_task(name: str) -> Any:
    """The `mobiatt_tf.training.Task` of that name.

    Raises:
        ValueError: there is none.
    """
    if name == "classification":
        from mobiatt_tf.training.task import Classification

        return Classification()
    if name == "detection":
        from mobiatt_tf.tasks.detection import Detection

        return Detection()
    if name == "segmentation":
        from mobiatt_tf.tasks.segmentation import Segmentation

        return Segmentation()
    raise ValueError(f"There is no task {name!r}. Choose one of {', '.join(TASKS)}.")


def load_dataset(task: str, name: str, cache_dir: str | os.PathLike[str] | None = None) -> Any:
    """The dataset called `name`, as the task takes it.

    Args:
        task: one of `TASKS`.
        name: see `data.load`, `data.dense.load_detection` and `data.dense.load_segmentation`.
        cache_dir: where downloads and findings are kept; without it see `data.cache_directory`.

    Raises:
        ValueError: there is no such task.
        UserError: the dataset cannot be had, or is not one of that kind.
    """
    if task == "classification":
        from mobiatt_tf import data

        return data.load(name, cache_dir)
    from mobiatt_tf.data import dense

    loaders = {"detection": dense.load_detection, "segmentation": dense.load_segmentation}
    if task not in loaders:
        raise ValueError(f"There is no task {task!r}. Choose one of {', '.join(TASKS)}.")
    return loaders[task](name, cache_dir)


def task_of(model: keras.Model) -> str:
    """What a model is for, by its outputs.

    A detector gives {"boxes": [B, A, 4], "logits": [B, A, classes]}, a segmenter a map [B, H, W, classes], a classifier
    logits [B, classes] (or those of two heads).

    Raises:
        ValueError: none of these.
    """
    shapes = [tuple(tensor.shape) for tensor in keras.tree.flatten(model.outputs)]
    return task_of_shapes(shapes)


def task_of_shapes(shapes: list[tuple[Any, ...]]) -> str:
    """The same for the shapes of a model's or a file's outputs.

    Raises:
        ValueError: no task has such outputs.
    """
    ranks = [len(shape) for shape in shapes]
    if set(ranks) == {2}:
        return "classification"
    if ranks == [4]:
        return "segmentation"
    if ranks == [3, 3] and 4 in (shapes[0][-1], shapes[1][-1]):
        return "detection"
    raise ValueError(
        f"Outputs of the shapes {', '.join(map(str, shapes))} belong to no task: a classifier gives [B, classes], a "
        "segmenter [B, H, W, classes], a detector boxes [B, A, 4] and logits [B, A, classes]."
    )

"""Images through a model on all devices of this process, and what detection and segmentation check alike."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from mobiatt_tf.training.recipes import Recipe
from mobiatt_tf.training.workers import Workers

T = TypeVar("T")

# Fields of a recipe that only classification has a meaning for, and the value that turns them off.
_OF_CLASSIFICATION: dict[str, Any] = {
    "label_smoothing": 0.0,
    "augmentation": "none",
    "rand_augment": "",
    "color_jitter": 0.0,
    "erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "repeats": 1,
    "distillation": "none",
    "layer_decay": 1.0,
}


class DeviceRunner:
    """Runs a function of images on the devices of this process, with one shape and so one compilation.

    Args:
        function: images float32 [b, H, W, 3] to a tensor or a structure of tensors, each [b, ...].
        strategy: the model was built under its scope.
        workers: of that strategy.
        batch_size: images in a step over all devices of all processes; each device gets at least 1.
    """

    def __init__(
        self,
        function: Callable[[tf.Tensor], Any],
        strategy: tf.distribute.Strategy,
        workers: Workers,
        batch_size: int,
    ) -> None:
        replicas = strategy.num_replicas_in_sync
        self._strategy, self._local = strategy, replicas // workers.count
        self._share = -(-batch_size // replicas)
        self._structure: Any = None

        @tf.function
        def step(images: Any) -> list[tuple[tf.Tensor, ...]]:
            results = strategy.run(function, args=(images,))
            self._structure = tf.nest.map_structure(lambda tensor: None, results)
            return [strategy.experimental_local_results(tensor) for tensor in tf.nest.flatten(results)]

        self._step = step

    @property
    def step_images(self) -> int:
        """Images that this process computes at a time."""
        return self._share * self._local

    def __call__(self, images: np.ndarray) -> Any:
        """What the function gives for images float32 [n, H, W, 3], n above 0: the same structure, NumPy [n, ...]."""
        steps = [self._run(images[start : start + self.step_images]) for start in self._starts(len(images))]
        joined = [np.concatenate(parts)[: len(images)] for parts in zip(*steps, strict=True)]
        return tf.nest.pack_sequence_as(self._structure, joined)

    def _starts(self, count: int) -> range:
        return range(0, count, self.step_images)

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        """Of up to `step_images` images; black ones fill up what is missing."""
        missing = self.step_images - len(images)
        filled = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)]) if missing else images
        shares = filled.reshape(self._local, self._share, *images.shape[1:])
        # Replicas are numbered over all processes, those of one process in a row.
        values = self._strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(shares[context.replica_id_in_sync_group % self._local])
        )
        return [np.concatenate([part.numpy() for part in parts]) for parts in self._step(values)]


def shown(items: Iterable[T], total: int, progress: bool, name: str = "") -> Iterator[T]:
    """The items, with a bar on standard error where that is wanted."""
    interval = 0.5 if sys.stderr.isatty() else 10.0
    yield from tqdm(items, total=total, desc=name or None, unit="image", disable=not progress, mininterval=interval)


def image_size_of(model: keras.Model) -> tuple[int, int]:
    """(height, width) of the images that a model takes.

    Raises:
        ValueError: it takes something else than one batch of images of a fixed size.
    """
    shapes = [tuple(tensor.shape) for tensor in keras.tree.flatten(model.inputs)]
    if len(shapes) != 1 or len(shapes[0]) != 4 or None in shapes[0][1:] or shapes[0][3] != 3:
        raise ValueError(f"The model takes {shapes}, but images of a fixed size [B, height, width, 3] are needed.")
    return shapes[0][1], shapes[0][2]


def pipeline_arguments(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says to the `train_batches` of detection and of segmentation."""
    return {
        "batch_size": recipe.batch_size,
        "seed": recipe.seed,
        "scale": (recipe.scale_low, recipe.scale_high),
        "flip": recipe.flip,
        "photometric": recipe.photometric,
        "parts": recipe.accumulation,
    }


def parts_of_batch(recipe: Recipe) -> int:
    """Images that a recipe computes at a time, over all devices: as many fit into memory in an evaluation too."""
    return max(recipe.batch_size // recipe.accumulation, 1)


def check_classes(found: int, dataset: Any) -> None:
    """Raises ValueError where a model that tells `found` classes apart does not suit the dataset."""
    if found != len(dataset.class_names):
        raise ValueError(
            f"The model has {found} classes, the dataset {dataset.name} has {len(dataset.class_names)}. Build the "
            "model for the dataset, or choose the dataset that it was built for."
        )


def check_recipe(recipe: Recipe, task: str) -> None:
    """Raises ValueError where the recipe asks for what only classification does."""
    given = [
        f"{name}={getattr(recipe, name)!r} (off is {off!r})"
        for name, off in _OF_CLASSIFICATION.items()
        if getattr(recipe, name) != off
    ]
    if given:
        raise ValueError(
            f"The recipe has {', '.join(given)}: {task} does not do that. Turn it off, or take a recipe of {task}."
        )

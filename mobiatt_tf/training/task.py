"""What the loop has to know of a task: its batches, its loss and its measure. Classification is here.

Detection and segmentation stand above this, in `mobiatt_tf.tasks`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import keras
import tensorflow as tf

from mobiatt_tf import data
from mobiatt_tf.training.distillation import Teacher
from mobiatt_tf.training.evaluator import Evaluator, class_count
from mobiatt_tf.training.losses import classification_loss, distillation_loss
from mobiatt_tf.training.recipes import Recipe

# Fields of a recipe that only detection and segmentation have a meaning for, and the value that turns them off.
_NOT_HERE: dict[str, Any] = {
    "scale_low": 1.0,
    "scale_high": 1.0,
    "flip": 0.0,
    "photometric": False,
    "freeze_batch_norm": False,
}

# (images float32 [B, H, W, 3], targets: a tensor or a dict of tensors, each [B, ...]) -> float32 [B].
Losses = Callable[[tf.Tensor, Any], tf.Tensor]


class Result(Protocol):
    """What an evaluation has found."""

    @property
    def count(self) -> int:
        """How many images were evaluated."""

    def to_json(self, class_names: Sequence[str]) -> dict[str, Any]:
        """All of it as JSON values, for results.json; "images" is `count`."""

    def to_line(self) -> dict[str, float | int | None]:
        """The numbers of a log line; "images" is `count`."""

    def summary(self) -> str:
        """The headline in a few words, such as "top-1 91.20 %"."""


Evaluate = Callable[[Any, Callable[[], None]], Result]


class Task(Protocol):
    """What a model is trained for.

    Attributes:
        name: "classification", "detection" or "segmentation".
        curves: what is drawn over the epochs: the label of each curve and its key in the evaluation's log lines, shares
            in [0, 1]; the first is the headline.
    """

    name: str
    curves: Mapping[str, str]

    def check_recipe(self, recipe: Recipe) -> None:
        """Whether everything that the recipe asks for is done by this task.

        Raises:
            ValueError: a field that it would ignore.
        """

    def check_model(self, model: keras.Model, dataset: Any) -> None:
        """Whether model and data go together.

        Raises:
            ValueError: they do not.
        """

    def batches(
        self,
        dataset: Any,
        recipe: Recipe,
        *,
        image_size: tuple[int, int],
        epoch: int,
        first_step: int,
        replica_count: int,
        replicas: Sequence[int],
    ) -> tf.data.Dataset:
        """(images, targets) of the training split for each step and each of `replicas`, see `data.train_batches`."""

    def losses(self, model: keras.Model, recipe: Recipe, teacher: Teacher | None) -> Losses:
        """The loss of each image, computed with the model in training mode; their mean over the batch is the loss."""

    def evaluator(self, model: keras.Model, dataset: Any, strategy: tf.distribute.Strategy, recipe: Recipe) -> Evaluate:
        """A function (split, stop) that evaluates the model as it is then; `stop` is called between batches."""


class Classification:
    """Images to one of some classes."""

    name = "classification"
    curves: Mapping[str, str] = {"top-1": "top1", "top-5": "top5"}

    def check_recipe(self, recipe: Recipe) -> None:
        """Raises ValueError where the recipe asks for what only detection and segmentation do."""
        if given := [
            f"{name}={getattr(recipe, name)}" for name, off in _NOT_HERE.items() if getattr(recipe, name) != off
        ]:
            raise ValueError(
                f"The recipe has {', '.join(given)}, which is for detection and segmentation. Leave it out, or name "
                "the task."
            )

    def check_model(self, model: keras.Model, dataset: data.Dataset) -> None:
        """Raises ValueError where the model has another number of classes than the dataset."""
        if class_count(model) != len(dataset.class_names):
            raise ValueError(
                f"The model has {class_count(model)} classes, the dataset {dataset.name} has "
                f"{len(dataset.class_names)}."
            )

    def batches(
        self,
        dataset: data.Dataset,
        recipe: Recipe,
        *,
        image_size: tuple[int, int],
        epoch: int,
        first_step: int,
        replica_count: int,
        replicas: Sequence[int],
    ) -> tf.data.Dataset:
        """See `data.train_batches`."""
        return data.train_batches(
            dataset.train,
            image_size=image_size,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            epoch=epoch,
            first_step=first_step,
            augmentation=recipe.image_augmentation(),
            classes=len(dataset.class_names),
            replica_count=replica_count,
            replicas=replicas,
            parts=recipe.accumulation,
        )

    def losses(self, model: keras.Model, recipe: Recipe, teacher: Teacher | None) -> Losses:
        """Cross entropy with label smoothing, or hard distillation.

        Raises:
            ValueError: the recipe distills and there is no teacher.
        """
        if recipe.distillation == "none":
            return lambda images, labels: classification_loss(
                model(images, training=True), labels, recipe.label_smoothing
            )
        if teacher is None:
            raise ValueError(f'distillation is "{recipe.distillation}": it needs a teacher.')
        return lambda images, labels: distillation_loss(
            model(images, training=True), labels, teacher(images), recipe.distillation_share, recipe.label_smoothing
        )

    def evaluator(
        self, model: keras.Model, dataset: data.Dataset, strategy: tf.distribute.Strategy, recipe: Recipe
    ) -> Evaluate:
        """Loss, top-1, top-5 and confusion."""
        return Evaluator(model, strategy, recipe.batch_size)

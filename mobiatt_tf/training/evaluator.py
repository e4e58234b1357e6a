"""Evaluation over a whole split: loss, top-1, top-5 and the confusion matrix."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mobiatt_tf import data
from mobiatt_tf.training.losses import classification_loss, inference_logits
from mobiatt_tf.training.strategy import distribute

_MATRIX_CLASSES = 100  # a larger confusion matrix is left out of the JSON


@dataclass(frozen=True)
class Evaluation:
    """Result over a split.

    Attributes:
        count: images.
        loss: mean cross entropy in nats, without label smoothing.
        top1: share of images in [0, 1] whose label is the largest logit.
        top5: share of images whose label is among the five largest logits; None with five classes or fewer.
        confusion: int64 [classes, classes]; row: label, column: prediction.
    """

    count: int
    loss: float
    top1: float
    top5: float | None
    confusion: np.ndarray

    def to_line(self) -> dict[str, float | int | None]:
        """The numbers of a log line."""
        return {"images": self.count, "loss": self.loss, "top1": self.top1, "top5": self.top5}

    def summary(self) -> str:
        """Top-1 in a few words."""
        return f"top-1 {self.top1:.2%}"

    def to_json(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Everything as JSON values; counts by class always, the confusion matrix for up to 100 classes."""
        per_class = {
            name: {"images": int(row.sum()), "correct": int(row[index])}
            for index, (name, row) in enumerate(zip(class_names, self.confusion, strict=True))
        }
        matrix = self.confusion.tolist() if len(class_names) <= _MATRIX_CLASSES else None
        return {
            "images": self.count,
            "loss": self.loss,
            "top1": self.top1,
            "top5": self.top5,
            "per_class": per_class,
            "confusion_matrix": matrix,
        }


def class_count(model: keras.Model) -> int:
    """Number of logits, of each head if there are several."""
    return int(keras.tree.flatten(model.outputs)[0].shape[-1])


class Evaluator:
    """Evaluates one model again and again with one traced function.

    Every image counts once: the last batch is filled up with images of weight 0, so that each device gets the same
    shape.

    Args:
        model: images float32 [B, H, W, 3] to logits [B, classes] (or several such heads, which are averaged).
        strategy: the strategy under whose scope the model was built.
        batch_size: images per step over all devices; rounded up to a multiple of the number of devices.
    """

    def __init__(self, model: keras.Model, strategy: tf.distribute.Strategy, batch_size: int) -> None:
        replicas = strategy.num_replicas_in_sync
        self._strategy = strategy
        self._batch_size = -(-batch_size // replicas) * replicas
        self._image_size = tuple(model.input_shape[1:3])
        self._classes = class_count(model)

        def replica_step(images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor) -> tuple[tf.Tensor, ...]:
            logits = inference_logits(model(images, training=False))  # [B, classes]
            loss = tf.reduce_sum(classification_loss(logits, labels) * weights)
            in_top5 = tf.reduce_sum(tf.cast(tf.math.in_top_k(labels, logits, 5), tf.float32) * weights)
            classes = logits.shape[-1]
            confusion = tf.math.confusion_matrix(labels, tf.argmax(logits, axis=-1), classes, weights, tf.float32)
            return loss, in_top5, confusion

        @tf.function
        def step(batch: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, ...]:
            results = strategy.run(replica_step, args=batch)
            return tuple(strategy.reduce("SUM", result, axis=None) for result in results)

        self._step = step

    def __call__(self, split: data.Split, stop: Callable[[], None] = lambda: None) -> Evaluation:
        """Evaluates the split.

        Args:
            split: the images and labels.
            stop: called before every batch; may raise to give up.

        Raises:
            ValueError: the split is empty, or has labels that the model does not know.
        """
        if not len(split):
            raise ValueError("There is nothing to evaluate: the split holds no images.")
        if split.labels.max() >= self._classes:
            raise ValueError(f"The model knows {self._classes} classes, but the data have label {split.labels.max()}.")
        loss, in_top5, confusion = 0.0, 0.0, None
        for batch in distribute(self._strategy, lambda count, replicas: self._batches(split, count, replicas)):
            stop()
            batch_loss, batch_in_top5, batch_confusion = self._step(batch)
            loss += float(batch_loss)
            in_top5 += float(batch_in_top5)
            counts = batch_confusion.numpy().astype(np.int64)
            confusion = counts if confusion is None else confusion + counts
        assert confusion is not None
        count = int(confusion.sum())
        if count != len(split):
            raise RuntimeError(f"The data pipeline delivered {count} of the {len(split)} test images.")
        top5 = in_top5 / count if len(confusion) > 5 else None
        return Evaluation(count, loss / count, float(np.trace(confusion)) / count, top5, confusion)

    def _batches(self, split: data.Split, replica_count: int, replicas: Sequence[int]) -> tf.data.Dataset:
        """(images, labels, weights) for each of `replicas` in turn; the last batch is filled up with weight 0."""
        steps, share = -(-len(split) // self._batch_size), self._batch_size // replica_count
        indices = (
            np.arange(steps * self._batch_size).reshape(steps, replica_count, share)[:, list(replicas)].reshape(-1)
        )
        weights = (indices < len(split)).astype(np.float32)  # [steps * replicas * share]
        examples = data.test_batches(
            split.select(np.minimum(indices, len(split) - 1)), image_size=self._image_size, batch_size=share
        )
        weighted = tf.data.Dataset.zip(examples, tf.data.Dataset.from_tensor_slices(weights.reshape(-1, share)))
        return weighted.map(
            lambda example, weight: (
                tf.ensure_shape(example[0], (share, *self._image_size, 3)),
                tf.ensure_shape(example[1], (share,)),
                weight,
            )
        )

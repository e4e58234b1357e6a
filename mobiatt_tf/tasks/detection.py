"""Detection: RetinaNet's loss, and COCO's average precision of any detector that can be run.

A detector is a functional model from images [B, H, W, 3] to {"boxes": [B, A, 4], "logits": [B, A, classes]}: offsets
from the anchors (`anchors.encode`), and the logit of each class at each anchor.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mobiatt_tf.data.dense import DenseDataset, DetectionSplit
from mobiatt_tf.tasks import anchors, decoding
from mobiatt_tf.tasks.coco_metrics import (
    MAX_DETECTIONS,
    DetectionResult,
    Truth,
    average_precision,
    require_faster_coco_eval,
)
from mobiatt_tf.tasks.decoding import Detections, decode_detections
from mobiatt_tf.tasks.matching import IGNORED, anchor_targets
from mobiatt_tf.tasks.running import (
    DeviceRunner,
    check_classes,
    check_recipe,
    image_size_of,
    parts_of_batch,
    pipeline_arguments,
    shown,
)
from mobiatt_tf.training.distillation import Teacher
from mobiatt_tf.training.recipes import Recipe
from mobiatt_tf.training.task import Evaluate, Losses
from mobiatt_tf.training.workers import Workers

# Of the focal loss: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, section 5.1.
ALPHA = 0.25
GAMMA = 2.0

# float32 [n, H, W, 3], normalised, to {"boxes": float [n, A, 4], "logits": float [n, A, classes]}, in NumPy.
Run = Callable[[np.ndarray], Mapping[str, np.ndarray]]
# Images, and (height, width) of what each fills of them, to the detections in each, in pixels of the input.
_Find = Callable[[np.ndarray, list[tuple[float, float]]], list[Detections]]


def focal_loss(logits: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
    """The focal loss of each anchor, summed over the classes: Lin et al. 2017, equation 5, float32 [B, A].

    Args:
        logits: float [B, A, classes].
        classes: int32 [B, A], the class that an anchor has; below 0 for none.
    """
    logits = tf.cast(logits, tf.float32)
    hot = tf.one_hot(classes, logits.shape[-1])  # [B, A, classes]; all 0 below 0
    entropy = tf.nn.sigmoid_cross_entropy_with_logits(hot, logits)
    probability = tf.sigmoid(logits)
    wrong = hot * (1 - probability) + (1 - hot) * probability  # 1 - p_t
    weight = hot * ALPHA + (1 - hot) * (1 - ALPHA)
    return tf.reduce_sum(weight * wrong**GAMMA * entropy, axis=-1)


def detection_losses(
    outputs: Mapping[str, tf.Tensor], targets: Mapping[str, tf.Tensor], anchor_boxes: tf.Tensor
) -> tf.Tensor:
    """The loss of each image: focal loss + L1 of the offsets, each over the number of anchors that have a box.

    As torchvision's RetinaNet: both terms are sums over the anchors, divided by max(1, anchors with a box). Each image
    has a divisor of its own, so its loss does not depend on the images beside it.

    Args:
        outputs: of the detector: boxes float [B, A, 4], logits float [B, A, classes].
        targets: boxes float32 [B, N, 4], xyxy in pixels of the input; labels int32 [B, N], below 0 where there is none.
        anchor_boxes: float32 [A, 4].

    Returns:
        float32 [B].
    """
    deltas, classes = anchor_targets(targets["boxes"], targets["labels"], anchor_boxes)
    has_box = classes >= 0  # [B, A]
    of_class = tf.where(classes == IGNORED, 0.0, focal_loss(outputs["logits"], classes))
    distance = tf.reduce_sum(tf.abs(tf.cast(outputs["boxes"], tf.float32) - deltas), axis=-1)
    of_box = tf.where(has_box, distance, 0.0)
    count = tf.maximum(tf.reduce_sum(tf.cast(has_box, tf.float32), axis=1), 1.0)  # [B]
    return tf.reduce_sum(of_class + of_box, axis=1) / count


class Detection:
    """The task: images to boxes with classes."""

    name = "detection"
    curves: Mapping[str, str] = {"AP": "ap", "AP50": "ap50"}

    def check_recipe(self, recipe: Recipe) -> None:
        """Raises ValueError where the recipe asks for what only classification does."""
        check_recipe(recipe, self.name)

    def check_model(self, model: keras.Model, dataset: DenseDataset) -> None:
        """Whether model and data go together.

        Raises:
            ValueError: the model is no detector, or for other classes; there are no boxes to measure on.
            UserError: faster-coco-eval is not installed.
        """
        shapes = [tuple(tensor.shape) for tensor in keras.tree.flatten(model.outputs)]  # in the order of their names
        if [len(shape) for shape in shapes] != [3, 3] or shapes[0][2] != 4 or shapes[0][1] != shapes[1][1]:
            raise ValueError(f"The model gives {shapes}; a detector gives boxes [B, A, 4] and logits [B, A, classes].")
        anchors.first_stride(image_size_of(model), shapes[0][1])
        check_classes(shapes[1][2], dataset)
        if not any((~crowd).any() for crowd in _detection_split(dataset.test).crowd):
            raise ValueError(f"The test split of {dataset.name} has no boxes, so that nothing can be measured.")
        require_faster_coco_eval()

    def batches(
        self,
        dataset: DenseDataset,
        recipe: Recipe,
        *,
        image_size: tuple[int, int],
        epoch: int,
        first_step: int,
        replica_count: int,
        replicas: Sequence[int],
    ) -> tf.data.Dataset:
        """(images, {"boxes", "labels"}), see `data.detection_pipeline.train_batches`."""
        from mobiatt_tf.data import detection_pipeline

        return detection_pipeline.train_batches(
            _detection_split(dataset.train),
            image_size=image_size,
            epoch=epoch,
            first_step=first_step,
            replica_count=replica_count,
            replicas=replicas,
            **pipeline_arguments(recipe),
        )

    def losses(self, model: keras.Model, recipe: Recipe, teacher: Teacher | None) -> Losses:
        """See `detection_losses`."""
        image_size = image_size_of(model)
        count = keras.tree.flatten(model.outputs)[0].shape[1]
        anchor_boxes = anchors.anchors(image_size, anchors.first_stride(image_size, count))
        return lambda images, targets: detection_losses(
            model(images, training=True), targets, tf.constant(anchor_boxes)
        )

    def evaluator(
        self, model: keras.Model, dataset: DenseDataset, strategy: tf.distribute.Strategy, recipe: Recipe
    ) -> Evaluate:
        """Average precision; every process finds the boxes in its share of the images."""
        return Evaluator(model, dataset.class_names, strategy, parts_of_batch(recipe), dataset.category_ids)


class Evaluator:
    """Evaluates one detector again and again with one traced function.

    Args:
        model: the detector.
        class_names: of the dataset.
        strategy: the strategy under whose scope the model was built.
        batch_size: images per step over all devices.
        category_ids: of the dataset, for the results.
    """

    def __init__(
        self,
        model: keras.Model,
        class_names: Sequence[str],
        strategy: tf.distribute.Strategy,
        batch_size: int,
        category_ids: tuple[int, ...] | None = None,
    ) -> None:
        self._class_names, self._image_size = class_names, image_size_of(model)
        self._category_ids = category_ids
        self._workers = Workers(strategy)

        def candidates(images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            outputs = model(images, training=False)
            return decoding.candidates(outputs["boxes"], outputs["logits"], self._image_size)

        self._run = DeviceRunner(candidates, strategy, self._workers, batch_size)

    def __call__(self, split: DetectionSplit, stop: Callable[[], None] = lambda: None) -> DetectionResult:
        """Evaluates the split; `stop` is called before every batch and may raise to give up.

        Raises:
            ValueError: the split is empty or has no boxes, or the model's outputs are not finite.
        """

        def find(images: np.ndarray, clip_to: list[tuple[float, float]]) -> list[Detections]:
            return [decoding.suppress(*image) for image in zip(*self._run(images), clip_to, strict=True)]

        own = np.arange(self._workers.index, len(split), self._workers.count)
        table = np.zeros((len(split), MAX_DETECTIONS, 6))  # box, score, label; a score of 0: none
        for index, found in _detect(find, split, own, self._image_size, self._run.step_images, stop, progress=False):
            table[index, : len(found.boxes)] = np.column_stack([found.boxes, found.scores, found.labels])
        table = self._workers.sum(table)
        rows = [image[image[:, 4] > 0] for image in table]
        detections = [
            Detections(row[:, :4].astype(np.float32), row[:, 4].astype(np.float32), np.rint(row[:, 5]).astype(np.int32))
            for row in rows
        ]
        return average_precision(truths(split), detections, self._class_names, self._category_ids)


def evaluate_outputs(
    run: Run,
    dataset: DenseDataset,
    split: DetectionSplit,
    image_size: tuple[int, int],
    *,
    batch_size: int = 1,
    stop: Callable[[], None] = lambda: None,
    progress: bool = False,
) -> DetectionResult:
    """Average precision of whatever can be run: a Keras model, a .tflite or a Core ML file.

    Args:
        run: float32 [n, H, W, 3] to boxes [n, A, 4] and logits [n, A, classes], n at most `batch_size`.
        dataset: names the classes.
        split: images and boxes.
        image_size: (height, width) of what `run` takes.
        batch_size: images in a call.
        stop: called before every batch; may raise to give up.
        progress: a bar on standard error.

    Raises:
        ValueError: the split is empty or has no boxes, or the outputs have another shape or are not finite.
        UserError: faster-coco-eval is not installed.
    """
    require_faster_coco_eval()

    def find(images: np.ndarray, clip_to: list[tuple[float, float]]) -> list[Detections]:
        outputs = run(images)
        if outputs["logits"].shape[-1] != len(dataset.class_names):
            check_classes(outputs["logits"].shape[-1], dataset)
        return [
            decode_detections(boxes, logits, image_size, clip_to=size)
            for boxes, logits, size in zip(outputs["boxes"], outputs["logits"], clip_to, strict=True)
        ]

    found = dict(_detect(find, split, np.arange(len(split)), image_size, batch_size, stop, progress))
    detections = [found[index] for index in range(len(split))]
    return average_precision(truths(split), detections, dataset.class_names, dataset.category_ids)


def truths(split: DetectionSplit) -> list[Truth]:
    """The boxes of each image, as `average_precision` takes them."""
    return [
        Truth(split.boxes[i], split.labels[i], split.crowd[i], split.areas[i], (split.sizes[i][0], split.sizes[i][1]))
        for i in range(len(split))
    ]


def _detect(
    find: _Find,
    split: DetectionSplit,
    indices: np.ndarray,
    image_size: tuple[int, int],
    batch_size: int,
    stop: Callable[[], None],
    progress: bool,
) -> Iterator[tuple[int, Detections]]:
    """(index, detections in pixels of the original) of the images at `indices`."""
    from mobiatt_tf.data import detection_pipeline

    if not len(split):
        raise ValueError("There is nothing to evaluate: the split holds no images.")
    if not len(indices):
        return
    batches = detection_pipeline.test_batches(split, image_size=image_size, batch_size=batch_size, indices=indices)

    def found() -> Iterator[tuple[int, Detections]]:
        for images, about in batches.as_numpy_iterator():
            stop()
            sizes = split.sizes[about["index"]] * about["scale"][:, None]  # [n, 2], what of the canvas is filled
            detections = find(images, [(float(height), float(width)) for height, width in sizes])
            for index, scale, image in zip(about["index"], about["scale"], detections, strict=True):
                yield int(index), image.scaled(1 / scale)

    yield from shown(found(), len(indices), progress)


def _detection_split(split: Any) -> DetectionSplit:
    if not isinstance(split, DetectionSplit):
        raise ValueError("A detector learns from boxes: the dataset has none. Choose a dataset of detection.")
    return split

"""Semantic segmentation: the loss, and the mean intersection over union of any segmenter that can be run.

A segmenter is a functional model from images [B, H, W, 3] to logits [B, H / s, W / s, classes].
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mobiatt_tf.data.dense import IGNORED, DenseDataset, SegmentationSplit
from mobiatt_tf.tasks.running import (
    DeviceRunner,
    check_classes,
    check_recipe,
    image_size_of,
    parts_of_batch,
    pipeline_arguments,
    shown,
)
from mobiatt_tf.tasks.segmentation_metrics import SegmentationResult, pixel_confusion, segmentation_result
from mobiatt_tf.tasks.segmenting import Places, Run, RunOfSize, checked_logits, checked_shape, classes_of, cut
from mobiatt_tf.training.distillation import Teacher
from mobiatt_tf.training.recipes import Recipe
from mobiatt_tf.training.task import Evaluate, Losses
from mobiatt_tf.training.workers import Workers

# The index of an image, the image float32 [h, w, 3], and its labels uint8 [H, W].
_Image = tuple[int, np.ndarray, np.ndarray]
# The index, the labels, and where the windows of the image lie of which these are the logits [n, h, w, classes].
_Segmented = tuple[int, np.ndarray, Places, np.ndarray]
_Segment = Callable[[Iterator[_Image]], Iterator[_Segmented]]

MULTIPLE = 32  # of pixels: the sides of whole images, so that they suit all strides of a backbone


def segmentation_losses(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """The cross entropy of each image in nats: the sum over its labelled pixels, over the number of all its pixels.

    So mmsegmentation computes it (`ignore_index=255`, `avg_non_ignore=False`), and a pixel has the same weight in every
    image of a batch and on every device.

    Args:
        logits: float [B, h, w, classes]; resized to the labels (bilinear, pixel centres at one half).
        labels: int32 [B, H, W], 255 for pixels that do not count.

    Returns:
        float32 [B].
    """
    logits = tf.image.resize(tf.cast(logits, tf.float32), labels.shape[1:3])  # [B, H, W, classes]
    is_labelled = labels != IGNORED
    entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.where(is_labelled, labels, 0), logits)  # [B, H, W]
    return tf.reduce_mean(tf.where(is_labelled, entropy, 0.0), axis=(1, 2))


class Segmentation:
    """The task: images to a class for every pixel."""

    name = "segmentation"
    curves: Mapping[str, str] = {"mIoU": "miou", "pixel accuracy": "pixel_accuracy"}

    def check_recipe(self, recipe: Recipe) -> None:
        """Raises ValueError where the recipe asks for what only classification does."""
        check_recipe(recipe, self.name)

    def check_model(self, model: keras.Model, dataset: DenseDataset) -> None:
        """Whether model and data go together.

        Raises:
            ValueError: the model is no segmenter, or for other classes, or the dataset has no masks.
        """
        shapes = [tuple(tensor.shape) for tensor in keras.tree.flatten(model.outputs)]
        if [len(shape) for shape in shapes] != [4]:
            raise ValueError(f"The model gives {shapes}; a segmenter gives logits [B, height, width, classes].")
        image_size_of(model)
        check_classes(shapes[0][3], dataset)
        if shapes[0][3] > IGNORED:
            raise ValueError(f"The model has {shapes[0][3]} classes; labels of 8 bits allow {IGNORED}.")
        _segmentation_split(dataset.test)

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
        """(images, labels), see `data.segmentation_pipeline.train_batches`."""
        from mobiatt_tf.data import segmentation_pipeline

        return segmentation_pipeline.train_batches(
            _segmentation_split(dataset.train),
            image_size=image_size,
            epoch=epoch,
            first_step=first_step,
            replica_count=replica_count,
            replicas=replicas,
            **pipeline_arguments(recipe),
        )

    def losses(self, model: keras.Model, recipe: Recipe, teacher: Teacher | None) -> Losses:
        """See `segmentation_losses`."""
        return lambda images, labels: segmentation_losses(model(images, training=True), labels)

    def evaluator(
        self, model: keras.Model, dataset: DenseDataset, strategy: tf.distribute.Strategy, recipe: Recipe
    ) -> Evaluate:
        """Intersection over union of sliding inference; every process segments its share of the images."""
        return Evaluator(model, strategy, parts_of_batch(recipe))


class Evaluator:
    """Evaluates one segmenter again and again with one traced function.

    The short side of an image becomes that of the model's input; windows of the model's input slide over it.

    Args:
        model: the segmenter.
        strategy: the strategy under whose scope the model was built.
        batch_size: windows per step over all devices; those of several images share a step.
    """

    def __init__(self, model: keras.Model, strategy: tf.distribute.Strategy, batch_size: int) -> None:
        self._image_size = image_size_of(model)
        self._classes = int(model.outputs[0].shape[-1])
        self._workers = Workers(strategy)
        self._run = DeviceRunner(
            lambda images: tf.cast(model(images, training=False), tf.float32), strategy, self._workers, batch_size
        )

    def __call__(self, split: SegmentationSplit, stop: Callable[[], None] = lambda: None) -> SegmentationResult:
        """Evaluates the split; `stop` is called before every image and may raise to give up.

        Raises:
            ValueError: the split is empty or has no labelled pixel, a label is out of range, or the model's outputs are
                not finite.
        """
        own = np.arange(self._workers.index, len(split), self._workers.count)
        confusion = _confusion(
            _sliding(self._run, self._image_size, None, self._run.step_images),
            split,
            own,
            min(self._image_size),
            self._classes,
            stop=stop,
        )
        confusion = np.rint(self._workers.sum(confusion)).astype(np.int64)
        return segmentation_result(len(split), confusion)


def evaluate_outputs(
    run: Run,
    dataset: DenseDataset,
    split: SegmentationSplit,
    image_size: tuple[int, int],
    *,
    short_side: int | None = None,
    stride: tuple[int, int] | None = None,
    batch_size: int = 1,
    stop: Callable[[], None] = lambda: None,
    progress: bool = False,
) -> SegmentationResult:
    """Intersection over union, by sliding inference, of whatever can be run: a Keras model, a .tflite, a Core ML file.

    Args:
        run: float32 [n, H, W, 3] to logits [n, H / s, W / s, classes], for any n.
        dataset: names the classes.
        split: images and labels.
        image_size: (height, width) of what `run` takes.
        short_side: of the images, in pixels; without it that of `image_size`.
        stride: see `sliding`.
        batch_size: `run` gets a multiple of so many windows, of several images where one has fewer; the last ones are
            what is left.
        stop: called before every image; may raise to give up.
        progress: a bar on standard error.

    Raises:
        ValueError: the split is empty or has no labelled pixel, a label is out of range, or the outputs have another
            shape or are not finite.
    """
    confusion = _confusion(
        _sliding(run, image_size, stride, batch_size),
        split,
        np.arange(len(split)),
        short_side or min(image_size),
        len(dataset.class_names),
        dataset=dataset,
        stop=stop,
        progress=progress,
    )
    return segmentation_result(len(split), confusion)


def evaluate_whole(
    run_of_size: RunOfSize,
    dataset: DenseDataset,
    split: SegmentationSplit,
    short_side: int,
    *,
    multiple: int = MULTIPLE,
    stop: Callable[[], None] = lambda: None,
    progress: bool = False,
) -> SegmentationResult:
    """The same by whole inference: every image is run at its own size.

    Args:
        run_of_size: makes or finds what runs images of a size.
        dataset: names the classes.
        split: images and labels.
        short_side: of the images, in pixels.
        multiple: both sides are rounded up to a multiple of it.
        stop: called before every image; may raise to give up.
        progress: a bar on standard error.

    Raises:
        ValueError: as `evaluate_outputs`.
    """
    confusion = _confusion(
        _whole(run_of_size),
        split,
        np.arange(len(split)),
        short_side,
        len(dataset.class_names),
        dataset=dataset,
        multiple=multiple,
        stop=stop,
        progress=progress,
    )
    return segmentation_result(len(split), confusion)


def _sliding(run: Run, window: tuple[int, int], stride: tuple[int, int] | None, batch_size: int) -> _Segment:
    """`segmenting.sliding` of one image after the other; windows are run as soon as there are `batch_size` of them."""

    def segment(images: Iterator[_Image]) -> Iterator[_Segmented]:
        waiting: deque[tuple[int, np.ndarray, Places]] = deque()
        windows: list[np.ndarray] = []
        logits: list[np.ndarray] = []
        more = True
        while more or waiting:
            following = next(images, None)
            more = following is not None
            if following is not None:
                index, image, labels = following
                own, places = cut(image, window, stride)
                windows += list(own)
                waiting.append((index, labels, places))
            count = len(windows) - len(windows) % batch_size if more else len(windows)
            if count:
                logits += list(checked_shape(run(np.stack(windows[:count])), count))
                windows = windows[count:]
            while waiting and len(logits) >= (needed := len(waiting[0][2].corners)):
                yield *waiting.popleft(), np.stack(logits[:needed])
                logits = logits[needed:]

    return segment


def _whole(run_of_size: RunOfSize) -> _Segment:
    """`segmenting.whole` of one image after the other."""

    def segment(images: Iterator[_Image]) -> Iterator[_Segmented]:
        for index, image, labels in images:
            size = (image.shape[0], image.shape[1])
            yield index, labels, Places(size, size, ((0, 0),)), run_of_size(size)(image[None])

    return segment


def _confusion(
    segment: _Segment,
    split: SegmentationSplit,
    indices: np.ndarray,
    short_side: int,
    classes: int,
    *,
    multiple: int = 1,
    stop: Callable[[], None],
    dataset: DenseDataset | None = None,
    progress: bool = False,
) -> np.ndarray:
    """int64 [classes, classes]: pixels of the images at `indices`, each at the size of its labels."""
    from mobiatt_tf.data import segmentation_pipeline

    if not len(split):
        raise ValueError("There is nothing to evaluate: the split holds no images.")
    confusion = np.zeros((classes, classes), np.int64)
    if not len(indices):
        return confusion
    images = segmentation_pipeline.test_images(split, short_side=short_side, multiple=multiple, indices=indices)

    def until_stopped() -> Iterator[_Image]:
        for image in images:
            stop()
            yield image

    for index, labels, places, logits in shown(segment(until_stopped()), len(indices), progress):
        try:
            logits = checked_logits(logits, len(places.corners))
            if dataset:
                check_classes(logits.shape[-1], dataset)
            found = classes_of(logits, places, (labels.shape[0], labels.shape[1]))
            confusion += pixel_confusion(labels, found, classes)
        except ValueError as error:
            raise ValueError(f"{split.name_of(index)}: {error}") from error
    return confusion


def _segmentation_split(split: Any) -> SegmentationSplit:
    if not isinstance(split, SegmentationSplit):
        raise ValueError("A segmenter learns from masks: the dataset has none. Choose a dataset of segmentation.")
    return split

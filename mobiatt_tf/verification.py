"""What every exporter needs to check its file: real images, and the comparison of two models' outputs on them."""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from absl import logging

from mobiatt_tf import data, files
from mobiatt_tf.errors import UserError

# What a model gives for a batch of images: logits [N, classes] of a classifier, [N, height, width, classes] of a
# segmenter; {"boxes": [N, anchors, 4], "logits": [N, anchors, classes]} of a detector.
Outputs = np.ndarray | Mapping[str, np.ndarray]
Run = Callable[[np.ndarray], Any]  # float32 images [N, height, width, 3] to `Outputs`

# An anchor whose best class has a smaller probability finds nothing (torchvision's RetinaNet, score_thresh).
_FOREGROUND = float(np.log(0.05 / (1 - 0.05)))  # as a logit
SAME_LOGIT = 0.2  # logits that differ by less are a near tie: probabilities of .05 and .06
_BATCH_PIXELS = 32 * 224 * 224  # at a time through Keras: 32 images of 224 x 224, three of 800 x 1344


@dataclass(frozen=True)
class Comparison:
    """The comparison of an exported file with its Keras model.

    Attributes:
        images: how many images were compared.
        max_relative_error: largest absolute difference of logits, divided by the largest absolute Keras logit.
        agreement: share of images with the same top-1 class, in [0, 1].
        tolerance: the bound on `max_relative_error`.
        keras_top1: share of right classes of the Keras model; None without labels.
        file_top1: the same of the file.
    """

    images: int
    max_relative_error: float
    agreement: float
    tolerance: float
    keras_top1: float | None
    file_top1: float | None

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return bool(self.max_relative_error <= self.tolerance)


@dataclass(frozen=True)
class DenseComparison(Comparison):
    """The comparison of a detector's or a segmenter's file.

    `max_relative_error` is the largest of `output_errors`, `agreement` is over `places`, and there is no top-1. A
    detector's anchors agree where both give the same best class and find something or nothing alike: both give the
    class a probability above .05. A near tie is no disagreement: logits that differ by less than `SAME_LOGIT` may be
    decided otherwise.

    Attributes:
        places: what was compared: pixels of the logits; of a detector the anchors for which Keras or the file gives a
            class a probability above .05. Without any (a detector that was hardly trained) the agreement is 1.
        output_errors: of each output by its name: largest absolute difference over the largest absolute Keras value.
        box_error: of a detector, at the anchors for which Keras gives a class a probability above .5 (.05 if there is
            none): largest absolute difference of deltas over the largest absolute Keras delta there. None without any.
        box_tolerance: the bound on `box_error`.
        least_agreement: the bound on `agreement`.
    """

    places: int = 0
    output_errors: dict[str, float] = field(default_factory=dict)
    box_error: float | None = None
    box_tolerance: float = np.inf
    least_agreement: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the errors are numbers within their tolerances, and enough places agree."""
        boxes_fit = self.box_error is None or self.box_error <= self.box_tolerance
        return bool(super().passed and boxes_fit and self.agreement >= self.least_agreement)


def compare(
    expected: Outputs, actual: Outputs, labels: Sequence[int] | np.ndarray | None, tolerance: float
) -> Comparison:
    """Compares the outputs of the Keras model and of the file; `labels` are int [N], or None, of a classifier.

    Raises:
        ValueError: they have other outputs or other shapes.
    """
    if isinstance(expected, Mapping) or expected.ndim != 2:
        found = _Differences()
        found.add(expected, actual)
        return found.comparison(tolerance, tolerance, 0.0)
    assert isinstance(actual, np.ndarray)
    difference = float(np.max(np.abs(actual - expected)))
    expected_class, actual_class = expected.argmax(-1), actual.argmax(-1)
    return Comparison(
        images=len(expected),
        max_relative_error=difference / max(float(np.max(np.abs(expected))), 1e-30),
        agreement=float(np.mean(expected_class == actual_class)),
        tolerance=tolerance,
        keras_top1=None if labels is None else float(np.mean(expected_class == labels)),
        file_top1=None if labels is None else float(np.mean(actual_class == labels)),
    )


def compare_dense(
    expected: Run,
    actual: Run,
    images: np.ndarray,
    tolerance: float,
    box_tolerance: float | None = None,
    least_agreement: float = 0.0,
) -> DenseComparison:
    """`compare` of what two detectors or segmenters give for the same images, without holding all outputs at a time.

    A detector of 80 classes gives 68 MB for an image of 800 x 1344.

    Args:
        expected: the Keras model.
        actual: the file.
        images: float32 [N, height, width, 3], normalised.
        tolerance: see `Comparison`.
        box_tolerance: see `DenseComparison`; None takes `tolerance`.
        least_agreement: see `DenseComparison`.

    Raises:
        ValueError: there are no images, or the outputs differ in name or shape.
    """
    if not len(images):
        raise ValueError("There are no images to compare on.")
    found = _Differences()
    step = batch_size_for(images.shape[1:3])
    for start in range(0, len(images), step):
        part = images[start : start + step]
        found.add(expected(part), actual(part))
    return found.comparison(tolerance, tolerance if box_tolerance is None else box_tolerance, least_agreement)


class _Differences:
    """Collects what a `DenseComparison` says, batch by batch."""

    def __init__(self) -> None:
        self._images = 0
        self._difference: dict[str, float] = {}
        self._largest: dict[str, float] = {}
        self._equal, self._places = 0, 0
        # At anchors with a probability above .5 and above .05: largest difference of deltas, largest delta, how many.
        self._boxes = {0.0: np.zeros(3), _FOREGROUND: np.zeros(3)}

    def add(self, expected: Outputs, actual: Outputs) -> None:
        """Takes one batch in."""
        first, second = (each if isinstance(each, Mapping) else {"logits": each} for each in (expected, actual))
        shapes = [{name: values.shape for name, values in each.items()} for each in (first, second)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"The file was not made from this model: it gives {shapes[1]}, the model {shapes[0]}.")
        for name, values in first.items():
            # NumPy's maximum, unlike Python's, keeps what is not a number: such a file does not pass.
            difference, largest = np.max(np.abs(second[name] - values)), np.max(np.abs(values))
            self._difference[name] = float(np.maximum(self._difference.get(name, 0.0), difference))
            self._largest[name] = float(np.maximum(self._largest.get(name, 0.0), largest))
        self._images += len(first["logits"])
        chosen = second["logits"].argmax(-1)  # [N, anchors] or [N, height, width]
        equal = first["logits"].argmax(-1) == chosen
        places = np.ones_like(equal)
        if "boxes" in first:
            best, other = first["logits"].max(-1), second["logits"].max(-1)  # [N, anchors]
            places = (best > _FOREGROUND) | (other > _FOREGROUND)
            alike = np.take_along_axis(first["logits"], chosen[..., None], -1)[..., 0]  # of the file's class
            equal |= best - alike < SAME_LOGIT
            equal &= ((best > _FOREGROUND) == (other > _FOREGROUND)) | (np.abs(best - other) < SAME_LOGIT)
            for threshold, seen in self._boxes.items():
                wanted, given = (each["boxes"][best > threshold] for each in (first, second))  # [n, 4]
                if len(wanted):
                    found = np.max(np.abs(given - wanted)), np.max(np.abs(wanted)), seen[2] + len(wanted)
                    self._boxes[threshold] = np.maximum(seen, found)
        self._equal += int(equal[places].sum())
        self._places += int(places.sum())

    def comparison(self, tolerance: float, box_tolerance: float, least_agreement: float) -> DenseComparison:
        """Of everything that was taken in."""
        errors = {name: self._difference[name] / max(self._largest[name], 1e-30) for name in self._difference}
        boxes = [(difference, largest) for difference, largest, count in self._boxes.values() if count]
        return DenseComparison(
            images=self._images,
            max_relative_error=float(np.max(list(errors.values()))),
            agreement=self._equal / self._places if self._places else 1.0,
            tolerance=tolerance,
            keras_top1=None,
            file_top1=None,
            places=self._places,
            output_errors=errors,
            box_error=float(boxes[0][0] / max(boxes[0][1], 1e-30)) if boxes else None,
            box_tolerance=box_tolerance,
            least_agreement=least_agreement,
        )


def class_count(model: keras.Model) -> int:
    """How many classes a classifier, detector or segmenter knows."""
    outputs = model.output
    logits = outputs["logits"] if isinstance(outputs, Mapping) else keras.tree.flatten(outputs)[0]
    return int(logits.shape[-1])


def batch_size_for(image_size: Sequence[int]) -> int:
    """How many images (height, width) go through Keras at a time: 32, fewer of those larger than 224 x 224."""
    return max(1, min(32, _BATCH_PIXELS // int(np.prod(image_size))))


def keras_logits(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Logits float32 [N, classes] of a Keras model for float32 images [N, height, width, 3]."""
    return np.asarray(model.predict(images, batch_size=32, verbose=0), "float32")


def keras_outputs(model: keras.Model, images: np.ndarray) -> Any:
    """What a Keras model gives for float32 images [N, height, width, 3], float32: see `Outputs`."""
    found = model.predict(images, batch_size=batch_size_for(images.shape[1:3]), verbose=0)
    return keras.tree.map_structure(lambda values: np.asarray(values, "float32"), found)


def checking_images(
    checkpoint: str | os.PathLike[str] | None,
    dataset: str | None,
    cache_dir: str | None,
    image_size: tuple[int, int],
    count: int,
    task: str = "classification",
) -> tuple[np.ndarray, np.ndarray | None, str]:
    """The images of `dataset`, else of the training run that `checkpoint` belongs to, else photographs.

    Args:
        checkpoint: of the model.
        dataset: name or directory.
        cache_dir: where downloads are kept.
        image_size: (height, width).
        count: how many images at most.
        task: what the model does, one of `mobiatt_tf.tasks.TASKS`.

    Returns:
        float32 [N, height, width, 3] normalised, the labels int [N] of images of a classifier, and what they are, in
        words.

    Raises:
        UserError: the dataset cannot be had.
    """
    name = dataset or dataset_of_run(checkpoint)
    if name is None:
        return photographs(image_size, count), None, "crops of two photographs (--dataset names other images)"
    found = dataset_of(checkpoint, name, cache_dir, task)
    labels = None
    if task == "classification":
        images, labels = dataset_images(found, image_size, count)
    else:
        images = dense_images(task, found.test, image_size, count)
    return images, labels, f"test images of {name}"


def dataset_of_run(checkpoint: str | os.PathLike[str] | None) -> str | None:
    """The name of the dataset that a checkpoint was trained on; None where no run says so."""
    described = _of_run(checkpoint, "run.json")
    return None if described is None else str(described["dataset"]["name"])


def class_names_of_run(checkpoint: str | os.PathLike[str] | None) -> tuple[str, ...] | None:
    """The names of the classes that a checkpoint was trained on, in their order; None where no results say so."""
    results = _of_run(checkpoint, "results.json")
    names = (results or {}).get("per_class")
    return tuple(names) if names else None


def warn_of_other_classes(checkpoint: str | os.PathLike[str], dataset: Any) -> None:
    """Warns where a checkpoint has learned other classes than a dataset has, or the same in another order."""
    learned, has = class_names_of_run(checkpoint), tuple(dataset.class_names)
    if not learned or learned == has:
        return
    pairs = itertools.zip_longest(learned, has, fillvalue="nothing")
    index, (of_run, of_dataset) = next((index, pair) for index, pair in enumerate(pairs) if pair[0] != pair[1])
    logging.warning(
        "%s has learned other classes than %s has: class %d is %s for the run and %s in the dataset. Scores "
        "count these as the same; give --dataset the data that the run was trained on.",
        *(checkpoint, dataset.name, index, of_run, of_dataset),
    )


def category_ids_of_run(checkpoint: str | os.PathLike[str] | None) -> tuple[int, ...] | None:
    """What the dataset of a detector's run itself calls its classes, in their order; None where no results say so."""
    results = _of_run(checkpoint, "results.json")
    ids = [each.get("category_id") for each in ((results or {}).get("per_class") or {}).values()]
    return tuple(ids) if ids and None not in ids else None


def _of_run(checkpoint: str | os.PathLike[str] | None, name: str) -> dict[str, Any] | None:
    """The content of a JSON file of the run that a checkpoint belongs to; None if there is none."""
    if checkpoint is None:
        return None
    path = files.user_path(checkpoint)
    path = (path if path.is_dir() else path.parent) / name
    found: dict[str, Any] | None = files.read_json(path) if path.is_file() else None
    return found


def dataset_of(
    checkpoint: str | os.PathLike[str] | None,
    name: str | None,
    cache_dir: str | os.PathLike[str] | None,
    task: str = "classification",
) -> Any:
    """The dataset called `name`, else that of the training run which `checkpoint` belongs to.

    Returns:
        A `data.Dataset`, or for the other tasks a `data.dense.DenseDataset`.

    Raises:
        UserError: neither is known, or it cannot be had.
    """
    name = name or dataset_of_run(checkpoint)
    if name is None:
        raise UserError(f"Give --dataset: {checkpoint} does not say what it was trained on.")
    from mobiatt_tf import tasks  # stands above this module

    try:
        return tasks.load_dataset(task, name, cache_dir)
    except ValueError as error:
        raise UserError(str(error)) from error


def dense_images(task: str, split: Any, image_size: tuple[int, int], count: int) -> np.ndarray:
    """Up to `count` images spread over a split, float32 [N, height, width, 3] normalised, see `dense_batches`."""
    count = min(count, len(split))
    chosen = split.select(np.linspace(0, len(split) - 1, count).astype(int))
    return np.concatenate(list(dense_batches(task, chosen, image_size)))


def dense_batches(task: str, split: Any, image_size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The images of a split as a detector or a segmenter of one size sees them.

    For detection they are fitted in (`detection_pipeline.test_batches`); for segmentation, whose models see images of
    any shape piece by piece, the centre is cut out at the scale of `segmentation_pipeline.test_images`.

    Args:
        task: "detection" or "segmentation".
        split: its images.
        image_size: (height, width).

    Yields:
        float32 [n, height, width, 3], normalised; n as `batch_size_for` has it, the last one excepted.
    """
    step = batch_size_for(image_size)
    if task == "detection":
        from mobiatt_tf.data import detection_pipeline

        for images, _ in detection_pipeline.test_batches(
            split, image_size=image_size, batch_size=step
        ).as_numpy_iterator():
            yield images
        return
    from mobiatt_tf.data import segmentation_pipeline

    pending: list[np.ndarray] = []
    for _, image, _ in segmentation_pipeline.test_images(split, short_side=min(image_size)):
        pending.append(_centre(image, image_size))
        if len(pending) == step:
            yield np.stack(pending)
            pending = []
    if pending:
        yield np.stack(pending)


def _centre(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The centre of [h, w, C] in this size, [height, width, C]; 0 at right and bottom where the image is smaller."""
    top, left = (max(0, (side - wanted) // 2) for side, wanted in zip(image.shape[:2], size, strict=True))
    image = image[top : top + size[0], left : left + size[1]]  # [<= height, <= width, C]
    margins = [(0, wanted - side) for side, wanted in zip(image.shape[:2], size, strict=True)]
    return np.pad(image, [*margins, (0, 0)])  # [height, width, C]


def dataset_images(dataset: data.Dataset, image_size: tuple[int, int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `count` test images spread over the split, float32 [N, height, width, 3] normalised, and their labels."""
    count = min(count, len(dataset.test))
    indices = np.linspace(0, len(dataset.test) - 1, count).astype(int)
    batches = data.test_batches(dataset.test.select(indices), image_size=image_size, batch_size=64)
    images, labels = zip(*batches.as_numpy_iterator(), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def photographs(image_size: tuple[int, int], count: int, seed: int = 0) -> np.ndarray:
    """Random crops of scikit-learn's two photographs, float32 [count, height, width, 3] normalised.

    For models without a dataset at hand: real image statistics, no labels.
    """
    from sklearn.datasets import load_sample_images

    generator = np.random.default_rng(seed)
    pictures = load_sample_images().images  # two of [427, 640, 3], uint8
    crops = []
    for index in range(count):
        picture = pictures[index % len(pictures)]
        side = int(generator.integers(96, 427))
        top, left = (int(generator.integers(0, size - side + 1)) for size in picture.shape[:2])
        crop = picture[None, top : top + side, left : left + side].astype("float32")
        crops.append(keras.ops.image.resize(crop, image_size, antialias=True, data_format="channels_last"))
    return np.asarray(data.normalize(keras.ops.convert_to_numpy(keras.ops.concatenate(crops))))

"""What a confusion matrix of pixels says of a segmenter: intersection over union, and pixel accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobiatt_tf.data.dense import IGNORED


def pixel_confusion(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Counts the pixels of an image by label and prediction.

    Args:
        labels: integers [H, W], 255 for pixels that do not count.
        predictions: integers [H, W], below `classes`.
        classes: their number.

    Returns:
        int64 [classes, classes]; row: label, column: prediction.

    Raises:
        ValueError: the shapes differ, or a label or prediction is out of range.
    """
    if labels.shape != predictions.shape:
        raise ValueError(f"Labels {labels.shape} and predictions {predictions.shape} must have the same shape.")
    counts = labels != IGNORED
    labels, predictions = labels[counts].astype(np.int64), predictions[counts].astype(np.int64)
    for name, values in (("labels", labels), ("predictions", predictions)):
        if len(values) and not 0 <= values.min() <= values.max() < classes:
            raise ValueError(
                f"The {name} run from {values.min()} to {values.max()}, but there are {classes} classes, from 0, and "
                f"{IGNORED} for what does not count."
            )
    return np.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)


@dataclass(frozen=True)
class SegmentationResult:
    """Result over a split, from the pixels of all its images together.

    Attributes:
        count: images.
        confusion: int64 [classes, classes], pixels; row: label, column: prediction.
    """

    count: int
    confusion: np.ndarray

    @property
    def class_iou(self) -> np.ndarray:
        """Intersection over union of each class, float64 [classes] in [0, 1]; NaN where it neither is nor is found."""
        right = np.diag(self.confusion).astype(np.float64)
        union = self.confusion.sum(axis=0) + self.confusion.sum(axis=1) - right
        return np.where(union > 0, right / np.maximum(union, 1), np.nan)

    @property
    def miou(self) -> float:
        """Mean of `class_iou`, in [0, 1]. Classes that are NaN there have no part in it, as in mmsegmentation."""
        return float(np.nanmean(self.class_iou))

    @property
    def pixel_accuracy(self) -> float:
        """Share of the labelled pixels whose class is right, in [0, 1]."""
        return float(np.trace(self.confusion) / self.confusion.sum())

    @property
    def absent(self) -> int:
        """How many classes have no part in the mean."""
        return int(np.isnan(self.class_iou).sum())

    def to_line(self) -> dict[str, float | int | None]:
        """The numbers of a log line."""
        return {"images": self.count, "miou": self.miou, "pixel_accuracy": self.pixel_accuracy}

    def to_json(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Everything as JSON values; the IoU of a class that neither is nor is found is null."""
        labelled, found = self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        per_class = {
            name: {"pixels": int(labelled[i]), "predicted": int(found[i]), "iou": None if np.isnan(iou) else float(iou)}
            for i, (name, iou) in enumerate(zip(class_names, self.class_iou, strict=True))
        }
        return {**self.to_line(), "absent_classes": self.absent, "per_class": per_class}

    def summary(self) -> str:
        """The mean and, where it is not of all classes, of how many."""
        classes = len(self.confusion)
        of_classes = f" (of {classes - self.absent} of {classes} classes)" if self.absent else ""
        return f"mIoU {self.miou:.2%}{of_classes}, pixel accuracy {self.pixel_accuracy:.2%}"


def segmentation_result(count: int, confusion: np.ndarray) -> SegmentationResult:
    """The result of `count` images.

    Raises:
        ValueError: no pixel of them has a label.
    """
    if not confusion.sum():
        raise ValueError(f"There is nothing to measure: none of {count} images has a labelled pixel.")
    return SegmentationResult(count, confusion)

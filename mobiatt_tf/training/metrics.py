"""What logits on a labelled set say of a classifier: accuracy, errors by class, and how far its confidence is right.

Pure NumPy in float64, whatever computed the logits: so the numbers of a float and of an int8 graph mean the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobiatt_tf.training.evaluator import Evaluation

BINS = 15  # Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 5


@dataclass(frozen=True)
class Reliability:
    """Images by their confidence, in bins of equal width over (0, 1].

    Attributes:
        counts: int64 [bins], images in each bin.
        confidence: float64 [bins], their mean confidence; 0 for an empty bin.
        accuracy: float64 [bins], their share of right classes; 0 for an empty bin.
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def expected_error(self) -> float:
        """Mean over the images of |accuracy - confidence| of their bins, in [0, 1]: Guo et al. 2017, equation 3."""
        return float(self.counts @ np.abs(self.accuracy - self.confidence) / self.counts.sum())


@dataclass(frozen=True)
class Calibration:
    """How far a classifier's probabilities are right.

    Attributes:
        mean_confidence: mean probability of the predicted class, in [0, 1].
        brier_score: mean squared distance of the probabilities from the one-hot label, in [0, 2] (Brier 1950).
        reliability: accuracy by confidence.
    """

    mean_confidence: float
    brier_score: float
    reliability: Reliability


def evaluation(logits: np.ndarray, labels: np.ndarray) -> Evaluation:
    """Loss, accuracy and confusion of logits float [N, classes] against labels int [N].

    Equal logits, of which int8 graphs have some: the class with the lower number is predicted, and is ranked higher.

    Raises:
        ValueError: there are no images, the shapes do not fit, a label is out of range, or a logit is not finite.
    """
    _check(logits, labels)
    count, classes = logits.shape
    own = logits[np.arange(count), labels][:, None]  # [N, 1]
    lower_number = np.arange(classes) < labels[:, None]  # [N, classes]
    rank = ((logits > own) | ((logits == own) & lower_number)).sum(axis=1)  # [N], classes that stand before the label
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, logits.argmax(axis=1)), 1)
    return Evaluation(
        count=count,
        loss=float(-_log_probabilities(logits)[np.arange(count), labels].mean()),
        top1=float((rank < 1).mean()),
        top5=float((rank < 5).mean()) if classes > 5 else None,
        confusion=confusion,
    )


def calibration(logits: np.ndarray, labels: np.ndarray) -> Calibration:
    """Calibration of the softmax of logits float [N, classes] against labels int [N]; errors as in `evaluation`."""
    _check(logits, labels)
    probabilities = np.exp(_log_probabilities(logits))  # [N, classes]
    predictions = logits.argmax(axis=1)  # [N]
    confidence = probabilities[np.arange(len(labels)), predictions]
    return Calibration(
        mean_confidence=float(confidence.mean()),
        brier_score=float(np.square(probabilities - np.eye(logits.shape[1])[labels]).sum(axis=1).mean()),
        reliability=reliability(confidence, predictions == labels),
    )


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> Reliability:
    """Sorts images into the bins ((m - 1) / bins, m / bins] of confidence: Guo et al. 2017, section 2.

    Args:
        confidence: float [N], the predicted class's probability, in [0, 1]; 0 goes to the first bin.
        right: bool [N], whether the predicted class is the label.
        bins: how many.

    Raises:
        ValueError: there are no images, or a confidence is not in [0, 1].
    """
    confidence = np.asarray(confidence, np.float64)
    if not len(confidence):
        raise ValueError("There are no images to measure on.")
    if not ((confidence >= 0) & (confidence <= 1 + 1e-9)).all():  # rounding may lift it above 1
        raise ValueError(f"Confidences must be in [0, 1], but run from {confidence.min()} to {confidence.max()}.")
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # [N]
    counts = np.bincount(bin_of, minlength=bins)
    divisor = np.maximum(counts, 1)
    return Reliability(
        counts,
        np.bincount(bin_of, confidence, bins) / divisor,
        np.bincount(bin_of, np.asarray(right, np.float64), bins) / divisor,
    )


def to_json(found: Evaluation, calibrated: Calibration, class_names: Sequence[str]) -> dict[str, Any]:
    """Everything as JSON values: `Evaluation.to_json`, with recall and precision by class, and the calibration.

    The recall of a class without images and the precision of one that is never predicted are null.
    """
    content = found.to_json(class_names)
    predicted = found.confusion.sum(axis=0)
    for index, name in enumerate(class_names):
        scores = content["per_class"][name]
        scores["predicted"] = int(predicted[index])
        scores["recall"] = _share(scores["correct"], scores["images"])
        scores["precision"] = _share(scores["correct"], scores["predicted"])
    bins = calibrated.reliability
    edges = np.linspace(0, 1, len(bins.counts) + 1)
    content["calibration"] = {
        "expected_calibration_error": bins.expected_error,
        "mean_confidence": calibrated.mean_confidence,
        "brier_score": calibrated.brier_score,
        "reliability": [
            {
                "low": float(edges[index]),
                "high": float(edges[index + 1]),
                "images": int(images),
                "confidence": float(bins.confidence[index]) if images else None,
                "accuracy": float(bins.accuracy[index]) if images else None,
            }
            for index, images in enumerate(bins.counts)
        ],
    }
    return content


def _check(logits: np.ndarray, labels: np.ndarray) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"Logits must be [N, classes] and labels [N], got {logits.shape} and {labels.shape}.")
    if not len(labels):
        raise ValueError("There are no images to measure on.")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"Labels must be from 0 to {logits.shape[1] - 1}, but run from {labels.min()} to {labels.max()}."
        )
    if not np.isfinite(logits).all():
        first = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
        raise ValueError(f"the logits of image {first} are not finite.")


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None

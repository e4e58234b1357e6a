"""COCO's average precision of boxes, by faster-coco-eval, which computes what pycocotools computes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobiatt_tf.errors import UserError
from mobiatt_tf.tasks.decoding import Detections

MAX_DETECTIONS = 100
# Areas in square pixels of the original image, as on cocodataset.org ("Detection evaluation").
_AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}


@dataclass(frozen=True)
class Truth:
    """The boxes of one image, in pixels of the original.

    Attributes:
        boxes: float32 [n, 4], xyxy.
        labels: int32 [n], class indices.
        crowd: bool [n]: a region of many objects. Detections in it are neither right nor wrong, and it is not missed.
        areas: float32 [n], in square pixels: what decides between small, medium and large.
        size: (height, width) of the image.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    size: tuple[int, int]


@dataclass(frozen=True)
class DetectionResult:
    """Average precision over a split; every value in [0, 1], None where there is no box to find.

    Attributes:
        count: images.
        boxes: boxes to find, without crowds.
        ap: mean over the classes that occur and over the thresholds .5, .55, ... .95 of the intersection over union.
        ap50: at the threshold .5.
        ap75: at the threshold .75.
        ap_small: `ap` of boxes below 32 x 32 pixels.
        ap_medium: from there to 96 x 96.
        ap_large: above.
        recall: mean over the same of the largest recall, with 100 detections in an image.
        class_boxes: how many boxes each class has, without crowds.
        class_ap: `ap` of each class.
        class_ap50: `ap50` of each class.
        category_ids: what the dataset itself calls each class; None: not known.
    """

    count: int
    boxes: int
    ap: float
    ap50: float
    ap75: float
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    recall: float
    class_boxes: tuple[int, ...]
    class_ap: tuple[float | None, ...]
    class_ap50: tuple[float | None, ...]
    category_ids: tuple[int, ...] | None = None

    def to_line(self) -> dict[str, float | int | None]:
        """The numbers of a log line; an AP by size is null where no box has that size."""
        return {
            "images": self.count,
            "ap": self.ap,
            "ap50": self.ap50,
            "ap75": self.ap75,
            "ap_small": self.ap_small,
            "ap_medium": self.ap_medium,
            "ap_large": self.ap_large,
        }

    def to_json(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Everything as JSON values; a class without boxes has null, and no part in the means."""
        per_class: dict[str, dict[str, Any]] = {
            name: {"boxes": boxes, "ap": ap, "ap50": ap50}
            for name, boxes, ap, ap50 in zip(class_names, self.class_boxes, self.class_ap, self.class_ap50, strict=True)
        }
        for name, category_id in zip(class_names, self.category_ids or (), strict=False):
            per_class[name]["category_id"] = category_id
        return {**self.to_line(), "boxes": self.boxes, "ar100": self.recall, "per_class": per_class}

    def summary(self) -> str:
        """AP and AP50 in a few words."""
        return f"AP {self.ap:.2%}, AP50 {self.ap50:.2%}"


def require_faster_coco_eval() -> None:
    """Raises UserError where faster-coco-eval is not installed."""
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError as error:
        raise UserError("faster-coco-eval is needed to measure detectors: pip install faster-coco-eval.") from error


def average_precision(
    truths: Sequence[Truth],
    detections: Sequence[Detections],
    class_names: Sequence[str],
    category_ids: tuple[int, ...] | None = None,
) -> DetectionResult:
    """Measures detections against the truth.

    Args:
        truths: of each image.
        detections: of the same images, in pixels of the original; of each the 100 best of a class count.
        class_names: of the labels.
        category_ids: see `DetectionResult`.

    Raises:
        ValueError: there are no boxes to find, the lists differ in length, or a label is out of range.
        UserError: faster-coco-eval is not installed.
    """
    require_faster_coco_eval()
    from faster_coco_eval import COCO, COCOeval_faster

    _check(truths, detections, len(class_names))
    truth = COCO(_ground_truth(truths, class_names))
    evaluation = COCOeval_faster(truth, truth.loadRes(_results(detections)), "bbox")
    evaluation.params.maxDets = [MAX_DETECTIONS]
    evaluation.params.areaRng = [list(area) for area in _AREAS.values()]
    evaluation.params.areaRngLbl = list(_AREAS)
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0]  # [10 thresholds, 101 recalls, classes, 4 areas]; -1: no box
    recall = evaluation.eval["recall"][:, :, 0, 0]  # [10, classes]
    by_size = {name: _mean(precision[..., index]) for index, name in enumerate(_AREAS)}
    whole = precision[..., 0]
    ap, ap50, ap75, recall_mean = by_size["all"], _mean(whole[0]), _mean(whole[5]), _mean(recall)
    assert ap is not None  # there are boxes
    assert ap50 is not None
    assert ap75 is not None
    assert recall_mean is not None
    labels = np.concatenate([truth.labels[~truth.crowd] for truth in truths])
    counts = np.bincount(labels, minlength=len(class_names))
    return DetectionResult(
        count=len(truths),
        boxes=len(labels),
        ap=ap,
        ap50=ap50,
        ap75=ap75,
        ap_small=by_size["small"],
        ap_medium=by_size["medium"],
        ap_large=by_size["large"],
        recall=recall_mean,
        class_boxes=tuple(int(count) for count in counts),
        class_ap=tuple(_mean(whole[:, :, index]) for index in range(len(class_names))),
        class_ap50=tuple(_mean(whole[0, :, index]) for index in range(len(class_names))),
        category_ids=category_ids,
    )


def _check(truths: Sequence[Truth], detections: Sequence[Detections], classes: int) -> None:
    if len(truths) != len(detections):
        raise ValueError(f"There are detections of {len(detections)} images, but {len(truths)} images.")
    if not any((~truth.crowd).any() for truth in truths):
        raise ValueError("There is nothing to measure: none of the images has a box.")
    of_images = [("box", [truth.labels for truth in truths]), ("detection", [found.labels for found in detections])]
    for name, images in of_images:
        for index, labels in enumerate(images):
            if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
                raise ValueError(
                    f"The labels of image {index} (of each {name}) run from {labels.min()} to {labels.max()}, but "
                    f"there are {classes} classes, from 0."
                )


def _ground_truth(truths: Sequence[Truth], class_names: Sequence[str]) -> dict[str, Any]:
    """COCO's JSON. Its ids are places in the lists, from 1: what a dataset numbers them is of no interest here."""
    annotations: list[dict[str, Any]] = []
    for image, truth in enumerate(truths, start=1):
        for box, label, crowd, area in zip(truth.boxes, truth.labels, truth.crowd, truth.areas, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(label) + 1,
                    "bbox": _xywh(box),
                    "area": float(area),
                    "iscrowd": int(crowd),
                }
            )
    return {
        "images": [
            {"id": image, "height": int(truth.size[0]), "width": int(truth.size[1])}
            for image, truth in enumerate(truths, start=1)
        ],
        "categories": [{"id": index, "name": name} for index, name in enumerate(class_names, start=1)],
        "annotations": annotations,
    }


def _results(detections: Sequence[Detections]) -> list[dict[str, Any]]:
    return [
        {"image_id": image, "category_id": int(label) + 1, "bbox": _xywh(box), "score": float(score)}
        for image, found in enumerate(detections, start=1)
        for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True)
    ]


def _xywh(box: np.ndarray) -> list[float]:
    left, top, right, bottom = (float(corner) for corner in box)
    return [left, top, right - left, bottom - top]


def _mean(values: np.ndarray) -> float | None:
    """Of those that are defined."""
    values = values[values > -1]
    return float(values.mean()) if len(values) else None

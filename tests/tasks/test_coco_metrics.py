"""Average precision on examples whose value follows from COCO's rules by hand."""

import builtins
import dataclasses
import sys
from typing import Any

import numpy as np
import pytest

from mobiatt_tf.errors import UserError
from mobiatt_tf.tasks.coco_metrics import DetectionResult, Truth, average_precision
from mobiatt_tf.tasks.decoding import Detections

pytest.importorskip("faster_coco_eval")

# With one of two boxes found, precision counts at the recalls 0, .01, ... .5 of 0, .01, ... 1.
HALF = 51 / 101
A, B, C = (10.0, 10.0, 50.0, 50.0), (100.0, 100.0, 140.0, 160.0), (300.0, 300.0, 360.0, 340.0)


def truth(*given: tuple[tuple[float, ...], int], crowd: int = 0, area: float | None = None) -> Truth:
    """Of (box, label); the last `crowd` of them are crowds."""
    boxes = np.array([box for box, _ in given], np.float32).reshape(-1, 4)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) if area is None else np.full(len(given), area, np.float32)
    labels = np.array([label for _, label in given], np.int32)
    return Truth(boxes, labels, np.arange(len(given)) >= len(given) - crowd, areas, (400, 400))


def found(*given: tuple[tuple[float, ...], int, float]) -> Detections:
    """Of (box, label, score)."""
    return Detections(
        np.array([box for box, _, _ in given], np.float32).reshape(-1, 4),
        np.array([score for _, _, score in given], np.float32),
        np.array([label for _, label, _ in given], np.int32),
    )


def measure(truths: list[Truth], detections: list[Detections], classes: int = 1) -> DetectionResult:
    return average_precision(truths, detections, [f"class {index}" for index in range(classes)])


def test_all_right() -> None:
    result = measure([truth((A, 0), (B, 1)), truth((C, 1))], [found((A, 0, 0.9), (B, 1, 0.3)), found((C, 1, 0.6))], 2)
    assert (result.ap, result.ap50, result.ap75, result.recall) == (1, 1, 1, 1)
    assert (result.count, result.boxes, result.class_boxes) == (2, 3, (1, 2))


def test_one_right_one_wrong_one_missed() -> None:
    truths = [truth((A, 0), (B, 0))]
    assert measure(truths, [found((A, 0, 0.9), (C, 0, 0.8))]).ap == pytest.approx(HALF)
    assert measure(truths, [found((A, 0, 0.8), (C, 0, 0.9))]).ap == pytest.approx(HALF / 2)  # half are right so far
    assert measure(truths, [found((A, 0, 0.9), (A, 0, 0.8))]).ap == pytest.approx(HALF)  # twice: the second is wrong
    assert measure(truths, [found((A, 0, 0.9))]).recall == pytest.approx(0.5)


def test_nothing_found() -> None:
    result = measure([truth((A, 0)), truth()], [found(), found()])
    assert (result.ap, result.ap50, result.recall, result.count) == (0, 0, 0, 2)


def test_thresholds_of_the_overlap() -> None:
    """Four fifths of a box: right at .5, .55, ... .8 (7 of 10), so AP75 is 1 and AP .7."""
    moved = (10.0, 10.0, 50.0, 42.01)
    result = measure([truth((A, 0))], [found((moved, 0, 0.9))])
    assert (result.ap50, result.ap75) == (1, 1)
    assert result.ap == pytest.approx(0.7)


def test_detections_are_ranked_over_all_images() -> None:
    truths = [truth((A, 0)), truth((A, 0))]
    assert measure(truths, [found((A, 0, 0.9)), found((C, 0, 0.8), (A, 0, 0.7))]).ap == pytest.approx(
        (51 * 1 + 50 * 2 / 3) / 101
    )


def test_crowds_are_neither_missed_nor_wrong() -> None:
    truths = [truth((A, 0), ((200, 200, 400, 400), 0), crowd=1)]
    in_crowd = [((220 + 30 * i, 220, 240 + 30 * i, 240), 0, 0.95) for i in range(3)]
    assert measure(truths, [found((A, 0, 0.9), *in_crowd)]).ap == 1
    assert measure(truths, [found((A, 0, 0.9))]).boxes == 1


def test_sizes_go_by_the_area_that_the_truth_states() -> None:
    small, medium, large = (0, 0, 20, 20), (100, 100, 150, 150), (200, 200, 320, 320)
    truths = [truth((small, 0), (medium, 0), (large, 0))]
    result = measure(truths, [found((small, 0, 0.9), (large, 0, 0.8))])
    assert (result.ap_small, result.ap_medium, result.ap_large) == (1, 0, 1)
    result = measure([truth((large, 0), area=500.0)], [found((large, 0, 0.8))])  # a thin thing in a large box
    assert (result.ap_small, result.ap_medium, result.ap_large) == (1, None, None)


def test_classes_without_boxes_have_no_part_in_the_mean() -> None:
    result = measure([truth((A, 1), (B, 3))], [found((A, 1, 0.9), (C, 0, 0.9), (C, 2, 0.5))], 5)
    assert result.class_ap == (None, 1, None, 0, None)
    assert result.ap == pytest.approx(0.5)
    content = result.to_json(["a", "b", "c", "d", "e"])
    assert content["per_class"]["b"] == {"boxes": 1, "ap": 1, "ap50": 1}
    assert content["per_class"]["c"] == {"boxes": 0, "ap": None, "ap50": None}
    known = dataclasses.replace(result, category_ids=(1, 2, 3, 13, 90)).to_json(["a", "b", "c", "d", "e"])
    assert [entry["category_id"] for entry in known["per_class"].values()] == [1, 2, 3, 13, 90]
    assert content["images"] == 1
    assert set(result.to_line()) <= set(content)
    assert result.summary() == "AP 50.00%, AP50 50.00%"


def test_a_hundred_detections_of_an_image_count() -> None:
    wrong = [((300.0, 300.0, 310.0 + i, 310.0), 0, 0.9) for i in range(100)]
    assert measure([truth((A, 0))], [found(*wrong, (A, 0, 0.5))]).ap == 0
    assert measure([truth((A, 0))], [found(*wrong[1:], (A, 0, 0.5))]).ap > 0


@pytest.mark.parametrize(
    ("truths", "detections", "message"),
    [
        ([truth()], [found()], "none of the images has a box"),
        ([truth((A, 0), crowd=1)], [found()], "none of the images has a box"),
        ([truth((A, 0))], [], "0 images, but 1 images"),
        ([truth((A, 1))], [found()], "run from 1 to 1, but there are 1 classes"),
        ([truth((A, 0))], [found((A, 1, 0.5))], "run from 1 to 1, but there are 1 classes"),
    ],
)
def test_what_cannot_be_measured_is_refused(truths: list[Truth], detections: list[Detections], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(truths, detections)


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any) -> Any:
        if name.startswith("faster_coco_eval"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.delitem(sys.modules, "faster_coco_eval", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match="pip install faster-coco-eval"):
        measure([truth((A, 0))], [found()])

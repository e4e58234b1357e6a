"""The decoder against a plain loop and against TensorFlow, and its rules one by one."""

import numpy as np
import pytest
import tensorflow as tf

from mobiatt_tf.tasks import anchors, decoding
from mobiatt_tf.tasks.decoding import Detections, decode_detections

SIZE, STRIDE, CLASSES = (32, 48), 4, 3
ANCHORS = anchors.anchors(SIZE, STRIDE)


def random_outputs(seed: int, *, ties: bool = False, mean: float = -2.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    boxes = generator.normal(0, 0.4, (len(ANCHORS), 4)).astype(np.float32)
    logits = generator.normal(mean, 2, (len(ANCHORS), CLASSES)).astype(np.float32)
    return boxes, np.round(logits) if ties else logits


def of_boxes(*given: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Outputs that hold (x1, y1, x2, y2, label, logit) at an anchor each, and nothing else."""
    boxes = np.zeros((len(ANCHORS), 4), np.float32)
    logits = np.full((len(ANCHORS), CLASSES), -20, np.float32)
    for place, (*box, label, logit) in enumerate(given):
        boxes[place] = anchors.encode(np.array(box), ANCHORS[place])
        logits[place, int(label)] = logit
    return boxes, logits


def plain(boxes: np.ndarray, logits: np.ndarray, candidates: int, limit: int, threshold: float) -> Detections:
    """The same in loops over levels, anchors and classes."""
    found, start = [], 0
    for count in anchors.level_counts(SIZE, STRIDE):
        pairs = [(-float(logits[a, c]), a, c) for a in range(start, start + count) for c in range(CLASSES)]
        found += sorted(pairs)[:candidates]
        start += count
    corners = np.clip(anchors.decode(boxes, ANCHORS), 0, np.array([SIZE[1], SIZE[0], SIZE[1], SIZE[0]], np.float32))
    kept: list[tuple[float, int, int]] = []
    for logit, anchor, label in sorted(found):
        box = corners[anchor]
        if 1 / (1 + np.exp(logit)) <= threshold or box[0] >= box[2] or box[1] >= box[3] or len(kept) == limit:
            continue
        others = [corners[other] for _, other, own in kept if own == label]
        if all(decoding.overlap(box, other[None])[0] <= 0.5 for other in others):
            kept.append((logit, anchor, label))
    return Detections(
        np.array([corners[anchor] for _, anchor, _ in kept], np.float32).reshape(-1, 4),
        np.array([1 / (1 + np.exp(logit)) for logit, _, _ in kept], np.float32),
        np.array([label for _, _, label in kept], np.int32),
    )


def assert_same(found: Detections, expected: Detections) -> None:
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=1e-5, atol=1e-4)


CASES = [
    {"seed": 0},
    {"seed": 1, "ties": True},
    {"seed": 2, "mean": -40.0},  # nothing is found
    {"seed": 3, "mean": 3.0, "ties": True},
    {"seed": 4, "mean": 30.0},
]


@pytest.mark.parametrize("candidates", [5, 1000])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numpy_is_the_plain_loop(case: dict, candidates: int) -> None:
    boxes, logits = random_outputs(**case)
    found = decode_detections(boxes, logits, SIZE, candidates=candidates, max_detections=40)
    assert_same(found, plain(boxes, logits, candidates, 40, 0.05))
    assert found.boxes.dtype == found.scores.dtype == np.float32
    assert found.labels.dtype == np.int32
    assert (np.diff(found.scores) <= 0).all()


@pytest.mark.parametrize("candidates", [5, 1000])
def test_tensorflow_is_numpy(candidates: int) -> None:
    outputs = [random_outputs(**case) for case in CASES]
    boxes, logits = (np.stack(values) for values in zip(*outputs, strict=True))
    select = tf.function(lambda boxes, logits: decoding.candidates(boxes, logits, SIZE, candidates))
    selected = [tensor.numpy() for tensor in select(tf.constant(boxes), tf.constant(logits))]
    assert (
        selected[0].shape[1]
        == selected[1].shape[1]
        == sum(min(candidates, count * CLASSES) for count in anchors.level_counts(SIZE, STRIDE))
    )
    for image, (own_boxes, own_logits) in enumerate(outputs):
        found = decoding.suppress(*(values[image] for values in selected), SIZE)
        assert_same(found, decode_detections(own_boxes, own_logits, SIZE, candidates=candidates))
    assert not len(decode_detections(*outputs[2], SIZE).boxes)


def test_nothing_found() -> None:
    found = decode_detections(*of_boxes(), SIZE)
    assert found.boxes.shape == (0, 4)
    assert found.scores.shape == found.labels.shape == (0,)


def test_suppression_is_within_a_class_and_the_best_one_stays() -> None:
    box, near, far = (4.0, 4.0, 24.0, 24.0), (5.0, 4.0, 24.0, 24.0), (30.0, 4.0, 46.0, 24.0)
    found = decode_detections(*of_boxes((*box, 0, 1.0), (*near, 0, 2.0), (*near, 1, 0.5), (*far, 0, 0.2)), SIZE)
    assert found.labels.tolist() == [0, 1, 0]
    np.testing.assert_allclose(found.boxes, [near, near, far], atol=1e-3)
    np.testing.assert_allclose(found.scores, 1 / (1 + np.exp([-2, -0.5, -0.2])), rtol=1e-6)


def test_boxes_that_overlap_by_less_than_the_threshold_stay() -> None:
    given = of_boxes((0, 0, 20, 20, 0, 2.0), (10, 0, 30, 20, 0, 1.0))  # a third of their union
    assert len(decode_detections(*given, SIZE).boxes) == 2
    assert len(decode_detections(*given, SIZE, iou_threshold=0.3).boxes) == 1


def test_boxes_are_clipped_and_those_outside_left_out() -> None:
    found = decode_detections(*of_boxes((-10, -5, 60, 20, 0, 2.0), (50, 2, 60, 20, 1, 2.0)), SIZE)
    np.testing.assert_allclose(found.boxes, [[0, 0, 48, 20]], atol=1e-3)
    found = decode_detections(*of_boxes((2, 2, 60, 60, 0, 2.0)), SIZE, clip_to=(24.0, 30.5))
    np.testing.assert_allclose(found.boxes, [[2, 2, 30.5, 24]], atol=1e-3)


def test_scores_must_be_above_the_threshold() -> None:
    given = of_boxes((2, 2, 20, 20, 0, 0.0), (25, 2, 40, 20, 0, 1.0))
    assert len(decode_detections(*given, SIZE, score_threshold=0.5).boxes) == 1
    assert len(decode_detections(*given, SIZE, score_threshold=0.49).boxes) == 2


def test_the_best_are_kept_of_more_than_there_may_be() -> None:
    boxes, logits = random_outputs(5, mean=0.0)
    many, few = (decode_detections(boxes, logits, SIZE, max_detections=limit) for limit in (50, 7))
    assert len(many.scores) == 50
    assert_same(few, Detections(*(values[:7] for values in many)))


@pytest.mark.parametrize("bad", [np.nan, "shape", "count"])
def test_outputs_of_no_detector_are_refused(bad: float | str) -> None:
    boxes, logits = random_outputs(0)
    if bad == "shape":
        boxes = boxes[:-1]
    elif bad == "count":
        boxes, logits = boxes[:-9], logits[:-9]
    else:
        logits[3, 1] = bad
    with pytest.raises(ValueError, match=r"must be|are not those of a detector|not finite"):
        decode_detections(boxes, logits, SIZE)


def test_detections_in_pixels_of_the_original() -> None:
    found = Detections(np.array([[1, 2, 3, 4]], np.float32), np.ones(1, np.float32), np.zeros(1, np.int32))
    assert found.scaled(1 / 0.5).boxes.tolist() == [[2, 4, 6, 8]]


def test_every_detection_has_a_score_above_0() -> None:
    """Else processes could not tell it from the rows without one in the table that they add up."""
    logits = np.array([-200.0, -80.0, 200.0], np.float32)
    boxes = np.array([[0, 0, 5, 5], [10, 0, 15, 5], [20, 0, 25, 5]], np.float32)
    found = decoding.suppress(boxes, logits, np.zeros(3, np.int32), (30, 30), score_threshold=0.0)
    assert len(found.scores) == 3
    assert (found.scores > 0).all()

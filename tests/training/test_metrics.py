"""The numbers of an evaluation against definitions, examples by hand and each other."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mobiatt_tf.training import metrics


def assert_same(first: Any, second: Any, tolerance: float) -> None:
    """Equal JSON values but for rounding of floats."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert_same(value, second[key], tolerance)
    elif isinstance(first, list):
        assert len(first) == len(second)
        for pair in zip(first, second, strict=True):
            assert_same(*pair, tolerance)
    elif isinstance(first, float):
        assert first == pytest.approx(second, abs=tolerance)
    else:
        assert first == second


def test_calibration_error_of_an_example_by_hand() -> None:
    # Two classes, probabilities .9 (right), .9 (wrong), .6 (right), .7 (right); bins of 1/15: .9 stands in (13/15,
    # 14/15], .7 in (10/15, 11/15], .6 on the upper edge of (8/15, 9/15].
    logits = np.log([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.3, 0.7]])
    labels = np.array([0, 0, 0, 1])
    found = metrics.calibration(logits, labels)
    by_bins = 2 / 4 * abs(1 / 2 - 0.9) + 1 / 4 * (1 - 0.6) + 1 / 4 * (1 - 0.7)  # .375
    assert found.reliability.expected_error == pytest.approx(by_bins, abs=1e-12)
    assert np.flatnonzero(found.reliability.counts).tolist() in ([8, 10, 13], [9, 10, 13])  # .6 is an edge
    assert found.mean_confidence == pytest.approx((0.9 + 0.9 + 0.6 + 0.7) / 4)
    assert found.brier_score == pytest.approx((2 * 0.1**2 + 2 * 0.9**2 + 2 * 0.4**2 + 2 * 0.3**2) / 4)


def test_bins_are_open_below_and_closed_above() -> None:
    found = metrics.reliability(np.array([0.0, 0.25, 0.26, 0.5, 1.0]), np.array([0, 1, 1, 0, 1]), bins=4)
    assert found.counts.tolist() == [2, 2, 0, 1]
    assert found.accuracy.tolist() == [0.5, 0.5, 0, 1]
    assert found.confidence == pytest.approx([0.125, 0.38, 0, 1])


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=8))
def test_confidence_that_is_the_share_of_right_answers_has_no_error(groups: list[tuple[int, int]]) -> None:
    """Of each group of images all have the confidence right / size: 0 after Guo's definition, whatever the bins."""
    confidence, right = [], []
    for size, wanted in groups:
        correct = min(wanted, size)
        confidence += [correct / size] * size
        right += [True] * correct + [False] * (size - correct)
    found = metrics.reliability(np.array(confidence), np.array(right))
    assert found.expected_error == pytest.approx(0, abs=1e-12)
    assert found.counts.sum() == len(right)


@st.composite
def classified(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, classes] that have ties, and labels [N]."""
    count, classes = draw(st.integers(1, 30)), draw(st.integers(2, 8))
    steps = draw(hnp.arrays(np.int8, (count, classes), elements=st.integers(-40, 40)))
    labels = draw(hnp.arrays(np.int32, count, elements=st.integers(0, classes - 1)))
    return steps.astype(np.float32) / 8, labels


@given(classified(), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_order_and_an_offset_of_the_logits_change_nothing(example: tuple[np.ndarray, np.ndarray], random: Any) -> None:
    logits, labels = example
    order = np.array(random.sample(range(len(labels)), len(labels)))
    offsets = np.array([[random.randint(-64, 64)] for _ in labels], np.float32)  # exact in float32 beside eighths
    found = metrics.evaluation(logits, labels), metrics.calibration(logits, labels)
    moved = logits[order] + offsets
    again = metrics.evaluation(moved, labels[order]), metrics.calibration(moved, labels[order])
    names = [str(index) for index in range(logits.shape[1])]
    assert_same(metrics.to_json(*found, names), metrics.to_json(*again, names), 1e-9)


@given(classified())
@settings(max_examples=50)
def test_numbers_against_sorting_and_counting(example: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = example
    classes = logits.shape[1]
    found = metrics.evaluation(logits, labels)
    order = np.argsort(-logits, axis=1, kind="stable")  # equal logits: the lower number first
    assert found.top1 == pytest.approx(np.mean(order[:, 0] == labels))
    if classes > 5:
        assert found.top5 == pytest.approx(np.mean((order[:, :5] == labels[:, None]).any(axis=1)))
    else:
        assert found.top5 is None
    expected = np.zeros((classes, classes), int)
    for label, prediction in zip(labels, order[:, 0], strict=True):
        expected[label, prediction] += 1
    assert found.confusion.tolist() == expected.tolist()
    loss = np.log(np.exp(logits.astype(np.float64)).sum(1)) - logits[np.arange(len(labels)), labels]
    assert found.loss == pytest.approx(loss.mean())
    calibrated = metrics.calibration(logits, labels)
    assert 0 <= calibrated.reliability.expected_error <= 1
    assert 0 <= calibrated.brier_score <= 2
    # The bins together: mean confidence, and top-1.
    bins = calibrated.reliability
    assert bins.counts @ bins.confidence / found.count == pytest.approx(calibrated.mean_confidence)
    assert bins.counts @ bins.accuracy / found.count == pytest.approx(found.top1)
    assert bins.expected_error >= abs(calibrated.mean_confidence - found.top1) - 1e-12


def test_recall_and_precision_of_each_class() -> None:
    logits = np.eye(3)[[0, 0, 1, 0]]  # predictions 0, 0, 1, 0
    labels = np.array([0, 1, 1, 0])  # nothing of class 2, which is never predicted either
    found = metrics.to_json(metrics.evaluation(logits, labels), metrics.calibration(logits, labels), ["a", "b", "c"])
    assert found["per_class"] == {
        "a": {"images": 2, "correct": 2, "predicted": 3, "recall": 1.0, "precision": 2 / 3},
        "b": {"images": 2, "correct": 1, "predicted": 1, "recall": 0.5, "precision": 1.0},
        "c": {"images": 0, "correct": 0, "predicted": 0, "recall": None, "precision": None},
    }


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((0, 3)), np.zeros(0, int), "no images"),
        (np.zeros((2, 3)), np.zeros(3, int), "must be"),
        (np.zeros((2, 3)), np.array([0, 3]), "Labels must be from 0 to 2"),
        (np.array([[0.0, 1.0], [np.nan, 0.0]]), np.array([0, 1]), "logits of image 1 are not finite"),
    ],
)
def test_what_cannot_be_measured(logits: np.ndarray, labels: np.ndarray, message: str) -> None:
    for measure in (metrics.evaluation, metrics.calibration):
        with pytest.raises(ValueError, match=message):
            measure(logits, labels)

"""Which anchor learns which box: against keras_hub where it agrees, and the rule itself where it does not."""

import numpy as np
import pytest
import tensorflow as tf

from mobiatt_tf.tasks import matching
from mobiatt_tf.tasks.anchors import anchors, encode
from mobiatt_tf.tasks.matching import BACKGROUND, IGNORED, anchor_targets, match

SIZE = (64, 96)


def padded(*images: list[tuple[float, ...]], rows: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [B, rows, 4] and labels [B, rows] of (x1, y1, x2, y2, label)."""
    boxes, labels = np.zeros((len(images), rows, 4), np.float32), np.full((len(images), rows), -1, np.int32)
    for image, given in enumerate(images):
        for row, (*box, label) in enumerate(given):
            boxes[image, row], labels[image, row] = box, int(label)
    return boxes, labels


def test_targets_are_those_of_keras_hub() -> None:
    """Of boxes that anchors overlap by half: there nothing has to be forced."""
    keras_hub = pytest.importorskip("keras_hub")
    from keras_hub.src.models.retinanet.retinanet_label_encoder import RetinaNetLabelEncoder

    references = anchors(SIZE, 4)
    generator = np.random.default_rng(0)
    chosen = references[generator.choice(len(references), 40, replace=False)]
    chosen = chosen[(chosen[:, :2] >= 0).all(1) & (chosen[:, 2] <= SIZE[1]) & (chosen[:, 3] <= SIZE[0])][:6]
    assert len(chosen) >= 4
    moved = chosen + generator.uniform(-1, 1, chosen.shape).astype(np.float32)
    boxes, labels = padded([(*box, label) for label, box in enumerate(moved)])

    anchor_generator = keras_hub.layers.AnchorGenerator(
        "xyxy", min_level=2, max_level=6, num_scales=3, aspect_ratios=[0.5, 1.0, 2.0], anchor_size=4
    )
    layer = RetinaNetLabelEncoder(anchor_generator, "xyxy", encoding_format="center_xywh")
    their_deltas, their_classes = layer(np.zeros((1, *SIZE, 3), np.float32), boxes, labels.astype(np.float32))

    deltas, classes = anchor_targets(tf.constant(boxes), tf.constant(labels), tf.constant(references))
    np.testing.assert_array_equal(classes, their_classes)
    learns = classes.numpy() >= 0
    assert learns.sum() > 10
    np.testing.assert_allclose(deltas.numpy()[learns], np.asarray(their_deltas)[learns], rtol=1e-4, atol=1e-5)


def test_offsets_are_those_of_numpy() -> None:
    boxes, labels = padded([(10, 10, 40, 30, 2), (50, 5, 90, 60, 0)])
    references = anchors(SIZE, 4)
    deltas, classes = anchor_targets(tf.constant(boxes), tf.constant(labels), tf.constant(references))
    for row, label in enumerate((2, 0)):
        own = classes.numpy()[0] == label
        np.testing.assert_allclose(deltas.numpy()[0][own], encode(boxes[0, row], references[own]), rtol=1e-4, atol=1e-5)


def test_thresholds_and_the_anchor_that_is_forced() -> None:
    box = [[0, 0, 10, 10]]
    by_overlap = np.array([[0, 0, 10, 5], [0, 0, 10, 4.5], [0, 0, 10, 4], [0, 0, 10, 3.9], [20, 20, 30, 30]])

    def classes(references: np.ndarray) -> list[int]:
        boxes, labels = tf.constant(box, tf.float32), tf.constant([7])
        return match(boxes, labels, tf.constant(references, tf.float32))[1].numpy().tolist()

    assert classes(by_overlap) == [7, IGNORED, IGNORED, BACKGROUND, BACKGROUND]
    assert classes(by_overlap[1:]) == [7, IGNORED, BACKGROUND, BACKGROUND]  # the best is forced
    assert classes(by_overlap[[3, 4, 3]]) == [7, BACKGROUND, 7]  # both of equal overlap
    assert classes(by_overlap[4:]) == [BACKGROUND]  # none overlaps it


def test_an_anchor_that_is_the_best_of_several_boxes_learns_the_last_one() -> None:
    boxes = tf.constant([[0, 0, 10, 4], [0, 0, 10, 3]], tf.float32)
    found, classes = match(boxes, tf.constant([5, 6]), tf.constant([[0, 0, 10, 10]], tf.float32))
    assert classes.numpy().tolist() == [6]
    np.testing.assert_array_equal(found, boxes[1:])


def test_every_box_has_an_anchor_however_small_or_odd_it_is() -> None:
    given = [(3, 3, 4, 4, 0), (0, 30, 96, 33, 1), (60, 0, 62, 64, 2), (40, 40, 55, 55, 3)]
    boxes, labels = padded(given)
    _, classes = anchor_targets(tf.constant(boxes), tf.constant(labels), tf.constant(anchors(SIZE, 4)))
    assert set(classes.numpy().ravel().tolist()) >= {0, 1, 2, 3}


def test_padding_and_boxes_without_area_take_no_anchor() -> None:
    boxes, labels = padded([], [(5, 5, 5, 5, 1)], [(5, 5, 30, 30, 1)])
    boxes[0] = 20, 20, 40, 40  # what stands in rows without a box does not matter
    deltas, classes = anchor_targets(tf.constant(boxes), tf.constant(labels), tf.constant(anchors(SIZE, 4)))
    assert (classes.numpy()[:2] == BACKGROUND).all()
    assert (classes.numpy()[2] == 1).any()
    assert np.isfinite(deltas.numpy()).all()


def test_no_rows_at_all() -> None:
    boxes, labels = padded([], [], rows=0)
    deltas, classes = anchor_targets(tf.constant(boxes), tf.constant(labels), tf.constant(anchors(SIZE, 4)))
    assert (classes.numpy() == BACKGROUND).all()
    assert np.isfinite(deltas.numpy()).all()


def test_the_place_of_a_row_changes_nothing() -> None:
    """Boxes that a crop has dropped leave gaps between the others."""
    given = [(10, 10, 40, 30, 2), (50, 5, 90, 60, 0)]
    boxes, labels = padded(given)
    order = [2, 0, 3, 4, 1, 5]
    references = tf.constant(anchors(SIZE, 4))
    first = anchor_targets(tf.constant(boxes), tf.constant(labels), references)
    second = anchor_targets(tf.constant(boxes[:, order]), tf.constant(labels[:, order]), references)
    np.testing.assert_array_equal(first[1], second[1])
    learns = first[1].numpy() >= 0
    np.testing.assert_array_equal(first[0].numpy()[learns], second[0].numpy()[learns])


def test_blocks_of_boxes_find_what_all_of_them_together_find(monkeypatch: pytest.MonkeyPatch) -> None:
    """150 boxes in blocks of 64, 7 and 256; some twice, so that there are ties between blocks, and some rows empty."""
    generator = np.random.default_rng(0)
    corners = generator.integers(0, 50, (75, 2))
    boxes = np.concatenate([corners, corners + generator.integers(1, 40, (75, 2))], axis=1).astype(np.float32)
    boxes = np.concatenate([boxes, boxes[generator.permutation(75)]])
    labels = np.where(generator.uniform(size=150) < 0.2, -1, generator.integers(0, 5, 150)).astype(np.int32)
    references = tf.constant(anchors(SIZE, 4))
    found = []
    for block in (256, 64, 7):
        monkeypatch.setattr(matching, "BLOCK", block)
        found.append([each.numpy() for each in match(tf.constant(boxes), tf.constant(labels), references)])
    assert (found[0][1] >= 0).sum() > 100
    for matched, classes in found[1:]:
        np.testing.assert_array_equal(classes, found[0][1])
        learns = classes >= 0
        np.testing.assert_array_equal(matched[learns], found[0][0][learns])


def test_memory_does_not_grow_with_the_boxes_of_an_image() -> None:
    """No tensor of the traced function has an axis for all 1,000 boxes beside one for the anchors."""
    references = tf.constant(anchors(SIZE, 4))
    function = tf.function(lambda boxes, labels: match(boxes, labels, references))
    boxes = np.tile(np.array([[0, 0, 30, 30]], np.float32), (1000, 1))
    graph = function.get_concrete_function(tf.constant(boxes), tf.zeros(1000, tf.int32)).graph
    graphs = [graph, *(each.graph for each in graph._functions.values())] if hasattr(graph, "_functions") else [graph]
    sizes = [
        int(np.prod(tensor.shape))
        for each in graphs
        for operation in each.get_operations()
        for tensor in operation.outputs
        if tensor.shape.is_fully_defined()
    ]
    assert 60 < max(sizes) / len(references) <= matching.BLOCK  # 16 blocks of 63

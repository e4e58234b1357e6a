"""Anchors against keras_hub's, and offsets against Keras' own formulas."""

import math

import keras
import numpy as np
import pytest

from mobiatt_tf.tasks import anchors

SIZES = [
    ((800, 1344), 8),
    ((799, 1333), 8),
    ((64, 64), 4),
    ((96, 128), 4),
    ((33, 70), 2),
    ((512, 320), 16),
    ((1, 1), 2),
]


@pytest.mark.parametrize(("image_size", "stride"), SIZES)
def test_anchors_are_those_of_keras_hub(image_size: tuple[int, int], stride: int) -> None:
    keras_hub = pytest.importorskip("keras_hub")
    level = int(math.log2(stride))
    generator = keras_hub.layers.AnchorGenerator(
        "xyxy", min_level=level, max_level=level + 4, num_scales=3, aspect_ratios=[0.5, 1.0, 2.0], anchor_size=4
    )
    theirs = generator(np.zeros((1, *image_size, 3), np.float32))
    expected = np.concatenate([keras.ops.convert_to_numpy(boxes) for boxes in theirs.values()])
    found = anchors.anchors(image_size, stride)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    assert [len(boxes) for boxes in theirs.values()] == anchors.level_counts(image_size, stride)


@pytest.mark.parametrize(("image_size", "stride"), SIZES)
def test_stride_is_found_from_the_number_of_boxes(image_size: tuple[int, int], stride: int) -> None:
    assert anchors.first_stride(image_size, len(anchors.anchors(image_size, stride))) == stride


def test_another_number_of_boxes_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"1234 boxes for an image of 64 x 64 .* 3069 \(stride 4\)"):
        anchors.first_stride((64, 64), 1234)


@pytest.mark.parametrize("arguments", [((0, 8),), ((8, 8), 3), ((8, 8), 8, 0), ((8,),)])
def test_wrong_arguments_are_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="must be"):
        anchors.anchors(*arguments)


def test_the_shared_array_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        anchors.anchors((64, 64))[0] = 0


def random_boxes(count: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    corners = generator.uniform(0, 100, (count, 2, 2))
    return np.concatenate([corners.min(1), corners.max(1) + 1], axis=1).astype(np.float32)


def test_offsets_are_those_of_keras() -> None:
    boxes, references = random_boxes(50, 0), random_boxes(50, 1)
    expected = keras.utils.bounding_boxes.encode_box_to_deltas(
        references, boxes, "xyxy", "xyxy", encoding_format="center_xywh"
    )
    found = anchors.encode(boxes, references)
    np.testing.assert_allclose(found, keras.ops.convert_to_numpy(expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(anchors.decode(found, references), boxes, rtol=1e-4, atol=1e-3)


def test_huge_offsets_and_boxes_without_area_stay_finite() -> None:
    references = random_boxes(3, 2)
    assert np.isfinite(anchors.decode(np.full((3, 4), 1e4, np.float32), references)).all()
    assert np.isfinite(anchors.encode(np.zeros((3, 4), np.float32), references)).all()

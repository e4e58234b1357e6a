"""Boxes stay on what they were drawn around, and who sees what when."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from mobiatt_tf import data
from mobiatt_tf.data import detection_pipeline as pipeline
from mobiatt_tf.data.dense import DetectionSplit
from tests.data import dense_samples as samples
from tests.data.dense_samples import assert_differ, assert_same, colours, is_inside

JITTER = {"scale": (0.5, 2.0), "photometric": True}


def run(split: DetectionSplit, **arguments) -> list:  # type: ignore[no-untyped-def]
    return samples.run(pipeline.train_batches, split, **arguments)


@pytest.fixture
def split(tmp_path: Path) -> DetectionSplit:
    return samples.detection_split(tmp_path)


def visible_box(image: np.ndarray, channel: int) -> np.ndarray | None:
    """Where a canvas shows the rectangle of a channel, xyxy; None where it does not."""
    rows, columns = np.nonzero((colours(image)[..., channel] > 127) & is_inside(image))
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) if len(rows) else None


def assert_boxes_fit(images: np.ndarray, targets: dict[str, np.ndarray]) -> tuple[int, int]:
    """Each kept box is, to a pixel, where its rectangle is seen; returns how many were kept and how many dropped."""
    for image, boxes, labels in zip(images, targets["boxes"], targets["labels"], strict=True):
        for box, label in zip(boxes, labels, strict=True):
            if label >= 0:
                np.testing.assert_allclose(visible_box(image, label), box, atol=1)
            else:
                np.testing.assert_array_equal(box, 0)
    kept = int((targets["labels"] >= 0).sum())
    return kept, targets["labels"].size - kept


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_boxes_stay_on_their_rectangles(split, flip):
    for images, targets in run(split, flip=flip, image_size=(50, 70)):
        kept, dropped = assert_boxes_fit(images, targets)
        assert (kept, dropped) == (12, 0)


@pytest.mark.parametrize("scale", [(0.5, 2.0), (0.3, 0.6), (2.0, 3.0)])
def test_boxes_stay_on_their_rectangles_when_scale_and_place_are_random(split, scale):
    counts = np.zeros(2, int)
    for epoch in range(4):
        for images, targets in run(split, scale=scale, epoch=epoch):
            counts += assert_boxes_fit(images, targets)
    assert counts.sum() == 4 * 8 * 3
    assert counts[0] >= 20
    assert (counts[1] > 0) == (scale[1] > 1)


def test_boxes_of_which_little_is_left_are_dropped():
    """Cut at the left edge of the canvas: 1/4 stays and is kept, less is not; thinner than a pixel is not."""
    boxes = np.array([[0, 0, 8, 4], [0, 0, 7, 4], [4, 4, 10, 4.5], [8, 0, 8, 6], [20, 2, 30, 8], [-9, 1, 3, 3]])
    cut, kept = pipeline._place_boxes(
        tf.constant(boxes, tf.float32), tf.constant([20, 40]), (10, 12), tf.constant(1.0), tf.constant([0.0, -6.0])
    )
    assert kept.numpy().tolist() == [True, False, False, False, False, False]
    np.testing.assert_array_equal(cut[0], [0, 0, 2, 4])
    cut, kept = pipeline._place_boxes(
        tf.constant(boxes, tf.float32), tf.constant([20, 40]), (10, 12), tf.constant(2.0), tf.constant([0.0, -6.0])
    )
    np.testing.assert_array_equal(kept, [True, True, True, False, False, False])
    np.testing.assert_array_equal(cut[:3], [[0, 0, 10, 8], [0, 0, 8, 8], [2, 8, 12, 9]])


def test_boxes_are_cut_off_at_the_edge_of_the_image():
    boxes = tf.constant([[-5.0, -5.0, 4.0, 4.0], [6.0, 6.0, 11.0, 9.0]])
    cut, _ = pipeline._place_boxes(boxes, tf.constant([8, 10]), (40, 40), tf.constant(2.0), tf.constant([3.0, 5.0]))
    np.testing.assert_array_equal(cut, [[5, 3, 13, 11], [17, 15, 25, 19]])


@pytest.mark.parametrize("size", [(40, 60), (64, 48), (30, 90), (200, 10), (33, 101), (1, 1), (1, 7), (300, 300)])
def test_images_keep_their_proportions_and_fill_the_canvas_in_one_direction(size):
    image = np.full((*size, 3), 77, np.uint8)
    canvas, scale = pipeline.letterbox(image, (50, 70))
    expected = [side * min(50 / size[0], 70 / size[1]) for side in size]
    inside = is_inside(canvas)
    np.testing.assert_allclose([inside.any(1).sum(), inside.any(0).sum()], expected, atol=0.52)
    assert max(inside.any(1).sum() / 50, inside.any(0).sum() / 70) == 1
    assert inside[: inside.any(1).sum(), : inside.any(0).sum()].all()  # padding is at the right and at the bottom
    np.testing.assert_allclose(colours(canvas)[inside], 77, atol=1e-2)
    assert scale == pytest.approx(min(50 / size[0], 70 / size[1]))


@pytest.mark.parametrize("size", [(24, 32), (96, 128), (300, 400)])
def test_images_are_resized_as_pillow_does(size):
    """Pillow's bilinear filter sees every pixel too where it makes an image smaller."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    canvas, _ = pipeline.letterbox(image, (60, 80))
    expected = np.asarray(Image.fromarray(image).resize((80, 60), Image.Resampling.BILINEAR), np.float32)
    np.testing.assert_allclose(colours(canvas), expected, atol=1.1)


def test_test_batches_name_images_and_say_their_scale(split):
    for images, which in pipeline.test_batches(split, image_size=(50, 70), batch_size=3).as_numpy_iterator():
        for image, index, scale in zip(images, which["index"], which["scale"], strict=True):
            for channel in range(3):
                found = visible_box(image, channel)
                np.testing.assert_allclose(found / scale, split.boxes[index][channel], atol=1 / scale)
            one, scale_of_one = pipeline.letterbox(np.asarray(Image.open(split.name_of(index))), (50, 70))
            np.testing.assert_array_equal(one, image)
            assert scale_of_one == scale


def test_test_batches_keep_the_order_and_the_last_one_is_smaller(split):
    def seen(**arguments):  # type: ignore[no-untyped-def]
        batches = pipeline.test_batches(split, image_size=(20, 20), batch_size=3, **arguments)
        return [which["index"].tolist() for _, which in batches.as_numpy_iterator()]

    assert seen() == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert seen(indices=[7, 0, 7, 2]) == [[7, 0, 7], [2]]
    assert seen(indices=np.arange(1, 8, 3)) == [[1, 4, 7]]
    assert seen(indices=[]) == []


@pytest.mark.parametrize("code", range(1, 9))
def test_exif_codes_turn_images_as_pillow_does(tmp_path, code):
    image, boxes = samples.painted(0, 40, 60)
    stored = Image.fromarray(samples.stored_as(image, code))
    exif = stored.getexif()
    exif[0x0112] = code
    stored.save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    np.testing.assert_array_equal(upright, image)
    split = samples.of_boxes([str(tmp_path / "a.png")], [boxes], [(40, 60)], [code])
    (images, _) = next(iter(pipeline.test_batches(split, image_size=(50, 70), batch_size=1)))
    np.testing.assert_array_equal(images[0], pipeline.letterbox(upright, (50, 70))[0])
    ((images, targets),) = run(split, batch_size=1, flip=1.0)
    assert assert_boxes_fit(images, targets) == (3, 0)


def test_resuming_gives_the_remaining_steps(split):
    whole = run(split, batch_size=2, **JITTER)
    assert len(whole) == 4
    for first_step in range(4):
        assert_same(run(split, batch_size=2, first_step=first_step, **JITTER), whole[first_step:])
    assert run(split, batch_size=2, first_step=4, **JITTER) == []


def test_devices_share_what_one_device_sees(split):
    alone = run(split, parts=2, **JITTER)
    shared = run(split, parts=2, replica_count=2, **JITTER)
    second = run(split, parts=2, replica_count=2, replicas=[1], **JITTER)
    assert [element[0].shape[0] for element in shared] == [2] * 4
    assert_same(second, shared[1::2])
    for step in range(2):
        # The first of two images of each device is in the first part.
        for place, (device, row) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
            here, there = shared[2 * step + device], alone[step]
            np.testing.assert_array_equal(here[0][row], there[0][place])
            np.testing.assert_array_equal(here[1]["boxes"][row], there[1]["boxes"][place])
            np.testing.assert_array_equal(here[1]["labels"][row], there[1]["labels"][place])


def test_nothing_depends_on_the_number_of_threads(split):
    assert_same(run(split, threads=1, **JITTER), run(split, threads=3, **JITTER))


def test_epochs_and_seeds_differ_and_every_image_comes_once(split):
    first = run(split, **JITTER)
    assert_differ(first, run(split, epoch=1, **JITTER))
    assert_differ(first, run(split, seed=4, **JITTER))
    shown = np.concatenate([images for images, _ in run(split, flip=0.0)])
    letterboxed = [pipeline.letterbox(np.asarray(Image.open(path)), (64, 64))[0] for path in split.images.files]
    matches = [[np.abs(image - other).max() < 1e-5 for other in letterboxed] for image in shown]
    assert sorted(np.argmax(matches, axis=1)) == list(range(8))


def test_half_of_the_images_are_flipped(split):
    unflipped = {id(image): image for images, _ in run(split, flip=0.0) for image in images}
    plain = list(unflipped.values())
    flipped = 0
    for epoch in range(1, 9):
        for images, _ in run(split, epoch=epoch):
            flipped += sum(not any(np.abs(image - other).max() < 1e-5 for other in plain) for image in images)
    assert 16 <= flipped <= 48  # of 64; six standard deviations of a fair coin are 24


def test_scale_jitter_draws_the_whole_range(tmp_path):
    split = samples.detection_split(tmp_path, [(32, 64)] * 8)
    widths, lefts, tops = [], [], []
    for epoch in range(6):
        for images, _ in run(split, image_size=(64, 64), scale=(0.25, 1.0), epoch=epoch):
            for image in images:
                columns, rows = np.flatnonzero(is_inside(image).any(0)), np.flatnonzero(is_inside(image).any(1))
                widths.append(len(columns) / 64)
                lefts.append(columns[0] / max(64 - len(columns), 1))
                tops.append(rows[0] / (64 - len(rows)))
    assert 0.24 <= min(widths) < 0.35
    assert 0.9 < max(widths) <= 1
    assert np.mean(widths) == pytest.approx(0.625, abs=0.1)
    for places in (lefts, tops):
        assert np.mean(places) == pytest.approx(0.5, abs=0.2)
        assert np.std(places) > 0.2


def test_padding_stays_zero_under_photometric_distortion(split):
    plain, distorted = run(split, flip=0.0), run(split, flip=0.0, photometric=True)
    for (images, targets), (others, other_targets) in zip(plain, distorted, strict=True):
        np.testing.assert_array_equal(is_inside(images), is_inside(others))
        np.testing.assert_array_equal(targets["boxes"], other_targets["boxes"])
    changed = [
        np.abs(image - other).max() > 0.01
        for one, two in zip(plain, distorted, strict=True)
        for image, other in zip(one[0], two[0], strict=True)
    ]
    assert any(changed)


def test_crowds_are_left_out_and_images_without_boxes_are_allowed(tmp_path):
    image, boxes = samples.painted(0, 40, 60)
    paths = [samples.save(image, tmp_path / f"{index}.png") for index in range(3)]
    nothing = np.zeros((0, 4), np.float32)
    crowd = [np.array([False, True, False]), np.zeros(0, bool), np.array([True, True])]
    split = samples.of_boxes(paths, [boxes, nothing, boxes[:2]], [(40, 60)] * 3, crowd=crowd)
    ((_, targets),) = run(split, batch_size=3, flip=0.0)
    assert sorted(targets["labels"].tolist()) == [[-1, -1], [-1, -1], [0, 2]]
    alone = samples.of_boxes(paths[:1], [nothing], [(40, 60)])
    ((_, targets),) = run(alone, batch_size=1)
    assert targets["labels"].tolist() == [[-1]]
    np.testing.assert_array_equal(targets["boxes"], np.zeros((1, 1, 4)))


def test_shapes_are_fixed(split):
    batches = pipeline.train_batches(split, image_size=(40, 50), batch_size=4, seed=0, epoch=0, replica_count=2)
    images, targets = batches.element_spec
    assert images == tf.TensorSpec((2, 40, 50, 3), tf.float32)
    assert targets == {"boxes": tf.TensorSpec((2, 3, 4), tf.float32), "labels": tf.TensorSpec((2, 3), tf.int32)}
    images, which = pipeline.test_batches(split, image_size=(40, 50), batch_size=4).element_spec
    assert images == tf.TensorSpec((None, 40, 50, 3), tf.float32)
    assert which == {"index": tf.TensorSpec((None,), tf.int32), "scale": tf.TensorSpec((None,), tf.float32)}


def test_later_epochs_trace_nothing_again(split):
    settings = ((44, 52), 3, (0.5, 2.0), 0.5, True)
    for epoch in range(3):
        run(split, image_size=[44, 52], epoch=epoch, scale=[0.5, 2], photometric=True)
    assert pipeline._maker(*settings).experimental_get_tracing_count() == 1


def odd_images(directory: Path) -> list[str]:
    """One pixel; 20 megapixels; grey; CMYK; 16 bits; with alpha; a palette; all of grey level 128."""
    grey = np.full((30, 40), 128, np.uint8)
    cmyk = Image.fromarray(np.stack([*3 * [255 - grey], 0 * grey], -1), "CMYK")
    rgba = Image.fromarray(np.stack([*3 * [grey], 0 * grey + 255], -1))
    return [
        samples.save(np.full((1, 1, 3), 128, np.uint8), directory / "pixel.png"),
        samples.save(np.full((4000, 5000, 3), 128, np.uint8), directory / "large.jpg"),
        samples.save(grey, directory / "grey.jpg"),
        samples.save(cmyk, directory / "cmyk.jpg"),
        samples.save(grey.astype(np.uint16) * 257, directory / "16bits.png"),
        samples.save(rgba, directory / "alpha.png"),
        samples.save(Image.fromarray(grey).convert("P"), directory / "palette.png"),
    ]


def test_images_of_every_kind_show_their_colour(tmp_path):
    paths = odd_images(tmp_path)
    sizes = [(1, 1), (4000, 5000), *[(30, 40)] * 5]
    boxes = [np.array([[0, 0, width, height]], np.float32) for height, width in sizes]
    split = samples.of_boxes(paths, boxes, sizes)
    ((images, targets),) = run(split, batch_size=7)
    assert (targets["labels"] == 0).all()
    for image, box in zip(images, targets["boxes"][:, 0], strict=True):
        inside = is_inside(image)
        np.testing.assert_allclose([box[2], box[3]], [inside.any(0).sum(), inside.any(1).sum()], atol=0.51)
        np.testing.assert_allclose(colours(image)[inside], 128, atol=2)


def test_truncated_file_is_an_error_of_its_batch(split):
    path = Path(split.name_of(2))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(tf.errors.InvalidArgumentError):
        run(split)
    with pytest.raises(tf.errors.InvalidArgumentError):
        list(pipeline.test_batches(split, image_size=(20, 20), batch_size=8))
    assert data.first_unreadable(split.images, range(8))[0] == str(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": (0, 5)}, "image_size"),
        ({"image_size": (5,)}, "image_size"),
        ({"batch_size": 9}, "do not fill one batch"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"epoch": -1}, "epoch"),
        ({"first_step": 3}, "first_step must be from 0 to 2"),
        ({"scale": (2.0, 1.0)}, "scale"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (1.0, float("nan"))}, "scale"),
        ({"flip": 1.5}, "flip"),
        ({"replica_count": 3}, "split evenly into 3"),
        ({"replica_count": 2, "parts": 4}, "split evenly into 8"),
        ({"replica_count": 0}, "replica_count"),
        ({"parts": 0}, "parts"),
        ({"replica_count": 2, "replicas": [2]}, "replicas must be from 0 to 1"),
    ],
)
def test_arguments_that_are_not_allowed(split, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(split, **arguments)


def test_arguments_that_a_test_does_not_allow(split):
    with pytest.raises(ValueError, match="indices must be from 0 to 7"):
        pipeline.test_batches(split, image_size=(20, 20), batch_size=2, indices=[0, 8])
    with pytest.raises(ValueError, match="indices"):
        pipeline.test_batches(split, image_size=(20, 20), batch_size=2, indices=[-1])
    with pytest.raises(ValueError, match="batch_size"):
        pipeline.test_batches(split, image_size=(20, 20), batch_size=0)
    with pytest.raises(ValueError, match="image_size"):
        pipeline.test_batches(split, image_size=(20, -1), batch_size=2)
    for image in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            pipeline.letterbox(image, (20, 20))

"""Labels stay on the pixels that they were drawn on, and who sees what when."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from mobiatt_tf import data
from mobiatt_tf.data import segmentation_pipeline as pipeline
from mobiatt_tf.data.dense import IGNORED, SegmentationSplit
from tests.data import dense_samples as samples
from tests.data.dense_samples import assert_differ, assert_same, classes, colours, is_inside


def run(split: SegmentationSplit, **arguments) -> list:  # type: ignore[no-untyped-def]
    return samples.run(pipeline.train_batches, split, **{"image_size": (48, 48), **arguments})


@pytest.fixture
def split(tmp_path: Path) -> SegmentationSplit:
    return samples.segmentation_split(tmp_path)


def away_from_edges(labels: np.ndarray, distance: int) -> np.ndarray:
    """Where all labels within a distance are the same: bool [H, W]."""
    padded = np.pad(labels, distance, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * distance + 1, 2 * distance + 1))
    return (windows.min((-1, -2)) == windows.max((-1, -2))) & (labels != IGNORED)


def assert_labels_fit(images: np.ndarray, labels: np.ndarray) -> None:
    for image, label in zip(images, labels, strict=True):
        seen = np.where(is_inside(image), classes(colours(image)), IGNORED)
        inner = away_from_edges(label, 2)
        np.testing.assert_array_equal(seen[inner], label[inner])
        assert (seen == IGNORED).tolist() == (label == IGNORED).tolist()
        # At the edges too they differ by half a pixel at most, and not more to one side than to the other.
        assert (seen != label).mean() < 0.03


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("scale", [(0.5, 2.0), (1.0, 1.0), (0.4, 0.5), (3.0, 4.0)])
def test_labels_stay_on_their_pixels(split, scale, flip):
    for images, labels in run(split, scale=scale, flip=flip, photometric=False):
        assert_labels_fit(images, labels)
        assert len(np.unique(labels[labels != IGNORED])) >= 3


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_images_smaller_than_the_crop_are_padded_at_the_right_and_at_the_bottom(tmp_path, flip):
    split = samples.segmentation_split(tmp_path, [(40, 40)] * 4)
    for photometric in (False, True):
        ((images, labels),) = run(split, scale=(0.5, 0.5), flip=flip, photometric=photometric)
        expected = np.zeros((48, 48), bool)
        expected[:24, :24] = True
        for image, label in zip(images, labels, strict=True):
            np.testing.assert_array_equal(is_inside(image), expected)
            np.testing.assert_array_equal(label != IGNORED, expected)


def test_a_flip_mirrors_the_image_and_not_the_padding(tmp_path):
    split = samples.segmentation_split(tmp_path, [(40, 40)] * 4)
    arguments = {"scale": (0.5, 0.5), "photometric": False}
    (plain,), (flipped,) = run(split, flip=0.0, **arguments), run(split, flip=1.0, **arguments)
    for before, after in zip(plain, flipped, strict=True):
        np.testing.assert_allclose(after[:, :24, :24], before[:, :24, :24][:, :, ::-1], atol=0.01)
        np.testing.assert_array_equal(after[:, :, 24:], before[:, :, 24:])


@pytest.mark.parametrize("size", [(90, 60), (60, 90)])
def test_crops_are_taken_from_everywhere(tmp_path, size):
    """Images of which every pixel says where it was: red its row, green its column."""
    rows, columns = np.indices(size, np.uint8)
    image = samples.save(np.stack([rows, columns, 0 * rows], -1), tmp_path / "a.png")
    mask = samples.save(((rows // 4 + columns // 4) % 2).astype(np.uint8), tmp_path / "a_labels.png")
    split = samples.of_masks([image] * 8, [mask] * 8)
    corners = []
    for epoch in range(8):
        for images, _ in run(split, image_size=(30, 30), scale=(2, 2), flip=0.0, photometric=False, epoch=epoch):
            corners.append(colours(images[:, 0, 0])[:, :2])
    places = np.concatenate(corners)
    assert places.shape == (64, 2)
    for axis in range(2):
        room = size[axis] - 30
        assert places[:, axis].min() < 0.15 * room
        assert 0.85 * room < places[:, axis].max() < room + 0.1


def test_scale_is_drawn_from_the_whole_range(tmp_path):
    split = samples.segmentation_split(tmp_path, [(64, 64)] * 8)
    sides = []
    for epoch in range(6):
        for images, _ in run(split, scale=(0.25, 1.0), photometric=False, epoch=epoch):
            sides += [is_inside(image)[0].sum() / 48 for image in images]
    assert 0.24 <= min(sides) < 0.35
    assert 0.9 < max(sides) <= 1
    assert np.mean(sides) == pytest.approx(0.625, abs=0.1)


def test_the_long_side_is_at_most_four_times_the_short_one(tmp_path):
    split = samples.segmentation_split(tmp_path, [(12, 120)])
    ((images, _),) = run(split, batch_size=1, image_size=(40, 200), scale=(1.0, 1.0), photometric=False)
    inside = is_inside(images[0])
    assert (inside.any(1).sum(), inside.any(0).sum()) == (16, 160)


def varied_crop(labels: np.ndarray, draws: list[tuple[float, float]]) -> tuple[list[float], np.ndarray]:
    given = np.array(draws + [(0.0, 0.0)] * (pipeline.ATTEMPTS - len(draws)), np.float32)
    offset, cropped = pipeline._varied_crop(tf.constant(labels), (10, 10), tf.constant(1.0), tf.constant(given))
    return offset.numpy().tolist(), cropped.numpy()


def test_crops_are_drawn_again_until_no_class_has_more_than_three_quarters():
    labels = np.zeros((10, 41), np.uint8)
    labels[:, 33:38] = 1  # only the windows from columns 26 to 30 have at least three of these columns
    offset, cropped = varied_crop(labels, [(0.5, 0.0), (0.5, 0.5), (0.0, 27.5 / 32), (0.9, 0.0)])
    assert offset == [0, -27]
    np.testing.assert_array_equal(cropped, labels[:, 27:37])
    assert varied_crop(labels, [(0, 25.5 / 32), (0, 26.5 / 32)])[0] == [0, -26]  # two of ten, three of ten


def test_of_ten_crops_without_enough_variety_the_last_is_taken():
    labels = np.zeros((10, 41), np.uint8)
    assert varied_crop(labels, [(0, i / 32 + 0.01) for i in range(10)])[0] == [0, -9]
    assert varied_crop(np.full_like(labels, IGNORED), [(0, 0.5)] * 9)[0] == [0, 0]


def test_pixels_that_do_not_count_do_not_count_for_variety():
    labels = np.full((10, 41), IGNORED, np.uint8)
    labels[0, 20:28], labels[1, 20:28] = 3, 5
    assert varied_crop(labels, [(0, 0.0), (0, 20.5 / 32)])[0] == [0, -20]
    labels[1] = IGNORED
    assert varied_crop(labels, [(0, 20.5 / 32)])[0] == [0, 0]


@pytest.mark.parametrize("code", range(1, 9))
def test_image_and_labels_may_be_stored_in_different_orientations(tmp_path, code):
    split = samples.segmentation_split(tmp_path, samples.SIZES[:4], [code] * 4, [1, code, 9 - code, 1])
    for images, labels in run(split, photometric=False):
        assert_labels_fit(images, labels)
    for index, image, labels in pipeline.test_images(split, short_side=40):
        expected, _ = samples.painted(index, *samples.SIZES[index])
        np.testing.assert_array_equal(labels, classes(expected))
        np.testing.assert_array_equal(image, pipeline.resize_short_side(expected, 40))


def test_resuming_gives_the_remaining_steps(split):
    whole = run(split, batch_size=2)
    assert len(whole) == 4
    for first_step in range(4):
        assert_same(run(split, batch_size=2, first_step=first_step), whole[first_step:])
    assert run(split, batch_size=2, first_step=4) == []


def test_devices_share_what_one_device_sees(split):
    alone = run(split, parts=2)
    shared = run(split, parts=2, replica_count=2)
    assert_same(run(split, parts=2, replica_count=2, replicas=[1]), shared[1::2])
    for step in range(2):
        # The first of two images of each device is in the first part.
        for place, (device, row) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
            for here, there in zip(shared[2 * step + device], alone[step], strict=True):
                np.testing.assert_array_equal(here[row], there[place])


def test_nothing_depends_on_the_number_of_threads(split):
    assert_same(run(split, threads=1), run(split, threads=3))


def test_epochs_and_seeds_differ(split):
    first = run(split)
    assert_differ(first, run(split, epoch=1))
    assert_differ(first, run(split, seed=4))
    assert_same(first, run(split))


def test_values_become_classes_by_the_map_and_palettes_give_indices(tmp_path):
    image, _ = samples.painted(0, 40, 60)
    stored = classes(image) + 1  # as ADE20K: classes from 1 on
    stored[:, :2] = 0
    palette = Image.fromarray(stored, "P")
    palette.putpalette(list(np.random.default_rng(0).permutation(256).astype(np.uint8).repeat(3)))
    label_map = (np.arange(256) - 1).astype(np.uint8)  # 0 becomes 255
    paths = [samples.save(stored, tmp_path / "grey.png"), samples.save(palette, tmp_path / "palette.png")]
    split = samples.of_masks([samples.save(image, tmp_path / "a.png")] * 2, paths, label_map=label_map)
    expected = classes(image)
    expected[:, :2] = IGNORED
    for _, _, labels in pipeline.test_images(split, short_side=20):
        np.testing.assert_array_equal(labels, expected)
    ((_, labels),) = run(split, batch_size=2, image_size=(48, 72), scale=(1.0, 1.0))
    assert np.unique(labels).tolist() == [0, 1, 2, 3, IGNORED]


def test_labels_of_16_bits_are_refused_and_not_cut(tmp_path):
    image, _ = samples.painted(0, 40, 60)
    mask = samples.save(classes(image).astype(np.uint16) + 256, tmp_path / "labels.png")
    split = samples.of_masks([samples.save(image, tmp_path / "a.png")], [mask])
    with pytest.raises(tf.errors.InvalidArgumentError, match="16 bits"):
        run(split, batch_size=1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="16 bits"):
        list(pipeline.test_images(split, short_side=20))


def test_labels_of_another_size_are_refused(tmp_path):
    image, _ = samples.painted(0, 40, 60)
    mask = samples.save(classes(image)[:, :-1], tmp_path / "labels.png")
    split = samples.of_masks([samples.save(image, tmp_path / "a.png")], [mask])
    with pytest.raises(tf.errors.InvalidArgumentError, match="same height and width"):
        run(split, batch_size=1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="same height and width"):
        list(pipeline.test_images(split, short_side=20))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda labels: labels[:, :-1], "it has 40 x 59 pixels, its image 40 x 60"),
        (lambda labels: labels.astype(np.uint16) + 256, "it has 16 bits for a value; labels have 8"),
        ("JPEG", "not a PNG image"),
        ("cut", "truncated or damaged PNG data"),
    ],
)
def test_a_mask_that_has_changed_is_named(tmp_path, change, reason):
    split = samples.segmentation_split(tmp_path, [(40, 60)] * 3)
    assert data.first_unreadable(split, range(3)) is None
    path = Path(split.masks.name_of(1))
    if change == "cut":
        path.write_bytes(path.read_bytes()[:60])
    elif change == "JPEG":
        Image.open(path).save(path, "JPEG")
    else:
        samples.save(change(np.asarray(Image.open(path))), path)
    with pytest.raises(tf.errors.InvalidArgumentError):
        list(pipeline.test_images(split, short_side=20))
    assert data.first_unreadable(split, range(3)) == (str(path), reason)
    assert data.first_unreadable(split, [2, 0]) is None


def test_an_image_beside_a_mask_that_has_changed_is_named(tmp_path):
    split = samples.segmentation_split(tmp_path, [(40, 60)] * 3)
    path = Path(split.name_of(2))
    path.write_bytes(path.read_bytes()[:60])
    assert data.first_unreadable(split, range(3))[0] == str(path)


def test_images_of_one_pixel_and_of_grey(tmp_path):
    grey = np.full((30, 40), 128, np.uint8)
    images = [samples.save(grey[:1, :1], tmp_path / "pixel.png"), samples.save(grey, tmp_path / "grey.png")]
    masks = [samples.save(np.ones_like(grey)[:1, :1], tmp_path / "1.png"), samples.save(grey // 64, tmp_path / "2.png")]
    split = samples.of_masks(images, masks)
    ((shown, labels),) = run(split, batch_size=2, scale=(1.0, 1.0), photometric=False)
    np.testing.assert_allclose(colours(shown), 128, atol=1e-2)
    assert sorted(np.unique(label).tolist() for label in labels) == [[1], [2]]
    assert [image.shape for _, image, _ in pipeline.test_images(split, short_side=20)] == [(20, 20, 3), (20, 27, 3)]


def test_tests_see_the_short_side_and_keep_labels_at_their_size(split):
    seen = list(pipeline.test_images(split, short_side=24, indices=[6, 2, 4]))
    assert [index for index, _, _ in seen] == [6, 2, 4]
    assert [image.shape for _, image, _ in seen] == [(24, 32, 3), (24, 72, 3), (59, 24, 3)]
    for index, image, labels in seen:
        assert labels.shape == samples.SIZES[index]
        assert labels.dtype == np.uint8
        assert image.dtype == np.float32
        assert is_inside(image).all()
        np.testing.assert_array_equal(labels, classes(samples.painted(index, *samples.SIZES[index])[0]))
    assert [index for index, _, _ in pipeline.test_images(split, short_side=24)] == list(range(8))


def test_whole_images_are_resized_as_pillow_does():
    image = np.random.default_rng(0).integers(0, 256, (50, 75, 3), np.uint8)
    for short_side, width in ((20, 30), (50, 75), (120, 180)):
        expected = Image.fromarray(image).resize((width, short_side), Image.Resampling.BILINEAR)
        shown = colours(pipeline.resize_short_side(image, short_side))
        np.testing.assert_allclose(shown, np.asarray(expected, np.float32), atol=1.1)


@pytest.mark.parametrize(
    ("size", "multiple", "expected"),
    [((20, 30), 1, (20, 30)), ((30, 50), 32, (32, 64)), ((40, 60), 16, (32, 32)), ((10, 300), 8, (8, 80))],
)
def test_sides_are_rounded_up_to_a_multiple(size, multiple, expected):
    image = np.full((*size, 3), 50, np.uint8)
    shown = pipeline.resize_short_side(image, 20, multiple)
    assert shown.shape[:2] == expected
    np.testing.assert_allclose(colours(shown), 50, atol=1e-2)
    assert pipeline.aligned(shown.shape[:2], multiple) == expected


def test_shapes_are_fixed_and_later_epochs_trace_nothing_again(split):
    for epoch in range(3):
        batches = pipeline.train_batches(
            split, image_size=[36, 44], batch_size=4, seed=0, epoch=epoch, replica_count=2, scale=[0.5, 2]
        )
        images, labels = batches.element_spec
        assert images == tf.TensorSpec((2, 36, 44, 3), tf.float32)
        assert labels == tf.TensorSpec((2, 36, 44), tf.int32)
        next(iter(batches))
    assert pipeline._maker((36, 44), (0.5, 2.0), 0.5, True).experimental_get_tracing_count() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": (5, 0)}, "image_size"),
        ({"batch_size": 9}, "do not fill one batch"),
        ({"seed": -1}, "seed"),
        ({"first_step": -1}, "first_step must be from 0 to 2"),
        ({"scale": (2.0, 1.0)}, "scale"),
        ({"flip": -0.1}, "flip"),
        ({"replica_count": 3}, "split evenly into 3"),
        ({"replica_count": 2, "replicas": [-1]}, "replicas must be from 0 to 1"),
    ],
)
def test_arguments_that_are_not_allowed(split, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(split, **arguments)


def test_arguments_that_a_test_does_not_allow(split):
    with pytest.raises(ValueError, match="indices must be from 0 to 7"):
        pipeline.test_images(split, short_side=20, indices=[8])
    with pytest.raises(ValueError, match="short_side"):
        pipeline.test_images(split, short_side=0)
    with pytest.raises(ValueError, match="multiple"):
        pipeline.resize_short_side(np.zeros((4, 4, 3), np.uint8), 20, 0)
    with pytest.raises(ValueError, match="uint8"):
        pipeline.resize_short_side(np.zeros((4, 4, 3), np.float32), 20)

"""Order, resuming, augmentation and resizing of `train_batches` and `test_batches`."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mobiatt_tf import data
from mobiatt_tf.data import crops, order
from mobiatt_tf.data.decoding import decode_image

SIZE = (16, 16)
Batches = list[tuple[np.ndarray, np.ndarray]]


def run(split: data.Split, threads: int | None = None, **options) -> Batches:  # type: ignore[no-untyped-def]
    arguments = {"image_size": SIZE, "batch_size": 4, "seed": 3, "epoch": 0, **options}
    batches = data.train_batches(split, **arguments)
    if threads is not None:
        options = tf.data.Options()
        options.threading.private_threadpool_size = threads
        batches = batches.with_options(options)
    return [(images.numpy(), labels.numpy()) for images, labels in batches]


def by_label(batches: Batches) -> dict[int, np.ndarray]:
    return {label: image for images, labels in batches for image, label in zip(images, labels.tolist(), strict=True)}


def assert_same(first: Batches, second: Batches) -> None:
    assert len(first) == len(second)
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        np.testing.assert_array_equal(labels, other_labels)
        np.testing.assert_array_equal(images, other_images)


def restore(images: np.ndarray) -> np.ndarray:
    """Undoes `normalize`: 0 .. 255."""
    return (images * data.IMAGENET_STD + data.IMAGENET_MEAN) * 255


@pytest.mark.parametrize("augmentation", data.AUGMENTATIONS)
def test_shapes_and_types(split: data.Split, augmentation: str) -> None:
    batches = data.train_batches(split, image_size=(16, 12), batch_size=4, seed=0, epoch=0, augmentation=augmentation)
    assert batches.element_spec == (tf.TensorSpec((4, 16, 12, 3), tf.float32), tf.TensorSpec((4,), tf.int32))
    assert batches.cardinality() == data.steps_per_epoch(split, 4) == 3
    assert len(list(batches)) == 3


@pytest.mark.parametrize("augmentation", data.AUGMENTATIONS)
def test_resuming_is_the_same_as_skipping(split: data.Split, augmentation: str) -> None:
    whole = run(split, augmentation=augmentation)
    for first_step in range(4):
        assert_same(run(split, augmentation=augmentation, first_step=first_step), whole[first_step:])


def test_resuming_reads_nothing_that_is_skipped(file_split: data.Split) -> None:
    whole = run(file_split)
    for _, labels in whole[:2]:
        for label in labels:
            Path(file_split.files[label]).unlink()
    assert_same(run(file_split, first_step=2), whole[2:])
    with pytest.raises(tf.errors.NotFoundError):
        run(file_split)


@pytest.mark.parametrize("augmentation", ["flip_crop", "resized_crop"])
def test_the_number_of_threads_changes_nothing(split: data.Split, augmentation: str) -> None:
    assert_same(run(split, threads=1, augmentation=augmentation), run(split, threads=8, augmentation=augmentation))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32), st.integers(0, 1000))
def test_every_example_comes_once_in_an_epoch(examples: int, batch_size: int, seed: int, epoch: int) -> None:
    images = np.arange(examples, dtype=np.uint8).reshape(-1, 1, 1, 1)
    split = data.Split(np.arange(examples, dtype=np.int32), images)
    if batch_size > examples:
        with pytest.raises(ValueError, match=f"{examples} training images do not fill one batch of {batch_size}"):
            data.steps_per_epoch(split, batch_size)
        return
    batches = run(split, image_size=(1, 1), batch_size=batch_size, seed=seed, epoch=epoch)
    seen = np.concatenate([labels for _, labels in batches])
    assert len(seen) == examples // batch_size * batch_size == len(set(seen.tolist()))
    for pixels, labels in batches:  # image and label stay together
        np.testing.assert_allclose(restore(pixels)[:, 0, 0, 0], labels, atol=1e-3)


def test_order_changes_with_epoch_and_with_seed(array_split: data.Split) -> None:
    def order(**options: int) -> list[int]:
        return np.concatenate([labels for _, labels in run(array_split, batch_size=1, **options)]).tolist()

    orders = [order(seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(numbers) for numbers in orders}) == 4
    assert order(seed=1, epoch=1) == orders[3]


def test_order_is_the_published_one() -> None:
    """Checkpoints of older versions resume only as long as these numbers stay."""
    split = data.Split(np.arange(10, dtype=np.int32), np.zeros((10, 1, 1, 1), np.uint8))
    batches = run(split, image_size=(1, 1), batch_size=10, seed=1, epoch=2)
    assert batches[0][1].tolist() == [4, 2, 0, 6, 1, 5, 9, 8, 7, 3]


@pytest.mark.parametrize("augmentation", ["flip_crop", "crop", "resized_crop"])
def test_augmentation_changes_with_the_epoch_not_with_the_batch_size(split: data.Split, augmentation: str) -> None:
    first = by_label(run(split, augmentation=augmentation, batch_size=1))
    assert len(first) == len(split)
    second = by_label(run(split, augmentation=augmentation, batch_size=1, epoch=1))
    changed = sum(not np.array_equal(first[label], second[label]) for label in first)
    assert changed > len(split) / 2
    for label, image in by_label(run(split, augmentation=augmentation, batch_size=5)).items():
        np.testing.assert_allclose(image, first[label], atol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (56, 40)])
def test_no_augmentation_shows_what_the_test_shows(split: data.Split, size: tuple[int, int]) -> None:
    """Otherwise the accuracy on training and on test images could not be compared."""
    tested = by_label([(x.numpy(), y.numpy()) for x, y in data.test_batches(split, image_size=size, batch_size=13)])
    trained = by_label(run(split, image_size=size, batch_size=13))
    assert trained.keys() == tested.keys()
    for label, image in trained.items():
        np.testing.assert_allclose(image, tested[label], atol=1e-5)


def test_no_augmentation_of_the_right_size_gives_the_pixels(array_split: data.Split) -> None:
    for label, image in by_label(run(array_split, image_size=(20, 24))).items():
        np.testing.assert_allclose(restore(image), array_split.images[label], atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_shift_and_flip_is_pad_cut_and_reverse(choose: st.DataObject) -> None:
    height, width = choose.draw(st.integers(1, 20), "height"), choose.draw(st.integers(1, 20), "width")
    images = np.random.default_rng(height * width).integers(0, 256, (3, height, width, 1), np.uint8)
    shift = st.tuples(st.integers(0, 2 * (height // 8)), st.integers(0, 2 * (width // 8)), st.integers(0, 1))
    shifts = choose.draw(st.lists(shift, min_size=3, max_size=3), "shifts")
    result = crops.shift_and_flip(tf.constant(images), tf.constant(shifts)).numpy()
    for image, (top, left, flip), found in zip(images, shifts, result, strict=True):
        padded = np.pad(image, ((height // 8,) * 2, (width // 8,) * 2, (0, 0)))
        window = padded[top : top + height, left : left + width]
        np.testing.assert_array_equal(found, window[:, ::-1] if flip else window)


def test_shifts_reach_every_place_about_equally_often() -> None:
    numbers = order.random_numbers(seed=5, epoch=7, stream=1, examples=20_000, count=3)
    shifts = crops.draw_shifts(numbers, (32, 16), flip=True)
    for column, places in enumerate((9, 5, 2)):
        counts = np.bincount(shifts[:, column], minlength=places)
        assert len(counts) == places
        np.testing.assert_allclose(counts / 20_000, 1 / places, atol=0.015)
    assert not crops.draw_shifts(numbers, (32, 16), flip=False)[:, 2].any()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 600), st.integers(1, 600), st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_random_window_lies_in_the_image(height: int, width: int, seed: int, other_seed: int) -> None:
    seeds = tf.constant([seed, other_seed], tf.int64)
    (top, left, rows, columns), _ = crops.random_window(tf.constant(float(height)), tf.constant(float(width)), seeds)
    assert 0 <= top <= height - rows
    assert 0 <= left <= width - columns
    assert rows >= 1
    assert columns >= 1


def torchvision_window(generator: np.random.Generator, height: int, width: int) -> tuple[int, int]:
    """The rows and columns that torchvision's RandomResizedCrop.get_params draws, less its fallback."""
    while True:
        area = height * width * generator.uniform(0.08, 1)
        ratio = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        columns, rows = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if rows <= height and columns <= width:
            return rows, columns


def test_random_window_is_distributed_as_in_torchvision() -> None:
    windows, flips = next(
        iter(
            tf.data.Dataset.range(10_000)
            .map(lambda i: crops.random_window(tf.constant(400.0), tf.constant(500.0), tf.stack([i, 9 * i])))
            .batch(10_000)
        )
    )
    found = windows[:, 2:].numpy()
    generator = np.random.default_rng(0)
    expected = np.array([torchvision_window(generator, 400, 500) for _ in range(10_000)])
    quantiles = np.linspace(0, 1, 11)
    for quantity in (lambda sizes: sizes.prod(axis=1) / 200_000, lambda sizes: sizes[:, 1] / sizes[:, 0]):
        np.testing.assert_allclose(
            np.quantile(quantity(found), quantiles), np.quantile(quantity(expected), quantiles), atol=0.02
        )
    assert flips.numpy().mean() == pytest.approx(0.5, abs=0.02)
    centres = (windows[:, :2].numpy() + found / 2) / (400, 500)
    np.testing.assert_allclose(centres.mean(axis=0), 0.5, atol=0.01)


def test_a_random_window_of_a_very_long_image_is_central() -> None:
    window, _ = crops.random_window(tf.constant(10.0), tf.constant(1000.0), tf.constant([1, 2], tf.int64))
    top, left, rows, columns = window.numpy()
    assert (rows, columns) == (10, 13)  # the ratio 4/3
    assert (top, left) == (0, 494)


def test_jpeg_windows_are_those_of_the_decoded_image(tmp_path: Path) -> None:
    """The short cut that decodes the window alone gives what the long way gives, up to the filter at its edges."""
    flat = np.full((300, 200, 3), (200, 30, 90), np.uint8)
    Image.fromarray(flat).save(tmp_path / "flat.jpg")
    split = data.Split(np.zeros(1, np.int32), files=(str(tmp_path / "flat.jpg"),))
    for epoch in range(3):
        ((images, _),) = run(split, batch_size=1, epoch=epoch, augmentation="resized_crop")
        np.testing.assert_allclose(restore(images[0]), flat[:16, :16], atol=4)
    content = tf.io.read_file(str(tmp_path / "flat.jpg"))
    seed = tf.constant([4, 5], tf.int64)
    short, flip = crops.read_window(content, seed)
    long, other_flip = crops.cut_window(decode_image(content), seed)
    assert short.shape == long.shape
    assert bool(flip) == bool(other_flip)


def test_test_batches_keep_the_order_and_the_remainder(split: data.Split) -> None:
    batches = [(x.numpy(), y.numpy()) for x, y in data.test_batches(split, image_size=SIZE, batch_size=5)]
    assert [x.shape for x, _ in batches] == [(5, 16, 16, 3), (5, 16, 16, 3), (3, 16, 16, 3)]
    assert np.concatenate([y for _, y in batches]).tolist() == list(range(13))


@pytest.mark.parametrize(("height", "width"), [(120, 90), (64, 300), (28, 28)])
def test_test_images_are_resized_and_cropped_as_pillow_does_it(tmp_path: Path, height: int, width: int) -> None:
    image = Image.fromarray(make_gradient(height, width))
    image.save(tmp_path / "image.png")
    split = data.Split(np.zeros(1, np.int32), files=(str(tmp_path / "image.png"),))
    ((found, _),) = data.test_batches(split, image_size=(56, 56), batch_size=1)
    scale = 64 / min(height, width)  # 64 = 56 x 256/224
    size = round(width * scale), round(height * scale)
    left, top = (size[0] - 56) // 2, (size[1] - 56) // 2
    expected = np.asarray(image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 56, top + 56)))
    assert np.abs(restore(found.numpy()[0]) - expected).max() < 1.5  # Pillow rounds twice to whole numbers


def make_gradient(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [rows * 255 / height, columns * 255 / width, 127 + 120 * np.sin(rows / 9) * np.cos(columns / 7)]
    return np.stack(waves, -1).astype(np.uint8)


@pytest.mark.parametrize("size", [(32, 32), (40, 30), (14, 14), (40, 14)])
def test_arrays_are_resized_as_pillow_does_it(size: tuple[int, int]) -> None:
    image = make_gradient(28, 28)
    split = data.Split(np.zeros(1, np.int32), image[np.newaxis])
    ((found, _),) = data.test_batches(split, image_size=size, batch_size=1)
    expected = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
    assert np.abs(restore(found.numpy()[0]) - expected).max() < 1.5


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
def test_normalize(dtype: type) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3)).astype(dtype)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(data.normalize(images), (images / 255.0 - mean) / std, atol=1e-5)
    grey = images[..., :1]
    np.testing.assert_array_equal(data.normalize(grey), data.normalize(grey.repeat(3, axis=-1)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"augmentation": "mixup"}, 'one of none, flip_crop, crop, resized_crop, got "mixup"'),
        ({"first_step": 4}, "from 0 to 3"),
        ({"first_step": -1}, "from 0 to 3"),
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": 14}, "13 training images do not fill one batch of 14"),
        ({"seed": -1}, "0 or more"),
        ({"image_size": (0, 4)}, "each at least 1"),
    ],
)
def test_wrong_arguments_are_named(array_split: data.Split, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(array_split, **wrong)


def test_take(split: data.Split) -> None:
    taken = split.take(5)
    assert len(taken) == 5
    assert taken.labels.tolist() == [0, 1, 2, 3, 4]
    assert len(split.take(100)) == 13
    with pytest.raises(ValueError, match="at least 1"):
        split.take(0)


def test_a_split_must_be_consistent() -> None:
    labels = np.zeros(2, np.int32)
    with pytest.raises(ValueError, match="exactly one"):
        data.Split(labels)
    with pytest.raises(ValueError, match="one label for each image"):
        data.Split(labels, files=("a.png",))
    with pytest.raises(ValueError, match="int32"):
        data.Split(np.zeros(2, np.int64), files=("a.png", "b.png"))
    with pytest.raises(ValueError, match="uint8"):
        data.Split(labels, np.zeros((2, 4, 4, 3), np.float32))

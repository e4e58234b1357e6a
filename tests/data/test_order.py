"""Who sees what when: shares of devices and workers, repeated augmentation, mixing, names."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from mobiatt_tf import data
from mobiatt_tf.augment import Augmentation
from mobiatt_tf.data.order import epoch_order

EVERYTHING = Augmentation(
    crop="resized_crop", rand_augment="rand-m9-mstd0.5-inc1", erasing=0.5, mixup=0.8, cutmix=1.0, repeats=2
)
MIXED = Augmentation(crop="flip_crop", mixup=0.8, cutmix=1.0)
Batches = list[tuple[np.ndarray, np.ndarray]]


def numbered(count: int) -> data.Split:
    """Images of 8 x 8 noise whose labels are their numbers."""
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8)
    return data.Split(np.arange(count, dtype=np.int32), images)


def run(split: data.Split, threads: int | None = None, **arguments) -> Batches:  # type: ignore[no-untyped-def]
    batches = data.train_batches(
        split, **{"image_size": (8, 8), "seed": 3, "epoch": 0, "classes": len(split), **arguments}
    )
    if threads is not None:
        options = tf.data.Options()
        options.threading.private_threadpool_size = threads
        batches = batches.with_options(options)
    return [(images.numpy(), labels.numpy()) for images, labels in batches]


def assert_same(first: Batches, second: Batches) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        for array, expected in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, expected)


@settings(max_examples=25, deadline=None)
@given(
    replica_count=st.integers(1, 4),
    parts=st.integers(1, 3),
    pairs=st.integers(1, 2),
    first_step=st.integers(0, 1),
    repeats=st.integers(1, 3),
    mixes=st.booleans(),
)
def test_devices_share_what_one_device_sees(
    replica_count: int, parts: int, pairs: int, first_step: int, repeats: int, mixes: bool
) -> None:
    """In every part, all devices together have the images of one device, mixed and augmented in the same way."""
    batch_size = replica_count * parts * 2 * pairs
    augmentation = Augmentation("flip_crop", mixup=0.8 * mixes, cutmix=1.0 * mixes, repeats=repeats)
    options = {"batch_size": batch_size, "first_step": first_step, "augmentation": augmentation, "parts": parts}
    split = numbered(2 * batch_size + 1)
    alone = run(split, **options)
    shared = run(split, replica_count=replica_count, **options)
    assert len(alone) == 2 - first_step
    assert len(shared) == replica_count * len(alone)
    for step, whole in enumerate(alone):
        of_step = shared[step * replica_count : (step + 1) * replica_count]
        for expected, *arrays in zip(whole, *of_step, strict=True):
            parted = [np.split(array, parts) for array in arrays]
            together = np.concatenate([pieces[part] for part in range(parts) for pieces in parted])
            np.testing.assert_array_equal(together, expected)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_no_image_twice_or_missing_over_the_workers(workers: int) -> None:
    """Every worker makes the batches of its own two devices."""
    split = numbered(101)
    devices = 2 * workers
    seen = [
        run(split, batch_size=48, replica_count=devices, replicas=[2 * worker, 2 * worker + 1])
        for worker in range(workers)
    ]
    assert [len(batches) for batches in seen] == [4] * workers  # two steps for two devices
    labels = np.concatenate([labels for batches in seen for _, labels in batches])
    assert len(labels) == 96 == len(set(labels.tolist()))
    alone = np.concatenate([labels for _, labels in run(split, batch_size=48)])
    assert set(labels.tolist()) == set(alone.tolist())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 24), st.integers(1, 5), st.integers(0, 3))
def test_repeated_images(count: int, batch_size: int, repeats: int, epoch: int) -> None:
    if batch_size > count:
        return
    examples, draws = epoch_order(count, batch_size, 7, epoch, repeats)
    steps = count // batch_size
    assert examples.shape == draws.shape == (steps, batch_size)
    assert len(set(draws.ravel().tolist())) == draws.size  # everything is augmented in its own way
    np.testing.assert_array_equal(draws % count, examples)
    assert draws.max() < count * repeats
    in_steps = [set(step.tolist()) for step in examples]
    assert all(len(step) == -(-batch_size // repeats) for step in in_steps)
    assert sum(len(step) for step in in_steps) == len(set().union(*in_steps))  # an image is in one step alone
    if batch_size % 2 == 0 and batch_size > repeats:  # mixing does not mix an image with itself
        assert (examples.reshape(-1, 2)[:, 0] != examples.reshape(-1, 2)[:, 1]).all()


def test_repeats_take_a_part_of_the_images_and_another_one_in_the_next_epoch() -> None:
    first, second = ({*epoch_order(90, 30, 0, epoch, repeats=3)[0].ravel().tolist()} for epoch in (0, 1))
    assert len(first) == len(second) == 30
    assert first != second


def test_copies_look_different() -> None:
    split = data.Split(
        np.arange(4, dtype=np.int32), np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3), np.uint8)
    )
    ((images, labels),) = run(
        split, image_size=(32, 32), batch_size=4, augmentation=Augmentation("resized_crop", repeats=2)
    )
    assert labels[:2].tolist() == labels[2:].tolist()
    assert (np.abs(images[:2] - images[2:]).mean(axis=(1, 2, 3)) > 0.1).all()


def test_the_number_of_threads_changes_nothing_with_everything_on(file_split: data.Split) -> None:
    options = {"image_size": (24, 24), "batch_size": 4, "augmentation": EVERYTHING}
    one = run(file_split, threads=1, **options)
    assert_same(one, run(file_split, threads=8, **options))
    other = run(file_split, threads=8, seed=4, **options)
    assert not np.array_equal(one[0][0], other[0][0])


def test_resuming_is_the_same_as_skipping_with_everything_on(file_split: data.Split) -> None:
    options = {"image_size": (24, 24), "batch_size": 4, "augmentation": EVERYTHING}
    assert_same(run(file_split, first_step=1, **options), run(file_split, **options)[1:])


def test_mixing_changes_from_step_to_step_and_labels_stay_probabilities() -> None:
    batches = run(numbered(64), batch_size=8, augmentation=MIXED)
    shares = []
    for images, labels in batches:
        assert images.dtype == labels.dtype == np.float32
        np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-5)
        assert ((labels > 0).sum(axis=1) <= 2).all()
        shares.append(labels[0].max())
    assert len(set(shares)) > 4


@pytest.mark.parametrize("repeats", [1, 2])
def test_names_are_those_of_the_images(file_split: data.Split, repeats: int) -> None:
    assert file_split.files is not None
    batches = run(file_split, batch_size=4, epoch=5, augmentation=Augmentation(repeats=repeats))
    for step, (_, labels) in enumerate(batches):
        names = data.step_names(file_split, 4, 3, 5, step, repeats)
        assert names == [file_split.files[label] for label in labels]
    assert data.step_names(numbered(5), 5, 3, 0, 0) != sorted(data.step_names(numbered(5), 5, 3, 0, 0))
    assert sorted(data.step_names(numbered(5), 5, 3, 0, 0)) == [f"image {index}" for index in range(5)]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"batch_size": 10, "replica_count": 4}, "batch of 10 images cannot be split evenly into 4"),
        ({"batch_size": 12, "replica_count": 2, "parts": 4}, "cannot be split evenly into 8"),
        ({"batch_size": 6, "replica_count": 2, "augmentation": MIXED}, r"even number .* \(given: 3\)"),
        ({"batch_size": 6, "classes": None, "augmentation": MIXED}, r"number of classes \(given: None\)"),
        ({"batch_size": 6, "augmentation": "mosaic"}, 'got "mosaic"'),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        run(numbered(16), **options)

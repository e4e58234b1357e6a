"""What happens to training images and in which order, beyond crops; for who sees which image see test_order.py."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from mobiatt_tf import data
from mobiatt_tf.augment import Augmentation, color_jitter, rand_augment, random_erasing
from mobiatt_tf.data import order

SIZE = (8, 8)
Batches = list[tuple[np.ndarray, np.ndarray]]
_RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
_DEIT = Augmentation("resized_crop", rand_augment=_RAND_AUGMENT, erasing=0.25, mixup=0.8, cutmix=1.0, repeats=3)
_AUGMENTATIONS = {
    "flip_crop": Augmentation("flip_crop"),
    "resized_crop": Augmentation("resized_crop"),
    "color_jitter": Augmentation("flip_crop", color_jitter=0.4),
    "erasing": Augmentation("crop", erasing=0.5),
    "mixing": Augmentation("flip_crop", mixup=0.8, cutmix=1.0),
    "deit": _DEIT,
}


def numbered(count: int) -> data.Split:
    """Grey images in memory that all differ; the label of each is its index."""
    images = np.random.default_rng(count).integers(0, 256, (count, *SIZE, 1), np.uint8)
    return data.Split(np.arange(count, dtype=np.int32), images)


def run(split: data.Split, augmentation: str | Augmentation = "none", threads: int = 0, **options: object) -> Batches:
    arguments = {"image_size": SIZE, "batch_size": 12, "seed": 3, "epoch": 1, "classes": len(split), **options}
    batches = data.train_batches(split, augmentation=augmentation, **arguments)  # type: ignore[arg-type]
    if threads:
        settings_of_tf = tf.data.Options()
        settings_of_tf.threading.private_threadpool_size = threads
        batches = batches.with_options(settings_of_tf)
    return [(images.numpy(), labels.numpy()) for images, labels in batches]


def assert_same(first: Batches, second: Batches) -> None:
    assert len(first) == len(second)
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        np.testing.assert_array_equal(labels, other_labels)
        np.testing.assert_array_equal(images, other_images)


def test_a_worker_gets_its_devices_in_the_order_it_names_them() -> None:
    split = numbered(30)
    everything = run(split, replica_count=3)
    some = run(split, replica_count=3, replicas=[2, 0])
    assert_same(some, [everything[3 * step + replica] for step in range(2) for replica in (2, 0)])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "deit" else []) for name in _AUGMENTATIONS]
)
def test_neither_threads_nor_resuming_change_anything(split: data.Split, name: str) -> None:
    whole = run(split, _AUGMENTATIONS[name], threads=1, batch_size=6)
    assert_same(run(split, _AUGMENTATIONS[name], threads=8, batch_size=6), whole)
    assert_same(run(split, _AUGMENTATIONS[name], threads=8, batch_size=6, first_step=1), whole[1:])


def seeds_of(split: data.Split, repeats: int = 1) -> np.ndarray:
    numbers = order.random_numbers(3, 1, order.AUGMENTATION, len(split) * repeats, 3)
    return numbers[:, :2].astype(np.int64)


@pytest.mark.slow
def test_order_of_the_augmentations(array_split: data.Split) -> None:
    """RandAugment sees grey levels, random erasing what is normalized."""
    chosen = Augmentation(rand_augment=_RAND_AUGMENT, erasing=1.0)
    for images, labels in run(array_split, chosen, image_size=(20, 24), batch_size=4):
        for image, label in zip(images, labels, strict=True):
            seed = tf.constant(seeds_of(array_split)[label])
            expected = data.normalize(rand_augment(array_split.images[label], seed, _RAND_AUGMENT))
            np.testing.assert_allclose(image, random_erasing(expected, seed, 1.0), atol=1e-6)


@pytest.mark.slow
def test_colour_jitter_is_left_out_beside_rand_augment(array_split: data.Split) -> None:
    options = {"image_size": (20, 24), "batch_size": 4}
    for images, labels in run(array_split, Augmentation(color_jitter=0.4), **options):
        for image, label in zip(images, labels, strict=True):
            seed = tf.constant(seeds_of(array_split)[label])
            expected = data.normalize(color_jitter(array_split.images[label], seed, 0.4))
            np.testing.assert_allclose(image, expected, atol=1e-6)
    both = run(array_split, Augmentation(color_jitter=0.4, rand_augment=_RAND_AUGMENT), **options)
    assert_same(both, run(array_split, Augmentation(rand_augment=_RAND_AUGMENT), **options))


def test_mixing_mixes_neighbours_and_their_labels(array_split: data.Split) -> None:
    plain = run(array_split, batch_size=4)
    for (images, labels), (mixed, soft) in zip(
        plain, run(array_split, Augmentation(mixup=1.0), batch_size=4), strict=True
    ):
        assert soft.dtype == np.float32
        np.testing.assert_allclose(soft.sum(axis=1), 1, atol=1e-6)
        for i in range(4):
            share = soft[i, labels[i]]
            np.testing.assert_allclose(soft[i, labels[i ^ 1]], 1 - share, atol=1e-6)
            np.testing.assert_allclose(mixed[i], share * images[i] + (1 - share) * images[i ^ 1], atol=1e-5)
    shares = {float(soft[0].max()) for _, soft in run(array_split, Augmentation(mixup=1.0), batch_size=4)}
    assert len(shares) == 3  # every step draws anew


@pytest.mark.parametrize("name", ["color_jitter", "erasing", "mixing"])
def test_grey_images_become_rgb(name: str) -> None:
    split = numbered(12)
    ((images, _),) = run(split, _AUGMENTATIONS[name], image_size=(16, 12))
    assert images.shape == (12, 16, 12, 3)
    assert np.isfinite(images).all()


def test_element_spec_of_mixed_batches() -> None:
    batches = data.train_batches(
        numbered(40), image_size=SIZE, batch_size=24, seed=0, epoch=0, augmentation=_AUGMENTATIONS["mixing"],
        classes=40, replica_count=2, replicas=[1], parts=3,
    )  # fmt: skip
    assert batches.element_spec == (tf.TensorSpec((12, *SIZE, 3), tf.float32), tf.TensorSpec((12, 40), tf.float32))
    assert batches.cardinality() == 1


def test_resuming_reads_nothing_that_is_skipped_of_other_devices(file_split: data.Split) -> None:
    everything = run(file_split, batch_size=4, replica_count=2)
    for _, labels in everything[1::2]:
        for label in labels:
            Path(file_split.files[label]).unlink()
    assert_same(run(file_split, batch_size=4, replica_count=2, replicas=[0]), everything[0::2])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"replica_count": 5}, "12 images cannot be split evenly into 5"),
        ({"replica_count": 3, "parts": 8}, "cannot be split evenly into 24"),
        ({"augmentation": Augmentation(mixup=0.8), "classes": None}, "number of classes"),
        ({"augmentation": Augmentation(cutmix=1.0), "replica_count": 4}, "even number of images"),
        ({"replica_count": 2, "replicas": [2]}, "replicas must be from 0 to 1"),
        ({"replica_count": 0}, "at least 1"),
        ({"parts": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(numbered(12), **wrong)  # type: ignore[arg-type]

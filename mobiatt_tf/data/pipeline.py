"""From a split to batches of tensors: decoding, resizing, augmentation, normalization."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from mobiatt_tf.augment import CROPS, Augmentation, color_jitter, mix, rand_augment, random_erasing
from mobiatt_tf.data.crops import cut_window, draw_shifts, read_window, resize, resize_and_crop_centre, shift_and_flip
from mobiatt_tf.data.dataset import Dataset, Split
from mobiatt_tf.data.decoding import decode_image
from mobiatt_tf.data.order import AUGMENTATION, MIXING, deal, epoch_order, random_numbers, steps_per_epoch
from mobiatt_tf.data.records import image_bytes

# Of ImageNet's training set, RGB in 0 .. 1, as torchvision and timm have them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

AUGMENTATIONS = CROPS


def normalize(images: tf.Tensor | np.ndarray) -> tf.Tensor:
    """(images / 255 - IMAGENET_MEAN) / IMAGENET_STD.

    Args:
        images: [..., C], C 1 or 3, integer or float, 0 .. 255. One channel is taken as grey.

    Returns:
        float32 [..., 3].
    """
    mean, std = 255 * np.array(IMAGENET_MEAN, np.float32), 255 * np.array(IMAGENET_STD, np.float32)
    images = tf.cast(images, tf.float32)
    width, channels = images.shape[-2:]
    if width is None or channels != 3:
        return (images - mean) / std
    # The same with rows of width * 3: TensorFlow takes .5 ms longer for 224 x 224 where it repeats 3 numbers itself.
    rows = tf.reshape(images, tf.concat([tf.shape(images)[:-2], [width * 3]], 0))  # [..., H, W * 3]
    rows = (rows - np.tile(mean, width)) / np.tile(std, width)
    return tf.ensure_shape(tf.reshape(rows, tf.shape(images)), images.shape)


def train_batches(
    split: Split,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    seed: int,
    epoch: int,
    first_step: int = 0,
    augmentation: str | Augmentation = "none",
    classes: int | None = None,
    replica_count: int = 1,
    replicas: Sequence[int] | None = None,
    parts: int = 1,
) -> tf.data.Dataset:
    """The batches of one epoch, from step `first_step` on; examples that fill no batch are left out of this epoch.

    Args:
        split: what to draw from.
        image_size: (height, width) of the result.
        batch_size: images of a step, over all replicas.
        seed: chooses the order and the augmentation, with `epoch`; 0 or more.
        epoch: 0 or more; every epoch has another order and other augmentation.
        first_step: how many steps to skip. Skipped images are not read.
        augmentation: what happens to the images, or its `crop` alone. Of crops there are
            "none": what `test_batches` does: arrays are resized (also where they have become records), of image files
            the centre is cut out.
            "crop": resize (the whole image, whatever its shape), pad by 1/8 with black on each side, cut the size out
            at random (digits).
            "flip_crop": the same, and flip left to right every other time (small images).
            "resized_crop": cut out a part of 8 % to 100 % of the area with an aspect ratio of 3/4 to 4/3, resize that,
            flip every other time (photographs).
        classes: their number; needed where images are mixed.
        replica_count: devices that share a step.
        replicas: those of them whose images are wanted; without it all.
        parts: in how many parts a device computes its share of a step.

    Returns:
        For each step and each of `replicas`, in this order, a pair (float32 [n, height, width, 3], normalized; int32
        [n], or float32 [n, classes] where images are mixed), with n = batch_size / replica_count. A step's images are
        dealt out part by part: the first 1 / parts of them to the replicas in turn, then the next. So the images of a
        part, over all replicas, do not depend on how many there are.

    Raises:
        ValueError: an argument is outside what is allowed, or the batch cannot be split evenly.
    """
    augmentation = Augmentation(augmentation) if isinstance(augmentation, str) else augmentation
    replicas = range(replica_count) if replicas is None else replicas
    steps = _check(split, image_size, batch_size, seed, epoch, first_step, augmentation, classes, replica_count * parts)
    if not all(0 <= replica < replica_count for replica in replicas):
        raise ValueError(f"replicas must be from 0 to {replica_count - 1}, got {list(replicas)}.")
    share = batch_size // replica_count

    examples, draws = (
        deal(order, first_step, parts, replica_count, replicas)  # [elements, share]
        for order in epoch_order(len(split), batch_size, seed, epoch, augmentation.repeats)
    )
    numbers = random_numbers(seed, epoch, AUGMENTATION, len(split) * augmentation.repeats, 3)
    shifts = draw_shifts(numbers, image_size, flip=augmentation.crop == "flip_crop")
    seeds = numbers[:, :2].astype(np.int64)
    mixing_seeds = random_numbers(seed, epoch, MIXING, steps, 2)[first_step:].astype(np.int64)
    mixing_seeds = mixing_seeds.repeat(len(replicas), axis=0)

    with tf.device("CPU:0"):  # the arrays must not take up an accelerator's memory
        labels = tf.constant(split.labels)

        def finish(images: tf.Tensor, indices: tf.Tensor, mixing_seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            images = tf.ensure_shape(images, [share, *image_size, 3])
            if not augmentation.mixes:
                return images, tf.gather(labels, indices)
            return mix(images, tf.one_hot(tf.gather(labels, indices), classes), mixing_seed, augmentation)

        if _is_done_one_by_one(split, augmentation):
            stored = _reader(split)
            prepare = image_maker(image_size, augmentation, split.whole_images)
            order = draws.reshape(-1)
            images = (
                tf.data.Dataset.from_tensor_slices((examples.reshape(-1), seeds[order], shifts[order]))
                .map(lambda index, *draw: prepare(stored(index), *draw), num_parallel_calls=tf.data.AUTOTUNE)
                .batch(share, drop_remainder=True)
            )
            others = tf.data.Dataset.from_tensor_slices((examples, mixing_seeds))
            batches = tf.data.Dataset.zip(images, others).map(
                lambda images, others: finish(images, *others), num_parallel_calls=tf.data.AUTOTUNE
            )
        else:
            pixels = tf.constant(split.images)

            def prepare_all(indices: tf.Tensor, draws: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                images = resize(tf.gather(pixels, indices), image_size)
                if augmentation.crop != "none":
                    images = shift_and_flip(tf.ensure_shape(images, [share, *image_size, None]), draws)
                return finish(normalize(images), indices, seed)

            batches = tf.data.Dataset.from_tensor_slices((examples, shifts[draws], mixing_seeds)).map(
                prepare_all, num_parallel_calls=tf.data.AUTOTUNE
            )
    return batches.prefetch(tf.data.AUTOTUNE)


def test_batches(split: Split, *, image_size: tuple[int, int], batch_size: int) -> tf.data.Dataset:
    """The whole split in its order; the last batch may be smaller.

    Image files are resized (bicubic), for a square `image_size` until that is 224/256 of the short side, and the centre
    is cut out. Arrays are resized where their size differs, also where they have become records.

    Args:
        split: what to go through.
        image_size: (height, width) of the result.
        batch_size: images in a batch, the last one excepted.

    Returns:
        (float32 [B, height, width, 3], normalized; int32 [B]) pairs.

    Raises:
        ValueError: an argument is outside what is allowed.
    """
    _check_image_size(image_size)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    with tf.device("CPU:0"):
        if split.images is not None:
            examples = tf.data.Dataset.from_tensor_slices((split.images, split.labels)).batch(batch_size)
        else:
            read = image_bytes(split)
            shown = resize if split.whole_images else resize_and_crop_centre

            def prepare(index: tf.Tensor) -> tf.Tensor:
                return tf.ensure_shape(shown(decode_image(read(index)), image_size), [*image_size, 3])

            examples = (
                tf.data.Dataset.from_tensor_slices((np.arange(len(split)), split.labels))
                .map(
                    lambda index, label: (prepare(index), label),
                    num_parallel_calls=tf.data.AUTOTUNE,
                )
                .batch(batch_size)
            )

        def finish(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return tf.ensure_shape(normalize(resize(images, image_size)), [None, *image_size, 3]), labels

        return examples.map(finish, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def calibration_batches(dataset: Dataset, image_size: tuple[int, int], count: int) -> tf.data.Dataset:
    """The first `count` training images, prepared as test images, in batches of 32: what ranges are set from."""
    return test_batches(dataset.train.take(count), image_size=image_size, batch_size=32)


def _is_done_one_by_one(split: Split, augmentation: Augmentation) -> bool:
    """Whether every image needs work of its own; else a whole batch of arrays is cut and flipped at once."""
    return (
        split.images is None
        or augmentation.crop == "resized_crop"
        or bool(augmentation.rand_augment or augmentation.color_jitter or augmentation.erasing)
    )


def _reader(split: Split) -> Callable[[tf.Tensor], tf.Tensor]:
    """A function from an index, int64 [], to what is stored: pixels uint8 [H, W, C], or an encoded image, string []."""
    if split.images is None:
        return image_bytes(split)
    pixels = tf.constant(split.images)
    return lambda index: pixels[index]


@functools.lru_cache(maxsize=8)
def image_maker(
    image_size: tuple[int, int], augmentation: Augmentation, whole_images: bool = False
) -> Callable[..., tf.Tensor]:
    """A function that does all to one image but repeating and mixing; the same one in every epoch.

    Tracing RandAugment takes seconds, so that is done once.

    Args:
        image_size: (height, width).
        augmentation: what to do.
        whole_images: whether the crop "none" resizes the whole image in place of cutting out its centre; see `Split`.

    Returns:
        A function of what is stored (pixels uint8 [H, W, C], or an encoded image, string []), the seed of everything
        but shifts, int64 [2], and shift and flip, int32 [3]; it gives float32 [height, width, 3], normalized.
    """

    def cropped(stored: tf.Tensor, seed: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
        is_file = stored.dtype == tf.string
        if augmentation.crop == "resized_crop":
            window, flip = read_window(stored, seed) if is_file else cut_window(stored, seed)
            image = tf.cast(resize(window, image_size), tf.float32)
            return tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)  # a slice takes ten times as long
        image = decode_image(stored) if is_file else stored
        if augmentation.crop == "none":
            return resize(image, image_size) if whole_images else resize_and_crop_centre(image, image_size)
        image = tf.ensure_shape(resize(image, image_size), [*image_size, None])
        return shift_and_flip(image[tf.newaxis], shift[tf.newaxis])[0]

    def prepare(stored: tf.Tensor, seed: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
        image = tf.ensure_shape(cropped(stored, seed, shift), [*image_size, None])
        if augmentation.rand_augment or augmentation.color_jitter:
            image = tf.cast(tf.round(tf.cast(image, tf.float32)), tf.uint8)
            image = tf.broadcast_to(image, [*image_size, 3])  # grey has one channel
            if augmentation.rand_augment:
                image = rand_augment(image, seed, augmentation.rand_augment)
            else:
                image = color_jitter(image, seed, augmentation.color_jitter)
        image = normalize(image)
        return random_erasing(image, seed, augmentation.erasing) if augmentation.erasing else image

    return tf.function(prepare, autograph=False)


def _check(
    split: Split,
    image_size: tuple[int, int],
    batch_size: int,
    seed: int,
    epoch: int,
    first_step: int,
    augmentation: Augmentation,
    classes: int | None,
    pieces: int,
) -> int:
    """Raises ValueError for what `train_batches` does not allow; returns the steps of an epoch."""
    _check_image_size(image_size)
    if min(seed, epoch) < 0:
        raise ValueError(f"seed and epoch must be 0 or more, got {seed} and {epoch}.")
    steps = steps_per_epoch(split, batch_size)
    if not 0 <= first_step <= steps:
        raise ValueError(f"first_step must be from 0 to {steps}, the steps of an epoch, got {first_step}.")
    if pieces < 1:
        raise ValueError("replica_count and parts must be at least 1.")
    if batch_size % pieces:
        raise ValueError(f"A batch of {batch_size} images cannot be split evenly into {pieces}.")
    if augmentation.mixes and (classes is None or batch_size // pieces % 2):
        raise ValueError(
            f"Mixing needs the number of classes (given: {classes}) and an even number of images for each part of a "
            f"device's share (given: {batch_size // pieces})."
        )
    return steps


def _check_image_size(image_size: tuple[int, int]) -> None:
    if len(image_size) != 2 or min(image_size) < 1:
        raise ValueError(f"image_size must be (height, width), each at least 1, got {image_size}.")

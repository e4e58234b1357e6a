"""Feeds images through this project's augmentation or through Keras', on one core; benchmarks/feeding.py starts it.

Reads lines "stage images" from standard input and writes the seconds that so many images took. The answer to a stage
that it does not have is "none".
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SIZE = 224
BATCH = 32
CLASSES = 1000


def ours(paths: list[str], stage: str) -> Iterator[object]:
    """Batches of "decode", "crop" or "full", without end, made by the functions that `data.train_batches` uses."""
    import tensorflow as tf

    from mobiatt_tf.augment import Augmentation, mix
    from mobiatt_tf.data.crops import read_window, resize
    from mobiatt_tf.data.pipeline import image_maker

    augmentation = Augmentation("resized_crop", "rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0)
    whole = image_maker((SIZE, SIZE), augmentation)

    def prepare(index: tf.Tensor, path: tf.Tensor) -> tf.Tensor:
        content, seed = tf.io.read_file(path), tf.stack([index, index])
        if stage == "decode":
            return tf.size(tf.io.decode_jpeg(content, channels=3))
        if stage == "crop":
            window, flip = read_window(content, seed)
            image = tf.cast(tf.round(resize(window, (SIZE, SIZE))), tf.uint8)
            return tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)
        return tf.ensure_shape(whole(content, seed, tf.zeros([3], tf.int32)), [SIZE, SIZE, 3])

    labels = tf.one_hot(tf.range(BATCH), CLASSES)
    dataset = tf.data.Dataset.from_tensor_slices(paths).repeat().enumerate().map(prepare).batch(BATCH, True)
    if stage == "full":
        dataset = dataset.enumerate().map(
            lambda step, images: mix(images, labels, tf.stack([step, step]), augmentation)
        )
    return iter(dataset.with_options(_one_thread()))


def keras_rand_augment(paths: list[str], stage: str) -> Iterator[object]:
    """Batches of images that lie in memory in their final size, through `keras.layers.RandAugment`, without end."""
    import keras
    import tensorflow as tf

    if stage != "rand_augment":
        raise KeyError(stage)
    layer = keras.layers.RandAugment(value_range=(0, 255), num_ops=2, factor=0.9)
    images = [tf.image.resize(tf.io.decode_jpeg(tf.io.read_file(path)), [SIZE, SIZE]) for path in paths]
    dataset = tf.data.Dataset.from_tensor_slices(tf.stack(images)).cache().repeat().batch(BATCH)
    dataset = dataset.map(lambda batch: layer(batch, training=True))
    return iter(dataset.with_options(_one_thread()))


def ours_rand_augment(paths: list[str]) -> Iterator[object]:
    """The same through this project's RandAugment."""
    import tensorflow as tf

    from mobiatt_tf.augment import rand_augment

    images = [tf.image.resize(tf.io.decode_jpeg(tf.io.read_file(path)), [SIZE, SIZE]) for path in paths]
    images = tf.cast(tf.round(tf.stack(images)), tf.uint8)
    dataset = tf.data.Dataset.from_tensor_slices(images).cache().repeat().enumerate()
    dataset = dataset.map(lambda index, image: rand_augment(image, tf.stack([index, index]), "rand-m9-mstd0.5-inc1"))
    return iter(dataset.batch(BATCH).with_options(_one_thread()))


def _one_thread() -> object:
    import tensorflow as tf

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    options.autotune.enabled = False
    options.deterministic = True
    return options


def main() -> None:
    """Answers until the input ends."""
    name, folder = sys.argv[1:]
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    paths = sorted(str(path) for path in Path(folder).glob("*.jpg"))
    batches: dict[str, Iterator[object]] = {}
    for line in sys.stdin:
        stage, images = line.split()
        if stage not in batches:
            try:
                make = keras_rand_augment if name == "keras" else ours
                rand_augment_of_ours = name == "mobiatt_tf" and stage == "rand_augment"
                batches[stage] = ours_rand_augment(paths) if rand_augment_of_ours else make(paths, stage)
            except KeyError:
                print("none", flush=True)
                continue
            next(batches[stage])  # traced, and warm
        start = time.perf_counter()
        for _ in range(int(images) // BATCH):
            next(batches[stage])
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()

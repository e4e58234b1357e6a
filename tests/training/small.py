"""A small model and dataset, and runs of them in a process of their own (python -m tests.training.small ACTION DIR)."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_models import DeiTMobiAtt
from mobiatt_tf import data, training
from mobiatt_tf.errors import UserError
from mobiatt_tf.training.optimizer import make_optimizer
from mobiatt_tf.training.step import make_run_steps
from mobiatt_tf.training.strategy import MakeBatches, distribute

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 3


def make_model(dropout: float = 0.0, synchronized: bool = True, size: int = 8, l2: float = 0.0) -> keras.Model:
    """Convolution, batch norm, layer norm, dropout and dense (with an L2 loss) on size x size images."""
    images = keras.Input((size, size, 3))
    # No bias: batch norm takes it out, so that its gradient is rounding noise, which AdamW scales up to whole steps.
    x = keras.layers.Conv2D(4, 3, strides=2, use_bias=False, name="convolution")(images)
    x = keras.layers.BatchNormalization(synchronized=synchronized, momentum=0.9, name="batch_norm")(x)
    x = keras.layers.Flatten(name="flatten")(keras.layers.ReLU(name="relu")(x))
    x = keras.layers.LayerNormalization(name="layer_norm")(x)
    x = keras.layers.Dropout(dropout, name="dropout")(x)
    head = keras.layers.Dense(CLASSES, name="head", dtype="float32", kernel_regularizer=keras.regularizers.L2(l2))
    return keras.Model(images, head(x))


def make_dataset(train: int = 96, test: int = 23, seed: int = 0) -> data.Dataset:
    """Noise on a colour per class: 8 x 8 RGB images that can be learnt but not by heart in a step."""
    generator = np.random.default_rng(seed)
    colours = generator.integers(60, 200, (CLASSES, 1, 1, 3))

    def split(count: int) -> data.Split:
        labels = generator.integers(0, CLASSES, count).astype(np.int32)
        images = colours[labels] + generator.normal(0, 60, (count, 8, 8, 3))
        return data.Split(labels=labels, images=images.clip(0, 255).astype(np.uint8))

    return data.Dataset("colours", ("red", "green", "blue"), split(train), split(test))


def recipe(**changes: int | float | bool | str) -> training.Recipe:
    """Four epochs of six steps, with everything switched on that a small model can show."""
    values = {"epochs": 4, "batch_size": 16, "learning_rate": 1e-2, "warmup_epochs": 0.5, "ema_decay": 0.9, **changes}
    return training.Recipe(**values)  # type: ignore[arg-type]


def spread(images: Any, labels: Any, steps: int = 1) -> MakeBatches:
    """`steps` times the same batch, in equal shares for the devices: what `distribute` takes."""

    def make_batches(count: int, replicas: Sequence[int]) -> tf.data.Dataset:
        shares = [np.split(np.asarray(array), count) for array in (images, labels)]
        elements = tuple(np.stack([share[replica] for replica in replicas]) for share in shares)
        return tf.data.Dataset.from_tensor_slices(elements).repeat(steps)

    return make_batches


def read_lines(directory: Path) -> list[dict[str, Any]]:
    """The log's lines without what differs from run to run: the speed."""
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def losses(directory: Path) -> np.ndarray:
    """The losses of the log's training lines, in order."""
    return np.array([line["loss"] for line in read_lines(directory) if line["kind"] == "train"])


def final_weights(directory: Path) -> dict[str, np.ndarray]:
    """Every variable of the newest checkpoint: weights, optimizer and averages."""
    newest = max((directory / "checkpoints").glob("*.index"))
    reader = tf.train.load_checkpoint(str(newest.with_suffix("")))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def assert_same_run(resumed: Path, whole: Path) -> None:
    """Two finished runs have the same log and, bit by bit, the same variables."""
    assert read_lines(resumed) == read_lines(whole)
    left, right = final_weights(resumed), final_weights(whole)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def wait_for_step(process: subprocess.Popen[str], directory: Path, step: int, seconds: float = 120) -> None:
    """Returns when the log of a run that is under way has the line of this step."""
    log = directory / "log.jsonl"
    deadline = time.monotonic() + seconds
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def start(action: str, directory: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Starts an action of this module in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.small", action, str(directory)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _long_run(directory: Path) -> None:
    """Four epochs of 250 steps with dropout, average and checkpoints every 40 steps, deterministic to the bit."""
    tf.config.experimental.enable_op_determinism()
    training.train(
        lambda: make_model(dropout=0.3, synchronized=False),
        make_dataset(train=1000),
        recipe(epochs=4, batch_size=4, clip_norm=1.0, augmentation="flip_crop"),
        directory,
        training.make_strategy("one"),
        cadence=training.Cadence(log_every=7, checkpoint_steps=40),
    )


def _mirrored_run(directory: Path) -> None:
    """The same 20 steps on one device and on two, without and with clipping; then gradients.json and masks.json."""
    training.make_logical_cpu_devices(2)
    for name, strategy_name, clip_norm in (
        ("one", "one", 0.0),
        ("two", "mirrored", 0.0),
        ("one_clipped", "one", 0.1),
        ("two_clipped", "mirrored", 0.1),
    ):
        training.train(
            make_model,
            make_dataset(train=160, test=23),
            recipe(epochs=2, batch_size=16, clip_norm=clip_norm),
            directory / name,
            training.make_strategy(strategy_name),
            cadence=training.Cadence(log_every=1),
        )
    for name, strategy_name in (("one", "one"), ("two", "mirrored")):
        _by(strategy_name, directory / f"{name}_everything")
        _by(strategy_name, directory / f"{name}_bfloat16", precision="mixed_bfloat16")
    for name, strategy_name, parts in (("one", "one", 2), ("two", "mirrored", 1)):
        _deit_run(directory / f"{name}_deit", strategy_name, parts)
    gradients = {name: _first_gradients(training.make_strategy(name)) for name in ("one", "mirrored")}
    (directory / "gradients.json").write_text(json.dumps({**gradients, "tape": _tape_gradients()}))
    (directory / "masks.json").write_text(json.dumps(_dropout_masks(training.make_strategy("mirrored"))))


_EVERYTHING: dict[str, Any] = {
    "accumulation": 2,
    "adaptive_clip": 0.05,
    "augmentation": "flip_crop",
    "clip_norm": 1.0,
    "cutmix": 1.0,
    "erasing": 0.25,
    "mixup": 0.8,
    "repeats": 2,
}


def _by(strategy: str, directory: Path, steps: int = 20, **changes: Any) -> None:
    """A run with all that a recipe can switch on and that draws nothing for each device."""
    training.train(
        make_model,
        make_dataset(train=8 * steps, test=23),
        recipe(epochs=2, batch_size=16, **{**_EVERYTHING, **changes}),
        directory,
        training.make_strategy(strategy),
        cadence=training.Cadence(log_every=1 if steps == 20 else 7, checkpoint_steps=40),
    )


def _deit_run(directory: Path, strategy: str, parts: int) -> None:
    """Six steps of a DeiT with attention dropout, drop path, layer-wise decay and two heads."""
    training.train(
        lambda: DeiTMobiAtt("quickstart", num_classes=CLASSES, drop_path=0.3, distilled=True),
        make_dataset(train=96),
        recipe(epochs=1, batch_size=16, learning_rate=1e-3, layer_decay=0.7, accumulation=parts, ema_decay=0.0),
        directory,
        training.make_strategy(strategy),
        cadence=training.Cadence(log_every=1),
    )


def _workers_by_index(directory: Path) -> None:
    """Workers that were started with seeds of their own."""
    _by("multi_worker", directory, seed=json.loads(os.environ["TF_CONFIG"])["task"]["index"])


def _long_workers(directory: Path) -> None:
    tf.config.experimental.enable_op_determinism()
    _by("multi_worker", directory, steps=200)


def _first_batch() -> tuple[tf.Tensor, tf.Tensor]:
    batches = data.train_batches(make_dataset().train, image_size=(8, 8), batch_size=16, seed=0, epoch=0)
    images, labels = next(iter(batches))
    return images, labels


def _first_gradients(strategy: tf.distribute.Strategy) -> list[list[float]]:
    """The gradient of each variable in the first training step, as AdamW got it.

    AdamW's steps do not change when the gradient is multiplied by a constant, but its first moments do: they start at 0
    and are (1 - beta_1) times the gradient after one step.
    """
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = make_model(l2=0.1)
        settings = recipe(batch_size=16)
        optimizer = make_optimizer(settings, 6, model)
        run_steps = make_run_steps(model, optimizer, None, settings, strategy)
        run_steps(distribute(strategy, spread(*_first_batch())), tf.constant(1))
        return [(moment.numpy() / (1 - optimizer.beta_1)).ravel().tolist() for moment in optimizer._momentums]


def _tape_gradients() -> list[list[float]]:
    """The same gradients with Keras' own loss and no strategy."""
    keras.utils.set_random_seed(0)
    model = make_model(l2=0.1)
    images, labels = _first_batch()
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=recipe().label_smoothing)
    with tf.GradientTape() as tape:
        total = loss(tf.one_hot(labels, CLASSES), model(images, training=True)) + tf.add_n(model.losses)
    gradients = tape.gradient(total, [variable.value for variable in model.trainable_variables])
    return [gradient.numpy().ravel().tolist() for gradient in gradients]


@keras.saving.register_keras_serializable(package="tests")
class _Record(keras.layers.Layer):
    """Passes on [1, 64] and keeps it; each device has its own copy, as no aggregation is asked for."""

    def build(self, _: tuple[int | None, ...]) -> None:
        self.seen = self.add_weight(shape=(64,), initializer="zeros", trainable=False, aggregation="none", name="seen")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        self.seen.assign(inputs[0])
        return inputs


def _dropout_masks(strategy: tf.distribute.Strategy) -> list[list[list[int]]]:
    """Which of 64 elements dropout keeps, by step and device, in three training steps on an input of ones."""
    masks = []
    with strategy.scope():
        images = keras.Input((8, 8, 3))
        record = _Record(name="record")
        x = record(keras.layers.Dropout(0.5)(keras.layers.Flatten()(images)[:, :64]))
        model = keras.Model(images, keras.layers.Dense(CLASSES)(x))
        settings = recipe(batch_size=2)
        run_steps = make_run_steps(model, make_optimizer(settings, 6, model), None, settings, strategy)
        iterator = distribute(strategy, spread(tf.ones((2, 8, 8, 3)), tf.zeros(2, tf.int32), steps=3))
        for _ in range(3):
            run_steps(iterator, tf.constant(1))
            copies = strategy.experimental_local_results(record.seen.value)
            masks.append([(copy.numpy() > 0).astype(int).tolist() for copy in copies])
    return masks


_ACTIONS: dict[str, Callable[[Path], None]] = {
    "long": _long_run,
    "mirrored": _mirrored_run,
    "alone": lambda directory: _by("one", directory),
    "workers": lambda directory: _by("multi_worker", directory),
    "long_workers": _long_workers,
    "workers_by_index": _workers_by_index,
}


def _main() -> None:
    action, directory = sys.argv[1:]
    try:
        _ACTIONS[action](Path(directory))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except training.TrainingInterrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(interruption.exit_status)


if __name__ == "__main__":
    _main()

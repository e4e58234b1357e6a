"""Small models and their images; and runs in a process of their own (python -m tests.quantization.small DIR)."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_models
from mobiatt_tf import quantization
from mobiatt_tf.layers import ConvBN, MobileAttention, PatchEmbedding
from mobiatt_tf.quantization.aware import projections, quantizers
from mobiatt_tf.verification import photographs

to_numpy = keras.ops.convert_to_numpy
ROOT = Path(__file__).resolve().parents[2]
FAMILIES = tuple(keras_models.FAMILIES)
POLICIES = tuple(quantization.POLICIES)
CLASSES = 4


def make_model(family: str, **arguments: Any) -> keras.Model:
    """The smallest model of a family, with statistics in its batch norms as after training."""
    model = keras_models.FAMILIES[family].build("quickstart", **{"num_classes": CLASSES, **arguments})
    randomize_norms(model)
    return model


def randomize_norms(model: keras.Model) -> None:
    """Random scales, offsets and moving statistics in every batch norm; layer scales of .1, where branches matter."""
    generator = np.random.default_rng(0)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            for weight in (layer.gamma, layer.moving_variance):
                weight.assign(generator.uniform(0.5, 1.5, weight.shape))
            for weight in (layer.beta, layer.moving_mean):
                weight.assign(generator.normal(0, 0.3, weight.shape))
    for weight in model.weights:
        if weight.path.endswith("/scale"):
            weight.assign(np.full(weight.shape, 0.1, "float32"))


def make_tiny_model() -> keras.Model:
    """Two convolutions, one with a folded batch norm, and a dense head on 8 x 8 images."""
    keras.utils.set_random_seed(0)
    images = keras.Input((8, 8, 3), name="images")
    x = keras.layers.Conv2D(4, 3, activation="relu", name="conv")(images)
    x = ConvBN(6, 3, 2, name="conv_bn")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(images, keras.layers.Dense(CLASSES, name="head")(x))
    randomize_norms(model)
    return model


@functools.cache
def float_model(family: str) -> keras.Model:
    """`make_model`, made once: for tests that do not change it."""
    return make_model(family)


@functools.cache
def images_of(family: str, count: int = 4) -> np.ndarray:
    """Crops of photographs in the size of the family's smallest model, float32 [count, height, width, 3]."""
    return photographs(float_model(family).input_shape[1:3], count)


@functools.cache
def quantized_model(family: str, policy: str) -> keras.Model:
    """The calibrated copy of `float_model`, made once: for tests that do not change it."""
    return calibrated(float_model(family), policy, images_of(family))


def calibrated(model: keras.Model, policy: str, images: np.ndarray) -> keras.Model:
    """A fresh quantized copy with ranges from `images`."""
    copy = quantization.quantize_aware(model, policy)
    quantization.calibrate(copy, [images])
    return copy


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal float32 noise."""
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def relative_error(expected: Any, actual: Any) -> float:
    """Root mean square of the difference, divided by that of `expected`."""
    expected, actual = to_numpy(expected), to_numpy(actual)
    return float(np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2)))


def values_of(model: keras.Model) -> dict[str, np.ndarray]:
    """All weights by path, copied."""
    return {weight.path: to_numpy(weight).copy() for weight in model.weights}


def changed(before: dict[str, np.ndarray], model: keras.Model) -> set[str]:
    """The paths of the weights that are not what they were."""
    now = values_of(model)
    assert now.keys() == before.keys()
    return {path for path, value in before.items() if not np.array_equal(value, now[path], equal_nan=True)}


def ranges_of(model: keras.Model) -> dict[str, tuple[float, float]]:
    """The ranges of all fake quantizations by path."""
    return {quantizer.path: quantizer.range for quantizer in quantizers(model)}


def grid_distance(model: keras.Model) -> float:
    """How far the kernels lie from their int8 steps at most, in steps (0 to .5)."""
    farthest = 0.0
    for projection in projections(model):
        kernel = to_numpy(projection.effective_kernel()).astype("float64")
        flat = kernel.reshape(-1, kernel.shape[projection.channel_axis])  # [inputs, channels]
        steps = flat / (np.abs(flat).max(axis=0) / 127)
        farthest = max(farthest, float(np.abs(steps - np.round(steps)).max()))
    return farthest


def run_python(*arguments: str) -> str:
    """What a Python process of its own prints, without GPUs; fails with what it says if it fails."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def _mirrored_step(directory: Path) -> None:
    """One training step of 4 images on two devices; then mirrored.json with the ranges on each and the images' own."""
    import tensorflow as tf

    from mobiatt_tf import training
    from mobiatt_tf.training.optimizer import make_optimizer
    from mobiatt_tf.training.step import make_run_steps
    from mobiatt_tf.training.strategy import distribute
    from tests.training.small import spread

    training.make_logical_cpu_devices(2)
    strategy = training.make_strategy("mirrored")
    pixels = noise(4, 8, 8, 3) * np.arange(1, 5, dtype="float32").reshape(4, 1, 1, 1)  # the devices' ranges differ
    with strategy.scope():
        keras.utils.set_random_seed(0)
        images = keras.Input((8, 8, 3), name="images")
        x = PatchEmbedding(2, 16, name="patches")(images)
        x = keras.layers.GlobalAveragePooling1D(name="pool")(MobileAttention(2, name="attention")(x))
        plain = keras.Model(images, keras.layers.Dense(CLASSES, name="head")(x))
        model = calibrated(plain, "int8_full", pixels[:2])
        before, values = ranges_of(model), values_of(model)
        recipe = training.Recipe(epochs=1, batch_size=4, learning_rate=1e-2, warmup_epochs=0.0, ema_decay=0.0)
        run_steps = make_run_steps(model, make_optimizer(recipe, 1, model), None, recipe, strategy)
        batches = spread(pixels, np.arange(4, dtype="int32") % CLASSES)
        loss = run_steps(distribute(strategy, batches), tf.constant(1))
        copies = {
            weight.path: [to_numpy(copy).tolist() for copy in strategy.experimental_local_results(weight.value)]
            for weight in model.weights
        }
    result = {
        "loss": float(loss[0]),
        "copies": copies,
        "before": before,
        "changed": sorted(changed(values, model)),
        "minima": [float(half.min()) for half in np.split(pixels, 2)],
        "maxima": [float(half.max()) for half in np.split(pixels, 2)],
    }
    (directory / "mirrored.json").write_text(json.dumps(result))


if __name__ == "__main__":
    _mirrored_step(Path(sys.argv[1]))

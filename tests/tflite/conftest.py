"""Small real .tflite files, converted once per session, and results of benchmarks."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from tests.tflite import report_results
from tflite.measurements import Measurements


def _gelu(x):
    return 0.5 * x * (1 + ops.erf(x / np.sqrt(2)))


def encoder() -> keras.Model:
    """One block of a softmax vision transformer, 16 tokens of width 16, ten classes."""
    image = keras.Input(shape=(16, 16, 3), batch_size=1, name="image")
    x = layers.Reshape((16, 16))(layers.Conv2D(16, 4, 4)(image))  # (1, N, D)
    y = layers.LayerNormalization(epsilon=1e-6)(x)
    x = x + layers.MultiHeadAttention(2, 8)(y, y)
    y = layers.Dense(64)(layers.LayerNormalization(epsilon=1e-6)(x))
    x = x + layers.Dense(16)(layers.Activation(_gelu)(y))
    return keras.Model(image, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))  # (1, 10)


def power() -> keras.Model:
    """Two dense layers around POW, which XNNPACK does not take."""
    features = keras.Input(shape=(8,), batch_size=1, name="features")
    x = ops.power(ops.abs(layers.Dense(16)(features)) + 1.0, ops.sigmoid(features[:, :1]))
    return keras.Model(features, layers.Dense(4)(x))


def divide() -> keras.Model:
    """A quotient, which in int8 ends the process when a divisor quantizes to 0."""
    x = keras.Input(shape=(4096,), batch_size=1, name="x")
    return keras.Model(x, (x + 1.0) / x)


def dynamic() -> keras.Model:
    """A model with a free batch size."""
    x = keras.Input(shape=(8,), name="x")
    return keras.Model(x, layers.Dense(4)(x))


def convert(model: keras.Model, *, int8: bool = False) -> bytes:
    """Converts with TensorFlow's converter, quantized to full int8 on random data if asked."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if int8:
        random = np.random.default_rng(0)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: (
            [random.normal(size=model.input_shape).astype("float32")] for _ in range(4)
        )
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    return converter.convert()


def convert_function(function, shape: tuple[int, ...]) -> bytes:
    """Converts one TensorFlow function that TensorFlow Lite's own operators do not cover."""
    concrete = tf.function(function).get_concrete_function(tf.TensorSpec(shape))
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], tf.Module())
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS]
    converter.allow_custom_ops = True
    return converter.convert()


@pytest.fixture(scope="session")
def tflite_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paths by name: float, int8 (the same encoder), power, divide, dynamic, flex, custom."""
    directory = tmp_path_factory.mktemp("tflite")
    keras.utils.set_random_seed(0)
    model = encoder()
    contents = {
        "float": convert(model),
        "int8": convert(model, int8=True),
        "power": convert(power()),
        "divide": convert(divide(), int8=True),
        "dynamic": convert(dynamic()),
        "flex": convert_function(tf.linalg.inv, (1, 3, 3)),  # goes through the Flex delegate
        "custom": convert_function(tf.math.digamma, (1, 8)),  # Flex has no such operator either
    }
    for name, content in contents.items():
        (directory / f"{name}.tflite").write_bytes(content)
    return {name: directory / f"{name}.tflite" for name in contents}


@pytest.fixture(scope="session")
def measured(tflite_files: dict[str, Path]) -> Measurements:
    """A benchmark of this computer, for the reports."""
    return report_results.measure(tflite_files)


@pytest.fixture(scope="session")
def paths(measured: Measurements, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Its JSON, and that of devices that are test fixtures."""
    return report_results.write_results(tmp_path_factory.mktemp("results"), measured)


@pytest.fixture(scope="session")
def hostile(measured: Measurements, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A JSON whose every text is HTML, and that text."""
    return report_results.write_hostile(tmp_path_factory.mktemp("hostile"), measured)

"""Operators that are taken back to float: inside XNNPACK's partition, nearer to the model, the rest untouched."""

from pathlib import Path

import keras
import numpy as np
import pytest

from mobiatt_tf import ops, quantization
from mobiatt_tf.models import rebuild
from tests.tflite.int8_ops import int8_operators
from tflite import convert, float_ops, inspect
from tflite.verify import run_file


@pytest.fixture(scope="module")
def quantized() -> tuple[keras.Model, np.ndarray]:
    """Dense, GELU, dense, sigmoid: the first is followed by int8 on both sides, the last by nothing."""
    keras.utils.set_random_seed(0)
    images = keras.Input((4, 4, 3))
    x = keras.layers.Dense(16)(keras.layers.Flatten()(images))
    x = keras.layers.Dense(8)(keras.layers.Activation(ops.gelu)(x))
    x = keras.layers.Activation("sigmoid")(keras.layers.Reshape((2, 4))(x))
    model = keras.Model(images, keras.layers.LayerNormalization()(keras.layers.Flatten()(x)))
    copy = quantization.quantize_aware(model)
    inputs = np.random.default_rng(0).normal(size=(64, 4, 4, 3)).astype("float32")
    quantization.calibrate(copy, [inputs])
    return copy, inputs


def as_tensorflow_has_it(model: keras.Model) -> bytes:
    copy = rebuild(model, batch_size=1)
    quantization.bake(copy)
    return convert.through_converter(copy, "int8", int8=True)


def test_float_operators_are_delegated_and_nearer_to_the_model(
    quantized: tuple[keras.Model, np.ndarray], tmp_path: Path
) -> None:
    model, inputs = quantized
    expected = keras.ops.convert_to_numpy(model(inputs))
    errors = {}
    for name, content in (("before", as_tensorflow_has_it(model)), ("after", convert.convert(model))):
        path = tmp_path / f"{name}.tflite"
        path.write_bytes(content)
        description = inspect.describe(path)
        errors[name] = float(np.abs(run_file(path, inputs) - expected).mean())
        if name == "before":
            assert {"GELU", "LOGISTIC"} <= int8_operators(path).keys()
            assert description.undelegated_ops == {"GELU": 1}
        else:
            assert not {"GELU", "LOGISTIC"} & int8_operators(path).keys()
            assert description.undelegated_ops == {}
            assert description.delegate_partitions == 1
    assert errors["after"] < 0.5 * errors["before"]


def test_nothing_changes_where_there_is_nothing_to_do(quantized: tuple[keras.Model, np.ndarray]) -> None:
    content = convert.convert(quantized[0])
    assert float_ops.to_float(content) == content
    assert float_ops.to_float(as_tensorflow_has_it(quantized[0]), operators=("DIV",)) == as_tensorflow_has_it(
        quantized[0]
    )


def test_an_operator_whose_result_stays_int8_is_followed_by_quantize(
    quantized: tuple[keras.Model, np.ndarray], tmp_path: Path
) -> None:
    """Only the detour int8 -> float of what was made here goes; the int8 dense layer behind GELU keeps its input."""
    before, after = tmp_path / "before.tflite", tmp_path / "after.tflite"
    before.write_bytes(as_tensorflow_has_it(quantized[0]))
    after.write_bytes(float_ops.to_float(before.read_bytes(), operators=("GELU",)))
    counts = [inspect.describe(path).op_counts for path in (before, after)]
    assert counts[1].get("QUANTIZE", 0) == counts[0].get("QUANTIZE", 0) + 1
    assert counts[1]["DEQUANTIZE"] == counts[0]["DEQUANTIZE"] + 1
    assert int8_operators(after)["FULLY_CONNECTED"] == 2

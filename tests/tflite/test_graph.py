"""What the converter makes of our graphs: counts of operators, which decide how a phone will run them."""

import contextlib
import functools
import io
from collections import Counter
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

import keras_models
from mobiatt_tf import layers
from tflite import convert, inspect, verify

NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
FAMILIES = ["deit", "pvt_v2", "efficientformer_v2"]
MIXED = {"deit": ("mobile", "softmax") * 2, "pvt_v2": ("mobile", "mobile", "mobile", "softmax")}


@functools.cache
def file_of(family: str, format: str = "float32", attention: str | tuple[str, ...] = "mobile") -> bytes:
    model = keras_models.FAMILIES[family].build("quickstart", num_classes=10, attention=attention)
    return convert.convert(model, format)


def operators(content: bytes) -> list[Any]:
    """(name, operator, shapes of its inputs) of the main graph, in order."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    graph = model.subgraphs[0]
    found = []
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        shapes = [tuple(graph.tensors[index].shape) for index in operator.inputs if index >= 0]
        found.append((NAMES[max(code.builtinCode, code.deprecatedBuiltinCode)], operator, shapes))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("format", ["float32", "dynamic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_operator_that_phones_run_badly(family: str, format: str) -> None:
    """TILE and BROADCAST_TO leave XNNPACK's partition, adj_x does not run in float16, rank 5 not on GPUs."""
    found = operators(file_of(family, format))
    counts = Counter(name for name, _, _ in found)
    assert not {"TILE", "BROADCAST_TO", "EXPAND_DIMS", "SQUEEZE", "GATHER", "SHAPE", "PACK"} & counts.keys()
    assert max(len(shape) for _, _, shapes in found for shape in shapes) <= 4
    products = [operator for name, operator, _ in found if name == "BATCH_MATMUL"]
    assert products
    assert not any(operator.builtinOptions.adjX for operator in products)


@pytest.mark.slow
def test_an_attention_block_is_what_was_written() -> None:
    """Operators of one more block, which is what the converter could change for the worse."""
    blocks = []
    for depth in (4, 5):
        inputs = keras.Input((28, 28, 3), batch_size=1)
        x = keras.layers.Reshape((49, 48))(keras.layers.Conv2D(48, 4, 4)(inputs))
        for _ in range(depth):
            x = keras.layers.Add()([x, keras_models.deit.attention_layer("mobile", 6)(x)])
        content = convert.convert(keras.Model(inputs, keras.layers.Flatten()(x)), "float32")
        blocks.append(Counter(name for name, _, _ in operators(content)))
    assert blocks[1] - blocks[0] == {
        "FULLY_CONNECTED": 4,
        "BATCH_MATMUL": 2,
        "TRANSPOSE": 5,  # query, key, value, weighted query, result
        "RESHAPE": 9,
        "LOGISTIC": 3,
        "SOFTMAX": 1,
        "DIV": 2,
        "SUM": 12,
        "MUL": 15,
        "ADD": 9,
        "MINIMUM": 1,
    }


@pytest.mark.slow
def test_a_block_of_deit_has_no_norm_parameters_left() -> None:
    """Scales and offsets went into the projections, means out of the stream: only the squares are averaged."""
    depth = 4
    counts = Counter(name for name, _, _ in operators(file_of("deit")))
    assert counts["MEAN"] == 2 * depth + 1
    assert counts["RSQRT"] == 2 * depth + 1
    assert counts["SQUARED_DIFFERENCE"] == counts["SUB"] == 0
    assert counts["CONV_2D"] == 0  # the patch embedding is a dense layer
    assert counts["FULLY_CONNECTED"] == 1 + 6 * depth + 1


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["mobile", "softmax"])
def test_float_graphs_pass_the_gpu_check(family: str, attention: str) -> None:
    import tensorflow as tf

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        tf.lite.experimental.Analyzer.analyze(
            model_content=file_of(family, attention=attention), gpu_compatibility=True
        )
    assert "Your model looks compatible with GPU delegate" in said.getvalue()
    assert "GPU COMPATIBILITY WARNING" not in said.getvalue()


@pytest.mark.slow
def test_a_mixed_model_is_one_partition(tmp_path: Path) -> None:
    for family, attention in MIXED.items():
        path = tmp_path / f"{family}.tflite"
        path.write_bytes(file_of(family, attention=attention))
        description = inspect.describe(path)
        assert (description.delegate_partitions, description.undelegated_ops) == (1, {})


@pytest.mark.slow
def test_targets_differ_in_their_groups_alone() -> None:
    contexts = {}
    for target in convert.GROUP_WIDTHS:
        model = keras_models.DeiTMobiAtt("quickstart", num_classes=10)
        content = convert.convert(model, "float32", convert.formulation_for("float32", target))
        products = [shapes for name, _, shapes in operators(content) if name == "BATCH_MATMUL"]
        contexts[target] = products[1][1]  # the context: [groups, width, width]
    assert contexts == {"arm": (4, 16, 16), "x86": (2, 32, 32)}
    with pytest.raises(ValueError, match=r"no target .gpu."):
        convert.formulation_for("float32", "gpu")


class DoubledAttention(layers.MobileAttention):
    """A user's own: `mix_tokens` is what subclasses define."""

    def mix_tokens(self, query: Any, key: Any, value: Any) -> Any:
        return 2.0 * super().mix_tokens(query, key, value)


@pytest.mark.slow
@pytest.mark.parametrize("optimize", [True, False])
def test_a_subclass_keeps_its_own_mixing(optimize: bool, tmp_path: Path) -> None:
    inputs = keras.Input((9, 16), batch_size=1)
    model = keras.Model(inputs, keras.layers.Flatten()(DoubledAttention(2, name="attention")(inputs)))
    path = tmp_path / "model.tflite"
    path.write_bytes(convert.convert(model, optimize=optimize))
    x = np.random.default_rng(0).normal(size=(1, 9, 16)).astype("float32")
    expected = keras.ops.convert_to_numpy(model(x))
    assert np.abs(verify.run_file(path, x) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.slow
def test_without_optimization_the_graph_is_that_of_training() -> None:
    model = keras_models.DeiTMobiAtt("quickstart", num_classes=10)
    counts = Counter(name for name, _, _ in operators(convert.convert(model, optimize=False)))
    assert counts["CONV_2D"] == 1
    assert counts["MEAN"] == 2 * 9  # mean and variance of each LayerNorm


@pytest.mark.slow
def test_long_sequences_are_cut() -> None:
    """A file with dynamic range from 256 x 192 numbers on; each chunk has its own projections."""
    model = keras_models.DeiTMobiAtt("quickstart", num_classes=10, image_size=(7 * 28, 7 * 28))  # 785 tokens x 64
    counts = {
        format: Counter(n for n, _, _ in operators(convert.convert(model, format))) for format in ("float32", "dynamic")
    }
    assert counts["float32"]["FULLY_CONNECTED"] == 1 + 6 * 4 + 1
    assert counts["dynamic"]["FULLY_CONNECTED"] == 1 + (2 + 2 * 4) * 4 + 1  # 4 chunks: joint projection and output
    assert counts["dynamic"]["SOFTMAX"] == 0

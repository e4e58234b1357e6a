"""Lowered programs compute what the Keras model computes, in the layout of the Neural Engine."""

from collections import Counter
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from coreml import convert, package, streams, verify
from coreml.graph import affine
from coreml.interpreter import Interpreter
from keras_models import DeiTMobiAtt, EfficientFormerV2MobiAtt, PVTv2MobiAtt
from mobiatt_tf import layers, quantization
from mobiatt_tf.errors import UserError
from mobiatt_tf.lean import lean
from mobiatt_tf.quantization.aware import projections, quantizers
from mobiatt_tf.quantization.fake_quant import round_kernel
from mobiatt_tf.verification import keras_logits, photographs
from tests.quantization.small import make_model, randomize_norms

to_numpy = keras.ops.convert_to_numpy


def saved(model: keras.Model, path: Path, ios: int = 15, precision: str = "float32", **options: Any) -> package.Package:
    """A package of the model, read back."""
    converted = convert.convert(model, photographs(model.input_shape[1:3], 4), ios, precision, **options)
    convert.save(converted, path, ios)
    return package.read(path)


def error(model: keras.Model, found: package.Package, mode: str = "float32", count: int = 3) -> float:
    """Largest difference of logits, relative to max|logit|."""
    pixels = verify.as_pixels(photographs(model.input_shape[1:3], count, seed=1))
    expected = keras_logits(model, verify.from_pixels(pixels))
    interpreter = Interpreter(found, mode)
    actual = np.concatenate([interpreter(picture)["logits"] for picture in pixels])
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


MODELS: dict[str, Any] = {
    "deit": lambda: make_model("deit"),
    "deit_softmax": lambda: make_model("deit", attention="softmax"),
    "deit_linear": lambda: make_model("deit", attention="linear"),
    "deit_distilled": lambda: make_model("deit", distilled=True),
    "deit_wide": lambda: make_model("deit", image_size=(28, 42), training_size=28),
    "pvt_v2": lambda: make_model("pvt_v2"),
    "pvt_v2_softmax": lambda: make_model("pvt_v2", attention="softmax"),
    "efficientformer_v2": lambda: make_model("efficientformer_v2"),
    "efficientformer_v2_softmax": lambda: make_model("efficientformer_v2", attention="softmax", distilled=True),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_program_equals_the_keras_model(name: str, tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    found = saved(model, tmp_path / "model.mlpackage")
    assert error(model, found) < 2e-5
    counts = Counter(operation.type for operation in found.operations)
    assert not {"transpose", "tile", "gather", "pad", "expand_dims", "squeeze"} & counts.keys()
    assert max(len(declared.shape or ()) for operation in found.operations for _, declared in operation.outputs) == 4
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.LayerNormalization)]
    assert counts["layer_norm"] == len(norms)
    behind_convolutions = sum(isinstance(layer, layers.ConvBN) for layer in model._flatten_layers())
    batch_norms = sum(isinstance(layer, keras.layers.BatchNormalization) for layer in model._flatten_layers())
    assert counts["batch_norm"] == batch_norms - behind_convolutions  # the others are folded


def test_linear_pvt_v2_pools_and_has_relu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from keras_models import pvt_v2

    row = dataclasses.replace(
        pvt_v2.VARIANTS["b2_li"], embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1,) * 4
    )
    monkeypatch.setitem(pvt_v2.VARIANTS, "narrow_li", row)
    model = PVTv2MobiAtt("narrow_li", num_classes=5, attention="softmax")
    found = saved(model, tmp_path / "model.mlpackage")
    assert error(model, found, count=1) < 2e-5
    assert {"avg_pool", "relu"} <= {operation.type for operation in found.operations}


def test_published_deit_has_no_transpose_at_all(tmp_path: Path) -> None:
    """The target was at most 2; the TensorFlow graph converted as it is has 50."""
    found = saved(DeiTMobiAtt("tiny", num_classes=10), tmp_path / "model.mlpackage", precision="float16")
    counts = Counter(operation.type for operation in found.operations)
    assert counts["transpose"] == 0
    assert counts["conv"] == 1 + 12 * 6 + 1
    assert counts["layer_norm"] == 25
    dtypes = Counter(declared.dtype for op in found.operations if op.type != "const" for _, declared in op.outputs)
    assert dtypes["FLOAT32"] == 2  # logits and probabilities


@pytest.mark.parametrize("family", ["deit", "pvt_v2", "efficientformer_v2"])
def test_float16_differs_by_rounding_alone(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    found = saved(model, tmp_path / "model.mlpackage", precision="float16")
    for mode, bound in (("float32", 3e-3), ("typed", 5e-3), ("float16", 1e-2)):
        assert error(model, found, mode) < bound


@pytest.mark.parametrize("ios", [15, 16, 17, 18])
def test_the_specification_version_is_the_one_asked_for(ios: int, tmp_path: Path) -> None:
    model = make_model("deit")
    found = saved(model, tmp_path / "model.mlpackage", ios, "float16")
    assert found.specification_version == {15: 6, 16: 7, 17: 8, 18: 9}[ios]
    assert error(model, found, "typed") < 5e-3


def test_a_version_that_coremltools_raised_is_an_error(tmp_path: Path) -> None:
    from coreml import compress

    model = make_model("deit")
    converted = convert.convert(model, photographs((28, 28), 4), 15, "float16")
    compressed = compress.compress(converted, "int8")  # reads as iOS 16 from now on
    with pytest.raises(UserError, match="specification version 7, but iOS 15 reads 6"):
        convert.save(compressed, tmp_path / "model.mlpackage", 15)


def big_stream_model() -> keras.Model:
    """A small DeiT whose residual stream reaches thousands, as long training makes them."""
    keras.utils.set_random_seed(0)
    model = make_model("deit")
    position = model.get_layer("position_embedding").embedding
    position.assign(np.random.default_rng(0).normal(0, 1500, position.shape))
    for block in range(4):
        kernel = model.get_layer(f"block{block}_mlp").fc2.kernel
        kernel.assign(to_numpy(kernel) * 2000)
    return model


def test_streams_that_float16_cannot_hold_are_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = big_stream_model()
    found = saved(model, tmp_path / "model.mlpackage", precision="float16")
    assert error(model, found, "float16") < 1e-2
    tightest = verify.verify(found.path, model, photographs((28, 28), 8)).tightest
    assert tightest is not None
    assert tightest.headroom > 1.9

    monkeypatch.setattr(streams, "LENGTH_LIMIT", 1e9)  # as a plain export does it
    plain = saved(model, tmp_path / "plain.mlpackage", precision="float16")
    result = verify.verify(plain.path, model, photographs((28, 28), 8))
    assert not result.passed
    assert any("overflows float16 is block0_norm1 (layer_norm)" in failure for failure in result.failures)


def test_scaling_by_powers_of_two_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("pvt_v2")
    pixels = verify.as_pixels(photographs((32, 32), 2))
    outputs = []
    for limit in (128.0, 2.0):
        monkeypatch.setattr(streams, "LENGTH_LIMIT", limit)
        found = saved(model, tmp_path / f"{limit}.mlpackage", precision="float16")
        outputs.append(np.concatenate([Interpreter(found, "float32")(picture)["logits"] for picture in pixels]))
    assert '"stage1_block0_add1": ["stage1_block0_add1", 0]' not in found.metadata[package.LAYERS_KEY]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-4)  # epsilon is a subnormal number now


def test_streams_are_what_layer_norm_reads() -> None:
    deit = streams.find_streams(make_model("deit"))
    assert len(deit) == 1
    assert "final" not in str(deit)
    pyramid = streams.find_streams(make_model("pvt_v2"))
    assert len(pyramid) == 4  # one a stage
    assert streams.find_streams(make_model("efficientformer_v2")) == []  # convolutions read it: nothing to normalise


def test_exponent_is_the_least_that_suffices() -> None:
    assert streams.exponent_for([3.0, 128.0]) == 0
    assert streams.exponent_for([128.1]) == 1
    assert streams.exponent_for([5000.0]) == 6
    with pytest.raises(ValueError, match="NaN or infinity"):
        streams.exponent_for([np.inf])


def test_a_quantized_model_carries_its_ranges_and_its_grid(tmp_path: Path) -> None:
    model = quantized("deit")
    found = saved(model, tmp_path / "model.mlpackage", 17, "float32")
    constants = {op.outputs[0][0]: op.arguments.get("val") for op in found.operations if op.type == "const"}
    weights = [operation for operation in found.operations if operation.type == "constexpr_affine_dequantize"]
    assert len(weights) == len(projections(model))
    by_name = {operation.outputs[0][0]: operation for operation in weights}
    layer = model.get_layer("block0_mlp").fc2
    operation = by_name["block0_mlp_conv_kernel"]
    codes, scale = operation.arguments["quantized_data"], operation.arguments["scale"]
    rounded = to_numpy(round_kernel(layer.kernel, -1, "int8")).T[:, :, None, None]
    assert codes.dtype == np.int8
    np.testing.assert_allclose(codes * scale.reshape(-1, 1, 1, 1), rounded, rtol=1e-5, atol=1e-9)

    steps = {quantizer.path: affine(quantizer) for quantizer in quantizers(model)}
    expected = {(np.float32(step.scale), step.zero_point) for step in steps.values()}
    written = set()
    for operation in found.operations:
        if operation.type == "quantize":
            arguments = (constants[operation.arguments[name].name] for name in ("scale", "zero_point"))
            written.add(tuple(float(value) for value in arguments))
    assert written == {(float(scale), float(zero_point)) for scale, zero_point in expected}


def quantized(family: str) -> keras.Model:
    model = make_model(family)
    copy = quantization.quantize_aware(model, "int8")
    quantization.calibrate(copy, [photographs(model.input_shape[1:3], 16)])
    return copy


@pytest.mark.parametrize("family", ["deit", "pvt_v2", "efficientformer_v2"])
@pytest.mark.parametrize(("precision", "bound"), [("float32", 2e-2), ("float16", 1e-1)])
def test_a_quantized_program_equals_the_quantized_model(
    family: str, precision: str, bound: float, tmp_path: Path
) -> None:
    """Not to 1e-5: a number between two steps may fall to either."""
    model = quantized(family)
    assert error(model, saved(model, tmp_path / "model.mlpackage", 17, precision), "typed") < bound


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-5), ("float16", 5e-3)])
def test_a_lean_program_equals_the_model(precision: str, bound: float, tmp_path: Path) -> None:
    """As `tflite.qat` trains it: root mean squares, here of a stream that float16 cannot square."""
    model = lean(big_stream_model())
    assert any(isinstance(layer, layers.RootMeanSquareNorm) for layer in model.layers)
    assert streams.find_streams(model)
    assert error(model, saved(model, tmp_path / "model.mlpackage", 15, precision), "float16") < bound


@pytest.mark.parametrize("low", [-1.0, -0.3, 0.0])
def test_int8_steps_are_those_of_tensorflow(low: float) -> None:
    quantizer = quantization.fake_quant.FakeQuantize(name="range")
    quantizer.build((4,))
    quantizer.set_range(low, 2.0)
    values = np.linspace(-2, 3, 1001).astype("float32")
    scale, zero_point = affine(quantizer)
    codes = np.clip(np.round(values / np.float32(scale)) + zero_point, -128, 127)
    difference = np.abs((codes - zero_point) * scale - to_numpy(quantizer(values)))
    assert difference.max() < scale * 1.01  # a tie may go either way
    assert np.mean(difference > scale / 2) < 1e-2


def test_policies_that_core_ml_cannot_hold_are_refused() -> None:
    images = photographs((28, 28), 4)
    model = make_model("deit")
    full = quantization.quantize_aware(model, "int8_full")
    quantization.calibrate(full, [images])
    with pytest.raises(ValueError, match="int8_full has an int8 attention core"):
        convert.convert(full, images, 17)
    with pytest.raises(ValueError, match="The quantized model needs iOS 17, but iOS 16"):
        convert.convert(quantized("deit"), images, 16)
    with pytest.raises(ValueError, match="not calibrated"):
        convert.convert(quantization.quantize_aware(model, "int8"), images, 17)


def small(*stack: keras.layers.Layer) -> keras.Model:
    images = x = keras.Input((16, 16, 3), name="images")
    for layer in stack:
        x = layer(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, keras.layers.Dense(3, name="head")(x))


@pytest.mark.parametrize(
    "layer",
    [
        keras.layers.Conv2D(4, 3, activation="relu"),
        keras.layers.Conv2D(4, 3, strides=2, activation="silu"),
        keras.layers.DepthwiseConv2D(3, padding="same", activation="relu6"),
        keras.layers.BatchNormalization(),
        keras.layers.AveragePooling2D(2),
        keras.layers.Dense(5, activation="tanh"),
        keras.layers.ReLU(),
        layers.StridedDepthwiseResidual(name="local"),
        layers.LayerScale(0.5),
    ],
    ids=lambda layer: f"{type(layer).__name__}",
)
def test_plain_keras_layers_are_lowered_too(layer: keras.layers.Layer, tmp_path: Path) -> None:
    model = small(layer)
    randomize_norms(model)
    assert error(model, saved(model, tmp_path / "model.mlpackage")) < 1e-5


@keras.saving.register_keras_serializable(package="tests")
class Foreign(keras.layers.Layer):
    def call(self, inputs: Any) -> Any:
        return inputs * 2


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Foreign(name="mine"), "The layer 'mine' of type Foreign cannot be exported"),
        (keras.layers.Conv2D(6, 3, groups=3, name="grouped"), "grouped has groups=3"),
        (keras.layers.Conv2D(6, 3, dilation_rate=2, name="dilated"), "dilated has dilation_rate"),
        (keras.layers.Conv2D(6, 3, strides=(1, 2), name="uneven"), "has strides"),
        (keras.layers.Dense(4, activation="selu", name="odd"), "The activation selu cannot be exported"),
        (keras.layers.ReLU(negative_slope=0.1, name="leaky"), "leaky has a slope"),
        (keras.layers.BatchNormalization(axis=1, name="rows"), "over axis 1"),
        (keras.layers.LayerNormalization(axis=(1, 2), name="area"), "over the last axis alone"),
        (keras.layers.AveragePooling2D(3, padding="same", name="padded"), "padded pads 'same'"),
    ],
    ids=lambda value: value.name if isinstance(value, keras.layers.Layer) else "",
)
def test_what_cannot_be_lowered_is_named(layer: keras.layers.Layer, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert.convert(small(layer), photographs((16, 16), 2))


def test_models_of_no_task_are_refused() -> None:
    for model in (DeiTMobiAtt("quickstart", features_only=True), make_model("pvt_v2", features_only=True)):
        with pytest.raises(ValueError, match="belong to no task"):
            convert.convert(model, photographs(model.input_shape[1:3], 2))


def test_operations_without_a_layer_are_named() -> None:
    images = keras.Input((16, 16, 3), name="images")
    x = keras.layers.GlobalAveragePooling2D(name="pool")(images)
    with pytest.raises(ValueError, match="of type Add cannot be exported"):
        convert.convert(keras.Model(images, keras.layers.Dense(3)(x + 1.0)), photographs((16, 16), 2))


@pytest.mark.parametrize("name", ["logits", "probabilities", "image", "head.1", "1st"])
def test_layers_may_have_any_name(name: str, tmp_path: Path) -> None:
    images = keras.Input((16, 16, 3), name="images")
    x = keras.layers.GlobalAveragePooling2D(name="head_1")(images)
    model = keras.Model(images, keras.layers.Dense(3, name=name)(x))
    found = saved(model, tmp_path / "model.mlpackage")
    assert error(model, found) < 1e-5
    assert found.outputs == ("logits", "probabilities")
    assert name in found.metadata[package.LAYERS_KEY]


@pytest.mark.parametrize(("policy", "ios", "bound"), [("float16", 15, 1e-5), ("dynamic", 16, 1e-5), ("int8", 17, 2e-2)])
def test_every_policy_keeps_its_kernels_and_needs_its_ios(policy: str, ios: int, bound: float, tmp_path: Path) -> None:
    from coreml.lowering import least_ios

    copy = quantization.quantize_aware(make_model("deit"), policy)
    quantization.calibrate(copy, [photographs((28, 28), 8)]) if policy == "int8" else None
    assert least_ios(copy) == ios
    assert error(copy, saved(copy, tmp_path / "model.mlpackage", ios)) < bound


def test_int8_steps_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    """A stream that is scaled far down takes the steps of its weights with it."""
    model = big_stream_model()
    copy = quantization.quantize_aware(model, "int8")
    quantization.calibrate(copy, [photographs((28, 28), 8)])
    out = copy.get_layer("block0_attention").out.kernel
    out.assign(to_numpy(out) * 1e-3)
    found = saved(copy, tmp_path / "model.mlpackage", 17, "float16")
    result = verify.verify(found.path, copy, photographs((28, 28), 4), least_agreement=0.0)
    assert any("The int8 steps of" in failure for failure in result.failures)


def test_weights_that_float16_cannot_hold_are_named() -> None:
    model = EfficientFormerV2MobiAtt("quickstart", num_classes=3)
    model.get_layer("head").kernel.assign(np.full(model.get_layer("head").kernel.shape, 1e5, "float32"))
    with pytest.raises(UserError, match=r"the kernel of head reaches 100000.*--precision=float32"):
        convert.convert(model, photographs((32, 32), 2))
    model.get_layer("head").kernel.assign(np.full(model.get_layer("head").kernel.shape, np.nan, "float32"))
    with pytest.raises(UserError, match="the kernel of head holds NaN"):
        convert.convert(model, photographs((32, 32), 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ios": 14}, "Choose one of 15, 16, 17, 18"),
        ({"precision": "bfloat16"}, "Choose one of float16, float32"),
        ({"class_names": ["one"]}, "4 classes, but 1 labels"),
        ({"class_names": ["one", "two", "two", "three"]}, r"different and not empty, but there are several \['two'\]"),
        ({"class_names": ["one", "two", " ", "three"]}, "different and not empty"),
        ({"images": np.zeros((0, 28, 28, 3), "float32")}, "There are no images"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert.convert(make_model("deit"), **{"images": photographs((28, 28), 2), **arguments})

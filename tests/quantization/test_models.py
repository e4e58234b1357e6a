"""Quantized copies of whole models: near the float model, sharing nothing, trainable, saved and loaded."""

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from mobiatt_tf import layers, quantization
from mobiatt_tf.quantization.aware import projections, quantizers
from tests.quantization.small import (
    CLASSES,
    FAMILIES,
    POLICIES,
    calibrated,
    changed,
    float_model,
    grid_distance,
    images_of,
    make_model,
    make_tiny_model,
    noise,
    quantized_model,
    ranges_of,
    relative_error,
    run_python,
    to_numpy,
    values_of,
)

BOUNDS = {"int8": 0.1, "int8_full": 0.1, "dynamic": 0.05, "float16": 2e-3}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_copy_is_near_the_float_model(family: str, policy: str) -> None:
    """With random batch-norm statistics: a wrong folding shows in float16."""
    model, copy, images = float_model(family), quantized_model(family, policy), images_of(family)
    assert relative_error(model(images), copy(images)) < BOUNDS[policy]
    paths = [weight.path for weight in copy.weights]
    assert len(paths) == len(set(paths))
    norms = {
        weight.path for weight in model.trainable_weights if "/bn/" in weight.path or weight.path.startswith("norm/")
    }
    expected = {weight.path for weight in model.trainable_weights} - (
        norms if family == "efficientformer_v2" else set()
    )
    assert {weight.path for weight in copy.trainable_weights} == expected
    assert bool(quantizers(copy)) == policy.startswith("int8")


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("deit", {"attention": "softmax"}),
        ("pvt_v2", {"attention": "softmax"}),
        ("efficientformer_v2", {"attention": "softmax"}),
    ],
)
def test_softmax_hosts_take_part(family: str, arguments: dict[str, Any]) -> None:
    model = make_model(family, **arguments)
    copy = calibrated(model, "int8", images_of(family))
    assert relative_error(model(images_of(family)), copy(images_of(family))) < 0.1


def test_a_distilled_model_keeps_its_two_heads() -> None:
    copy = calibrated(make_model("deit", distilled=True), "int8", images_of("deit"))
    assert [tuple(head.shape) for head in copy(images_of("deit"), training=True)] == [(4, CLASSES)] * 2
    assert copy(images_of("deit")).shape == (4, CLASSES)


def test_copy_shares_nothing_and_training_moves_weights_and_ranges() -> None:
    model = make_model("deit")
    copy = calibrated(model, "int8", images_of("deit"))
    before_float, before, before_ranges = values_of(model), values_of(copy), ranges_of(copy)
    copy.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = copy.fit(images_of("deit"), np.arange(4), epochs=8, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert changed(before_float, model) == set()
    assert {weight.path for weight in copy.trainable_weights} <= changed(before, copy)
    assert ranges_of(copy) != before_ranges


@pytest.mark.slow
def test_mixed_precision_trains() -> None:
    copy = calibrated(make_model("deit", dtype="mixed_bfloat16"), "int8_full", images_of("deit"))
    copy.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert np.isfinite(copy.fit(images_of("deit"), np.arange(4), verbose=0).history["loss"]).all()


@pytest.mark.slow
def test_two_devices_have_the_same_ranges(tmp_path: Path) -> None:
    run_python("-m", "tests.quantization.small", str(tmp_path))
    result = json.loads((tmp_path / "mirrored.json").read_text())
    assert np.isfinite(result["loss"])
    assert result["changed"]
    for copies in result["copies"].values():
        assert len(copies) == 2
        np.testing.assert_array_equal(copies[0], copies[1])
    name = "patches/projection/input_quantizer"
    low = result["before"][name][0]
    expected = low + 0.001 * (np.mean(result["minima"]) - low)  # tfmot's decay of .999, averaged over the devices
    assert result["copies"][f"{name}/range_min"][0] == pytest.approx(expected, rel=1e-4)


def test_a_child_that_reads_another_does_not_round_again() -> None:
    attention = next(
        layer for layer in quantized_model("efficientformer_v2", "int8").layers if layer.name.endswith("_attention")
    )
    assert attention.value.conv.output_quantizer is not None
    assert attention.value_local.conv.input_quantizer is None
    mlp = next(layer for layer in quantized_model("pvt_v2", "int8").layers if layer.name.endswith("_mlp"))
    assert mlp.dwconv.input_quantizer is None
    assert mlp.fc2.input_quantizer is not None


def test_batch_norm_is_folded_or_frozen() -> None:
    copy = make_model("efficientformer_v2")
    copy = calibrated(copy, "int8", images_of("efficientformer_v2"))
    norms = [layer for layer in copy._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    assert [norm.name for norm in norms] == ["norm"]
    before = values_of(copy)
    copy(images_of("efficientformer_v2"), training=True)
    assert not [path for path in changed(before, copy) if path.startswith("norm/")]


@pytest.mark.parametrize("family", FAMILIES)
def test_baking_puts_kernels_on_their_steps_and_changes_nothing(family: str) -> None:
    copy = calibrated(make_model(family), "int8", images_of(family))
    if family == "deit":
        token = next(layer for layer in copy.layers if isinstance(layer, layers.ClassToken))
        token.tokens.assign(noise(*token.tokens.shape))
    expected = to_numpy(copy(images_of(family)))
    for _ in range(2):  # baking twice is baking once
        quantization.bake(copy)
        assert np.abs(to_numpy(copy(images_of(family))) - expected).max() < 1e-5
    assert grid_distance(copy) < 1e-2
    clone = keras.models.clone_model(copy)
    clone.set_weights(copy.get_weights())
    assert np.abs(to_numpy(clone(images_of(family))) - expected).max() < 1e-5


def test_a_class_token_that_others_read_is_not_folded() -> None:
    images = keras.Input((4, 4, 3))
    x = layers.ClassToken(1, "random_normal", name="token")(layers.PatchEmbedding(2, 8, name="patches")(images))
    y = layers.PositionEmbedding((2, 2), 1, "random_normal", name="position")(x)
    y = keras.layers.GlobalAveragePooling1D()(keras.layers.Add()([x, y]))
    copy = calibrated(keras.Model(images, keras.layers.Dense(3, name="head")(y)), "int8", noise(4, 4, 4, 3))
    expected = to_numpy(copy(noise(4, 4, 4, 3)))
    quantization.bake(copy)
    np.testing.assert_allclose(to_numpy(copy(noise(4, 4, 4, 3))), expected, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_copy_is_loaded_where_only_models_is_imported(family: str, tmp_path: Path) -> None:
    copy = quantized_model(family, "int8_full")
    copy.save(tmp_path / "model.keras")
    np.save(tmp_path / "images.npy", images_of(family))
    if family == "deit":
        run_python(
            "-c",
            "import numpy as np; from mobiatt_tf.models import load_trained; "
            f"model = load_trained({str(tmp_path)!r}); "
            f"np.save({str(tmp_path / 'logits.npy')!r}, model(np.load({str(tmp_path / 'images.npy')!r})))",
        )
        logits = np.load(tmp_path / "logits.npy")
    else:
        logits = to_numpy(keras.saving.load_model(tmp_path / "model.keras")(images_of(family)))
    np.testing.assert_allclose(logits, to_numpy(copy(images_of(family))), atol=1e-5)


def test_calibration_sets_the_mean_of_the_extremes() -> None:
    copy = quantization.quantize_aware(make_tiny_model())
    batches = [noise(4, 8, 8, 3, seed=seed) for seed in range(3)]
    assert quantization.calibrate(copy, [(batch, np.zeros(4)) for batch in batches]) == 12
    low, high = next(layer for layer in copy.layers if layer.name == "conv").input_quantizer.range
    assert low == pytest.approx(np.mean([batch.min() for batch in batches]))
    assert high == pytest.approx(np.mean([batch.max() for batch in batches]))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "nothing to calibrate on"),
        ([np.zeros((0, 8, 8, 3), "float32")], "nothing to calibrate on"),
        ([np.ones((4, 8, 8, 3), "float32")] * 2, "one and the same colour"),
        ([np.full((4, 8, 8, 3), np.nan, "float32")], "images 0 to 3 hold NaN"),
    ],
)
def test_useless_calibration_images_are_errors(batches: list[np.ndarray], message: str) -> None:
    copy = quantization.quantize_aware(make_tiny_model())
    before = values_of(copy)
    with pytest.raises(ValueError, match=message):
        quantization.calibrate(copy, batches)
    assert changed(before, copy) == set()
    with pytest.raises(ValueError, match=r"has the range \[0\.0, 0\.0\]: it is not calibrated"):
        quantization.bake(copy)


def test_a_tensor_that_is_0_everywhere_and_a_damaged_model_are_named() -> None:
    model = make_tiny_model()
    model.get_layer("conv").bias.assign(np.full(4, -1e3, "float32"))  # ReLU then gives 0
    with pytest.raises(ValueError, match="conv/output_quantizer is 0 everywhere"):
        calibrated(model, "int8", noise(4, 8, 8, 3))
    model.get_layer("conv").bias.assign(np.full(4, np.nan, "float32"))
    with pytest.raises(ValueError, match="is not finite on the calibration images"):
        calibrated(model, "int8", noise(4, 8, 8, 3))


@keras.saving.register_keras_serializable(package="tests")
class Gate(keras.layers.Layer):
    """A layer of a user: two dense layers and a norm, one dense layer gating what the other makes."""

    def build(self, input_shape: Any) -> None:
        self.gate = keras.layers.Dense(input_shape[-1], activation="sigmoid", name="gate")
        self.value = keras.layers.Dense(input_shape[-1], name="value")
        self.norm = keras.layers.BatchNormalization(name="norm")
        for child in (self.gate, self.value, self.norm):
            child.build(input_shape)

    def call(self, inputs: Any) -> Any:
        return self.norm(self.gate(inputs) * self.value(inputs))

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def quantized_children(self) -> dict[str, str | None]:
        return {"gate": None, "value": None}


@keras.saving.register_keras_serializable(package="tests")
class QuantizedGate(quantization.QuantizedChildren, Gate):
    """Its quantized form."""


def gated() -> keras.Model:
    inputs = keras.Input((8,))
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(Gate(name="gate_layer")(inputs)))


def test_a_layer_of_ones_own_takes_part(tmp_path: Path) -> None:
    model, x = gated(), noise(16, 8)
    copy = quantization.quantize_aware(model, "int8", own_layers={Gate: QuantizedGate})
    quantization.calibrate(copy, [x])
    assert len(projections(copy)) == 3
    assert relative_error(model(x), copy(x)) < 0.05
    assert not copy.get_layer("gate_layer").norm.trainable
    copy.save(tmp_path / "model.keras")
    np.testing.assert_allclose(keras.saving.load_model(tmp_path / "model.keras")(x), copy(x), atol=1e-6)
    in_float = quantization.quantize_aware(model, "int8", own_layers={Gate: Gate})
    assert len(projections(in_float)) == 1


def test_what_cannot_be_quantized_is_named() -> None:
    with pytest.raises(ValueError, match=r"'gate_layer' of type Gate.*own_layers"):
        quantization.quantize_aware(gated())
    with pytest.raises(ValueError, match="is quantized already"):
        quantization.quantize_aware(quantized_model("deit", "int8"))
    with pytest.raises(ValueError, match="no quantization policy 'int4'"):
        quantization.quantize_aware(gated(), "int4")
    mine = quantization.Policy("int8", "float16", False, False, "mine")
    with pytest.raises(ValueError, match="none of POLICIES"):
        quantization.quantize_aware(gated(), mine)
    images = keras.Input((8, 8, 4))
    for arguments in ({"groups": 2}, {"dilation_rate": 2}):
        model = keras.Model(images, keras.layers.Conv2D(4, 3, name="odd", **arguments)(images))
        with pytest.raises(ValueError, match=f"'odd' has {next(iter(arguments))}="):
            quantization.quantize_aware(model)


def test_an_activation_behind_the_rounding_is_rounded_again() -> None:
    """b reads what a gives after its sigmoid, which is float: its input must be rounded although a is named."""

    @keras.saving.register_keras_serializable(package="tests")
    class Chain(keras.layers.Layer):
        def build(self, input_shape: Any) -> None:
            self.a = keras.layers.Dense(8, activation="sigmoid", name="a")
            self.b = keras.layers.Dense(8, name="b")
            self.a.build(input_shape)
            self.b.build(input_shape)

        def call(self, inputs: Any) -> Any:
            return self.b(self.a(inputs))

        def quantized_children(self) -> dict[str, str | None]:
            return {"a": None, "b": "a"}

    class QuantizedChain(quantization.QuantizedChildren, Chain):
        pass

    inputs = keras.Input((8,))
    copy = quantization.quantize_aware(
        keras.Model(inputs, Chain(name="chain")(inputs)), own_layers={Chain: QuantizedChain}
    )
    assert copy.get_layer("chain").b.input_quantizer is not None


def test_layer_errors_find_the_damaged_layer() -> None:
    model = make_model("deit")
    copy = calibrated(model, "int8", images_of("deit"))
    errors = quantization.layer_errors(model, copy, images_of("deit"))
    assert max(errors.values()) < 0.1
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    copy.get_layer("block2_mlp").fc1.output_quantizer.set_range(-1e-3, 1e-3)
    assert next(iter(quantization.layer_errors(model, copy, images_of("deit")))) == "block2_mlp"

"""Detectors and segmenters as packages: heads that share layers, maps, anchors in Keras' order, gates, samples."""

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from PIL import Image

from coreml import calls, convert, export, lowering, maps, package, verify
from coreml.interpreter import Interpreter
from keras_models import RetinaNetMobiAtt, SemanticFPNMobiAtt
from mobiatt_tf import layers, ops, quantization
from mobiatt_tf.errors import UserError
from mobiatt_tf.models import rebuild
from mobiatt_tf.verification import DenseComparison, keras_outputs, photographs
from tests.quantization.small import FAMILIES, randomize_norms

SIZE = (48, 64)
IMAGES = photographs(SIZE, 4)
CLASSES = ("bird", "boat", "bus")


def randomized(model: keras.Model) -> keras.Model:
    """With weights as large as after training in the heads, whose start is so small that nothing could be seen."""
    randomize_norms(model)
    generator = np.random.default_rng(0)
    for layer in model.layers:
        if "head" in layer.name and isinstance(layer, keras.layers.Conv2D):
            layer.kernel.assign(generator.normal(0, 0.1, layer.kernel.shape))
            layer.bias.assign(generator.normal(0, 0.1, layer.bias.shape))
    return model


@functools.cache
def detector(family: str = "pvt_v2") -> keras.Model:
    keras.utils.set_random_seed(0)
    return randomized(
        RetinaNetMobiAtt(
            family, "quickstart", SIZE, len(CLASSES), channels=8, head_depth=1, training_size=64, batch_size=None
        )
    )


@functools.cache
def segmenter(family: str = "pvt_v2") -> keras.Model:
    keras.utils.set_random_seed(0)
    return randomized(
        SemanticFPNMobiAtt(family, "quickstart", SIZE, len(CLASSES), channels=8, head_channels=8, training_size=64)
    )


def small(build: Callable[[Any], Any], sides: tuple[int, int] = (16, 24)) -> keras.Model:
    """A segmenter of three classes around what `build` makes of a map of four channels."""
    images = keras.Input((*sides, 3), name="images")
    x = build(keras.layers.Conv2D(4, 3, padding="same", name="first")(images))
    return keras.Model(images, keras.layers.Conv2D(3, 1, name="last")(x))


def sharing_detector() -> keras.Model:
    """Two levels through the same layers, with other numbers of rows than of columns and two anchors at each place."""
    images = keras.Input((16, 24, 3), name="images")
    fine = keras.layers.Conv2D(4, 3, padding="same", activation="relu", name="fine")(images)
    coarse = keras.layers.Conv2D(4, 3, strides=2, padding="same", name="coarse")(fine)
    shared = keras.layers.Conv2D(4, 3, padding="same", activation="relu", name="shared")
    boxes = keras.layers.Conv2D(2 * 4, 1, name="box_last")
    logits = keras.layers.Conv2D(2 * 5, 1, name="class_last")
    outputs = {}
    for name, last, width in (("boxes", boxes, 4), ("logits", logits, 5)):
        rows = [keras.layers.Reshape((-1, width))(last(shared(level))) for level in (fine, coarse)]
        outputs[name] = keras.layers.Concatenate(axis=1, name=name)(rows)
    return keras.Model(images, outputs)


def saved(model: keras.Model, path: Path, ios: int = 15, precision: str = "float32", **options: Any) -> package.Package:
    """A package of the model, read back."""
    convert.save(convert.convert(model, photographs(model.input_shape[1:3], 4), ios, precision, **options), path, ios)
    return package.read(path)


def error(model: keras.Model, found: package.Package, mode: str = "float32") -> float:
    """Largest difference of an output, relative to its largest number."""
    pixels = verify.as_pixels(photographs(model.input_shape[1:3], 2, seed=1))
    expected = keras.tree.flatten(keras_outputs(model, verify.from_pixels(pixels)))
    actual = keras.tree.flatten(Interpreter(found, mode).outputs(pixels))
    assert [values.shape for values in actual] == [values.shape for values in expected]
    pairs = zip(actual, expected, strict=True)
    return max(float(np.abs(one - other).max() / np.abs(other).max()) for one, other in pairs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("build", [detector, segmenter], ids=["detector", "segmenter"])
def test_programs_of_every_family_equal_the_keras_model(
    build: Callable[[str], keras.Model], family: str, tmp_path: Path
) -> None:
    model = build(family)
    found = saved(model, tmp_path / "model.mlpackage")
    assert error(model, found) < 2e-5
    counts = Counter(operation.type for operation in found.operations)
    assert counts["transpose"] == (2 if build is detector else 0)  # one for each output, however many levels
    assert max(len(declared.shape or ()) for op in found.operations for _, declared in op.outputs) == 4
    assert set(found.outputs) == ({"boxes", "logits"} if build is detector else {"logits"})


@pytest.mark.parametrize(
    ("build", "operator"),
    [
        (lambda x: keras.layers.UpSampling2D(2)(x), "upsample_nearest_neighbor"),
        (lambda x: keras.layers.UpSampling2D((2, 3), interpolation="bilinear")(x), "upsample_bilinear"),
        (lambda x: keras.layers.MaxPooling2D(2)(x), "max_pool"),
        (lambda x: keras.layers.MaxPooling2D(3, strides=2, padding="same")(x), "max_pool"),
        (lambda x: keras.layers.ZeroPadding2D(((1, 2), (0, 3)))(x), "pad"),
        (lambda x: keras.layers.Conv2D(5, 3, strides=2, padding="same", activation="relu")(x), "conv"),
        (lambda x: keras.layers.DepthwiseConv2D(3, strides=2, padding="same")(x), "conv"),
        (lambda x: keras.layers.Concatenate()([x, keras.layers.ReLU()(x)]), "concat"),
        (lambda x: keras.layers.SpatialDropout2D(0.5)(x), "conv"),
        (lambda x: keras.layers.Activation(ops.gelu)(x), "gelu"),
        (lambda x: layers.ConvBN(6, 3, 2, activation="relu")(x), "relu"),
    ],
)
@pytest.mark.parametrize("sides", [(16, 24), (13, 17)])  # padding "same" falls otherwise on odd sides
def test_layers_of_heads_are_lowered(
    build: Callable[[Any], Any], operator: str, sides: tuple[int, int], tmp_path: Path
) -> None:
    model = randomized(small(build, sides))
    found = saved(model, tmp_path / "model.mlpackage")
    assert operator in {operation.type for operation in found.operations}
    assert error(model, found) < 1e-5


def test_tokens_become_maps_and_maps_tokens(tmp_path: Path) -> None:
    def there_and_back(x: Any) -> Any:
        height, width, channels = x.shape[1:]
        tokens = keras.layers.Reshape((-1, channels))(x)
        first = layers.ClassToken(2)(tokens)
        joined = keras.layers.Concatenate(axis=1)([first, tokens])
        back = layers.TokensToMap((2 * height, width), prefix=2)(joined)
        return keras.layers.Reshape((height, 2 * width, channels))(keras.layers.Reshape((-1, channels))(back))

    model = small(there_and_back)
    found = saved(model, tmp_path / "model.mlpackage")
    assert error(model, found) < 1e-5
    assert not {"transpose", "gather"} & {operation.type for operation in found.operations}


def test_calls_are_named_by_their_number_and_the_same_in_a_copy() -> None:
    model = sharing_detector()
    names = [call.name for call in calls.calls(model)]
    assert [name for name in names if name.startswith("shared")] == ["shared.1", "shared.2", "shared.3", "shared.4"]
    assert "fine" in names
    assert [call.name for call in calls.calls(rebuild(model, batch_size=1))] == names
    assert [call.name for call in calls.calls(keras.models.clone_model(model))] == names
    ready = {id(model.inputs[0])}
    for call in calls.calls(model):
        assert {id(tensor) for tensor in call.inputs} <= ready
        ready |= {id(tensor) for tensor in call.outputs}
    assert {id(tensor) for tensor in model.outputs} <= ready


def test_a_layer_may_have_the_name_of_another_ones_call() -> None:
    images = keras.Input((8, 8, 3), name="images")
    shared = keras.layers.Conv2D(3, 1, name="conv")
    model = keras.Model(images, keras.layers.ReLU(name="conv.1")(shared(shared(images))))
    assert [call.name for call in calls.calls(model)] == ["conv.1_", "conv.2", "conv.1"]


def test_shared_layers_are_lowered_at_each_call_and_stored_once(tmp_path: Path) -> None:
    model = sharing_detector()
    found = saved(model, tmp_path / "model.mlpackage")
    assert error(model, found) < 1e-5
    convolutions = {operation.name for operation in found.operations if operation.type == "conv"}
    assert convolutions == {
        "fine_conv", "coarse", "shared_1_conv", "shared_2_conv",
        "box_last_1", "box_last_2", "class_last_1", "class_last_2",
    }  # fmt: skip
    kernels = [array for *_, array in package.weight_arrays(found) if array.ndim == 4]
    # Those of "coarse" and of "shared"; coremltools leaves what has less than 100 numbers where it is.
    assert Counter(array.shape for array in kernels)[(4, 4, 3, 3)] == 2
    named = json.loads(found.metadata[package.LAYERS_KEY])
    assert {"box_last.1", "box_last.2", "boxes"} <= named.keys()


def test_int8_kernels_of_shared_layers_are_stored_once(tmp_path: Path) -> None:
    model = quantization.quantize_aware(sharing_detector(), "int8")
    quantization.calibrate(model, [photographs((16, 24), 8)])
    found = saved(model, tmp_path / "model.mlpackage", 17)
    assert error(model, found) < 5e-2
    assert Counter(operation.type for operation in found.operations)["constexpr_affine_dequantize"] == 5


def test_an_exported_detector_has_named_outputs_samples_and_classes(tmp_path: Path) -> None:
    model, output = detector(), tmp_path / "model.mlpackage"
    result = export.export(model, output, IMAGES, class_names=CLASSES, least_agreement=0.0)
    anchors = model.output["boxes"].shape[1]
    description = package.read_specification(output).description
    shapes = {feature.name: list(feature.type.multiArrayType.shape) for feature in description.output}
    assert shapes == {"boxes": [1, anchors, 4], "logits": [1, anchors, len(CLASSES)]}
    assert all("anchors" in feature.shortDescription for feature in description.output)
    found = package.read(output)
    assert found.metadata[package.TASK_KEY] == "detection"
    assert json.loads(found.metadata[package.CLASSES_KEY]) == list(CLASSES)
    assert "classify" not in {operation.type for operation in found.operations}

    comparison = result.verification.comparisons["typed"]
    assert isinstance(comparison, DenseComparison)
    assert comparison.output_errors.keys() == {"boxes", "logits"}
    assert comparison.places > 0
    assert {layer.name for layer in result.verification.layers} >= {"box_head_output.5", "fpn_output5"}
    assert "anchors of 4 images" in export.format_table(result)
    assert json.loads((tmp_path / "model.mlpackage.json").read_text())["verification"]["passed"]

    golden = json.loads((tmp_path / "model.golden" / "golden.json").read_text())
    assert "logits" not in golden  # what the app for classifiers reads
    interpreter = Interpreter(found, "typed")
    for index, picture in enumerate(golden["images"]):
        outputs = interpreter(np.asarray(Image.open(tmp_path / "model.golden" / picture)))
        for name, sample in golden["outputs"].items():
            assert sample["shape"] == list(outputs[name].shape)
            assert 100 < len(sample["places"]) <= 1000
            np.testing.assert_allclose(outputs[name].reshape(-1)[sample["places"]], sample["values"][index], atol=1e-6)
            assert sample["largest"][index] == pytest.approx(float(np.abs(outputs[name]).max()))


@pytest.mark.parametrize("weights", ["float", "int8", pytest.param("palette8", marks=pytest.mark.slow)])
def test_an_exported_segmenter_matches(weights: str, tmp_path: Path) -> None:
    model, output = segmenter(), tmp_path / "model.mlpackage"
    result = export.export(model, output, IMAGES, weights=weights, class_names=CLASSES, least_agreement=0.5)
    assert result.verification.kind == ("float16" if weights == "float" else weights)
    feature = package.read_specification(output).description.output[0]
    assert (feature.name, list(feature.type.multiArrayType.shape)) == ("logits", [1, 3, 24, 32])
    assert verify.as_function(output)(IMAGES[:2]).shape == (2, 24, 32, 3)
    typed = result.verification.comparisons["typed"]
    assert isinstance(typed, DenseComparison)
    assert typed.places == len(IMAGES) * 24 * 32


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("build", [detector, segmenter], ids=["detector", "segmenter"])
def test_quantized_models_pass_the_gates(build: Callable[[str], keras.Model], family: str, tmp_path: Path) -> None:
    model = quantization.quantize_aware(build(family), "int8")
    quantization.calibrate(model, [photographs(SIZE, 16)])
    result = export.export(model, tmp_path / "model.mlpackage", IMAGES, weights="w8a8", least_agreement=0.8)
    assert (result.verification.kind, result.ios) == ("w8a8", 17)
    assert max(layer.error for layer in result.verification.layers) < 1  # a coarse level of nothing but zeros, too


def test_a_detector_that_was_hardly_trained_is_exported(tmp_path: Path) -> None:
    """No anchor has a class yet: near ties of the background are no mistakes, whatever agreement is asked for."""
    keras.utils.set_random_seed(0)
    model = RetinaNetMobiAtt(
        "pvt_v2", "quickstart", SIZE, len(CLASSES), channels=8, head_depth=1, training_size=64, batch_size=None
    )
    result = export.export(model, tmp_path / "model.mlpackage", IMAGES[:2])
    comparison = result.verification.comparisons["typed"]
    assert isinstance(comparison, DenseComparison)
    assert (comparison.places, comparison.agreement, comparison.box_error) == (0, 1.0, None)


def test_anchors_in_another_order_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a careless reshape would have them: the same numbers, every shape right."""

    def careless(graph: Any, results: Any) -> list[Any]:
        return [
            graph.builder.reshape(x=value.var, shape=[1, -1, value.shape[1] // value.places], name=name)
            for name, (value,) in results.items()
        ]

    monkeypatch.setitem(lowering._OUTPUTS, "detection", careless)
    path = tmp_path / "model.mlpackage"
    with pytest.raises(verify.RefusedError, match=r"model.mlpackage was not written. In float32 its (boxes|logits)"):
        export.export(sharing_detector(), path, photographs((16, 24), 4), precision="float32", least_agreement=0.0)
    assert not list(tmp_path.iterdir())


def test_another_sampling_is_refused_and_its_layer_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def aligned(graph: Any, layer: Any, x: Any) -> Any:
        factor = np.float32(2)
        scaled = {"scale_factor_height": factor, "scale_factor_width": factor, "align_corners": True}
        return maps.Value(graph.builder.upsample_bilinear(x=x.var, name=graph.name, **scaled))

    monkeypatch.setitem(lowering.RULES, keras.layers.UpSampling2D, aligned)
    model = small(lambda x: keras.layers.UpSampling2D(2, interpolation="bilinear", name="enlarge")(x))
    with pytest.raises(verify.RefusedError, match=r"even in float32. .*The first layer that differs .* enlarge"):
        export.export(model, tmp_path / "model.mlpackage", photographs((16, 24), 4), least_agreement=0.0)


def anchors_then(layer: keras.layers.Layer) -> keras.Model:
    images = keras.Input((8, 8, 3), name="images")
    flat = keras.layers.Reshape((-1, 4))(keras.layers.Conv2D(8, 1)(images))  # two anchors at each place
    return keras.Model(images, {"boxes": layer(flat), "logits": keras.layers.Reshape((-1, 3))(images)})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: small(lambda x: keras.layers.UpSampling2D(2, interpolation="bicubic", name="cubic")(x)),
            "cubic enlar",
        ),
        (lambda: small(lambda x: keras.layers.Concatenate(axis=1, name="rows")([x, x])), "rows joins along axis 1"),
        (
            lambda: small(lambda x: keras.layers.Reshape((8, 12, 16), name="blocks")(x)),
            "blocks reshapes a map of 16",
        ),
        (lambda: anchors_then(keras.layers.Dense(4, name="late")), "'late' reads channels that were reshaped"),
    ],
)
def test_what_cannot_be_lowered_is_named(model: Callable[[], keras.Model], message: str) -> None:
    built = model()
    with pytest.raises(ValueError, match=message):
        convert.convert(built, photographs(built.input_shape[1:3], 2))


def test_outputs_of_no_task_are_refused() -> None:
    images = keras.Input((8, 8, 3), name="images")
    rows = keras.layers.Reshape((-1, 4))(keras.layers.Conv2D(8, 1)(images))
    with pytest.raises(ValueError, match="A detector gives a dict with boxes and logits"):
        convert.convert(keras.Model(images, {"deltas": rows, "scores": rows}), photographs((8, 8), 2))
    with pytest.raises(ValueError, match="belong to no task"):
        convert.convert(keras.Model(images, rows), photographs((8, 8), 2))


def test_a_package_of_another_model_is_said_so(tmp_path: Path) -> None:
    saved(sharing_detector(), tmp_path / "model.mlpackage", precision="float16")
    with pytest.raises(UserError, match=r"was not made from this model: it is for detection, the model for segment"):
        verify.verify(tmp_path / "model.mlpackage", small(lambda x: x), photographs((16, 24), 2))
    saved(small(lambda x: x), tmp_path / "other.mlpackage", precision="float16")
    with pytest.raises(UserError, match=r"was not made from this model: The file .* it gives"):
        verify.verify(tmp_path / "other.mlpackage", small(keras.layers.MaxPooling2D()), photographs((16, 24), 2))


def test_wrong_labels_of_a_detector_are_refused() -> None:
    with pytest.raises(ValueError, match="The model has 3 classes, but 2 labels"):
        convert.convert(detector(), IMAGES, class_names=CLASSES[:2])


@pytest.mark.slow
def test_command_lines_export_and_verify_a_detector(tmp_path: Path) -> None:
    from tests.coreml.test_export import run

    detector().save(tmp_path / "model.keras")
    (tmp_path / "labels.txt").write_text("\n".join(CLASSES))
    common = (f"--checkpoint={tmp_path / 'model.keras'}", "--check_images=4")
    path = tmp_path / "model.mlpackage"
    written = run("coreml.export", *common, f"--output={path}", f"--labels={tmp_path / 'labels.txt'}")
    assert written.returncode == 0, written.stderr
    assert "anchors of 4 images" in written.stdout
    passed = run("coreml.verify", str(path), *common)
    assert passed.returncode == 0, passed.stderr
    assert "crops of two photographs" in passed.stdout

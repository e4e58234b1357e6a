"""Damaged packages, and programs that do not keep their word: one clear error each."""

import shutil
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from coreml import package, verify
from coreml.interpreter import Interpreter, logits_output
from mobiatt_tf.errors import UserError
from mobiatt_tf.models import rebuild
from mobiatt_tf.verification import photographs
from tests.coreml import programs
from tests.coreml.test_lowering import saved
from tests.quantization.small import make_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model and its float16 package for iOS 15."""
    model = make_model("deit")
    path = tmp_path_factory.mktemp("package") / "model.mlpackage"
    saved(model, path, precision="float16")
    return model, path


@pytest.fixture
def copy(exported: tuple[Any, Path], tmp_path: Path) -> Path:
    """The package, to be damaged."""
    path = tmp_path / "model.mlpackage"
    shutil.copytree(exported[1], path)
    return path


def rewrite(path: Path, change: Any) -> None:
    """Changes the protobuf of a package."""
    specification = package.read_specification(path)
    function = specification.mlProgram.functions["main"]
    change(function.block_specializations[function.opset])
    (path / package.PROGRAM).write_bytes(specification.SerializeToString())


def operation(block: Any, name: str) -> Any:
    return next(found for found in block.operations if found.outputs and found.outputs[0].name == name)


def blobs(block: Any) -> dict[str, Any]:
    """The references into the weight file, by the name of the constant."""
    return {
        found.outputs[0].name: found.attributes["val"].blobFileValue
        for found in block.operations
        if found.type == "const" and found.attributes["val"].WhichOneof("value") == "blobFileValue"
    }


def verified(model: Any, path: Path) -> verify.Verification:
    return verify.verify(path, model, photographs((28, 28), 8), least_agreement=0.0)


def test_a_whole_package_passes(exported: tuple[Any, Path]) -> None:
    model, path = exported
    result = verified(model, path)
    assert result.passed, result.failures
    assert result.kind == "float16"
    assert set(result.comparisons) == {"float32", "typed", "float16"}
    assert max(layer.error for layer in result.layers) < 2e-2
    assert {layer.name for layer in result.layers} == {layer.name for layer in model.layers[1:]}


@pytest.mark.parametrize("which", [0, -1])
def test_one_flipped_bit_in_one_weight_is_found(exported: tuple[Any, Path], copy: Path, which: int) -> None:
    """The lowest bit of a float16 number: no comparison of logits could see it."""
    found = package.read(copy)
    names = [name for name, _, array in package.weight_arrays(found) if array.nbytes > 4000]
    weights = package.read_specification(copy).mlProgram.functions["main"]
    reference = blobs(weights.block_specializations[weights.opset])[names[which]]
    file = copy / package.WEIGHTS
    content = bytearray(file.read_bytes())
    start = int.from_bytes(content[reference.offset + 16 : reference.offset + 24], "little")
    content[start + 100] ^= 1
    file.write_bytes(content)
    with pytest.raises(verify.RefusedError, match=f"is damaged: the weight {names[which]} is not what was exported"):
        verified(exported[0], copy)


def test_two_swapped_weights_are_found_twice(exported: tuple[Any, Path], copy: Path) -> None:
    """By their checksums, and by what they compute: the layer is named."""
    names = blobs_of(copy)
    query = next(name for name in names if name.startswith("block1_attention_query"))
    out = next(name for name in names if name.startswith("block1_attention_weight"))

    def swap_found(block: Any) -> None:
        found = blobs(block)
        found[query].offset, found[out].offset = found[out].offset, found[query].offset

    rewrite(copy, swap_found)
    with pytest.raises(UserError, match="is damaged: the weight block1_attention"):
        verified(exported[0], copy)
    remove_checksums(copy)
    result = verified(exported[0], copy)
    assert any("logits differ" in failure for failure in result.failures)
    assert any("The first layer that differs from Keras is block1_attention" in failure for failure in result.failures)


def blobs_of(path: Path) -> list[str]:
    function = package.read_specification(path).mlProgram.functions["main"]
    return list(blobs(function.block_specializations[function.opset]))


def remove_checksums(path: Path) -> None:
    specification = package.read_specification(path)
    del specification.description.metadata.userDefined[package.CHECKSUMS_KEY]
    (path / package.PROGRAM).write_bytes(specification.SerializeToString())


@pytest.mark.parametrize(
    ("constant", "value"),
    [("block0_norm1_epsilon_0", 1.0), ("block2_attention_outgoing_epsilon_0", 1e-4)],
)
def test_an_epsilon_that_was_set_back_is_found(
    exported: tuple[Any, Path], copy: Path, constant: str, value: float
) -> None:
    def change(block: Any) -> None:
        tensor = operation(block, constant).attributes["val"].immediateValue.tensor
        tensor.bytes.values = np.float16(value).tobytes()

    rewrite(copy, change)
    with pytest.raises(UserError, match="is damaged: "):
        verified(exported[0], copy)
    if value == 1.0:  # 1e-4 beside sums of 50 is below float16's last digit: only the checksum sees it
        remove_checksums(copy)
        result = verified(exported[0], copy)
        assert any("The first layer that differs from Keras is block0_norm1" in text for text in result.failures)


def test_too_few_images_of_the_same_class_fail(exported: tuple[Any, Path]) -> None:
    """One image may lie on the border between two classes; more than the demand leaves may not."""
    model, path = exported
    other = rebuild(model, batch_size=None)
    head = other.get_layer("head")
    for weight in (head.kernel, head.bias):
        weight.assign(np.roll(keras.ops.convert_to_numpy(weight), 1, axis=-1))  # every class is called the next one
    result = verify.verify(path, other, photographs((28, 28), 4))
    assert [failure for failure in result.failures if "only 0.0% of the images get the same class" in failure]
    alone = verify.verify(path, other, photographs((28, 28), 1))
    assert not [failure for failure in alone.failures if "get the same class" in failure]


def test_a_package_of_another_model_fails(exported: tuple[Any, Path], copy: Path) -> None:
    keras.utils.set_random_seed(7)
    other = make_model("deit", num_classes=4)
    result = verified(other, copy)
    assert any("The first layer that differs from Keras is patch_embedding" in failure for failure in result.failures)
    with pytest.raises(UserError, match=r"takes .*1, 3, 28, 28.*, but got a picture of"):
        verify.verify(copy, make_model("deit", image_size=42), photographs((42, 42), 2))
    with pytest.raises(UserError, match="was not made from this model: it has 4 classes, the model 7"):
        verify.verify(copy, make_model("deit", num_classes=7), photographs((28, 28), 2))
    with pytest.raises(ValueError, match="no images"):
        verify.verify(copy, make_model("deit"), np.zeros((0, 28, 28, 3), "float32"))


@pytest.mark.parametrize(
    ("file", "size", "message"),
    [
        (package.PROGRAM, 500, "truncated or is no Core ML model"),
        (package.PROGRAM, 0, "is empty or is no Core ML model"),
        (package.PROGRAM, None, "model.mlmodel is missing"),
        (package.WEIGHTS, 50_000, "is truncated: weight.bin ends after 50000 bytes"),
        (package.WEIGHTS, 10, "is truncated: weight.bin ends after 10 bytes"),
        (package.WEIGHTS, None, "has lost its weights: weight.bin is missing"),
    ],
)
def test_truncated_and_missing_files_are_named(copy: Path, file: Path, size: int | None, message: str) -> None:
    path = copy / file
    if size is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=message):
        package.read(copy)


def change_description(path: Path, change: Any) -> None:
    specification = package.read_specification(path)
    change(specification)
    (path / package.PROGRAM).write_bytes(specification.SerializeToString())


def as_gray(specification: Any) -> None:
    specification.description.input[0].type.imageType.colorSpace = 10  # GRAYSCALE in FeatureTypes.proto


def as_bgr(specification: Any) -> None:
    specification.description.input[0].type.imageType.colorSpace = 30


def wider(specification: Any) -> None:
    specification.description.input[0].type.imageType.width = 99


def renamed(specification: Any) -> None:
    specification.description.output[0].name = "scores"


def no_input(specification: Any) -> None:
    del specification.description.input[:]


def no_main(specification: Any) -> None:
    functions = specification.mlProgram.functions
    functions["other"].CopyFrom(functions["main"])
    del functions["main"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (as_gray, "described for GRAYSCALE images"),
        (as_bgr, "described for BGR images"),
        (wider, "described for RGB images of 28 x 99"),
        (renamed, r"and the outputs \['probabilities', 'scores'\]"),
        (no_input, r"describes the inputs \[\]"),
        (no_main, "has no function called main"),
    ],
)
def test_a_description_of_another_program_is_named(copy: Path, change: Any, message: str) -> None:
    change_description(copy, change)
    with pytest.raises(UserError, match=message):
        package.read(copy)


def test_the_description_has_a_checksum_too(exported: tuple[Any, Path], copy: Path) -> None:
    def raise_version(specification: Any) -> None:
        specification.specificationVersion = 9

    change_description(copy, raise_version)
    with pytest.raises(UserError, match="the program or its description is not what was exported"):
        verified(exported[0], copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "Manifest.json is missing"), ("{", "Manifest.json cannot be read"), ("[]", "Manifest.json cannot be read")],
)
def test_a_damaged_manifest_is_named(copy: Path, content: str | None, message: str) -> None:
    if content is None:
        (copy / package.MANIFEST).unlink()
    else:
        (copy / package.MANIFEST).write_text(content)
    with pytest.raises(UserError, match=message):
        package.read(copy)


def test_a_part_that_the_manifest_lists_must_be_there(copy: Path) -> None:
    manifest = (copy / package.MANIFEST).read_text()
    (copy / package.MANIFEST).write_text(manifest.replace("model.mlmodel", "other.mlmodel"))
    with pytest.raises(UserError, match=r"not a whole Core ML package: .*other.mlmodel is missing"):
        package.read(copy)


def test_random_flipped_bits_are_one_clear_error(exported: tuple[Any, Path], copy: Path) -> None:
    """In program and description: never a traceback, and never a package that passes unless nothing was changed."""
    file = copy / package.PROGRAM
    whole = file.read_bytes()
    generator = np.random.default_rng(0)
    found = 0
    for place in generator.integers(0, len(whole), 60):
        content = bytearray(whole)
        content[place] ^= 1 << int(generator.integers(0, 8))
        file.write_bytes(content)
        try:
            result = package.damage(package.read(copy))
        except UserError:
            found += 1
        else:
            found += result is not None
    assert found >= 58  # the rest are forms of the same numbers


def test_checksums_that_cannot_be_read_are_damage(exported: tuple[Any, Path], copy: Path) -> None:
    def garble(specification: Any) -> None:
        specification.description.metadata.userDefined[package.CHECKSUMS_KEY] = "{"

    change_description(copy, garble)
    with pytest.raises(UserError, match="its checksums cannot be read"):
        verified(exported[0], copy)


def test_a_path_without_a_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no package .*none\.mlpackage"):
        package.read(tmp_path / "none.mlpackage")


def test_a_reference_to_no_weight_is_named(copy: Path) -> None:
    def change(block: Any) -> None:
        next(iter(blobs(block).values())).offset += 8

    rewrite(copy, change)
    with pytest.raises(UserError, match="there is no weight at byte"):
        package.read(copy)


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    path = programs.save(
        tmp_path / "sine.mlpackage", (1, 4), lambda builder, x: builder.relu(x=builder.sin(x=x), name="logits")
    )
    with pytest.raises(UserError, match="has operators that cannot be verified here: sin"):
        Interpreter(package.read(path))


def test_a_setting_that_is_not_known_is_named(tmp_path: Path) -> None:
    path = programs.save(
        tmp_path / "reflect.mlpackage",
        (1, 2, 4, 4),
        lambda builder, x: builder.pad(x=x, pad=[1, 1], mode="reflect", name="padded"),
    )
    with pytest.raises(UserError, match=r"The operator padded \(pad\) .* cannot be verified here: pad mode 'reflect'"):
        programs.run(path, np.zeros((1, 2, 4, 4), "float32"))


def test_a_wrong_declared_shape_or_type_is_named(copy: Path) -> None:
    def narrow(block: Any) -> None:
        operation(block, "block0_mlp_gelu").outputs[0].type.tensorType.dimensions[3].constant.size += 1

    pixels = np.zeros((28, 28, 3), np.uint8)
    rewrite(copy, narrow)
    with pytest.raises(UserError, match=r"block0_mlp_gelu \(gelu\) .* gives \(1, 128, 1, 17\), but declares"):
        Interpreter(package.read(copy))(pixels)

    def retype(block: Any) -> None:
        output = operation(block, "block0_mlp_gelu").outputs[0].type.tensorType
        output.dimensions[3].constant.size -= 1
        output.dataType = 23  # INT32 in MIL.proto

    rewrite(copy, retype)
    with pytest.raises(UserError, match=r"gives float32, but declares INT32"):
        Interpreter(package.read(copy))(pixels)


def test_a_program_of_several_outputs_has_logits_by_name(tmp_path: Path) -> None:
    path = programs.save(
        tmp_path / "two.mlpackage",
        (1, 4),
        lambda builder, x: [builder.relu(x=x, name="first"), builder.abs(x=x, name="second")],
    )
    with pytest.raises(UserError, match="no output called logits; its outputs are first, second"):
        logits_output(package.read(path))
    outputs = programs.run(path, np.array([[-1.0, 2.0, -3.0, 4.0]], "float32"))
    np.testing.assert_array_equal(outputs["first"], [[0, 2, 0, 4]])
    np.testing.assert_array_equal(outputs["second"], [[1, 2, 3, 4]])


def test_modes_keep_floats_as_they_say(tmp_path: Path) -> None:
    """float32 ignores declared types, typed rounds results, float16 also what is computed inside."""

    def build(builder: Any, x: Any) -> Any:
        half = builder.cast(x=x, dtype="fp16", name="half")
        total = builder.reduce_sum(x=half, axes=[1], keep_dims=True, name="total")
        return builder.cast(x=total, dtype="fp32", name="logits")

    path = programs.save(tmp_path / "sum.mlpackage", (1, 1000), build)
    x = np.random.default_rng(0).uniform(0, 1, (1, 1000)).astype("float32")
    results = {mode: float(programs.run(path, x, mode)["logits"][0, 0]) for mode in ("float32", "typed", "float16")}
    assert results["float32"] == pytest.approx(float(x.sum()), rel=1e-6)
    half = np.float16(x).astype("float64").sum()
    assert results["typed"] == float(np.float16(half))
    assert results["float16"] != results["typed"]
    assert results["float16"] == pytest.approx(half, rel=5e-3)
    with pytest.raises(ValueError, match="Choose one of float32, typed, float16"):
        Interpreter(package.read(path), "half")

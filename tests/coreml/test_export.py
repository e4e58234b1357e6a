"""Exports that pass and exports that are refused; a trained model in every variant; the command lines."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from PIL import Image

from coreml import compare, export, package, verify
from coreml.interpreter import Interpreter
from mobiatt_tf import data, quantization, verification
from mobiatt_tf.errors import UserError
from mobiatt_tf.models import load_trained
from tests.quantization.small import make_model

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "runs" / "quickstart" / "train"
IMAGES = verification.photographs((28, 28), 8)


def test_an_export_leaves_package_report_and_golden_vectors(tmp_path: Path) -> None:
    model = make_model("deit")
    output = tmp_path / "out" / "model.mlpackage"
    names = ["shirt", "shoe", "bag", "coat"]
    result = export.export(model, output, IMAGES, class_names=names, least_agreement=0.0)
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "model.golden",
        "model.mlpackage",
        "model.mlpackage.json",
        "model.mlpackage.png",
    ]
    assert result.ios == 15
    assert result.verification.passed

    specification = package.read_specification(output)
    image = specification.description.input[0].type.imageType
    assert (image.height, image.width) == (28, 28)
    assert {feature.name for feature in specification.description.output} == {
        "logits",
        "classLabel",
        "classLabel_probs",
    }
    classify = next(op for op in package.read(output).operations if op.type == "classify")
    assert list(classify.arguments["classes"]) == names

    report = json.loads((output.parent / "model.mlpackage.json").read_text())
    assert report["specification_version"] == 6
    assert report["verification"]["passed"]
    assert report["size_bytes"] == result.size_bytes
    assert {operator["name"] for operator in report["verification"]["operators"]} >= {"block0_norm1", "logits"}

    golden = json.loads((output.parent / "model.golden" / "golden.json").read_text())
    interpreter = Interpreter(package.read(output), "typed")
    for picture, logits in zip(golden["images"], golden["logits"], strict=True):
        pixels = np.asarray(Image.open(output.parent / "model.golden" / picture))
        np.testing.assert_allclose(interpreter(pixels)["logits"][0], logits, rtol=1e-5, atol=1e-6)
    assert golden["model"] == "model.mlpackage"


def test_metadata_is_what_xcode_shows(tmp_path: Path) -> None:
    from coreml.convert import Description

    description = Description("A. Author", "Apache-2.0", "1.2", "Clothes")
    export.export(
        make_model("deit"), tmp_path / "model.mlpackage", IMAGES, description=description, least_agreement=0.0
    )
    metadata = package.read_specification(tmp_path / "model.mlpackage").description.metadata
    shown = (metadata.author, metadata.license, metadata.versionString, metadata.shortDescription)
    assert shown == ("A. Author", "Apache-2.0", "1.2", "Clothes")
    assert json.loads(metadata.userDefined["mobiatt.tools"]).keys() == {"keras", "tensorflow", "coremltools"}


def test_a_package_that_fails_is_not_written_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = make_model("deit"), tmp_path / "model.mlpackage"
    export.export(model, output, IMAGES, least_agreement=0.0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setitem(verify.TOLERANCES["float16"], "typed", 1e-9)
    with pytest.raises(verify.RefusedError, match=r"model.mlpackage was not written. In typed its logits differ"):
        export.export(model, output, IMAGES)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match="was not written"):
        export.export(model, tmp_path / "new" / "other.mlpackage", IMAGES)
    assert not list((tmp_path / "new").iterdir())


def test_int8_steps_that_are_wrong_by_one_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step is within what rounding may move a single number, so the logits alone would pass."""
    from coreml import graph

    right = graph.affine
    monkeypatch.setattr(
        graph, "affine", lambda quantizer: right(quantizer)._replace(zero_point=right(quantizer)[1] + 1)
    )
    model = quantization.quantize_aware(make_model("deit"), "int8")
    quantization.calibrate(model, [IMAGES])
    with pytest.raises(
        verify.RefusedError, match=r"does not match the model even in float32. .*The layer .* differs by"
    ):
        export.export(model, tmp_path / "model.mlpackage", IMAGES, least_agreement=0.0)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_is_wrong_in_float32_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verify.TOLERANCES["float32"], "float32", 1e-12)
    with pytest.raises(UserError, match="does not match the model even in float32"):
        export.export(make_model("deit"), tmp_path / "model.mlpackage", IMAGES)


def test_what_is_in_the_way_is_named_and_stays(tmp_path: Path) -> None:
    model = make_model("deit")
    (tmp_path / "file.mlpackage").write_text("mine")
    with pytest.raises(UserError, match=r"file.mlpackage is a file"):
        export.export(model, tmp_path / "file.mlpackage", IMAGES, least_agreement=0.0)
    (tmp_path / "mine.golden").mkdir()
    (tmp_path / "mine.golden" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"mine.golden is there and was not written by an export"):
        export.export(model, tmp_path / "mine.mlpackage", IMAGES)
    with pytest.raises(ValueError, match=r"must end in .mlpackage, but nothing does not"):
        export.export(model, tmp_path / "nothing", IMAGES)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "file.mlpackage", "mine.golden", "mine.golden/mine.txt",
    ]  # fmt: skip


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files makes every longer write fail, as a full disk does."""
    program = (
        "import resource, signal, sys\n"
        "from coreml import export\n"
        "from mobiatt_tf.errors import UserError\n"
        "from mobiatt_tf.verification import photographs\n"
        "from tests.quantization.small import make_model\n"
        "model, images = make_model('deit'), photographs((28, 28), 4)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))\n"
        "try:\n"
        "    export.export(model, sys.argv[1], images, precision='float32')\n"
        "except UserError as error:\n"
        "    print('refused:', error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out" / "model.mlpackage")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert "refused:" in result.stdout, result.stderr
    assert "cannot be written" in result.stdout
    assert not list(tmp_path.rglob("*model*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "int4"}, "Choose one of float, int8, palette8, w8a8"),
        ({"weights": "int8", "ios": 15}, "int8 weights need iOS 16, but iOS 15"),
        ({"weights": "w8a8"}, "w8a8 needs a quantized model"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export.export(make_model("deit"), tmp_path / "model.mlpackage", IMAGES, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_quantized_model_cannot_be_compressed_twice(tmp_path: Path) -> None:
    model = quantization.quantize_aware(make_model("deit"), "int8")
    quantization.calibrate(model, [IMAGES])
    with pytest.raises(ValueError, match="quantized already: its weights cannot become palette8"):
        export.export(model, tmp_path / "model.mlpackage", IMAGES, weights="palette8")


@pytest.mark.parametrize(("weights", "ios"), [("int8", None), ("palette8", None), ("palette8", 18)])
def test_compressed_weights_are_smaller_and_match(weights: str, ios: int | None, tmp_path: Path) -> None:
    model = make_model("deit")
    small = export.export(model, tmp_path / "small.mlpackage", IMAGES, weights=weights, ios=ios, least_agreement=0.0)
    assert small.verification.kind == weights
    assert small.ios == (ios or 16)
    kernels = sum(np.prod(weight.shape) for weight in model.weights if weight.path.endswith("kernel"))
    compressed = [array for *_, array in package.weight_arrays(package.read(small.path)) if array.itemsize == 1]
    assert sum(array.size for array in compressed) >= 0.95 * kernels
    assert small.verification.comparisons["typed"].max_relative_error < 0.05


@pytest.fixture(scope="module")
def trained() -> tuple[keras.Model, data.Dataset]:
    """The quickstart's model, which `make pytest` trains first, and its dataset."""
    return load_trained(QUICKSTART), verification.dataset_of(str(QUICKSTART), None, None)


@pytest.mark.slow
def test_every_variant_of_a_trained_model_passes_its_gates(
    trained: tuple[keras.Model, data.Dataset], tmp_path: Path
) -> None:
    model, dataset = trained
    found = compare.compare(model, dataset, tmp_path, check_images=200, calibration_images=256)
    assert found["refused"] == {}
    assert list(found["rows"]) == ["float32", "float16", "int8", "palette8", "w8a8"]
    for name, bound in (("float32", 1e-4), ("float16", 1e-2), ("int8", 5e-2), ("palette8", 5e-2), ("w8a8", 0.2)):
        assert found["rows"][name]["max_relative_error"] < bound
        assert found["rows"][name]["agreement"] >= 0.98
    report = json.loads((tmp_path / "float16.mlpackage.json").read_text())["verification"]
    comparisons = report["comparisons"]
    assert comparisons["typed"]["max_relative_error"] < 1e-2
    assert comparisons["float16"]["max_relative_error"] < 2e-2
    assert min(comparison["agreement"] for comparison in comparisons.values()) >= 0.99
    assert comparisons["typed"]["images"] == 200
    assert comparisons["typed"]["keras_top1"] > 0.8
    sizes = {name: row["size_bytes"] for name, row in found["rows"].items()}
    assert sizes["int8"] < 0.75 * sizes["float16"] < 0.5 * sizes["float32"]
    table = compare.format_table(found)
    assert "palette8" in table
    assert "200 test images of fashion_mnist" in table


def test_variants_that_are_refused_leave_no_older_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = data.load("digits")
    model = make_model("deit", num_classes=10)
    monkeypatch.setattr(compare, "VARIANTS", {name: compare.VARIANTS[name] for name in ("float32", "float16")})
    monkeypatch.setattr(verify, "LEAST_AGREEMENT", {"float32": 0.0, "float16": 0.0})
    found = compare.compare(model, dataset, tmp_path, check_images=8)
    assert list(found["rows"]) == ["float32", "float16"]
    monkeypatch.setitem(verify.TOLERANCES["float16"], "typed", 1e-9)
    found = compare.compare(model, dataset, tmp_path, check_images=8)
    assert list(found["rows"]) == ["float32"]
    assert "float16.mlpackage was not written" in found["refused"]["float16"]
    assert "float16       refused" in compare.format_table(found)
    assert not list(tmp_path.glob("float16*"))
    monkeypatch.setitem(verify.TOLERANCES["float32"], "float32", 1e-12)
    with pytest.raises(UserError, match="No package passed"):
        compare.compare(model, dataset, tmp_path, check_images=8)


def run(module: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_command_lines_from_a_keras_file(tmp_path: Path) -> None:
    load_trained(QUICKSTART).save(tmp_path / "model.keras")
    (tmp_path / "labels.txt").write_text("\n".join(f"clothes {kind}" for kind in range(10)))
    checkpoint = f"--checkpoint={tmp_path / 'model.keras'}"
    written = run(
        "coreml.export", checkpoint, f"--output={tmp_path / 'model.mlpackage'}", "--dataset=fashion_mnist", "--ios=16",
        "--check_images=20", f"--labels={tmp_path / 'labels.txt'}",
    )  # fmt: skip
    assert written.returncode == 0, written.stderr
    assert "same class on 100.00% of 20 images" in written.stdout
    assert "iOS 16 (specification version 7)" in written.stdout
    classify = next(op for op in package.read(tmp_path / "model.mlpackage").operations if op.type == "classify")
    assert classify.arguments["classes"][3] == "clothes 3"

    weights = tmp_path / "model.mlpackage" / package.WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-2] ^= 64
    weights.write_bytes(content)
    refused = run("coreml.verify", str(tmp_path / "model.mlpackage"), checkpoint, "--check_images=5")
    assert refused.returncode == 1
    assert "is damaged: the weight" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_verify_command_resizes_the_model_and_reports_what_fails(tmp_path: Path) -> None:
    load_trained(QUICKSTART).save(tmp_path / "model.keras")
    checkpoint, path = f"--checkpoint={tmp_path / 'model.keras'}", tmp_path / "model.mlpackage"
    common = (checkpoint, "--dataset=fashion_mnist", "--check_images=20")
    written = run("coreml.export", *common, f"--output={path}", "--image_size=42x28")
    assert written.returncode == 0, written.stderr
    before = json.loads((tmp_path / "model.mlpackage.json").read_text())
    passed = run("coreml.verify", str(path), *common)
    assert passed.returncode == 0, passed.stderr
    assert json.loads((tmp_path / "model.mlpackage.json").read_text()) == before

    keras.utils.set_random_seed(11)
    make_model("deit", num_classes=10).save(tmp_path / "other.keras")
    failed = run("coreml.verify", str(path), f"--checkpoint={tmp_path / 'other.keras'}", *common[1:])
    assert failed.returncode == 1
    assert "FAILED    The first layer that differs from Keras is patch_embedding" in failed.stdout
    assert "did not pass" in failed.stderr
    assert not json.loads((tmp_path / "model.mlpackage.json").read_text())["verification"]["passed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("coreml.export", ["--checkpoint=nowhere", "--output=x.mlpackage"], "There is no model at"),
        ("coreml.export", ["--variant=quickstart", "--output=x.mlmodel"], "must end in .mlpackage"),
        ("coreml.export", ["--output=x.mlpackage"], "Give --checkpoint="),
        (
            "coreml.export",
            ["--variant=quickstart", "--output=x.mlpackage", "--weights=int8", "--ios=15", "--check_images=4"],
            "int8 weights need iOS 16",
        ),
        (
            "coreml.export",
            ["--variant=quickstart", "--output=x.mlpackage", "--weights=w8a8"],
            "Give --dataset: the ranges",
        ),
        ("coreml.export", ["--variant=quickstart", "--output=x.mlpackage", "--labels=none.txt"], "There is no file"),
        ("coreml.verify", ["x.mlpackage", "--checkpoint=nowhere"], "There is no package"),
        ("coreml.verify", ["--checkpoint=nowhere"], "Give exactly PACKAGE"),
        ("coreml.lint", ["x.mlpackage"], "There is no package"),
        ("coreml.compare", ["--checkpoint=nowhere", "--output_dir=out"], "There is no model at"),
        ("coreml.device", ["x.mlpackage"], "Mac"),
    ],
)
def test_command_line_errors_are_one_line(module: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(module, *arguments, cwd=tmp_path)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())

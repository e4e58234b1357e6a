"""python -m mobiatt_tf.training.evaluate: the same model in every format, and what goes wrong."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from PIL import Image

from mobiatt_tf import data, quantization, training, verification
from mobiatt_tf.data.convert import convert as write_records
from mobiatt_tf.errors import UserError
from mobiatt_tf.layers import ConvBN
from mobiatt_tf.training import evaluation, evaluation_report, graphs, metrics
from mobiatt_tf.training.graphs import Graph
from mobiatt_tf.training.interrupts import StopSignals
from tests.processes import run_module
from tests.training.small import make_dataset, make_model, recipe
from tests.training.test_metrics import assert_same

CLASSES = 10
IMAGES = 60  # of digits: what the NumPy interpreter runs in a few seconds


# The formats.


@dataclass(frozen=True)
class Formats:
    """One model trained on digits in every format."""

    directory: Path
    model: keras.Model

    def path(self, name: str) -> str:
        return str(self.directory / name)


FLOAT_FILES = ("model.keras", "float32.tflite", "model.onnx", "model.mlpackage")


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Formats:
    from coreml import export
    from mobiatt_tf.interop import onnx
    from tflite import convert

    directory = tmp_path_factory.mktemp("formats")
    keras.utils.set_random_seed(0)
    images = keras.Input((8, 8, 3), name="images")
    x = ConvBN(16, 3, 1, name="conv_bn1")(images)
    x = keras.layers.ReLU(name="relu1")(x)
    x = ConvBN(24, 3, 2, name="conv_bn2")(x)
    x = keras.layers.ReLU(name="relu2")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(images, keras.layers.Dense(CLASSES, name="head")(x))
    dataset = data.load("digits")
    pixels = np.asarray(data.normalize(np.asarray(dataset.train.images)))  # float32 [1442, 8, 8, 3]
    model.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(pixels, dataset.train.labels, batch_size=64, epochs=4, verbose=0)

    model.save(directory / "model.keras")
    (directory / "float32.tflite").write_bytes(convert.convert(model))
    (directory / "model.onnx").write_bytes(onnx.convert(model).SerializeToString())
    checked, labels = verification.dataset_images(dataset, (8, 8), 16)
    export.export(model, directory / "model.mlpackage", checked, labels, precision="float32", least_agreement=0.0)
    quantized = quantization.quantize_aware(model, "int8")
    quantization.calibrate(quantized, [pixels[:256]])
    (directory / "int8.tflite").write_bytes(convert.convert(quantized))
    return Formats(directory, model)


def load(path: str | Path, batch_size: int = 32) -> Graph:
    return graphs.load(path, batch_size, 1)


def evaluate(paths: list[str], work_dir: Path, images: int = IMAGES, **options: Any) -> list[evaluation.Result]:
    dataset = data.load("digits")
    split = evaluation.chosen_images(dataset.test, images)
    return evaluation.evaluate([load(path) for path in paths], split, dataset.class_names, work_dir, **options)


@pytest.mark.slow
def test_the_same_model_has_the_same_numbers_in_every_format(formats: Formats, tmp_path: Path) -> None:
    results = evaluate([formats.path(name) for name in (*FLOAT_FILES, "int8.tflite")], tmp_path / "work")
    names = data.load("digits").class_names
    reference, *others = [metrics.to_json(result.evaluation, result.calibration, names) for result in results]
    assert reference["top1"] > 0.6  # it has learnt something: the numbers are not those of one class
    assert reference["images"] == IMAGES
    for result, other in zip(results[1:4], others[:3], strict=True):
        assert_same(reference, other, 1e-4)
        assert result.agreement == 1
    int8 = others[3]
    assert int8["top1"] == pytest.approx(reference["top1"], abs=0.05)
    assert int8["loss"] == pytest.approx(reference["loss"], abs=0.05)
    assert int8["loss"] != pytest.approx(reference["loss"], abs=1e-5)  # it is another graph
    assert results[4].agreement > 0.9
    assert [result.graph.format for result in results] == ["keras", "tflite", "onnx", "coreml", "tflite"]
    assert [result.graph.runtime["types"] for result in results] == ["float32"] * 4 + ["int8"]
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_the_numbers_of_training_are_those_of_the_command(formats: Formats, tmp_path: Path) -> None:
    dataset = data.load("digits")
    trained = training.Evaluator(formats.model, training.make_strategy("one"), 64)(dataset.test)
    (found,) = evaluate([formats.path("model.keras")], tmp_path / "work", images=len(dataset.test))
    assert found.evaluation.count == trained.count == len(dataset.test)
    assert found.evaluation.loss == pytest.approx(trained.loss, abs=1e-5)
    assert (found.evaluation.top1, found.evaluation.top5) == pytest.approx((trained.top1, trained.top5))
    assert found.evaluation.confusion.tolist() == trained.confusion.tolist()


@pytest.mark.slow
def test_a_stopped_evaluation_goes_on_where_it_was(formats: Formats, tmp_path: Path) -> None:
    seen: list[int] = []

    def counted() -> Graph:
        graph = load(formats.path("float32.tflite"), batch_size=8)

        def predict(images: np.ndarray) -> np.ndarray:
            seen.append(len(images))
            if len(seen) == 2:
                signals.received = 15
            return graph.predict(images)

        return Graph(**{**graph.__dict__, "predict": predict})

    dataset = data.load("digits")
    split = evaluation.chosen_images(dataset.test, 40)
    signals = StopSignals()
    with pytest.raises(evaluation.EvaluationInterrupted, match=r"SIGTERM: 16 of 40 images"):
        evaluation.evaluate([counted()], split, dataset.class_names, tmp_path, signals)
    assert seen == [8, 8]
    (found,) = evaluation.evaluate([counted()], split, dataset.class_names, tmp_path)
    assert seen == [8] * 5  # three more
    (whole,) = evaluate([formats.path("float32.tflite")], tmp_path, images=40)
    assert found.evaluation.loss == whole.evaluation.loss
    assert found.evaluation.confusion.tolist() == whole.evaluation.confusion.tolist()


@pytest.mark.slow
def test_checkpoints_have_the_last_or_the_averaged_weights(tmp_path: Path) -> None:
    settings = recipe(epochs=2, ema_decay=0.9)
    dataset = make_dataset()
    training.train(make_model, dataset, settings, tmp_path, training.make_strategy("one"), model_config={})
    newest = max((tmp_path / "checkpoints").glob("step_*.json")).with_suffix("")
    average, last, of_run = (
        evaluation.evaluate([graph], dataset.test, dataset.class_names, tmp_path / "work")[0].evaluation
        for graph in (
            graphs.load(newest, 8, 1),
            graphs.load(newest, 8, 1, "last"),
            graphs.load(tmp_path, 8, 1),
        )
    )
    assert average.loss == pytest.approx(of_run.loss, abs=1e-6)  # model.keras holds the average
    assert abs(last.loss - average.loss) > 1e-4
    files = sorted(newest.parent.glob(f"{newest.name}.data-*"))
    content = files[0].read_bytes()
    for damaged in (content[:100], bytes([*content[:40], content[40] ^ 1, *content[41:]])):
        files[0].write_bytes(damaged)
        with pytest.raises(UserError, match=r"step_\d+ is damaged or of another model"):
            load(newest)
    with pytest.raises(UserError, match=r"There is no checkpoint .*step_000000999. Whole ones"):
        load(newest.with_name("step_000000999"))


# What goes wrong.


@pytest.mark.slow
def test_another_number_of_classes_is_said(formats: Formats, tmp_path: Path) -> None:
    dataset = make_dataset()
    with pytest.raises(UserError, match=r"model.keras has 10 classes, but the dataset has 3"):
        evaluation.evaluate([load(formats.path("model.keras"))], dataset.test, dataset.class_names, tmp_path)


@pytest.mark.slow
def test_a_dataset_without_test_images_is_said(formats: Formats, tmp_path: Path) -> None:
    dataset = data.load("digits")
    nothing = dataset.test.select(np.zeros(0, int))
    with pytest.raises(UserError, match="There is nothing to evaluate"):
        evaluation.evaluate([load(formats.path("model.keras"))], nothing, dataset.class_names, tmp_path)


@pytest.mark.parametrize("name", ["model.keras", "model.tflite", "model.onnx", "model.mlpackage", "run"])
def test_a_missing_file_is_said(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{name}"):
        load(tmp_path / name)


@pytest.mark.parametrize("name", ["model.h5", "weights.bin"])
def test_an_unknown_suffix_is_said(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(UserError, match=rf"{name} is of no known kind. Give a training run's directory"):
        load(tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.keras", "float32.tflite", "model.onnx"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_file_is_said(name: str, damage: str, formats: Formats, tmp_path: Path) -> None:
    content = (formats.directory / name).read_bytes()
    damaged = {"truncated": content[: len(content) // 2], "empty": b"", "text": b"this is no model\n" * 10}[damage]
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(UserError, match=rf"{name}") as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["model.mlmodel", "weight.bin", "Manifest.json"])
def test_a_damaged_package_is_said(part: str, formats: Formats, tmp_path: Path) -> None:
    package = shutil.copytree(formats.directory / "model.mlpackage", tmp_path / "model.mlpackage")
    (file,) = package.rglob(part)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"model\.mlpackage") as caught:
        load(package)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["keras", "tflite", "onnx"])
@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 8, 1), (64,)])
def test_another_layout_of_the_input_is_said(suffix: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    from mobiatt_tf.interop import onnx
    from tflite import convert

    images = keras.Input(shape, name="images")
    x = keras.layers.Flatten(name="flatten")(images)
    model = keras.Model(images, keras.layers.Dense(CLASSES, name="head")(x))
    path = tmp_path / f"model.{suffix}"
    if suffix == "keras":
        model.save(path)
    else:
        path.write_bytes(convert.convert(model) if suffix == "tflite" else onnx.convert(model).SerializeToString())
    with pytest.raises(UserError, match=r"it must take one image \[batch, height, width, 3\]"):
        load(path)


@pytest.mark.parametrize("paths", [["", "model.keras"], ["model.keras", " "], [""]])
def test_an_empty_name_is_said(paths: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"--graph={','.join(paths)} has an empty name"):
        evaluation.check_flags(paths, [], tmp_path)


def test_an_output_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    evaluation.check_flags(["model.keras"], [], tmp_path / "new" / "deep")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for output_dir in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(UserError, match=rf"cannot be written: {tmp_path / 'file'} is a file\. Give a directory"):
            evaluation.check_flags(["model.keras"], [], output_dir)
    with pytest.raises(UserError, match=r"--output_dir=/proc/evaluation cannot be written: "):
        evaluation.check_flags(["model.keras"], [], Path("/proc/evaluation"))  # refuses even root


def test_other_files_in_the_work_directory_stay(tmp_path: Path) -> None:
    images = keras.Input((8, 8, 3), name="images")
    x = keras.layers.GlobalAveragePooling2D(name="pool")(images)
    keras.Model(images, keras.layers.Dense(CLASSES, name="head")(x)).save(tmp_path / "model.keras")
    work_dir = tmp_path / "work"
    work_dir.mkdir()
    (work_dir / "mine.txt").write_text("mine")
    evaluate([str(tmp_path / "model.keras")], work_dir)
    assert [path.name for path in work_dir.iterdir()] == ["mine.txt"]
    (work_dir / "mine.txt").unlink()
    evaluate([str(tmp_path / "model.keras")], work_dir)
    assert not work_dir.exists()


def test_logits_of_other_records_are_not_taken(tmp_path: Path) -> None:
    images = keras.Input((8, 8, 3), name="images")
    x = keras.layers.Flatten(name="flatten")(images)
    keras.Model(images, keras.layers.Dense(CLASSES, name="head")(x)).save(tmp_path / "model.keras")
    digits = data.load("digits")
    first, second = digits.test.take(40), digits.test.select(np.arange(40)[::-1] + 40)
    second = data.Split(first.labels, second.images)  # the same labels and names, other pixels
    converted = []
    for name, split in (("first", first), ("second", second)):
        write_records(data.Dataset(name, digits.class_names, split, split), tmp_path / name, show_progress=False)
        converted.append(data.load(str(tmp_path / name), tmp_path / "cache").test)
    signals = StopSignals()
    signals.received = 15
    graph = load(tmp_path / "model.keras", batch_size=8)
    with pytest.raises(evaluation.EvaluationInterrupted, match=r"8 of 40 images"):
        evaluation.evaluate([graph], converted[0], digits.class_names, tmp_path / "work", signals)
    (found,) = evaluation.evaluate([graph], converted[1], digits.class_names, tmp_path / "work")
    (expected,) = evaluation.evaluate([graph], converted[1], digits.class_names, tmp_path / "fresh")
    assert found.evaluation.loss == expected.evaluation.loss
    assert len(list((tmp_path / "work").iterdir())) == 1  # those of the first are kept


def test_probabilities_in_place_of_logits_are_said(tmp_path: Path) -> None:
    images = keras.Input((8, 8, 3), name="images")
    x = keras.layers.GlobalAveragePooling2D(name="pool")(images)
    keras.Model(images, keras.layers.Dense(CLASSES, "softmax", name="head")(x)).save(tmp_path / "model.keras")
    with pytest.raises(UserError, match="gives probabilities, not logits"):
        evaluate([str(tmp_path / "model.keras")], tmp_path / "work")


# The command.


@pytest.mark.slow
def test_the_command_leaves_table_json_and_picture(formats: Formats, tmp_path: Path) -> None:
    paths = [formats.path(name) for name in ("model.keras", "float32.tflite", "int8.tflite")]
    done = run_module(
        "mobiatt_tf.training.evaluate",
        f"--graph={','.join(paths)}",
        "--dataset=digits",
        "--limit=50",
        "--num_threads=1",
        f"--output_dir={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation_report.format_table(content) in done.stdout
    assert content["num_threads"] == 1
    assert content["dataset"]["evaluated_images"] == 50
    assert content["dataset"]["fingerprint"]
    assert content["versions"]["tensorflow"]
    first, second, third = content["results"]
    assert first.keys() == second.keys() == third.keys()
    assert first["top1"] == second["top1"]
    assert np.trace(np.array(first["confusion_matrix"])) == round(first["top1"] * 50)
    with Image.open(tmp_path / "evaluation.png") as picture:
        assert min(picture.size) > 800
    assert not (tmp_path / "unfinished").exists()

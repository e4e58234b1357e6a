"""Quantized detectors and segmenters on whole test sets: reports, refusals, and quantization-aware training."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_models import DENSE, resize
from mobiatt_tf import files, quantization, tasks, training, verification
from mobiatt_tf.data.dense import DenseDataset
from mobiatt_tf.errors import UserError
from mobiatt_tf.lean import lean
from tests.tasks import pictures
from tflite import comparison, convert, dense_report, export, qat, quantize
from tflite.verify import BOX_TOLERANCES, TOLERANCES

SIZE = (48, 64)
TASKS = pytest.mark.parametrize("task", ["detection", "segmentation"])
HEADLINES = {"detection": ["ap", "ap50"], "segmentation": ["miou", "pixel_accuracy"]}


def make_dataset(task: str, directory: Path) -> DenseDataset:
    """Rectangles of three colours, in images of several shapes."""
    split = pictures.detection_split if task == "detection" else pictures.segmentation_split
    return pictures.dataset(
        split(directory / "train", [(48, 64)] * 24), split(directory / "test", [(48, 64), (64, 64), (30, 64)], seed=90)
    )


def make_model(task: str) -> keras.Model:
    keras.utils.set_random_seed(0)
    width: dict[str, Any] = {"head_depth": 1} if task == "detection" else {"head_channels": 8}
    return DENSE[task]("pvt_v2", "quickstart", image_size=SIZE, num_classes=3, channels=16, training_size=64, **width)


def recipe(**changes: Any) -> training.Recipe:
    values = {"epochs": 10, "batch_size": 8, "learning_rate": 5e-3, "warmup_epochs": 0.5, "ema_decay": 0.0}
    return training.Recipe(**{**values, "label_smoothing": 0.0, **changes})


@pytest.fixture(scope="module", params=["detection", "segmentation"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, DenseDataset]:
    """A task, a run that has trained a small model for it, and its dataset."""
    directory = tmp_path_factory.mktemp(request.param)
    dataset = make_dataset(request.param, directory)
    training.train(
        lambda: make_model(request.param),
        dataset,
        recipe(),
        directory / "float",
        training.make_strategy("one"),
        show_progress=False,
        task=tasks.make_task(request.param),
    )
    return request.param, directory / "float", dataset


@pytest.mark.slow
def test_calibrated_files_stand_beside_the_float_model(
    run: tuple[str, Path, DenseDataset], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, directory, dataset = run
    model = quantize.load_float(str(directory), dataset)
    # On pictures of one colour a tiny model's numbers jump: all points may be lost here, the gates are tested below.
    report = quantize.quantize(model, dataset, ["int8", "dynamic"], tmp_path, 16, max_top1_loss=1.0, runs=2)
    rows = {row["name"]: row for row in report["rows"]}
    assert rows.keys() == {"Keras float32", "Keras fake-quant", "float32.tflite", "int8.tflite", "dynamic.tflite"}
    assert (report["task"], list(report["metrics"])) == (task, HEADLINES[task])
    assert all(list(row["metrics"]) == HEADLINES[task] for row in rows.values())
    for key, value in rows["Keras float32"]["metrics"].items():
        assert rows["float32.tflite"]["metrics"][key] == pytest.approx(value, abs=1e-3)
    assert rows["float32.tflite"]["agreement"] > 0.999
    assert max(rows["float32.tflite"]["output_errors"].values()) < 1e-5
    assert rows["int8.tflite"]["agreement_with_fake_quant"] > 0.95
    assert max(rows["int8.tflite"]["errors_from_fake_quant"].values()) < 0.1
    assert rows["dynamic.tflite"]["agreement_with_fake_quant"] is None
    assert rows["int8.tflite"]["refused"] is None
    assert rows["int8.tflite"]["partitions"] == 1
    if task == "segmentation":
        assert rows["Keras float32"]["metrics"]["miou"] > 0.5  # it has learnt
        assert rows["int8.tflite"]["metrics"]["miou"] > rows["Keras float32"]["metrics"]["miou"] - 0.1
    written = {path.name for path in tmp_path.iterdir()} - {".lock"}
    assert {"int8.tflite", "dynamic.tflite", "float32.tflite", "report.json", "report.png"} <= written
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == report["rows"]
    quantize.finish(report, tmp_path)
    printed = capsys.readouterr().out
    assert ("AP50" if task == "detection" else "mIoU") in printed
    assert "Largest layer errors" in printed


@pytest.mark.slow
def test_training_with_quantization_goes_on_and_its_file_is_exported(
    run: tuple[str, Path, DenseDataset], tmp_path: Path
) -> None:
    task, directory, dataset = run
    arguments = (str(directory), dataset, "int8", recipe(epochs=1, learning_rate=1e-4), tmp_path / "train")
    results = qat.fine_tune(*arguments, training.make_strategy("one"), calibration_images=16, task=task)
    assert results["task"] == task
    assert results["model"]["policy"] == "int8"
    twin = keras.saving.load_model(tmp_path / "train" / "model.keras")
    quantization.check_calibrated(twin)
    images, labels, what = verification.checking_images(None, None, None, SIZE, 3, task)
    assert (labels, what[:5]) == (None, "crops")
    classes = verification.class_names_of_run(directory)
    result = export.export(twin, tmp_path / "int8.tflite", None, images, runs=2, classes=classes)
    assert result.comparison.passed
    assert json.loads((tmp_path / "int8.json").read_text())["classes"] == ["red", "green", "blue"]
    for shared in ("class_head_output", "box_head_output") if task == "detection" else ():
        model = lean(quantize.load_float(str(directory), dataset))
        start = quantization.calibrated_copy(model, "int8", dataset, 16)
        assert twin.get_layer(shared).output_quantizer.range == pytest.approx(
            start.get_layer(shared).output_quantizer.range, rel=1e-5
        )


@pytest.mark.slow
def test_a_damaged_file_is_refused_by_its_metric(run: tuple[str, Path, DenseDataset], tmp_path: Path) -> None:
    task, directory, dataset = run
    if task == "detection":
        pytest.skip("needs a model whose metric is far from 0")
    model = quantize.load_float(str(directory), dataset)
    twin = quantization.calibrated_copy(model, "int8", dataset, 16)
    twin.get_layer("segment_logits").input_quantizer.set_range(0.0, 1e-3)
    paths = {name: tmp_path / name for name in ("float32.tflite", "int8.tflite")}
    for path, source in zip(paths.values(), (model, twin), strict=True):
        path.write_bytes(convert.convert(source))
    output = tmp_path / "output"
    output.mkdir()
    report = quantize.compare_and_keep(model, {"int8.tflite": twin}, dataset, paths, output, 0.01, runs=2)
    refused = {row["name"]: row["refused"] for row in report["rows"]}
    assert refused["float32.tflite"] is None
    assert "The layer that loses most is segment_logits" in refused["int8.tflite"]
    assert not (output / "int8.tflite").exists()
    with pytest.raises(UserError, match=r"loses .* points, more than the allowed 1\.00"):
        quantize.finish(report, output)


@pytest.mark.slow
def test_a_detector_that_is_not_its_twin_is_refused(run: tuple[str, Path, DenseDataset], tmp_path: Path) -> None:
    task, directory, dataset = run
    if task == "segmentation":
        pytest.skip("about anchors")
    model, other = (quantize.load_float(str(directory), dataset) for _ in range(2))
    bias = other.get_layer("class_head_output").bias
    bias.assign(bias - 1.0)
    twin, other_twin = (quantization.calibrated_copy(each, "int8", dataset, 16) for each in (model, other))
    paths = {name: tmp_path / name for name in ("float32.tflite", "int8.tflite")}
    for path, source in zip(paths.values(), (model, other_twin), strict=True):
        path.write_bytes(convert.convert(source))
    output = tmp_path / "output"
    output.mkdir()
    (output / "int8.json").write_text('{"classes": ["old"]}')
    # All points may be lost: a model this small finds next to nothing.
    report = quantize.compare_and_keep(model, {"int8.tflite": twin}, dataset, paths, output, 1.0, runs=2)
    refused = {one["name"]: one["refused"] for one in report["rows"]}
    assert refused["float32.tflite"] is None
    assert "the converter changed it" in refused["int8.tflite"]
    assert not list(output.glob("int8.*"))
    beside = json.loads((output / "float32.json").read_text())
    assert (beside["task"], tuple(beside["classes"])) == (task, dataset.class_names)
    assert beside["sha256"] == files.sha256(output / "float32.tflite")


def row(**changes: Any) -> dense_report.DenseRow:
    """Of a detector's int8 file that loses nothing."""
    values: dict[str, Any] = {
        "name": "int8.tflite",
        "file": "int8.tflite",
        "metrics": {"ap": 0.30, "ap50": 0.5},
        "agreement": 1.0,
        "agreement_with_fake_quant": 1.0,
        "output_errors": {"boxes": 0.0, "logits": 0.0},
        "errors_from_fake_quant": {"boxes": 0.05, "logits": 0.05},
        "box_error": 0.0,
        "box_error_from_fake_quant": 0.05,
    }
    return dense_report.DenseRow(**{**values, **changes})


def refusal(float_score: float = 0.30, max_loss: float = 0.01, has_twin: bool = True, **changes: Any) -> str | None:
    errors = {"class_head_output": 0.5, "fpn_lateral2": 0.1}
    refused: str | None = quantize.judge(row(**changes), float_score, max_loss, errors, has_twin).refused
    return refused


def metrics(ap: float) -> dict[str, float]:
    return {"ap": ap, "ap50": ap}


def test_good_files_are_kept() -> None:
    assert refusal() is None
    assert refusal(metrics=metrics(0.2901)) is None
    assert refusal(metrics=metrics(0.35)) is None
    assert refusal(file=None, metrics=metrics(0.0)) is None  # a Keras model
    nothing: dict[str, Any] = {
        "agreement_with_fake_quant": None,
        "errors_from_fake_quant": None,
        "box_error_from_fake_quant": None,
    }
    assert refusal(has_twin=False, **nothing) is None
    assert refusal(agreement_with_fake_quant=comparison.MIN_AGREEMENT) is None
    assert refusal(box_error_from_fake_quant=None) is None  # nothing is found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": metrics(0.28)}, "loses 2.00 points, more than the allowed 1.00 .* most is class_head_output"),
        ({"metrics": metrics(float("nan"))}, "more than the allowed 1.00"),
        ({"errors_from_fake_quant": {"boxes": 0.05, "logits": 2 * TOLERANCES["int8"]}}, "of the largest of logits"),
        ({"errors_from_fake_quant": {"boxes": float("nan"), "logits": 0.0}}, "by nan of the largest of boxes"),
        ({"box_error_from_fake_quant": 2 * BOX_TOLERANCES["int8"]}, "of boxes around objects, more than the allowed"),
        ({"box_error_from_fake_quant": float("nan")}, "by nan of the largest of boxes around objects"),
        ({"agreement_with_fake_quant": comparison.MIN_AGREEMENT - 0.01}, "at 97.00% of the places only"),
        ({"agreement_with_fake_quant": float("nan")}, "at nan% of the places only"),
        ({"agreement_with_fake_quant": None, "errors_from_fake_quant": None}, "could not be compared with the fake"),
    ],
)
def test_bad_files_are_refused(changes: dict[str, Any], message: str) -> None:
    reason = refusal(**changes)
    assert reason is not None
    assert re.search(message, reason)


def test_a_score_below_the_allowed_loss_is_no_licence_to_find_nothing() -> None:
    reason = refusal(0.008, metrics=metrics(0.0))
    assert reason is not None
    assert "of so little it may lose 1%" in reason
    assert refusal(0.008, metrics=metrics(0.008 - 1e-6)) is None  # rounding
    assert refusal(0.0, metrics=metrics(0.0)) is None
    assert refusal(0.008, max_loss=1.0, metrics=metrics(0.0)) is None  # all of it may go


@TASKS
def test_the_recipe_of_the_command_fits_the_task(task: str) -> None:
    tasks.make_task(task).check_recipe(training.make_recipe("qat", **qat.DENSE_RECIPE))


@TASKS
def test_images_of_a_dataset_come_as_the_model_sees_them(task: str, tmp_path: Path) -> None:
    dataset = make_dataset(task, tmp_path)
    images = verification.dense_images(task, dataset.test, SIZE, 2)
    assert images.shape == (2, *SIZE, 3)
    assert images.dtype == np.float32
    batches = list(verification.dense_batches(task, dataset.test, (16, 32)))
    assert [batch.shape[1:] for batch in batches] == [(16, 32, 3)]
    assert len(batches[0]) == 3
    # The last picture is 30 x 64: fitted in, the last row is empty; cut out of, nothing is.
    assert (batches[0][2, -1:] == 0).all() == (task == "detection")


def test_models_that_do_not_fit_are_errors(tmp_path: Path) -> None:
    dataset = make_dataset("segmentation", tmp_path)
    model = make_model("segmentation")
    model.save(tmp_path / "model.keras")
    quantize.load_float(str(tmp_path / "model.keras"), dataset)
    other = dataclasses.replace(dataset, class_names=("red", "green", "blue", "grey"))
    with pytest.raises(UserError, match="has 3 classes, the dataset rectangles has 4"):
        quantize.load_float(str(tmp_path / "model.keras"), other)
    with pytest.raises(UserError, match="Give --dataset"):
        quantize.load_dataset(str(tmp_path / "model.keras"), None, None)
    with pytest.raises(ValueError, match="it cannot be written as float32"):
        convert.convert(quantization.quantize_aware(resize(model, (32, 32)), "dynamic"), "float32")

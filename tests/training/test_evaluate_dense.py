"""`python -m mobiatt_tf.training.evaluate` with detectors and segmenters: Keras files and .tflite files alike."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from PIL import Image

import keras_models
from mobiatt_tf import tasks, verification
from mobiatt_tf.errors import UserError
from mobiatt_tf.training import dense_evaluation, graphs
from mobiatt_tf.training.interrupts import Interrupted, StopSignals
from tests.training.small import ROOT
from tflite import convert

CLASSES = ("dark", "light")


@pytest.fixture(scope="module")
def regions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images whose left half is dark and whose right half is light, with label images."""
    folder = tmp_path_factory.mktemp("regions")
    image = np.zeros((40, 64, 3), np.uint8)
    image[:, 32:] = 230
    for split, count in (("training", 1), ("validation", 3)):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(image).save(folder / "images" / split / f"{index}.png")
            labels = (image[..., 0] > 0).astype(np.uint8)
            Image.fromarray(labels).save(folder / "annotations" / split / f"{index}.png")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return folder


@pytest.fixture(scope="module")
def segmenters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A Keras segmenter that is right about `regions`, and its .tflite file."""
    images = keras.Input((32, 32, 3), name="images")
    convolution = keras.layers.Conv2D(2, 1, name="logits")
    model = keras.Model(images, convolution(keras.layers.AveragePooling2D(2)(images)))
    convolution.kernel.assign(np.array([-1.0, 1.0]) * np.ones((1, 1, 3, 2)))
    directory = tmp_path_factory.mktemp("segmenters")
    model.save(directory / "model.keras")
    (directory / "model.tflite").write_bytes(convert.convert(model))
    return [directory / "model.keras", directory / "model.tflite"]


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in COCO's format: noise with one box in each image."""
    folder = tmp_path_factory.mktemp("boxes")
    generator = np.random.default_rng(0)
    (folder / "annotations").mkdir()
    for split, first in (("train", 1), ("val", 11)):
        (folder / split).mkdir()
        content: dict[str, Any] = {"images": [], "annotations": []}
        for index in range(2):
            pixels = generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)
            name, number = f"{first + index}.png", first + index
            Image.fromarray(pixels).save(folder / split / name)
            content["images"].append({"id": number, "file_name": name, "height": 40, "width": 60})
            box = {"id": number, "image_id": number, "category_id": 5 + index, "bbox": [4, 5, 20, 24]}
            content["annotations"].append({**box, "area": 480, "iscrowd": 0})
        content["categories"] = [{"id": 5 + number, "name": name} for number, name in enumerate(CLASSES)]
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def test_a_segmenter_is_measured_as_model_and_as_file(segmenters: list[Path], regions: Path, tmp_path: Path) -> None:
    found = [graphs.load(path, 2, 1) for path in segmenters]
    assert [(graph.task, graph.classes, graph.image_size) for graph in found] == [("segmentation", 2, (32, 32))] * 2
    dataset = tasks.load_dataset("segmentation", str(regions), tmp_path)
    results = dense_evaluation.evaluate(found, dataset, dataset.test, tmp_path / "unfinished")
    for result in results:
        assert result["miou"] > 0.9
        assert result["images"] == 3
        assert list(result["per_class"]) == list(CLASSES)
    assert results[0]["miou"] == pytest.approx(results[1]["miou"], abs=1e-3)
    assert not (tmp_path / "unfinished").exists()


def test_what_was_done_before_a_signal_is_kept(segmenters: list[Path], regions: Path, tmp_path: Path) -> None:
    dataset = tasks.load_dataset("segmentation", str(regions), tmp_path)
    found = [graphs.load(path, 2, 1) for path in segmenters]
    signals = StopSignals()
    second = found[1].predict

    def then_stop(images: np.ndarray) -> Any:
        signals.received = 15
        return second(images)

    def again(_: np.ndarray) -> Any:
        raise AssertionError("what was done is computed again")

    stopped = [found[0], dataclasses.replace(found[1], predict=then_stop)]
    with pytest.raises(Interrupted, match=r"starts with .*model\.tflite"):
        dense_evaluation.evaluate(stopped, dataset, dataset.test, tmp_path / "unfinished", signals)
    resumed = [dataclasses.replace(found[0], predict=again), found[1]]
    whole = dense_evaluation.evaluate(resumed, dataset, dataset.test, tmp_path / "unfinished")
    assert [result["graph"] for result in whole] == [str(path) for path in segmenters]
    assert [result["images"] for result in whole] == [3, 3]
    with pytest.raises(AssertionError, match="computed again"):  # nothing is kept of what is finished
        dense_evaluation.evaluate(resumed, dataset, dataset.test, tmp_path / "unfinished")


def test_whole_images_are_run_at_their_own_size(segmenters: list[Path], regions: Path, tmp_path: Path) -> None:
    dataset = tasks.load_dataset("segmentation", str(regions), tmp_path)
    model, file = (graphs.load(path, 2, 1) for path in segmenters)
    seen: list[tuple[int, ...]] = []

    def of_size(size: tuple[int, int]) -> Any:
        predict = model.of_size(size)  # type: ignore[misc]

        def run(images: np.ndarray) -> Any:
            seen.append(images.shape)
            return predict(images)

        return run

    (whole,) = dense_evaluation.evaluate(
        [dataclasses.replace(model, of_size=of_size)], dataset, dataset.test, tmp_path / "whole", inference="whole"
    )
    assert seen == [(1, 32, 64, 3)] * 3  # 40 x 64 with a short side of 32 is 32 x 51, in multiples of 32 that
    (sliding,) = dense_evaluation.evaluate([model], dataset, dataset.test, tmp_path / "sliding")
    assert (whole["inference"], sliding["inference"]) == ("whole", "sliding")
    assert whole["miou"] > 0.9
    with pytest.raises(UserError, match=r"model\.tflite has one size of input. Give the Keras model"):
        dense_evaluation.evaluate([model, file], dataset, dataset.test, tmp_path / "file", inference="whole")


def test_a_segmenter_of_another_size_is_the_same_network(tmp_path: Path) -> None:
    segmenter = keras_models.SemanticFPNMobiAtt(
        "pvt_v2", "quickstart", 32, num_classes=3, channels=8, head_channels=8, training_size=32
    )
    segmenter.save(tmp_path / "model.keras")
    graph = graphs.load(tmp_path / "model.keras", 2, 1)
    assert graph.of_size is not None
    images = np.random.default_rng(0).normal(size=(1, 32, 64, 3)).astype("float32")
    expected = keras_models.resize(segmenter, (32, 64))(images)
    np.testing.assert_allclose(graph.of_size((32, 64))(images), expected, rtol=1e-5, atol=1e-5)


def test_networks_run_what_there_is_and_no_filling(
    segmenters: list[Path], regions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole images come one at a time; windows of all images share the batches. --batch_size=64 is the command's."""
    dataset = tasks.load_dataset("segmentation", str(regions), tmp_path)
    counts: list[tuple[str, int]] = []
    filled = graphs._filled

    def counting(run: graphs.Predict, step: int) -> graphs.Predict:
        def counted(images: np.ndarray) -> Any:
            counts.append((f"{images.shape[1]} x {images.shape[2]}", len(images)))
            return run(images)

        return filled(counted, step)

    monkeypatch.setattr(graphs, "_filled", counting)
    graph = graphs.load(segmenters[0], 64, 1)
    dense_evaluation.evaluate([graph], dataset, dataset.test, tmp_path / "whole", inference="whole")
    assert counts == [("32 x 64", 1)] * 3
    counts.clear()
    dense_evaluation.evaluate([graph], dataset, dataset.test, tmp_path / "sliding")
    assert counts == [("32 x 32", 64)]  # all six windows in one batch


def test_whole_images_are_for_segmenters_alone(tmp_path: Path) -> None:
    keras_models.DeiTMobiAtt("quickstart", num_classes=3).save(tmp_path / "classifier.keras")
    found = [graphs.load(tmp_path / "classifier.keras", 2, 1)]
    dense_evaluation.check_inference(found, "sliding")
    with pytest.raises(UserError, match=r"no inference 'hole'. Choose one of sliding, whole"):
        dense_evaluation.check_inference(found, "hole")
    with pytest.raises(UserError, match=r"is for segmenters; .*classifier\.keras does classification"):
        dense_evaluation.check_inference(found, "whole")


def test_other_classes_than_the_run_has_learned_are_warned_of(
    regions: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = tasks.load_dataset("segmentation", str(regions), tmp_path)
    verification.warn_of_other_classes(tmp_path, dataset)
    results = tmp_path / "results.json"
    for names, said in (
        (CLASSES, None),
        (("dark", "bright"), "class 1 is bright for the run and light in the dataset"),
        (("dark",), "class 1 is nothing for the run and light in the dataset"),
    ):
        results.write_text(json.dumps({"per_class": dict.fromkeys(names, 0)}))
        caplog.clear()
        verification.warn_of_other_classes(tmp_path, dataset)
        assert [record.getMessage().count(said) for record in caplog.records] == ([1] if said else [])


def test_models_of_two_tasks_and_other_classes_are_refused(
    segmenters: list[Path], regions: Path, tmp_path: Path
) -> None:
    keras_models.DeiTMobiAtt("quickstart", num_classes=3).save(tmp_path / "classifier.keras")
    found = [graphs.load(path, 2, 1) for path in (segmenters[0], tmp_path / "classifier.keras")]
    with pytest.raises(UserError, match=r"segmentation, .*classification"):
        dense_evaluation.common_task(found)
    dataset = tasks.load_dataset("segmentation", str(regions), tmp_path)
    with pytest.raises(UserError, match="has 3 classes, but the dataset has 2"):
        dense_evaluation.evaluate(found[1:], dataset, dataset.test, tmp_path / "unfinished")


def test_foreign_models_are_refused_in_a_line(tmp_path: Path) -> None:
    images = keras.Input((16, 16, 3), name="images")
    convolution = keras.layers.Conv2D(4, 1)(images)
    flat = keras.layers.Reshape((-1, 4))(convolution)
    keras.Model(images, [flat, flat + 1]).save(tmp_path / "list.keras")
    with pytest.raises(UserError, match="no detector of this project: it gives a list of tensors"):
        graphs.load(tmp_path / "list.keras", 2, 1)
    with pytest.raises(UserError, match=r"must give logits \[batch, height, width, classes\]"):
        graphs._sizes(tmp_path, (None, 16, 16, 3), (None, 8, 8, None), "segmentation")


@pytest.mark.slow
def test_the_command_measures_a_detector_and_its_file(boxes: Path, tmp_path: Path) -> None:
    model = keras_models.RetinaNetMobiAtt(
        "pvt_v2", "quickstart", (48, 64), num_classes=2, channels=8, head_depth=1, training_size=32
    )
    output = model.get_layer("class_head_output")
    output.kernel.assign(np.random.default_rng(0).normal(size=output.kernel.shape))
    model.save(tmp_path / "model.keras")
    (tmp_path / "model.tflite").write_bytes(convert.convert(model))
    (tmp_path / "results.json").write_text(json.dumps({"per_class": {"dark": {}, "bright": {}}}))
    given = f"{tmp_path / 'model.keras'},{tmp_path / 'model.tflite'}"
    arguments = (f"--graph={given}", f"--dataset={boxes}", f"--output_dir={tmp_path / 'out'}", "--batch_size=2")
    command = [sys.executable, "-m", "mobiatt_tf.training.evaluate", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "class 1 is bright for the run and light in the dataset" in done.stderr
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["task"] == "detection"
    assert content["dataset"]["evaluated_images"] == 2
    checkpoint, file = content["results"]
    assert (checkpoint["format"], file["format"]) == ("keras", "tflite")
    assert [each["category_id"] for each in file["per_class"].values()] == [5, 6]
    for key in ("ap", "ap50", "ap75"):
        assert file[key] == pytest.approx(checkpoint[key], abs=0.02)
    assert list(file["per_class"]) == list(CLASSES)
    assert dense_evaluation.format_table(content) in done.stdout
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")

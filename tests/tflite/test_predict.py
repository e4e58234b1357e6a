"""`python -m tflite.predict`: boxes and regions in their places, files like checkpoints, failures named."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import keras_models
from mobiatt_tf import data
from mobiatt_tf.data import crops
from mobiatt_tf.errors import UserError
from mobiatt_tf.tasks import anchors
from tests.tflite.pictures import GREEN, RED, save, two_halves
from tests.training.small import ROOT
from tflite import classes, convert, drawing, inspect, photos, predictor, verify
from tflite import predict as predict_command
from tflite.predictor import Predictor
from tflite.preparation import Preparation

COLORS = ("red", "green", "blue")


def colour_segmenter(side: int = 32) -> keras.Model:
    """A segmenter that knows the three colours: the logit of a class is its channel."""
    images = keras.Input((side, side, 3), name="images")
    maps = keras.layers.AveragePooling2D(2)(images)
    convolution = keras.layers.Conv2D(3, 1, name="logits")
    model = keras.Model(images, convolution(maps))
    convolution.kernel.assign(np.eye(3).reshape(1, 1, 3, 3))
    return model


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with the colour segmenter."""
    directory = tmp_path_factory.mktemp("segmenter")
    colour_segmenter().save(directory / "model.keras")
    (directory / "results.json").write_text(json.dumps({"per_class": {name: {} for name in COLORS}}))
    return directory


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with a small detector, and the float32 file that was exported from it."""
    directory = tmp_path_factory.mktemp("detector")
    keras.utils.set_random_seed(1)
    model = keras_models.RetinaNetMobiAtt(
        "pvt_v2", "quickstart", (48, 64), num_classes=2, channels=8, head_depth=1, training_size=32
    )
    # Random logits, not those of the start, which are equal everywhere: the best boxes must be the same ones.
    output = model.get_layer("class_head_output")
    output.kernel.assign(np.random.default_rng(0).normal(size=output.kernel.shape))
    model.save(directory / "model.keras")
    (directory / "results.json").write_text(
        json.dumps({"per_class": {"cat": {"category_id": 17}, "dog": {"category_id": 18}}})
    )
    (directory / "model.tflite").write_bytes(convert.convert(model))
    (directory / "model.json").write_text(json.dumps({"classes": ["cat", "dog"], "category_ids": [17, 18]}))
    return directory


@pytest.mark.parametrize("inference", predictor.INFERENCES)
@pytest.mark.parametrize("size", [(64, 96), (96, 64), (32, 32), (7, 300)])
def test_regions_lie_where_the_photo_has_them(inference: str, size: tuple[int, int], segmenter: Path) -> None:
    model = predictor.load(segmenter, None, 1)
    assert (model.task, model.class_names) == ("segmentation", COLORS)
    height, width = size
    labels = model.segment(two_halves(width, height), inference)
    assert labels.shape == size
    expected = np.where(np.arange(width) < width // 2, 0, 2)
    away = np.abs(np.arange(width) - width / 2) > max(2, 0.1 * width)  # resizing blurs the seam
    np.testing.assert_array_equal(labels[:, away], np.broadcast_to(expected, size)[:, away])


def test_a_photo_of_one_pixel_and_one_of_20_megapixels_keep_their_size(segmenter: Path, tmp_path: Path) -> None:
    model = predictor.load(segmenter, None, 1)
    assert model.segment(np.full((1, 1, 3), GREEN, np.uint8)).tolist() == [[1]]
    large = photos.read_photo(save(two_halves(5472, 3648), tmp_path / "large.png", compress_level=1))
    labels = model.segment(large)
    assert labels.shape == (3648, 5472)
    assert np.bincount(labels.reshape(-1), minlength=3)[[0, 2]].min() > 0.45 * labels.size


def test_a_box_comes_back_in_pixels_of_the_photo() -> None:
    """The detector's answer is written by hand; the photo is larger than its input and of another shape."""
    size, photo = (64, 96), (200, 200)  # the photo fills 64 x 64 of the input
    every_anchor = anchors.anchors(size, 8)
    box = np.array([[50.0, 25.0, 150.0, 125.0]], np.float32)
    on_canvas = box * 64 / 200
    nearest = int(np.argmin(np.abs(every_anchor - on_canvas).sum(-1)))
    deltas = np.zeros((1, len(every_anchor), 4), np.float32)
    deltas[0, nearest] = anchors.encode(on_canvas, every_anchor[nearest : nearest + 1])[0]
    logits = np.full((1, len(every_anchor), 2), -9.0, np.float32)
    logits[0, nearest, 1] = 2.0
    model = Predictor(Path("x"), "detection", size, ("a", "b"), lambda _: {"boxes": deltas, "logits": logits})
    found = model.detect(np.zeros((*photo, 3), np.uint8), score_threshold=0.5)
    np.testing.assert_allclose(found.boxes, box, atol=0.05)
    assert found.labels.tolist() == [1]
    assert found.scores[0] == pytest.approx(1 / (1 + np.exp(-2)))


def test_a_float_file_detects_what_its_checkpoint_detects(detector: Path) -> None:
    checkpoint, file = (predictor.load(path, None, 1) for path in (detector, detector / "model.tflite"))
    assert checkpoint.class_names == file.class_names == ("cat", "dog")
    assert checkpoint.category_ids == file.category_ids == (17, 18)
    assert checkpoint.image_size == file.image_size == (48, 64)
    photo = np.random.default_rng(3).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    expected, found = (model.detect(photo, 0.1) for model in (checkpoint, file))
    assert len(expected.labels) > 3
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-2)
    assert expected.boxes.min() >= 0
    assert (expected.boxes <= [70, 90, 70, 90]).all()


def test_a_float_file_segments_and_classifies_as_its_checkpoint(segmenter: Path, tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_bytes(convert.convert(colour_segmenter()))
    photo = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    one, other = (predictor.load(path, None, 1) for path in (segmenter, tmp_path / "model.tflite"))
    assert np.mean(one.segment(photo) == other.segment(photo)) > 0.999  # a tie may fall to either side
    assert other.class_names == ("class 0", "class 1", "class 2")
    classifier = keras_models.DeiTMobiAtt("quickstart", num_classes=7)
    classifier.save(tmp_path / "classifier.keras")
    (tmp_path / "classifier.tflite").write_bytes(convert.convert(classifier))
    one, other = (predictor.load(tmp_path / f"classifier.{kind}", None, 1) for kind in ("keras", "tflite"))
    best, of_file = one.classify(photo), other.classify(photo)
    assert len(best) == 5
    assert [name for name, _ in best] == [name for name, _ in of_file]
    np.testing.assert_allclose([share for _, share in best], [share for _, share in of_file], atol=1e-5)


def test_labels_must_be_as_many_as_classes(segmenter: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("sky\nsea\n\nsand\n")
    assert predictor.load(segmenter, str(tmp_path / "names.txt"), 1).class_names == ("sky", "sea", "sand")
    (tmp_path / "names.json").write_text(json.dumps({"classes": ["a", "b", "c"]}))
    assert predictor.load(segmenter, str(tmp_path / "names.json"), 1).class_names == ("a", "b", "c")
    (tmp_path / "names.txt").write_text("sky\nsea\nsand\n", encoding="utf-8-sig")
    assert predictor.load(segmenter, str(tmp_path / "names.txt"), 1).class_names == ("sky", "sea", "sand")
    (tmp_path / "names.txt").write_text("sky\n")
    with pytest.raises(UserError, match=r"has 3 classes, but --labels=.* names 1"):
        predictor.load(segmenter, str(tmp_path / "names.txt"), 1)
    with pytest.raises(UserError, match="cannot be read"):
        predictor.load(segmenter, str(tmp_path / "none.txt"), 1)


def test_boxes_are_drawn_at_their_edges_with_a_caption_inside_the_picture() -> None:
    image = np.full((400, 600, 3), 255, np.uint8)
    boxes = np.array([[100, 150, 300, 350], [0, 0, 600, 400]], np.float32)
    drawn = np.asarray(drawing.draw_boxes(image, boxes, ["cat 90%", "dog 80%"], [0, 1]))
    assert drawn.shape == image.shape
    assert tuple(drawn[250, 100]) == tuple(drawn[349, 200]) == drawing.class_color(0)
    assert tuple(drawn[399, 300]) == tuple(drawn[200, 599]) == drawing.class_color(1)
    assert tuple(drawn[250, 200]) == (255, 255, 255)
    assert (drawn[:20, :40] == drawing.class_color(1)).all(-1).mean() > 0.3  # the plate of the second one's caption
    tiny = drawing.draw_boxes(image[:1, :1], np.array([[0, 0, 1, 1]]), ["x"], [0])
    assert min(tiny.size) >= 320


def test_class_colours_stay_apart() -> None:
    colors = np.array([drawing.class_color(index) for index in range(30)], float)
    distances = np.abs(colors[:, None] - colors[None]).sum(-1) + 1e9 * np.eye(30)
    assert distances.min() > 20


def test_the_legend_names_the_classes_that_are_there_largest_first() -> None:
    labels = np.full((300, 400), 2)
    labels[:, :100] = 7
    counts = drawing.count_labels(labels, 9)
    assert counts.tolist() == [0, 0, 300 * 300, 0, 0, 0, 0, 300 * 100, 0]
    picture = drawing.draw_regions(np.zeros((300, 400, 3), np.uint8), labels, [f"name {i}" for i in range(9)], counts)
    tint = 0.55 * np.array(drawing.class_color(2))
    np.testing.assert_allclose(np.asarray(picture)[150, 250], tint, atol=1.5)
    legend = np.asarray(picture)[:, 400:]
    assert legend.shape[0] == 300
    rows = [np.argwhere((legend == drawing.class_color(index)).all(-1))[:, 0] for index in range(9)]
    assert [index for index in range(9) if len(rows[index])] == [2, 7]
    assert rows[2].max() < rows[7].min()


def test_the_background_of_a_segmenter_stays_as_it_was() -> None:
    labels = np.zeros((300, 400), np.uint8)
    labels[:, :100] = 1
    photo = np.full((300, 400, 3), 99, np.uint8)
    picture = np.asarray(drawing.draw_regions(photo, labels, ["background", "coin"], drawing.count_labels(labels, 2)))
    assert (picture[:, 120:400] == 99).all()
    assert (picture[150, 50] != 99).any()


def test_a_label_picture_stores_the_classes(tmp_path: Path) -> None:
    labels = np.arange(150).reshape(10, 15)
    drawing.label_picture(labels, 150).save(tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as stored:
        np.testing.assert_array_equal(np.asarray(stored), labels)
        assert stored.convert("RGB").getpixel((3, 0)) == drawing.class_color(3)


def test_how_a_classifier_sees_comes_from_its_labels(tmp_path: Path) -> None:
    """Inverted, grey, whole and with another mean: as the browser's page does it."""
    said = {"classes": ["a"], "crop_fraction": 1, "channels": 1, "mean": [0.5] * 3, "std": [0.25] * 3}
    (tmp_path / "labels.json").write_text(json.dumps({**said, "light_on_dark": True}))
    prepare = Preparation.of(classes.read(tmp_path / "labels.json"))
    image = np.full((40, 40, 3), 255, np.uint8)
    image[10:30, 10:30] = 0
    seen = prepare(image, (20, 20))
    assert seen.shape == (1, 20, 20, 3)
    np.testing.assert_allclose(seen[0, 0], -2, atol=1e-4)  # black now: (0 - .5) / .25
    np.testing.assert_allclose(seen[0, 10, 10], 2, atol=1e-4)
    coloured = Preparation.of(classes.check(said, "labels"))(np.full((20, 20, 3), RED, np.uint8), (20, 20))
    grey = 0.299 * RED[0] + 0.587 * RED[1] + 0.114 * RED[2]
    np.testing.assert_allclose(coloured, (grey / 255 - 0.5) / 0.25, atol=1e-4)
    usual = Preparation()(two_halves(), (32, 32))
    expected = data.normalize(crops.resize_and_crop_centre(two_halves(), (32, 32)))
    np.testing.assert_allclose(usual[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mean", [0.5, 0.5, 0.5]),
        ("std", [0.5, 0.5, 0.5]),
        ("channels", 1),
        ("light_on_dark", True),
        ("crop_fraction", 1),
        ("image_size", [64, 64]),
    ],
)
def test_labels_that_ask_for_what_a_segmenter_is_not_shown_are_refused(
    field: str, value: Any, segmenter: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.json").write_text(json.dumps({"classes": list(COLORS), field: value}))
    with pytest.raises(UserError, match=field):
        predictor.load(segmenter, str(tmp_path / "labels.json"), 1)


def test_foreign_models_are_refused_in_a_line(tmp_path: Path) -> None:
    images = keras.Input((16, 16, 3), name="images")
    convolution = keras.layers.Conv2D(4, 1)(images)
    flat = keras.layers.Reshape((-1, 4))(convolution)
    keras.Model(images, [flat, flat + 1]).save(tmp_path / "list.keras")
    keras.Model(images, {"map": convolution}).save(tmp_path / "dict.keras")
    with pytest.raises(UserError, match=r"no detector of this project: it gives a list of tensors"):
        predictor.load(tmp_path / "list.keras", None, 1)
    with pytest.raises(UserError, match=r"it gives a dict of map, not the logits"):
        predictor.load(tmp_path / "dict.keras", None, 1)
    (tmp_path / "model.tflite").write_bytes(convert.convert(colour_segmenter(16)))
    found = inspect.describe(tmp_path / "model.tflite")
    assert verify.checked_task(found) == "segmentation"
    (sight,), (answer,) = found.inputs, found.outputs
    quantized = dataclasses.replace(sight, dtype="uint8", scale=0.1, zero_point=3)
    with pytest.raises(UserError, match="is uint8; allowed are float32"):
        verify.checked_task(dataclasses.replace(found, inputs=(quantized,)))
    outputs = tuple(dataclasses.replace(answer, shape=shape) for shape in ((1, 9, 4), (1, 9, 7)))
    signatures: tuple[inspect.Signature, ...]
    for signatures, said in (((), "have no names"), (found.signatures, "are called ")):
        with pytest.raises(UserError, match=f"no detector of this project: its outputs {said}"):
            verify.checked_task(dataclasses.replace(found, outputs=outputs, signatures=signatures))


def test_both_heads_of_a_distilled_classifier_are_averaged(tmp_path: Path) -> None:
    images = keras.Input((8, 8, 3), name="images")
    pooled = keras.layers.GlobalAveragePooling2D()(images)
    heads = [keras.layers.Dense(3, bias_initializer=keras.initializers.Constant(value)) for value in (1.0, 3.0)]
    keras.Model(images, [head(pooled) for head in heads]).save(tmp_path / "model.keras")
    model = predictor.load(tmp_path / "model.keras", None, 1)
    np.testing.assert_allclose(model.run(np.zeros((2, 8, 8, 3), np.float32)), np.full((2, 3), 2), atol=1e-6)


def test_what_fails_with_one_photo_is_named_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("nan", "memory", "resources", "wide", "good", "stop", "never")
    paths = [save(two_halves(), tmp_path / f"{name}.png") for name in names]

    def predict(image: np.ndarray, name: str, stem: str) -> predict_command.Seen:
        if stem == "nan":
            model = Predictor(Path("x"), "classification", (8, 8), ("a", "b"), lambda _: np.full((1, 2), np.nan))
            return predict_command.classification(model, image, name)
        if stem == "memory":
            raise MemoryError
        if stem == "resources":
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating")
        if stem == "stop":
            raise KeyboardInterrupt
        picture = Image.new("RGB", (65_501 if stem == "wide" else 8, 1))
        return predict_command.Seen([{"file_name": name}], "seen", {"_boxes.jpg": picture})

    with pytest.raises(KeyboardInterrupt):
        predict_command.predict_all(paths, tmp_path / "out", predict)
    said = capsys.readouterr().err
    for name, reason in (
        ("nan", "the model's outputs are not finite"),
        ("memory", "no memory for 96 x 64 pixels"),
        ("resources", "no memory for 96 x 64 pixels"),
        ("wide", "its picture would have 65501 x 1 pixels, but a side of a JPEG has 65,500 at most"),
    ):
        assert f"skipped: {tmp_path / name}.png: {reason}" in said
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == [{"file_name": "good.png"}]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good_boxes.jpg", "predictions.json"]


def test_without_known_ids_an_entry_has_the_index_alone(detector: Path) -> None:
    model = dataclasses.replace(predictor.load(detector / "model.tflite", None, 1), category_ids=None)
    seen = predict_command.detection(model, two_halves(), "a.png", 0.1)
    assert seen.entries
    assert all("category_id" not in entry and "class_index" in entry for entry in seen.entries)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tflite.predict", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_command_draws_writes_coco_results_and_counts_what_it_skips(detector: Path, tmp_path: Path) -> None:
    photo = save(two_halves(), tmp_path / "photo.png")
    (tmp_path / "words.jpg").write_text("words")
    arguments = (f"--model={detector / 'model.tflite'}", f"--output_dir={tmp_path / 'out'}", "--score_threshold=0.1")
    done = run(*arguments, str(photo), str(tmp_path / "words.jpg"))
    assert done.returncode == 0, done.stderr
    assert f"skipped: {tmp_path / 'words.jpg'}: not a JPEG" in done.stderr
    assert "1 photograph, 1 skipped" in done.stdout
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert entries
    for entry in entries:
        assert entry.keys() == {"file_name", "category_id", "class_index", "category_name", "bbox", "score"}
        assert entry["category_name"] == ("cat", "dog")[entry["class_index"]]
        assert entry["category_id"] == (17, 18)[entry["class_index"]]
        left, top, width, height = entry["bbox"]
        assert min(left, top) >= 0
        assert left + width <= 96.1
        assert top + height <= 64.1
    with Image.open(tmp_path / "out" / "photo_boxes.jpg") as drawn:
        assert drawn.size == (96 * 4, 64 * 4)  # enlarged, so that captions can be read
    failed = run(*arguments, str(tmp_path / "words.jpg"))
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "error: None of 1 photograph could be read; nothing was written."


@pytest.mark.slow
def test_the_command_writes_labels_at_the_photos_size(segmenter: Path, tmp_path: Path) -> None:
    photo = save(two_halves(), tmp_path / "photo.png")
    done = run(f"--model={segmenter}", f"--output_dir={tmp_path}", str(photo))
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "photo_labels.png") as labels:
        assert labels.size == (96, 64)
        assert labels.getpixel((4, 4)) == 0
        assert labels.getpixel((90, 60)) == 2
    (entry,) = json.loads((tmp_path / "predictions.json").read_text())
    assert entry["labels"] == "photo_labels.png"
    assert sum(entry["shares"].values()) == pytest.approx(1)
    threads = run(f"--model={segmenter}", "--num_threads=2", str(photo))
    assert threads.returncode == 1
    assert "--num_threads is for .tflite files" in threads.stderr
    wrong = run(f"--model={segmenter}", "--score_threshold=0.5", str(photo))
    assert wrong.returncode == 1
    assert "--score_threshold is for detection, but this is a model for segmentation" in wrong.stderr

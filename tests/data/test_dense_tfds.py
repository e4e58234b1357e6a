"""Boxes and labelled pixels of tensorflow-datasets: its own builders of COCO and ADE20K on files written here."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobiatt_tf.data import dense_tfds
from mobiatt_tf.data.ade20k import CLASSES, THING_CLASSES
from mobiatt_tf.data.coco import load_coco
from mobiatt_tf.data.dense import IGNORED, load_detection, load_segmentation
from mobiatt_tf.errors import UserError
from tests.data.dense_files import CocoFolder, annotation, encoded, pixels, read_image, read_mask, write

# Names and ids of COCO's 80 categories: the first two, those around two gaps, and the last.
SOME_OF_COCO = {1: "person", 2: "bicycle", 11: "fire hydrant", 13: "stop sign", 90: "toothbrush"}


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What tensorflow-datasets takes to be the archives that it has downloaded and extracted."""
    import tensorflow_datasets as tfds

    folder = tmp_path / "downloads"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(
        tfds.download.DownloadManager, "download_and_extract", lambda self, urls: dict.fromkeys(urls, str(folder))
    )
    return folder


@pytest.fixture
def coco(downloads: Path) -> CocoFolder:
    """Two images to train with, one to test on, in the 80 categories of COCO, and a test split without annotations."""
    folder = CocoFolder(downloads)
    ids = dense_tfds._COCO_IDS
    for split in (folder.train, folder.test):
        split["categories"] = [{"id": i, "name": SOME_OF_COCO.get(i, f"name {i}")} for i in ids]
        for image in split["images"]:
            image["file_name"] = image["file_name"].replace("png", "jpg")
        for each in split["annotations"]:
            each["category_id"] = 13
    for path in downloads.rglob("*.png"):
        path.rename(path.with_suffix(".jpg")).write_bytes(encoded(pixels(int(path.stem), 30, 40), "JPEG"))
    unlabelled = {"images": [], "categories": folder.train["categories"]}
    folder.add_image(unlabelled, "test2017", 31, encoded(pixels(31, 30, 40), "JPEG"))
    write(downloads / "annotations" / "image_info_test2017.json", json.dumps(unlabelled).encode())
    folder.write()
    return folder


def train_records(dataset: Any) -> Path:
    (path,) = dataset.train.images.records.files
    return Path(path)


@pytest.mark.slow
def test_coco(coco: CocoFolder, tmp_path: Path) -> None:
    """The records say what the JSON files say that they were made of."""
    coco.train["annotations"] += [
        annotation(31, 12, (20.5, 0, 19.5, 30), 90, area=77.0, iscrowd=1),
        annotation(32, 11, (0, 0, 40, 30), 1),
    ]
    coco.add_image(coco.train, "train2017", 13, encoded(pixels(13, 20, 50), "JPEG"), height=20, width=50)
    coco.add_image(coco.test, "val2017", 22, encoded(pixels(22, 30, 40), "JPEG"))
    expected = load_coco(coco.write(), tmp_path / "cache")
    dataset = load_detection("tfds:coco/2017", tmp_path / "cache")
    assert dataset.name == "tfds:coco/2017"
    assert dataset.class_names == expected.class_names
    assert dataset.category_ids == expected.category_ids
    assert (dataset.category_ids[0], dataset.category_ids[11], dataset.category_ids[-1]) == (1, 13, 90)
    assert dataset.skipped == ()
    for split, reference in ((dataset.train, expected.train), (dataset.test, expected.test)):
        assert sorted(split.image_ids) == sorted(reference.image_ids)  # TFDS shuffles
        for i, number in enumerate(split.image_ids):
            j = reference.image_ids.tolist().index(number)
            np.testing.assert_allclose(split.boxes[i], reference.boxes[j], atol=1e-4)
            assert split.labels[i].tolist() == reference.labels[j].tolist()
            assert split.crowd[i].tolist() == reference.crowd[j].tolist()
            assert split.areas[i].tolist() == reference.areas[j].tolist()
            assert split.sizes[i].tolist() == reference.sizes[j].tolist()
            np.testing.assert_array_equal(read_image(split, i), read_image(reference, j))
    assert sorted(dataset.train.image_ids) == [11, 12]  # 13 has no boxes
    assert sorted(dataset.test.image_ids) == [21, 22]


@pytest.mark.slow
def test_damaged_records_and_the_second_start(
    coco: CocoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = load_detection("tfds:coco/2017", tmp_path / "cache")

    def fail(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(dense_tfds, "_examine_boxes", fail)
    again = load_detection("tfds:coco/2017", tmp_path / "cache")
    assert again.train.fingerprint() == first.train.fingerprint()
    monkeypatch.undo()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    path = train_records(first)
    os.truncate(path, path.stat().st_size - 10)
    damaged = load_detection("tfds:coco/2017", tmp_path / "cache")
    assert damaged.skipped == (f"{path.name}:1: lost, the file is truncated",)
    assert len(damaged.train) == 1
    assert "1 records of" in caplog.text
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"tfds:coco/2017 has no whole train record .* prepared anew"):
        load_detection("tfds:coco/2017", tmp_path / "cache")


@pytest.mark.slow
def test_exif_and_boxes_without_area_in_records(coco: CocoFolder, tmp_path: Path) -> None:
    """Images that were annotated as they are stored, as COCO's are, come out as from the JSON file with their sizes."""
    for i, code in ((13, 6), (14, 3)):
        coco.add_image(coco.train, "train2017", i, encoded(pixels(i, 30, 40), "JPEG", code))
        coco.train["images"][-1]["file_name"] = f"{i}.jpg"
        (coco.root / "train2017" / f"{i}.png").rename(coco.root / "train2017" / f"{i}.jpg")
        coco.train["annotations"].append(annotation(i + 20, i, (13, 4, 25, 20), 2))
    coco.train["annotations"].append(annotation(35, 13, (3, 4, 0, 20), 2))
    reference = load_coco(coco.write(), tmp_path / "cache").train
    dataset = load_detection("tfds:coco/2017", tmp_path / "cache")
    for number in (13, 14):
        i, j = dataset.train.image_ids.tolist().index(number), reference.image_ids.tolist().index(number)
        assert (dataset.train.orientations[i], reference.orientations[j]) == (1, 1)
        assert dataset.train.sizes[i].tolist() == reference.sizes[j].tolist() == [30, 40]
        np.testing.assert_allclose(dataset.train.boxes[i], [[13, 4, 38, 24]], atol=1e-4)
        np.testing.assert_allclose(dataset.train.boxes[i], reference.boxes[j], atol=1e-4)
        np.testing.assert_array_equal(read_image(dataset.train, i), read_image(reference, j))
    (line,) = dataset.skipped
    i = dataset.train.image_ids.tolist().index(13)
    assert line.startswith(dataset.train.name_of(i))
    assert "has no area in the image" in line


def write_ade20k(folder: Path, channels: int, highest: int = 100) -> dict[str, np.ndarray]:
    """Images and annotations as TFDS looks for them, and the labels by the name of the image."""
    written = {}
    for split, short, count in (("training", "train", 3), ("validation", "val", 2)):
        for i in range(1, count + 1):
            name = f"ADE_{short}_{i:08}"
            write(folder / "images" / split / f"{name}.jpg", encoded(pixels(i, 30, 40), "JPEG"))
            labels = np.random.default_rng(i).integers(0, highest + 1, (30, 40)).astype(np.uint8)
            labels[0, 0] = highest
            written[f"{short}{i}"] = labels
            instances = np.random.default_rng(i + 9).integers(0, 256, (30, 40, 2), np.uint8)
            stored = labels if channels == 1 else np.concatenate([labels[..., None], instances], -1)
            write(folder / "annotations_instance" / split / f"{name}.png", encoded(stored))
    return written


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "names"), [(3, THING_CLASSES), (1, CLASSES)], ids=["instances", "classes"])
def test_scene_parse150(
    downloads: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, channels: int, names: tuple[str, ...]
) -> None:
    """What TFDS downloads has classes of things in the red channel; grey label images have all 150."""
    written = write_ade20k(downloads, channels, len(names))
    for _ in range(2):  # the second time from what is kept
        dataset = load_segmentation("tfds:scene_parse150", tmp_path / "cache")
        assert dataset.class_names == names
        assert dataset.skipped == ()
        assert (len(dataset.train), len(dataset.test)) == (3, 2)
        expected = [np.where(written[f"train{i}"] == 0, IGNORED, written[f"train{i}"] - 1) for i in (1, 2, 3)]
        found = [read_mask(dataset.train, i) for i in range(3)]
        assert sorted(each.tobytes() for each in found) == sorted(each.tobytes() for each in expected)
        for i, labels in enumerate(found):  # image and labels belong together
            number = [each.tobytes() for each in expected].index(labels.tobytes()) + 1
            assert np.abs(read_image(dataset.train, i) - pixels(number, 30, 40).astype(int)).mean() < 20
    assert ("not its 150 classes" in caplog.text) == (channels == 3)


@pytest.mark.slow
def test_labels_out_of_range_and_sizes_that_differ(downloads: Path, tmp_path: Path) -> None:
    write_ade20k(downloads, 3)
    mask = downloads / "annotations_instance" / "training" / "ADE_train_00000002.png"
    mask.write_bytes(encoded(np.zeros((60, 40, 3), np.uint8)))
    dataset = load_segmentation("tfds:scene_parse150", tmp_path / "cache")
    (line,) = dataset.skipped
    assert line.endswith("40 x 30 pixels, its annotation has 40 x 60")
    assert len(dataset.train) == 2


@pytest.mark.slow
def test_label_values_of_records_out_of_range_are_refused(downloads: Path, tmp_path: Path) -> None:
    write_ade20k(downloads, 3, highest=101)
    with pytest.raises(UserError, match=r"\.tfrecord-\S+:\d of tfds:scene_parse150 has the label value 101"):
        load_segmentation("tfds:scene_parse150", tmp_path / "cache")


@pytest.mark.slow
def test_other_schemas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in VOC: neither areas nor crowds nor numbers of images; and label images with named classes."""
    import tensorflow_datasets as tfds

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    mask = np.zeros((30, 40, 1), np.uint8)
    mask[5:, 5:] = 1
    box = tfds.features.BBox(ymin=0.5, xmin=0.25, ymax=1.0, xmax=0.75)
    example = {
        "image": pixels(1, 30, 40),
        "objects": [{"bbox": box, "label": "b"}],
        "segmentation": mask,
        "name": "x",
    }
    features = {
        "image": tfds.features.Image(encoding_format="png"),
        "objects": tfds.features.Sequence(
            {"bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(names=["a", "b"])}
        ),
        "segmentation": tfds.features.LabeledImage(shape=(None, None, 1), labels=["sky", "sea", "land"]),
        "name": tfds.features.Text(),
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name="toy_boxes",
        version="1.0.0",
        data_dir=tmp_path / "tfds",
        features=tfds.features.FeaturesDict(features),
        split_datasets={split: [(i, example) for i in range(2)] for split in ("train", "test")},
    )
    dataset = load_detection("tfds:toy_boxes", tmp_path / "cache")
    assert dataset.class_names == ("a", "b")
    assert dataset.category_ids == (0, 1)
    assert dataset.train.boxes[0].tolist() == [[10, 15, 30, 30]]
    assert (dataset.train.labels[0].tolist(), dataset.train.areas[0].tolist()) == ([1], [300])
    assert dataset.train.image_ids.tolist() == [0, 1]
    labelled = load_segmentation("tfds:toy_boxes", tmp_path / "cache")
    assert labelled.class_names == ("sky", "sea", "land")
    np.testing.assert_array_equal(read_mask(labelled.test, 1), mask[..., 0])


def test_datasets_of_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    with pytest.raises(UserError, match=r"mnist is not a dataset of boxes: .* has 0"):
        load_detection("tfds:mnist", tmp_path)
    with pytest.raises(UserError, match=r"mnist is not a dataset of labelled pixels: .* has 0"):
        load_segmentation("tfds:mnist", tmp_path)
    with pytest.raises(UserError, match='no dataset "no_such_data"'):
        load_detection("tfds:no_such_data", tmp_path)
    with pytest.raises(UserError, match=r'no dataset or directory ".*nowhere". Give a directory in COCO'):
        load_detection(str(tmp_path / "nowhere"), tmp_path)
    with pytest.raises(UserError, match=r'no dataset or directory "". Give a directory of images and label PNGs'):
        load_segmentation("", tmp_path)

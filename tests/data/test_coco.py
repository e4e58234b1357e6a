"""Directories in COCO's format: layouts, what is clipped, mapped, left out and refused, images of every kind."""

import dataclasses
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from mobiatt_tf.data import coco_json
from mobiatt_tf.data.dense import DenseDataset, load_detection
from mobiatt_tf.errors import UserError
from tests.data.dense_files import CocoFolder, annotation, encoded, pixels, read_image, write


@pytest.fixture
def folder(tmp_path: Path) -> CocoFolder:
    return CocoFolder(tmp_path / "coco")


@pytest.fixture
def load(tmp_path: Path):  # type: ignore[no-untyped-def]
    return lambda root: load_detection(str(root), tmp_path / "cache")


def boxes(dataset: DenseDataset, split: str = "train", index: int = 0) -> list[list[float]]:
    return getattr(dataset, split).boxes[index].tolist()


def test_what_is_read(folder: CocoFolder, load) -> None:  # type: ignore[no-untyped-def]
    folder.train["annotations"].append(annotation(50, 12, (0, 1.5, 8, 9.25), 90, area=31.5, iscrowd=1))
    dataset = load(folder.write())
    assert dataset.name == str(folder.root)
    assert dataset.class_names == ("cat", "emu", "dog")  # by id: gaps and order do not matter
    assert dataset.category_ids == (3, 7, 90)
    assert dataset.skipped == ()
    train = dataset.train
    assert train.image_ids.tolist() == [11, 12]
    assert train.sizes.tolist() == [[30, 40], [30, 40]]
    assert boxes(dataset, "train", 1) == [[4, 5, 14, 25], [0, 1.5, 8, 10.75]]
    assert [each.tolist() for each in train.labels] == [[0], [0, 2]]
    assert [each.tolist() for each in train.crowd] == [[False], [False, True]]
    assert [each.tolist() for each in train.areas] == [[200], [200, 31.5]]
    assert [train.boxes[1].dtype, train.labels[1].dtype, train.areas[1].dtype] == [np.float32, np.int32, np.float32]
    np.testing.assert_array_equal(read_image(train, 1), pixels(12, 30, 40))
    assert train.name_of(1).endswith("train2017/12.png")
    assert len(train.take(1)) == 1
    assert train.select(np.array([1])).labels[0].tolist() == [0, 2]


def test_the_fingerprint_is_of_images_and_annotations(folder: CocoFolder, load, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    first = load(folder.root).train.fingerprint()
    folder.root.rename(tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere").train.fingerprint() == first
    folder.root = tmp_path / "elsewhere"
    folder.train["annotations"][0]["bbox"][0] += 1
    assert load(folder.write()).train.fingerprint() != first


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("annotations/train.json", "annotations/validation.json"),
        ("annotations/my_train_set.json", "annotations/my_val_set.json"),
        ("train.json", "test.json"),
        ("train2017/_annotations.coco.json", "val2017/_annotations.coco.json"),
    ],
)
def test_any_single_file_for_each_split(folder: CocoFolder, load, train: str, test: str) -> None:  # type: ignore[no-untyped-def]
    (folder.root / "annotations" / "instances_train2017.json").rename(folder.root / train)
    (folder.root / "annotations" / "instances_val2017.json").rename(folder.root / test)
    dataset = load(folder.root)
    assert (len(dataset.train), len(dataset.test)) == (2, 1)


@pytest.mark.parametrize("images", ["images/train2017", "images/train", "images", "train"])
def test_folders_of_images(folder: CocoFolder, load, images: str) -> None:  # type: ignore[no-untyped-def]
    (folder.root / images).parent.mkdir(exist_ok=True)
    (folder.root / "train2017").rename(folder.root / images)
    assert len(load(folder.root).train) == 2


def test_several_or_no_files_of_annotations(folder: CocoFolder, load) -> None:  # type: ignore[no-untyped-def]
    extra = write(folder.root / "annotations" / "instances_train2014.json", b"{}")
    with pytest.raises(UserError, match=r"2 files of annotations to train with: .*train2014.json, .*train2017.json"):
        load(folder.root)
    extra.unlink()
    (folder.root / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(UserError, match=r"no annotations in COCO's format to test with\. Put the annotations into"):
        load(folder.root)
    for i in range(13):
        write(folder.root / "annotations" / f"instances_val{i:02}.json", b"{}")
    with pytest.raises(UserError, match=r"13 files of annotations to test with: .*val09\.json and 3 more\. Leave one"):
        load(folder.root)


def test_what_is_trained_on_is_no_test(folder: CocoFolder, load) -> None:  # type: ignore[no-untyped-def]
    """trainval.json has "val" in its name; and equal files have the same images."""
    annotations = folder.root / "annotations"
    train = (annotations / "instances_train2017.json").rename(annotations / "trainval.json")
    test = (annotations / "instances_val2017.json").rename(annotations / "test.json")
    assert load(folder.root).test.image_ids.tolist() == [21]
    test.write_bytes(train.read_bytes())
    with pytest.raises(
        UserError, match=r"trainval\.json and .*test\.json are the same: .* annotations of other images"
    ):
        load(folder.root)
    test.unlink()
    train.rename(folder.root / "train_val.json")
    with pytest.raises(UserError, match="no annotations in COCO's format to test with"):
        load(folder.root)


def test_boxes_outside_the_image_are_clipped(folder: CocoFolder, load) -> None:  # type: ignore[no-untyped-def]
    folder.train["annotations"][0]["bbox"] = [-3, 25.5, 10, 20]
    folder.train["annotations"][1]["bbox"] = [-1, -1, 100, 100]
    dataset = load(folder.write())
    assert boxes(dataset) == [[0, 25.5, 7, 30]]
    assert boxes(dataset, index=1) == [[0, 0, 40, 30]]
    assert dataset.skipped == ()


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([5, 5, 0, 9], r"its bbox \[5, 5, 0, 9\] has no area"),
        ([5, 5, 9, -4], r"its bbox \[5, 5, 9, -4\] has no area"),
        ([41, 5, 9, 9], "lies outside the image"),
        ([float("nan"), 5, 9, 9], "is not four numbers"),
        ([1, 5, float("inf"), 9], "is not four numbers"),
        ([1, 5, 9], "is not four numbers"),
        (["1", "5", "9", "9"], "is not four numbers"),
        (None, "is not four numbers"),
    ],
)
def test_boxes_without_area_and_those_that_are_none_are_dropped_and_counted(  # type: ignore[no-untyped-def]
    folder: CocoFolder, load, caplog: pytest.LogCaptureFixture, box: list[float], reason: str
) -> None:
    folder.train["annotations"].append({**annotation(77, 12, (1, 1, 1, 1)), "bbox": box})
    for _ in range(2):  # the second time from what is kept
        caplog.clear()
        dataset = load(folder.write())
        assert boxes(dataset, index=1) == [[4, 5, 14, 25]]
        (line,) = dataset.skipped
        assert line.startswith("instances_train2017.json: annotation 77 of 12.png: its bbox")
        assert re.search(reason, line)
        assert "1 annotations of" in caplog.text


def test_without_an_area_that_of_the_box_is_taken(folder: CocoFolder, load) -> None:  # type: ignore[no-untyped-def]
    del folder.train["annotations"][0]["area"]
    folder.train["annotations"][1]["area"] = float("nan")
    assert [each.tolist() for each in load(folder.write()).train.areas] == [[200], [200]]


def test_images_without_boxes_are_for_tests_only(folder: CocoFolder, load) -> None:  # type: ignore[no-untyped-def]
    folder.add_image(folder.train, "train2017", 13)
    folder.add_image(folder.test, "val2017", 22)
    dataset = load(folder.write())
    assert dataset.train.image_ids.tolist() == [11, 12]
    assert dataset.test.image_ids.tolist() == [21, 22]
    assert dataset.test.boxes[1].shape == (0, 4)
    assert dataset.skipped == ()


def test_no_box_at_all(folder: CocoFolder, load) -> None:  # type: ignore[no-untyped-def]
    folder.train["annotations"] = []
    with pytest.raises(UserError, match=r"instances_train2017\.json has no box that can be used"):
        load(folder.write())


def test_annotations_of_what_is_not_listed_are_dropped(folder: CocoFolder, load) -> None:  # type: ignore[no-untyped-def]
    folder.train["annotations"] += [annotation(60, 404, (1, 1, 5, 5)), annotation(61, 12, (1, 1, 5, 5), 4)]
    dataset = load(folder.write())
    assert [len(each) for each in dataset.train.boxes] == [1, 1]
    assert dataset.skipped == (
        "instances_train2017.json: annotation 60: its image 404 is not listed",
        "instances_train2017.json: annotation 61 of 12.png: its category 4 is not listed",
    )


def test_missing_and_damaged_images_are_skipped_and_named(folder: CocoFolder, load, caplog) -> None:  # type: ignore[no-untyped-def]
    (folder.root / "train2017" / "11.png").unlink()
    damaged = folder.add_image(folder.train, "train2017", 13)
    damaged.write_bytes(damaged.read_bytes()[:60])
    folder.train["annotations"].append(annotation(62, 13, (1, 1, 5, 5)))
    dataset = load(folder.write())
    assert dataset.train.image_ids.tolist() == [12]
    assert dataset.skipped == (
        "train2017/11.png: No such file or directory",
        "train2017/13.png: truncated or damaged PNG data",
    )
    assert f"2 images that {folder.root}/annotations/instances_train2017.json lists cannot be used" in caplog.text


def test_no_image_is_there(folder: CocoFolder, load) -> None:  # type: ignore[no-untyped-def]
    (folder.root / "train2017").rename(folder.root / "pictures")
    with pytest.raises(
        UserError, match=r"None of the 2 images that .*train2017\.json lists is there; looked in .*images"
    ):
        load(folder.root)


def test_images_of_another_size_are_skipped_and_named(folder: CocoFolder, load) -> None:  # type: ignore[no-untyped-def]
    folder.train["images"][0] |= {"width": 80, "height": 60}
    dataset = load(folder.write())
    assert dataset.train.image_ids.tolist() == [12]
    assert dataset.skipped == ("train2017/11.png: 40 x 30 pixels, instances_train2017.json says 80 x 60",)


def test_without_a_size_in_the_json_that_of_the_file_is_taken(folder: CocoFolder, load) -> None:  # type: ignore[no-untyped-def]
    del folder.train["images"][0]["width"]
    folder.train["images"][1]["height"] = None
    assert load(folder.write()).train.sizes.tolist() == [[30, 40], [30, 40]]


def test_image_ids_twice(folder: CocoFolder, load) -> None:  # type: ignore[no-untyped-def]
    folder.train["images"].append(dict(folder.train["images"][0]))
    dataset = load(folder.write())
    assert dataset.train.image_ids.tolist() == [11, 12]
    assert dataset.skipped == ("instances_train2017.json: image 11: listed twice (11.png)",)
    folder.train["images"][-1]["file_name"] = "12.png"
    with pytest.raises(UserError, match=r"train2017\.json has the id 11 for two images, 11\.png and 12\.png"):
        load(folder.write())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [{"id": 1', "is not valid JSON .* may be truncated"),
        ("", "is not valid JSON"),
        ("\xff\xfe", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "not in COCO's format.* images, annotations, categories are missing"),
        ('{"images": [], "categories": {}, "annotations": []}', "categories is missing"),
        ('{"images": [], "categories": [], "annotations": []}', "lists no categories"),
        ('{"images": [], "categories": [{"name": "a"}], "annotations": []}', "entry 0 of categories has no number"),
        ('{"images": [], "categories": [{"id": 1}, {"id": 1}], "annotations": []}', "two categories with the id 1"),
        ('{"images": [{"id": "a"}], "categories": [{"id": 1}], "annotations": []}', "entry 0 of images must have"),
        ('{"images": [], "categories": [{"id": 1}], "annotations": [3]}', "entry 0 of annotations is not an object"),
    ],
)
def test_what_is_no_coco_is_refused_by_name(folder: CocoFolder, load, content: str, message: str) -> None:  # type: ignore[no-untyped-def]
    write(folder.root / "annotations" / "instances_train2017.json", content.encode("latin-1"))
    with pytest.raises(UserError, match=rf"instances_train2017\.json .*{message}"):
        load(folder.root)


def test_train_and_test_must_list_the_same_categories(folder: CocoFolder, load) -> None:  # type: ignore[no-untyped-def]
    folder.test["categories"] = [{"id": 90, "name": "dog"}, {"id": 7, "name": "emu"}, {"id": 3, "name": "cow"}]
    with pytest.raises(UserError, match=r"the same categories; they differ in 3 \(cat\), 3 \(cow\)"):
        load(folder.write())
    folder.test["categories"][2]["name"] = "cat"
    assert load(folder.write()).class_names == ("cat", "emu", "dog")


def test_categories_of_one_name_are_told_apart(folder: CocoFolder, load, caplog) -> None:  # type: ignore[no-untyped-def]
    """Results are kept by name: two of "fish" would leave one."""
    for split in (folder.train, folder.test):
        split["categories"] = [{"id": i, "name": name} for i, name in ((3, "fish"), (7, "fish (3)"), (90, "fish"))]
    for _ in range(2):  # the second time from what is kept
        caplog.clear()
        assert load(folder.write()).class_names == ("fish (3) (3)", "fish (3)", "fish (90)")
        assert "instances_train2017.json has several categories named fish; their ids are added." in caplog.text


@pytest.mark.parametrize("name", ["a\0.png", "a\ud800.png", "a" + chr(0xDCFF) + ".png", "a" * 300], ids=len)
def test_names_that_no_file_can_have(folder: CocoFolder, load, caplog, name: str) -> None:  # type: ignore[no-untyped-def]
    """JSON may have them: NUL, halves of surrogate pairs, too long ones."""
    folder.train["images"].insert(0, {"id": 9, "file_name": name, "height": 30, "width": 40})
    folder.train["annotations"].append(annotation(65, 9, (1, 1, 0, 5)))
    folder.train["annotations"].append(annotation(66, 9, (1, 1, 5, 5), 4))
    for _ in range(2):
        dataset = load(folder.write())
        assert dataset.train.image_ids.tolist() == [11, 12]
        image, category = dataset.skipped
        assert re.fullmatch(r"image 9 \(train2017/a\\.*\.png\): .+|train2017/a{300}: .+", image)
        assert category.startswith("instances_train2017.json: annotation 66 of a")
        assert "\0" not in caplog.text + image + category
        (caplog.text + image + category).encode()  # can be printed
    folder.train["images"].append({"id": 9, "file_name": "b\0.png"})
    with pytest.raises(UserError, match=r"the id 9 for two images, a\S+ and b\\x00\.png:") as refused:
        load(folder.write())
    str(refused.value).encode()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_images_are_turned_upright(folder: CocoFolder, load, orientation: int, kind: str) -> None:  # type: ignore[no-untyped-def]
    """The JSON file has the size that a viewer shows; the boxes are in what it shows."""
    content = encoded(pixels(11, 30, 40), kind, orientation)
    write(folder.root / "train2017" / "11.png", content)
    if orientation >= 5:
        folder.train["images"][0] |= {"height": 40, "width": 30}
    train = load(folder.write()).train
    assert train.sizes.tolist()[0] == ([40, 30] if orientation >= 5 else [30, 40])
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")).astype(int)
    assert np.abs(read_image(train, 0) - expected).mean() < 3


def test_boxes_that_were_drawn_on_stored_images(folder: CocoFolder, load) -> None:  # type: ignore[no-untyped-def]
    """One image whose size tells decides for those whose size does not."""
    write(folder.root / "train2017" / "11.png", encoded(pixels(11, 30, 40), "JPEG", 6))  # listed as 30 x 40, as stored
    write(folder.root / "train2017" / "12.png", encoded(pixels(12, 30, 40), "JPEG", 3))
    assert load(folder.write()).train.orientations.tolist() == [1, 1]
    folder.train["images"][0] |= {"height": 40, "width": 30}
    assert load(folder.write()).train.orientations.tolist() == [6, 3]


def kinds() -> dict[str, bytes]:
    rgb = pixels(3, 30, 40)
    sixteen = tf.io.encode_png(rgb[..., :1].astype(np.uint16) * 257).numpy()
    return {
        "grayscale": encoded(rgb[..., 0], "JPEG", quality=95),
        "CMYK": encoded(rgb, "JPEG", mode="CMYK", quality=95),
        "16-bit PNG": sixteen,
        "1 pixel": encoded(rgb[:1, :1]),
        "20 megapixels": encoded(np.broadcast_to(rgb[:1, :1], (4000, 5000, 3)), "JPEG"),
    }


@pytest.mark.parametrize("kind", ["grayscale", "CMYK", "16-bit PNG", "1 pixel", "20 megapixels"])
def test_images_of_every_kind_work(folder: CocoFolder, load, kind: str) -> None:  # type: ignore[no-untyped-def]
    content = kinds()[kind]
    height, width = {"1 pixel": (1, 1), "20 megapixels": (4000, 5000)}.get(kind, (30, 40))
    folder.add_image(folder.train, "train2017", 13, content, height=height, width=width)
    folder.train["annotations"].append(annotation(63, 13, (0, 0, width, height)))
    dataset = load(folder.write())
    assert dataset.skipped == ()
    assert boxes(dataset, index=2) == [[0, 0, width, height]]
    image = read_image(dataset.train, 2)
    assert image.shape == (height, width, 3)
    if kind == "CMYK":
        assert np.abs(image - pixels(3, 30, 40).astype(int)).mean() < 8
    elif kind in ("grayscale", "16-bit PNG"):
        assert np.abs(image[..., 2] - pixels(3, 30, 40)[..., 0].astype(int)).mean() < 3


def test_the_second_start_reads_neither_images_nor_json(folder: CocoFolder, load, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    first = load(folder.root)

    def fail(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr("mobiatt_tf.data.coco.examine_image", fail)
    monkeypatch.setattr(coco_json, "_parse", fail)
    again = load(folder.root)
    assert again.train.fingerprint() == first.train.fingerprint()
    assert again.class_names == first.class_names
    os.utime(folder.root / "train2017" / "11.png")
    with pytest.raises(AssertionError, match="read again"):
        load(folder.root)


@pytest.mark.parametrize("damage", [b"", b"PK", b"{}"])
def test_damaged_findings_are_found_out_again(folder: CocoFolder, load, tmp_path: Path, damage: bytes) -> None:  # type: ignore[no-untyped-def]
    first = load(folder.root).train.fingerprint()
    stores = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(stores) == 3  # two JSON files and one check of images
    for store in stores:
        store.write_bytes(damage)
    assert load(folder.root).train.fingerprint() == first


def test_areas_and_ids_are_those_of_cocos_own_reader(folder: CocoFolder, load) -> None:  # type: ignore[no-untyped-def]
    """faster-coco-eval follows pycocotools."""
    from faster_coco_eval import COCO

    folder.train["annotations"].append(annotation(64, 11, (2, 2, 8, 9), 90, area=13.25, iscrowd=1))
    dataset = load(folder.write())
    reference = COCO(json.loads((folder.root / "annotations" / "instances_train2017.json").read_text()))
    for i, number in enumerate(dataset.train.image_ids.tolist()):
        known = reference.loadAnns(reference.getAnnIds(imgIds=[number]))
        corners = [[x, y, x + w, y + h] for x, y, w, h in (each["bbox"] for each in known)]
        assert dataset.train.boxes[i].tolist() == corners
        assert dataset.train.areas[i].tolist() == [each["area"] for each in known]
        assert dataset.train.crowd[i].tolist() == [bool(each["iscrowd"]) for each in known]
        assert [dataset.category_ids[label] for label in dataset.train.labels[i]] == [e["category_id"] for e in known]


def test_splits_must_be_whole(folder: CocoFolder, load) -> None:  # type: ignore[no-untyped-def]
    train = load(folder.root).train
    with pytest.raises(ValueError, match="count must be at least 1"):
        train.take(0)
    with pytest.raises(ValueError, match=r"for each of 2 images, got \[1, 2"):
        dataclasses.replace(train, boxes=train.boxes[:1])
    with pytest.raises(ValueError, match=r"boxes must be \[n, 4\]"):
        dataclasses.replace(train, labels=(train.labels[0][:0], train.labels[1]))
    with pytest.raises(ValueError, match="Labels of x run from 0 to 0, but there are 0 classes"):
        DenseDataset("x", (), train, train)

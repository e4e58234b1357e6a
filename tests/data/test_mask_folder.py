"""Directories of images and label PNGs: layouts, classes, what is skipped and what is refused by name."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mobiatt_tf.data import mask_folder
from mobiatt_tf.data.ade20k import CLASSES, THING_CLASSES
from mobiatt_tf.data.dense import IGNORED, load_segmentation
from mobiatt_tf.data.orientation import exif_orientation
from mobiatt_tf.data.reading import stored_labels
from mobiatt_tf.errors import UserError
from tests.data.dense_files import encoded, pixels, read_image, read_mask, write


def labels(index: int, height: int = 30, width: int = 40, classes: int = 3) -> np.ndarray:
    """uint8 [height, width]: classes, with ignored pixels at the left."""
    values = np.random.default_rng(index).integers(0, classes, (height, width)).astype(np.uint8)
    values[:, :3] = IGNORED
    values[0, -1] = classes - 1
    return values


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pairs to train on, two to test on, three classes."""
    root = tmp_path / "masks"
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            write(root / "images" / split / f"{i}.jpg", encoded(pixels(i, 30, 40), "JPEG", quality=95, subsampling=0))
            write(root / "annotations" / split / f"{i}.png", encoded(labels(i)))
    write(root / "classes.txt", b"sky\nearth\nsea\n")
    return root


@pytest.fixture
def load(tmp_path: Path):  # type: ignore[no-untyped-def]
    return lambda root: load_segmentation(str(root), tmp_path / "cache")


def test_what_is_read(folder: Path, load) -> None:  # type: ignore[no-untyped-def]
    dataset = load(folder)
    assert dataset.name == str(folder)
    assert dataset.class_names == ("sky", "earth", "sea")
    assert dataset.category_ids is None
    assert dataset.skipped == ()
    assert (len(dataset.train), len(dataset.test)) == (3, 2)
    for i in range(3):
        np.testing.assert_array_equal(read_mask(dataset.train, i), labels(i))
        assert np.abs(read_image(dataset.train, i) - pixels(i, 30, 40).astype(int)).mean() < 5
    assert dataset.train.name_of(2).endswith("images/train/2.jpg")
    np.testing.assert_array_equal(read_mask(dataset.train.select(np.array([2, 0])), 1), labels(0))
    assert len(dataset.train.take(2)) == 2


def test_without_classes_txt_the_highest_value_counts(folder: Path, load) -> None:  # type: ignore[no-untyped-def]
    (folder / "classes.txt").unlink()
    assert load(folder).class_names == ("0", "1", "2")
    write(folder / "annotations" / "val" / "0.png", encoded(labels(0, classes=12)))
    assert load(folder).class_names == tuple(str(i) for i in range(12))


@pytest.mark.parametrize("masks", ["labels", "masks"])
@pytest.mark.parametrize(("train", "test"), [("training", "validation"), ("train", "test")])
def test_names_of_folders(folder: Path, load, masks: str, train: str, test: str) -> None:  # type: ignore[no-untyped-def]
    (folder / "annotations").rename(folder / masks)
    for kind in ("images", masks):
        (folder / kind / "train").rename(folder / kind / train)
        (folder / kind / "val").rename(folder / kind / test)
    dataset = load(folder)
    assert (len(dataset.train), len(dataset.test)) == (3, 2)


def make_ade20k(folder: Path, known_by: str, lowest: int = 0, highest: int = 150) -> np.ndarray:
    """Makes `folder` look like ADE20K; the values of its first label image."""
    (folder / "classes.txt").unlink()
    values = np.random.default_rng(0).integers(lowest, highest + 1, (30, 40)).astype(np.uint8)
    values[0, :2] = lowest, highest
    for mask in folder.rglob("*.png"):
        mask.write_bytes(encoded(values))
    if known_by == "names":
        for kind, split in (("images", "train"), ("images", "val"), ("annotations", "train"), ("annotations", "val")):
            for file in (folder / kind / split).iterdir():
                file.rename(file.with_name(f"ADE_{split}_{int(file.stem):08}{file.suffix}"))
    else:
        (folder / known_by).touch()
    return values


@pytest.mark.parametrize("known_by", ["objectInfo150.txt", "names"])
def test_ade20k(folder: Path, load, known_by: str, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    """0 is for everything else, and 1 is the first class."""
    values = make_ade20k(folder, known_by)
    with caplog.at_level("INFO"):
        dataset = load(folder)
    assert f"{folder} is read as ADE20K: 0 does not count, i + 1 is class i." in caplog.messages
    assert dataset.class_names == CLASSES
    assert (len(CLASSES), CLASSES[0], CLASSES[12], CLASSES[149]) == (150, "wall", "person", "flag")
    assert (len(THING_CLASSES), THING_CLASSES[0], THING_CLASSES[3], THING_CLASSES[99]) == (100, "bed", "person", "flag")
    expected = np.where(values == 0, IGNORED, values - 1)
    np.testing.assert_array_equal(read_mask(dataset.train, 0), expected)
    write(
        folder / "annotations" / "train" / Path(dataset.train.masks.files[1]).name,
        encoded(np.full((30, 40), 151, np.uint8)),
    )
    with pytest.raises(UserError, match=r"0*1\.png has the value 151, but there are 150 classes of ADE20K"):
        load(folder)


@pytest.mark.parametrize("known_by", ["objectInfo150.txt", "names"])
def test_labels_of_ade20k_that_are_shifted_already(folder: Path, load, known_by: str) -> None:  # type: ignore[no-untyped-def]
    """With 255 for what does not count 0 is a class, and classes.txt says so."""
    values = make_ade20k(folder, known_by, highest=149)
    values[5:, 5:] = IGNORED
    masks = sorted((folder / "annotations" / "train").iterdir())
    masks[1].write_bytes(encoded(values))
    with pytest.raises(
        UserError, match=rf"{masks[1]} has the value 255: its labels seem shifted already.* Give classes"
    ):
        load(folder)
    write(folder / "classes.txt", "\n".join(CLASSES).encode())
    dataset = load(folder)
    assert dataset.class_names == CLASSES
    np.testing.assert_array_equal(read_mask(dataset.train, 1), values)


def test_one_image_that_is_called_as_in_ade20k(folder: Path, load) -> None:  # type: ignore[no-untyped-def]
    (folder / "classes.txt").unlink()
    for path in [*folder.rglob("*.jpg"), *folder.rglob("*.png")]:
        path.rename(path.with_name(f"{'ADE_train_0000000' if path.stem == '0' else 'own'}{path.name}"))
    dataset = load(folder)
    assert dataset.class_names == ("0", "1", "2")
    assert dataset.train.name_of(0).endswith("ADE_train_00000000.jpg")
    np.testing.assert_array_equal(read_mask(dataset.train, 0), labels(0))


def test_label_images_that_pillow_calls_too_large(folder: Path, load, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    dataset = load(folder)
    assert dataset.skipped == ()
    np.testing.assert_array_equal(read_mask(dataset.train, 1), labels(1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_data_of_images_that_pillow_calls_too_large(kind: str, monkeypatch, caplog) -> None:  # type: ignore[no-untyped-def]
    content = encoded(pixels(1, 30, 40), kind, 6)
    assert exif_orientation(content) == 6
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert exif_orientation(content) == (1 if kind == "WEBP" else 6)
    assert ("The EXIF data of a WebP image are not read" in caplog.text) == (kind == "WEBP")


def test_label_images_larger_than_images_can_be(folder: Path, load) -> None:  # type: ignore[no-untyped-def]
    """A few bytes can ask for gigabytes."""
    path = folder / "annotations" / "train" / "1.png"
    content = path.read_bytes()
    header = content[12:16] + struct.pack(">II", 2**15, 2**14) + content[24:29]
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    (line,) = load(folder).skipped
    assert line.startswith("annotations/train/1.png: it says that it has 32768 x 16384 pixels; images may have up to")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_pngs_have_their_indices_as_labels(folder: Path, load, bits: int) -> None:  # type: ignore[no-untyped-def]
    values = labels(5, classes=2) % 2
    image = Image.new("P", (40, 30))
    image.putdata(values.reshape(-1).tolist())
    image.putpalette([255, 0, 0, 0, 0, 255] + [7, 7, 7] * (2**bits - 2))
    path = folder / "annotations" / "train" / "1.png"
    image.save(path, bits=bits)
    assert path.read_bytes()[24:26] == bytes([bits, 3])
    np.testing.assert_array_equal(read_mask(load(folder).train, 1), values)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_pngs_of_few_bits_have_their_values_as_labels(folder: Path, load, bits: int) -> None:  # type: ignore[no-untyped-def]

    values = np.random.default_rng(0).integers(0, min(2**bits, 3), (30, 40)).astype(np.uint8)
    digits = np.unpackbits(values[..., None], axis=-1)[..., 8 - bits :].reshape(30, -1)
    lines = np.concatenate([np.zeros((30, 1), np.uint8), np.packbits(digits, axis=-1)], axis=-1)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 40, 30, bits, 0, 0, 0, 0)
    data = zlib.compress(lines.tobytes())
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    write(folder / "annotations" / "train" / "1.png", png)
    np.testing.assert_array_equal(read_mask(load(folder).train, 1), values)


def refused() -> dict[str, tuple[bytes, str]]:
    values = labels(0)
    sixteen = tf.io.encode_png(values[..., None].astype(np.uint16)).numpy()
    return {
        "RGB": (encoded(np.stack([values] * 3, -1)), "it has 3 channels"),
        "RGBA": (encoded(np.stack([values] * 4, -1)), "it has 4 channels"),
        "grey and alpha": (encoded(values, mode="LA"), "it has 2 channels"),
        "16 bits": (sixteen, "it has 16 bits for a value"),
        "JPEG": (encoded(values, "JPEG"), "it is not a PNG image"),
    }


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "grey and alpha", "16 bits", "JPEG"])
def test_label_images_of_another_kind_are_refused_by_name(folder: Path, load, kind: str) -> None:  # type: ignore[no-untyped-def]
    content, reason = refused()[kind]
    path = write(folder / "annotations" / "train" / "2.png", content)
    for _ in range(2):  # the second time from what is kept
        with pytest.raises(UserError, match=rf"{path} cannot be used as labels: {reason}"):
            load(folder)
    write(folder / "annotations" / "val" / "0.png", content)
    with pytest.raises(UserError, match=rf"2\.png \(and 1 other label images\) cannot be used as labels: {reason}"):
        load(folder)


def test_values_out_of_range_are_refused_with_file_and_value(folder: Path, load) -> None:  # type: ignore[no-untyped-def]
    values = labels(1)
    values[3, 3] = 200
    path = write(folder / "annotations" / "train" / "1.png", encoded(values))
    message = rf"{path} has the value 200, but there are 3 classes in .*classes\.txt: values may be 0 to 2, and 255"
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            load(folder)


def test_missing_partners_are_skipped_and_counted(folder: Path, load, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    (folder / "annotations" / "train" / "0.png").unlink()
    (folder / "images" / "val" / "1.jpg").unlink()
    write(folder / "images" / "train" / "1.PNG", encoded(pixels(1, 30, 40)))
    write(folder / "images" / "train" / "notes.txt", b"")
    write(folder / "images" / "train" / ".hidden.jpg", b"")
    dataset = load(folder)
    assert (len(dataset.train), len(dataset.test)) == (2, 1)
    assert dataset.skipped == (
        "images/train/0.jpg: no label image annotations/train/0.png",
        "images/train/1.jpg: 1.PNG has the same name",
        "annotations/val/1.png: no image of that name in images/val",
    )
    assert f"3 files of {folder} have no partner and are skipped." in caplog.messages
    np.testing.assert_array_equal(read_mask(dataset.train, 0), labels(1))


def test_no_pairs_and_no_folders(folder: Path, load) -> None:  # type: ignore[no-untyped-def]
    (folder / "annotations" / "val").rename(folder / "annotations" / "other")
    with pytest.raises(
        UserError, match=r"no folders images/validation or val or valid or test and annotations/.*to test"
    ):
        load(folder)
    (folder / "annotations" / "val").mkdir()
    with pytest.raises(UserError, match=r"No image of .*there are 2 images and 0 PNG files"):
        load(folder)


def test_sizes_that_differ_are_skipped_and_named(folder: Path, load) -> None:  # type: ignore[no-untyped-def]
    write(folder / "annotations" / "train" / "1.png", encoded(labels(1, 60, 80)))
    dataset = load(folder)
    assert len(dataset.train) == 2
    assert dataset.skipped == (
        "images/train/1.jpg: 40 x 30 pixels, its label image annotations/train/1.png has 80 x 60",
    )


def test_damaged_files_are_skipped_and_named(folder: Path, load, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    mask, image = folder / "annotations" / "train" / "0.png", folder / "images" / "train" / "1.jpg"
    for path in (mask, image):
        path.write_bytes(path.read_bytes()[:-300])
    write(folder / "annotations" / "val" / "0.png", b"")
    for _ in range(2):  # the second time from what is kept
        dataset = load(folder)
        assert (len(dataset.train), len(dataset.test)) == (1, 1)
        skipped = [line.split(":")[0] for line in dataset.skipped]
        assert skipped == ["images/train/1.jpg", "annotations/train/0.png", "annotations/val/0.png"]
        assert "truncated or damaged" in dataset.skipped[1]
        assert f"2 images or label images of {folder / 'images' / 'train'} cannot be used" in caplog.text


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_images_are_turned_as_their_labels_are(folder: Path, load, orientation: int) -> None:  # type: ignore[no-untyped-def]
    upright = labels(1, 40, 30) if orientation >= 5 else labels(1)
    image = encoded(pixels(1, 30, 40), "PNG", orientation)
    (folder / "images" / "train" / "1.jpg").unlink()
    path = write(folder / "images" / "train" / "1.png", image)
    write(folder / "annotations" / "train" / "1.png", encoded(upright))
    train = load(folder).train
    with Image.open(path) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    np.testing.assert_array_equal(read_image(train, 1), expected)
    np.testing.assert_array_equal(read_mask(train, 1), upright)

    # A label image that carries the same EXIF data is turned with its image.
    write(folder / "annotations" / "train" / "1.png", encoded(labels(1), "PNG", orientation))
    train = load(folder).train
    with Image.open(folder / "annotations" / "train" / "1.png") as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    np.testing.assert_array_equal(read_mask(train, 1), expected)
    assert read_image(train, 1).shape[:2] == expected.shape


def test_labels_that_were_drawn_on_stored_images(folder: Path, load) -> None:  # type: ignore[no-untyped-def]
    write(folder / "images" / "train" / "1.jpg", encoded(pixels(1, 30, 40), "JPEG", 6))  # the label image: 30 x 40
    write(folder / "images" / "train" / "2.jpg", encoded(pixels(2, 30, 40), "JPEG", 2))
    assert load(folder).train.orientations.tolist() == [1, 1, 1]


@given(st.data())
def test_any_damage_is_found_or_does_not_matter(choose: st.DataObject) -> None:
    """Whatever is cut off or changed in a label image: it is decoded, or the one error is raised that is expected."""
    content = bytearray(encoded(labels(0), mode=choose.draw(st.sampled_from(["L", "P", "1"]), "mode")))
    for _ in range(choose.draw(st.integers(0, 2), "changes")):
        place = choose.draw(st.integers(0, len(content) - 1), "place")
        if not 16 <= place < 24:  # a size of gigabytes takes gigabytes
            content[place] = choose.draw(st.integers(0, 255), "byte")
    cut = bytes(content[: choose.draw(st.integers(1, len(content)), "length")])
    try:
        decoded = stored_labels(cut)
    except ValueError:
        return
    assert (decoded.shape, decoded.dtype) == ((30, 40), np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (4000, 5000)], ids=["1 pixel", "20 megapixels"])
def test_small_and_large_images(folder: Path, load, size: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    write(folder / "images" / "train" / "1.jpg", encoded(np.full((*size, 3), 99, np.uint8), "JPEG"))
    write(folder / "annotations" / "train" / "1.png", encoded(np.full(size, 2, np.uint8)))
    train = load(folder).train
    assert read_image(train, 1).shape == (*size, 3)
    assert np.unique(read_mask(train, 1)).tolist() == [2]


@pytest.mark.parametrize(
    "content", [b"", b"a\nb\na\n", b"a\n\nb\n", b"\xff\xfe\xff", b"\n".join(b"%d" % i for i in range(256))]
)
def test_classes_txt_that_cannot_be_meant(folder: Path, load, content: bytes) -> None:  # type: ignore[no-untyped-def]
    write(folder / "classes.txt", content)
    with pytest.raises(UserError, match=r"classes\.txt (must name 1 to 255 classes|cannot be read as UTF-8)"):
        load(folder)


def test_masks_of_0_and_255_have_one_class_and_are_refused(folder: Path, load) -> None:  # type: ignore[no-untyped-def]
    """255 does not count: the rest would be learned perfectly."""
    (folder / "classes.txt").unlink()
    for path in folder.rglob("*.png"):
        write(path, encoded(np.where(labels(int(path.stem)) == 1, 255, 0).astype(np.uint8)))
    with pytest.raises(UserError, match="masks of 0 and 255 must become masks of 0 and 1"):
        load(folder)


def test_classes_that_no_label_image_has_are_named(folder: Path, load, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    write(folder / "classes.txt", b"sky\nearth\nsea\nfire\n")
    assert load(folder).class_names == ("sky", "earth", "sea", "fire")
    assert "has the class fire" in caplog.text


def test_no_pixel_that_counts(folder: Path, load) -> None:  # type: ignore[no-untyped-def]
    (folder / "classes.txt").unlink()
    for path in folder.rglob("*.png"):
        path.write_bytes(encoded(np.full((30, 40), IGNORED, np.uint8)))
    with pytest.raises(UserError, match="have no value but 255: no pixel counts"):
        load(folder)


def test_the_second_start_decodes_nothing(folder: Path, load, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    first = load(folder)

    def fail(path: str) -> None:
        raise AssertionError(f"read again: {path}")

    monkeypatch.setattr(mask_folder, "examine_image", fail)
    monkeypatch.setattr(mask_folder, "_examine_mask", fail)
    assert load(folder).train.fingerprint() == first.train.fingerprint()
    os.utime(folder / "annotations" / "val" / "0.png")
    with pytest.raises(AssertionError, match=r"read again: .*val/0\.png"):
        load(folder)

"""Directories of images, written by Pillow for each test: layouts, formats, corrupt files, verdicts, errors."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mobiatt_tf import data
from mobiatt_tf.data import crops
from mobiatt_tf.data import folder as folders
from mobiatt_tf.data.dataset import held_out_by_name, interleave_classes
from mobiatt_tf.data.decoding import decode_image
from mobiatt_tf.errors import UserError

RED, GREEN, BLUE = (200, 20, 30), (20, 190, 40), (10, 30, 210)


def flat(colour: tuple[int, ...] = RED, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new(mode, size, colour)


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8))


def write(path: Path, image: Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """root/CLASS/*.png: two classes of 12."""
    root = tmp_path / "images"
    for index in range(12):
        write(root / "red" / f"r{index}.png", flat(RED))
        write(root / "green" / f"g{index}.png", flat(GREEN))
    return root


@pytest.fixture
def load(tmp_path: Path):  # type: ignore[no-untyped-def]
    return lambda root: data.load(str(root), tmp_path / "cache")


def pixels(split: data.Split) -> np.ndarray:
    """0 .. 255: every image of the split, resized to 8 x 8."""
    batches = [images.numpy() for images, _ in data.test_batches(split, image_size=(8, 8), batch_size=4)]
    return (np.concatenate(batches) * data.IMAGENET_STD + data.IMAGENET_MEAN) * 255


def names(split: data.Split) -> set[str]:
    return {Path(file).name for file in split.files}


def test_one_folder_a_class(folder: Path, load) -> None:  # type: ignore[no-untyped-def]
    dataset = load(folder)
    assert dataset.class_names == ("green", "red")
    assert dataset.skipped == ()
    assert len(dataset.train) + len(dataset.test) == 24
    assert not names(dataset.train) & names(dataset.test)
    assert set(dataset.test.labels.tolist()) == {0, 1}
    assert dataset.train.labels[:6].tolist() == [0, 1, 0, 1, 0, 1]
    for split in (dataset.train, dataset.test):
        expected = np.array([GREEN, RED])[split.labels]
        np.testing.assert_allclose(
            pixels(split), np.broadcast_to(expected[:, None, None], (len(split), 8, 8, 3)), atol=1
        )


def test_prefix_and_name(folder: Path, tmp_path: Path) -> None:
    dataset = data.load(f"folder:{folder}", tmp_path / "cache")
    assert dataset.name == f"folder:{folder}"
    assert len(dataset.class_names) == 2


def test_the_split_stays_when_files_come_and_go(folder: Path, load) -> None:  # type: ignore[no-untyped-def]
    before = load(folder)
    for index in range(12, 40):
        write(folder / "red" / f"r{index}.png", flat(RED))
    (folder / "red" / "r0.png").unlink()
    after = load(folder)
    assert names(before.test) - {"r0.png"} <= names(after.test)
    assert names(before.train) - {"r0.png"} <= names(after.train)


@settings(max_examples=50)
@given(st.lists(st.text(min_size=1, max_size=20), min_size=2, max_size=300, unique=True))
def test_each_side_gets_its_share(file_names: list[str]) -> None:
    test = held_out_by_name(file_names)
    assert 1 <= test.sum() <= len(file_names) - 1
    order = np.random.default_rng(0).permutation(len(file_names))
    np.testing.assert_array_equal(held_out_by_name([file_names[i] for i in order]), test[order])
    if len(file_names) > 200:
        assert 0.05 < test.mean() < 0.4


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_classes_take_turns(labels: list[int]) -> None:
    array = np.array(labels, np.int32)
    order = interleave_classes(array)
    assert sorted(order.tolist()) == list(range(len(labels)))
    rounds = [sum(array[order[:i]] == array[order[i]]) for i in range(len(labels))]  # how often the class came before
    assert rounds == sorted(rounds)


@pytest.mark.parametrize("test_folder", ["val", "validation", "test"])
def test_layout_of_imagenet(tmp_path: Path, load, test_folder: str) -> None:  # type: ignore[no-untyped-def]
    root = tmp_path / "ILSVRC"
    for split, count in (("train", 5), (test_folder, 2)):
        for label in ("n01440764", "n01443537"):
            for index in range(count):
                write(root / split / label / f"{label}_{split}_{index}.JPEG", noise(index))
    dataset = load(root)
    assert dataset.class_names == ("n01440764", "n01443537")
    assert (len(dataset.train), len(dataset.test)) == (10, 4)
    assert all(f"_{test_folder}_" in name for name in names(dataset.test))


def test_a_train_folder_alone_is_split(folder: Path, load) -> None:  # type: ignore[no-untyped-def]
    folder.rename(folder.parent / "train")
    dataset = load(folder.parent)
    assert dataset.class_names == ("green", "red")
    assert len(dataset.test) > 0


@pytest.mark.parametrize("labels", ["annotations", "labels", "masks"])
def test_data_of_segmentation_are_not_taken_for_two_classes(tmp_path: Path, load, labels: str) -> None:  # type: ignore[no-untyped-def]
    for name in ("images", labels):
        write(tmp_path / "set" / name / "train" / "1.png", noise(1))
    with pytest.raises(UserError, match="add --task=segmentation"):
        load(tmp_path / "set")


def test_data_of_detection_are_not_taken_for_classes(tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "set" / "train2017" / "1.png", noise(1))
    (tmp_path / "set" / "annotations").mkdir()
    (tmp_path / "set" / "annotations" / "instances_train2017.json").write_text("{}")
    with pytest.raises(UserError, match="add --task=detection"):
        load(tmp_path / "set")


def test_train_and_val_with_other_folders_beside_them(tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    for place in ("train/car", "train/plane", "val/car", "val/plane", "annotations/car"):
        write(tmp_path / "root" / place / "0.png", flat())
    dataset = load(tmp_path / "root")
    assert dataset.class_names == ("car", "plane")
    assert not any("annotations" in name for name in (*names(dataset.train), *names(dataset.test)))


@pytest.mark.parametrize("inside", ["", "steam"])
@pytest.mark.parametrize("siblings", [["car"], ["plane", "car", ".hidden"]])
def test_a_train_folder_beside_classes_is_not_guessed(tmp_path: Path, load, inside: str, siblings: list[str]) -> None:  # type: ignore[no-untyped-def]
    root = tmp_path / "vehicles"
    for name in siblings:
        write(root / name / "0.png", flat())
    write(root / "train" / inside / "0.png", flat())
    named = ", ".join(sorted({"car", "plane"} & set(siblings)))
    with pytest.raises(
        UserError,
        match=rf"the training images or a class, beside {named}\. .*into one new folder and call that .*train",
    ):
        load(root)


def test_a_class_called_train(tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    """The way out that the error names."""
    for name in ("car", "train", "plane"):
        for index in range(3):
            write(tmp_path / "root" / "train" / name / f"{index}.png", flat())
    (tmp_path / "root" / ".hidden").mkdir()
    assert load(tmp_path / "root").class_names == ("car", "plane", "train")


def test_a_train_folder_without_classes(tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    for name in ("train", "test"):
        write(tmp_path / "root" / name / "0.png", flat())
    with pytest.raises(UserError, match=r"train has no folders.*train/CLASS"):
        load(tmp_path / "root")


def formats() -> dict[str, tuple[Image.Image, dict[str, object]]]:
    """File name: image and how to save it. All of them show RED, but those named grey."""
    palette = flat().quantize(4)
    orientation = Image.Exif()
    orientation[0x0112] = 6
    return {
        "UPPER.JPG": (flat(), {"format": "JPEG", "quality": 100, "subsampling": 0}),
        "progressive.jpeg": (flat(), {"progressive": True, "quality": 100, "subsampling": 0}),
        "cmyk.jpg": (flat().convert("CMYK"), {"quality": 100}),
        "exif.jpg": (flat(), {"exif": orientation, "quality": 100, "subsampling": 0}),
        "rgba.png": (flat((*RED, 255), "RGBA"), {}),
        "palette.png": (palette, {}),
        "animated.gif": (palette, {"save_all": True, "append_images": [flat(BLUE).quantize(4)]}),
        "bitmap.bmp": (flat(), {}),
        "32_bits.bmp": (flat((*RED, 100), "RGBA"), {}),
        "grey.bmp": (flat((90,), "L"), {}),
        "web.webp": (flat(), {"lossless": True}),
        "png_named.jpg": (flat(), {"format": "PNG"}),
        "grey.png": (flat((90,), "L"), {}),
        "grey_alpha.png": (flat((90, 255), "LA"), {}),
        "grey.jpg": (flat((90,), "L"), {}),
        "grey_16_bits.png": (Image.fromarray(np.full((30, 40), 90 * 257, np.uint16)), {}),
    }


@pytest.mark.parametrize("name", formats())
def test_formats_that_are_read(tmp_path: Path, load, name: str) -> None:  # type: ignore[no-untyped-def]
    image, options = formats()[name]
    for split in ("train", "val"):
        write(tmp_path / "root" / split / "class" / name, image, **options)
    dataset = load(tmp_path / "root")
    assert dataset.skipped == ()
    colour = (90, 90, 90) if name.startswith("grey") else RED
    expected = np.broadcast_to(colour, (1, 8, 8, 3))
    np.testing.assert_allclose(pixels(dataset.test), expected, atol=3)


@pytest.mark.parametrize(("suffix", "options"), [("png", {}), ("webp", {"lossless": True, "exact": True})])
@pytest.mark.parametrize("alpha", [0, 100, 255])
def test_what_is_transparent_shows_white(tmp_path: Path, load, suffix: str, options: dict, alpha: int) -> None:  # type: ignore[no-untyped-def, type-arg]
    image = flat((*RED, alpha), "RGBA")
    for split in ("train", "val"):
        write(tmp_path / "root" / split / "class" / f"a.{suffix}", image, **options)
    expected = np.asarray(Image.alpha_composite(flat((255, 255, 255, 255), "RGBA"), image))[0, 0, :3]
    found = pixels(load(tmp_path / "root").test)
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=1.5)


def test_a_palette_with_a_transparent_colour(tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    for split in ("train", "val"):
        write(tmp_path / "root" / split / "class" / "a.png", flat(RED).quantize(4), transparency=0)
    np.testing.assert_allclose(pixels(load(tmp_path / "root").test), 255, atol=1)


def corrupt_files(folder: Path) -> dict[str, str]:
    """Writes files that are no images, or not whole ones; says the reason for each."""
    buffer = io.BytesIO()
    noise(0).save(buffer, "JPEG", quality=95)
    jpeg = buffer.getvalue()
    (folder / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "no_end.jpg").write_bytes(jpeg[:-2])
    buffer = io.BytesIO()
    noise(0).save(buffer, "PNG")
    (folder / "truncated.png").write_bytes(buffer.getvalue()[:-500])
    (folder / "text.jpg").write_text("This is not an image.")
    (folder / "short.jpg").write_bytes(b"BM")
    (folder / "page.png").write_text("<html>404 Not Found</html>")
    (folder / "empty.jpeg").touch()
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    noise(0).save(folder / "scan.tiff")
    noise(0).save(folder / "moving.webp", save_all=True, append_images=[noise(1)])
    return {
        "truncated.jpg": "truncated or damaged JPEG",
        "no_end.jpg": "truncated or damaged JPEG",
        "truncated.png": "truncated or damaged PNG",
        "text.jpg": "not a JPEG",
        "short.jpg": "truncated or damaged BMP",
        "page.png": "not a JPEG",
        "empty.jpeg": "empty",
        "link.png": "No such file",
        "scan.tiff": "TensorFlow does not decode",
        "moving.webp": "animated",
    }


def test_corrupt_files_are_skipped_and_named(folder: Path, load, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    reasons = corrupt_files(folder / "red")
    (folder / "red" / "._r0.png").write_text("left behind by macOS")
    (folder / ".hidden").mkdir()
    dataset = load(folder)
    assert len(dataset.train) + len(dataset.test) == 24
    found = dict(line.split(": ", 1) for line in dataset.skipped)
    assert {Path(name).name for name in found} == set(reasons)
    for name, reason in found.items():
        assert reasons[Path(name).name] in reason
        assert f"Skipped {name}: {reason}" in caplog.messages
    assert any(message.startswith("10 images of") for message in caplog.messages)
    # What is left can be trained on.
    options = {"image_size": (8, 8), "batch_size": 4, "seed": 0, "epoch": 0, "augmentation": "resized_crop"}
    assert len(list(data.train_batches(dataset.train, **options))) == len(dataset.train) // 4


@tf.function(input_signature=[tf.TensorSpec([], tf.string)])
def decode_both_ways(file: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The whole image and a random window of it, as the pipeline reads them."""
    content = tf.io.read_file(file)
    window, _ = crops.read_window(content, tf.constant([1, 2], tf.int64))
    return decode_image(content), window


@settings(max_examples=200)
@given(st.data())
def test_what_passes_the_check_can_be_read(tmp_path_factory: pytest.TempPathFactory, choose: st.DataObject) -> None:
    """Whatever is cut off or changed in a file: it is skipped, or else every way of the pipeline can decode it."""
    buffer = io.BytesIO()
    noise(1).save(buffer, choose.draw(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "WEBP"]), "format"))
    content = bytearray(buffer.getvalue())
    for _ in range(choose.draw(st.integers(0, 2), "changes")):
        content[choose.draw(st.integers(0, len(content) - 1), "place")] = choose.draw(st.integers(0, 255), "byte")
    file = tmp_path_factory.getbasetemp() / "changed.jpg"
    file.write_bytes(content[: choose.draw(st.integers(1, len(content)), "length")])
    problem, _ = folders._examine(str(file))
    if not problem:
        whole, window = decode_both_ways(str(file))
        assert whole.shape[-1] == window.shape[-1] == 3
        assert min(*whole.shape, *window.shape) > 0


def test_other_files_are_skipped_and_named(folder: Path, load, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    for index in range(12):
        (folder / "red" / f"notes{index:02}.txt").touch()
    (folder / "labels.csv").touch()
    write(folder / "lost.png", flat())
    write(folder / "green" / "deeper" / "g12.png", flat(GREEN))
    for name in (".DS_Store", "._r0.png", "Thumbs.db", "red/desktop.ini", "red/.hidden/a.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    dataset = load(folder)
    assert len(dataset.train) + len(dataset.test) == 25
    notes = tuple(f"red/notes{index:02}.txt: not an image" for index in range(12))
    assert dataset.skipped == ("labels.csv: not an image", "lost.png: not in a class folder", *notes)
    assert caplog.messages == [
        *(f"Skipped {line}" for line in dataset.skipped[:10]),
        f"14 files of {folder} are not images of a class and are skipped.",
    ]


def test_names_that_are_not_utf8_are_skipped(folder: Path, load) -> None:  # type: ignore[no-untyped-def]
    odd = os.fsdecode(b"caf\xe9")
    try:
        write(folder / "red" / f"{odd}.png", flat())
    except OSError:
        pytest.skip("this file system has no such names")
    (folder / "green" / f"{odd}.txt").touch()
    expected = (r"red/caf\xe9.png: its name is not UTF-8; rename it", r"green/caf\xe9.txt: not an image")
    for _ in range(2):  # the second time from the verdicts
        dataset = load(folder)
        assert dataset.skipped == expected
        assert len(pixels(dataset.train)) + len(pixels(dataset.test)) == 24
    for index in range(2):
        write(folder / odd / f"{index}.png", flat())
    with pytest.raises(
        UserError, match=r"None of the 2 images of class caf\\xe9 .*caf\\xe9/0.png: its name is not UTF-8"
    ):
        load(folder)
    folder.rename(folder.parent / odd)
    with pytest.raises(UserError, match=r"path .*caf\\xe9 is not UTF-8"):
        load(folder.parent / odd)


def test_the_second_start_decodes_nothing_until_a_file_changes(folder: Path, load) -> None:  # type: ignore[no-untyped-def]
    load(folder)
    file = folder / "red" / "r3.png"
    status = file.stat()
    file.write_bytes(b"?" * status.st_size)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load(folder).skipped == ()  # same size and time: taken to be as it was
    os.utime(file)
    assert load(folder).skipped == ("red/r3.png: not a JPEG, PNG, GIF, BMP or WebP image",)


def test_verdicts_of_older_rules_do_not_count(folder: Path, tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    corrupt_files(folder / "red")
    first = load(folder)
    (store,) = (tmp_path / "cache" / "checked_folders").iterdir()
    content = json.loads(store.read_text())
    for verdict in content["files"].values():
        verdict[2] = ""
    store.write_text(json.dumps(content))
    assert len(load(folder).skipped) < len(first.skipped)  # the same rules: taken to be right
    content["rules"] -= 1
    store.write_text(json.dumps(content))
    assert load(folder).skipped == first.skipped


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rules": %d, "files": {"a": 1}}', '{"rules": %d, "files": []}'])
def test_damaged_verdicts_are_found_out_again(folder: Path, tmp_path: Path, load, content: str) -> None:  # type: ignore[no-untyped-def]
    corrupt_files(folder / "red")
    first = load(folder)
    (store,) = (tmp_path / "cache" / "checked_folders").iterdir()
    store.write_text(content.replace("%d", str(folders._RULES)))
    assert load(folder).skipped == first.skipped


def test_verdicts_that_cannot_be_kept_are_no_reason_to_stop(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    assert len(data.load(str(folder), tmp_path / "file" / "cache").class_names) == 2


def test_exif_rotation_is_announced(folder: Path, load, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    image, options = formats()["exif.jpg"]
    write(folder / "red" / "exif.jpg", image, **options)
    for _ in range(2):  # the second time from the verdicts
        caplog.clear()
        load(folder)
        assert [message[:8] for message in caplog.messages] == ["1 images"]
        assert "rotate" in caplog.text


def test_errors_say_what_is_wrong(folder: Path, tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=r'no dataset or directory ".*nowhere"'):
        load(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="has no folders"):
        load(tmp_path / "bare")
    (tmp_path / "bare" / "class").mkdir()
    (tmp_path / "bare" / "class" / "notes.txt").touch()
    with pytest.raises(UserError, match="has no images"):
        load(tmp_path / "bare")
    (folder / "blue").mkdir()
    with pytest.raises(UserError, match=r"No images in blue of"):
        load(folder)
    write(folder / "blue" / "b0.png", flat(BLUE))
    with pytest.raises(UserError, match=r"Class blue .* a single readable image"):
        load(folder)
    for index in range(3):
        (folder / "blue" / f"b{index}.png").write_text("no image")
    with pytest.raises(UserError, match="None of the 3 images of class blue"):
        load(folder)


def test_train_and_test_must_have_the_same_classes(tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    root = tmp_path / "root"
    for name in ("train/a", "train/b", "val/a"):
        write(root / name / "0.png", flat())
    with pytest.raises(UserError, match=r"val lacks b \(1 of 2\)"):
        load(root)
    write(root / "val" / "b" / "0.png", flat())
    write(root / "val" / "c" / "0.png", flat())
    with pytest.raises(UserError, match=r"train lacks c \(1 of 3\)"):
        load(root)


def test_flat_validation_images_of_imagenet(tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "root" / "train" / "a" / "0.png", flat())
    write(tmp_path / "root" / "val" / "ILSVRC2012_val_00000001.JPEG", flat())
    with pytest.raises(UserError, match=r"val has no folders.*val/CLASS"):
        load(tmp_path / "root")

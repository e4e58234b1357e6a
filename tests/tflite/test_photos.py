"""Photographs of every kind as they come from disk, and what keeps them from being overwritten."""

import io
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobiatt_tf.errors import UserError
from tests.tflite.pictures import BLUE, RED, save, two_halves
from tflite import photos


def jpeg_of_rotation(code: int, image: np.ndarray) -> bytes:
    """A JPEG that shows `image` when it is turned as EXIF code 6 (a quarter clockwise) or 3 (upside down) asks."""
    stored = {6: np.rot90(image, 1), 3: np.rot90(image, 2), 1: image}[code]
    exif = Image.Exif()
    exif[0x0112] = code
    content = io.BytesIO()
    Image.fromarray(stored).save(content, "JPEG", quality=95, exif=exif)
    return content.getvalue()


@pytest.mark.parametrize("code", [1, 3, 6])
def test_a_photo_turned_by_exif_is_read_upright(code: int, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(jpeg_of_rotation(code, two_halves()))
    found = photos.read_photo(tmp_path / "photo.jpg")
    assert found.shape == (64, 96, 3)
    np.testing.assert_allclose(found[:, 8:40].mean((0, 1)), RED, atol=3)
    np.testing.assert_allclose(found[:, 56:88].mean((0, 1)), BLUE, atol=3)


def test_grey_cmyk_16_bit_and_transparent_photos_become_rgb(tmp_path: Path) -> None:
    grey = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (8, 1))  # [8, 64]
    as_rgb = np.repeat(grey[..., None], 3, axis=-1)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(two_halves()).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    Image.fromarray(np.zeros((4, 4, 4), np.uint8)).save(tmp_path / "clear.png")
    np.testing.assert_array_equal(photos.read_photo(tmp_path / "grey.png"), as_rgb)
    np.testing.assert_array_equal(photos.read_photo(tmp_path / "deep.png"), as_rgb)
    np.testing.assert_array_equal(photos.read_photo(tmp_path / "clear.png"), np.full((4, 4, 3), 255))
    cmyk = photos.read_photo(tmp_path / "cmyk.jpg")
    np.testing.assert_allclose(cmyk[:, 8:40].mean((0, 1)), RED, atol=12)
    np.testing.assert_allclose(cmyk[:, 56:88].mean((0, 1)), BLUE, atol=12)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"words", "not a JPEG"),
        (jpeg_of_rotation(1, two_halves())[:400], "damaged"),
        (None, "No such file"),
    ],
)
def test_what_is_no_photo_is_said(content: bytes | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(UserError, match=reason):
        photos.read_photo(tmp_path / "photo.jpg")


def test_a_photo_that_would_fill_the_memory_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """A PNG head that declares 400 million pixels."""
    content = bytearray(save(two_halves(), tmp_path / "small.png").read_bytes())
    content[16:24] = (20_000).to_bytes(4, "big") * 2  # width and height
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(UserError, match=r"it has 400\.0 million pixels, more than the allowed 179\.0"):
        photos.read_photo(tmp_path / "photo.png")
    content[16:24] = (19_000).to_bytes(4, "big") + (10_000).to_bytes(4, "big")  # Pillow refuses from 179 million on
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "photo.png").write_bytes(content)
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(UserError, match=r"it has 190\.0 million pixels"):
        photos.read_photo(tmp_path / "photo.png")
    assert limit == Image.MAX_IMAGE_PIXELS
    assert limit is not None
    assert 2 * limit == photos.MOST_PIXELS


def test_a_directory_stands_for_the_photos_in_it_and_equal_names_get_numbers(tmp_path: Path) -> None:
    for name in ("b.png", "a.PNG"):
        save(two_halves(), tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("none")
    found = photos.photo_paths([str(tmp_path), str(tmp_path / "b.png")])
    assert [path.name for path in found] == ["a.PNG", "b.png", "b.png"]
    assert photos.distinct_stems(found) == ["a", "b", "b_2"]
    repeated = [Path(name) for name in ("a_2.png", "a.png", "a.jpg", "a.gif")]
    assert photos.distinct_stems(repeated) == ["a_2", "a", "a_3", "a_4"]
    assert len(set(photos.distinct_stems([Path("a.png")] * 30_000))) == 30_000  # at once, not after minutes
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        photos.photo_paths([str(tmp_path / "empty")])


def test_photographs_are_never_overwritten(tmp_path: Path) -> None:
    folder, output = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    output.mkdir()
    photo, other = save(two_halves(), folder / "a.png"), save(two_halves(), output / "a_boxes.jpg")
    targets = [output / "a_boxes.jpg"]
    photos.refuse_overwriting([str(folder)], [photo], output, targets)
    with pytest.raises(UserError, match="is where the photographs are"):
        photos.refuse_overwriting([str(folder)], [photo], output / ".." / "photos", targets)
    with pytest.raises(UserError, match=r"a_boxes\.jpg is one of the photographs"):
        photos.refuse_overwriting([str(photo), str(other)], [photo, other], output, targets)


def test_equal_names_in_two_directories_stay_apart_and_bytes_that_are_no_text_are_shown(tmp_path: Path) -> None:
    paths = [tmp_path / "one" / "a.png", tmp_path / "two" / "a.png", tmp_path / "two" / os.fsdecode(b"\xff.png")]
    assert photos.relative_names(paths) == ["one/a.png", "two/a.png", r"two/\xff.png"]
    assert photos.relative_names(paths[:1]) == ["a.png"]

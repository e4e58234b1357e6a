"""BMP files: what TensorFlow would read wrongly is skipped with its reason, the rest shows what Pillow shows."""

import contextlib
import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mobiatt_tf import data
from mobiatt_tf.data.decoding import bmp_problem, decode_image

PALETTE = "a palette BMP; convert it to PNG"
OTHER_KIND = "a BMP of a kind that TensorFlow does not decode; convert it to PNG"


def noise(seed: int = 0, size: tuple[int, int] = (32, 24)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def bmp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "BMP")
    return buffer.getvalue()


def by_hand(bits: int, rows: bytes, size: tuple[int, int], compression: int = 0, after_header: bytes = b"") -> bytes:
    """Kinds that Pillow reads but does not write; `after_header` is the palette or the masks."""
    header = struct.pack("<IiiHHIIiiII", 40, *size, 1, bits, compression, len(rows), 0, 0, 0, 0)
    start = 14 + len(header) + len(after_header)
    return b"BM" + struct.pack("<III", start + len(rows), 0, start) + header + after_header + rows


def grey_palette(levels: range) -> bytes:
    return b"".join(bytes([level, level, level, 0]) for level in levels)


def four_bits() -> bytes:
    """Each row is 8 bytes, two pixels in a byte, of 16 colours."""
    return by_hand(4, bytes(range(0, 256, 2)), (16, 16), after_header=grey_palette(range(0, 256, 17)))


def sixteen_bits() -> bytes:
    return by_hand(16, np.arange(128, dtype="<u2").tobytes(), (16, 8))


def inverted_grey() -> bytes:
    return by_hand(8, bytes(range(256)), (16, 16), after_header=grey_palette(range(255, -1, -1)))


def run_lengths() -> bytes:
    """Compressed: 16 rows, each one run of 16 pixels, then the end of the line; at last the end of the file."""
    runs = b"".join(bytes([16, 10 * row, 0, 0]) for row in range(16)) + b"\0\1"
    return by_hand(8, runs, (16, 16), compression=1, after_header=grey_palette(range(256)))


def with_masks(image: Image.Image, *masks: int) -> bytes:
    """32 bits, with masks that say where red, green and blue are, as many programs write it."""
    image = image.convert("RGBA")
    return by_hand(32, bmp(image)[54:], image.size, compression=3, after_header=struct.pack("<III", *masks))


def os2() -> bytes:
    """24 bits with the header of 12 bytes that OS/2 has."""
    rows = bmp(noise())[54:]
    return b"BM" + struct.pack("<IIIIHHHH", 26 + len(rows), 0, 26, 12, 32, 24, 1, 24) + rows


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: bmp(noise().quantize(200)), PALETTE),
        (lambda: bmp(noise().quantize(3)), PALETTE),
        (lambda: bmp(noise().convert("1")), PALETTE),
        (four_bits, PALETTE),
        (inverted_grey, PALETTE),
        (sixteen_bits, OTHER_KIND),
        (run_lengths, OTHER_KIND),
        (lambda: with_masks(noise(), 0xFF000000, 0xFF0000, 0xFF00), OTHER_KIND),
        (os2, OTHER_KIND),
    ],
    ids=["P", "P_few_colours", "1", "4_bits", "inverted_grey", "16_bits", "compressed", "blue_second", "os2"],
)
def test_what_would_be_read_wrongly_is_skipped(tmp_path: Path, make: Callable[[], bytes], reason: str) -> None:
    content = make()
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))  # a real file, which Pillow can read
    with contextlib.suppress(tf.errors.InvalidArgumentError):
        assert not np.array_equal(decode_image(tf.constant(content)), expected)  # else it need not be skipped
    for index in range(2):
        file = tmp_path / "root" / "class" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise(index).save(file)
    (tmp_path / "root" / "class" / "odd.bmp").write_bytes(content)
    assert data.load(str(tmp_path / "root"), tmp_path / "cache").skipped == (f"class/odd.bmp: {reason}",)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["RGB", "RGBA", "L", "P", "1", "masks"]),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.integers(0, 5),
)
def test_what_passes_shows_what_pillow_shows(mode: str, size: tuple[int, int], seed: int) -> None:
    image = noise(seed, size)
    if mode == "masks":
        content = with_masks(image, 0xFF0000, 0xFF00, 0xFF)
    else:
        image = image.convert(mode)
        content = bmp(image)
    assert bmp_problem(content) == (PALETTE if mode in ("P", "1") else "")
    if mode not in ("P", "1"):
        np.testing.assert_array_equal(decode_image(tf.constant(content)), image.convert("RGB"))


def test_whatever_is_cut_off_has_an_answer() -> None:
    for content in (bmp(noise()), bmp(noise().quantize(200)), os2()):
        for length in range(2, 120):
            assert bmp_problem(content[:length]) in ("", PALETTE, OTHER_KIND)

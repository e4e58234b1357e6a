"""Images and label images of `mobiatt_tf.data.dense`, read upright."""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from mobiatt_tf.data.checked import is_utf8
from mobiatt_tf.data.decoding import decode_image, image_format, image_problem
from mobiatt_tf.data.dense import DetectionSplit, SegmentationSplit
from mobiatt_tf.data.orientation import exif_orientation, orient
from mobiatt_tf.data.records import image_bytes

_MOST_PIXELS = 2**29 - 1  # of a PNG image that TensorFlow decodes (decode_image_op.cc)
_COLOUR_TYPE = 25  # its place: signature (8), length and name of IHDR (8), width, height (8), bit depth (1), this
_CHANNELS = {
    0: 1,
    2: 3,
    3: 1,
    4: 2,
    6: 4,
}  # PNG specification, table 11.1: grey, RGB, palette, grey + alpha, RGB + alpha


def image_reader(split: DetectionSplit | SegmentationSplit) -> Callable[[tf.Tensor], tf.Tensor]:
    """How a pipeline reads the images of a split.

    Returns:
        A function from the index of an example, int64 [], to its image, uint8 [H, W, 3], RGB, upright. It can be traced
        into a graph.
    """
    read, codes = image_bytes(split.images), tf.constant(split.orientations)
    return lambda index: orient(decode_image(read(index)), codes[index])


def mask_reader(split: SegmentationSplit) -> Callable[[tf.Tensor], tf.Tensor]:
    """How a pipeline reads the labels of a split.

    Returns:
        A function from the index of an example, int64 [], to the class of each pixel of the upright image, uint8
        [H, W]; IGNORED where there is none. It can be traced into a graph.
    """
    read, codes, label_map = image_bytes(split.masks), tf.constant(split.mask_orientations), split.label_map

    def decode(content: bytes) -> np.ndarray:
        return label_map[stored_labels(content)]

    def read_mask(index: tf.Tensor) -> tf.Tensor:
        # Pillow, because TensorFlow gives the colours of a palette and not the indices.
        labels = tf.numpy_function(decode, [read(index)], tf.uint8, stateful=False)
        return orient(tf.ensure_shape(labels, [None, None])[..., tf.newaxis], codes[index])[..., 0]

    return read_mask


def stored_labels(content: bytes) -> np.ndarray:
    """The values of a label image: grey values, the indices of a palette, or the first of several channels.

    Args:
        content: a PNG file.

    Returns:
        uint8 [H, W].

    Raises:
        ValueError: it cannot be decoded, is not a PNG file, is larger than images can be, or its values take 16 bits.
    """
    from PIL import PngImagePlugin

    channels, depth = png_channels(content)
    if not channels:
        raise ValueError("not a PNG image")
    if depth == 16:  # of which Pillow shows the upper 8 where there are colours
        raise ValueError("it has 16 bits for a value; labels have 8")
    width, height = struct.unpack_from(">II", content, 16)  # IHDR comes first
    if width * height > _MOST_PIXELS:
        raise ValueError(f"it says that it has {width} x {height} pixels; images may have up to {_MOST_PIXELS}")
    try:
        # Not Image.open, which refuses what has more than 179 million pixels.
        values = np.asarray(PngImagePlugin.PngImageFile(io.BytesIO(content)))
    except (OSError, SyntaxError, ValueError):
        raise ValueError("truncated or damaged PNG data") from None
    if values.ndim == 3:
        values = values[..., 0]  # [H, W]
    # Pillow makes 1 bit bool and stretches grey values of 2 and 4 bits to 0 .. 255.
    stretched = depth in (2, 4) and content[_COLOUR_TYPE] == 0
    return values.astype(np.uint8) // (255 // (2**depth - 1) if stretched else 1)


def png_channels(content: bytes) -> tuple[int, int]:
    """How many channels a PNG file stores (1 with a palette) and in how many bits each; 0, 0 for another file."""
    if image_format(content) != "PNG" or len(content) <= _COLOUR_TYPE:
        return 0, 0
    return _CHANNELS.get(content[_COLOUR_TYPE], 0), content[_COLOUR_TYPE - 1]


def image_finding(content: bytes) -> tuple[str, int, int, int]:
    """What the check of a dataset finds out about the bytes of an image file.

    Returns:
        What keeps it from being used ("" for nothing); height and width of what `decode_image` gives, and the EXIF code
        (0, 0 and 1 where it cannot be used).
    """
    if problem := image_problem(content):
        return problem, 0, 0, 1
    kind = image_format(content)
    with tf.device("CPU:0"):
        if kind == "JPEG":
            height, width = tf.io.extract_jpeg_shape(content).numpy()[:2]
        elif kind == "PNG":
            width, height = struct.unpack_from(">II", content, 16)  # IHDR comes first
        else:
            height, width = decode_image(tf.constant(content)).shape[:2]
    return "", int(height), int(width), exif_orientation(content)


def examine_image(path: str) -> tuple[str, int, int, int]:
    """`image_finding` of a file, for `mobiatt_tf.data.checked.check_files`."""
    content, problem = read_file(path)
    return (problem, 0, 0, 1) if problem else image_finding(content)


def read_file(path: str) -> tuple[bytes, str]:
    """The bytes of a file, and why a pipeline cannot have them; "" for nothing."""
    if not is_utf8(path):
        return b"", "its name is not UTF-8; rename it"
    try:
        return Path(path).read_bytes(), ""
    except OSError as error:
        return b"", error.strerror or str(error)

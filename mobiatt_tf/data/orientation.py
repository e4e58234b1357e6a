"""EXIF orientations: which one a file asks for, how pixels are turned upright, when to believe it.

Cameras store what their sensor saw and write beside it how to turn that. The codes (EXIF 2.32, tag 274), for what a
decoder gives: 1 is upright, 2 mirrored left to right, 3 turned by 180 degrees, 4 mirrored top to bottom, 5 transposed,
6 to be turned clockwise by 90 degrees, 7 mirrored along the other diagonal, 8 to be turned counter-clockwise.
"""

import io

import numpy as np
import tensorflow as tf
from absl import logging

from mobiatt_tf.data.decoding import image_format

_TAG = 0x0112
UPRIGHT = 1
# What a code does: whether height and width change places first, whether rows and columns are then reversed.
_STEPS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_TRANSPOSES, _REVERSES_ROWS, _REVERSES_COLUMNS = (
    np.array([False, *(steps[i] for steps in _STEPS.values())]) for i in range(3)
)


def exif_orientation(content: bytes) -> int:
    """The code, 1 to 8, that the bytes of an image file ask for; 1 where they ask for nothing or for nonsense."""
    kind = image_format(content)
    if not (b"Exif\0\0" in content[:65536] or (kind in ("PNG", "WebP") and _has_exif_chunk(content))):
        return UPRIGHT
    from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    # Not Image.open, which refuses images of more than 179 million pixels: those of a dataset are decoded all the same.
    readers = {
        "JPEG": JpegImagePlugin.JpegImageFile,
        "PNG": PngImagePlugin.PngImageFile,
        "WebP": WebPImagePlugin.WebPImageFile,
    }
    if kind not in readers:
        return UPRIGHT
    try:
        code = readers[kind](io.BytesIO(content)).getexif().get(_TAG, UPRIGHT)
    except Image.DecompressionBombError as error:  # of WebP, which Pillow has to decode for its EXIF data
        logging.warning("The EXIF data of a WebP image are not read, it is taken as it is stored: %s", error)
        return UPRIGHT
    except Exception:  # Pillow raises many kinds for broken EXIF data, which do not matter: the image can be decoded
        return UPRIGHT
    return code if code in _STEPS else UPRIGHT


def _has_exif_chunk(content: bytes) -> bool:
    return b"eXIf" in content or b"EXIF" in content


def upright_sizes(stored: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """[M, 2], heights and widths after `orient` of what is decoded with the sizes `stored` [M, 2]; 0 is taken as 1."""
    return np.where(_TRANSPOSES[codes][:, np.newaxis], stored[:, ::-1], stored)


def orient(image: tf.Tensor, code: tf.Tensor) -> tf.Tensor:
    """Turns what was decoded upright.

    Args:
        image: [H, W, C].
        code: integer [], from 1 to 8.

    Returns:
        [H, W, C], or [W, H, C] for codes from 5 on.
    """
    code = tf.cast(code, tf.int32)

    def turned() -> tf.Tensor:
        upright = tf.cond(
            tf.constant(_TRANSPOSES)[code], lambda: tf.transpose(image, [1, 0, 2]), lambda: tf.identity(image)
        )
        upright = tf.cond(tf.constant(_REVERSES_ROWS)[code], lambda: tf.reverse(upright, [0]), lambda: upright)
        return tf.cond(tf.constant(_REVERSES_COLUMNS)[code], lambda: tf.reverse(upright, [1]), lambda: upright)

    upright = tf.cond(code == UPRIGHT, lambda: tf.identity(image), turned)
    return tf.ensure_shape(upright, [None, None, image.shape[-1]])


def believed(codes: np.ndarray, stored: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Which codes to follow, given the sizes that annotations speak of.

    Where turning changes the size, the size decides. Where it does not (mirrored, turned by 180 degrees, square) the
    other images of the same annotations decide: whoever drew them either saw images upright or saw them as stored.
    Without such an example the code is followed, as every viewer does.

    Args:
        codes: uint8 [M], from 1 to 8.
        stored: int [M, 2], height and width of what is decoded.
        expected: int [M, 2], height and width according to the annotations; -1 where they do not say.

    Returns:
        uint8 [M]: the code, or 1 where it is not to be followed; 0 where neither size is the expected one.
    """
    known = np.all(expected >= 0, axis=-1)
    fits_turned = ~known | np.all(upright_sizes(stored, codes) == expected, axis=-1)
    fits_stored = ~known | np.all(stored == expected, axis=-1)
    seen_stored = np.sum(fits_stored & ~fits_turned) > np.sum(fits_turned & ~fits_stored)
    follow = fits_turned & ~(fits_stored & seen_stored)
    return np.where(follow, codes, np.where(fits_stored, UPRIGHT, 0)).astype(np.uint8)

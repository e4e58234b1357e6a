"""Photographs as people have them: any of the usual formats, turned by their EXIF orientation, grey, CMYK or 16 bit."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mobiatt_tf import files
from mobiatt_tf.data.checked import printable
from mobiatt_tf.errors import UserError

# Pillow's own limit (twice PIL.Image.MAX_IMAGE_PIXELS): it would not open what is drawn on a larger one. Once decoded
# these are 540 MB; a larger file is more likely made to fill memory than a photograph.
MOST_PIXELS = 178_956_970


def read_photo(path: str | os.PathLike[str]) -> np.ndarray:
    """The pixels of a photograph, upright, decoded as those that models are trained on.

    Grey images get three equal channels, CMYK becomes RGB, 16 bits become 8, what is transparent shows white.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        UserError: there is no such file, or it is not an image, damaged, or larger than `MOST_PIXELS`. The message
            names no file.
    """
    import tensorflow as tf

    from mobiatt_tf.data.decoding import decode_image, image_problem
    from mobiatt_tf.data.orientation import exif_orientation, orient

    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(error.strerror or str(error)) from None
    if (count := _declared_pixels(content)) > MOST_PIXELS:
        raise UserError(f"it has {count / 1e6:.1f} million pixels, more than the allowed {MOST_PIXELS / 1e6:.1f}")
    if problem := image_problem(content):
        raise UserError(problem)
    with tf.device("CPU:0"):
        image = decode_image(tf.constant(content))
        return np.asarray(orient(image, tf.constant(exif_orientation(content))))


def _declared_pixels(content: bytes) -> int:
    """Height times width as the file's head says; 0 where Pillow does not know such a file."""
    import io

    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # else it neither opens what is too large nor says how large that is
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.width * image.height
    except Exception:  # damaged files make it raise many kinds of errors; the decoder says what is the matter
        return 0
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def photo_paths(given: Sequence[str]) -> list[Path]:
    """The files that are meant: each as it is, of a directory those in it (not below) whose names end as images do.

    Raises:
        UserError: a directory holds no image, or cannot be read.
    """
    found: list[Path] = []
    for name in given:
        path = files.user_path(name)
        if not os.path.isdir(path):  # unlike Path.is_dir, it raises nothing: reading the file says what is the matter
            found.append(path)
            continue
        try:
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES and file.is_file())
        except OSError as error:
            raise UserError(
                f"The directory {printable(str(path))} cannot be read: {error.strerror or error}."
            ) from error
        if not inside:
            raise UserError(f"{printable(str(path))} holds no image. Allowed are {', '.join(_SUFFIXES)}.")
        found += inside
    return found


_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")


def distinct_stems(paths: Sequence[Path]) -> list[str]:
    """A name for what is made of each photograph: its stem, numbered from the second on where that repeats."""
    names: dict[str, None] = {}  # a set that keeps the order
    numbers: dict[str, int] = {}  # the last one that each stem got
    for path in paths:
        name = path.stem
        while name in names:
            numbers[path.stem] = numbers.get(path.stem, 1) + 1
            name = f"{path.stem}_{numbers[path.stem]}"
        names[name] = None
    return list(names)


def relative_names(paths: Sequence[Path]) -> list[str]:
    """Each file's path below the deepest directory that holds them all; of files in one directory their names."""
    whole = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in whole]) if whole else ""
    return [printable(os.path.relpath(path, root)) for path in whole]


def refuse_overwriting(given: Sequence[str], paths: Sequence[Path], output_dir: Path, targets: Sequence[Path]) -> None:
    """Keeps photographs from being replaced by what is made of them.

    Args:
        given: files and directories as they were named.
        paths: of the photographs.
        output_dir: where pictures go.
        targets: all that would be written.

    Raises:
        UserError: the directory is one of those given, or something to be written is one of the photographs.
    """
    output = _identity(output_dir)
    for name in given:
        if output is not None and _identity(files.user_path(name)) == output:
            raise UserError(
                f"--output_dir={printable(str(output_dir))} is where the photographs are: the next time its pictures "
                "would be taken for photographs. Choose another directory."
            )
    photographs = {_identity(path) for path in paths} - {None}
    for target in targets:
        if _identity(target) in photographs:
            raise UserError(
                f"{printable(str(target))} is one of the photographs, and would be overwritten. Choose another "
                "--output_dir."
            )


def _identity(path: Path) -> tuple[int, int] | None:
    """What is equal for two names of one file, also where case does not matter; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino

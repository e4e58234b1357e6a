"""Directories of images, one folder a class: what is in them, which files can be read, how they are split."""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tensorflow as tf
from absl import logging

from mobiatt_tf.data.dataset import Dataset, Split, held_out_by_name, split_of_files
from mobiatt_tf.data.decoding import decode_image, image_format, is_animated_webp
from mobiatt_tf.errors import UserError
from mobiatt_tf.files import write_bytes

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp"})
_OTHER_IMAGE_SUFFIXES = frozenset({".avif", ".heic", ".heif", ".jp2", ".jxl", ".tif", ".tiff"})
_TEST_FOLDERS = ("val", "validation", "test")
_EXIF_ORIENTATION = 0x0112
_NAMES_SHOWN = 10
_BLOCK = 4096  # files
_PROGRESS_FROM = 1000  # files; fewer are checked in about a second

# What the check found out about one file: size and time of the last change, what is wrong ("" for nothing), and whether
# the EXIF data ask for a rotation.
_Verdict = tuple[int, int, str, bool]


def load_folder(root: Path, cache_path: Path, name: str | None = None) -> Dataset:
    """Reads a directory of images. Two layouts are known, the first is that of ImageNet:

        root/train/CLASS/*.jpg and root/val/CLASS/*.jpg (or validation, or test, looked for in this order)
        root/CLASS/*.jpg, or root/train/CLASS/*.jpg alone, of which about a fifth is held out for the test, by a hash of
            CLASS/file name

    Every image is decoded once, and the verdict is kept in the cache while the file's size and time stay the same. JPEG
    (CMYK too), PNG (16 bits too; what is transparent becomes white), GIF (the first picture), BMP and WebP (unless
    animated) are read, whatever of these suffixes they have, in capital or small letters. Images that cannot be
    decoded, and other image formats such as TIFF, are skipped with a warning; other files and hidden ones are ignored.
    Pixels are used as they are stored: a rotation that EXIF data ask for is not carried out, with a warning.

    Args:
        root: the directory.
        cache_path: where verdicts are kept.
        name: what the dataset is called; the directory's name when it is not given.

    Returns:
        The dataset. The classes are sorted by name; within a split they take turns.

    Raises:
        UserError: there are no images, a class has none that can be read, or train and test have other classes.
    """
    root = root.absolute()
    train_root = root / "train" if (root / "train").is_dir() else root
    test_root = next((root / folder for folder in _TEST_FOLDERS if (root / folder).is_dir()), None)
    if train_root == root:
        test_root = None
    train_files, ignored = _list_images(train_root)
    test_files: dict[str, list[str]] = {}
    if test_root is not None:
        test_files, ignored_in_test = _list_images(test_root)
        ignored += ignored_in_test
        _require_same_classes(train_root, set(train_files), test_root, set(test_files))
    if ignored:
        logging.info("%d files in %s are not images and are ignored.", ignored, root)

    every_file = [path for files in (*train_files.values(), *test_files.values()) for path in files]
    verdicts = _check(root, every_file, cache_path)
    skipped = tuple(f"{os.path.relpath(path, root)}: {verdicts[path][2]}" for path in every_file if verdicts[path][2])
    _warn(root, skipped, sum(verdicts[path][3] for path in every_file))

    class_names = tuple(sorted(train_files))
    train = _readable(train_root, class_names, train_files, verdicts)
    if test_root is not None:
        test = _readable(test_root, class_names, test_files, verdicts)
        splits = _split(class_names, train), _split(class_names, test)
    else:
        splits = _hold_out(train_root, class_names, train)
    return Dataset(name or root.name, class_names, *splits, skipped=skipped)


def _list_images(root: Path) -> tuple[dict[str, list[str]], int]:
    """The paths of the image files below every class folder, sorted, and how many files are not images."""
    try:
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{root} cannot be read: {error.strerror}.") from error
    if not folders:
        raise UserError(
            f"{root} has no folders. Put the images of each class into a folder of their own: {root}/CLASS/*.jpg."
        )
    files: dict[str, list[str]] = {}
    ignored = 0
    for folder in folders:
        files[folder] = []
        for directory, subdirectories, names in os.walk(root / folder, followlinks=True):
            subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
            for name in sorted(names):
                suffix = Path(name).suffix.lower()
                if not name.startswith(".") and suffix in _SUFFIXES | _OTHER_IMAGE_SUFFIXES:
                    files[folder].append(os.path.join(directory, name))
                else:
                    ignored += 1
    if not any(files.values()):
        raise UserError(
            f"{root} has no images: none of its {len(folders)} folders holds {', '.join(sorted(_SUFFIXES))} files."
        )
    empty = [folder for folder in folders if not files[folder]]
    if empty:
        raise UserError(f"No images in {_some(empty)} of {root}. Add images, or remove the empty class folders.")
    return files, ignored


def _require_same_classes(train_root: Path, train: set[str], test_root: Path, test: set[str]) -> None:
    for classes, has, lacks in ((train - test, train_root, test_root), (test - train, test_root, train_root)):
        if classes:
            raise UserError(
                f"{has} and {lacks} must have the same class folders; {lacks} lacks {_some(sorted(classes))} "
                f"({len(classes)} of {len(train | test)})."
            )


def _some(names: list[str]) -> str:
    """The first few names, and that there are more."""
    return ", ".join(names[:_NAMES_SHOWN]) + (" ..." if len(names) > _NAMES_SHOWN else "")


def _check(root: Path, paths: list[str], cache_path: Path) -> dict[str, _Verdict]:
    """Decodes every file that is new or has changed since the last time; keeps what it found, even if interrupted."""
    store = cache_path / "checked_folders" / f"{hashlib.sha256(str(root).encode()).hexdigest()[:32]}.json"
    known = _read_verdicts(store)
    verdicts: dict[str, _Verdict] = {}
    unknown: list[str] = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:  # a dangling link
            verdicts[path] = (0, 0, error.strerror or str(error), False)
            continue
        verdict = known.get(path)
        if verdict is not None and verdict[:2] == (status.st_size, status.st_mtime_ns):
            verdicts[path] = verdict
        else:
            verdicts[path] = (status.st_size, status.st_mtime_ns, "", False)
            unknown.append(path)
    if not unknown:
        return verdicts

    done = {path: verdict for path, verdict in verdicts.items() if path in known}
    try:
        for path, (problem, rotated) in _examine_all(unknown, f"checking images of {root.name}"):
            verdicts[path] = done[path] = (*verdicts[path][:2], problem, rotated)
    finally:
        try:
            write_bytes(store, json.dumps({"root": str(root), "files": done}).encode())
        except (UserError, OSError) as error:
            logging.warning("What the check of %s found is not kept: %s", root, error)
    return verdicts


def _read_verdicts(store: Path) -> dict[str, _Verdict]:
    """An unreadable store is no reason to stop: the files are checked again."""
    try:
        files = json.loads(store.read_text())["files"]
        return {path: (int(size), int(time), str(why), bool(turn)) for path, (size, time, why, turn) in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _examine_all(paths: list[str], title: str) -> Iterator[tuple[str, tuple[str, bool]]]:
    from tqdm import tqdm

    # TensorFlow decodes without holding Python's lock, so threads use all cores.
    with (
        ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool,
        tqdm(desc=title, total=len(paths), unit=" images", disable=len(paths) < _PROGRESS_FROM) as progress,
    ):
        for start in range(0, len(paths), _BLOCK):  # a pool holds on to all it is given at once
            block = paths[start : start + _BLOCK]
            for path, result in zip(block, pool.map(_examine, block), strict=True):
                yield path, result
                progress.update()


def _examine(path: str) -> tuple[str, bool]:
    """What keeps a file from being used ("" for nothing), and whether its EXIF data ask for a rotation.

    The decoder is that of the pipeline, so whatever passes here can be trained on. Looking at the structure of a JPEG
    file is not enough: truncated ones pass that. Decoding it to an eighth of its size reads all of it, and is faster.
    """
    if Path(path).suffix.lower() in _OTHER_IMAGE_SUFFIXES:
        return "a format that TensorFlow does not decode; convert it to PNG or JPEG", False
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        return error.strerror or str(error), False
    if not content:
        return "the file is empty", False
    kind = image_format(content)
    if not kind:
        return "not a JPEG, PNG, GIF, BMP or WebP image", False
    if kind == "WebP" and is_animated_webp(content):
        return "an animated WebP image; convert it to PNG or JPEG", False
    try:
        with tf.device("CPU:0"):
            if kind == "JPEG":
                tf.io.decode_jpeg(content, channels=3, ratio=8)
            else:
                decode_image(tf.constant(content))
    except (tf.errors.OpError, ValueError):
        return f"truncated or damaged {kind} data", False
    return "", kind == "JPEG" and _asks_for_rotation(content)


def _asks_for_rotation(jpeg: bytes) -> bool:
    if b"Exif\0\0" not in jpeg[:65536]:
        return False
    from PIL import Image

    try:
        return Image.open(io.BytesIO(jpeg)).getexif().get(_EXIF_ORIENTATION, 1) not in (0, 1)
    except Exception:  # Pillow raises many kinds for broken EXIF data, which do not matter: the image was decoded
        return False


def _warn(root: Path, skipped: tuple[str, ...], rotated: int) -> None:
    if skipped:
        for line in skipped[:_NAMES_SHOWN]:
            logging.warning("Skipped %s", line)
        logging.warning("%d images of %s cannot be read and are skipped.", len(skipped), root)
    if rotated:
        logging.warning(
            "%d images of %s are used as stored although their EXIF data ask for a rotation. To have them upright, "
            "rotate the files, for example with `mogrify -auto-orient`.",
            rotated,
            root,
        )


def _readable(
    root: Path, class_names: tuple[str, ...], files: dict[str, list[str]], verdicts: dict[str, _Verdict]
) -> list[list[str]]:
    """For every class the paths of the images that can be decoded."""
    readable = [[path for path in files[name] if not verdicts[path][2]] for name in class_names]
    for name, paths in zip(class_names, readable, strict=True):
        if not paths:
            example = files[name][0]
            raise UserError(
                f"None of the {len(files[name])} images of class {name} in {root} can be read "
                f"({os.path.basename(example)}: {verdicts[example][2]}). Replace them, or remove the class folder."
            )
    return readable


def _split(class_names: tuple[str, ...], files: list[list[str]]) -> Split:
    return split_of_files([(path, label) for label in range(len(class_names)) for path in files[label]])


def _hold_out(root: Path, class_names: tuple[str, ...], files: list[list[str]]) -> tuple[Split, Split]:
    train: list[list[str]] = []
    test: list[list[str]] = []
    for name, paths in zip(class_names, files, strict=True):
        if len(paths) < 2:
            raise UserError(
                f"Class {name} in {root} has a single readable image; it takes two, one to train and one to test on. "
                f"Add images, or make the split yourself: train/CLASS/* and val/CLASS/*."
            )
        held_out = held_out_by_name([Path(path).relative_to(root).as_posix() for path in paths])
        train.append([path for path, is_test in zip(paths, held_out, strict=True) if not is_test])
        test.append([path for path, is_test in zip(paths, held_out, strict=True) if is_test])
    return _split(class_names, train), _split(class_names, test)

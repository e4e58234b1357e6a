"""Directories of images, one folder a class: what is in them, which files can be read, how they are split."""

import io
import os
from pathlib import Path

from absl import logging

from mobiatt_tf.data.checked import check_files, is_utf8, printable
from mobiatt_tf.data.dataset import Dataset, Split, held_out_by_name, split_of_files, warn_of_skipped
from mobiatt_tf.data.decoding import image_format, image_problem
from mobiatt_tf.errors import UserError

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp"})
_OTHER_IMAGE_SUFFIXES = frozenset({".avif", ".heic", ".heif", ".jp2", ".jxl", ".tif", ".tiff"})
_SILENT_NAMES = frozenset({"thumbs.db", "desktop.ini"})  # put there by Windows; those of other systems are hidden
_TEST_FOLDERS = ("val", "validation", "test")
_EXIF_ORIENTATION = 0x0112
_NAMES_SHOWN = 10
_RULES = 2  # one more whenever `_examine` decides otherwise than before: verdicts of older rules are found out again


def load_folder(root: Path, cache_path: Path, name: str | None = None) -> Dataset:
    """Reads a directory of images. Two layouts are known, the first is that of ImageNet:

        root/train/CLASS/*.jpg and root/val/CLASS/*.jpg (or validation, or test, looked for in this order)
        root/CLASS/*.jpg, or root/train/CLASS/*.jpg alone, of which about a fifth is held out for the test, by a hash of
            CLASS/file name

    A folder root/train is the training images when it stands alone or beside a test folder; what else lies there (such
    as annotations) is not read. Beside others alone it could be a class, of trains, say: an error rather than a guess.

    Every image is decoded once, and the verdict is kept in the cache while the file's size and time stay the same. JPEG
    (CMYK too), PNG (16 bits too; what is transparent becomes white), GIF (the first picture), BMP (24 and 32 bits and
    grey; not with a palette) and WebP (unless animated) are read, whatever of these suffixes they have, in capital or
    small letters. Skipped are images that cannot be decoded, other image formats such as TIFF, files whose name is not
    UTF-8, files that are not images, and images beside the class folders: a warning counts them and names the first,
    `Dataset.skipped` names all. Hidden files and folders, Thumbs.db and desktop.ini are ignored. Pixels are used as
    they are stored: a rotation that EXIF data ask for is not carried out, with a warning.

    Args:
        root: the directory.
        cache_path: where verdicts are kept.
        name: what the dataset is called; the directory's name when it is not given.

    Returns:
        The dataset. The classes are sorted by name; within a split they take turns.

    Raises:
        UserError: there are no images, a class has none that can be read, train and test have other classes, or it
            cannot be told which layout it is.
    """
    root = root.absolute()
    if not is_utf8(str(root)):
        raise UserError(f"The path {printable(str(root))} is not UTF-8. Rename its folders.")
    train_root, test_root = _find_splits(root)
    train_files, left_out = _list_images(train_root)
    test_files: dict[str, list[str]] = {}
    if test_root is not None:
        test_files, left_out_of_test = _list_images(test_root)
        left_out |= left_out_of_test
        _require_same_classes(train_root, set(train_files), test_root, set(test_files))

    every_file = [path for files in (*train_files.values(), *test_files.values()) for path in files]
    verdicts = check_files(
        root,
        every_file,
        cache_path / "checked_folders",
        examine=_examine,
        kinds=(str, bool),
        rules=_RULES,
        title=f"checking images of {root.name}",
    )
    unreadable = _with_reasons(root, {path: verdicts[path][0] for path in every_file if verdicts[path][0]})
    no_images = _with_reasons(root, left_out)
    warn_of_skipped(unreadable, f"images of {root} cannot be read and are skipped")
    warn_of_skipped(no_images, f"files of {root} are not images of a class and are skipped")
    _warn_of_rotation(root, sum(verdicts[path][1] for path in every_file))

    class_names = tuple(sorted(train_files))
    train = _readable(train_root, class_names, train_files, verdicts)
    if test_root is not None:
        test = _readable(test_root, class_names, test_files, verdicts)
        splits = _split(class_names, train), _split(class_names, test)
    else:
        splits = _hold_out(train_root, class_names, train)
    return Dataset(name or root.name, class_names, *splits, skipped=unreadable + no_images)


def _find_splits(root: Path) -> tuple[Path, Path | None]:
    """The directory of the training classes and that of the test classes; root and None when there is no such split."""
    folders = _list_folders(root)
    labels = [folder for folder in ("annotations", "labels", "masks") if folder in folders]
    if "images" in folders and labels:
        raise UserError(
            f"{root} has the folders images and {labels[0]}, as data of segmentation have: add --task=segmentation. If "
            "they are two classes, call them something else."
        )
    if any((root / "annotations").glob("*.json")):
        raise UserError(f"{root} has annotations/*.json, as data of detection have: add --task=detection.")
    if "train" not in folders:
        return root, None
    test = next((root / folder for folder in _TEST_FOLDERS if folder in folders), None)
    others = [folder for folder in folders if folder != "train"]
    if others and test is None:
        raise UserError(
            f"{root} has the folder train, which is either the training images or a class, beside {_some(others)}. "
            f"If it is the training images, move the other folders away, or add one of {', '.join(_TEST_FOLDERS)}. "
            f"If it is a class, move all class folders, it too, into one new folder and call that {root / 'train'}."
        )
    return root / "train", test


def _list_folders(root: Path) -> list[str]:
    """The names of the folders in a directory, less hidden ones, sorted."""
    try:
        return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{root} cannot be read: {error.strerror}.") from error


def _list_images(root: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The paths of the image files below every class folder, sorted; and all other paths, with why they are others."""
    folders = _list_folders(root)
    if not folders:
        raise UserError(
            f"{root} has no folders. Put the images of each class into a folder of their own: {root}/CLASS/*.jpg."
        )
    files: dict[str, list[str]] = {folder: [] for folder in folders}
    left_out: dict[str, str] = {}
    for directory, subdirectories, names in os.walk(root, followlinks=True):
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        folder = os.path.relpath(directory, root).split(os.sep)[0]  # "." for root itself
        for name in sorted(names):
            path = os.path.join(directory, name)
            if name.startswith(".") or name.lower() in _SILENT_NAMES:
                continue
            if Path(name).suffix.lower() not in _SUFFIXES | _OTHER_IMAGE_SUFFIXES:
                left_out[path] = "not an image"
            elif folder not in files:
                left_out[path] = "not in a class folder"
            else:
                files[folder].append(path)
    if not any(files.values()):
        raise UserError(
            f"{root} has no images: none of its {len(folders)} folders holds {', '.join(sorted(_SUFFIXES))} files."
        )
    empty = [folder for folder in folders if not files[folder]]
    if empty:
        raise UserError(f"No images in {_some(empty)} of {root}. Add images, or remove the empty class folders.")
    return files, left_out


def _require_same_classes(train_root: Path, train: set[str], test_root: Path, test: set[str]) -> None:
    for classes, has, lacks in ((train - test, train_root, test_root), (test - train, test_root, train_root)):
        if classes:
            raise UserError(
                f"{has} and {lacks} must have the same class folders; {lacks} lacks {_some(sorted(classes))} "
                f"({len(classes)} of {len(train | test)})."
            )


def _some(names: list[str]) -> str:
    """The first few names, and that there are more."""
    return ", ".join(map(printable, names[:_NAMES_SHOWN])) + (" ..." if len(names) > _NAMES_SHOWN else "")


def _examine(path: str) -> tuple[str, bool]:
    """What keeps a file from being used ("" for nothing), and whether its EXIF data ask for a rotation."""
    if not is_utf8(path):
        return "its name is not UTF-8; rename it", False
    if Path(path).suffix.lower() in _OTHER_IMAGE_SUFFIXES:
        return "a format that TensorFlow does not decode; convert it to PNG or JPEG", False
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        return error.strerror or str(error), False
    problem = image_problem(content)
    return problem, not problem and image_format(content) == "JPEG" and _asks_for_rotation(content)


def _asks_for_rotation(jpeg: bytes) -> bool:
    if b"Exif\0\0" not in jpeg[:65536]:
        return False
    from PIL import Image

    try:
        return Image.open(io.BytesIO(jpeg)).getexif().get(_EXIF_ORIENTATION, 1) not in (0, 1)
    except Exception:  # Pillow raises many kinds for broken EXIF data, which do not matter: the image was decoded
        return False


def _with_reasons(root: Path, reasons: dict[str, str]) -> tuple[str, ...]:
    return tuple(f"{printable(os.path.relpath(path, root))}: {reason}" for path, reason in reasons.items())


def _warn_of_rotation(root: Path, rotated: int) -> None:
    if rotated:
        logging.warning(
            "%d images of %s are used as stored although their EXIF data ask for a rotation. To have them upright, "
            "rotate the files, for example with `mogrify -auto-orient`.",
            rotated,
            root,
        )


def _readable(
    root: Path, class_names: tuple[str, ...], files: dict[str, list[str]], verdicts: dict[str, tuple[str, bool]]
) -> list[list[str]]:
    """For every class the paths of the images that can be decoded."""
    readable = [[path for path in files[name] if not verdicts[path][0]] for name in class_names]
    for name, paths in zip(class_names, readable, strict=True):
        if not paths:
            example = files[name][0]
            reason = f"{printable(os.path.relpath(example, root))}: {verdicts[example][0]}"
            raise UserError(
                f"None of the {len(files[name])} images of class {printable(name)} in {root} can be read ({reason}). "
                f"Replace them, or remove the class folder."
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

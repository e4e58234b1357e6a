"""Directories of images and label PNGs: a PNG file beside each image whose values are the classes of its pixels."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from mobiatt_tf.data.ade20k import CLASSES as ADE20K_CLASSES
from mobiatt_tf.data.checked import check_files, first_names, is_utf8, printable
from mobiatt_tf.data.dataset import Split, warn_of_skipped
from mobiatt_tf.data.dense import IGNORED, DenseDataset, SegmentationSplit
from mobiatt_tf.data.orientation import UPRIGHT, believed, exif_orientation, upright_sizes
from mobiatt_tf.data.reading import examine_image, png_channels, read_file, stored_labels
from mobiatt_tf.errors import UserError

_SPLITS = {"train": ("training", "train"), "test": ("validation", "val", "valid", "test")}
_MASK_FOLDERS = ("annotations", "labels", "masks")
_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp"})
_RULES = 2  # one more whenever `examine_image` or `_examine_mask` decides otherwise than before
_CLASSES_FILE = "classes.txt"
_ADE20K_FILE = "objectInfo150.txt"
_LAYOUT = (
    "Put images into images/train and images/val, and label PNGs of the same names into annotations/train and "
    "annotations/val"
)


def load_mask_folder(root: Path, cache_path: Path, name: str | None = None) -> DenseDataset:
    """Reads a directory of images and label PNGs.

        root/images/train/NAME.jpg and root/annotations/train/NAME.png, or training (as in ADE20K), or both at any depth
        root/images/val/NAME.jpg and root/annotations/val/NAME.png, or validation, valid, test
        root/classes.txt, if there is one: the names of the classes, one a line

    The label PNGs may lie in labels or masks in place of annotations. Their values (8 bits or less, grey; or the
    indices of a palette) are the classes, counted from 0; 255 is for pixels that do not count. Without classes.txt the
    classes go up to the highest value. ADE20K is known, where there is no classes.txt, by its objectInfo150.txt or by
    its images, whose names all start with ADE_: of its labels 0 does not count and i + 1 is class i. A line is logged
    then.

    All files are decoded once and what was found kept in the cache while a file's size and time stay the same. Images
    are of the formats of `mobiatt_tf.data.folder.load_folder`, and are turned as their EXIF data ask for, unless the
    sizes of the label images show that these were drawn on images as they are stored. Left out, with a warning that
    counts them and names the first, are images and label images without a partner, or that cannot be decoded, and those
    of two sizes.

    Args:
        root: the directory.
        cache_path: where findings are kept.
        name: what the dataset is called; the directory's name when it is not given.

    Returns:
        The dataset, sorted by name.

    Raises:
        UserError: there is no such layout, no pair of images can be used, or a label image is one that cannot be meant:
            with colours or 16 bits or values that are no class, or with 255 in ADE20K.
    """
    root = root.absolute()
    if not is_utf8(str(root)):
        raise UserError(f"The path {printable(str(root))} is not UTF-8. Rename its folders.")
    folders = {split: _find_folders(root, split) for split in _SPLITS}
    skipped: list[str] = []
    pairs = {}
    for split, (image_folder, mask_folder) in folders.items():
        pairs[split], left_out = _pair(root, image_folder, mask_folder)
        skipped += left_out
    warn_of_skipped(skipped, f"files of {root} have no partner and are skipped")
    every_pair = [pair for split in pairs.values() for pair in split]
    title = f"{{}} of {root.name}"
    images = check_files(
        root,
        [image for image, _ in every_pair],
        cache_path / "checked_images",
        examine=examine_image,
        kinds=(str, int, int, int),
        rules=_RULES,
        title=title.format("checking images"),
    )
    masks = check_files(
        root,
        [mask for _, mask in every_pair],
        cache_path / "checked_masks",
        examine=_examine_mask,
        kinds=(str, str, int, int, int, str),
        rules=_RULES,
        title=title.format("checking label images"),
    )
    class_names, label_map = _classes(root, [image for image, _ in every_pair], masks)
    splits = {}
    for split, (image_folder, _) in folders.items():
        splits[split], left_out = _split(root, image_folder, pairs[split], images, masks, label_map)
        skipped += left_out
    return DenseDataset(name or root.name, class_names, splits["train"], splits["test"], tuple(skipped))


def values_to_text(values: np.ndarray) -> str:
    """bool [256], which values occur, as 64 hexadecimal digits: what findings keep."""
    return np.packbits(values).tobytes().hex()


def values_of_text(text: str) -> np.ndarray:
    """What `values_to_text` was given."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8)).astype(np.bool_)


def ade20k_label_map(classes: int = len(ADE20K_CLASSES)) -> np.ndarray:
    """uint8 [256]: class i of the stored value i + 1, IGNORED of all others."""
    label_map = np.full(256, IGNORED, np.uint8)
    label_map[1 : classes + 1] = np.arange(classes)
    return label_map


def _find_folders(root: Path, split: str) -> tuple[Path, Path]:
    """The folders of the images and of the label images of a split."""
    for word in _SPLITS[split]:
        for masks in _MASK_FOLDERS:
            images = root / "images" / word
            if images.is_dir() and (root / masks / word).is_dir():
                return images, root / masks / word
    words = " or ".join(_SPLITS[split])
    raise UserError(f"{root} has no folders images/{words} and annotations/{words} to {split} with. {_LAYOUT}.")


def _pair(root: Path, image_folder: Path, mask_folder: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """(image, label image), sorted by name; and "name: reason" of those without a partner."""
    images, others = _by_stem(image_folder, _IMAGE_SUFFIXES)
    masks, more = _by_stem(mask_folder, frozenset({".png"}))
    others |= more
    for stem in images.keys() - masks.keys():
        others[images[stem]] = f"no label image {mask_folder.relative_to(root) / stem}.png"
    for stem in masks.keys() - images.keys():
        others[masks[stem]] = f"no image of that name in {image_folder.relative_to(root)}"
    pairs = [(images[stem], masks[stem]) for stem in sorted(images.keys() & masks.keys())]
    if not pairs:
        raise UserError(
            f"No image of {image_folder} has a label image of the same name in {mask_folder}: there are "
            f"{len(images)} images and {len(masks)} PNG files. {_LAYOUT}."
        )
    return pairs, [f"{printable(os.path.relpath(path, root))}: {others[path]}" for path in sorted(others)]


def _by_stem(folder: Path, suffixes: frozenset[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The files below a folder by their path in it, less the suffix; and why others of that name do not count."""
    found: dict[str, str] = {}
    others: dict[str, str] = {}
    for directory, subdirectories, names in os.walk(folder, followlinks=True):
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(directory, name)
            stem, suffix = os.path.splitext(os.path.relpath(path, folder))
            if name.startswith(".") or suffix.lower() not in suffixes:
                continue
            if stem in found:
                others[path] = f"{Path(found[stem]).name} has the same name"
            else:
                found[stem] = path
    return found, others


def _examine_mask(path: str) -> tuple[str, str, int, int, int, str]:
    """What keeps a label image from being read, or from being one; height, width, EXIF code, and which values it has.

    A file that is damaged is left out; one of another kind is likely one of many, and that is for its owner to mend.
    """
    content, problem = read_file(path)
    nothing = (0, 0, UPRIGHT, "")
    if problem or not content:
        return problem or "the file is empty", "", *nothing
    channels, depth = png_channels(content)
    if not channels:
        return "", "it is not a PNG image", *nothing
    if depth > 8:
        return "", f"it has {depth} bits for a value", *nothing
    if channels > 1:
        return "", f"it has {channels} channels, as pictures have, and not one of class numbers", *nothing
    try:
        labels = stored_labels(content)
    except ValueError as error:
        return str(error), "", *nothing
    values = np.bincount(labels.reshape(-1), minlength=256) > 0
    return "", "", *labels.shape, exif_orientation(content), values_to_text(values)


def _classes(root: Path, images: list[str], masks: dict[str, tuple[Any, ...]]) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the classes, and the class of each stored value; an error where label images do not fit them."""
    refused = [(path, finding[1]) for path, finding in masks.items() if finding[1]]
    if refused:
        path, reason = refused[0]
        others = f" (and {len(refused) - 1} other label images)" if len(refused) > 1 else ""
        raise UserError(
            f"{printable(path)}{others} cannot be used as labels: {reason}. A label image is a PNG file of one channel "
            "(grey, or with a palette) of up to 8 bits whose values are classes, counted from 0, and 255 for pixels "
            "that do not count."
        )
    values = {path: values_of_text(finding[5]) for path, finding in masks.items() if finding[5]}
    present = np.any(list(values.values()), axis=0) if values else np.zeros(256, np.bool_)
    names = _read_names(root / _CLASSES_FILE)
    is_ade20k = names is None and _is_ade20k(root, images)
    if is_ade20k:
        if present[IGNORED]:  # its own labels have no such value: 0 is what does not count
            path = next(path for path, each in values.items() if each[IGNORED])
            raise UserError(
                f"{root} looks like ADE20K, but {printable(path)} has the value {IGNORED}: its labels seem shifted "
                f"already, so that 0 is the first class. Give {_CLASSES_FILE} with the names of the classes, one a "
                "line; values are classes from 0 on then."
            )
        logging.info("%s is read as ADE20K: 0 does not count, i + 1 is class i.", root)
        names, label_map = ADE20K_CLASSES, ade20k_label_map()
        highest = len(names)
    else:
        if names is None:
            names = tuple(str(i) for i in range(np.max(np.flatnonzero(present[:IGNORED]), initial=-1) + 1))
            if len(names) == 1:
                raise UserError(
                    f"The label images of {root} have one class, 0, and nothing to tell it from. The value {IGNORED} "
                    f"does not count: masks of 0 and {IGNORED} must become masks of 0 and 1."
                )
        if not names:
            raise UserError(f"The label images of {root} have no value but {IGNORED}: no pixel counts.")
        if absent := [name for name, there in zip(names, present, strict=False) if not there]:
            logging.warning(
                "No label image of %s has the class %s. (The value %d does not count.)",
                root,
                first_names(absent),
                IGNORED,
            )
        label_map = np.where(np.arange(256) < len(names), np.arange(256), IGNORED).astype(np.uint8)
        highest = len(names) - 1
    wrong = np.flatnonzero(present[highest + 1 : IGNORED]) + highest + 1
    if len(wrong):
        path, present = next((path, each) for path, each in values.items() if each[wrong].any())
        value = next(value for value in wrong if present[value])
        count = sum(bool(each[wrong].any()) for each in values.values())
        raise UserError(
            f"{printable(path)} has the value {value}, but there are {len(names)} "
            f"classes {'of ADE20K' if is_ade20k else f'in {root / _CLASSES_FILE}'}: values may be 0 to {highest}, and "
            f"{IGNORED} for pixels that do not count. {count} label images have such values."
        )
    return names, label_map


def _is_ade20k(root: Path, images: list[str]) -> bool:
    return (root / _ADE20K_FILE).is_file() or all(Path(image).name.startswith("ADE_") for image in images)


def _read_names(path: Path) -> tuple[str, ...] | None:
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").strip().splitlines())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}).") from error
    if not 1 <= len(names) <= IGNORED or not all(names) or len(set(names)) < len(names):
        raise UserError(
            f"{path} must name 1 to {IGNORED} classes, one a line, no line empty and no name twice; it has "
            f"{len(names)} lines."
        )
    return names


def _split(
    root: Path,
    folder: Path,
    pairs: list[tuple[str, str]],
    images: dict[str, tuple[Any, ...]],
    masks: dict[str, tuple[Any, ...]],
    label_map: np.ndarray,
) -> tuple[SegmentationSplit, list[str]]:
    """The pairs that can be used, and "name: reason" for the others."""
    skipped = {path: images[path][0] for path, _ in pairs if images[path][0]}
    skipped |= {path: masks[path][0] for _, path in pairs if masks[path][0]}
    readable = [pair for pair in pairs if not skipped.keys() & set(pair)]
    stored = np.array([images[path][1:3] for path, _ in readable], np.int32).reshape(-1, 2)
    codes = np.array([images[path][3] for path, _ in readable], np.uint8)
    mask_codes = np.array([masks[path][4] for _, path in readable], np.uint8)
    mask_sizes = np.array([masks[path][2:4] for _, path in readable], np.int32).reshape(-1, 2)
    followed = believed(codes, stored, upright_sizes(mask_sizes, mask_codes))
    for i in np.flatnonzero(followed == 0):
        image, mask = readable[i]
        (height, width), (mask_height, mask_width) = stored[i], mask_sizes[i]
        skipped[image] = (
            f"{width} x {height} pixels, its label image {os.path.relpath(mask, root)} has {mask_width} x {mask_height}"
        )
    lines = [f"{printable(os.path.relpath(path, root))}: {reason}" for path, reason in skipped.items()]
    warn_of_skipped(lines, f"images or label images of {folder} cannot be used and are skipped")
    usable = np.flatnonzero(followed > 0)
    if not len(usable):
        raise UserError(f"None of the {len(pairs)} pairs of images in {folder} can be used ({lines[0]}).")
    logging.info("%d pairs of images in %s.", len(usable), folder)
    labels = np.zeros(len(usable), np.int32)
    split = SegmentationSplit(
        images=Split(labels, files=tuple(readable[i][0] for i in usable)),
        masks=Split(labels, files=tuple(readable[i][1] for i in usable)),
        orientations=followed[usable],
        mask_orientations=mask_codes[usable],
        label_map=label_map,
    )
    return split, lines

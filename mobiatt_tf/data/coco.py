"""Directories in COCO's format: folders of images, and a JSON file of boxes for each split."""

import filecmp
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging

from mobiatt_tf.data.checked import check_files, first_names, is_utf8, printable
from mobiatt_tf.data.coco_json import Annotations, read_annotations
from mobiatt_tf.data.dataset import Split, warn_of_skipped
from mobiatt_tf.data.dense import DenseDataset, DetectionSplit, detection_split
from mobiatt_tf.data.orientation import UPRIGHT, believed, upright_sizes
from mobiatt_tf.data.reading import examine_image
from mobiatt_tf.errors import UserError

_SPLITS = {"train": ("train",), "test": ("val", "valid", "validation", "test")}
_RULES = 2  # one more whenever `examine_image` decides otherwise than before
_LAYOUT = (
    "Put the annotations into annotations/instances_train.json and annotations/instances_val.json (or any one JSON "
    "file for each whose name has train and val in it) and the images into the folders train and val"
)


def load_coco(root: Path, cache_path: Path, name: str | None = None) -> DenseDataset:
    """Reads a directory in COCO's format.

    Annotations are looked for in this order, for training with "train", for the test with "val", "valid", "validation"
    or "test" for SPLIT; exactly one file may match, and what has "train" in its name is not for the test:

        root/annotations/instances_SPLIT*.json (COCO's own names), root/annotations/*SPLIT*.json, root/*SPLIT*.json, or
        root/SPLIT*/*.json (as Roboflow exports them)

    The images that instances_NAME.json lists lie in NAME or images/NAME, else in a folder SPLIT*, images/SPLIT* or
    images, beside the JSON file, or in root: the first of these that has one of them.

    Every image is decoded once and what was found kept in the cache while the file's size and time stay the same. The
    formats are those of `mobiatt_tf.data.folder.load_folder`; but images are turned as their EXIF data ask for, unless
    the sizes in the JSON file show that the boxes were drawn on images as they are stored. Boxes are clipped to their
    image. Left out, with a warning that counts them and names the first, are: images that are missing, cannot be
    decoded or have another size than the JSON file says; boxes that are no four numbers or have no area in their image;
    annotations of images or categories that are not listed. Images without boxes are left out of training only.

    Args:
        root: the directory.
        cache_path: where findings are kept.
        name: what the dataset is called; the directory's name when it is not given.

    Returns:
        The dataset, in the order of the JSON files. Classes are the categories by ascending id, which may have gaps.
        Where several have the same name, their ids tell them apart: "fish (1)".

    Raises:
        UserError: there is no such layout, a JSON file cannot be used, none of its images or boxes can, or the two are
            equal or have other categories.
    """
    root = root.absolute()
    if not is_utf8(str(root)):
        raise UserError(f"The path {printable(str(root))} is not UTF-8. Rename its folders.")
    files = {split: _find_annotations(root, split) for split in _SPLITS}
    if _are_equal(files["train"], files["test"]):
        raise UserError(
            f"{files['train']} and {files['test']} are the same: a test on what was trained on tells nothing. Give "
            "the test annotations of other images."
        )
    listed = {split: read_annotations(path, cache_path) for split, path in files.items()}
    _require_same_categories(files, listed)
    paths: dict[str, list[str]] = {}
    for split, path in files.items():
        folder = _find_images(root, path, split, listed[split].file_names)
        paths[split] = [os.path.join(folder, file_name) for file_name in listed[split].file_names]
    found = check_files(
        root,
        sorted({path for split in paths.values() for path in split}),
        cache_path / "checked_coco",
        examine=examine_image,
        kinds=(str, int, int, int),
        rules=_RULES,
        title=f"checking images of {root.name}",
    )
    splits, skipped = {}, []
    for split, path in files.items():
        findings = [found[image] for image in paths[split]]
        splits[split], left_out = _split(root, path, listed[split], paths[split], findings, split == "train")
        skipped += left_out
    class_names = _distinct_names(files["train"], listed["train"])
    ids = listed["train"].category_ids
    return DenseDataset(name or root.name, class_names, splits["train"], splits["test"], tuple(skipped), ids)


def _find_annotations(root: Path, split: str) -> Path:
    """The one JSON file of a split."""
    for pattern in ("annotations/instances_{}*.json", "annotations/*{}*.json", "*{}*.json", "{}*/*.json"):
        for word in _SPLITS[split]:
            matching = {path.relative_to(root).as_posix(): path for path in root.glob(pattern.format(word))}
            names = sorted(name for name, path in matching.items() if not path.name.startswith("."))
            if split == "test":  # trainval.json has "val" in its name, too
                names = [name for name in names if "train" not in name]
            if len(names) > 1:
                raise UserError(
                    f"{root} has {len(names)} files of annotations to {split} with: {first_names(names)}. Leave one "
                    "there."
                )
            if names:
                return matching[names[0]]
    raise UserError(f"{root} has no annotations in COCO's format to {split} with. {_LAYOUT}.")


def _are_equal(train: Path, test: Path) -> bool:
    """Whether two files are one, or have the same content; what cannot be read is for its reader to say."""
    try:
        return filecmp.cmp(train, test, shallow=False)
    except OSError:
        return False


def _distinct_names(path: Path, listed: Annotations) -> tuple[str, ...]:
    """The names of the categories; those that several have with their ids, because results are kept by name."""
    times = Counter(listed.class_names)
    repeated = {name for name, count in times.items() if count > 1}
    if not repeated:
        return listed.class_names
    logging.warning("%s has several categories named %s; their ids are added.", path, first_names(sorted(repeated)))
    taken = set(listed.class_names)
    names = []
    for name, number in zip(listed.class_names, listed.category_ids, strict=True):
        if name in repeated:
            while name in taken:  # another category may be called "fish (1)" already
                name += f" ({number})"
            taken.add(name)
        names.append(name)
    return tuple(names)


def _require_same_categories(files: dict[str, Path], listed: dict[str, Annotations]) -> None:
    train, test = (dict(zip(each.category_ids, each.class_names, strict=True)) for each in listed.values())
    if train != test:
        different = sorted(set(train.items()) ^ set(test.items()))
        raise UserError(
            f"{files['train']} and {files['test']} must list the same categories; they differ in "
            f"{first_names(f'{number} ({name})' for number, name in different)}."
        )


def _find_images(root: Path, path: Path, split: str, file_names: Sequence[str]) -> Path:
    """The folder that the names of files refer to: the first candidate that has one of them."""
    stem = path.stem.removeprefix("instances_")
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    starts = [folder for folder in folders if folder.startswith(_SPLITS[split])]
    inside = sorted(entry.name for entry in os.scandir(root / "images")) if "images" in folders else []
    nested = [f"images/{folder}" for folder in inside if folder.startswith(_SPLITS[split])]
    candidates = [root / folder for folder in (stem, f"images/{stem}", *starts, *nested, "images")]
    candidates += [path.parent, root]
    for candidate in candidates:
        if candidate.is_dir() and any(os.path.isfile(candidate / file_name) for file_name in file_names):
            return candidate
    raise UserError(
        f"None of the {len(file_names)} images that {path} lists is there; looked in "
        f"{first_names(str(folder) for folder in dict.fromkeys(candidates))}. {_LAYOUT}."
    )


def _split(
    root: Path,
    path: Path,
    listed: Annotations,
    paths: list[str],
    findings: list[tuple[str, int, int, int]],
    is_training: bool,
) -> tuple[DetectionSplit, list[str]]:
    """What can be used of a split, and "name: reason" for the rest."""
    stored = np.array([finding[1:3] for finding in findings], np.int32)  # [M, 2]
    codes = np.array([finding[3] or UPRIGHT for finding in findings], np.uint8)
    readable = np.array([not finding[0] for finding in findings])
    followed = np.zeros(len(paths), np.uint8)
    followed[readable] = believed(codes[readable], stored[readable], listed.sizes[readable])
    images = []
    for i, image in enumerate(paths):
        name, (height, width), (listed_height, listed_width) = os.path.relpath(image, root), stored[i], listed.sizes[i]
        if (shown := printable(name)) != name:  # which may be hard to find in the file
            images.append(f"image {listed.image_ids[i]} ({shown}): {findings[i][0]}")
        elif findings[i][0]:
            images.append(f"{name}: {findings[i][0]}")
        elif not followed[i]:
            images.append(f"{name}: {width} x {height} pixels, {path.name} says {listed_width} x {listed_height}")
    warn_of_skipped(images, f"images that {path} lists cannot be used and are skipped")
    usable = followed > 0
    if not usable.any():
        raise UserError(f"None of the {len(paths)} images that {path} lists can be used ({images[0]}).")

    sizes = upright_sizes(stored, followed)
    boxes, keep, left_out = _clip(path, listed, sizes, usable[listed.image])
    annotations = [f"{path.name}: {problem}" for problem in listed.problems] + left_out
    warn_of_skipped(annotations, f"annotations of {path} cannot be used and are skipped")
    if not keep.any():
        raise UserError(f"{path} has no box that can be used{f' ({annotations[0]})' if annotations else ''}.")

    split = detection_split(
        Split(np.zeros(len(paths), np.int32), files=tuple(paths)),
        image=listed.image[keep],
        boxes=boxes[keep],
        labels=listed.labels[keep],
        crowd=listed.crowd[keep],
        areas=listed.areas[keep],
        sizes=sizes,
        image_ids=listed.image_ids,
        orientations=np.maximum(followed, UPRIGHT),
    )
    if is_training:
        with_boxes = np.array([len(each) > 0 for each in split.boxes])
        if empty := int((usable & ~with_boxes).sum()):
            logging.info("%d images that %s lists have no boxes and are left out of training.", empty, path)
        usable &= with_boxes
    return split.select(np.flatnonzero(usable)), images + annotations


def _clip(
    path: Path, listed: Annotations, sizes: np.ndarray, usable: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Boxes within their images, float64 [N, 4], xyxy; which of them can be used, bool [N]; the others, with why."""
    start, sides = listed.boxes[:, :2], listed.boxes[:, 2:]
    limits = sizes[listed.image][:, ::-1]  # [N, 2], width and height
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are left out below
        clipped = np.concatenate([np.clip(start, 0, limits), np.clip(start + sides, 0, limits)], -1)
    # Judged as the float32 that training sees.
    remaining = clipped.astype(np.float32)
    is_box = np.all(np.isfinite(listed.boxes), axis=-1)
    has_area = np.all(sides > 0, axis=-1)
    is_inside = np.all(remaining[:, 2:] > remaining[:, :2], axis=-1)
    left_out = []
    for i in np.flatnonzero(usable & ~(is_box & has_area & is_inside)):
        box = ", ".join(f"{number:g}" for number in listed.boxes[i])
        if not is_box[i]:
            reason = "its bbox is not four numbers"
        elif not has_area[i]:
            reason = f"its bbox [{box}] has no area"
        else:
            reason = f"its bbox [{box}] lies outside the image"
        image = printable(listed.file_names[listed.image[i]])
        left_out.append(f"{path.name}: annotation {listed.ids[i]} of {image}: {reason}")
    return clipped, usable & is_box & has_area & is_inside, left_out

"""Annotations in COCO's JSON format: what they list, checked, as arrays.

The format: https://cocodataset.org/#format-data. What counts of an annotation: `image_id`, `category_id`, `bbox` (x, y,
width, height in pixels, the upper left corner of the image at 0, 0), `area` (of the thing's mask, in square pixels) and
`iscrowd`.
"""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from mobiatt_tf.data.checked import printable
from mobiatt_tf.errors import UserError
from mobiatt_tf.files import write_bytes

_RULES = 2  # one more whenever a file is read otherwise than before
_COLUMNS = ("image_ids", "sizes", "image", "ids", "boxes", "labels", "crowd", "areas")
_UNKNOWN = -1


@dataclass(frozen=True, eq=False)
class Annotations:
    """M images and N annotations, by image.

    Attributes:
        class_names: the names of the categories, by ascending id; two may have the same.
        category_ids: their ids.
        file_names: M names of files.
        image_ids: int64 [M].
        sizes: int32 [M, 2], height and width; -1 where they are not said.
        image: int32 [N], ascending, which of the M images an annotation belongs to.
        ids: int64 [N], what the file calls the annotation; -1 where it does not say.
        boxes: float64 [N, 4], x, y, width and height as they stand there, all NaN where there is no box.
        labels: int32 [N], places in `class_names`.
        crowd: bool [N].
        areas: float64 [N], NaN where no area is said.
        problems: what was left out: "annotation 17: reason".
    """

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    file_names: tuple[str, ...]
    image_ids: np.ndarray
    sizes: np.ndarray
    image: np.ndarray
    ids: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    problems: tuple[str, ...]


def read_annotations(path: Path, cache_path: Path) -> Annotations:
    """Reads a file; what was read is kept in the cache, because JSON of COCO's size takes most of a minute.

    Args:
        path: the JSON file.
        cache_path: where that is kept, as long as the file's size and time stay the same.

    Returns:
        What it lists, in its own order of images. Left out are images that it lists twice, and annotations of images or
        categories that it does not list.

    Raises:
        UserError: it cannot be read, is not JSON or not in COCO's format, or has one id for two images or categories.
    """
    store = cache_path / "read_annotations" / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]}.npz"
    try:
        status = path.stat()
        state = json.dumps({"rules": _RULES, "bytes": status.st_size, "time": status.st_mtime_ns})
        if (known := _read_store(store, state)) is not None:
            return known
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); it may be truncated. Copy it there again.") from error
    annotations = _parse(path, content)
    _write_store(store, state, annotations)
    return annotations


def _read_store(store: Path, state: str) -> Annotations | None:
    """An unreadable store is no reason to stop: the JSON file is read again."""
    try:
        with np.load(store) as stored:
            texts = json.loads(str(stored["texts"]))
            if texts.pop("state") == state:
                columns = {name: stored[name] for name in _COLUMNS}
                known: dict[str, Any] = {name: tuple(values) for name, values in texts.items()} | columns
                return Annotations(**known)
    except Exception:  # OSError, BadZipFile, zlib.error, KeyError, ValueError ...: as the damage has it
        return None
    return None


def _write_store(store: Path, state: str, annotations: Annotations) -> None:
    names = ("class_names", "category_ids", "file_names", "problems")
    texts = json.dumps({"state": state, **{name: getattr(annotations, name) for name in names}})
    content = io.BytesIO()
    np.savez(
        content, allow_pickle=False, texts=np.array(texts), **{name: getattr(annotations, name) for name in _COLUMNS}
    )
    try:
        write_bytes(store, content.getvalue())
    except (UserError, OSError) as error:
        logging.warning("What was read from annotations is not kept: %s", error)


def _parse(path: Path, content: Any) -> Annotations:
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(not isinstance(content.get(key), list) for key in keys):
        missing = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), list)]
        raise UserError(
            f"{path} is not in COCO's format: it must be an object with the lists {', '.join(keys)}; "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing."
        )
    categories = _categories(path, content["categories"])
    file_names, image_ids, sizes, problems = _images(path, content["images"])
    place = {image_id: i for i, image_id in enumerate(image_ids)}
    label = {category_id: i for i, (category_id, _) in enumerate(categories)}
    rows: list[tuple[int, int, list[float], int, bool, float]] = []
    for position, annotation in enumerate(content["annotations"]):
        if not isinstance(annotation, dict):
            raise UserError(f"{path} is not in COCO's format: entry {position} of annotations is not an object.")
        number = _integer(annotation.get("id"))
        called = f"entry {position} of annotations" if number is None else f"annotation {number}"
        image, category = _integer(annotation.get("image_id")), _integer(annotation.get("category_id"))
        if image is None or image not in place:
            problems.append(f"{called}: its image {annotation.get('image_id')!r} is not listed")
        elif category is None or category not in label:
            problems.append(
                f"{called} of {printable(file_names[place[image]])}: its category "
                f"{annotation.get('category_id')!r} is not listed"
            )
        else:
            rows.append(
                (
                    place[image],
                    _UNKNOWN if number is None else number,
                    _box(annotation.get("bbox")),
                    label[category],
                    annotation.get("iscrowd") in (1, True),
                    _number(annotation.get("area")),
                )
            )
    rows.sort(key=lambda row: row[0])  # stable: within an image they keep their order
    image_column, ids, boxes, labels, crowd, areas = zip(*rows, strict=True) if rows else ((),) * 6
    return Annotations(
        class_names=tuple(name for _, name in categories),
        category_ids=tuple(category_id for category_id, _ in categories),
        file_names=tuple(file_names),
        image_ids=np.array(image_ids, np.int64),
        sizes=np.array(sizes, np.int32).reshape(-1, 2),
        image=np.array(image_column, np.int32),
        ids=np.array(ids, np.int64),
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        labels=np.array(labels, np.int32),
        crowd=np.array(crowd, np.bool_),
        areas=np.array(areas, np.float64),
        problems=tuple(problems),
    )


def _categories(path: Path, categories: Sequence[Any]) -> list[tuple[int, str]]:
    """(id, name), by ascending id."""
    if not categories:
        raise UserError(f"{path} lists no categories. Name at least one, with id and name.")
    found: dict[int, str] = {}
    for position, category in enumerate(categories):
        number = _integer(category.get("id")) if isinstance(category, dict) else None
        if number is None:
            raise UserError(f"{path} is not in COCO's format: entry {position} of categories has no number as its id.")
        if number in found:
            raise UserError(f"{path} has two categories with the id {number}. Give each its own.")
        found[number] = printable(str(category.get("name", number)))
    return sorted(found.items())


def _images(path: Path, images: Sequence[Any]) -> tuple[list[str], list[int], list[tuple[int, int]], list[str]]:
    """Names, ids and sizes (height, width) of the images, and what is left out."""
    places: dict[int, str] = {}
    sizes, problems = [], []
    for position, image in enumerate(images):
        image = image if isinstance(image, dict) else {}
        number, name = _integer(image.get("id")), image.get("file_name")
        if number is None or not isinstance(name, str) or not name:
            raise UserError(
                f"{path} is not in COCO's format: entry {position} of images must have a whole number as id and a "
                f"file_name, has {image.get('id')!r} and {name!r}."
            )
        if places.get(number, name) != name:
            raise UserError(
                f"{path} has the id {number} for two images, {printable(places[number])} and {printable(name)}: whose "
                "the annotations are cannot be told. Give each image its own id."
            )
        if number in places:
            problems.append(f"image {number}: listed twice ({printable(name)})")
            continue
        places[number] = name
        height, width = (_integer(image.get(side)) or 0 for side in ("height", "width"))
        sizes.append((height, width) if 0 < min(height, width) <= max(height, width) < 2**31 else (_UNKNOWN, _UNKNOWN))
    return list(places.values()), list(places), sizes, problems


def _box(box: Any) -> list[float]:
    """Four floats, NaN where it is no box."""
    return [_number(number) for number in box] if isinstance(box, list) and len(box) == 4 else [np.nan] * 4


def _integer(value: Any) -> int | None:
    """The value, where it is a whole number of up to 64 bits."""
    is_integer = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    return value if is_integer else None


def _number(value: Any) -> float:
    """The value, NaN where it is no number."""
    return value if isinstance(value, float) else float(value) if _integer(value) is not None else np.nan

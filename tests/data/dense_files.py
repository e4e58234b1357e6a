"""Small datasets of detection and segmentation on disk, and what readers make of them."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from mobiatt_tf.data import reading
from mobiatt_tf.data.dense import DetectionSplit, SegmentationSplit

CATEGORIES = ((3, "cat"), (90, "dog"), (7, "emu"))


def pixels(index: int, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: large blocks in colours of their own."""
    rows, columns = np.mgrid[:height, :width]
    blocks = (rows * 3 // height) * 3 + columns * 3 // width
    colours = np.random.default_rng(index).integers(0, 256, (9, 3), np.uint8)
    return colours[blocks]


def encoded(
    array: np.ndarray, kind: str = "PNG", orientation: int = 1, mode: str | None = None, **options: Any
) -> bytes:
    """An image file, in another of Pillow's modes if one is given; with an orientation its EXIF data say so."""
    buffer = io.BytesIO()
    if orientation != 1:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif.tobytes()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def annotation(number: int, image: int, box: Sequence[float], category: int = 3, **more: Any) -> dict[str, Any]:
    area = box[2] * box[3]
    return {
        "id": number,
        "image_id": image,
        "bbox": list(box),
        "category_id": category,
        "area": area,
        "iscrowd": 0,
    } | more


class CocoFolder:
    """A directory in COCO's format: two images of 30 x 40 with a box each to train with, one to test on.

    Tests change `train` and `test` (the JSON objects) or files, then `write`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        categories = [{"id": number, "name": name} for number, name in CATEGORIES]
        self.train: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
        self.test: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
        for split, folder, ids in ((self.train, "train2017", (11, 12)), (self.test, "val2017", (21,))):
            for i in ids:
                self.add_image(split, folder, i)
                split["annotations"].append(annotation(i, i, (4, 5, 10, 20)))
        self.write()

    def add_image(
        self, split: dict[str, Any], folder: str, number: int, content: bytes | None = None, **more: Any
    ) -> Path:
        name = f"{number}.png"
        split["images"].append({"id": number, "file_name": name, "height": 30, "width": 40} | more)
        return write(self.root / folder / name, encoded(pixels(number, 30, 40)) if content is None else content)

    def write(self) -> Path:
        for split, name in ((self.train, "instances_train2017.json"), (self.test, "instances_val2017.json")):
            write(self.root / "annotations" / name, json.dumps(split).encode())
        return self.root


def read_image(split: DetectionSplit | SegmentationSplit, index: int) -> np.ndarray:
    """uint8 [H, W, 3], upright, as a traced graph reads it."""
    read = reading.image_reader(split)
    (image,) = tf.data.Dataset.from_tensors(np.int64(index)).map(read)
    return image.numpy()


def read_mask(split: SegmentationSplit, index: int) -> np.ndarray:
    """uint8 [H, W], upright, as a traced graph reads it."""
    read = reading.mask_reader(split)
    (labels,) = tf.data.Dataset.from_tensors(np.int64(index)).map(read)
    return labels.numpy()

"""Small datasets of coloured rectangles, as PNG files in a directory."""

from pathlib import Path

import numpy as np
import tensorflow as tf

from mobiatt_tf.data.dataset import Split
from mobiatt_tf.data.dense import DenseDataset, DetectionSplit, SegmentationSplit

COLOURS = np.array([[230, 30, 30], [30, 220, 40], [40, 40, 235]], np.uint8)
CLASSES = ("red", "green", "blue")


def write(path: Path, pixels: np.ndarray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tf.io.encode_png(pixels).numpy())
    return str(path)


def draw(seed: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture uint8 [H, W, 3] of two rectangles side by side, their boxes int [2, 4] and labels [2]."""
    generator = np.random.default_rng(seed)
    height, width = size
    pixels = np.full((height, width, 3), 128, np.uint8)
    boxes, labels = [], generator.integers(0, 3, 2)
    for side, label in enumerate(labels):
        left = side * width // 2 + int(generator.integers(0, width // 8))
        right = (side + 1) * width // 2 - int(generator.integers(0, width // 8))
        top, bottom = int(generator.integers(0, height // 3)), height - int(generator.integers(0, height // 3))
        boxes.append((left, top, right, bottom))
        pixels[top:bottom, left:right] = COLOURS[label]
    return pixels, np.array(boxes), labels


def images_of(files: list[str]) -> Split:
    return Split(labels=np.zeros(len(files), np.int32), files=tuple(files))


def detection_split(directory: Path, sizes: list[tuple[int, int]], seed: int = 0) -> DetectionSplit:
    drawn = [draw(seed + index, size) for index, size in enumerate(sizes)]
    files = [write(directory / f"{seed + index}.png", pixels) for index, (pixels, _, _) in enumerate(drawn)]
    boxes = tuple(found.astype(np.float32) for _, found, _ in drawn)
    return DetectionSplit(
        images=images_of(files),
        boxes=boxes,
        labels=tuple(labels.astype(np.int32) for _, _, labels in drawn),
        crowd=tuple(np.zeros(2, bool) for _ in drawn),
        areas=tuple((found[:, 2:] - found[:, :2]).prod(axis=1) for found in boxes),
        sizes=np.array(sizes, np.int32),
        image_ids=np.arange(len(sizes), dtype=np.int64),
        orientations=np.ones(len(sizes), np.uint8),
    )


def segmentation_split(directory: Path, sizes: list[tuple[int, int]], seed: int = 0) -> SegmentationSplit:
    """Rectangles have their label, the rest is 255."""
    files, masks = [], []
    for index, size in enumerate(sizes):
        pixels, boxes, labels = draw(seed + index, size)
        mask = np.full((*size, 1), 255, np.uint8)
        for (left, top, right, bottom), label in zip(boxes, labels, strict=True):
            mask[top:bottom, left:right] = label
        files.append(write(directory / f"{seed + index}.png", pixels))
        masks.append(write(directory / "masks" / f"{seed + index}.png", mask))
    ones = np.ones(len(sizes), np.uint8)
    label_map = np.full(256, 255, np.uint8)
    label_map[: len(CLASSES)] = np.arange(len(CLASSES))
    return SegmentationSplit(images_of(files), images_of(masks), ones, ones, label_map)


def dataset(train: DetectionSplit | SegmentationSplit, test: DetectionSplit | SegmentationSplit) -> DenseDataset:
    return DenseDataset("rectangles", CLASSES, train, test)

"""Pictures that say themselves where their things are: rectangles of red, green and blue on black."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from mobiatt_tf import data
from mobiatt_tf.data.dense import DetectionSplit, SegmentationSplit

SIZES = ((40, 60), (64, 48), (30, 90), (50, 50), (81, 33), (37, 41), (120, 160), (24, 20))


def painted(index: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Black with a rectangle of each of red, green and blue, uint8 [height, width, 3]; their boxes, float32 [3, 4]."""
    random = np.random.default_rng(index)
    image = np.zeros((height, width, 3), np.uint8)
    boxes = np.zeros((3, 4), np.float32)
    for channel in range(3):
        left, right = width * channel // 3, width * (channel + 1) // 3
        x1 = random.integers(left, left + (right - left) // 3 + 1)
        x2 = random.integers(x1 + (right - left) // 2, right + 1)
        y1 = random.integers(0, height // 2)
        y2 = random.integers(y1 + height // 3, height + 1)
        image[y1:y2, x1:x2, channel] = 255
        boxes[channel] = x1, y1, x2, y2
    return image, boxes


def stored_as(image: np.ndarray, code: int) -> np.ndarray:
    """What a camera stores that writes an EXIF code, so that viewers show `image`; [H, W] or [H, W, C]."""
    order = [1, 0, *range(2, image.ndim)]
    stored = {
        1: lambda: image,
        2: lambda: image[:, ::-1],
        3: lambda: image[::-1, ::-1],
        4: lambda: image[::-1],
        5: lambda: image.transpose(order),
        6: lambda: image[:, ::-1].transpose(order),
        7: lambda: image[::-1, ::-1].transpose(order),
        8: lambda: image[::-1].transpose(order),
    }[code]()
    return np.ascontiguousarray(stored)


def save(image: np.ndarray | Image.Image, path: Path) -> str:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)
    return str(path)


def files(paths: Sequence[str]) -> data.Split:
    return data.Split(np.zeros(len(paths), np.int32), files=tuple(paths))


def detection_split(
    directory: Path, sizes: Iterable[tuple[int, int]] = SIZES, codes: Sequence[int] | None = None
) -> DetectionSplit:
    """`painted` images as PNG files, rectangle of channel c with label c; stored as EXIF codes say that."""
    examples = [painted(index, *size) for index, size in enumerate(sizes)]
    codes = codes or [1] * len(examples)
    paths = [
        save(stored_as(image, code), directory / f"{index}.png")
        for index, ((image, _), code) in enumerate(zip(examples, codes, strict=True))
    ]
    return of_boxes(paths, [boxes for _, boxes in examples], [image.shape[:2] for image, _ in examples], codes)


def of_boxes(
    paths: Sequence[str],
    boxes: Sequence[np.ndarray],
    sizes: Sequence[tuple[int, ...]],
    codes: Sequence[int] | None = None,
    crowd: Sequence[np.ndarray] | None = None,
) -> DetectionSplit:
    """Box i of each image has the label i."""
    return DetectionSplit(
        images=files(paths),
        boxes=tuple(boxes),
        labels=tuple(np.arange(len(rows), dtype=np.int32) for rows in boxes),
        crowd=tuple(crowd or [np.zeros(len(rows), bool) for rows in boxes]),
        areas=tuple((rows[:, 2] - rows[:, 0]) * (rows[:, 3] - rows[:, 1]) for rows in boxes),
        sizes=np.array(sizes, np.int32),
        image_ids=np.arange(len(paths)) + 100,
        orientations=np.array(codes or [1] * len(paths), np.uint8),
    )


def segmentation_split(
    directory: Path,
    sizes: Iterable[tuple[int, int]] = SIZES,
    codes: Sequence[int] | None = None,
    mask_codes: Sequence[int] | None = None,
) -> SegmentationSplit:
    """`painted` images and label PNGs: 0 for black, 1 + c for channel c; stored as EXIF codes say that."""
    images = [painted(index, *size)[0] for index, size in enumerate(sizes)]
    codes, mask_codes = codes or [1] * len(images), mask_codes or [1] * len(images)
    pairs = [
        (
            save(stored_as(image, code), directory / f"{index}.png"),
            save(stored_as(classes(image), mask_code), directory / f"{index}_labels.png"),
        )
        for index, (image, code, mask_code) in enumerate(zip(images, codes, mask_codes, strict=True))
    ]
    return of_masks(*zip(*pairs, strict=True), codes=codes, mask_codes=mask_codes)


def of_masks(
    images: Sequence[str],
    masks: Sequence[str],
    codes: Sequence[int] | None = None,
    mask_codes: Sequence[int] | None = None,
    label_map: np.ndarray | None = None,
) -> SegmentationSplit:
    return SegmentationSplit(
        images=files(images),
        masks=files(masks),
        orientations=np.array(codes or [1] * len(images), np.uint8),
        mask_orientations=np.array(mask_codes or [1] * len(images), np.uint8),
        label_map=np.arange(256, dtype=np.uint8) if label_map is None else label_map,
    )


def colours(images: np.ndarray) -> np.ndarray:
    """Normalized images, float32 [..., 3], as grey levels 0 .. 255; where nothing is they are those of the mean."""
    mean, std = np.array(data.IMAGENET_MEAN), np.array(data.IMAGENET_STD)
    return (images * std + mean) * 255


def classes(image: np.ndarray) -> np.ndarray:
    """Grey levels [..., 3] of a `painted` image to uint8 [...]: 1 + the channel that is bright, or 0."""
    return np.where(image.max(-1) > 127, 1 + image.argmax(-1), 0).astype(np.uint8)


def is_inside(image: np.ndarray) -> np.ndarray:
    """Where a canvas [H, W, 3] shows an image: bool [H, W]. No colour is normalized to three zeros."""
    return (image != 0).any(-1)


def run(
    train_batches: Callable[..., tf.data.Dataset], split: Any, threads: int | None = None, **arguments: Any
) -> list:
    """The elements of `train_batches`, as NumPy arrays."""
    batches = train_batches(split, **{"image_size": (64, 64), "batch_size": 4, "seed": 3, "epoch": 0, **arguments})
    if threads is not None:
        options = tf.data.Options()
        options.threading.private_threadpool_size = threads
        batches = batches.with_options(options)
    return list(batches.as_numpy_iterator())


def assert_same(first: list, second: list) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        for array, expected in zip(tf.nest.flatten(one), tf.nest.flatten(other), strict=True):
            np.testing.assert_array_equal(array, expected)


def assert_differ(first: list, second: list) -> None:
    images, others = (np.concatenate([element[0] for element in elements]) for elements in (first, second))
    assert all((image != other).any() for image, other in zip(images, others, strict=True))

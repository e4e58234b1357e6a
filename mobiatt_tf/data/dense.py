"""What datasets of detection and of segmentation are: images with boxes, and images with a label for every pixel."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobiatt_tf.data import cache
from mobiatt_tf.data.dataset import Split
from mobiatt_tf.errors import UserError
from mobiatt_tf.files import user_path

IGNORED = 255  # the label of pixels that count neither in training nor in a test

SCENES = "scenes"


@dataclass(frozen=True, eq=False)
class DetectionSplit:
    """M images and the boxes in each, in a fixed order.

    Attributes:
        images: the M images, in files or records; their labels are all 0. `mobiatt_tf.data.reading.image_reader` reads
            them upright.
        boxes: M arrays float32 [n, 4], xyxy = (x1, y1, x2, y2) in pixels of the upright image, within it.
        labels: M arrays int32 [n], the class of each box.
        crowd: M arrays bool [n], whether a box stands for a group of things (COCO's iscrowd).
        areas: M arrays float32 [n], square pixels: of the thing's mask where the dataset says that, else of the box.
        sizes: int32 [M, 2], height and width of the upright image.
        image_ids: int64 [M], what the dataset calls the images.
        orientations: uint8 [M], the EXIF code, 1 to 8, that turns what is decoded upright; 1 is for nothing to turn.
    """

    images: Split
    boxes: tuple[np.ndarray, ...]
    labels: tuple[np.ndarray, ...]
    crowd: tuple[np.ndarray, ...]
    areas: tuple[np.ndarray, ...]
    sizes: np.ndarray
    image_ids: np.ndarray
    orientations: np.ndarray

    def __post_init__(self) -> None:
        columns = (self.boxes, self.labels, self.crowd, self.areas, self.sizes, self.image_ids, self.orientations)
        lengths = [len(column) for column in columns]
        if any(length != len(self.images) for length in lengths):
            raise ValueError(f"Every attribute must be given for each of {len(self.images)} images, got {lengths}.")
        if self.images.images is not None:
            raise ValueError("The images of a detection split lie in files or records.")
        for boxes, *others in zip(self.boxes, self.labels, self.crowd, self.areas, strict=True):
            if boxes.shape != (len(boxes), 4) or any(other.shape != (len(boxes),) for other in others):
                shapes = [list(array.shape) for array in (boxes, *others)]
                raise ValueError(f"boxes must be [n, 4]; labels, crowd and areas [n]; got {shapes}.")

    def __len__(self) -> int:
        return len(self.images)

    def take(self, count: int) -> "DetectionSplit":
        """The first `count` images, or all where there are no more; ValueError below 1."""
        return self.select(_first(count, len(self)))

    def select(self, indices: np.ndarray) -> "DetectionSplit":
        """The images at `indices` (int [K], each below len), in that order."""
        return DetectionSplit(
            images=self.images.select(indices),
            boxes=tuple(self.boxes[i] for i in indices),
            labels=tuple(self.labels[i] for i in indices),
            crowd=tuple(self.crowd[i] for i in indices),
            areas=tuple(self.areas[i] for i in indices),
            sizes=self.sizes[indices],
            image_ids=self.image_ids[indices],
            orientations=self.orientations[indices],
        )

    def name_of(self, index: int) -> str:
        """What messages call an image: its file's path, or "shard:record"."""
        return self.images.name_of(index)

    def fingerprint(self) -> bytes:
        """SHA-256 over name and size of each file, or the records' checksums, and everything that is known of them."""
        digest = hashlib.sha256()
        _add_images(digest, self.images)
        digest.update(np.array([len(boxes) for boxes in self.boxes], np.int64).tobytes())
        for arrays in (self.boxes, self.labels, self.crowd, self.areas):
            for array in arrays:
                digest.update(np.ascontiguousarray(array).tobytes())
        for column in (self.sizes, self.image_ids, self.orientations):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.digest()


def detection_split(
    images: Split,
    *,
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    crowd: np.ndarray,
    areas: np.ndarray,
    sizes: np.ndarray,
    image_ids: np.ndarray,
    orientations: np.ndarray,
) -> DetectionSplit:
    """A split of N boxes that stand one after the other.

    Args:
        images: the M images.
        image: int [N], ascending, which image a box belongs to.
        boxes: [N, 4], xyxy.
        labels: int [N].
        crowd: bool [N].
        areas: [N]; where one is not a positive number, that of the box is taken.
        sizes: int [M, 2].
        image_ids: int [M].
        orientations: int [M].
    """
    ends = np.searchsorted(image, np.arange(1, len(images)))
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    areas = np.where(np.isfinite(areas) & (areas > 0), areas, sides)
    return DetectionSplit(
        images=images,
        boxes=tuple(np.split(boxes.astype(np.float32), ends)),
        labels=tuple(np.split(labels.astype(np.int32), ends)),
        crowd=tuple(np.split(crowd.astype(np.bool_), ends)),
        areas=tuple(np.split(areas.astype(np.float32), ends)),
        sizes=sizes.astype(np.int32),
        image_ids=image_ids.astype(np.int64),
        orientations=orientations.astype(np.uint8),
    )


@dataclass(frozen=True, eq=False)
class SegmentationSplit:
    """M images and the class of every pixel, in a fixed order.

    Attributes:
        images: the M images, in files or records; their labels are all 0. `mobiatt_tf.data.reading.image_reader` reads
            them upright.
        masks: M PNG files, or the same records with another `image_key`; their first channel, or their indices where
            they have a palette, are values of `label_map`. `mobiatt_tf.data.reading.mask_reader` reads classes.
        orientations: uint8 [M], the EXIF code, 1 to 8, that turns a decoded image upright; 1 is for nothing to turn.
        mask_orientations: uint8 [M], the same for the masks.
        label_map: uint8 [256], the class of a stored value, or IGNORED.
    """

    images: Split
    masks: Split
    orientations: np.ndarray
    mask_orientations: np.ndarray
    label_map: np.ndarray

    def __post_init__(self) -> None:
        lengths = [len(self.masks), len(self.orientations), len(self.mask_orientations)]
        if any(length != len(self.images) for length in lengths):
            raise ValueError(f"Every attribute must be given for each of {len(self.images)} images, got {lengths}.")
        if self.images.images is not None or self.masks.images is not None:
            raise ValueError("The images and masks of a segmentation split lie in files or records.")
        if self.label_map.shape != (256,) or self.label_map.dtype != np.uint8:
            raise ValueError(f"label_map must be uint8 [256], got {self.label_map.dtype} {list(self.label_map.shape)}.")

    def __len__(self) -> int:
        return len(self.images)

    def take(self, count: int) -> "SegmentationSplit":
        """The first `count` images, or all where there are no more; ValueError below 1."""
        return self.select(_first(count, len(self)))

    def select(self, indices: np.ndarray) -> "SegmentationSplit":
        """The images at `indices` (int [K], each below len), in that order."""
        return SegmentationSplit(
            images=self.images.select(indices),
            masks=self.masks.select(indices),
            orientations=self.orientations[indices],
            mask_orientations=self.mask_orientations[indices],
            label_map=self.label_map,
        )

    def name_of(self, index: int) -> str:
        """What messages call an image: its file's path, or "shard:record"."""
        return self.images.name_of(index)

    def fingerprint(self) -> bytes:
        """SHA-256 over name and size of each file, or the records' checksums, and everything that is known of them."""
        digest = hashlib.sha256()
        for split in (self.images, self.masks):
            _add_images(digest, split)
        for column in (self.orientations, self.mask_orientations, self.label_map):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.digest()


@dataclass(frozen=True, eq=False)
class DenseDataset:
    """A training and a test split over the same classes, both of detection or both of segmentation.

    Attributes:
        name: what it was asked for by.
        class_names: the name of class i at position i.
        train: the examples to learn from.
        test: the examples to measure on.
        skipped: "name: reason" for everything that was left out.
        category_ids: what the dataset itself calls class i, for results in its own terms (detection); else None.
    """

    name: str
    class_names: tuple[str, ...]
    train: DetectionSplit | SegmentationSplit
    test: DetectionSplit | SegmentationSplit
    skipped: tuple[str, ...] = ()
    category_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        classes = len(self.class_names)
        if self.category_ids is not None and len(self.category_ids) != classes:
            raise ValueError(f"There must be one category id for each of {classes} classes: {self.category_ids}.")
        for split in (self.train, self.test):
            if isinstance(split, SegmentationSplit):
                labels = split.label_map[split.label_map != IGNORED]
            else:
                labels = np.concatenate([np.zeros(0, np.int32), *split.labels])
            if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
                raise ValueError(
                    f"Labels of {self.name} run from {labels.min()} to {labels.max()}, but there are {classes} classes."
                )


def load_detection(name: str, cache_dir: str | os.PathLike[str] | None = None) -> DenseDataset:
    """Loads a dataset of boxes.

    Args:
        name: "scenes" (see `mobiatt_tf.data.scenes`), "tfds:coco/2017" or another that tensorflow-datasets keeps like
            that (see `mobiatt_tf.data.dense_tfds`), or a directory in COCO's format, with "folder:" before it or not
            (see `mobiatt_tf.data.coco`).
        cache_dir: where downloads and findings are kept; without it see `mobiatt_tf.data.cache.cache_directory`.

    Returns:
        The dataset, of `DetectionSplit`s. Images without boxes are left out of the training split alone.

    Raises:
        UserError: there is no such name or directory, or what lies there is no dataset of boxes.
    """
    cache_path = cache.cache_directory(cache_dir)
    if name == SCENES:
        from mobiatt_tf.data.scenes import load_scenes_detection

        return load_scenes_detection(cache_path)
    if name.startswith("tfds:"):
        from mobiatt_tf.data.dense_tfds import load_tfds_detection

        return load_tfds_detection(name.removeprefix("tfds:"), cache_path)
    from mobiatt_tf.data.coco import load_coco

    return load_coco(_directory(name, "in COCO's format"), cache_path, name)


def load_segmentation(name: str, cache_dir: str | os.PathLike[str] | None = None) -> DenseDataset:
    """Loads a dataset of images with a class for every pixel.

    Args:
        name: "scenes" (see `mobiatt_tf.data.scenes`), "tfds:scene_parse150" (see `mobiatt_tf.data.dense_tfds`), or a
            directory of images and label PNGs, with "folder:" before it or not (see `mobiatt_tf.data.mask_folder`).
        cache_dir: where downloads and findings are kept; without it see `mobiatt_tf.data.cache.cache_directory`.

    Returns:
        The dataset, of `SegmentationSplit`s.

    Raises:
        UserError: there is no such name or directory, or what lies there is no dataset of labelled pixels.
    """
    cache_path = cache.cache_directory(cache_dir)
    if name == SCENES:
        from mobiatt_tf.data.scenes import load_scenes_segmentation

        return load_scenes_segmentation(cache_path)
    if name.startswith("tfds:"):
        from mobiatt_tf.data.dense_tfds import load_tfds_segmentation

        return load_tfds_segmentation(name.removeprefix("tfds:"), cache_path)
    from mobiatt_tf.data.mask_folder import load_mask_folder

    return load_mask_folder(_directory(name, "of images and label PNGs"), cache_path, name)


def _directory(name: str, what: str) -> Path:
    directory = user_path(name.removeprefix("folder:"))
    if not name or not directory.is_dir():
        raise UserError(
            f'There is no dataset or directory "{name}". Give a directory {what}, tfds:NAME, or "{SCENES}".'
        )
    return directory


def _first(count: int, available: int) -> np.ndarray:
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    return np.arange(min(count, available))


def _add_images(digest: "hashlib._Hash", split: Split) -> None:
    """Adds name and size of each file, or what the records' checksums say."""
    for file in split.files or ():
        path = Path(file)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(
                f"{path} can no longer be read ({error.strerror}). Put the file back and give the same command again."
            ) from error
        digest.update(f"{path.name} {size}\n".encode(errors="surrogateescape"))
    if split.records is not None:
        digest.update(split.records.fingerprint())

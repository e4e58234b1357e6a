"""What a classification dataset is: labelled images in memory, in files of their own, or in TFRecord files."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import logging

_NAMES_SHOWN = 10


@dataclass(frozen=True, eq=False)
class Records:
    """Where M encoded images lie in TFRecord files; `mobiatt_tf.data.records` finds and reads them.

    Attributes:
        files: the paths of the TFRecord files.
        file: int32 [M], which of `files` a record is in.
        number: int64 [M], how many records come before it in its file.
        offset: int64 [M], where it starts in its file, in bytes.
        length: int64 [M], how long its data are (a serialized tf.train.Example), in bytes.
        checksum: uint32 [M], the masked CRC-32C of the data as the file states it.
        image_key: the feature of the Example that holds the encoded image.
        whole_images: whether these images were arrays, which the pipeline uses whole; else image files, of which a test
            shows the centre.
    """

    files: tuple[str, ...]
    file: np.ndarray
    number: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    checksum: np.ndarray
    image_key: str = "image"
    whole_images: bool = False

    def __len__(self) -> int:
        return len(self.file)

    def select(self, indices: np.ndarray) -> "Records":
        """The records at `indices` (int [K], each below len), in that order."""
        return Records(
            files=self.files,
            file=self.file[indices],
            number=self.number[indices],
            offset=self.offset[indices],
            length=self.length[indices],
            checksum=self.checksum[indices],
            image_key=self.image_key,
            whole_images=self.whole_images,
        )

    def name(self, index: int) -> str:
        """What messages call a record: "FILE:NUMBER", numbers counted from 0."""
        return f"{Path(self.files[self.file[index]]).name}:{self.number[index]}"

    def fingerprint(self) -> bytes:
        """SHA-256 over lengths and checksums in their order: equal where the content is, wherever it lies."""
        digest = hashlib.sha256()
        for array in (self.length, self.checksum):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.digest()


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled examples in a fixed order. Exactly one of `images`, `files` and `records` is given.

    Attributes:
        labels: int32 [M], the class of each example.
        images: uint8 [M, H, W, C] with C 1 (grey) or 3 (RGB), or None.
        files: M paths of image files, decoded when they are read, or None.
        records: M records of TFRecord files, decoded when they are read, or None.
    """

    labels: np.ndarray
    images: np.ndarray | None = None
    files: tuple[str, ...] | None = None
    records: Records | None = None

    def __post_init__(self) -> None:
        given = [stored for stored in (self.images, self.files, self.records) if stored is not None]
        if len(given) != 1:
            raise ValueError("A split has images, files or records: give exactly one of the three.")
        if self.labels.dtype != np.int32 or self.labels.ndim != 1:
            raise ValueError(f"labels must be int32 [M], got {self.labels.dtype} {list(self.labels.shape)}.")
        images = self.images
        if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3)):
            raise ValueError(f"images must be uint8 [M, H, W, 1 or 3], got {images.dtype} {list(images.shape)}.")
        examples = len(given[0])
        if examples != len(self.labels):
            raise ValueError(f"There must be one label for each image, got {len(self.labels)} for {examples}.")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def whole_images(self) -> bool:
        """Whether a test shows all of an image, only resized: of arrays, also where they have become records."""
        return self.images is not None or (self.records is not None and self.records.whole_images)

    def take(self, count: int) -> "Split":
        """The first `count` examples, for quick runs; the whole split when it has no more than that.

        Raises:
            ValueError: `count` is below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}.")
        return self.select(np.arange(min(count, len(self))))

    def select(self, indices: np.ndarray) -> "Split":
        """The examples at `indices` (int [K], each below len), in that order."""
        return Split(
            labels=self.labels[indices],
            images=None if self.images is None else self.images[indices],
            files=None if self.files is None else tuple(self.files[index] for index in indices),
            records=None if self.records is None else self.records.select(indices),
        )

    def name_of(self, index: int) -> str:
        """What an error message calls the example: its file's path, "shard:record", or "image 123"."""
        if self.records is not None:
            return self.records.name(index)
        return self.files[index] if self.files is not None else f"image {index}"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split over the same classes.

    Attributes:
        name: what `load` was asked for.
        class_names: the name of class i at position i.
        train: the examples to learn from.
        test: the examples to measure on.
        skipped: "path: reason" for every file that was left out because it cannot be read or is not an image, hidden
            files excepted; "shard:record: reason" for every record that was left out because it is damaged.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for split in (self.train, self.test):
            if len(split) and not 0 <= split.labels.min() <= split.labels.max() < len(self.class_names):
                raise ValueError(
                    f"Labels of {self.name} run from {split.labels.min()} to {split.labels.max()}, "
                    f"but there are {len(self.class_names)} class names."
                )


def interleave_classes(labels: np.ndarray) -> np.ndarray:
    """The order in which the classes take turns: the first example of every class, then the second of every class ...

    Datasets that come sorted by class are stored in this order, so that `Split.take` gives a balanced subset.

    Args:
        labels: integers [M].

    Returns:
        int64 [M], a permutation of 0 .. M-1; within a class the order is kept.
    """
    by_class = np.argsort(labels, kind="stable")
    sorted_labels = labels[by_class]
    rank = np.empty(len(labels), np.int64)  # position of an example within its class
    rank[by_class] = np.arange(len(labels)) - np.searchsorted(sorted_labels, sorted_labels)
    return np.lexsort((labels, rank))


def split_of_files(examples: Sequence[tuple[str, int]]) -> Split:
    """A split of (path, label) pairs, in the order of `interleave_classes`."""
    labels = np.array([label for _, label in examples], np.int32)
    order = interleave_classes(labels)
    return Split(labels[order], files=tuple(examples[i][0] for i in order))


def held_out_by_name(names: Sequence[str], fraction: float = 0.2) -> np.ndarray:
    """Which files of one class are the test examples, by a hash of the name alone.

    A file stays on its side when others are added or removed. At least one example goes to either side, which for a
    few files may override the hash: the one nearest to the threshold changes sides.

    Args:
        names: at least two names, with "/" between their parts on every system.
        fraction: the expected share of test examples.

    Returns:
        bool [len(names)], true for a test example.
    """
    hashes = np.array([int(hashlib.sha256(name.encode()).hexdigest()[:13], 16) for name in names])  # 52 bits
    count = int((hashes < fraction * 2**52).sum())
    test = np.zeros(len(names), bool)
    test[np.argsort(hashes, kind="stable")[: min(max(count, 1), len(names) - 1)]] = True
    return test


def held_out_of_each_class(labels: np.ndarray) -> np.ndarray:
    """Which examples are the test examples: a fifth of every class, the same ones for ever.

    Args:
        labels: integers [M].

    Returns:
        bool [M], true for a test example.
    """
    test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        # NumPy promises that the raw stream of Philox stays as it is; it does not promise so for `permutation`.
        order = np.argsort(np.random.Philox(key=int(label)).random_raw(len(members)))
        test[members[order[: len(members) // 5]]] = True
    return test


def warn_of_skipped(lines: Sequence[str], what: str) -> None:
    """One warning for each of the first things that were left out, and one that counts them.

    Args:
        lines: "name: reason" of each.
        what: follows their number in a sentence.
    """
    for line in lines[:_NAMES_SHOWN]:
        logging.warning("Skipped %s", line)
    if lines:
        logging.warning("%d %s.", len(lines), what)

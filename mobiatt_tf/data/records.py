"""TFRecord files of labelled images: which records are in them and whole, and reading any one of them.

A TFRecord file is a row of records: their length (uint64, little-endian), its checksum, the data, their checksum. Data
here are a serialized tf.train.Example with an encoded image and an integer label, as tensorflow-datasets writes them.
Who knows where a record starts can read it alone, so that order, resuming and sharding are exact with records as well.
"""

import hashlib
import io
import itertools
import json
import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from mobiatt_tf.data.dataset import Records, Split
from mobiatt_tf.data.decoding import image_problem
from mobiatt_tf.errors import UserError
from mobiatt_tf.files import write_bytes

_HEADER = struct.Struct("<QI")  # the length and its checksum
_CHECKSUM = struct.Struct("<I")
_BLOCK = 256  # records that are examined at once
_RULES = 1  # one more whenever the check decides otherwise than before: what older rules found is found out again
_PROGRESS_FROM = 100_000_000  # bytes; less is checked in about a second

# Of each whole record what `Records` describes, and the label.
_COLUMNS = {"number": np.int64, "offset": np.int64, "length": np.int64, "checksum": np.uint32, "label": np.int32}

# What is found out from the features of an Example: the label, other numbers, and what keeps the record from being used
# ("" for nothing).
Finding = tuple[int, Sequence[float], str]


@dataclass(frozen=True)
class Shard:
    """A TFRecord file.

    Attributes:
        path: where it is.
        count: how many records it should hold; None if that is not known.
    """

    path: Path
    count: int | None = None


@dataclass(frozen=True)
class _Found:
    columns: dict[str, np.ndarray]  # those of _COLUMNS, each [M]
    counts: np.ndarray  # int64 [M], how many other numbers were found out from each
    numbers: np.ndarray  # float64 [sum of counts]
    problems: tuple[str, ...]  # "FILE:NUMBER: reason", one a record that is not whole


@dataclass(frozen=True)
class _Check:
    state: dict[str, Any]  # what the findings depend on, besides the file
    examine: Callable[[Any], Finding]


def split_of_shards(
    shards: Sequence[Shard],
    classes: int,
    cache_path: Path,
    *,
    image_key: str = "image",
    label_key: str = "label",
    whole_images: bool = False,
    title: str = "records",
) -> tuple[Split, tuple[str, ...]]:
    """The whole records of some TFRecord files, in the order in which they are stored.

    Every file is read once: checksums are compared and images decoded. What was found is kept in the cache as long as
    the file's size and time stay the same, file by file, also if the check is interrupted.

    Args:
        shards: the files, not compressed.
        classes: labels are from 0 to `classes` - 1.
        cache_path: where findings are kept.
        image_key: the feature of an Example that holds the encoded image.
        label_key: the feature that holds the label.
        whole_images: whether the images were arrays; see `Records`.
        title: what is being checked, for the progress bar.

    Returns:
        The split, and "FILE:NUMBER: reason" for every record that is damaged and left out. Where a file ends too early
        or a length is damaged, nothing behind that place can be found: its records are all left out.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    keys = {"classes": classes, "image": image_key, "label": label_key}
    split, _, problems = examined_shards(
        shards,
        cache_path,
        examine=lambda features: _examine_labelled(features, keys),
        state=keys,
        image_key=image_key,
        whole_images=whole_images,
        title=title,
    )
    return split, problems


def examined_shards(
    shards: Sequence[Shard],
    cache_path: Path,
    *,
    examine: Callable[[Any], Finding],
    state: dict[str, Any],
    image_key: str = "image",
    whole_images: bool = False,
    title: str = "records",
) -> tuple[Split, tuple[np.ndarray, ...], tuple[str, ...]]:
    """`split_of_shards` for examples of any features.

    Args:
        shards: the files, not compressed.
        cache_path: where findings are kept.
        examine: what is found out from a record: given the features of its Example, by name, it returns the label,
            other numbers, and what keeps the record from being used, "" for nothing. It runs in threads.
        state: what the findings depend on, JSON; with another one they are found out again.
        image_key: the feature that holds the encoded image.
        whole_images: whether the images were arrays; see `Records`.
        title: what is being checked, for the progress bar.

    Returns:
        The split; M arrays float64 with the other numbers of each record (none if no record has any); and
        "FILE:NUMBER: reason" for every record that is damaged or cannot be used, and left out.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    from tqdm import tqdm

    check = _Check(state, examine)
    sizes = [_size(shard.path) for shard in shards]
    found: list[_Found] = []
    # TensorFlow reads and decodes without holding Python's lock, so threads use all cores.
    with (
        ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool,
        tqdm(
            desc=f"checking {title}",
            total=sum(sizes),
            unit="B",
            unit_scale=True,
            disable=sum(sizes) < _PROGRESS_FROM,
        ) as progress,
    ):
        for shard in shards:
            found.append(_find(shard, check, cache_path, pool, progress.update))
            progress.update(sum(sizes[: len(found)]) - progress.n)  # what was known, and damaged tails
    columns = {name: np.concatenate([each.columns[name] for each in found]) for name in _COLUMNS}
    labels = columns.pop("label")
    file = np.repeat(np.arange(len(shards), dtype=np.int32), [len(each.columns["label"]) for each in found])
    paths = tuple(str(shard.path.absolute()) for shard in shards)
    records = Records(paths, file, image_key=image_key, whole_images=whole_images, **columns)
    ends = np.cumsum(np.concatenate([each.counts for each in found]))
    numbers = np.split(np.concatenate([each.numbers for each in found]), ends[:-1]) if np.any(ends) else []
    problems = tuple(problem for each in found for problem in each.problems)
    return Split(labels, records=records), tuple(numbers), problems


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Copy it there again.") from error


def _find(
    shard: Shard, check: _Check, cache_path: Path, pool: ThreadPoolExecutor, advance: Callable[[int], object]
) -> _Found:
    """What `_examine` finds in a file, or found when the file was as it is now."""
    path = shard.path.absolute()
    store = cache_path / "checked_records" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.npz"
    try:
        status = path.stat()
        state = {"rules": _RULES, "bytes": status.st_size, "time": status.st_mtime_ns, "count": shard.count}
        state |= check.state
        if (known := _read_found(store, json.dumps(state))) is not None:
            return known
        found = _examine(shard, status.st_size, check, pool, advance)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    content = io.BytesIO()
    texts = {"state": np.array(json.dumps(state)), "problems": np.array(json.dumps(found.problems))}
    others = {"counts": found.counts, "numbers": found.numbers} if len(found.numbers) else {}
    np.savez(content, allow_pickle=False, **texts, **found.columns, **others)
    try:
        write_bytes(store, content.getvalue())
    except (UserError, OSError) as error:
        logging.warning("What the check of %s found is not kept: %s", path, error)
    return found


def _read_found(store: Path, state: str) -> _Found | None:
    """An unreadable store is no reason to stop: the file is checked again."""
    try:
        with np.load(store) as stored:
            if str(stored["state"]) == state:
                columns = {name: stored[name].astype(kind) for name, kind in _COLUMNS.items()}
                counts = stored["counts"] if "counts" in stored else np.zeros(len(columns["label"]), np.int64)
                numbers = stored["numbers"] if "numbers" in stored else np.zeros(0)
                return _Found(columns, counts, numbers, tuple(json.loads(str(stored["problems"]))))
    except Exception:  # OSError, BadZipFile, zlib.error, KeyError, ValueError ...: as the damage has it
        return None
    return None


def _examine(
    shard: Shard, size: int, check: _Check, pool: ThreadPoolExecutor, advance: Callable[[int], object]
) -> _Found:
    """Finds the records of a file by their lengths; reads, checks and decodes each."""
    path, name = str(shard.path.absolute()), shard.path.name
    rows: list[tuple[int, int, int, int, int]] = []
    numbers: list[Sequence[float]] = []
    problems: list[str] = []
    with open(path, "rb", buffering=0) as file:
        places, end = _walk(file.fileno(), size)
        for start in range(0, len(places), _BLOCK):
            block = places[start : start + _BLOCK]
            results = pool.map(lambda place: _examine_record(path, place[0], check), block)
            for number, ((offset, length), (label, others, problem)) in enumerate(
                zip(block, results, strict=True), start
            ):
                if problem:
                    problems.append(f"{name}:{number}: {problem}")
                else:
                    (checksum,) = _CHECKSUM.unpack(os.pread(file.fileno(), 4, offset + _HEADER.size + length))
                    rows.append((number, offset, length, checksum, label))
                    numbers.append(others)
                advance(_HEADER.size + length + _CHECKSUM.size)
    if shard.count is not None and len(places) < shard.count:
        end = end or "lost, the file ends before it"
        problems += [f"{name}:{number}: {end}" for number in range(len(places), shard.count)]
    elif end:
        problems.append(f"{name}:{len(places)}: {end}; so are all that may follow")
    table = np.array(rows, np.int64).reshape(len(rows), len(_COLUMNS))
    columns = {name: table[:, i].astype(kind) for i, (name, kind) in enumerate(_COLUMNS.items())}
    counts = np.array([len(others) for others in numbers], np.int64)
    return _Found(columns, counts, np.array(list(itertools.chain(*numbers)), np.float64), tuple(problems))


def _walk(descriptor: int, size: int) -> tuple[list[tuple[int, int]], str]:
    """Where each record starts and how long its data are; why the rest of the file is lost, "" if there is no rest."""
    places: list[tuple[int, int]] = []
    position = 0
    while position < size:
        header = os.pread(descriptor, _HEADER.size, position)
        if len(header) < _HEADER.size:
            return places, "lost, the file is truncated"
        length, checksum = _HEADER.unpack(header)
        if _masked_crc32c(header[:8]) != checksum:
            return places, "lost, the length of a record is damaged"
        start, position = position, position + _HEADER.size + length + _CHECKSUM.size
        if position > size:
            return places, "lost, the file is truncated"
        places.append((start, length))
    return places, ""


def _examine_record(path: str, offset: int, check: _Check) -> Finding:
    """What is found out from a record."""
    try:
        with tf.device("CPU:0"):
            data = read_record(tf.constant(path), tf.constant(offset, tf.int64)).numpy()
    except tf.errors.DataLossError:
        return 0, (), "its data do not have the checksum that the file states"
    except tf.errors.OpError as error:
        return 0, (), error.message.strip().splitlines()[0]
    try:
        features = tf.train.Example.FromString(data).features.feature
    except Exception:  # protobuf's DecodeError, which TensorFlow does not name
        return 0, (), "its data are no tf.train.Example"
    return check.examine(features)


def _examine_labelled(features: Any, keys: dict[str, Any]) -> Finding:
    images, labels = features[keys["image"]].bytes_list.value, features[keys["label"]].int64_list.value
    if len(images) != 1 or len(labels) != 1:
        return 0, (), f"must have one {keys['image']} and one {keys['label']}, has {len(images)} and {len(labels)}"
    if not 0 <= labels[0] < keys["classes"]:
        return 0, (), f"its label is {labels[0]}, must be from 0 to {keys['classes'] - 1}"
    return labels[0], (), image_problem(images[0])


def _masked_crc32c(data: bytes) -> int:
    """The checksum of a few bytes as TFRecord files state it: CRC-32C, rotated right by 15 bits, plus a constant.

    Formula and constant: "TFRecords format details" in TensorFlow's guide to tf.train.Example; the polynomial, bits
    reversed: RFC 3720, appendix B.4.
    """
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ 0x82F63B78 * (register & 1)
    checksum = register ^ 0xFFFFFFFF
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_record(file: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
    """The data of one record; both checksums are compared.

    TensorFlow's own reader, told where to start and to stop after one record: it needs no Python, and so no lock.

    Args:
        file: string [], the path.
        offset: int64 [], where the record starts, in bytes.

    Returns:
        string [].

    Raises:
        tf.errors.DataLossError: the record is damaged, or the file ends within it.
    """
    records = tf.raw_ops.TFRecordDatasetV2(
        filenames=[file], compression_type="", buffer_size=0, byte_offsets=tf.reshape(offset, [1])
    )
    kind = {"output_types": [tf.string], "output_shapes": [[]]}
    first = tf.raw_ops.TakeDataset(input_dataset=records, count=1, **kind)
    return tf.raw_ops.DatasetToSingleElement(dataset=first, **kind)[0]


def image_bytes(split: Split) -> Callable[[tf.Tensor], tf.Tensor]:
    """How the pipeline reads a split that has files or records.

    Args:
        split: its files or records; arrays have no encoded images.

    Returns:
        A function from the index of an example, int64 [], to its encoded image, string [].
    """
    records = split.records
    if records is None:
        stored = tf.constant(list(split.files or ()))
        return lambda index: tf.io.read_file(stored[index])
    files, file, offsets = tf.constant(list(records.files)), tf.constant(records.file), tf.constant(records.offset)

    def read(index: tf.Tensor) -> tf.Tensor:
        data = read_record(files[file[index]], offsets[index])
        key = records.image_key
        return tf.io.parse_single_example(data, {key: tf.io.FixedLenFeature([], tf.string)})[key]

    return read

"""Directories that `mobiatt_tf.data.convert` has written: what is in them, and whether it is what was written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging

from mobiatt_tf import files
from mobiatt_tf.data.dataset import Dataset, warn_of_skipped
from mobiatt_tf.data.records import Shard, split_of_shards
from mobiatt_tf.errors import UserError

INDEX = "index.json"
UNFINISHED = "index.unfinished.json"
FORMAT = "mobiatt-tf records"
VERSION = 1
STORED = ("files", "arrays")  # what the images were before; an index that does not say so means the first


def is_converted(directory: Path) -> bool:
    """Whether a directory is meant to hold TFRecord shards: by its index, or by files named *.tfrecord.

    An index.json of something else beside class folders is no sign of it.
    """
    return _has_index(directory) or any(directory.glob("*.tfrecord"))


def _has_index(directory: Path) -> bool:
    try:
        content = files.read_json(directory / INDEX)
    except (UserError, OSError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def read_index(directory: Path) -> dict[str, Any]:
    """The content of index.json, with the keys that `mobiatt_tf.data.convert.convert` describes.

    Raises:
        UserError: it is missing, damaged, of another program or of a later version.
    """
    if not directory.is_dir():
        raise UserError(f"There is no directory {directory}.")
    path = directory / INDEX
    if not path.exists() and (directory / UNFINISHED).exists():
        raise UserError(f"The conversion to {directory} is not finished. Run the same command again: it goes on.")
    advice = "Convert the dataset again, to another directory: python -m mobiatt_tf.data.convert."
    if not path.exists() and not any(directory.glob("*.tfrecord")):
        raise UserError(f"{directory} has neither {INDEX} nor TFRecord files: nothing has been converted to it.")
    if not path.exists():
        raise UserError(f"{directory} has TFRecord files but no {INDEX}, which says what is in them. {advice}")
    index = files.read_json(path)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{path} was not written by this program's converter. {advice}")
    if index.get("version") != VERSION:
        raise UserError(f"{path} has version {index.get('version')}; this program reads {VERSION}. {advice}")
    try:
        for shard in index["shards"]:
            if Path(shard["name"]).name != shard["name"] or shard["split"] not in ("train", "test"):
                raise ValueError(shard["name"])
            _ = int(shard["records"]) + int(shard["bytes"]) + len(shard["sha256"])
        if index.get("stored", STORED[0]) not in STORED:
            raise ValueError(index["stored"])
        _ = [name + "" for name in index["class_names"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r}). {advice}") from error
    return index


def load_converted(directory: Path, cache_path: Path, name: str) -> Dataset:
    """Reads a directory of shards.

    Sizes are compared with index.json every time. The first time, all records are read, their checksums compared and
    the images decoded; the verdict is kept as long as a file's size and time stay the same. Damaged records are
    skipped, counted and named in `Dataset.skipped`; of a file that is too short those behind its end are.

    Args:
        directory: where the converter has written to.
        cache_path: where verdicts are kept.
        name: what the dataset is called.

    Returns:
        The dataset, in the order in which it is stored.

    Raises:
        UserError: the index or a shard is missing, or a shard is larger than it was, or a split has no whole record.
    """
    index = read_index(directory)
    splits = {}
    problems: tuple[str, ...] = ()
    for split in ("train", "test"):
        described = [shard for shard in index["shards"] if shard["split"] == split]
        for shard in described:
            _check_size(directory / shard["name"], shard["bytes"])
        splits[split], damaged = split_of_shards(
            [Shard(directory / shard["name"], shard["records"]) for shard in described],
            len(index["class_names"]),
            cache_path,
            whole_images=index.get("stored") == "arrays",
            title=f"{split} records of {directory.name}",
        )
        problems += damaged
        if not len(splits[split]):
            raise UserError(f"{directory} has no whole {split} record{_first(damaged)}. Copy the files there again.")
    warn_of_skipped(problems, f"records of {directory} are damaged and are skipped")
    return Dataset(name, tuple(index["class_names"]), splits["train"], splits["test"], problems)


def _first(problems: tuple[str, ...]) -> str:
    return f" ({problems[0]})" if problems else ""


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing. Copy it there again, or convert the dataset again to another directory.")
    size = path.stat().st_size
    if size > expected:
        raise UserError(f"{path} has {size} bytes, {INDEX} says {expected}: another file. Copy it there again.")
    if size < expected:
        logging.warning("%s is truncated: %d of %d bytes. Copy it there again.", path, size, expected)


def verify(directory: Path, advance: Callable[[int], object]) -> dict[str, Any]:
    """Compares every shard's size and SHA-256 with the index.

    Args:
        directory: where the converter has written to.
        advance: called with the bytes of each shard that has been read.

    Returns:
        The index.

    Raises:
        UserError: shards differ or are missing, all named; or the index is unusable.
    """
    index = read_index(directory)
    wrong = []
    for shard in index["shards"]:
        path = directory / shard["name"]
        if not path.is_file():
            wrong.append(f"{shard['name']} is missing")
        elif (size := path.stat().st_size) != shard["bytes"]:
            wrong.append(f"{shard['name']} has {size} bytes, must have {shard['bytes']}")
        elif (digest := files.sha256(path)) != shard["sha256"]:
            wrong.append(f"{shard['name']} has SHA-256 {digest[:16]}..., must be {shard['sha256'][:16]}...")
        advance(shard["bytes"])
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(index['shards'])} shards of {directory} are not as they were written: "
            f"{'; '.join(wrong)}. Copy them there again."
        )
    return index

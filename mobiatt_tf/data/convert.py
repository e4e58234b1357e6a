"""Any dataset to TFRecord shards with checksums, which `data.load` reads.

    python -m mobiatt_tf.data.convert --dataset=stamps --output_dir=runs/stamps_records
    python -m mobiatt_tf.data.convert --verify --output_dir=runs/stamps_records

A conversion that was stopped, in whatever way, goes on with the same command: whole shards are kept.
"""

import contextlib
import hashlib
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import tensorflow as tf
from absl import flags, logging

from mobiatt_tf import cli, files
from mobiatt_tf.data import converted
from mobiatt_tf.data.dataset import Dataset, Split
from mobiatt_tf.data.records import read_record
from mobiatt_tf.data.sources import load
from mobiatt_tf.errors import UserError, first_line

_SEED = 0  # of the order in which images are stored
_OVERHEAD_BYTES = 150  # of a record beside the pixels: checksums, label, name, the frame of a PNG file
_LEAST_MEGABYTES = 0.001  # already a shard for nearly every image

_DATASET = flags.DEFINE_string("dataset", None, "Name or directory of the dataset; see mobiatt_tf.data.load.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Where the shards are written, or lie (--verify).")
_SHARD_MEGABYTES = flags.DEFINE_float("shard_megabytes", 128, "About how large a shard becomes, in 10^6 bytes.")
_VERIFY = flags.DEFINE_bool("verify", False, "Compare size and SHA-256 of the shards in --output_dir, no more.")


@dataclass(frozen=True)
class _Plan:
    """The images of one shard.

    Attributes:
        name: of the file.
        split_name: "train" or "test".
        split: where they come from.
        indices: int64 [K], which of them, in this order.
        sizes: int64 [K], what `_sizes` says of them.
    """

    name: str
    split_name: str
    split: Split
    indices: np.ndarray
    sizes: np.ndarray


def convert(
    dataset: Dataset, output_dir: Path, shard_megabytes: float = 128, *, show_progress: bool = True
) -> dict[str, Any]:
    """Writes a dataset as TFRecord shards and index.json.

    A record is a tf.train.Example with the features of tensorflow-datasets' imagenet2012: `image` (the bytes of the
    image file as they are; arrays as PNG), `label` and `file_name`. Images are stored in a random order, always the
    same one. Those that cannot be read are left out, counted and named.

    Args:
        dataset: what to convert.
        output_dir: a new directory, or one in which the same conversion was stopped.
        shard_megabytes: about how large a shard becomes, in 10^6 bytes; finite, at least 0.001.
        show_progress: whether to draw a progress bar.

    Returns:
        The content of index.json: class names, whether the images were "files" or "arrays" (`stored`), and for each
        shard its name, split, number of records, bytes, SHA-256.

    Raises:
        UserError: the directory holds something else, another process is writing to it, or the disk is full.
        ValueError: `shard_megabytes` is outside what is allowed, or only one of the splits has arrays.
    """
    from tqdm import tqdm

    if not _is_allowed(shard_megabytes):
        raise ValueError(f"shard_megabytes must be finite and at least {_LEAST_MEGABYTES}, got {shard_megabytes}.")
    if dataset.train.whole_images != dataset.test.whole_images:
        raise ValueError(f"One split of {dataset.name} has arrays, the other one image files: both must have the same.")
    plans = [
        plan
        for name, split in (("train", dataset.train), ("test", dataset.test))
        for plan in _plan(name, split, shard_megabytes)
    ]
    conversion = {
        "format": converted.FORMAT,
        "version": converted.VERSION,
        "class_names": list(dataset.class_names),
        "stored": "arrays" if dataset.train.whole_images else "files",
        "source": {"shard_megabytes": shard_megabytes, "sha256": _fingerprint(plans)},
    }
    with _only_process(output_dir):
        done = _whole_shards(output_dir, conversion)
        for leftover in output_dir.glob(".*.partial.tfrecord"):
            leftover.unlink()
        total = sum(len(plan.indices) for plan in plans)
        kept = sum(len(plan.indices) for plan in plans if plan.name in done)
        with tqdm(
            desc=f"converting {dataset.name}", total=total, initial=kept, unit=" images", disable=not show_progress
        ) as progress:
            for plan in plans:
                if plan.name not in done:
                    done[plan.name] = _write_shard(output_dir, plan, dataset.class_names, progress.update)
                    files.write_json(output_dir / converted.UNFINISHED, {**conversion, "shards": list(done.values())})
        shards = [done[plan.name] for plan in plans]
        skipped = [*dataset.skipped, *(line for shard in shards for line in shard["skipped"])]
        index = {**conversion, "dataset": dataset.name, "skipped": skipped, "shards": shards}
        files.write_json(output_dir / converted.INDEX, index)
        (output_dir / converted.UNFINISHED).unlink(missing_ok=True)
    return index


def _is_allowed(shard_megabytes: float) -> bool:
    return math.isfinite(shard_megabytes) and shard_megabytes >= _LEAST_MEGABYTES


def _plan(name: str, split: Split, shard_megabytes: float) -> list[_Plan]:
    """Deals a split out to shards: the same for the same images, whatever is or is not written yet."""
    # NumPy promises that the raw stream of Philox stays as it is; it does not promise so for `permutation`.
    order = np.argsort(np.random.Philox(key=_SEED).random_raw(len(split)), kind="stable")
    sizes = _sizes(split)[order]
    stored = sizes + _OVERHEAD_BYTES
    shard_bytes = int(min(1e6 * shard_megabytes, 2.0**62))  # what fits into an int64
    shards = np.unique((np.cumsum(stored) - stored) // shard_bytes, return_inverse=True)[1]
    count = int(shards[-1]) + 1 if len(shards) else 0
    return [
        _Plan(f"{name}-{shard:05}-of-{count:05}.tfrecord", name, split, order[shards == shard], sizes[shards == shard])
        for shard in range(count)
    ]


def _sizes(split: Split) -> np.ndarray:
    """int64 [M], bytes: of files and records as they are, of arrays before they become PNG."""
    if split.records is not None:
        return split.records.length
    if split.images is not None:
        return np.full(len(split), split.images[0].nbytes if len(split) else 0, np.int64)
    return np.array([_size(file) for file in split.files or ()], np.int64)


def _size(file: str) -> int:
    try:
        return Path(file).stat().st_size
    except OSError:
        return 0  # left out when it cannot be read


def _fingerprint(plans: list[_Plan]) -> str:
    """SHA-256 over what goes into which shard: pixels, checksums of records, or names and sizes of files."""
    digest = hashlib.sha256()
    for plan in plans:
        chosen = plan.split.select(plan.indices)
        digest.update(f"{plan.name} {len(chosen)}\n".encode() + chosen.labels.tobytes())
        if chosen.images is not None:
            digest.update(str(chosen.images.shape).encode() + chosen.images.tobytes())
        elif chosen.records is not None:
            digest.update(chosen.records.fingerprint())
        else:
            for file, size in zip(chosen.files or (), plan.sizes, strict=True):
                digest.update(f"{Path(file).name} {size}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _only_process(directory: Path) -> Iterator[None]:
    """Keeps the directory to this process. The kernel frees the lock when the process ends, however it ends."""
    try:
        lock = files.take_lock(directory)
    except BlockingIOError:
        raise UserError(f"Another process is converting to {directory}. Wait for it, or stop it.") from None
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror}). Choose another --output_dir.") from error
    with lock:
        yield


def _whole_shards(directory: Path, conversion: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What an earlier call has written, by name: the shards that are in its index and still have their size.

    Raises:
        UserError: the directory holds something else.
    """
    path = next((directory / n for n in (converted.INDEX, converted.UNFINISHED) if (directory / n).exists()), None)
    if path is None:
        others = [entry.name for entry in directory.iterdir() if not entry.name.startswith(".")]
        unknown = [name for name in others if not name.endswith(".tfrecord")]
        if unknown:
            raise UserError(f"{directory} holds other files, such as {unknown[0]}. Choose another --output_dir.")
        return {}
    index = files.read_json(path)
    before = {"stored": converted.STORED[0], **index} if isinstance(index, dict) else {}
    before = {key: before.get(key) for key in conversion}
    if before != conversion:
        differing = ", ".join(key for key, value in conversion.items() if before.get(key) != value)
        raise UserError(
            f"{directory} holds another conversion ({differing} differ): other images, or another --shard_megabytes. "
            "Choose another --output_dir, or delete that one."
        )
    shards = {shard["name"]: shard for shard in index["shards"]}
    return {name: shard for name, shard in shards.items() if _size(str(directory / name)) == shard["bytes"]}


def _write_shard(
    directory: Path, plan: _Plan, class_names: tuple[str, ...], advance: Callable[[int], object]
) -> dict[str, Any]:
    """Writes one shard, whole or not at all; returns its entry in the index."""
    target = directory / plan.name
    skipped: list[str] = []
    records = 0
    with files.atomic_path(target) as temporary:
        try:
            with tf.io.TFRecordWriter(str(temporary)) as writer:
                for index in plan.indices.tolist():
                    try:
                        image, file_name = _encoded(plan.split, index)
                    except (OSError, tf.errors.OpError) as error:
                        skipped.append(f"{plan.split.name_of(index)}: {first_line(error)}")
                        logging.warning("Skipped %s", skipped[-1])
                        continue
                    finally:
                        advance(1)
                    writer.write(_example(image, int(plan.split.labels[index]), file_name))
                    records += 1
        except tf.errors.ResourceExhaustedError as error:
            raise UserError(
                f"No space left while writing {target}. Free some space and run the same command again: whole shards "
                "are kept."
            ) from error
        except tf.errors.OpError as error:
            reason = error.message.strip().splitlines()[0]
            raise UserError(
                f"{target} cannot be written ({reason}). Make room or give permission there and run the same command "
                "again: whole shards are kept."
            ) from error
        size, digest = temporary.stat().st_size, files.sha256(temporary)
    return {
        "name": plan.name,
        "split": plan.split_name,
        "records": records,
        "bytes": size,
        "sha256": digest,
        "skipped": skipped,
    }


def _encoded(split: Split, index: int) -> tuple[bytes, str]:
    """The image file of an example, and its name."""
    if split.images is not None:
        return tf.io.encode_png(split.images[index]).numpy(), f"{index}.png"
    if split.files is not None:
        return Path(split.files[index]).read_bytes(), Path(split.files[index]).name
    records = split.records
    assert records is not None
    data = read_record(tf.constant(records.files[records.file[index]]), tf.constant(records.offset[index]))
    features = tf.train.Example.FromString(data.numpy()).features.feature
    names = features["file_name"].bytes_list.value
    return features[records.image_key].bytes_list.value[0], names[0].decode() if names else records.name(index)


def _example(image: bytes, label: int, file_name: str) -> bytes:
    feature = {
        "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
        "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
        "file_name": tf.train.Feature(bytes_list=tf.train.BytesList(value=[file_name.encode()])),
    }
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString(deterministic=True)


def _verify(directory: Path) -> str:
    from tqdm import tqdm

    total = sum(shard["bytes"] for shard in converted.read_index(directory)["shards"])
    with tqdm(desc="verifying", total=total, unit="B", unit_scale=True) as progress:
        index = converted.verify(directory, progress.update)
    return f"{len(index['shards'])} shards, {total:,} bytes in {directory}: all as they were written."


def _stop(number: int, _: FrameType | None) -> NoReturn:
    """Ends the process through all `finally` blocks, so that no temporary file stays."""
    print(f"{signal.Signals(number).name}: whole shards are kept, the same command goes on.", file=sys.stderr)
    sys.exit(128 + number)  # the shell's convention: 143 for SIGTERM, 130 for Ctrl-C


def check_flags(dataset: str | None, output_dir: str | None, shard_megabytes: float, verify: bool) -> None:
    """Raises UserError for values of the flags that do not go together or are not allowed."""
    if not output_dir:
        raise UserError("Give --output_dir: where the shards are written, or with --verify where they lie.")
    if verify and dataset:
        raise UserError("--verify looks at --output_dir alone: give --verify or --dataset, not both.")
    if not verify and not dataset:
        raise UserError("Give --dataset: a name or directory that training takes, or --verify.")
    if not _is_allowed(shard_megabytes):
        raise UserError(f"--shard_megabytes={shard_megabytes}: it must be finite and at least {_LEAST_MEGABYTES}.")


def main(_: Sequence[str]) -> None:
    """The command line."""
    check_flags(_DATASET.value, _OUTPUT_DIR.value, _SHARD_MEGABYTES.value, _VERIFY.value)
    directory = files.user_path(_OUTPUT_DIR.value)
    if _VERIFY.value:
        print(_verify(directory))
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    index = convert(load(_DATASET.value), directory, _SHARD_MEGABYTES.value)
    counts = {
        split: sum(shard["records"] for shard in index["shards"] if shard["split"] == split)
        for split in ("train", "test")
    }
    print(
        f"{counts['train']:,} training and {counts['test']:,} test images in {len(index['shards'])} shards, "
        f"{len(index['skipped'])} skipped. Train with --dataset={directory}"
    )


if __name__ == "__main__":
    cli.run(main)

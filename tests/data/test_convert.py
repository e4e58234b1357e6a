"""The converter as a process: killed, stopped, out of space, run twice; and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from mobiatt_tf import data, files
from mobiatt_tf.data import converted, records
from mobiatt_tf.data.convert import check_flags, convert
from mobiatt_tf.errors import UserError
from tests.data.conftest import make_image
from tests.processes import largest_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def dataset() -> data.Dataset:
    """60 + 20 arrays: pixels tell which is which."""
    images = np.stack([make_image(i, 24, 24) for i in range(80)])
    labels = (np.arange(80) % 4).astype(np.int32)
    return data.Dataset(
        "blocks", tuple("abcd"), data.Split(labels[:60], images[:60]), data.Split(labels[60:], images[60:])
    )


def shard_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.startswith(".")}


def test_arrays_become_png_bit_by_bit(dataset: data.Dataset, tmp_path: Path) -> None:
    index = convert(dataset, tmp_path / "out", 0.02, show_progress=False)
    assert sum(shard["records"] for shard in index["shards"]) == 80
    assert len(index["shards"]) >= 4
    found = data.load(str(tmp_path / "out"), tmp_path / "cache")
    for before, after in ((dataset.train, found.train), (dataset.test, found.test)):
        read = records.image_bytes(after)
        pixels = [tf.io.decode_image(read(tf.constant(i, tf.int64))).numpy().tobytes() for i in range(len(after))]
        expected = zip([image.tobytes() for image in before.images], before.labels.tolist(), strict=True)
        assert sorted(zip(pixels, after.labels.tolist(), strict=True)) == sorted(expected)
    first = [found.train.labels[:20].tolist(), found.train.labels[20:40].tolist()]
    assert all(set(labels) == {0, 1, 2, 3} for labels in first)  # shuffled: a few records have every class


@pytest.mark.parametrize("size", [(8, 8), (20, 14), (6, 6)])
def test_converted_arrays_show_the_same_pictures(size: tuple[int, int], tmp_path: Path) -> None:
    digits = data.load("digits")
    digits = data.Dataset("digits", digits.class_names, digits.train.take(40), digits.test.take(10))
    assert convert(digits, tmp_path / "once", show_progress=False)["stored"] == "arrays"
    once = data.load(str(tmp_path / "once"), tmp_path / "cache")
    assert convert(once, tmp_path / "twice", show_progress=False)["stored"] == "arrays"
    for directory in (tmp_path / "once", tmp_path / "twice"):
        found = data.load(str(directory), tmp_path / "cache")
        for name, before, stored in (("train", digits.train, found.train), ("test", digits.test, found.test)):
            order = [int(file_name.removesuffix(".png")) for file_name in file_names(next(directory.glob(f"{name}-*")))]
            after = stored.select(np.argsort(order))  # in the order of the arrays
            pairs = [
                tuple(data.test_batches(split, image_size=size, batch_size=7) for split in (before, after)),
                tuple(
                    data.train_batches(split, image_size=size, batch_size=5, seed=1, epoch=0, augmentation="none")
                    for split in (before, after)
                ),
            ]
            for expected, shown in pairs:
                for (images, labels), (other_images, other_labels) in zip(expected, shown, strict=True):
                    np.testing.assert_allclose(images, other_images, rtol=0, atol=1e-3)
                    np.testing.assert_array_equal(labels, other_labels)


def test_converted_files_show_their_centre(file_split: data.Split, tmp_path: Path) -> None:
    labels = np.zeros(1, np.int32)  # one image: there is one order
    split = data.Split(labels, files=file_split.files[:1])
    assert convert(data.Dataset("f", ("a",), split, split), tmp_path / "out", show_progress=False)["stored"] == "files"
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    ((expected, _),) = data.test_batches(split, image_size=(16, 16), batch_size=1)

    def assert_shown() -> None:
        found = data.load(str(tmp_path / "out"), tmp_path / "cache")
        ((shown, _),) = data.test_batches(found.test, image_size=(16, 16), batch_size=1)
        np.testing.assert_array_equal(expected, shown)

    assert_shown()
    del index["stored"]  # as older versions wrote it
    (tmp_path / "out" / "index.json").write_text(json.dumps(index))
    assert_shown()
    index["stored"] = "clay"
    (tmp_path / "out" / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index.json is damaged \(ValueError\('clay'\)\)"):
        data.load(str(tmp_path / "out"), tmp_path / "cache")


def test_arrays_and_files_are_not_mixed(dataset: data.Dataset, file_split: data.Split, tmp_path: Path) -> None:
    test = data.Split(np.zeros(13, np.int32), files=file_split.files)
    with pytest.raises(ValueError, match=r"One split of mixed has arrays, the other one image files"):
        convert(data.Dataset("mixed", tuple("abcd"), dataset.train, test), tmp_path / "out", show_progress=False)


def file_names(shard: Path) -> list[str]:
    """Of the records of a shard, in their order."""
    features = [tf.train.Example.FromString(record.numpy()).features for record in tf.data.TFRecordDataset(str(shard))]
    return [each.feature["file_name"].bytes_list.value[0].decode() for each in features]


def test_the_schema_is_that_of_imagenet2012(dataset: data.Dataset, tmp_path: Path) -> None:
    convert(dataset, tmp_path / "out", show_progress=False)
    (shard,) = (tmp_path / "out").glob("train-*")
    assert shard.name == "train-00000-of-00001.tfrecord"
    schema = {
        "image": tf.io.FixedLenFeature([], tf.string),
        "label": tf.io.FixedLenFeature([], tf.int64),
        "file_name": tf.io.FixedLenFeature([], tf.string),
    }
    names = set()
    for record in tf.data.TFRecordDataset(str(shard)):
        parsed = tf.io.parse_single_example(record, schema)
        number = int(parsed["file_name"].numpy().decode().removesuffix(".png"))
        np.testing.assert_array_equal(tf.io.decode_png(parsed["image"]), dataset.train.images[number])
        assert parsed["label"] == dataset.train.labels[number]
        names.add(number)
    assert names == set(range(60))


def test_the_index_describes_the_shards(dataset: data.Dataset, tmp_path: Path) -> None:
    returned = convert(dataset, tmp_path / "out", 0.02, show_progress=False)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index == returned
    assert index["class_names"] == list("abcd")
    assert sorted(shard["name"] for shard in index["shards"]) == sorted(p.name for p in (tmp_path / "out").glob("t*"))
    for shard in index["shards"]:
        path = tmp_path / "out" / shard["name"]
        assert (path.stat().st_size, files.sha256(path)) == (shard["bytes"], shard["sha256"])
        assert len(list(tf.data.TFRecordDataset(str(path)))) == shard["records"]


def test_twice_is_once_and_the_same_anywhere(dataset: data.Dataset, tmp_path: Path) -> None:
    convert(dataset, tmp_path / "a", 0.02, show_progress=False)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*.tfrecord")}
    convert(dataset, tmp_path / "a", 0.02, show_progress=False)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    convert(dataset, tmp_path / "b", 0.02, show_progress=False)
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")


def test_shards_of_shards(dataset: data.Dataset, tmp_path: Path) -> None:
    convert(dataset, tmp_path / "a", 0.02, show_progress=False)
    once = data.load(str(tmp_path / "a"), tmp_path / "cache")
    convert(once, tmp_path / "b", 1, show_progress=False)
    twice = data.load(str(tmp_path / "b"), tmp_path / "cache")
    assert sorted(once.train.records.checksum.tolist()) == sorted(twice.train.records.checksum.tolist())


def test_an_image_that_vanishes_is_skipped_and_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        path.write_bytes(tf.io.encode_png(make_image(i)).numpy())
    labels = np.zeros(3, np.int32)
    splits = [data.Split(labels, files=tuple(map(str, part))) for part in (paths[:3], paths[3:])]
    paths[1].unlink()
    index = convert(data.Dataset("files", ("a",), *splits), tmp_path / "out", show_progress=False)
    (line,) = index["skipped"]
    assert line.startswith(f"{paths[1]}: ")
    assert "No such file" in line
    assert len(data.load(str(tmp_path / "out"), tmp_path / "cache").train) == 2


def test_another_conversion_is_not_mixed_in(dataset: data.Dataset, tmp_path: Path) -> None:
    convert(dataset, tmp_path / "out", 0.02, show_progress=False)
    with pytest.raises(UserError, match=r"holds another conversion \(source differ\)"):
        convert(dataset, tmp_path / "out", 0.03, show_progress=False)
    fewer = data.Dataset("blocks", tuple("abcd"), dataset.train.take(59), dataset.test)
    with pytest.raises(UserError, match="another conversion"):
        convert(fewer, tmp_path / "out", 0.02, show_progress=False)


def test_other_files_are_left_alone(dataset: data.Dataset, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files, such as notes.txt"):
        convert(dataset, tmp_path, show_progress=False)


@pytest.mark.parametrize("value", [0, float("nan"), float("inf"), 1e-7])
def test_the_size_of_shards_is_checked(value: float, dataset: data.Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"--shard_megabytes={value}: it must be finite and at least 0\.001"):
        check_flags("digits", str(tmp_path), value, verify=False)
    with pytest.raises(ValueError, match=rf"shard_megabytes must be finite and at least 0\.001, got {value}"):
        convert(dataset, tmp_path, value, show_progress=False)


@pytest.mark.parametrize(("value", "shards"), [(0.001, 80), (1e300, 2)])
def test_any_allowed_size_of_shards_works(value: float, shards: int, dataset: data.Dataset, tmp_path: Path) -> None:
    check_flags("digits", str(tmp_path), value, verify=False)
    assert len(convert(dataset, tmp_path, value, show_progress=False)["shards"]) == shards


def test_verify_and_dataset_are_not_given_together(tmp_path: Path) -> None:
    check_flags(None, str(tmp_path), 128, verify=True)
    with pytest.raises(UserError, match=r"give --verify or --dataset, not both"):
        check_flags("digits", str(tmp_path), 128, verify=True)


def test_verify_says_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"There is no directory {tmp_path / 'no'}\."):
        converted.verify(tmp_path / "no", lambda read: None)
    with pytest.raises(UserError, match=r"has neither index\.json nor TFRecord files"):
        converted.verify(tmp_path, lambda read: None)
    (tmp_path / "a.tfrecord").touch()
    with pytest.raises(UserError, match=r"has TFRecord files but no index\.json"):
        converted.verify(tmp_path, lambda read: None)


def test_a_full_disk_is_one_clear_error(dataset: data.Dataset, tmp_path: Path) -> None:
    with (
        largest_file(1000),
        pytest.raises(UserError, match=r"train-00000-of-\d+.tfrecord cannot be written .*whole sh"),
    ):
        convert(dataset, tmp_path / "out", 0.02, show_progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    convert(dataset, tmp_path / "out", 0.02, show_progress=False)
    convert(dataset, tmp_path / "b", 0.02, show_progress=False)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "b")


def command(*arguments: str, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "MOBIATT_CACHE": str(cache), "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "mobiatt_tf.data.convert", *arguments]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """400 noisy PNG files of 60 kB in two classes: enough to be in the middle of."""
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(200):
            image = generator.integers(0, 256, (140, 140, 3), np.uint8)
            (tmp_path / "photos" / name / f"{i}.png").write_bytes(tf.io.encode_png(image).numpy())
    return tmp_path / "photos"


@pytest.mark.slow
def test_a_killed_and_a_stopped_converter_go_on(photos: Path, tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    arguments = [f"--dataset={photos}", f"--output_dir={out}", "--shard_megabytes=0.2"]

    def interrupted(shards: int, number: int) -> str:
        """Starts the converter, sends it a signal once so many shards are there; returns its standard error."""
        process = command(*arguments, cache=cache)
        while process.poll() is None and len(list(out.glob("*.tfrecord"))) < shards:
            time.sleep(0.001)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), errors
        assert not (out / "index.json").exists()
        return errors

    interrupted(3, signal.SIGKILL)
    with pytest.raises(UserError, match=r"not finished\. Run the same command again"):
        data.load(str(out), cache)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tfrecord")}
    listed = {out / shard["name"] for shard in files.read_json(out / "index.unfinished.json")["shards"]}
    assert len(listed) >= 2
    assert listed <= set(kept)

    errors = interrupted(len(kept) + 3, signal.SIGTERM)
    assert "converting" in errors  # the progress bar
    assert "SIGTERM: whole shards are kept, the same command goes on." in errors
    assert not list(out.glob(".*.partial.tfrecord"))
    assert {path: path.stat().st_mtime_ns for path in listed} == {path: kept[path] for path in listed}

    convert(data.load(str(photos), cache), out, 0.2, show_progress=False)
    assert {path: path.stat().st_mtime_ns for path in listed} == {path: kept[path] for path in listed}

    convert(data.load(str(photos), cache), tmp_path / "b", 0.2, show_progress=False)
    assert shard_bytes(out) == shard_bytes(tmp_path / "b")


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "digits"

    def run(*arguments: str) -> tuple[int | None, str, str]:
        process = command(*arguments, f"--output_dir={out}", cache=tmp_path / "cache")
        printed, errors = process.communicate(timeout=120)
        return process.returncode, printed, errors.strip().splitlines()[-1] if errors.strip() else ""

    status, printed, _ = run("--dataset=digits", "--shard_megabytes=0.1")
    assert status == 0
    assert printed.startswith("1,442 training and 355 test images in ")
    assert len(converted.verify(out, lambda read: None)["shards"]) >= 3

    path = next(iter(out.glob("train-*")))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"1 of \d+ shards .*: {path.name} has SHA-256 "):
        converted.verify(out, lambda read: None)

    path.write_bytes(content[:-5])
    next(iter(out.glob("test-*"))).unlink()
    status, _, error = run("--verify")
    assert status == 1
    assert error.startswith("error: 2 of ")
    assert "test-00000-of-00001.tfrecord is missing" in error
    assert f"{path.name} has {len(content) - 5} bytes, must have {len(content)}" in error


def test_two_processes_do_not_write_to_one_directory(dataset: data.Dataset, tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()",
            str(tmp_path / ".lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    with pytest.raises(UserError, match="Another process is converting"):
        convert(dataset, tmp_path, show_progress=False)
    holder.communicate(b"\n")
    convert(dataset, tmp_path, show_progress=False)

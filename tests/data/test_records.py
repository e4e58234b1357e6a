"""TFRecord shards: the same images as the folder they came from, in an exact order; damage is skipped and named."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mobiatt_tf import data, files
from mobiatt_tf.data import records
from mobiatt_tf.data.convert import convert
from mobiatt_tf.errors import UserError
from tests.data.conftest import make_image

Load = Callable[[Path], data.Dataset]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of two classes in the layout of ImageNet: 22 JPEG and PNG files to train on, 8 to test on."""
    root = tmp_path / "photos"
    for split, count in (("train", 11), ("val", 4)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(make_image(100 * label + i, 30 + 2 * i, 50 - i))
                image.save(root / split / name / f"{name}_{i}.{'png' if i % 3 == 0 else 'JPEG'}")
    return root


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return lambda root: data.load(str(root), tmp_path / "cache")


@pytest.fixture
def shards(folder: Path, load: Load, tmp_path: Path) -> Path:
    """The folder, converted to shards of about 10 kB."""
    convert(load(folder), tmp_path / "shards", 0.01, show_progress=False)
    return tmp_path / "shards"


def contents(split: data.Split) -> list[bytes]:
    read = records.image_bytes(split)
    return [read(tf.constant(i, tf.int64)).numpy() for i in range(len(split))]


def test_the_same_images_and_labels_as_the_folder(folder: Path, shards: Path, load: Load) -> None:
    expected, found = load(folder), load(shards)
    assert found.class_names == expected.class_names == ("cat", "dog")
    assert found.skipped == ()
    assert found.name == str(shards)
    for a, b in ((expected.train, found.train), (expected.test, found.test)):
        pairs = zip(contents(a), a.labels.tolist(), strict=True), zip(contents(b), b.labels.tolist(), strict=True)
        assert sorted(pairs[0]) == sorted(pairs[1])
    assert len(set(found.train.records.file.tolist())) > 1  # several shards


@pytest.mark.parametrize("augmentation", ["none", "flip_crop", "resized_crop"])
def test_batches_are_those_of_files_in_the_same_order(
    folder: Path, shards: Path, load: Load, augmentation: str
) -> None:
    from_files, from_records = load(folder).train, load(shards).train
    where = {content: i for i, content in enumerate(contents(from_files))}
    from_files = from_files.select(np.array([where[content] for content in contents(from_records)]))
    options = {"image_size": (16, 16), "batch_size": 5, "seed": 3, "epoch": 1, "augmentation": augmentation}
    steps = 0
    for (images_a, labels_a), (images_b, labels_b) in zip(
        data.train_batches(from_files, **options), data.train_batches(from_records, **options), strict=True
    ):
        np.testing.assert_array_equal(images_a, images_b)
        np.testing.assert_array_equal(labels_a, labels_b)
        steps += 1
    assert steps == 4
    for a, b in zip(
        data.test_batches(from_files, image_size=(16, 16), batch_size=8),
        data.test_batches(from_records, image_size=(16, 16), batch_size=8),
        strict=True,
    ):
        np.testing.assert_array_equal(a[0], b[0])


def test_names_selection_and_fingerprint(shards: Path, load: Load, tmp_path: Path) -> None:
    split = load(shards).train
    last = len(split) - 1
    assert split.name_of(0) == f"{Path(split.records.files[0]).name}:0"
    chosen = split.select(np.array([last, 0]))
    assert [chosen.name_of(0), chosen.name_of(1)] == [split.name_of(last), split.name_of(0)]
    assert contents(chosen) == [contents(split)[last], contents(split)[0]]
    assert data.step_names(split, 4, 0, 0, 0)[0].startswith("train-")

    shards.rename(tmp_path / "moved")
    assert load(tmp_path / "moved").train.records.fingerprint() == split.records.fingerprint()
    assert chosen.records.fingerprint() != split.select(np.array([0, last])).records.fingerprint()


def biggest(shards: Path) -> dict[str, object]:
    """The index's entry of the training shard with most records."""
    index = files.read_json(shards / "index.json")
    return max((s for s in index["shards"] if s["split"] == "train"), key=lambda shard: shard["records"])


def starts(path: Path) -> list[int]:
    """Where the records of a file start, and its length."""
    content, places = path.read_bytes(), [0]
    while places[-1] < len(content):
        places.append(places[-1] + 16 + struct.unpack_from("<Q", content, places[-1])[0])
    return places


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def test_a_flipped_byte_loses_one_record(shards: Path, load: Load, caplog: pytest.LogCaptureFixture) -> None:
    whole = load(shards)
    whole_contents = contents(whole.train)
    name = biggest(shards)["name"]
    flip(shards / name, starts(shards / name)[1] + 300)
    damaged = load(shards)
    assert damaged.skipped == (f"{name}:1: its data do not have the checksum that the file states",)
    expected = [whole.train.name_of(i) for i in range(len(whole.train))]
    expected.remove(f"{name}:1")
    assert [damaged.train.name_of(i) for i in range(len(damaged.train))] == expected
    assert f"1 records of {shards} are damaged and are skipped" in caplog.text
    assert contents(damaged.train) == [
        content for i, content in enumerate(whole_contents) if whole.train.name_of(i) != f"{name}:1"
    ]


def test_a_truncated_shard_loses_its_tail(shards: Path, load: Load, caplog: pytest.LogCaptureFixture) -> None:
    whole = load(shards)
    shard = biggest(shards)
    path, count = shards / shard["name"], shard["records"]
    assert count >= 3
    os.truncate(path, starts(path)[count - 2] + 20)  # within the last but one
    damaged = load(shards)
    reason = "lost, the file is truncated"
    assert damaged.skipped == tuple(f"{path.name}:{i}: {reason}" for i in (count - 2, count - 1))
    assert len(damaged.train) == len(whole.train) - 2
    assert "is truncated:" in caplog.text


def test_a_shard_cut_between_two_records_loses_its_tail(shards: Path, load: Load) -> None:
    path = shards / biggest(shards)["name"]
    os.truncate(path, starts(path)[-2])
    (line,) = load(shards).skipped
    assert line == f"{path.name}:{biggest(shards)['records'] - 1}: lost, the file ends before it"


def test_a_damaged_length_loses_what_follows(shards: Path, load: Load) -> None:
    shard = biggest(shards)
    flip(shards / shard["name"], starts(shards / shard["name"])[1])
    lost = load(shards).skipped
    assert len(lost) == shard["records"] - 1
    assert lost[0] == f"{shard['name']}:1: lost, the length of a record is damaged"


def test_a_shard_of_the_wrong_size_is_an_error(shards: Path, load: Load) -> None:
    path = shards / biggest(shards)["name"]
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(UserError, match=rf"{path.name} has \d+ bytes, index.json says \d+: another file"):
        load(shards)


def test_a_missing_shard_is_an_error(shards: Path, load: Load) -> None:
    path = shards / biggest(shards)["name"]
    path.unlink()
    with pytest.raises(UserError, match=rf"{path.name} is missing. Copy it"):
        load(shards)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "was not written by this program's converter"),
        ('{"format": "mobiatt-tf records", "version": 2}', "has version 2; this program reads 1"),
        ('{"format": "mobiatt-tf records", "version": 1, "shards": [{}]}', "is damaged"),
        ('{"format": "mobiatt-tf rec', "is not valid JSON"),
        (None, "TFRecord files but no index.json"),
    ],
    ids=["foreign", "later version", "incomplete", "cut off", "none"],
)
def test_a_wrong_index_is_an_error(shards: Path, load: Load, content: str | None, message: str) -> None:
    (shards / "index.json").unlink()
    if content is not None:
        (shards / "index.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load(shards)


def test_a_foreign_index_beside_class_folders_is_no_index(folder: Path, load: Load) -> None:
    (folder / "index.json").write_text('{"made by": "something else"}')
    assert len(load(folder).train) == 22


def test_no_whole_record_is_an_error(shards: Path, load: Load) -> None:
    for path in shards.glob("test-*.tfrecord"):
        os.truncate(path, 5)
    with pytest.raises(UserError, match=r"no whole test record \(test-00000-of-.*:0: lost, the file is truncated\)"):
        load(shards)


def test_what_was_found_is_kept_until_the_file_changes(shards: Path, load: Load) -> None:
    load(shards)
    path = shards / biggest(shards)["name"]
    before = path.stat()
    flip(path, starts(path)[1] + 300)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    split = load(shards).train  # by size and time it is the same file
    with pytest.raises(tf.errors.DataLossError):  # but no damaged image gets through
        for _ in data.test_batches(split, image_size=(8, 8), batch_size=4):
            pass
    os.utime(path)
    assert len(load(shards).train) == len(split) - 1


def write(path: Path, examples: list[bytes]) -> Path:
    with tf.io.TFRecordWriter(str(path)) as writer:
        for each in examples:
            writer.write(each)
    return path


def example(image: list[bytes] | None = None, label: list[int] | None = None) -> bytes:
    image = [tf.io.encode_png(make_image(0, 8, 8)).numpy()] if image is None else image
    feature = {
        "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=image)),
        "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[1] if label is None else label)),
    }
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def test_whole_records_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    jpeg = tf.io.encode_jpeg(make_image(1, 40, 40)).numpy()
    bad = [
        (example(image=[jpeg[:-400]]), "truncated or damaged JPEG data"),
        (example(image=[b"nothing of the kind"]), "not a JPEG, PNG, GIF, BMP or WebP image"),
        (example(image=[]), "must have one image and one label, has 0 and 1"),
        (example(label=[]), "must have one image and one label, has 1 and 0"),
        (example(label=[2]), "its label is 2, must be from 0 to 1"),
        (example(label=[-1]), "its label is -1, must be from 0 to 1"),
        (b"\xff\xff\xff", "its data are no tf.train.Example"),
    ]
    path = write(tmp_path / "a.tfrecord", [example(), *(record for record, _ in bad), example()])
    split, problems = records.split_of_shards([records.Shard(path)], 2, tmp_path)
    assert problems == tuple(f"a.tfrecord:{i}: {reason}" for i, (_, reason) in enumerate(bad, 1))
    assert [split.name_of(i) for i in range(len(split))] == ["a.tfrecord:0", f"a.tfrecord:{len(bad) + 1}"]


@settings(max_examples=60)
@given(st.data())
def test_any_damage_costs_only_what_it_hit(tmp_path_factory: pytest.TempPathFactory, choose: st.DataObject) -> None:
    """Against a model that knows where the damage was done."""
    directory = tmp_path_factory.mktemp("damage")
    count = choose.draw(st.integers(1, 6), "count")
    images = [tf.io.encode_png(make_image(i, 4 + 3 * i, 9)).numpy() for i in range(count)]
    path = write(directory / "a.tfrecord", [example([image], [i]) for i, image in enumerate(images)])
    begin = starts(path)
    place = choose.draw(st.integers(0, begin[-1] - 1), "place")
    hit = next(i for i in range(count) if begin[i + 1] > place)
    if choose.draw(st.booleans(), "truncate"):
        os.truncate(path, place)
        kept = list(range(hit))
    else:
        flip(path, place)
        in_length = place - begin[hit] < 12
        kept = [i for i in range(count) if i < hit or (i > hit and not in_length)]
    split, problems = records.split_of_shards([records.Shard(path, count)], count, directory)
    assert split.labels.tolist() == kept
    assert contents(split) == [images[i] for i in kept]
    assert [int(line.split(":")[1]) for line in problems] == [i for i in range(count) if i not in kept]

"""Datasets of tensorflow-datasets: the real imagenet2012 builder on small tar files, and what it takes and refuses."""

import io
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sklearn.datasets import load_sample_images

from mobiatt_tf import data
from mobiatt_tf.data import records
from mobiatt_tf.errors import UserError

SYNSETS = ("n01440764", "n01443537", "n15075141")  # labels 0, 1 and 999


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


def photographs(count: int, seed: int) -> list[bytes]:
    """JPEG files: random parts of two real photographs."""
    generator = np.random.default_rng(seed)
    contents = []
    for i in range(count):
        top, left = generator.integers(0, 300), generator.integers(0, 500)
        buffer = io.BytesIO()
        part = load_sample_images().images[i % 2][top : top + 90 + i, left : left + 120]
        Image.fromarray(part).save(buffer, "JPEG")
        contents.append(buffer.getvalue())
    return contents


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_ilsvrc(manual: Path) -> tuple[dict[bytes, int], list[bytes]]:
    """The two tar files as image-net.org has them, with few images; returns training images and labels, test images."""
    manual.mkdir(parents=True)
    train: dict[bytes, int] = {}
    archives = {}
    for label, synset in zip((0, 1, 999), SYNSETS, strict=True):
        members = {f"{synset}_{i}.JPEG": content for i, content in enumerate(photographs(5, label))}
        train |= dict.fromkeys(members.values(), label)
        archives[f"{synset}.tar"] = tar(members)
    (manual / "ILSVRC2012_img_train.tar").write_bytes(tar(archives))
    test = photographs(4, 7)
    names = [f"ILSVRC2012_val_{i:08}.JPEG" for i in range(1, 5)]
    (manual / "ILSVRC2012_img_val.tar").write_bytes(tar(dict(zip(names, test, strict=True))))
    return train, test


def contents(split: data.Split) -> list[bytes]:
    read = records.image_bytes(split)
    return [read(tf.constant(i, tf.int64)).numpy() for i in range(len(split))]


@pytest.mark.slow
def test_imagenet2012(data_dir: Path, tmp_path: Path) -> None:
    train, test = write_ilsvrc(data_dir / "downloads" / "manual")
    dataset = data.load("tfds:imagenet2012", tmp_path / "cache")
    assert dataset.name == "tfds:imagenet2012"
    assert len(dataset.class_names) == 1000
    assert [dataset.class_names[label] for label in (0, 1, 999)] == list(SYNSETS)
    assert dataset.skipped == ()
    assert dict(zip(contents(dataset.train), dataset.train.labels.tolist(), strict=True)) == train

    # The first labels of the ILSVRC 2012 development kit: n01751748, n09193705, n02105855, n04263257.
    found = dict(zip(contents(dataset.test), dataset.test.labels.tolist(), strict=True))
    assert [dataset.class_names[found[image]] for image in test] == ["n01751748", "n09193705", "n02105855", "n04263257"]
    options = {"image_size": (32, 32), "batch_size": 5, "seed": 0, "epoch": 0, "augmentation": "resized_crop"}
    assert len(list(data.train_batches(dataset.train, **options))) == 3

    # Prepared once; from now on the tar files are not needed.
    for archive in (data_dir / "downloads" / "manual").iterdir():
        archive.unlink()
    again = data.load("tfds:imagenet2012", tmp_path / "cache")
    assert again.train.records.fingerprint() == dataset.train.records.fingerprint()

    path = Path(dataset.train.records.files[0])
    os.truncate(path, path.stat().st_size - 10)
    damaged = data.load("tfds:imagenet2012", tmp_path / "cache")
    assert damaged.skipped == (f"{path.name}:14: lost, the file is truncated",)
    assert len(damaged.train) == 14


def test_imagenet_without_its_tar_files_says_which_go_where(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        data.load("tfds:imagenet2012", tmp_path)
    message = str(caught.value)
    assert f"put both into {data_dir / 'downloads' / 'manual'};" in message
    assert "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar are missing" in message
    assert "https://image-net.org/download-images" in message

    (data_dir / "downloads" / "manual").mkdir(parents=True)
    (data_dir / "downloads" / "manual" / "ILSVRC2012_img_train.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"; ILSVRC2012_img_val\.tar is missing"):
        data.load("tfds:imagenet2012", tmp_path)


def test_an_unknown_name(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match='tensorflow-datasets has no dataset "no_such_data"'):
        data.load("tfds:no_such_data", tmp_path)


@pytest.mark.parametrize("missing", ["tensorflow_datasets", "importlib_resources"])
def test_without_tensorflow_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match="Run `pip install tensorflow-datasets importlib_resources`"):
        data.load("tfds:imagenet2012", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("splits", [("train",), ("train", "test"), ("train", "test", "validation")], ids="/".join)
def test_other_names_of_features_and_splits(data_dir: Path, tmp_path: Path, splits: tuple[str, ...]) -> None:
    """Written by tensorflow-datasets; without a test split a fifth of each class is held out."""
    import tensorflow_datasets as tfds

    pictures = photographs(20, 3)
    examples = [{"picture": Image.open(io.BytesIO(p)), "kind": i % 2, "id": str(i)} for i, p in enumerate(pictures)]
    features = tfds.features.FeaturesDict(
        {
            "picture": tfds.features.Image(encoding_format="png"),
            "kind": tfds.features.ClassLabel(names=["odd", "even"]),
            "id": tfds.features.Text(),
        }
    )
    arrays = [{**each, "picture": np.asarray(each["picture"])} for each in examples]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="toy",
        version="1.0.0",
        data_dir=data_dir,
        features=features,
        split_datasets={split: list(enumerate(arrays))[i : 20 - i] for i, split in enumerate(splits)},
    )
    dataset = data.load("tfds:toy", tmp_path / "cache")
    assert dataset.class_names == ("odd", "even")
    sizes = {1: (16, 4), 2: (20, 18), 3: (20, 16)}[len(splits)]
    assert (len(dataset.train), len(dataset.test)) == sizes
    expected = {each["picture"].tobytes(): each["kind"] for each in arrays}
    for split in (dataset.train, dataset.test):
        for content, label in zip(contents(split), split.labels.tolist(), strict=True):
            assert expected[tf.io.decode_image(content).numpy().tobytes()] == label


@pytest.mark.slow
@pytest.mark.parametrize(
    ("labels", "file_format", "message"),
    [(0, "tfrecord", "has 0 ClassLabel features"), (1, "array_record", "as array_record; only tfrecord is read")],
)
def test_what_is_not_read(data_dir: Path, tmp_path: Path, labels: int, file_format: str, message: str) -> None:
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Image(shape=(4, 4, 3)), "number": tfds.features.Scalar(np.int64)}
    example = {"image": np.zeros((4, 4, 3), np.uint8), "number": 1}
    if labels:
        features["label"], example["label"] = tfds.features.ClassLabel(num_classes=2), 1
    tfds.dataset_builders.store_as_tfds_dataset(
        name="other",
        version="1.0.0",
        data_dir=data_dir,
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": [(i, example) for i in range(4)]},
        file_format=file_format,
    )
    with pytest.raises(UserError, match=message):
        data.load("tfds:other", tmp_path)

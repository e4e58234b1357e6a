"""Toy splits whose pixels tell which example they are, image files written by Pillow, and the real datasets."""

import functools
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobiatt_tf import data
from mobiatt_tf.errors import UserError


def make_image(index: int, height: int = 20, width: int = 24) -> np.ndarray:
    """uint8 [height, width, 3]: random blocks, others for every index."""
    blocks = np.random.default_rng(index).integers(0, 256, (-(-height // 4), -(-width // 4), 3), np.uint8)
    return blocks.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]


@pytest.fixture
def array_split() -> data.Split:
    """13 RGB images in memory; the label of each is its index."""
    return data.Split(np.arange(13, dtype=np.int32), np.stack([make_image(i) for i in range(13)]))


@pytest.fixture
def file_split(tmp_path: Path) -> data.Split:
    """13 files, JPEG and PNG, of different sizes; the label of each is its index."""
    paths = []
    for index in range(13):
        paths.append(tmp_path / f"{index}.{'png' if index % 3 == 0 else 'jpg'}")
        Image.fromarray(make_image(index, 20 + 3 * index, 40 - 2 * index)).save(paths[-1])
    return data.Split(np.arange(13, dtype=np.int32), files=tuple(map(str, paths)))


@pytest.fixture(params=["arrays", "files"])
def split(request: pytest.FixtureRequest) -> data.Split:
    return request.getfixturevalue("array_split" if request.param == "arrays" else "file_split")


@pytest.fixture(scope="session")
def network_works(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], bool]:
    """Asks for a network without the code under test, in both ways by which that downloads."""

    @functools.cache
    def ask() -> bool:
        command = ["apt-get", "-qq", "-o", "Acquire::Retries=0", "download", "dataset-fashion-mnist"]
        try:
            if subprocess.run(command, cwd=tmp_path_factory.mktemp("network"), capture_output=True).returncode == 0:
                return True
        except OSError:
            pass  # not Debian
        try:
            address = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/t10k-labels-idx1-ubyte.gz"
            with urllib.request.urlopen(address, timeout=10):
                return True
        except OSError:
            return False

    return ask


@pytest.fixture(scope="session")
def load_real(network_works: Callable[[], bool]) -> Callable[[str], data.Dataset]:
    """`data.load` with the user's own cache. Skips the test if that fails and there is no network at all."""

    def load(name: str) -> data.Dataset:
        try:
            return data.load(name)
        except UserError as error:
            if network_works():
                raise
            pytest.skip(f"no network and not in the cache: {error}")

    return load

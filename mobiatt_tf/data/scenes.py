"""The dataset "scenes": real pictures with exact boxes and masks, drawn on this machine from what packages bring.

COCO and ADE20K are tens of gigabytes. This set takes their place in tests and in `make quickstart-dense`: cut-outs of
the Tux Paint stamps, pasted over photographs that scikit-image, scikit-learn and Matplotlib bring. A cut-out's alpha
channel and what is pasted over it later say exactly which pixels show it. Neither a cut-out nor a photograph of the
test occurs in training. docs/scenes.md says what results on it mean.
"""

import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mobiatt_tf import files
from mobiatt_tf.data import cache
from mobiatt_tf.data.coco import load_coco
from mobiatt_tf.data.dataset import held_out_by_name
from mobiatt_tf.data.dense import DenseDataset
from mobiatt_tf.data.mask_folder import load_mask_folder
from mobiatt_tf.data.scene_drawing import CutOut, Numbers, Scene, cut_out, draw_scene
from mobiatt_tf.data.sources import load

NAME = "scenes"

# Folders of the stamps that make a class: with 16 photographs or more, and unlike one another. Fruit is not among them:
# 26 pictures, most of them round and of one colour, do not tell a new fruit from a coin or a flower.
CLASSES: dict[str, tuple[str, ...]] = {
    "animal": ("animals/mammals", "animals/birds"),
    "flower": ("plants/flowers",),
    "coin": ("symbols/money",),
    "sign": ("town/roadsigns",),
}
BACKGROUND = "background"  # class 0 of the label images
# Parts of paths that are left out: drawings and letters, and what is nearly the same picture as another.
_LEFT_OUT = ("cartoon", "toys", "00_symbols", "_mirror", "echidna", "stoplight", "railroad")
_HELD_OUT = 0.25  # share of a class's cut-outs that only the test shows

# None of these photographs shows what is a class here. The two views of one motorcycle are in the same split.
_SKIMAGE = "scikit-image==0.26.0"
_PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "train": (
        "skimage/data/astronaut.png",
        "skimage/data/brick.png",
        "skimage/data/camera.png",
        "skimage/data/clock_motion.png",
        "skimage/data/coffee.png",
        "skimage/data/gravel.png",
        "skimage/data/hubble_deep_field.jpg",
        "skimage/data/ihc.png",
        "skimage/data/moon.png",
        "skimage/data/motorcycle_left.png",
        "skimage/data/motorcycle_right.png",
        "skimage/data/page.png",
        "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
    ),
    "val": (
        "skimage/data/grass.png",
        "skimage/data/retina.jpg",
        "skimage/data/rocket.jpg",
        "sklearn/datasets/images/china.jpg",
    ),
}
_PHOTOGRAPHS_SHA256 = "d2a5e7d08bd09c2e5be8d665e6b1a254f8ef1fe3d21545b93f009bda503e681f"  # of names and files

IMAGES = {"train": 1000, "val": 200}
_SEEDS = {"train": 0, "val": 1}
_DRAWING = 1  # one more whenever other scenes are drawn than before
_MANIFEST = "scenes.json"


def load_scenes_detection(cache_path: Path) -> DenseDataset:
    """The scenes with the box of each object, of what is seen of it.

    Args:
        cache_path: where the set lies, or is drawn to.

    Returns:
        1,000 training and 200 test images of 96 to 160 pixels a side, with 1 to 3 objects of the 4 `CLASSES`.

    Raises:
        UserError: the stamps or the photographs cannot be had, or the cache cannot be written.
    """
    return load_coco(_obtain(cache_path) / "coco", cache_path, NAME)


def load_scenes_segmentation(cache_path: Path) -> DenseDataset:
    """The same images with the class of each pixel: `BACKGROUND` is class 0, then come the `CLASSES`.

    Args, Raises: as in `load_scenes_detection`.
    """
    return load_mask_folder(_obtain(cache_path) / "masks", cache_path, NAME)


def _obtain(cache_path: Path) -> Path:
    """The directory of the set, drawn first where it is missing, damaged or of another version."""
    directory = cache_path / NAME
    drawing = cache.Source("drawing them", lambda target: _draw(cache_path, target))
    cache.obtain(directory, _check, [drawing], "Free some space or name another cache directory.")
    return directory


def _check(directory: Path) -> None:
    """Raises `DamagedError` unless every file is as it was written, by this version."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text())
        drawing, listed = manifest["drawing"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise cache.DamagedError(f"{_MANIFEST} cannot be read: {error}") from error
    if drawing != _DRAWING:
        raise cache.DamagedError(f"drawn by version {drawing}, not {_DRAWING}")
    for name, expected in listed.items():
        path = directory / name
        if not path.is_file() or files.sha256(path) != expected:
            raise cache.DamagedError(f"{name} is {'other than it was' if path.is_file() else 'missing'}")


def _draw(cache_path: Path, directory: Path) -> None:
    """Draws and writes the whole set into an empty directory, its manifest last."""
    from tqdm import tqdm

    cut_outs = _cut_outs(cache_path)
    photograph_files = _photographs(cache_path)
    for split, count in IMAGES.items():
        photographs = [Image.open(path).convert("RGB") for path in photograph_files[split]]
        scenes: dict[str, Scene] = {}
        for number in tqdm(range(count), desc=f"drawing scenes ({split})", leave=False, mininterval=1):
            numbers = Numbers(_SEEDS[split], number)
            photograph = photographs[numbers.below(len(photographs))]
            name = f"{split}_{number:04d}.png"
            scenes[name] = draw_scene(cut_outs[split], photograph, numbers)
            _write_images(directory, split, name, scenes[name])
        files.write_json(directory / "coco" / "annotations" / f"instances_{split}.json", coco_annotations(scenes))
    (directory / "masks" / "classes.txt").write_text("\n".join((BACKGROUND, *CLASSES)) + "\n")
    written = sorted(path for path in directory.rglob("*") if path.is_file())
    listed = {path.relative_to(directory).as_posix(): files.sha256(path) for path in written}
    files.write_json(directory / _MANIFEST, {"drawing": _DRAWING, "files": listed})


def _write_images(directory: Path, split: str, name: str, scene: Scene) -> None:
    """Writes the image for either task, and the label image."""
    coco, image, labels = (
        directory / "coco" / split / name,
        directory / "masks" / "images" / split / name,
        directory / "masks" / "annotations" / split / name,
    )
    for path in (coco, image, labels):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.image).save(coco)
    try:
        os.link(coco, image)
    except OSError:  # a file system without hard links
        shutil.copyfile(coco, image)
    Image.fromarray(scene.label_map()).save(labels)


def coco_annotations(scenes: dict[str, Scene]) -> dict[str, Any]:
    """What COCO's instances_*.json says of the scenes, by file name.

    Categories are numbered from 1. Areas are of the visible mask, in pixels; masks are run lengths down the columns,
    beginning with those outside, as COCO's uncompressed RLE has them.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, scene) in enumerate(scenes.items(), 1):
        height, width = scene.image.shape[:2]
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for shown in scene.objects:
            x1, y1, x2, y2 = shown.box
            annotations.append({
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": shown.label + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": int(shown.mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": [height, width], "counts": run_lengths(shown.mask)},
            })  # fmt: skip
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def run_lengths(mask: np.ndarray) -> list[int]:
    """The lengths of the runs of equal pixels in a bool [H, W] mask, column after column; the first is of False."""
    pixels = mask.ravel(order="F")  # [W * H]
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    lengths = np.diff([0, *changes, len(pixels)]).tolist()
    return [0, *lengths] if pixels[0] else lengths


def cut_out_names(names: list[str]) -> dict[str, dict[str, list[str]]]:
    """Which stamps each split shows, by class.

    Args:
        names: paths of the stamps, relative to their folder, with "/" between their parts.

    Returns:
        {"train" or "val": {class: paths}}; every path is in one of the two at most.
    """
    chosen: dict[str, dict[str, list[str]]] = {split: {} for split in IMAGES}
    for class_name, folders in CLASSES.items():
        found = sorted(
            name
            for name in names
            if any(name.startswith(f"{folder}/") for folder in folders) and not any(part in name for part in _LEFT_OUT)
        )
        is_test = held_out_by_name(found, _HELD_OUT)
        for split, wanted in (("train", False), ("val", True)):
            chosen[split][class_name] = [name for name, test in zip(found, is_test, strict=True) if test == wanted]
    return chosen


def _cut_outs(cache_path: Path) -> dict[str, list[list[CutOut]]]:
    """The cut-outs of each split and class."""
    stamps = load("stamps", cache_path)
    root = cache_path / "stamps"
    paths = [*(stamps.train.files or ()), *(stamps.test.files or ())]
    names = [Path(path).relative_to(root).as_posix() for path in paths]
    return {
        split: [
            [cut_out(Image.open(root / name), label, name) for name in listed]
            for label, listed in enumerate(classes.values())
        ]
        for split, classes in cut_out_names(names).items()
    }


def _photographs(cache_path: Path) -> dict[str, list[Path]]:
    """The photographs of each split, from installed packages or, scikit-image, from its wheel."""
    members = [member for split in _PHOTOGRAPHS.values() for member in split]
    directory = cache_path / "scene_photographs"

    def read(directory: Path) -> None:
        digest = hashlib.sha256()
        for name in sorted(Path(member).name for member in members):
            path = directory / name
            if not path.is_file():
                raise cache.DamagedError(f"{name} is missing")
            digest.update(f"{name} {files.sha256(path)}\n".encode())
        if digest.hexdigest() != _PHOTOGRAPHS_SHA256:
            raise cache.DamagedError(f"SHA-256 {digest.hexdigest()[:16]}..., must be {_PHOTOGRAPHS_SHA256[:16]}...")

    wheel = cache.wheel_member(_SKIMAGE, *(member for member in members if member.startswith("skimage/")))

    def copy_installed(target: Path, packages: tuple[str, ...] = ("skimage", "sklearn", "matplotlib")) -> None:
        for member in members:
            package, _, name = member.partition("/")
            if package in packages:
                shutil.copyfile(_package_folder(package) / name, target / Path(name).name)

    def fetch_wheel(target: Path) -> None:
        wheel.fetch(target)
        copy_installed(target, ("sklearn", "matplotlib"))

    cache.obtain(
        directory,
        read,
        [
            cache.Source("the Python packages scikit-image, scikit-learn and matplotlib", copy_installed),
            cache.Source(wheel.description, fetch_wheel),
        ],
        f"With a network run `pip install {_SKIMAGE}` or the same command again; without one copy the files "
        f"{', '.join(Path(member).name for member in members)} of those packages to {directory}.",
    )
    return {split: [directory / Path(member).name for member in listed] for split, listed in _PHOTOGRAPHS.items()}


def _package_folder(package: str) -> Path:
    """Where an installed Python package lies, without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise cache.UnavailableError(f"{package} is not installed")
    return Path(found.origin).parent

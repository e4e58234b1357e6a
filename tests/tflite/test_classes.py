"""What a page must know to show a model images: from a dataset, from a file, and whether it fits a graph."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keras_models import DeiTMobiAtt
from mobiatt_tf import data
from mobiatt_tf.data import crops
from mobiatt_tf.errors import UserError
from tests.processes import ROOT
from tflite import classes, inspect

_MODEL = DeiTMobiAtt("quickstart", num_classes=10)


def _description(size: tuple[int, ...], *outputs: tuple[int, ...]) -> inspect.Description:
    """Of a graph with these shapes; nothing else of it is looked at."""

    def tensor(shape: tuple[int, ...]) -> inspect.Tensor:
        return inspect.Tensor("name", shape, "float32", None, None)

    names = inspect.Description.__dataclass_fields__
    return inspect.Description(
        **{
            **dict.fromkeys(names),
            "path": "some.tflite",
            "inputs": (tensor(size),),
            "outputs": tuple(map(tensor, outputs)),
        }
    )


def test_digits_are_grey_whole_and_light_on_dark() -> None:
    found = classes.metadata(_MODEL, data.load("digits"))
    assert found == {
        "dataset": "digits",
        "classes": list("0123456789"),
        "image_size": [28, 28],
        "crop_fraction": 1.0,
        "channels": 1,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "light_on_dark": True,
    }
    assert classes.check(found, "digits") == found


def test_folders_of_photographs_are_cut(tmp_path: Path) -> None:
    from sklearn.datasets import load_sample_images

    for name, picture in zip(("china", "flower"), load_sample_images().images, strict=True):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.fromarray(picture[40 * index :]).save(tmp_path / name / f"{index}.png")
    found = classes.metadata(DeiTMobiAtt("quickstart", num_classes=2), data.load(str(tmp_path)))
    assert (found["classes"], found["channels"]) == (["china", "flower"], 3)
    assert (found["crop_fraction"], found["light_on_dark"]) == (0.875, False)


def test_dark_on_light_is_known(tmp_path: Path) -> None:
    """Grey images with light margins: nothing is inverted."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(3):
            pixels = np.full((28, 28), 240, np.uint8)
            pixels[9:19, 9 + index : 19] = 10
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    found = classes.metadata(DeiTMobiAtt("quickstart", num_classes=2), data.load(str(tmp_path)))
    assert (found["channels"], found["light_on_dark"]) == (1, False)


def test_defaults_are_what_test_images_go_through() -> None:
    found = classes.check({"classes": ["a"]}, "test")
    assert found["crop_fraction"] == crops.CROP_FRACTION
    assert (found["mean"], found["std"]) == (list(data.IMAGENET_MEAN), list(data.IMAGENET_STD))


def test_reading_a_file_takes_no_tensorflow(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"classes": ["a"]}))
    code = f"import sys; from tflite import classes; classes.read({str(path)!r}); sys.exit('tensorflow' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, timeout=60).returncode == 0


def test_without_a_dataset_classes_have_numbers() -> None:
    found = classes.metadata(_MODEL, None)
    assert found["classes"][3] == "class 3"
    assert len(found["classes"]) == 10
    assert (found["dataset"], found["crop_fraction"], found["channels"]) == (None, 0.875, 3)


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(UserError, match=r"3 classes, digits has 10"):
        classes.metadata(DeiTMobiAtt("quickstart", num_classes=3), data.load("digits"))


def test_a_file_by_hand_and_a_sidecar(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"classes": ["cat", "dog"], "mean": [0.5, 0.5, 0.5]}))
    found = classes.read(path)
    assert (found["mean"], found["crop_fraction"], found["image_size"]) == ([0.5] * 3, 0.875, None)
    path.write_text(json.dumps({"kind": "flows", "classify": found}))
    assert classes.read(path) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", 'must hold {"classes"'),
        ("{", "not valid JSON"),
        ('{"classes": []}', "classes must be a list of names, but is"),
        ('{"classes": ["a", 1]}', "classes must be a list of names"),
        ('{"classes": ["a"], "std": [1, 0, 1]}', "std must be three numbers above 0"),
        ('{"classes": ["a"], "mean": [1, NaN, 1]}', "mean must be three numbers"),
        ('{"classes": ["a"], "crop_fraction": 2}', "crop_fraction must be a number above 0, at most 1, but is 2"),
        ('{"classes": ["a"], "image_size": 28}', r"image_size must be \[height, width\], but is 28"),
        ('{"classes": ["a"], "channels": 4}', "channels must be 1 or 3"),
        ('{"classes": ["a"], "light_on_dark": 1}', "light_on_dark must be true or false"),
        ('{"classes": ["a"], "size": 3}', "has size; known are classes, dataset, image_size"),
    ],
)
def test_damaged_files_are_one_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        classes.read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_graph_gets_its_size() -> None:
    found = classes.check({"classes": ["a", "b"]}, "test")
    description = _description((1, 96, 128, 3), (1, 4, 17), (1, 2))
    assert classes.for_graph(found, description) == {**found, "image_size": [96, 128]}


@pytest.mark.parametrize(
    ("size", "outputs", "given", "message"),
    [
        ((1, 10), [(1, 2)], {}, "must take one image"),
        ((1, 28, 28, 1), [(1, 2)], {}, "must take one image"),
        ((-1, 28, 28, 3), [(1, 2)], {}, "must take one image"),
        ((1, 28, 28, 3), [(1, 3)], {}, r"2 classes are named, but some.tflite answers with \[1, 3\]"),
        ((1, 28, 28, 3), [(1, 2)], {"image_size": [32, 32]}, r"images of \[32, 32\], but some.tflite takes \[28, 28\]"),
    ],
)
def test_graphs_that_do_not_fit(
    size: tuple[int, ...], outputs: list[tuple[int, ...]], given: dict[str, Any], message: str
) -> None:
    found = classes.check({"classes": ["a", "b"], **given}, "test")
    with pytest.raises(UserError, match=message):
        classes.for_graph(found, _description(size, *outputs))

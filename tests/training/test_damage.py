"""An image that goes bad after it was checked stops the run with its name, and the run goes on once it is back."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobiatt_tf import data, training
from mobiatt_tf.data import convert
from mobiatt_tf.errors import UserError
from tests.training import small


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """36 training and 6 test images of three colours."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 2)):
        for index, name in enumerate(("blue", "green", "red")):
            directory = tmp_path / "images" / split / name
            directory.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 120, (9, 9, 3), np.uint8)
                pixels[..., index] += 100
                Image.fromarray(pixels).save(directory / f"{number}.png")
    return tmp_path / "images"


def run(dataset: data.Dataset, directory: Path) -> dict[str, object]:
    return training.train(
        small.make_model,
        dataset,
        small.recipe(epochs=2, batch_size=6, augmentation="flip_crop"),
        directory,
        training.make_strategy("one"),
        cadence=training.Cadence(checkpoint_steps=1),
        show_progress=False,
    )


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("damage", ["removed", "overwritten"])
def test_an_image_file(folder: Path, tmp_path: Path, split: str, damage: str) -> None:
    dataset = data.load(str(folder), tmp_path / "cache")
    file = folder / split / "green" / "1.png"
    content = file.read_bytes()
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    with pytest.raises(UserError, match=rf"The image {file} can no longer be read \(.*\)\. Put the file back"):
        run(dataset, tmp_path / "run")
    file.write_bytes(content)
    assert run(dataset, tmp_path / "run")["step"] == 12


def test_a_record(folder: Path, tmp_path: Path) -> None:
    convert.convert(data.load(str(folder), tmp_path / "cache"), tmp_path / "shards", 1.0)
    dataset = data.load(str(tmp_path / "shards"), tmp_path / "cache")
    (shard,) = (tmp_path / "shards").glob("train-*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    good, _ = shard.read_bytes(), shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"The image {shard.name}:\d+ can no longer be read"):
        run(dataset, tmp_path / "run")
    shard.write_bytes(good)
    assert run(dataset, tmp_path / "run")["step"] == 12

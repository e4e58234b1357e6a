"""What a program that shows a model images must know: the names of its classes, and how an image becomes its input.

Example:
    python -m tflite.classes --checkpoint=runs/quickstart/train --output=runs/quickstart/classes.json

The file is what `--classes` of the browser benchmark takes; one may be written by hand, too:

    {"classes": ["cat", "dog"], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from mobiatt_tf import cli, files
from mobiatt_tf.errors import UserError
from tflite import inspect

if TYPE_CHECKING:  # importing them takes seconds, and whoever only reads a file does without
    import keras

    from mobiatt_tf import data

_LOOKED_AT = 32  # test images by which a dataset is known to be grey, and light on dark
_DARK = 64  # of 255: the mean of the outermost pixels of images that are light on dark

_DEFAULTS: dict[str, Any] = {
    "dataset": None,
    "image_size": None,
    "crop_fraction": 224 / 256,  # as in mobiatt_tf.data.crops
    "channels": 3,
    "mean": [0.485, 0.456, 0.406],  # as in mobiatt_tf.data.pipeline
    "std": [0.229, 0.224, 0.225],
    "light_on_dark": False,
}


def dataset_for(
    checkpoint: str | os.PathLike[str], name: str | None, cache_dir: str | os.PathLike[str] | None
) -> "data.Dataset | None":
    """The dataset called `name`, else that of the training run which `checkpoint` belongs to; None if neither is known.

    Raises:
        UserError: it cannot be had.
    """
    from mobiatt_tf import verification

    name = name or verification.dataset_of_run(checkpoint)
    return None if name is None else verification.dataset_of(checkpoint, name, cache_dir)


def metadata(model: "keras.Model", dataset: "data.Dataset | None") -> dict[str, Any]:
    """How `mobiatt_tf.data.test_batches` prepares the images of a dataset for a model, as plain values.

    Args:
        model: with one image input [B, height, width, 3] and logits [B, classes].
        dataset: what it was trained on; without it classes get numbers, and image files are prepared as usual.

    Returns:
        "dataset": its name or None; "classes": their names; "image_size": [height, width]; "crop_fraction": how much of
        the shorter side of an image (in units of the model's) its central cut keeps; "channels": 1 where the images are
        grey, else 3; "mean" and "std": of each channel, RGB, for values in 0 to 1; "light_on_dark": whether the images
        are grey and their margins dark, as those of scanned digits, so that a photograph on light ground must be
        inverted first.

    Raises:
        UserError: the model has not as many classes as the dataset.
    """
    from mobiatt_tf import data, verification

    count = int(model.outputs[0].shape[-1])  # of a distilled model both heads have as many
    image_size = [int(side) for side in model.input_shape[1:3]]
    if dataset is None:
        return {**_DEFAULTS, "classes": [f"class {index}" for index in range(count)], "image_size": image_size}
    if len(dataset.class_names) != count:
        raise UserError(
            f"The model has {count} classes, {dataset.name} has {len(dataset.class_names)}. Give the --dataset that it "
            "was trained on."
        )
    images, _ = verification.dataset_images(dataset, (image_size[0], image_size[1]), _LOOKED_AT)
    pixels = 255 * (images * np.array(data.IMAGENET_STD) + np.array(data.IMAGENET_MEAN))  # [N, height, width, 3]
    grey = bool(np.abs(pixels - pixels.mean(axis=-1, keepdims=True)).max() < 0.5)
    margins = np.concatenate([pixels[:, [0, -1]].ravel(), pixels[:, :, [0, -1]].ravel()])
    return {
        **_DEFAULTS,
        "dataset": dataset.name,
        "classes": list(dataset.class_names),
        "image_size": image_size,
        "crop_fraction": 1.0 if dataset.test.whole_images else _DEFAULTS["crop_fraction"],
        "channels": 1 if grey else 3,
        "light_on_dark": grey and bool(margins.mean() < _DARK),
    }


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `metadata` returns, from a file with at least "classes", or from the .json of `tflite.flows`.

    What is left out is what test images of ImageNet go through; "image_size" may be None then, see `for_graph`.

    Raises:
        UserError: the file is missing, or is something else.
    """
    found = files.read_json(path)
    if isinstance(found, dict) and "classify" in found:
        found = found["classify"]
    return check(found, path)


def check(value: Any, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata with the defaults for what is left out.

    Raises:
        UserError: `value`, which `path` held, is something else.
    """
    if not isinstance(value, dict) or "classes" not in value:
        raise UserError(f'{path} does not say what the classes are: it must hold {{"classes": ["name", ...]}}.')
    unknown = value.keys() - {"classes", *_DEFAULTS}
    if unknown:
        raise UserError(f"{path} has {', '.join(sorted(unknown))}; known are classes, {', '.join(_DEFAULTS)}.")
    complete = {**_DEFAULTS, **value}
    for name, (fits, must) in _MUST.items():
        if not fits(complete[name]):
            raise UserError(f"In {path}, {name} must be {must}, but is {str(complete[name])[:80]}.")
    return complete


def for_graph(found: dict[str, Any], description: inspect.Description) -> dict[str, Any]:
    """The metadata for one graph, with the image size that it takes.

    Raises:
        UserError: the graph has other than one image input, or another number of classes, or another size.
    """
    inputs, outputs = description.inputs, description.outputs
    shape = inputs[0].shape if len(inputs) == 1 else ()
    if len(shape) != 4 or shape[0] != 1 or shape[3] != 3 or min(shape) < 1:
        raise UserError(f"{description.path} cannot classify: it must take one image [1, height, width, 3].")
    logits = next((output for output in outputs if output.shape == (1, len(found["classes"]))), None)
    if logits is None:
        shapes = ", ".join(str(list(output.shape)) for output in outputs)
        raise UserError(f"{len(found['classes'])} classes are named, but {description.path} answers with {shapes}.")
    if found["image_size"] is not None and tuple(found["image_size"]) != shape[1:3]:
        raise UserError(
            f"The classes are for images of {found['image_size']}, but {description.path} takes {list(shape[1:3])}."
        )
    return {**found, "image_size": list(shape[1:3])}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _are_sides(value: Any) -> bool:
    sides = isinstance(value, list | tuple) and len(value) == 2
    return value is None or (sides and all(isinstance(side, int) and side > 0 for side in value))


def _are_three(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_number, value))


_MUST: dict[str, tuple[Any, str]] = {
    "dataset": (lambda value: value is None or isinstance(value, str), "a name"),
    "classes": (
        lambda value: isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value),
        "a list of names",
    ),
    "image_size": (_are_sides, "[height, width]"),
    "crop_fraction": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0, at most 1"),
    "channels": (lambda value: value in (1, 3), "1 or 3"),
    "mean": (_are_three, "three numbers"),
    "std": (lambda value: _are_three(value) and min(value) > 0, "three numbers above 0"),
    "light_on_dark": (lambda value: isinstance(value, bool), "true or false"),
}


def main(_: Sequence[str]) -> None:
    """Writes what the flags ask for."""
    from mobiatt_tf.models import load_trained

    values = flags.FLAGS
    output = files.user_path(values.output)
    if output.suffix != ".json":
        raise UserError(f"--output={values.output} must end in .json.")
    model = load_trained(values.checkpoint)
    found = metadata(model, dataset_for(values.checkpoint, values.dataset, values.cache_dir))
    files.write_json(Path(output), found)
    print(f"Wrote {output}: {len(found['classes'])} classes of {found['dataset'] or 'an unknown dataset'}.")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "Output directory of a training run, or a .keras file.", required=True)
    flags.DEFINE_string("dataset", None, "What it was trained on; without it the dataset of the run.")
    flags.DEFINE_string("cache_dir", None, "Where downloads of --dataset are kept.")
    flags.DEFINE_string("output", None, "The .json file to write.", required=True)
    cli.run(main)

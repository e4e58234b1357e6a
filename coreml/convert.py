"""From a Keras model to a saved .mlpackage: lowering, coremltools' passes, specification version and metadata."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from coreml import package
from coreml.calls import outputs_of
from coreml.lowering import INPUT, PROBABILITIES, lower
from coreml.tools import SPECIFICATION_VERSIONS, coremltools, quiet, target, writing
from mobiatt_tf.errors import UserError
from mobiatt_tf.tasks import task_of

PRECISIONS = ("float16", "float32")
# What Xcode shows of the outputs.
_OUTPUT_DESCRIPTIONS: dict[str, dict[str, str]] = {
    "classification": {},
    "detection": {
        "boxes": "[1, anchors, 4]: dx, dy, dw, dh relative to the anchors; mobiatt_tf.tasks.decoding makes them boxes.",
        "logits": "[1, anchors, classes]: a sigmoid of each is the probability of that class at that anchor.",
    },
    "segmentation": {"logits": "[1, classes, height / s, width / s]: the class of a pixel is where it is largest."},
}


@dataclass(frozen=True)
class Description:
    """What Xcode shows of a model."""

    author: str = ""
    license: str = ""
    version: str = ""
    text: str = ""


def convert(
    model: keras.Model,
    images: np.ndarray,
    ios: int = 15,
    precision: str = "float16",
    class_names: Sequence[str] | None = None,
    description: Description | None = None,
    scaled: bool | None = None,
) -> Any:
    """A coremltools `MLModel` of a classifier, a detector or a segmenter; nothing is checked yet.

    Args:
        model: see `lowering.lower`.
        images: float32 [N, height, width, 3], normalised; the scale of the residual streams is chosen from them.
        ios: deployment target, 15 to 18.
        precision: "float16" or "float32".
        class_names: the label of each class; None leaves labels out. A classifier names its answer by them; detectors
            and segmenters keep them, in JSON, under "mobiatt.classes" of the metadata.
        description: of the model.
        scaled: see `lowering.lower`.

    Raises:
        ValueError: an unknown target or precision, no images, a layer that cannot be exported, labels that do not fit.
        UserError: coremltools is missing, or wrote another specification version than the one asked for.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"There is no precision {precision!r}. Choose one of {', '.join(PRECISIONS)}.")
    if not len(images):
        raise ValueError("There are no images: the scale of the residual streams is chosen on real ones.")
    ct = coremltools()
    task, outputs = task_of(model), outputs_of(model)
    own = {package.TASK_KEY: task}
    labels = None
    if class_names is not None:
        _check_labels(class_names, int(outputs["logits"][0].shape[-1]))
        if task == "classification":
            labels = ct.ClassifierConfig(list(class_names), predicted_probabilities_output=PROBABILITIES)
        else:
            own[package.CLASSES_KEY] = json.dumps(list(class_names))
    program, names = lower(model, images, ios, precision == "float16", scaled)
    height, width = model.input_shape[1:3]
    with quiet(), writing("The temporary package"):
        converted = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=target(ios),
            compute_precision=ct.precision.FLOAT32,  # as the program says; no pass adds casts
            inputs=[ct.ImageType(INPUT, shape=(1, 3, height, width), color_layout=ct.colorlayout.RGB)],
            classifier_config=labels,
            pass_pipeline=ct.PassPipeline.CLEANUP,
            skip_model_load=True,
        )
    _check_version(converted, ios)
    for name, text in _OUTPUT_DESCRIPTIONS[task].items():
        converted.output_description[name] = text
    _describe(converted, description or Description(), {**own, package.LAYERS_KEY: json.dumps(names)})
    return converted


def _check_labels(class_names: Sequence[str], classes: int) -> None:
    if len(class_names) != classes:
        raise ValueError(f"The model has {classes} classes, but {len(class_names)} labels were given.")
    twice = sorted({name for name in class_names if not name.strip() or list(class_names).count(name) > 1})
    if twice:
        raise ValueError(f"Labels must be different and not empty, but there are several {twice}: one would be lost.")


def _check_version(converted: Any, ios: int) -> None:
    version = converted.get_spec().specificationVersion
    if version != SPECIFICATION_VERSIONS[ios]:
        raise UserError(
            f"coremltools wrote specification version {version}, but iOS {ios} reads {SPECIFICATION_VERSIONS[ios]}: an "
            "operator needs a newer iOS. Choose a higher --ios."
        )


def _describe(converted: Any, description: Description, own: dict[str, str]) -> None:
    from importlib.metadata import version

    import mobiatt_tf

    converted.author = description.author
    converted.license = description.license
    converted.version = description.version
    converted.short_description = description.text
    converted.input_description[INPUT] = "RGB photograph; the normalisation of the training is in the model."
    tools = {name: version(name) for name in ("keras", "tensorflow", "coremltools")}
    converted.user_defined_metadata.update(
        {"mobiatt.version": mobiatt_tf.__version__, "mobiatt.tools": json.dumps(tools), **own}
    )


def save(converted: Any, path: Path, ios: int) -> None:
    """Writes the package with the checksums of its content; `path` must end in .mlpackage.

    Raises:
        UserError: coremltools raised the specification version on the way (compression may), or the disk is full.
    """
    _check_version(converted, ios)
    remove(path)
    with quiet(), writing("The package"):
        converted.save(str(path))
    sums = package.checksums(package.read(path))
    file = path / package.PROGRAM
    specification = package.read_specification(path)
    specification.description.metadata.userDefined[package.CHECKSUMS_KEY] = json.dumps(sums)
    file.write_bytes(specification.SerializeToString())


def remove(path: Path) -> None:
    """Removes a package if it is there."""
    if path.is_dir():
        shutil.rmtree(path)

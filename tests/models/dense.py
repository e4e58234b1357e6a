"""The smallest detectors and segmenters, for tests."""

from typing import Any

import keras
import numpy as np

import keras_models

SIDES = (48, 64)  # the coarsest levels of a detector are 2 x 2 and 1 x 1 then, from 3 x 4: rounded up
TASKS = tuple(keras_models.DENSE)
FAMILIES = tuple(keras_models.FAMILIES)
CLASSES = 3
_OF_TASK: dict[str, dict[str, Any]] = {"detection": {"head_depth": 2}, "segmentation": {"head_channels": 8}}


def toy(task: str, family: str, **arguments: Any) -> keras.Model:
    """A detector or a segmenter of 3 classes for images of 48 x 64, on the family's "quickstart" variant."""
    defaults = {"image_size": SIDES, "num_classes": CLASSES, "channels": 16, "training_size": 64, **_OF_TASK[task]}
    return keras_models.DENSE[task](family, "quickstart", **{**defaults, **arguments})


def awake(model: keras.Model) -> keras.Model:
    """The model with weights of ordinary size in its heads, whose own start near 0 would hide mistakes."""
    generator = np.random.default_rng(0)
    for weight in model.weights:
        if weight.path.startswith(("box_head", "class_head", "segment_")) and weight.path.endswith("kernel"):
            weight.assign(generator.normal(0, (2 / np.prod(weight.shape[:-1])) ** 0.5, weight.shape))
    return model


def images(count: int = 2, sides: tuple[int, int] = SIDES, seed: int = 0) -> np.ndarray:
    """Noise, float32 [count, height, width, 3]."""
    return np.random.default_rng(seed).normal(size=(count, *sides, 3)).astype("float32")


def outputs(model: keras.Model, inputs: np.ndarray) -> list[np.ndarray]:
    """What a model says, as a list: of a detector boxes, then logits."""
    result = model(inputs, training=False)
    tensors = [result["boxes"], result["logits"]] if isinstance(result, dict) else [result]
    return [keras.ops.convert_to_numpy(tensor) for tensor in tensors]

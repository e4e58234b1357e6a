"""How a photograph becomes a classifier's input, as `tflite.classes` describes it and the browser's page does it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobiatt_tf.data.crops import CROP_FRACTION
from mobiatt_tf.data.pipeline import IMAGENET_MEAN, IMAGENET_STD
from mobiatt_tf.errors import UserError

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow turns RGB into grey
_LIGHT = 128  # of 255: above it the margin of a picture is light


@dataclass(frozen=True)
class Preparation:
    """The fields of `classes.metadata` with these names; without arguments what test images of ImageNet go through."""

    crop_fraction: float = CROP_FRACTION
    channels: int = 3
    mean: tuple[float, ...] = tuple(IMAGENET_MEAN)
    std: tuple[float, ...] = tuple(IMAGENET_STD)
    light_on_dark: bool = False

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "Preparation":
        """Of what `classes.read` returns."""
        return cls(
            float(found["crop_fraction"]),
            int(found["channels"]),
            tuple(float(value) for value in found["mean"]),
            tuple(float(value) for value in found["std"]),
            bool(found["light_on_dark"]),
        )

    def __call__(self, image: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
        """An image uint8 [H, W, 3] to float32 [1, height, width, 3], normalised.

        The central cut is resized, made grey where the model was trained on grey images, and inverted where those were
        light on dark and its margin is light.
        """
        import tensorflow as tf

        from mobiatt_tf.data.crops import resize_and_crop_centre

        with tf.device("CPU:0"):
            cut = resize_and_crop_centre(tf.constant(image), image_size, self.crop_fraction)
        values = np.asarray(cut, np.float32)  # [height, width, 3], 0 .. 255
        if self.channels == 1:
            values = np.repeat(values @ np.array(_LUMA, np.float32)[:, None], 3, axis=-1)
        if self.light_on_dark and _margin(values).mean() > _LIGHT:
            values = 255 - values
        mean, std = (255 * np.array(each, np.float32) for each in (self.mean, self.std))
        return ((values - mean) / std)[None]

    def refuse_for(self, task: str) -> None:
        """Raises UserError, which names the fields, where there are some and the task is not classification."""
        usual = Preparation()
        other = [name for name in vars(usual) if getattr(self, name) != getattr(usual, name)]
        if task != "classification" and other:
            raise UserError(
                f"--labels says {', '.join(f'{name}={getattr(self, name)}' for name in other)}, which only a "
                f"classifier's images are prepared by, but this is a model for {task}. Leave {', '.join(other)} out."
            )

    def __str__(self) -> str:
        text = f"the central {self.crop_fraction:.1%} of a photograph's short side"
        grey = ", in grey" if self.channels == 1 else ""
        return text + grey + (", inverted where its margin is light" if self.light_on_dark else "")


def _margin(values: np.ndarray) -> np.ndarray:
    """The outermost pixels of [height, width, 3], each once."""
    return np.concatenate([values[[0, -1]].ravel(), values[1:-1, [0, -1]].ravel()])

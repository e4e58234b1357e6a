"""The teacher of a distillation: any Keras classifier, read from a file and called as a function of images.

A teacher sees the images that the student sees, augmented, mixed and normalised by ImageNet's mean and deviation
(`mobiatt_tf.data.normalize`). One that was trained with another preprocessing must have the way back inside, as its
first layer: tools/efficientnet_lite0.py makes such a teacher.
"""

import os
from collections.abc import Callable
from typing import TypeAlias

import keras
import tensorflow as tf

from mobiatt_tf.errors import UserError
from mobiatt_tf.models import DistilledModel, load_trained
from mobiatt_tf.training.losses import inference_logits

Teacher: TypeAlias = Callable[[tf.Tensor], tf.Tensor]


def load_teacher(path: str | os.PathLike[str], classes: int) -> keras.Model:
    """Reads a teacher and checks that it can teach.

    Args:
        path: a .keras file, or the directory of a training run.
        classes: what the student tells apart. The teacher's classes must be the same, in the same order.

    Returns:
        A frozen model from images [B, H, W, 3], of one size or of any, to logits or probabilities [B, classes].

    Raises:
        UserError: there is no such file, Keras cannot read it, or its input or output is another.
    """
    model = load_trained(path)
    inputs, outputs = getattr(model, "inputs", None) or [], getattr(model, "outputs", None) or []
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].shape[-1] != 3:
        raise UserError(
            f"The teacher {path} takes {_shapes(inputs)}; a teacher takes one batch of images [B, H, W, 3]. "
            "Wrap it in a functional Keras model that does."
        )
    if inputs[0].shape[0] is not None:
        raise UserError(
            f"The teacher {path} takes exactly {inputs[0].shape[0]} images at a time. Build it with an open batch size."
        )
    if (len(outputs) != 1 and not isinstance(model, DistilledModel)) or len(outputs[0].shape) != 2:
        raise UserError(f"The teacher {path} returns {_shapes(outputs)}; a teacher returns logits [B, classes].")
    if outputs[0].shape[-1] != classes:
        raise UserError(
            f"The teacher {path} tells {outputs[0].shape[-1]} classes apart, the student {classes}. Take a teacher "
            "that was trained on the student's dataset."
        )
    model.trainable = False
    return model


def make_teacher(model: keras.Model) -> Teacher:
    """A function from images float32 [B, H, W, 3], normalised as above, to logits float32 [B, classes].

    The model runs as in inference, no gradient flows through it, and of two heads the mean is taken. Images of another
    size than the model's are resized (bilinear).

    Args:
        model: from `load_teacher`.
    """
    size = tuple(model.inputs[0].shape[1:3])  # None where the teacher takes any

    def teacher(images: tf.Tensor) -> tf.Tensor:
        images = tf.stop_gradient(images)
        wanted = [own or given for own, given in zip(size, images.shape[1:3], strict=True)]
        if wanted != list(images.shape[1:3]):
            # Without antialias, which XLA cannot compile; teachers are seldom smaller than their students.
            images = tf.image.resize(images, wanted)  # [B, H, W, 3] of the teacher
        return tf.stop_gradient(inference_logits(model(images, training=False)))  # [B, classes]

    return teacher


def _shapes(tensors: list[keras.KerasTensor]) -> str:
    return " and ".join(str(list(tensor.shape)) for tensor in tensors) or "inputs or outputs of unknown shape"

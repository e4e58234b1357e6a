"""Keras models in general: read a trained one, build one under a precision, rebuild one for another purpose."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

import mobiatt_tf.layers  # also registers the layers that saved models name
from mobiatt_tf.errors import UserError, first_line
from mobiatt_tf.files import user_path

# What the layers that detectors and segmenters add to a backbone are called: `keras_models.pyramid` and its users.
DENSE_PREFIXES = ("pyramid_", "fpn_", "box_head_", "class_head_", "segment_")


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class DistilledModel(keras.Model):
    """A functional model with a class head and a distillation head.

    Called with training=True it returns the pair (class logits, distillation logits), otherwise their mean: DeiT,
    section 4 ("at test time, both the class or the distillation embeddings ... we add the softmax output by the two",
    in the code the mean of the logits). EfficientFormerV2 does the same.
    """

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        class_logits, distillation_logits = super().call(inputs, training=training, mask=mask)
        if training:
            return class_logits, distillation_logits
        return (class_logits + distillation_logits) / 2


def classifier(images: Any, heads: list[Any], name: str) -> keras.Model:
    """The functional model from `images` to the logits of one head, or of a class and a distillation head."""
    if len(heads) == 1:
        return keras.Model(images, heads[0], name=name)
    return DistilledModel(images, tuple(heads), name=name)


def load_trained(checkpoint: str | os.PathLike[str]) -> keras.Model:
    """The trained Keras model of a run.

    Args:
        checkpoint: a directory that train_tpu_gpu.py wrote (its model.keras is taken), or a .keras file.

    Raises:
        UserError: there is no such file, or Keras cannot read it.
    """
    path = user_path(checkpoint)
    if path.is_dir():
        path = path / "model.keras"
    if not path.is_file():
        raise UserError(
            f"There is no model at {path}. Give the --output_dir of a training run that has been evaluated "
            "once, or a .keras file."
        )
    import mobiatt_tf.quantization  # registers the layers of quantized models  # noqa: F401

    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:  # zipfile, h5py, json and Keras each raise their own for a damaged file
        raise UserError(
            f"{path} cannot be read as a Keras model ({first_line(error)}). Take a whole .keras file."
        ) from error


@contextlib.contextmanager
def dtype_policy(policy: str | None) -> Iterator[None]:
    """Builds layers under a Keras dtype policy and restores the global one; None changes nothing."""
    if policy is None:
        yield
        return
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def is_dense(model: keras.Model) -> bool:
    """Whether a model of `keras_models` is a detector or a segmenter."""
    return any(weight.path.startswith(DENSE_PREFIXES) for weight in model.weights)


def check_reference_tokens(source: keras.Model, target: keras.Model) -> None:
    """Raises ValueError where a Mobile-Attention of `target` has other `reference_tokens` than its twin in `source`."""
    kinds = mobiatt_tf.layers.MobileAttention | mobiatt_tf.layers.MobileConvAttention
    found, wanted = (
        {layer.name: layer.reference_tokens for layer in model.layers if isinstance(layer, kinds)}
        for model in (source, target)
    )
    for name in sorted(found.keys() & wanted.keys()):
        if found[name] != wanted[name]:
            height, width = source.inputs[0].shape[1:3]
            raise ValueError(
                f"{name} was trained with reference_tokens={found[name]}, but {target.name} has {wanted[name]}: its "
                "outputs would have another scale. Build it with training_size set to that of the source, whose images "
                f"have {height} x {width} pixels."
            )


def layer_calls(model: keras.Model) -> list[Any]:
    """The nodes of a model's graph: one for each call of each layer, with `operation`, `input_tensors` and outputs."""
    graph = getattr(model, "_functional", None) or model  # a Sequential model keeps its graph in a model of its own
    return [node for nodes in getattr(graph, "_nodes_by_depth", {}).values() for node in nodes]


def rebuild(model: keras.Model, batch_size: int | None, dense_patches: bool = False) -> keras.Model:
    """A float32 copy of a functional model with another batch size; shares nothing with the original.

    Several outputs keep their structure: a dict keeps its keys, and a `DistilledModel` is one again.

    Exports use batch 1: with an open batch size DeiT-Tiny converts to 1278 nodes in 86 XNNPACK partitions, with batch 1
    to about 880 in one.

    Args:
        model: a functional model.
        batch_size: of the copy; None leaves it open.
        dense_patches: see `dense` of `mobiatt_tf.layers.PatchEmbedding`.

    Raises:
        ValueError: the model does not have exactly one input of known size.
    """
    if len(model.inputs) != 1 or None in model.inputs[0].shape[1:]:
        shapes = [tuple(tensor.shape) for tensor in model.inputs]
        raise ValueError(
            f"Only models with one input of fixed height and width can be exported, but inputs are {shapes}."
        )

    def in_float32(layer: keras.Operation) -> keras.Operation:
        if not isinstance(layer, keras.layers.Layer):
            return layer  # a bare operation such as x + y has no weights and no precision of its own
        config = {**layer.get_config(), "dtype": "float32"}
        # Not a subclass with a call of its own.
        if dense_patches and getattr(type(layer), "call", None) is mobiatt_tf.layers.PatchEmbedding.call:
            config["dense"] = True
        return layer.__class__.from_config(config)

    source = model.inputs[0]
    images = keras.Input(batch_shape=(batch_size, *source.shape[1:]), dtype="float32", name=source.name)
    copy = keras.models.clone_model(model, input_tensors=images, clone_function=in_float32)
    # The same layers in the same order; whoever exports compares the outputs.
    for weight, value in zip(copy.weights, model.get_weights(), strict=True):
        weight.assign(np.reshape(value, weight.shape))  # a patch embedding's kernel may have become a matrix
    return copy

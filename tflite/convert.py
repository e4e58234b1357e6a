"""From a Keras model to the bytes of a .tflite file: rebuilt in float32 at batch 1, then converted."""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import keras

from mobiatt_tf.errors import UserError
from mobiatt_tf.files import user_path

FORMATS = {
    "float32": "weights and arithmetic in float32",
    "float16": "weights stored in float16; a GPU or ARM runtime may compute in float16",
    "dynamic": "weights in int8 (per channel), activations quantized on the fly: the dense layers run in int8",
}


def load_checkpoint(checkpoint: str) -> keras.Model:
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
            f"There is no model at {path}. Give the --output_dir of a training run that has finished at least one "
            "epoch, or a .keras file."
        )
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:  # zipfile, h5py, json and Keras each raise their own for a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} cannot be read as a Keras model ({reason}). Export from a whole .keras file."
        ) from error


def rebuild_at_batch_one(model: keras.Model) -> keras.Model:
    """A float32 copy of a functional model whose input has batch size 1; shares nothing with the original.

    With an open batch size DeiT-Tiny converts to 1278 nodes in 86 XNNPACK partitions, with batch 1 to about 880 in one.

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
        return layer.__class__.from_config({**layer.get_config(), "dtype": "float32"})

    source = model.inputs[0]
    images = keras.Input(batch_shape=(1, *source.shape[1:]), dtype="float32", name=source.name)
    copy = keras.models.clone_model(model, input_tensors=images, clone_function=in_float32)
    copy.set_weights(model.get_weights())  # the same layers in the same order; verify.py compares the outputs later
    return copy


def convert(model: keras.Model, format: str = "float32") -> bytes:
    """Converts a functional Keras model, whatever its batch size and precision, to a batch-1 .tflite file.

    Args:
        model: a functional model with one input, float [B, height, width, channels], and one output.
        format: a key of `FORMATS`.

    Returns:
        The file's content; one signature, "serving_default", from "images" to "output_0".

    Raises:
        ValueError: an unknown format, or a model that cannot be rebuilt.
    """
    if format not in FORMATS:
        raise ValueError(f"There is no format {format!r}. Choose one of {', '.join(FORMATS)}.")
    import tensorflow as tf

    copy = rebuild_at_batch_one(model)
    signature = [keras.InputSpec(shape=copy.inputs[0].shape, dtype="float32", name="images")]
    with tempfile.TemporaryDirectory() as directory, _quiet():
        saved_model = str(Path(directory) / "saved_model")
        # Without the signature, Keras' export sets the batch size back to None.
        copy.export(saved_model, format="tf_saved_model", input_signature=signature, verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(saved_model)
        if format != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if format == "float16":
            converter.target_spec.supported_types = [tf.float16]
        return bytes(converter.convert())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the converter's remarks off standard output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield

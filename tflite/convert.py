"""From a Keras model to the bytes of a .tflite file: rebuilt in float32 at batch 1, then converted."""

import contextlib
import io
import tempfile
from pathlib import Path

import keras

from mobiatt_tf.errors import UserError, first_line
from mobiatt_tf.models import rebuild

FORMATS = {
    "float32": "weights and arithmetic in float32",
    "float16": "weights stored in float16; a GPU or ARM runtime may compute in float16",
    "dynamic": "weights in int8 (per channel), activations quantized on the fly: the dense layers run in int8",
}


def convert(model: keras.Model, format: str = "float32") -> bytes:
    """Converts a functional Keras model, whatever its batch size and precision, to a batch-1 .tflite file.

    Args:
        model: a functional model with one input, float [B, height, width, channels], and one output.
        format: a key of `FORMATS`.

    Returns:
        The file's content; one signature, "serving_default", from "images" to "output_0".

    Raises:
        ValueError: an unknown format, or a model that cannot be rebuilt.
        UserError: TensorFlow's converter refuses the model.
    """
    if format not in FORMATS:
        raise ValueError(f"There is no format {format!r}. Choose one of {', '.join(FORMATS)}.")
    import tensorflow as tf

    copy = rebuild(model, batch_size=1)
    signature = [keras.InputSpec(shape=copy.inputs[0].shape, dtype="float32", name="images")]
    # The converter's remarks stay off standard output.
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        saved_model = str(Path(directory) / "saved_model")
        # Without the signature, Keras' export sets the batch size back to None.
        copy.export(saved_model, format="tf_saved_model", input_signature=signature, verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(saved_model)
        if format != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if format == "float16":
            converter.target_spec.supported_types = [tf.float16]
        try:
            return bytes(converter.convert())
        except Exception as error:  # ConverterError is not public; the text begins with the operators concerned
            raise UserError(f"TensorFlow cannot convert {model.name} to TFLite: {first_line(error)}") from error

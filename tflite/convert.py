"""From a Keras model to the bytes of a .tflite file: rebuilt in float32 at batch 1, then converted."""

import contextlib
import io
import tempfile
from collections.abc import Iterable
from pathlib import Path

import keras
import numpy as np

from mobiatt_tf import layers, quantization
from mobiatt_tf.errors import UserError, first_line
from mobiatt_tf.formulation import Formulation
from mobiatt_tf.lean import lean
from mobiatt_tf.models import DistilledModel, rebuild
from mobiatt_tf.quantization.aware import projections
from mobiatt_tf.quantization.composites import QUANTIZED_CLASSES
from tflite import float_ops
from tflite.upsampling import with_concatenations

# What a float model can be written as. A quantized one (`mobiatt_tf.quantization`) is written as its policy says.
FORMATS = {
    "float32": "weights and arithmetic in float32",
    "float16": "weights stored in float16; a GPU or ARM runtime may compute in float16",
    "dynamic": "weights in int8 (per channel), activations quantized on the fly: the dense layers run in int8",
}


# Channels of the heads that share a matrix product, where they cost least (docs/performance.md): by instructions in an
# emulated Cortex-A76 with float16 arithmetic, and by time on x86 with AVX512.
GROUP_WIDTHS = {"arm": 16, "x86": 32}


_FORMULATED = (
    layers.MobileAttention,
    layers.SoftmaxAttention,
    layers.MobileConvAttention,
    layers.DownsamplingConvAttention,
)


def formulation_for(format: str, target: str = "arm") -> Formulation:
    """How Mobile-Attention is written into a file of that format for processors of that kind, see `GROUP_WIDTHS`.

    Where the runtime quantizes activations on the fly, one projection instead of three rounds its input once, and
    shorter sequences gain by chunks.

    Raises:
        ValueError: an unknown target.
    """
    if target not in GROUP_WIDTHS:
        raise ValueError(f"There is no target {target!r}. Choose one of {', '.join(GROUP_WIDTHS)}.")
    width = GROUP_WIDTHS[target]
    if format == "dynamic":
        return Formulation(width, chunk_tokens=256, chunk_from=256 * 192, joint_projection=True)
    return Formulation(width)


def format_of(model: keras.Model, format: str | None = None) -> str:
    """The format that a model is written in: `format`, else its policy's name, else "float32".

    Raises:
        ValueError: an unknown format, or one that the model cannot be written in.
    """
    policy = quantization.policy_of(model)
    if policy is not None:
        if format not in (None, policy.name):
            raise ValueError(f"{model.name} was quantized for {policy.name}; it cannot be written as {format}.")
        return policy.name
    if format in quantization.POLICIES and format not in FORMATS:
        raise ValueError(
            f"{format} needs a model that was quantized: `python -m tflite.quantize --method={format}` does so without "
            f"training, `python -m tflite.qat --policy={format}` with it."
        )
    if format not in (None, *FORMATS):
        raise ValueError(f"There is no format {format!r}. Choose one of {', '.join(FORMATS)}.")
    return format or "float32"


def convert(
    model: keras.Model,
    format: str | None = None,
    formulation: Formulation | None = None,
    optimize: bool = True,
) -> bytes:
    """Converts a functional Keras model, whatever its batch size and precision, to a batch-1 .tflite file.

    Args:
        model: a functional model with one input, float [B, height, width, channels], and one output, or the boxes and
            logits of a detector; float, or out of `quantization.quantize_aware`.
        format: see `format_of`.
        formulation: how Mobile-Attention is written; None takes `formulation_for(format)`.
        optimize: False writes the graph as it is trained, without any of these rewrites.

    Returns:
        The file's content; one signature, "serving_default", from "images" to "output_0", or to "boxes" and "logits".
        The policies with int8 activations have int8 input and outputs, each with a scale and zero point of its own.

    Raises:
        ValueError: a format that the model cannot be written in, a model that cannot be rebuilt, has other outputs or
            is not calibrated.
        UserError: TensorFlow's converter refuses the model.
    """
    format = format_of(model, format)
    policy = quantization.policy_of(model)
    _check_outputs(model)
    copy = rebuild(model, batch_size=1, dense_patches=optimize)
    if optimize:
        copy = with_concatenations(copy)
    if policy is not None:
        quantization.bake(copy)
        _tell_biases_apart(copy)
    elif optimize:
        copy = lean(copy)
    if optimize:
        use_formulation(copy, formulation or formulation_for(format))
    if policy is None:
        return through_converter(copy, format, int8=False)
    content = through_converter(copy, format, int8=policy.activations)
    if not policy.activations:
        return content
    kept = ("LOGISTIC",) if policy.attention else ()  # rounded in training, too
    return float_ops.to_float(content, tuple(name for name in float_ops.FLOAT_ONLY if name not in kept))


def _check_outputs(model: keras.Model) -> None:
    if len(model.outputs) == 1 or isinstance(model, DistilledModel):
        return
    if not isinstance(model.output, dict) or model.output.keys() != {"boxes", "logits"}:
        raise ValueError(
            f"Only models with one output can be exported, but {model.name} has {len(model.outputs)}; detectors have "
            "boxes and logits."
        )


def _tell_biases_apart(model: keras.Model) -> None:
    """Moves one number of every bias that has the same number, not 0, for all channels, by the smallest step.

    TensorFlow's converter (2.21) keeps such a bias as one value, quantizes that by the scale of the first channel and
    writes the result for every channel, whose scales differ: the logits of an untrained detector, whose biases all are
    -4.6, were off by 1.3.
    """
    for projection in projections(model):
        bias = None if projection.bias is None else keras.ops.convert_to_numpy(projection.bias).copy()
        if bias is not None and len(bias) > 1 and bias[0] != 0 and np.ptp(bias) == 0:
            bias[-1] = np.nextafter(bias[-1], np.float32(0))
            projection.bias.assign(bias)


def use_formulation(model: keras.Model, formulation: Formulation) -> None:
    """Writes every attention of a model in that form from now on; subclasses of ours, which may mix otherwise, stay."""
    written = {*_FORMULATED, *(QUANTIZED_CLASSES[kind] for kind in _FORMULATED)}
    for layer in model.layers:
        if type(layer) in written:
            layer.use_formulation(formulation)


def convert_calibrated(model: keras.Model, images: Iterable[np.ndarray]) -> bytes:
    """TensorFlow's own full-integer quantization after training, for comparison.

    Args:
        model: a float model.
        images: float32 [1, height, width, channels] each: the representative dataset.

    Raises:
        UserError: TensorFlow's converter refuses the model.
    """
    return through_converter(rebuild(model, batch_size=1), "int8", int8=True, representative=images)


def through_converter(
    model: keras.Model, format: str, int8: bool, representative: Iterable[np.ndarray] | None = None
) -> bytes:
    """The file of a float32 model of batch 1 as it is, with nothing rewritten.

    Args:
        model: of `mobiatt_tf.models.rebuild`; a quantized one after `quantization.bake`.
        format: a key of `FORMATS`, or the name of the model's policy.
        int8: int8 input and output.
        representative: float32 images [1, height, width, channels] to calibrate TensorFlow's own quantization on.

    Raises:
        UserError: TensorFlow's converter refuses the model.
    """
    import tensorflow as tf

    signature = [keras.InputSpec(shape=model.inputs[0].shape, dtype="float32", name="images")]
    # The converter's remarks stay off standard output.
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        saved_model = str(Path(directory) / "saved_model")
        # Without the signature, Keras' export sets the batch size back to None.
        model.export(saved_model, format="tf_saved_model", input_signature=signature, verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(saved_model)
        if format != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if format == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if int8:
            converter.inference_input_type = converter.inference_output_type = tf.int8
        if representative is not None:
            converter.representative_dataset = lambda: ([image] for image in representative)
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        try:
            return bytes(converter.convert())
        except Exception as error:  # ConverterError is not public; the text begins with the operators concerned
            raise UserError(f"TensorFlow cannot convert {model.name} to TFLite: {first_line(error)}") from error

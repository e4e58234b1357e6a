"""Exports a trained model to ONNX and checks the file in onnxruntime against the Keras model.

Example:
    python -m mobiatt_tf.interop.onnx --checkpoint=runs/quickstart/train --output=runs/model.onnx

The file has one input "images", float32 [batch, height, width, 3] normalised as for training, and one output "logits".
A file that onnxruntime cannot load, or whose logits differ, is an error and is not left behind.
"""

import contextlib
import dataclasses
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import flags

from mobiatt_tf import cli, files, quantization
from mobiatt_tf.errors import UserError, first_line
from mobiatt_tf.models import DistilledModel, load_trained, rebuild
from mobiatt_tf.verification import Comparison, checking_images, compare, keras_logits

OPSET = 17
INPUT, OUTPUT = "images", "logits"
TOLERANCE = 1e-4  # of max|logit|; seen: 1e-6 for the three families in float32
QUANTIZED_TOLERANCE = 5e-2  # of a model with fake quantization, where a rounding may fall to the other side


@dataclass(frozen=True)
class OnnxExport:
    """A file that passed its check.

    Attributes:
        path: the .onnx file.
        comparison: with the Keras model, in onnxruntime.
        batch_size: of the input; None where it is open.
        op_counts: operators of the graph by type, most frequent first.
        versions: of the packages that made and ran it.
    """

    path: Path
    comparison: Comparison
    batch_size: int | None
    op_counts: dict[str, int]
    versions: dict[str, str]

    @property
    def quantized(self) -> bool:
        """Whether the graph has quantization in it (QuantizeLinear and DequantizeLinear)."""
        return "QuantizeLinear" in self.op_counts

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the JSON beside the file."""
        return {
            "file": self.path.name,
            "sha256": files.sha256(self.path),
            "size_bytes": self.path.stat().st_size,
            "opset": OPSET,
            "batch_size": self.batch_size,
            "verification": {**dataclasses.asdict(self.comparison), "passed": self.comparison.passed},
            "op_counts": self.op_counts,
            "quantized": self.quantized,
            "versions": self.versions,
        }


def export(
    model: keras.Model,
    output: str | Path,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    batch_size: int | None = None,
) -> OnnxExport:
    """Converts to ONNX (opset 17, float32) and checks; `output` exists afterwards only if the check passed.

    Args:
        model: a functional model with one image input and logits [B, classes]. Fake-quantized tensors become pairs of
            QuantizeLinear and DequantizeLinear.
        output: the .onnx file to write.
        images: float32 [N, height, width, 3], normalised: the images that file and model are compared on.
        labels: int [N], or None.
        batch_size: fixed batch size; None leaves it open.

    Raises:
        UserError: tf2onnx cannot convert the model, onnxruntime cannot load the file, the logits differ, or one of the
            two packages is missing.
        ValueError: a model that cannot be rebuilt in float32.
    """
    output = Path(output)
    proto = convert(model, batch_size)
    with files.atomic_path(output) as temporary:
        temporary.write_bytes(proto.SerializeToString())
        expected = keras_logits(rebuild(model, batch_size=None), images)
        counts = _op_counts(proto)
        tolerance = QUANTIZED_TOLERANCE if "QuantizeLinear" in counts else TOLERANCE
        comparison = compare(expected, run_file(temporary, images), labels, tolerance)
        if not comparison.passed:
            raise UserError(
                f"The ONNX file differs from its Keras model by {comparison.max_relative_error:.2e} of max|logit| on "
                f"{comparison.images} images, more than the allowed {tolerance:.0e}. Nothing was written."
            )
        report_path(output).unlink(missing_ok=True)  # no old report beside a new file
    result = OnnxExport(output, comparison, batch_size, counts, _versions())
    files.write_json(report_path(output), result.to_json())
    return result


def report_path(output: Path) -> Path:
    """model.onnx.json beside model.onnx: model.json may be the report of a model.tflite."""
    return output.with_name(f"{output.name}.json")


def _check_is_classifier(model: keras.Model) -> None:
    shapes = [tuple(output.shape) for output in model.outputs]
    if any(len(shape) != 2 for shape in shapes) or (len(shapes) > 1 and not isinstance(model, DistilledModel)):
        raise UserError(
            f"Only classifiers can be exported to ONNX, but {model.name} has outputs of the shapes {shapes}. "
            "TFLite and Core ML take detectors and segmenters."
        )


def convert(model: keras.Model, batch_size: int | None = None) -> Any:
    """The `onnx.ModelProto` of a functional Keras model; arguments and errors as in `export`."""
    _check_is_classifier(model)
    try:
        import tf2onnx
    except ImportError as error:
        raise UserError("tf2onnx is needed for ONNX: pip install mobiatt-tf[onnx].") from error
    import tensorflow as tf

    copy = rebuild(model, batch_size=batch_size)
    if quantization.is_quantized(copy):
        quantization.bake(copy)  # tf2onnx has no operator for kernels with a range for each channel
    specification = tf.TensorSpec((batch_size, *copy.inputs[0].shape[1:]), tf.float32, name=INPUT)

    @tf.function(input_signature=[specification])
    def serve(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {OUTPUT: tf.identity(copy(images, training=False), name=OUTPUT)}

    tf2onnx_log = logging.getLogger("tf2onnx")
    level = tf2onnx_log.level
    tf2onnx_log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            proto, _ = tf2onnx.convert.from_function(serve, input_signature=[specification], opset=OPSET)
    except Exception as error:  # tf2onnx raises whatever its handlers raise
        raise UserError(f"tf2onnx cannot convert {model.name}: {first_line(error)}") from error
    finally:
        tf2onnx_log.setLevel(level)
    _name_ends(proto, batch_size)
    proto.graph.name = model.name
    return proto


def _name_ends(proto: Any, batch_size: int | None) -> None:
    """tf2onnx calls the input "images:0" or "images", the output "Identity:0" and an open batch "unk__123"."""
    ends = {proto.graph.input[0].name: INPUT, proto.graph.output[0].name: OUTPUT}
    for node in proto.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = ends.get(name, name)
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.name = ends[value.name]
        if batch_size is None:
            value.type.tensor_type.shape.dim[0].dim_param = "batch"


def _op_counts(proto: Any) -> dict[str, int]:
    types = [node.op_type for node in proto.graph.node]
    return dict(sorted(((op, types.count(op)) for op in set(types)), key=lambda item: (-item[1], item[0])))


def run_file(path: str | Path, images: np.ndarray) -> np.ndarray:
    """The file's logits for float32 images [N, height, width, 3], in batches of its own size: float32 [N, classes].

    Raises:
        UserError: onnxruntime is missing or cannot load the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("onnxruntime is needed to check the file: pip install mobiatt-tf[onnx].") from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base
        raise UserError(f"onnxruntime cannot load {path}: {first_line(error)}") from error
    size = session.get_inputs()[0].shape[0]
    batch = size if isinstance(size, int) else 32
    outputs = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        filled = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), part.dtype)])
        outputs.append(session.run([OUTPUT], {INPUT: filled if isinstance(size, int) else part})[0][: len(part)])
    return np.concatenate(outputs)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("tensorflow", "keras", "tf2onnx", "onnx", "onnxruntime")}


def format_table(result: OnnxExport) -> str:
    """What was written and how it compares, as text."""
    check = result.comparison
    batch = "any" if result.batch_size is None else result.batch_size
    lines = [
        f"{result.path}  {result.path.stat().st_size / 1e6:.2f} MB, opset {OPSET}, batch {batch}"
        + (", quantized" if result.quantized else ""),
        "Operators       " + ", ".join(f"{op} {count}" for op, count in result.op_counts.items()),
        f"Against Keras   max error {check.max_relative_error:.1e} of max|logit| (allowed {check.tolerance:.0e}), "
        f"same class on {check.agreement:.2%} of {check.images} real images",
    ]
    if check.keras_top1 is not None:
        lines.append(f"Top-1           {check.file_top1:.2%} (Keras {check.keras_top1:.2%}) on these images")
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    """Exports as the flags say."""
    values = flags.FLAGS
    output = files.user_path(values.output)
    if output.suffix != ".onnx":
        raise UserError(f"--output={values.output} must end in .onnx.")
    model = load_trained(values.checkpoint)
    _check_is_classifier(model)
    images, labels, what = checking_images(
        values.checkpoint, values.dataset, values.cache_dir, model.input_shape[1:3], values.check_images
    )
    print(f"Checked on {what}.")
    try:
        result = export(model, output, images, labels, values.batch_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(format_table(result))
    print(f"Wrote {output} and {output.with_suffix('.json').name} beside it.")


def define_flags() -> None:
    """The command line's flags."""
    flags.DEFINE_string("checkpoint", None, "Output directory of a training run, or a .keras file.", required=True)
    flags.DEFINE_string("output", None, "The .onnx file to write; a .json goes beside it.", required=True)
    flags.DEFINE_integer("batch_size", None, "Fixed batch size; without it any.", lower_bound=1)
    flags.DEFINE_string("dataset", None, "Images to check on; without it those of the run, else photographs.")
    flags.DEFINE_string("cache_dir", None, "Where downloads of --dataset are kept.")
    flags.DEFINE_integer("check_images", 128, "How many images to check on.", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    cli.run(main)

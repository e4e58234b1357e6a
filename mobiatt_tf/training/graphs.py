"""Anything that can be evaluated, as one kind of thing: Keras files, checkpoints, .tflite, .onnx and .mlpackage.

Detectors and segmenters are evaluated as Keras models and as .tflite files.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mobiatt_tf import files
from mobiatt_tf.errors import UserError, first_line
from mobiatt_tf.models import load_trained
from mobiatt_tf.tasks import task_of
from mobiatt_tf.training.losses import inference_logits

WEIGHTS = ("average", "last")
_CHECKPOINT = re.compile(r"(step_\d{9,})(?:\.index|\.json|\.data-.*)?")
_TENSOR = "{}/{}/.ATTRIBUTES/VARIABLE_VALUE"  # tf.train.Checkpoint's name of an item of a list
_INTERPRETED_IMAGES = 8  # at a time through the NumPy interpreter: often enough a look at the signals and the clock
WHAT = "a training run's directory, RUN/checkpoints/step_000000123, a .keras, .tflite, .onnx or .mlpackage"

_LOGITS = {
    "classification": "logits [batch, classes] of at least two classes",
    "detection": "logits [batch, anchors, classes] of at least one class",
    "segmentation": "logits [batch, height, width, classes] of at least one class",
}

Predict = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class Graph:
    """A model in some format, ready to run.

    Attributes:
        path: as it was given.
        format: "keras", "checkpoint", "tflite", "onnx" or "coreml".
        image_size: (height, width) of its input.
        classes: how many it tells apart.
        predict: float32 images [N, height, width, 3], normalised, to logits float32 [N, classes]; of a segmenter
            [N, h, w, classes], of a detector {"boxes": [N, A, 4], "logits": [N, A, classes]}.
        step: images to give at a time.
        runtime: what runs it, JSON values: name, version, threads (None: not settable), types of input and output.
        weights: of a checkpoint, one of `WEIGHTS`; None for the others.
        size_bytes: of the file or package.
        sha256: of its content.
        task: one of `mobiatt_tf.tasks.TASKS`.
        of_size: of a Keras model what makes `predict` for images of another (height, width); None for a file, which has
            one size.
    """

    path: Path
    format: str
    image_size: tuple[int, int]
    classes: int
    predict: Predict
    step: int
    runtime: dict[str, Any]
    weights: str | None
    size_bytes: int
    sha256: str
    task: str = "classification"
    of_size: Callable[[tuple[int, int]], Predict] | None = None


def load(path: str | Path, batch_size: int, num_threads: int, weights: str | None = None) -> Graph:
    """Loads a graph by what its path is.

    Args:
        path: the output directory of a training run (its model.keras), RUN/checkpoints/step_000000123, or a file or
            package that ends in .keras, .tflite, .onnx or .mlpackage.
        batch_size: images at a time for those that take any number.
        num_threads: of LiteRT and ONNX Runtime. TensorFlow's are the process's; NumPy's are its library's.
        weights: of a checkpoint: "average" or "last"; None takes the moving average where there is one.

    Raises:
        UserError: it is missing, damaged, of another kind, takes something else than one image [B, height, width, 3],
            or gives what no task has; or its runtime is not installed.
        ValueError: `weights` is unknown.
    """
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"There are no weights {weights!r}; allowed are {', '.join(WEIGHTS)}.")
    path = files.user_path(path)
    if match := _CHECKPOINT.fullmatch(path.name):
        return _checkpoint(path.with_name(match[1]), batch_size, weights)
    loaders: dict[str, Callable[[], Graph]] = {
        ".keras": lambda: _keras(path, batch_size),
        ".tflite": lambda: _tflite(path, batch_size, num_threads),
        ".onnx": lambda: _onnx(path, batch_size, num_threads),
        ".mlpackage": lambda: _coreml(path),
    }
    if path.suffix in loaders:
        if not path.exists():
            raise UserError(f"There is no {path}. Export a model first, or check the name.")
        return loaders[path.suffix]()
    if path.is_dir():
        return _keras(path, batch_size)
    missing = "" if path.exists() else ", and does not exist"
    raise UserError(f"{path} is of no known kind{missing}. Give {WHAT}.")


def _keras(path: Path, batch_size: int) -> Graph:
    model = load_trained(path)
    file = path / "model.keras" if path.is_dir() else path
    return _of_model(model, path, "keras", batch_size, [file])


def _checkpoint(path: Path, batch_size: int, weights: str | None) -> Graph:
    """The network of the run's model.keras with the weights of one of its checkpoints."""
    data_files = sorted(path.parent.glob(f"{path.name}.data-*"))
    index_file = path.with_name(f"{path.name}.index")
    if not index_file.is_file() or not data_files:
        known = ", ".join(sorted(file.stem for file in path.parent.glob("step_*.index"))) or "none"
        raise UserError(f"There is no checkpoint {path}. Whole ones in {path.parent}: {known}.")
    model = load_trained(path.parents[1])
    variables = [weight.value for weight in model.weights]
    try:
        # A reader takes single tensors; tf.train.Checkpoint would warn of everything that is left unread.
        reader = tf.train.load_checkpoint(str(path))
        has_average = reader.has_tensor(_TENSOR.format("averages", 0))
        if weights == "average" and not has_average:
            raise UserError(f"{path} has no moving average: its recipe had ema_decay=0. Give --weights=last.")
        chosen = weights or ("average" if has_average else "last")
        if reader.has_tensor(_TENSOR.format("weights", len(variables))):
            raise ValueError(f"it has more than the model's {len(variables)} weights")
        for index, variable in enumerate(variables):
            variable.assign(reader.get_tensor(_TENSOR.format("weights", index)))
        if chosen == "average":
            # `WeightAverage` keeps those of the floating point weights alone, in float32.
            for index, variable in enumerate(each for each in variables if each.dtype.is_floating):
                variable.assign(tf.cast(reader.get_tensor(_TENSOR.format("averages", index)), variable.dtype))
    except (tf.errors.OpError, ValueError, RuntimeError, LookupError) as error:
        raise UserError(
            f"{path} is damaged or of another model than {path.parents[1] / 'model.keras'} ({first_line(error)}). "
            "Take another checkpoint."
        ) from error
    return _of_model(model, path, "checkpoint", batch_size, [index_file, *data_files], chosen)


def checked_task(model: keras.Model, path: Path) -> str:
    """What a Keras model does, one of `mobiatt_tf.tasks.TASKS`, where its outputs come as those of our models.

    Raises:
        UserError: no task has such outputs, they have other names or none, or the model is no functional one.
    """
    if not getattr(model, "outputs", None):
        raise UserError(
            f"{path} holds a {type(model).__name__}, whose inputs and outputs are not known beforehand. Save "
            "a functional model."
        )
    try:
        task = task_of(model)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    given = getattr(model, "output", None)  # a tensor, or a list, tuple or dict of them; a Sequential one has none
    named = f"a dict of {', '.join(given)}" if isinstance(given, dict) else f"a {type(given).__name__} of tensors"
    if task == "detection" and not (isinstance(given, dict) and given.keys() == {"boxes", "logits"}):
        raise UserError(f"{path} is no detector of this project: it gives {named}, not a dict of boxes and logits.")
    if task != "detection" and isinstance(given, dict):
        raise UserError(f"{path} is no model of this project: it gives {named}, not the logits alone.")
    return task


def _of_model(
    model: keras.Model, path: Path, format: str, batch_size: int, content: list[Path], weights: str | None = None
) -> Graph:
    task = checked_task(model, path)
    shape = tuple(model.inputs[0].shape) if len(model.inputs) == 1 else ()
    outputs = keras.tree.flatten(model.outputs)  # in the order of their names: a detector's logits are last
    image_size, classes = _sizes(path, shape, tuple(outputs[-1].shape), task)

    step = shape[0] or batch_size

    def predict_of(model: keras.Model, step: int) -> Predict:
        @tf.function(reduce_retracing=True)
        def run(images: tf.Tensor) -> Any:
            found = model(images, training=False)
            return inference_logits(found) if task == "classification" else found

        return _filled(lambda images: tf.nest.map_structure(np.asarray, run(tf.constant(images))), step)

    def of_size(size: tuple[int, int]) -> Predict:
        from keras_models import resize  # upwards, as in `_tflite`

        return predict_of(resize(model, size), shape[0] or 1)  # images of one size come one at a time

    return Graph(
        path=path,
        format=format,
        image_size=image_size,
        classes=classes,
        predict=predict_of(model, step),
        step=step,
        runtime={
            "name": "TensorFlow",
            "version": tf.__version__,
            "threads": tf.config.threading.get_intra_op_parallelism_threads() or None,
            "types": model.dtype_policy.name,
        },
        weights=weights,
        size_bytes=sum(file.stat().st_size for file in content),
        sha256=content_sha256(content),
        task=task,
        of_size=of_size,
    )


def _tflite(path: Path, batch_size: int, num_threads: int) -> Graph:
    # The formats' own packages stand above this one. Only this function, `_coreml` and `_of_model` reach up, when they
    # are called: the command belongs beside the training whose numbers it repeats (see tests/test_imports.py).
    from tflite.inspect import describe
    from tflite.verify import FileRunner, checked_task

    found = describe(path, num_threads)
    task = checked_task(found)
    shape = found.inputs[0].shape
    image_size, classes = _sizes(path, shape, found.outputs[0].shape, task)
    runner = FileRunner(path, num_threads)
    if task == "detection":  # which output is which only the runner knows
        logits = runner(np.zeros((1, *image_size, 3), np.float32))["logits"]
        image_size, classes = _sizes(path, shape, logits.shape, task)
    return Graph(
        path=path,
        format="tflite",
        image_size=image_size,
        classes=classes,
        predict=runner,
        step=batch_size,
        runtime={
            "name": "LiteRT",
            "version": metadata.version("ai-edge-litert"),
            "threads": num_threads,
            "types": found.inputs[0].dtype,
        },
        weights=None,
        size_bytes=found.size_bytes,
        sha256=content_sha256([path]),
        task=task,
    )


def _onnx(path: Path, batch_size: int, num_threads: int) -> Graph:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("onnxruntime is needed for .onnx files: pip install mobiatt-tf[onnx].") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base
        raise UserError(f"onnxruntime cannot load {path} ({first_line(error)}). Export it again.") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise UserError(f"{path} has {len(inputs)} inputs and {len(outputs)} outputs; it must have one each.")
    if inputs[0].type != "tensor(float)" or outputs[0].type != "tensor(float)":
        raise UserError(f"{path} takes {inputs[0].type} and gives {outputs[0].type}; both must be float32.")
    # A side whose name stands in place of a number is open.
    shape, out = (
        tuple(side if isinstance(side, int) else None for side in end.shape) for end in (inputs[0], outputs[0])
    )
    image_size, classes = _sizes(path, shape, out)
    name, step = inputs[0].name, shape[0] or batch_size

    def run(images: np.ndarray) -> np.ndarray:
        try:
            return session.run(None, {name: images})[0]
        except Exception as error:
            raise UserError(f"onnxruntime cannot run {path} ({first_line(error)}). Export it again.") from error

    return Graph(
        path=path,
        format="onnx",
        image_size=image_size,
        classes=classes,
        predict=_filled(run, step) if shape[0] else run,
        step=step,
        runtime={
            "name": "ONNX Runtime",
            "version": onnxruntime.__version__,
            "threads": num_threads,
            "types": "float32",
        },
        weights=None,
        size_bytes=path.stat().st_size,
        sha256=content_sha256([path]),
    )


def _coreml(path: Path) -> Graph:
    # See `_tflite` for these imports.
    from coreml import package
    from coreml.interpreter import Interpreter, logits_output
    from coreml.verify import as_pixels, kind_of

    found = package.read(path)
    if damaged := package.damage(found):
        raise UserError(f"{path} is damaged: {damaged}. Export it again.")
    name = logits_output(found)
    declared = next(iter(found.inputs.values())).shape or ()
    # An image is [1, 3, height, width]; an array may be that or [1, height, width, 3].
    shape = (*declared[:1], *declared[2:], 3) if declared[1:2] == (3,) and len(declared) == 4 else declared
    out = next(kind.shape for operation in found.operations for output, kind in operation.outputs if output == name)
    sides = tuple(side for side in out or () if side != 1)  # [1, classes], or [1, classes, 1, 1]
    image_size, classes = _sizes(path, shape if len(found.inputs) == 1 else (), (1, *sides))
    interpreter = Interpreter(found, "typed")
    return Graph(
        path=path,
        format="coreml",
        image_size=image_size,
        classes=classes,
        predict=lambda images: interpreter.logits(as_pixels(images)),
        step=_INTERPRETED_IMAGES,
        runtime={
            "name": "NumPy interpreter of coreml/",
            "version": np.__version__,
            "threads": None,
            "types": kind_of(found),
        },
        weights=None,
        size_bytes=found.size_bytes,
        sha256=content_sha256(sorted(file for file in path.rglob("*") if file.is_file())),
    )


def content_sha256(content: list[Path]) -> str:
    """One SHA-256 over the names and contents of files, in this order."""
    digest = hashlib.sha256()
    for file in content:
        digest.update(f"{file.name} {files.sha256(file)}\n".encode())
    return digest.hexdigest()


def _sizes(
    path: Path, shape: tuple[int | None, ...], out: tuple[int | None, ...], task: str = "classification"
) -> tuple[tuple[int, int], int]:
    """((height, width), classes) of what goes from [B, height, width, 3] to logits; an open side is None or -1.

    Raises:
        UserError: it does not.
    """
    height, width = shape[1:3] if len(shape) == 4 and shape[3] == 3 else (None, None)
    if not height or not width or min(height, width) < 1:
        given = f"takes {list(shape)}" if shape else "has not one input"
        raise UserError(
            f"{path} {given}; it must take one image [batch, height, width, 3] with fixed height and width."
        )
    rank, least = {"classification": (2, 2), "detection": (3, 1), "segmentation": (4, 1)}[task]
    classes = out[-1] if len(out) == rank else None
    if not classes or classes < least:
        raise UserError(f"{path} gives {list(out)}; it must give {_LOGITS[task]}.")
    return (height, width), classes


def _filled(run: Predict, step: int) -> Predict:
    """The same for any number of images, for a function that is to see `step` of them (zeros fill up the rest)."""

    def predict(images: np.ndarray) -> Any:
        outputs = []
        for start in range(0, len(images), step):
            part = images[start : start + step]
            filling = np.zeros((step - len(part), *part.shape[1:]), part.dtype)
            outputs.append(run(np.concatenate([part, filling])))
        # What belongs to the filling is cut off.
        return tf.nest.map_structure(lambda *parts: np.concatenate(parts)[: len(images)], *outputs)

    return predict

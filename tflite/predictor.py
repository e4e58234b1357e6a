"""A trained model or a .tflite file, ready to be shown photographs: its task, its classes, and what it sees in one."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mobiatt_tf import files
from mobiatt_tf.errors import UserError, first_line
from tflite import classes as class_files
from tflite.preparation import Preparation

INFERENCES = ("sliding", "whole")


@dataclass(frozen=True)
class Predictor:
    """Runs a model.

    Attributes:
        path: as it was given.
        task: one of `mobiatt_tf.tasks.TASKS`.
        image_size: (height, width) of its input.
        class_names: of all classes, by index.
        run: float32 images [n, height, width, 3], normalised, to what the model gives: logits [n, classes] of a
            classifier or [n, h, w, classes] of a segmenter, {"boxes": [n, A, 4], "logits": [n, A, classes]} of a
            detector.
        preparation: of a photograph for a classifier.
        category_ids: of a detector's classes, as the dataset that it was trained on numbers them; None: not known.
    """

    path: Path
    task: str
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    run: Callable[[np.ndarray], Any]
    preparation: Preparation = field(default_factory=Preparation)
    category_ids: tuple[int, ...] | None = None

    def classify(self, image: np.ndarray, count: int = 5) -> list[tuple[str, float]]:
        """The `count` most probable classes of an image uint8 [H, W, 3] and their probabilities, in (0, 1]."""
        logits = np.asarray(self.run(self.preparation(image, self.image_size)), np.float64)[0]  # [classes]
        _check_finite(logits)
        weights = np.exp(logits - logits.max())
        best = np.argsort(-logits, kind="stable")[:count]
        return [(self.class_names[index], float(weights[index] / weights.sum())) for index in best]

    def detect(self, image: np.ndarray, score_threshold: float) -> Any:
        """`mobiatt_tf.tasks.decoding.Detections` of an image uint8 [H, W, 3], in its pixels.

        Args:
            image: the photograph.
            score_threshold: detections with a higher score count.
        """
        from mobiatt_tf.data.detection_pipeline import letterbox
        from mobiatt_tf.tasks.decoding import decode_detections

        canvas, scale = letterbox(image, self.image_size)
        outputs = self.run(canvas[None])
        height, width = image.shape[:2]
        try:
            found = decode_detections(
                outputs["boxes"][0],
                outputs["logits"][0],
                self.image_size,
                score_threshold=score_threshold,
                clip_to=(height * scale, width * scale),
            )
        except ValueError as error:
            raise UserError(first_line(error)) from error
        return found.scaled(1 / scale)

    def segment(self, image: np.ndarray, inference: str = "sliding") -> np.ndarray:
        """The class of each pixel, uint8 [H, W], of an image uint8 [H, W, 3].

        Args:
            image: the photograph.
            inference: "sliding": its short side becomes that of the model's input, which goes over it in steps of two
                thirds of its own size, as the measure of `mobiatt_tf.tasks.segmentation` does; "whole": it is fitted
                into the input, and the model runs once.
        """
        if inference not in INFERENCES:
            raise ValueError(f"There is no inference {inference!r}. Choose one of {', '.join(INFERENCES)}.")
        from mobiatt_tf.tasks.segmenting import classes_at

        try:
            logits = self._fitted_logits(image) if inference == "whole" else self._sliding_logits(image)
        except ValueError as error:
            raise UserError(first_line(error)) from error
        return classes_at(logits, (image.shape[0], image.shape[1]))

    def _sliding_logits(self, image: np.ndarray) -> np.ndarray:
        from mobiatt_tf.data.segmentation_pipeline import resize_short_side
        from mobiatt_tf.tasks.segmenting import sliding

        return sliding(self.run, resize_short_side(image, min(self.image_size)), self.image_size)

    def _fitted_logits(self, image: np.ndarray) -> np.ndarray:
        """float32 [h, w, classes] of that part of the input which the image fills."""
        from mobiatt_tf.data.detection_pipeline import letterbox
        from mobiatt_tf.tasks.segmenting import whole

        canvas, scale = letterbox(image, self.image_size)
        logits = whole(lambda _: self.run, canvas)  # [height, width, classes]
        height, width = (max(1, round(side * scale)) for side in image.shape[:2])
        return logits[:height, :width]


def load(path: str | os.PathLike[str], labels: str | None, num_threads: int) -> Predictor:
    """Loads a model and finds the names of its classes.

    Args:
        path: the output directory of a training run, a .keras or a .tflite file.
        labels: a text file with one class name a line, or what `python -m tflite.classes` writes; None takes the
            classes that the run's results or the JSON beside a .tflite file name, else "class 0", "class 1", ... How
            images are prepared, which the JSON says too, counts for classifiers.
        num_threads: of LiteRT.

    Raises:
        UserError: it is missing, damaged, no model of a known task, there are not as many names as classes, or images
            would have to be prepared as they cannot be for this task or input.
    """
    given = files.user_path(path)
    known: tuple[str, ...] | None
    if given.suffix == ".tflite":
        task, image_size, count, run = _of_file(given, num_threads)
        known, ids = _classes_beside(given)
    else:
        task, image_size, count, run = _of_model(given)
        from mobiatt_tf.verification import category_ids_of_run, class_names_of_run

        known, ids = class_names_of_run(given), category_ids_of_run(given)
    preparation = Preparation()
    if labels is not None:
        known, preparation = _read_labels(files.user_path(labels), image_size)
        preparation.refuse_for(task)
    names = known or tuple(f"class {index}" for index in range(count))
    if len(names) != count:
        source = f"--labels={labels} names" if labels is not None else "what stands beside it names"
        raise UserError(f"{given} has {count} classes, but {source} {len(names)}. Give --labels with {count} names.")
    if ids is not None and len(ids) != count:
        ids = None
    return Predictor(given, task, image_size, names, run, preparation, ids)


_Loaded = tuple[str, tuple[int, int], int, Callable[[np.ndarray], Any]]


def _of_model(path: Path) -> _Loaded:
    """Task, image size, classes and the function of a Keras model."""
    import keras

    import keras_models  # registers the layers that saved models name  # noqa: F401
    from mobiatt_tf.models import load_trained
    from mobiatt_tf.training.graphs import checked_task
    from mobiatt_tf.training.losses import inference_logits

    model = load_trained(path)
    task = checked_task(model, path)
    shape = tuple(model.inputs[0].shape) if len(model.inputs) == 1 else ()
    image_size = _image_size(path, shape)
    classes = int(keras.tree.flatten(model.outputs)[0].shape[-1])
    if task == "detection":
        classes = int(model.output["logits"].shape[-1])

    def run_one(image: np.ndarray) -> Any:
        found = model.predict_on_batch(image[None])
        return np.asarray(inference_logits(found)) if task == "classification" else found

    def run(images: np.ndarray) -> Any:
        each = [run_one(image) for image in images]  # a large model would not hold all windows
        return keras.tree.map_structure(lambda *values: np.concatenate(values).astype("float32"), *each)

    return task, image_size, classes, run


def _of_file(path: Path, num_threads: int) -> _Loaded:
    """The same of a .tflite file, which a process of its own has looked at before: a damaged one ends no process."""
    from tflite.inspect import describe
    from tflite.verify import FileRunner, checked_task

    found = describe(path, num_threads)
    task = checked_task(found)
    image_size = _image_size(path, found.inputs[0].shape)
    run = FileRunner(path, num_threads)
    outputs = run(np.zeros((1, *image_size, 3), np.float32))
    logits = outputs["logits"] if task == "detection" else outputs
    return task, image_size, int(logits.shape[-1]), run


def _image_size(path: Path, shape: tuple[Any, ...]) -> tuple[int, int]:
    if len(shape) != 4 or shape[0] not in (None, 1) or shape[3] != 3 or not all(s and s > 0 for s in shape[1:3]):
        given = f"takes {list(shape)}" if shape else "has not one input"
        raise UserError(f"{path} {given}; it must take one image [1, height, width, 3] of fixed height and width.")
    return int(shape[1]), int(shape[2])


def _classes_beside(path: Path) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
    """The classes and their ids in the JSON that an export wrote beside its file; None where there are none."""
    beside = path.with_suffix(".json")
    content = files.read_json(beside) if beside.is_file() else {}
    found = [content.get(key) if isinstance(content, dict) else None for key in ("classes", "category_ids")]
    names, ids = (
        tuple(values) if isinstance(values, list) and values and all(type(value) is kind for value in values) else None
        for values, kind in zip(found, (str, int), strict=True)
    )
    return names, ids


def _read_labels(path: Path, image_size: tuple[int, int]) -> tuple[tuple[str, ...], Preparation]:
    """Class names, and how images are prepared for a classifier with an input of `image_size`."""
    if path.suffix == ".json":
        found = class_files.read(path)
        if found["image_size"] is not None and tuple(found["image_size"]) != image_size:
            raise UserError(
                f"--labels={path} is for images of {found['image_size']} (image_size), but the model takes "
                f"{list(image_size)}. Give the labels of this model, or leave image_size out."
            )
        return tuple(found["classes"]), Preparation.of(found)
    try:
        names = path.read_text(encoding="utf-8-sig").splitlines()  # editors on Windows begin with a mark
    except OSError as error:
        raise UserError(f"--labels={path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError:
        raise UserError(f"--labels={path} is not text in UTF-8. Give one class name a line.") from None
    return tuple(name.strip() for name in names if name.strip()), Preparation()


def _check_finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise UserError("the model's outputs are not finite")

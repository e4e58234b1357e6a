"""Shows photographs to a trained model or a .tflite file, and draws what it sees.

Example:
    python -m tflite.predict --model=runs/quickstart_dense/detection photo.jpg --output_dir=runs/predictions

A classifier's best classes are printed; a detector's boxes and a segmenter's regions are drawn. predictions.json says
the same in numbers. Those of a detector are entries of COCO's format of results ("bbox": x, y, width, height in pixels)
with the names of files and categories; "category_id" is the dataset's own, where the run or the JSON beside the file
says it. pycocotools needs "image_id", too, which a photograph does not have: take that of the image with this
"file_name" (a path below the directory that holds all photographs) from the annotations.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from mobiatt_tf import cli, files
from mobiatt_tf.data.checked import printable
from mobiatt_tf.errors import UserError, first_line
from tflite import drawing, photos, predictor
from tflite.predictor import Predictor

_TOP = 5
_JPEG_QUALITY = 92
_JPEG_SIDE = 65_500  # JPEG_MAX_DIMENSION of libjpeg
# What each task writes beside predictions.json, behind the name of the photograph.
_ENDINGS = {"classification": (), "detection": ("_boxes.jpg",), "segmentation": ("_regions.jpg", "_labels.png")}


@dataclass(frozen=True)
class Seen:
    """What a model sees in one photograph.

    Attributes:
        entries: of predictions.json.
        line: for the screen.
        pictures: PIL images by the endings of their files' names, see `_ENDINGS`.
    """

    entries: list[dict[str, Any]]
    line: str
    pictures: dict[str, Any]


Predict = Callable[
    [np.ndarray, str, str], Seen
]  # of an image uint8 [H, W, 3], its file's name, and that of its pictures


def classification(model: Predictor, image: np.ndarray, name: str) -> Seen:
    """The best classes and their probabilities."""
    best = model.classify(image, _TOP)
    entry = {"file_name": name, "classes": [{"name": label, "probability": share} for label, share in best]}
    return Seen([entry], ", ".join(f"{label} {share:.1%}" for label, share in best), {})


def detection(model: Predictor, image: np.ndarray, name: str, score_threshold: float) -> Seen:
    """Boxes: an entry each, and a picture with all."""
    found = model.detect(image, score_threshold)
    entries, captions = [], []
    for (left, top, right, bottom), score, label in zip(found.boxes, found.scores, found.labels, strict=True):
        box = [float(left), float(top), float(right - left), float(bottom - top)]
        category = model.class_names[label]
        entries.append(
            {
                "file_name": name,
                # An index is no id: COCO's 80 classes have ids up to 90.
                **({} if model.category_ids is None else {"category_id": model.category_ids[label]}),
                "class_index": int(label),
                "category_name": category,
                "bbox": [round(value, 2) for value in box],
                "score": float(score),
            }
        )
        captions.append(f"{category} {score:.0%}")
    picture = drawing.draw_boxes(image, found.boxes, captions, found.labels)
    line = ", ".join(captions) or f"nothing with a score above {score_threshold:g}"
    return Seen(entries, line, {"_boxes.jpg": picture})


def segmentation(model: Predictor, image: np.ndarray, name: str, stem: str, inference: str) -> Seen:
    """The share of each class, an overlay, and the class of each pixel."""
    labels = model.segment(image, inference)
    counts = drawing.count_labels(labels, len(model.class_names))
    present = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    shares = {model.class_names[index]: float(counts[index] / labels.size) for index in present}
    entry = {"file_name": name, "labels": printable(f"{stem}_labels.png"), "shares": shares}
    pictures = {
        "_regions.jpg": drawing.draw_regions(image, labels, model.class_names, counts),
        "_labels.png": drawing.label_picture(labels, len(model.class_names)),
    }
    return Seen([entry], ", ".join(f"{label} {share:.1%}" for label, share in list(shares.items())[:_TOP]), pictures)


def _save(picture: Any, path: Path) -> None:
    with files.atomic_path(path) as temporary:
        picture.save(temporary, **({"quality": _JPEG_QUALITY} if path.suffix == ".jpg" else {}))


def _see(path: Path, name: str, stem: str, predict: Predict) -> Seen:
    """What is seen in the photograph of that path.

    Raises:
        UserError: it cannot be read, the model fails on it, or there is no memory for it, or no JPEG that large.
    """
    from tensorflow import errors

    image = photos.read_photo(path)
    try:
        seen = predict(image, name, stem)
    except (MemoryError, errors.ResourceExhaustedError):
        raise UserError(f"no memory for {image.shape[1]} x {image.shape[0]} pixels") from None
    except errors.OpError as error:
        raise UserError(first_line(error)) from None
    for ending, picture in seen.pictures.items():
        if ending.endswith(".jpg") and max(picture.size) > _JPEG_SIDE:
            size = f"{picture.width} x {picture.height}"
            raise UserError(f"its picture would have {size} pixels, but a side of a JPEG has {_JPEG_SIDE:,} at most")
    return seen


def predict_all(paths: Sequence[Path], output_dir: Path, predict: Predict) -> int:
    """Goes over the photographs, writes their pictures and predictions.json; what fails is named on standard error.

    Stopped by Ctrl-C or a full disk, predictions.json has what was done until then. Without any photograph that could
    be read it is not written.

    Args:
        paths: of the photographs.
        output_dir: where pictures and predictions.json go.
        predict: what is seen in an image.

    Returns:
        How many photographs were read.

    Raises:
        UserError: the disk refuses.
    """
    entries: list[dict[str, Any]] = []
    read = 0
    try:
        with tqdm(paths, desc="photos", leave=False, disable=len(paths) < 2) as bar:
            for path, name, stem in zip(bar, photos.relative_names(paths), photos.distinct_stems(paths), strict=True):
                try:
                    seen = _see(path, name, stem, predict)
                except (UserError, MemoryError) as error:
                    what = error if isinstance(error, UserError) else "no memory for it"
                    bar.write(f"skipped: {printable(str(path))}: {what}", file=sys.stderr)
                    continue
                for ending, picture in seen.pictures.items():
                    _save(picture, output_dir / f"{stem}{ending}")
                entries += seen.entries
                read += 1
                bar.write(f"{printable(str(path))}: {seen.line}", file=sys.stdout)
    finally:
        if read:
            files.write_json(output_dir / "predictions.json", entries)
    return read


def main(argv: Sequence[str]) -> None:
    """Predicts as the flags say."""
    values = flags.FLAGS
    output_dir = files.user_path(values.output_dir)
    paths = photos.photo_paths(argv[1:])
    if flags.FLAGS["num_threads"].present and not values.model.endswith(".tflite"):
        raise UserError(
            "--num_threads is for .tflite files; a Keras model takes the threads of TensorFlow. Leave it out."
        )
    model = predictor.load(values.model, values.labels, values.num_threads)
    _refuse_useless_flags(model.task)
    stems = photos.distinct_stems(paths)
    pictures = [output_dir / f"{stem}{ending}" for stem in stems for ending in _ENDINGS[model.task]]
    photos.refuse_overwriting(argv[1:], paths, output_dir, [*pictures, output_dir / "predictions.json"])
    height, width = model.image_size
    print(f"{printable(str(model.path))}: {model.task}, {len(model.class_names)} classes, input {height} x {width}")
    if model.task == "classification":
        assumed = (
            "" if (values.labels or "").endswith(".json") else " (assumed; --labels=JSON of tflite.classes says it)"
        )
        print(f"It sees {model.preparation}{assumed}.")

    def predict(image: np.ndarray, name: str, stem: str) -> Seen:
        if model.task == "detection":
            return detection(model, image, name, values.score_threshold)
        if model.task == "segmentation":
            return segmentation(model, image, name, stem, values.inference)
        return classification(model, image, name)

    written = printable(str(output_dir / "predictions.json"))
    try:
        read = predict_all(paths, output_dir, predict)
    except KeyboardInterrupt:
        print(f"What was done before is in {written}, if anything was.", file=sys.stderr)
        raise
    if not read:
        raise UserError(f"None of {_photographs(len(paths))} could be read; nothing was written.")
    print(f"{_photographs(read)}, {len(paths) - read} skipped. Wrote {written}")


def _photographs(count: int) -> str:
    return f"{count} photograph{'s' * (count != 1)}"


def _refuse_useless_flags(task: str) -> None:
    """Raises UserError for a flag that the task does not have."""
    for name, its_task in (("score_threshold", "detection"), ("inference", "segmentation")):
        if flags.FLAGS[name].present and task != its_task:
            raise UserError(f"--{name} is for {its_task}, but this is a model for {task}. Leave it out.")


def define_flags() -> None:
    """The command line's flags."""
    flags.DEFINE_string("model", None, "Directory of a training run, or a .keras or .tflite file.", required=True)
    flags.DEFINE_string("output_dir", "runs/predictions", "Gets the pictures and predictions.json.")
    flags.DEFINE_string(
        "labels", None, "A text file with a class name a line, or a .json of tflite.classes; without it those known."
    )
    flags.DEFINE_float(
        "score_threshold", 0.3, "Detection: only boxes with a higher score.", lower_bound=0.0, upper_bound=0.999
    )
    flags.DEFINE_enum(
        "inference",
        "sliding",
        list(predictor.INFERENCES),
        "Segmentation: the input slides over the photograph, or the whole photograph is fitted into it.",
    )
    flags.DEFINE_integer("num_threads", 1, "Of LiteRT, for .tflite files.", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    cli.run(main, repeated="PHOTO")

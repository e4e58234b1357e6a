"""Quantizes a trained model without training it further, by several methods, and compares the files on a test set.

Example:
    python -m tflite.quantize --checkpoint=runs/quickstart/train --method=int8,dynamic --output_dir=runs/quantized

Every file is run against the float model on the whole test set before it is kept; one that loses more than
--max_top1_loss points of top-1 (of AP for a detector, of mIoU for a segmenter) is refused. What calibration alone
loses, training wins back: see tflite.qat.
"""

import contextlib
import dataclasses
import functools
import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import flags

from mobiatt_tf import cli, files, quantization, verification
from mobiatt_tf.errors import UserError, first_line
from mobiatt_tf.lean import lean
from mobiatt_tf.models import load_trained, rebuild
from mobiatt_tf.quantization.calibration import calibration_images
from mobiatt_tf.tasks import task_of
from mobiatt_tf.training.checkpoints import locked
from mobiatt_tf.verification import class_count
from tflite import comparison, convert, dense_report, export, inspect
from tflite.comparison import FAKE_QUANT, FLOAT, Row
from tflite.verify import FileRunner

METHODS = {
    "dynamic": "TensorFlow's dynamic range: weights in int8",
    "float16": "TensorFlow's float16 weights",
    "int8": quantization.POLICIES["int8"].description,
    "int8_full": quantization.POLICIES["int8_full"].description + "; slower and less exact than int8 on CPUs",
    "tf_int8": "TensorFlow's full-integer quantization, which this operator does not bear; for comparison",
    "litert_dynamic": "litert-quantizer's dynamic recipe, as a peer; needs litert-quantizer",
    "litert_int8": "litert-quantizer's static int8 recipe, as a peer; needs litert-quantizer",
}

_LAYER_ERROR_IMAGES = 32


def load_dataset(checkpoint: str, name: str | None, cache_dir: str | None) -> Any:
    """The dataset called `name`, else that of the run, as the task of the model at `checkpoint` takes it.

    Raises:
        UserError: the model cannot be read, or the dataset cannot be had.
    """
    try:
        task = task_of(load_trained(checkpoint))
    except ValueError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    return verification.dataset_of(checkpoint, name, cache_dir, task)


def load_float(checkpoint: str, dataset: Any) -> keras.Model:
    """The model of a run in float32, checked against the dataset.

    Raises:
        UserError: it cannot be read, is quantized already, or knows another number of classes.
    """
    model = load_trained(checkpoint)
    if quantization.is_quantized(model):
        raise UserError(f"{checkpoint} is quantized already. Give the float model it came from.")
    if class_count(model) != len(dataset.class_names):
        raise UserError(
            f"The model at {checkpoint} has {class_count(model)} classes, the dataset {dataset.name} has "
            f"{len(dataset.class_names)}: it is the checkpoint of another model, or another dataset."
        )
    try:
        return rebuild(model, batch_size=None)  # in float32, whatever it was trained in
    except ValueError as error:
        raise UserError(str(error)) from error


def quantize(
    model: keras.Model,
    dataset: Any,
    methods: Sequence[str],
    output: Path,
    calibration_images: int = 512,
    max_top1_loss: float = 0.01,
    runs: int = 50,
) -> dict[str, Any]:
    """Writes METHOD.tflite for each method that passes, float32.tflite, report.json and report.png into `output`.

    Args:
        model: float functional model of images [B, height, width, 3]: a classifier, a detector or a segmenter.
        dataset: training images to calibrate on, test images to compare on; of the kind that the model's task takes.
        methods: keys of `METHODS`.
        output: directory.
        calibration_images: how many training images.
        max_top1_loss: what a file may lose on the test set, as a share in [0, 1]: of top-1, AP or mIoU.
        runs: timed inferences of each file.

    Returns:
        What report.json says.

    Raises:
        UserError: the float32 file cannot be made or does not run, or a layer cannot be quantized.
    """
    makers: dict[str, Callable[[], bytes]] = {}
    fake_quant: dict[str, keras.Model] = {}
    for method in methods:
        if method in ("int8", "int8_full"):
            fake_quant[method] = quantization.calibrated_copy(lean(model), method, dataset, calibration_images)
            makers[method] = functools.partial(convert.convert, fake_quant[method])
        elif method in ("dynamic", "float16"):
            makers[method] = functools.partial(convert.convert, model, method)
        else:
            makers[method] = functools.partial(_PEERS[method], model, dataset, calibration_images)
    failures: dict[str, str] = {}
    with candidates(output) as directory:
        paths = {"float32.tflite": directory / "float32.tflite"}
        paths["float32.tflite"].write_bytes(convert.convert(model, "float32"))
        for method, make in makers.items():
            try:
                content = make()
            except ImportError as error:
                print(
                    f"{method} is left out: {first_line(error)}. See METHODS in tflite/quantize.py for what it needs."
                )
                continue
            except Exception as error:  # a peer's converter raises what it likes
                failures[f"{method}.tflite"] = first_line(error)
                continue
            paths[f"{method}.tflite"] = directory / f"{method}.tflite"
            paths[f"{method}.tflite"].write_bytes(content)
        twins = {f"{method}.tflite": twin for method, twin in fake_quant.items()}
        return compare_and_keep(model, twins, dataset, paths, output, max_top1_loss, runs, failures)


@contextlib.contextmanager
def candidates(output: Path) -> Iterator[Path]:
    """A directory inside `output` for files that have not been checked; removed at the end, and what a kill left there.

    Raises:
        UserError: another process works in `output`, or it cannot be written.
    """
    with locked(output):
        for stale in output.glob(".candidates.*"):
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=output, prefix=".candidates.") as directory:
            yield Path(directory)


def compare_and_keep(
    model: keras.Model,
    twins: Mapping[str, keras.Model],
    dataset: Any,
    paths: dict[str, Path],
    output: Path,
    max_top1_loss: float,
    runs: int,
    failures: Mapping[str, str] | None = None,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Compares candidate files on the whole test set, moves the good ones to `output` and writes the report.

    Args:
        model: the float model, of any task.
        twins: name of a file to the fake-quantized model it was made from, for those that have one.
        dataset: its test split is compared on.
        paths: candidate files by the name they get; "float32.tflite" first.
        output: directory.
        max_top1_loss: as a share in [0, 1].
        runs: timed inferences of each file.
        failures: name to message of files that could not be made.
        extra: more values for the report.

    Raises:
        UserError: the float model's outputs are not finite, or the float32 file does not run here.
    """
    task = task_of(model)
    failures, paths = dict(failures or {}), dict(paths)
    for name in list(paths):
        try:
            export.check_description(inspect.describe(paths[name]))
        except UserError as error:
            failures[name] = str(error)
            del paths[name]
    if "float32.tflite" in failures:
        raise UserError(failures["float32.tflite"])
    runners: dict[str, Any] = {FLOAT: comparison.keras_runner(model)}
    twin_names = {file: FAKE_QUANT if index == 0 else f"{FAKE_QUANT} {file}" for index, file in enumerate(twins)}
    runners.update({twin_names[file]: comparison.keras_runner(twin) for file, twin in twins.items()})
    runners.update({name: FileRunner(path) for name, path in paths.items()})
    image_size = model.input_shape[1:3]
    rows: list[Any]
    if task == "classification":
        logits, labels, broken = comparison.all_logits(runners, dataset.test, image_size)
        failures.update(broken)
        paths = {name: path for name, path in paths.items() if name not in failures}
        rows, measured = comparison.make_rows(logits, labels, paths, twin_names, runs)
    else:
        results, broken = dense_report.measure(task, runners, dataset, image_size)
        failures.update(broken)
        paths = {name: path for name, path in paths.items() if name not in failures}
        images = dense_report.compared_images(task, dataset, image_size)
        rows, measured = dense_report.make_rows(task, results, runners, images, paths, twin_names, runs)
        extra = {"task": task, "metrics": dense_report.METRICS[task], **(extra or {})}
    images = _images_of(next(iter(calibration_images(task, dataset, image_size, _LAYER_ERROR_IMAGES))))
    errors = {file: quantization.layer_errors(lean(model), twin, images) for file, twin in twins.items()}
    rows = [judge(row, rows[0].score, max_top1_loss, errors.get(row.name), row.name in twins) for row in rows]
    for method in ("float32", *METHODS):  # none of an earlier run beside the report of this one
        for suffix in (".tflite", ".json"):
            (output / f"{method}{suffix}").unlink(missing_ok=True)
    for row in rows:
        if row.file is not None and row.refused is None:
            os.replace(paths[row.name], output / row.file)
            _describe(output / row.file, task, dataset)
    report = comparison.to_json(
        rows,
        next(iter(errors.values()), {}),
        measured,
        {
            "dataset": dataset.name,
            "test_images": len(dataset.test),
            "model": model.name,
            "input_shape": list(model.input_shape[1:]),
            "max_top1_loss": max_top1_loss,
            "failures": failures,
            **(extra or {}),
        },
    )
    comparison.write_report(output, report)
    return report


def _describe(path: Path, task: str, dataset: Any) -> None:
    """The JSON beside a file from which `tflite.predict` has its classes."""
    ids = getattr(dataset, "category_ids", None)
    content = {
        "file": path.name,
        "task": task,
        "classes": list(dataset.class_names),
        **({} if ids is None else {"category_ids": list(ids)}),
        "sha256": files.sha256(path),
    }
    files.write_json(path.with_suffix(".json"), content)


def judge(
    row: Any, float_score: float, max_loss: float, errors: Mapping[str, float] | None, has_twin: bool = False
) -> Any:
    """The row, with the reason to refuse its file if there is one.

    Args:
        row: `comparison.Row` or `dense_report.DenseRow` of a file, or of a Keras model, which is never refused.
        float_score, max_loss: see `comparison.check_loss`.
        errors: of the layers of its fake-quantized twin, largest first.
        has_twin: whether there is such a twin, with which the file must have been compared.
    """
    if row.file is None:
        return row
    reason = comparison.check_loss(row, float_score, max_loss, next(iter(errors.items()), None) if errors else None)
    agreement = row.agreement_with_fake_quant
    if reason is None and has_twin and agreement is None:
        reason = f"{row.name} could not be compared with the fake-quantized model it was made from."
    if isinstance(row, dense_report.DenseRow):
        reason = reason or dense_report.loses_a_small_score(row, float_score, max_loss)
        return dataclasses.replace(row, refused=reason or dense_report.unlike_its_twin(row))
    if reason is None and agreement is not None and not agreement >= comparison.MIN_AGREEMENT:
        reason = (
            f"{row.name} gives the class of the fake-quantized model on {agreement:.2%} of the images only, less than "
            f"{comparison.MIN_AGREEMENT:.0%}: the converter changed it."
        )
    return dataclasses.replace(row, refused=reason)


def _tensorflow_int8(model: keras.Model, dataset: Any, count: int) -> bytes:
    return convert.convert_calibrated(model, _single_images(model, dataset, count))


def _litert(recipe_name: str, model: keras.Model, dataset: Any, count: int) -> bytes:
    from litert_quantizer import quantizer, recipe

    peer = quantizer.Quantizer(convert.convert(model, "float32"), getattr(recipe, recipe_name)())
    ranges = None
    # Its own progress bars and a remark on debugging options stay off the terminal.
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
        if peer.need_calibration:
            samples = [{"images": image} for image in _single_images(model, dataset, count)]
            ranges = peer.calibrate({"serving_default": samples}, num_threads=1)
        return bytes(peer.quantize(ranges, enable_progress_bar=False, enable_progress_report=False).quantized_model)


_PEERS: dict[str, Callable[[keras.Model, Any, int], bytes]] = {
    "tf_int8": _tensorflow_int8,
    "litert_dynamic": functools.partial(_litert, "dynamic_wi8_afp32"),
    "litert_int8": functools.partial(_litert, "static_wi8_ai8"),
}


def _single_images(model: keras.Model, dataset: Any, count: int) -> list[np.ndarray]:
    """`count` calibration images, float32 [1, height, width, 3] each."""
    batches = calibration_images(task_of(model), dataset, model.input_shape[1:3], count)
    return [image[None] for batch in batches for image in _images_of(batch)]


def _images_of(batch: Any) -> np.ndarray:
    """The images of a batch, which may have labels beside them."""
    return np.asarray(batch[0] if isinstance(batch, tuple) else batch)


def summary(report: dict[str, Any], output: Path) -> str:
    """What the command prints at its end."""
    rows: list[Any]
    if task := report.get("task"):
        rows = [dense_report.DenseRow(**row) for row in report["rows"]]
        table = dense_report.format_table(task, rows)
    else:
        rows = [Row(**row) for row in report["rows"]]
        table = comparison.format_table(rows)
    lines = [f"{report['test_images']:,} test images of {report['dataset']}", table]
    worst = list(report["layer_errors"].items())[:3]
    if worst:
        lines.append("Largest layer errors: " + ", ".join(f"{name} {error:.4f}" for name, error in worst))
    kept = [row.file for row in rows if row.file and not row.refused]
    lines.append(f"Wrote {', '.join(kept)}, report.json and report.png to {output}.")
    return "\n".join(lines)


def finish(report: dict[str, Any], output: Path) -> None:
    """Prints the summary.

    Raises:
        UserError: a file was refused; says why.
    """
    print(summary(report, output))
    problems = [row["refused"] for row in report["rows"] if row["refused"]]
    problems += [f"{name} does not run: {message.rstrip('.')}." for name, message in report["failures"].items()]
    if problems:
        raise UserError(" ".join(problems))


def main(_: Sequence[str]) -> None:
    """Quantizes as the flags say."""
    values = flags.FLAGS
    unknown = [method for method in values.method if method not in METHODS]
    if unknown or not values.method:
        raise UserError(f"--method={','.join(values.method)}: choose from {', '.join(METHODS)}.")
    dataset = limited(load_dataset(values.checkpoint, values.dataset, values.cache_dir), values.limit_test)
    model = load_float(values.checkpoint, dataset)
    output = files.user_path(values.output_dir)
    report = quantize(
        model, dataset, values.method, output, values.calibration_images, values.max_top1_loss / 100, values.runs
    )
    finish(report, output)


def limited(dataset: Any, test_images: int | None) -> Any:
    """The dataset with the first `test_images` of its test split; None takes all."""
    return dataclasses.replace(dataset, test=dataset.test.take(test_images)) if test_images else dataset


def define_flags() -> None:
    """The flags that tflite.qat has too."""
    flags.DEFINE_string("checkpoint", None, "The float model: directory of a run, or a .keras file.", required=True)
    flags.DEFINE_string("output_dir", None, "Gets the files and the report.", required=True)
    flags.DEFINE_string("dataset", None, "Calibration and test images; without it those of the run.")
    flags.DEFINE_string("cache_dir", None, "Where downloads of --dataset are kept.")
    flags.DEFINE_integer("calibration_images", 512, "Training images that set the start ranges.", lower_bound=1)
    flags.DEFINE_integer("limit_test", None, "Compare on so many test images only.", lower_bound=1)
    flags.DEFINE_float(
        "max_top1_loss",
        1.0,
        "Points of top-1 that a file may lose; of AP where the model is a detector, of mIoU where it is a segmenter.",
        lower_bound=0.0,
    )
    flags.DEFINE_integer("runs", 50, "Timed inferences of each file.", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_list("method", ["int8"], "; ".join(f"{name}: {text}" for name, text in METHODS.items()))
    cli.run(main)

"""Quantization-aware training in one command: calibrate, fine-tune, export, verify, compare.

Example:
    python -m tflite.qat --checkpoint=runs/quickstart/train --policy=int8 --output_dir=runs/qat

Trains in float32. Run again, it resumes where it was stopped. The .tflite file is kept only if it loses no more than
--max_top1_loss points on the whole test set. Detectors and segmenters are trained by their own task's loss.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
from absl import flags

from mobiatt_tf import cli, files, quantization, tasks, training
from mobiatt_tf.errors import UserError
from mobiatt_tf.lean import lean
from mobiatt_tf.models import load_trained
from tflite import convert, quantize

# Only policies that training can do something for; float16 loses nothing as it is.
POLICIES = ("int8", "int8_full", "dynamic")

# What the qat recipe has instead for detectors and segmenters: images are large, and the losses have no smoothing.
DENSE_RECIPE: dict[str, Any] = {"batch_size": 16, "label_smoothing": 0.0, "flip": 0.5}


def fine_tune(
    checkpoint: str,
    dataset: Any,
    policy: str,
    recipe: training.Recipe,
    output: Path,
    strategy: Any,
    calibration_images: int = 512,
    cadence: training.Cadence | None = None,
    jit_compile: bool = False,
    task: str = "classification",
) -> dict[str, Any]:
    """Trains the calibrated fake-quantized copy of a float model in `output`, or goes on with it.

    Args:
        checkpoint: of the float model, see `load_trained`.
        dataset: the images it learns from and is measured on, of the kind that the task takes.
        policy: one of `POLICIES`.
        recipe: from `training.make_recipe("qat")`; drop_path is the float model's.
        output: directory of this run alone.
        strategy: from `training.make_strategy`.
        calibration_images: training images that set the start ranges.
        cadence, jit_compile: see `training.train`.
        task: of the model, one of `tasks.TASKS`.

    Returns:
        What results.json says.

    Raises:
        UserError, TrainingInterrupted: see `training.train`.
    """
    path = files.user_path(checkpoint)
    path = path / "model.keras" if path.is_dir() else path
    begun = any((output / "checkpoints").glob("step_*.json"))

    def build() -> keras.Model:
        model = lean(quantize.load_float(checkpoint, dataset))
        if not begun:
            return quantization.calibrated_copy(model, policy, dataset, calibration_images)
        return quantization.quantize_aware(model, policy)  # its ranges are in the checkpoint

    identity = {
        "policy": policy,
        "calibration_images": calibration_images,
        "started_from": files.sha256(path)[:16] if path.is_file() else None,
    }
    return training.train(
        build,
        dataset,
        recipe,
        output,
        strategy,
        model_config=identity,
        cadence=cadence,
        jit_compile=jit_compile,
        task=tasks.make_task(task),
    )


def main(_: Sequence[str]) -> None:
    """Runs the pipeline as the flags say."""
    values = flags.FLAGS
    output = files.user_path(values.output_dir)
    dataset = quantize.load_dataset(values.checkpoint, values.dataset, values.cache_dir)
    if values.limit_train:
        dataset = dataclasses.replace(dataset, train=dataset.train.take(values.limit_train))
    model = quantize.load_float(values.checkpoint, dataset)
    try:
        task = tasks.task_of(model)
        overrides = {name: flags.FLAGS[name].value for name in _RECIPE_FLAGS if flags.FLAGS[name].value is not None}
        recipe = training.make_recipe("qat", **{**({} if task == "classification" else DENSE_RECIPE), **overrides})
        strategy = training.make_strategy(values.strategy)
        results = fine_tune(
            values.checkpoint,
            dataset,
            values.policy,
            recipe,
            output / "train",
            strategy,
            values.calibration_images,
            training.Cadence(checkpoint_steps=values.checkpoint_every_steps),
            values.jit_compile,
            task,
        )
    except training.TrainingInterrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(interruption.exit_status)
    except ValueError as error:
        raise UserError(str(error)) from error

    twin = load_trained(output / "train")
    with quantize.candidates(output) as directory:
        paths = {name: directory / name for name in ("float32.tflite", f"{values.policy}.tflite")}
        for path, source in zip(paths.values(), (model, twin), strict=True):
            path.write_bytes(convert.convert(source))
        report = quantize.compare_and_keep(
            model,
            {f"{values.policy}.tflite": twin},
            quantize.limited(dataset, values.limit_test),
            paths,
            output,
            values.max_top1_loss / 100,
            values.runs,
            extra={
                "policy": values.policy,
                "recipe": dataclasses.asdict(recipe),
                "train_seconds": results["train_seconds"],
            },
        )
    quantize.finish(report, output)


_RECIPE_FLAGS = {
    "epochs": flags.DEFINE_integer,
    "batch_size": flags.DEFINE_integer,
    "learning_rate": flags.DEFINE_float,
    "warmup_epochs": flags.DEFINE_float,
    "weight_decay": flags.DEFINE_float,
    "label_smoothing": flags.DEFINE_float,
    "ema_decay": flags.DEFINE_float,
    "clip_norm": flags.DEFINE_float,
    "augmentation": flags.DEFINE_string,
    "flip": flags.DEFINE_float,
    "scale_low": flags.DEFINE_float,
    "scale_high": flags.DEFINE_float,
    "accumulation": flags.DEFINE_integer,
    "seed": flags.DEFINE_integer,
}


def define_flags() -> None:
    """The flags of this command; those of tflite.quantize come before."""
    policies = "; ".join(f"{name}: {quantization.POLICIES[name].description}" for name in POLICIES)
    flags.DEFINE_enum("policy", "int8", list(POLICIES), f"{policies}. On CPUs int8 is the fastest and most exact.")
    flags.DEFINE_integer("limit_train", None, "Train on so many images only.", lower_bound=1)
    flags.DEFINE_enum("strategy", "one", training.STRATEGIES, "One device, or all of this machine.")
    flags.DEFINE_integer("checkpoint_every_steps", 0, "Besides the end of every epoch; 0: never.")
    flags.DEFINE_bool("jit_compile", False, "Compile the forward and backward pass with XLA.")
    for name, define in _RECIPE_FLAGS.items():
        define(name, None, f"Replaces the qat recipe's {name}.")


if __name__ == "__main__":
    quantize.define_flags()
    define_flags()
    cli.run(main)

"""What makes two processes parts of one run, and whether model, data and devices fit together."""

import dataclasses
import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from mobiatt_tf import data, files
from mobiatt_tf.errors import UserError
from mobiatt_tf.training.recipes import Recipe


def total_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Steps of a whole run: `max_steps` where the recipe has it, else those of its epochs."""
    return recipe.max_steps or recipe.epochs * steps_per_epoch


def steps_per_epoch(dataset: Any, recipe: Recipe, strategy: tf.distribute.Strategy) -> int:
    """Steps of one epoch; the images that do not fill a last batch are left out (others in each epoch).

    Raises:
        ValueError: the batch does not divide over the devices and the parts of accumulation, or is larger than the
            training split; or the run ends before the learning rate has fallen as the recipe says.
    """
    replicas, parts = strategy.num_replicas_in_sync, recipe.accumulation
    if recipe.batch_size % (replicas * parts):
        split = f"{replicas} devices" + (f" in {parts} parts each" if parts > 1 else "")
        raise ValueError(f"The batch of {recipe.batch_size} images cannot be split evenly over {split}.")
    if recipe.image_augmentation().mixes and recipe.batch_size // (replicas * parts) % 2:
        raise ValueError(
            f"mixup and cutmix mix images in pairs: {recipe.batch_size // (replicas * parts)} images for a device "
            "at a time is an odd number. Choose another batch_size."
        )
    if recipe.repeats > max(recipe.batch_size // 2, 1):
        raise ValueError(
            f"repeats is {recipe.repeats}; with batches of {recipe.batch_size} images it must be at most "
            f"{max(recipe.batch_size // 2, 1)}, so that a batch holds different images."
        )
    found = data.steps_per_epoch(dataset.train, recipe.batch_size)
    if recipe.schedule == "steps" and recipe.decay_epoch_numbers()[-1] * found >= total_steps(recipe, found):
        raise ValueError(
            f"decay_epochs is {recipe.decay_epochs}, but the run ends after {total_steps(recipe, found) / found:.4g} "
            "epochs: the learning rate would not fall. Change decay_epochs as well."
        )
    return found


def check(model: keras.Model, strategy: tf.distribute.Strategy, jit_compile: bool) -> None:
    """Raises ValueError where model and devices do not fit together."""
    if len(model.input_shape) != 4 or None in model.input_shape[1:] or model.input_shape[3] != 3:
        raise ValueError(
            f"The model takes {model.input_shape}; it must take (None, height, width, 3) with fixed numbers."
        )
    depthwise = any(isinstance(layer, keras.layers.DepthwiseConv2D) for layer in model._flatten_layers())
    if jit_compile and depthwise and model.dtype_policy.compute_dtype == "bfloat16" and not _has_accelerator():
        # TensorFlow 2.21: "Seen floating point types of different precisions" in DepthwiseConv2dNativeBackpropInput.
        raise ValueError(
            "XLA cannot compile depthwise convolutions in bfloat16 on CPUs: set jit_compile to False, or precision to "
            "float32."
        )
    if strategy.num_replicas_in_sync > 1:
        norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
        if jit_compile and any(norm.synchronized for norm in norms):
            raise ValueError(
                "XLA cannot compile synchronized batch norm over several devices: set jit_compile to False."
            )
        if any(not norm.synchronized for norm in norms):
            logging.warning(
                "Batch norm sees one device's share of the batch, and the statistics of the first device are saved: "
                "build the model with synchronized batch norm to get the results of one device."
            )


def _has_accelerator() -> bool:
    return bool(tf.config.list_physical_devices("GPU") or tf.config.list_physical_devices("TPU"))


def identify(
    model: keras.Model, dataset: Any, recipe: Recipe, model_config: dict[str, Any], task: str = "classification"
) -> dict[str, Any]:
    """What must be equal for two processes to be parts of one run."""
    of_task = {} if task == "classification" else {"task": task}  # absent in runs from before there were others
    return {
        **of_task,
        "recipe": dataclasses.asdict(recipe),
        "dataset": {
            "name": dataset.name,
            "classes": len(dataset.class_names),
            "train_images": len(dataset.train),
            "test_images": len(dataset.test),
            "fingerprint": fingerprint(dataset),
        },
        "model": {**model_config, "input_shape": list(model.input_shape[1:]), "parameters": model.count_params()},
    }


def fingerprint(dataset: Any) -> str:
    """16 hexadecimal digits of SHA-256 over labels and pixels, or over labels and class, name and size of each file.

    Splits of boxes or masks have a fingerprint of their own.
    """
    digest = hashlib.sha256()
    for split in (dataset.train, dataset.test):
        if isinstance(split, data.Split):
            add_split(digest, split, dataset.class_names)
        else:
            digest.update(split.fingerprint())
    return digest.hexdigest()[:16]


def add_split(digest: "hashlib._Hash", split: data.Split, class_names: Sequence[str]) -> None:
    """Adds what tells a split apart: labels and pixels, or class, name and size of each file, or records' checksums."""
    digest.update(split.labels.tobytes())
    if split.images is not None:
        digest.update(split.images.tobytes())
    for name, label in zip(split.files or (), split.labels, strict=False):
        path = Path(name)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(
                f"The image {path} can no longer be read ({error.strerror}). Put the file back and give the same "
                "command again."
            ) from error
        entry = f"{class_names[label]}/{path.name} {size}\n"
        digest.update(entry.encode(errors="surrogateescape"))
    if split.records is not None:
        digest.update(split.records.fingerprint())


def finished_results(output_dir: Path, total_steps: int) -> dict[str, Any] | None:
    """The results of a run that is complete: results.json of the last step, and beside it a whole model.keras."""
    try:
        results = files.read_json(output_dir / "results.json")
    except UserError:  # missing or damaged: written anew
        return None
    whole = isinstance(results, dict) and results.get("step") == total_steps and _is_whole(output_dir / "model.keras")
    return results if whole else None


def _is_whole(archive: Path) -> bool:
    """Whether the file is a zip archive in which every checksum is right."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return opened.testzip() is None
    except Exception:  # OSError, BadZipFile, NotImplementedError, zlib.error ...: as the damage has it
        return False

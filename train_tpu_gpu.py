"""Trains a classifier, a detector or a segmenter, or goes on with the run in --output_dir.

Example, a few minutes on a CPU:
    python train_tpu_gpu.py --recipe=quickstart --variant=quickstart --output_dir=runs/fashion
    python train_tpu_gpu.py --task=detection --recipe=coco --dataset=tfds:coco/2017 --start_from=pvt_v2_b0.pth \
        --output_dir=runs/coco
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from absl import flags, logging

import keras_models
from mobiatt_tf import cli, data, files, tasks, training, verification
from mobiatt_tf.errors import UserError
from mobiatt_tf.models import load_trained

TASK = flags.DEFINE_enum("task", "classification", tasks.TASKS, "What the model is trained for.")
DATASET = flags.DEFINE_string(
    "dataset",
    None,
    f"One of {', '.join(data.NAMES)}, tfds:NAME, or a folder of images or shards; without it fashion_mnist. For "
    "detection and segmentation: scenes (the default), tfds:coco/2017, tfds:scene_parse150, or a folder.",
)
CACHE_DIR = flags.DEFINE_string("cache_dir", None, "Where downloads are kept.")
LIMIT_TRAIN = flags.DEFINE_integer("limit_train", None, "Take only so many training images.", lower_bound=1)
LIMIT_TEST = flags.DEFINE_integer("limit_test", None, "Take only so many test images.", lower_bound=1)
MODEL = flags.DEFINE_enum(
    "model", None, list(keras_models.FAMILIES), "Family; without it deit, for detection and segmentation pvt_v2."
)
VARIANT = flags.DEFINE_string("variant", None, "Size within the family; without it, the smallest published one.")
IMAGE_SIZE = flags.DEFINE_string(
    "image_size", None, "224, or 192x256 for height 192; without it, the variant's or the task's."
)
TRAINING_SIZE = flags.DEFINE_string(
    "training_size", None, "Detection, segmentation: image size that the backbone was trained at; without it 224."
)
NUM_HEADS = flags.DEFINE_integer("num_heads", None, "Attention heads; without it, the variant's.", lower_bound=1)
HEAD_DIM = flags.DEFINE_integer("head_dim", None, "Channels of a head instead of their number.", lower_bound=1)
DISTILLED = flags.DEFINE_bool("distilled", False, "Add a distillation head; without a teacher it learns the labels.")
TEACHER = flags.DEFINE_string("teacher", None, "Keras model that the distillation head learns from: .keras or a run.")
START_FROM = flags.DEFINE_string("start_from", None, "Initial weights: .pth, .safetensors, .keras or a run.")
ATTENTION = cli.define_attention("Kind of attention")
RECIPE = flags.DEFINE_enum(
    "recipe", None, list(training.RECIPES), "Every field of it is a flag too; without it the task's quickstart."
)
STRATEGY = flags.DEFINE_enum(
    "strategy",
    "one",
    training.STRATEGIES,
    "One device, all of this machine, several machines (TF_CONFIG, SLURM), a TPU.",
)
TPU = flags.DEFINE_string("tpu", None, "Name or address of the TPU; without it that of this machine.")
LOGICAL_DEVICES = flags.DEFINE_integer("logical_devices", None, "Split the CPU into so many devices.", lower_bound=1)
OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Gets the logs, checkpoints, results and model.", required=True)
LOG_EVERY = flags.DEFINE_integer("log_every", 50, "Steps between two log lines.")
EVALUATE_EVERY = flags.DEFINE_integer("evaluate_every", 1, "Epochs between two evaluations.")
CHECKPOINT_SECONDS = flags.DEFINE_float("checkpoint_every_seconds", 600, "Besides the end of every epoch.")
CHECKPOINT_STEPS = flags.DEFINE_integer("checkpoint_every_steps", 0, "Besides the end of every epoch; 0: never.")
JIT_COMPILE = flags.DEFINE_bool("jit_compile", False, "Compile the forward and backward pass with XLA.")
DETERMINISTIC = flags.DEFINE_bool("deterministic", False, "Only deterministic operations: slower, repeats bit by bit.")
EVALUATE_ONLY = flags.DEFINE_bool("evaluate_only", False, "Evaluate model.keras in --output_dir and change nothing.")

_DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool, str: flags.DEFINE_string}
OVERRIDES = {
    field.name: _DEFINE[field.type](field.name, None, f"Replaces the recipe's {field.name}.")  # type: ignore[index]
    for field in dataclasses.fields(training.Recipe)
}


# Recipes that are made for one task alone.
_RECIPES_OF = {
    "coco": "detection",
    "quickstart_detection": "detection",
    "ade20k": "segmentation",
    "quickstart_segmentation": "segmentation",
}


def load_dataset() -> Any:
    """The dataset of the flags."""
    of_run = verification.dataset_of_run(OUTPUT_DIR.value) if EVALUATE_ONLY.value else None
    name = DATASET.value or of_run or ("fashion_mnist" if TASK.value == "classification" else "scenes")
    dataset = tasks.load_dataset(TASK.value, name, CACHE_DIR.value)
    if LIMIT_TRAIN.value:
        dataset = dataclasses.replace(dataset, train=dataset.train.take(LIMIT_TRAIN.value))
    if LIMIT_TEST.value:
        dataset = dataclasses.replace(dataset, test=dataset.test.take(LIMIT_TEST.value))
    return dataset


def evaluate(model: keras.Model, dataset: Any, strategy: tf.distribute.Strategy, recipe: training.Recipe) -> None:
    """Prints what the saved model reaches."""
    task = tasks.make_task(TASK.value)
    task.check_model(model, dataset)
    verification.warn_of_other_classes(OUTPUT_DIR.value, dataset)
    result = task.evaluator(model, dataset, strategy, recipe)(dataset.test, lambda: None)
    print(f"{OUTPUT_DIR.value}: {format_scores(result.to_line())} on {result.count} images of {dataset.name}")


def format_scores(line: dict[str, Any]) -> str:
    """The scores of a log line or of results.json in the order in which the task draws them, and the loss."""
    curves = tasks.make_task(TASK.value).curves
    shown = [f"{label} {line[key]:.2%}" for label, key in curves.items() if line.get(key) is not None]
    return ", ".join([*shown, *([f"loss {line['loss']:.4f}"] if line.get("loss") is not None else [])])


def recipe_of_flags() -> training.Recipe:
    """The recipe, with the fields that have flags.

    Raises:
        UserError: a field that would be ignored, because the recipe has its other form.
        ValueError: a value that is not allowed, or that the task does not know.
    """
    overrides = {name: flag.value for name, flag in OVERRIDES.items() if flag.value is not None}
    name = RECIPE.value or ("quickstart" if TASK.value == "classification" else f"quickstart_{TASK.value}")
    recipe = training.make_recipe(name, **overrides)
    wanted = _RECIPES_OF.get(name, TASK.value)
    if wanted != TASK.value:
        raise UserError(f"--recipe={name} is for --task={wanted}, not for {TASK.value}.")
    for ignored, instead in (("epochs", "max_steps"), ("warmup_epochs", "warmup_steps")):
        if ignored in overrides and getattr(recipe, instead) and instead not in overrides:
            raise UserError(
                f"--{ignored}={overrides[ignored]} would be ignored: the recipe has {instead}="
                f"{getattr(recipe, instead)}. Add --{instead}=0, or give --{instead} alone."
            )
    if not EVALUATE_ONLY.value:
        tasks.make_task(TASK.value).check_recipe(recipe)
    return recipe


def load_model_of_run(strategy: tf.distribute.Strategy) -> keras.Model:
    """The saved model.

    Raises:
        UserError: there is none, or it is for another task than --task.
    """
    with strategy.scope():
        model = load_trained(OUTPUT_DIR.value)
    if (found := tasks.task_of(model)) != TASK.value:
        raise UserError(f"The model in {OUTPUT_DIR.value} is for {found}: add --task={found}.")
    return model


def family_name() -> str:
    """--model, or the task's default."""
    return MODEL.value or ("deit" if TASK.value == "classification" else "pvt_v2")


def model_arguments(recipe: training.Recipe) -> dict[str, Any]:
    """What recipe and flags say of the model, as run.json and results.json have it; without flags that are not given.

    Raises:
        UserError: the family cannot be distilled.
    """
    family = keras_models.FAMILIES[family_name()]
    arguments = {
        "variant": VARIANT.value or family.default_variant,
        "num_heads": NUM_HEADS.value,
        "attention": cli.attention(ATTENTION.value),
    }
    if HEAD_DIM.value is not None:
        arguments["head_dim"] = HEAD_DIM.value
    if DISTILLED.value and not family.has_distillation:
        raise UserError(f"--distilled does not go with --model={family_name()}, which has one head.")
    if TASK.value != "classification":
        trained = cli.image_size(TRAINING_SIZE.value) or (224, 224)
        return {**arguments, "training_size": list(trained)}
    if DISTILLED.value or (recipe.distillation != "none" and family.has_distillation):
        arguments["distilled"] = True
    return arguments


def build_model(
    classes: int, recipe: training.Recipe, replicas: int, arguments: dict[str, Any], start: bool
) -> keras.Model:
    """The model of the flags, with the weights of --start_from if `start`."""
    try:
        if TASK.value != "classification":
            model = build_dense_model(classes, recipe, replicas, arguments)
        else:
            family = keras_models.FAMILIES[family_name()]
            extra = {"synchronized_batch_norm": True} if family.has_batch_norm and replicas > 1 else {}
            size = cli.image_size(IMAGE_SIZE.value)
            model = family.build(image_size=size, num_classes=classes, drop_path=recipe.drop_path, **arguments, **extra)
        if start:
            from mobiatt_tf.interop import start_from

            print(f"{START_FROM.value}: {start_from(model, START_FROM.value)}")
    except ValueError as error:
        raise UserError(str(error)) from error
    return model


def build_dense_model(classes: int, recipe: training.Recipe, replicas: int, arguments: dict[str, Any]) -> keras.Model:
    """The detector or segmenter of the flags.

    Raises:
        ValueError: an argument that is not allowed.
    """
    size = cli.image_size(IMAGE_SIZE.value)
    return keras_models.DENSE[TASK.value](
        family_name(),
        **({"image_size": size} if size else {}),
        num_classes=classes,
        drop_path=recipe.drop_path,
        freeze_batch_norm=recipe.freeze_batch_norm,
        synchronized_batch_norm=replicas > 1,
        **arguments,
    )


def build_teacher(classes: int) -> Callable[[tf.Tensor], tf.Tensor]:
    """The teacher of the flags."""
    return training.make_teacher(training.load_teacher(TEACHER.value, classes))


def weights_identity(flag: str, path: str) -> str:
    """16 hexadecimal digits that tell the weights in a file, or in a run's directory, apart.

    Raises:
        UserError: there is no such file.
    """
    file = files.user_path(path)
    file = file / "model.keras" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"--{flag}={path}: there is no file {file}.")
    return files.sha256(file)[:16]


def started_from(path: str) -> tuple[str, bool]:
    """16 hexadecimal digits that tell the weights of --start_from apart, and whether they are still to be read.

    A run with checkpoints holds its own weights: it goes on without the file it once started from.

    Raises:
        UserError: there is no such file.
    """
    output = files.user_path(OUTPUT_DIR.value)
    run = files.read_json(output / "run.json") if (output / "run.json").is_file() else {}
    earlier = run.get("model", {}).get("started_from") if any((output / "checkpoints").glob("step_*.json")) else None
    try:
        found = weights_identity("start_from", path)
    except UserError:
        if earlier:
            return earlier, False
        raise
    return found, found != earlier


def check_flags(recipe: training.Recipe) -> None:
    """Whether the flags go together.

    Raises:
        UserError: they do not.
    """
    if TPU.value and STRATEGY.value != "tpu":
        raise UserError(f"--tpu={TPU.value} does not go with --strategy={STRATEGY.value}; add --strategy=tpu.")
    if LOGICAL_DEVICES.value and STRATEGY.value != "mirrored":
        raise UserError("--logical_devices is for --strategy=mirrored.")
    if EVALUATE_ONLY.value:
        return
    if TASK.value == "classification" and TRAINING_SIZE.value:
        raise UserError("--training_size is for --task=detection and --task=segmentation.")
    if TASK.value != "classification" and (TEACHER.value or DISTILLED.value):
        raise UserError(f"Distillation is for classification: it does not go with --task={TASK.value}.")
    if RECIPE.value in ("coco", "ade20k") and not START_FROM.value:
        logging.warning(
            "The recipe %s is made for a backbone that was trained on ImageNet, and begins with random weights here: "
            "give a classifier with --start_from.",
            RECIPE.value,
        )
    if RECIPE.value == "fine_tune" and not START_FROM.value:
        raise UserError("--recipe=fine_tune takes small steps from weights that are good already: add --start_from.")
    if recipe.distillation != "none" and not TEACHER.value:
        raise UserError(
            f"The recipe has distillation={recipe.distillation}: give the model to learn from with --teacher, or "
            "--distillation=none."
        )
    if recipe.distillation == "none" and TEACHER.value:
        raise UserError("--teacher is there but nothing learns from it: add --distillation=hard.")


def main(_: Sequence[str]) -> None:
    """Trains or evaluates as the flags say."""
    for size in (IMAGE_SIZE, TRAINING_SIZE):
        cli.image_size(size.value)  # complains before anything is loaded
    to_read = False
    try:
        recipe = recipe_of_flags()
        arguments = model_arguments(recipe)
        identity = {"family": family_name(), **arguments}
        check_flags(recipe)
        if not EVALUATE_ONLY.value:
            if START_FROM.value:
                identity["started_from"], to_read = started_from(START_FROM.value)
            if TEACHER.value:
                identity["teacher"] = weights_identity("teacher", TEACHER.value)
        if LOGICAL_DEVICES.value:
            training.make_logical_cpu_devices(LOGICAL_DEVICES.value)
        if DETERMINISTIC.value:
            tf.config.experimental.enable_op_determinism()
        strategy = training.make_strategy(STRATEGY.value, TPU.value)
        if EVALUATE_ONLY.value:
            model = load_model_of_run(strategy)  # before a dataset is read or fetched
            evaluate(model, load_dataset(), strategy, recipe)
            return
        dataset = load_dataset()
        training.steps_per_epoch(dataset, recipe, strategy)
        cadence = training.Cadence(
            LOG_EVERY.value, EVALUATE_EVERY.value, CHECKPOINT_SECONDS.value, CHECKPOINT_STEPS.value
        )
    except ValueError as error:
        raise UserError(str(error)) from error

    try:
        results = training.train(
            lambda: build_model(len(dataset.class_names), recipe, strategy.num_replicas_in_sync, arguments, to_read),
            dataset,
            recipe,
            OUTPUT_DIR.value,
            strategy,
            model_config=identity,
            cadence=cadence,
            jit_compile=JIT_COMPILE.value,
            build_teacher=(lambda: build_teacher(len(dataset.class_names))) if TEACHER.value else None,
            task=tasks.make_task(TASK.value),
        )
    except training.TrainingInterrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(interruption.exit_status)
    except ValueError as error:  # model, data and devices do not go together
        raise UserError(str(error)) from error
    if training.Workers(strategy).is_chief:
        print(f"{format_scores(results)} on {results['images']} test images")


if __name__ == "__main__":
    cli.run(main)

"""The flags by which every exporter is told its model: a trained one, or a variant with random weights."""

import keras
from absl import flags

import keras_models
from mobiatt_tf import cli
from mobiatt_tf.errors import UserError
from mobiatt_tf.models import load_trained
from mobiatt_tf.tasks import TASKS


def define_model_flags() -> None:
    """--checkpoint, --image_size, and for models without weights --task, --model, --variant and their attention."""
    flags.DEFINE_string("checkpoint", None, "Output directory of a training run, or a .keras file.")
    flags.DEFINE_enum("task", "classification", TASKS, "Without --checkpoint: what the model is for.")
    flags.DEFINE_enum("model", "deit", list(keras_models.FAMILIES), "Without --checkpoint: the family.")
    flags.DEFINE_string("variant", None, "Without --checkpoint: a variant with random weights.")
    flags.DEFINE_string("image_size", None, "224, or 192x256 for height 192; without it, the model's own.")
    cli.define_attention("Without --checkpoint: its attention")
    flags.DEFINE_integer("num_heads", None, "Without --checkpoint: its heads.", lower_bound=1)
    flags.DEFINE_integer("head_dim", None, "Without --checkpoint: the channels of a head instead.", lower_bound=1)


def define_check_flags(check_images: int, dense_images: int | None = None) -> None:
    """--dataset, --cache_dir and --check_images: what an export is checked on.

    Args:
        check_images: the default of --check_images.
        dense_images: its default for detectors and segmenters; None if it is the same, or they are not taken.
    """
    dense = f"; of detectors and segmenters, unless it is given, {dense_images}" if dense_images else ""
    flags.DEFINE_string("dataset", None, "Images to check on; without it those of the run, else photographs.")
    flags.DEFINE_string("cache_dir", None, "Where downloads of --dataset are kept.")
    flags.DEFINE_integer(
        "check_images",
        check_images,
        f"How many images to check on{dense}.",
        lower_bound=1,
    )


def check_images(task: str, dense_images: int) -> int:
    """How many images a model of that task is to be checked on; `dense_images` as in `define_check_flags`."""
    flag = flags.FLAGS["check_images"]
    return int(flag.value) if flag.present or task == "classification" else dense_images


def model_from_flags() -> keras.Model:
    """The model that the flags of `define_model_flags` ask for.

    Raises:
        UserError: no model is asked for, or one that there is not.
    """
    values = flags.FLAGS
    size = cli.image_size(values.image_size)
    untrained = [
        name for name in ("task", "model", "variant", "attention", "num_heads", "head_dim") if flags.FLAGS[name].present
    ]
    if values.checkpoint:
        if untrained:
            raise UserError(f"--{untrained[0]} is for models without weights: it does not go with --checkpoint.")
        model = load_trained(values.checkpoint)
        try:
            return keras_models.resize(model, size) if size else model
        except ValueError as error:
            raise UserError(str(error)) from error
    if not values.variant:
        example = keras_models.FAMILIES[values.model].default_variant
        raise UserError(f"Give --checkpoint=RUN_DIRECTORY_OR_KERAS_FILE, or --variant={example} for untrained weights.")
    print(f"No --checkpoint: {values.model} {values.variant} with random weights, of use for size and latency only.")
    settings = {
        "attention": cli.attention(values.attention),
        "num_heads": values.num_heads,
        "head_dim": values.head_dim,
    }
    try:
        if values.task == "classification":
            return keras_models.FAMILIES[values.model].build(values.variant, image_size=size, **settings)
        build = keras_models.DENSE[values.task]
        return build(values.model, values.variant, **({"image_size": size} if size else {}), **settings)
    except ValueError as error:
        raise UserError(str(error)) from error

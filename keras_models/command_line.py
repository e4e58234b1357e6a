"""The flags by which every exporter is told its model: a trained one, or a variant with random weights."""

import keras
from absl import flags

import keras_models
from mobiatt_tf import cli
from mobiatt_tf.errors import UserError
from mobiatt_tf.models import load_trained


def define_model_flags() -> None:
    """--checkpoint, --image_size, and for models without weights --model, --variant and their attention."""
    flags.DEFINE_string("checkpoint", None, "Output directory of a training run, or a .keras file.")
    flags.DEFINE_enum("model", "deit", list(keras_models.FAMILIES), "Without --checkpoint: the family.")
    flags.DEFINE_string("variant", None, "Without --checkpoint: a variant with random weights.")
    flags.DEFINE_string("image_size", None, "224, or 192x256 for height 192; without it, the model's own.")
    cli.define_attention("Without --checkpoint: its attention")
    flags.DEFINE_integer("num_heads", None, "Without --checkpoint: its heads.", lower_bound=1)
    flags.DEFINE_integer("head_dim", None, "Without --checkpoint: the channels of a head instead.", lower_bound=1)


def define_check_flags(check_images: int) -> None:
    """--dataset, --cache_dir and --check_images (with this default): what an export is checked on."""
    flags.DEFINE_string("dataset", None, "Images to check on; without it those of the run, else photographs.")
    flags.DEFINE_string("cache_dir", None, "Where downloads of --dataset are kept.")
    flags.DEFINE_integer("check_images", check_images, "How many images to check on.", lower_bound=1)


def model_from_flags() -> keras.Model:
    """The model that the flags of `define_model_flags` ask for.

    Raises:
        UserError: no model is asked for, or one that there is not.
    """
    values = flags.FLAGS
    size = cli.image_size(values.image_size)
    untrained = [
        name for name in ("model", "variant", "attention", "num_heads", "head_dim") if flags.FLAGS[name].present
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
    try:
        return keras_models.FAMILIES[values.model].build(
            values.variant,
            image_size=size,
            attention=cli.attention(values.attention),
            num_heads=values.num_heads,
            head_dim=values.head_dim,
        )
    except ValueError as error:
        raise UserError(str(error)) from error

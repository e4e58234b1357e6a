"""One training run of benchmarks/accuracy.py, in a process of its own; the same command goes on with it.

PYTHONPATH=. python benchmarks/accuracy_run.py --dataset=mnist_sample --attention=mobile --head_dim=8 --seed=0 \
    --output_dir=runs/accuracy/mnist_sample/mobile_d8/seed0
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mobiatt_tf import cli, files

VARIANT = "quickstart"  # of DeiT: width 64, 4 blocks, patches of 7 x 7
IMAGE_SIZE = 35  # 5 x 5 patches and the class token: 26 tokens; images of 28 x 28 are enlarged (bilinear)

# What shapes a run besides the dataset, the attention and the seed: the same for every network. The learning rate is
# not tuned for any of them.
BUDGETS: dict[str, dict[str, Any]] = {
    "fashion_mnist": {"epochs": 2, "batch_size": 32, "learning_rate": 2e-3, "warmup_epochs": 0.1},
    "mnist_sample": {"epochs": 8, "batch_size": 32, "learning_rate": 2e-3, "warmup_epochs": 1.0},
    "digits": {"epochs": 2, "batch_size": 32, "learning_rate": 2e-3, "warmup_epochs": 1.0},  # for trials: no network
}


def train(
    dataset: str,
    attention: str,
    head_dim: int,
    seed: int,
    output_dir: Path,
    overrides: dict[str, Any],
    limit_train: int | None,
    limit_test: int | None,
) -> dict[str, Any]:
    """Trains the network, or goes on with it, and returns what `mobiatt_tf.training.train` does.

    Stochastic depth and dropout are 0 for every attention, so that only the attention differs.

    Args:
        dataset: a key of `BUDGETS`.
        attention: "softmax", "linear" or "mobile".
        head_dim: channels of a head.
        seed: of the weights and the order of the data.
        output_dir: of this run.
        overrides: fields of the recipe that replace the budget's.
        limit_train: how many training images; None: all.
        limit_test: how many test images; None: all.
    """
    import keras
    import tensorflow as tf

    from keras_models import DeiTMobiAtt
    from mobiatt_tf import data, training

    loaded = data.load(dataset)
    train_split = loaded.train if limit_train is None else loaded.train.take(limit_train)
    test_split = loaded.test if limit_test is None else loaded.test.take(limit_test)
    loaded = dataclasses.replace(loaded, train=train_split, test=test_split)
    recipe = training.make_recipe("quickstart", **{**BUDGETS[dataset], **overrides, "seed": seed})

    def build() -> keras.Model:
        return DeiTMobiAtt(
            VARIANT,
            image_size=IMAGE_SIZE,
            num_classes=len(loaded.class_names),
            attention=attention,
            head_dim=head_dim,
            drop_path=0.0,
            attention_dropout=0.0,
        )

    return training.train(
        build,
        loaded,
        recipe,
        output_dir,
        tf.distribute.OneDeviceStrategy("/cpu:0"),
        model_config={"family": "deit", "variant": VARIANT, "attention": attention, "head_dim": head_dim},
        cadence=training.Cadence(log_every=25, evaluate_every=recipe.epochs, checkpoint_seconds=60),
        show_progress=False,
    )


def main(_: Sequence[str]) -> None:
    """Trains on as many threads as asked for."""
    import tensorflow as tf

    from mobiatt_tf.training import TrainingInterrupted

    values = flags.FLAGS
    tf.config.threading.set_intra_op_parallelism_threads(values.threads)
    tf.config.threading.set_inter_op_parallelism_threads(values.threads)
    overrides = {"epochs": values.epochs, "batch_size": values.batch_size}
    try:
        train(
            values.dataset,
            values.attention,
            values.head_dim,
            values.seed,
            files.user_path(values.output_dir),
            {name: value for name, value in overrides.items() if value is not None},
            values.limit_train,
            values.limit_test,
        )
    except TrainingInterrupted as interrupted:
        print(interrupted, file=sys.stderr)
        sys.exit(interrupted.exit_status)


if __name__ == "__main__":
    flags.DEFINE_enum("dataset", "mnist_sample", list(BUDGETS), "What to train on.")
    flags.DEFINE_enum("attention", "mobile", ["softmax", "linear", "mobile"], "Attention of every block.")
    flags.DEFINE_integer("head_dim", 8, "Channels of a head.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the weights and the order of the data.", lower_bound=0)
    flags.DEFINE_integer("threads", 1, "Threads of TensorFlow.", lower_bound=1)
    flags.DEFINE_integer("epochs", None, "Instead of the budget's.", lower_bound=1)
    flags.DEFINE_integer("batch_size", None, "Instead of the budget's.", lower_bound=1)
    flags.DEFINE_integer("limit_train", None, "Only so many training images.", lower_bound=1)
    flags.DEFINE_integer("limit_test", None, "Only so many test images.", lower_bound=1)
    flags.DEFINE_string("output_dir", None, "Of this run.", required=True)
    cli.run(main)

"""The command line of `mobiatt_tf.training.evaluation`: checkpoints and exported files on one test set."""

from mobiatt_tf import cli
from mobiatt_tf.training.evaluation import define_flags, main

if __name__ == "__main__":
    define_flags()
    cli.run(main)

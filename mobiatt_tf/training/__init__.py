"""Training on one device or many: `train` with a `Recipe`, under a strategy from `make_strategy`.

It loads TensorFlow's data and distribution parts, so `import mobiatt_tf` does not load it.
"""

from mobiatt_tf.training.evaluate import Evaluation, Evaluator
from mobiatt_tf.training.interrupts import TrainingInterrupted
from mobiatt_tf.training.loop import Cadence, steps_per_epoch, train
from mobiatt_tf.training.recipes import PRECISIONS, RECIPES, Recipe, make_recipe
from mobiatt_tf.training.strategy import STRATEGIES, make_logical_cpu_devices, make_strategy

__all__ = [
    "PRECISIONS",
    "RECIPES",
    "STRATEGIES",
    "Cadence",
    "Evaluation",
    "Evaluator",
    "Recipe",
    "TrainingInterrupted",
    "make_logical_cpu_devices",
    "make_recipe",
    "make_strategy",
    "steps_per_epoch",
    "train",
]

"""Training on one device or many: `train` with a `Recipe`, under a strategy from `make_strategy`.

It loads TensorFlow's data and distribution parts, so `import mobiatt_tf` does not load it.
"""

from mobiatt_tf.training.distillation import load_teacher, make_teacher
from mobiatt_tf.training.evaluator import Evaluation, Evaluator
from mobiatt_tf.training.identity import steps_per_epoch
from mobiatt_tf.training.interrupts import TrainingInterrupted
from mobiatt_tf.training.loop import Cadence, train
from mobiatt_tf.training.recipes import PRECISIONS, RECIPES, Recipe, make_recipe
from mobiatt_tf.training.strategy import STRATEGIES, make_logical_cpu_devices, make_strategy
from mobiatt_tf.training.task import Classification, Result, Task
from mobiatt_tf.training.workers import Workers

__all__ = [
    "PRECISIONS",
    "RECIPES",
    "STRATEGIES",
    "Cadence",
    "Classification",
    "Evaluation",
    "Evaluator",
    "Recipe",
    "Result",
    "Task",
    "TrainingInterrupted",
    "Workers",
    "load_teacher",
    "make_logical_cpu_devices",
    "make_recipe",
    "make_strategy",
    "make_teacher",
    "steps_per_epoch",
    "train",
]

"""A small detector and segmenter, and evaluations of them (python -m tests.tasks.toys STRATEGY DIRECTORY COUNT)."""

import json
import sys
from pathlib import Path
from typing import Any

import keras

from mobiatt_tf import training
from mobiatt_tf.tasks import anchors, make_task
from mobiatt_tf.training.strategy import make_logical_cpu_devices, make_strategy
from tests.tasks.pictures import dataset, detection_split, segmentation_split

SIZE, STRIDE = (48, 64), 4
SIZES = [(48, 64), (96, 128), (30, 64), (64, 40), (50, 50)]
RECIPE = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "label_smoothing": 0.0, "warmup_epochs": 0.0}


def make_detector() -> keras.Model:
    """A convolution on each level, with logits that are far from equal."""
    keras.utils.set_random_seed(1)
    images = keras.Input((*SIZE, 3), name="images")
    boxes, logits = [], []
    for level in range(anchors.LEVELS):
        stride = STRIDE * 2**level
        for outputs, width, scale in ((boxes, 4, 0.02), (logits, 3, 0.2)):
            layer = keras.layers.Conv2D(
                width * anchors.PER_PLACE,
                3,
                strides=stride,
                padding="same",
                kernel_initializer=keras.initializers.RandomNormal(stddev=scale),
            )
            outputs.append(keras.layers.Reshape((-1, width))(layer(images)))
    outputs = {
        "boxes": keras.layers.Concatenate(axis=1, name="boxes")(boxes),
        "logits": keras.layers.Concatenate(axis=1, name="logits")(logits),
    }
    return keras.Model(images, outputs)


def make_segmenter(classes: int = 3) -> keras.Model:
    keras.utils.set_random_seed(1)
    images = keras.Input((32, 32, 3), name="images")
    return keras.Model(images, keras.layers.Conv2D(classes, 5, strides=4, padding="same")(images))


def recipe(**changes: Any) -> training.Recipe:
    return training.Recipe(**{**RECIPE, **changes})


def evaluate_under(strategy_name: str, directory: Path, count: int) -> None:
    """Prints the lines of both tasks on the first `count` images; "mirrored" means two logical CPU devices."""
    if strategy_name == "mirrored":
        make_logical_cpu_devices(2)
    strategy = make_strategy(strategy_name)
    found = {}
    for task, make_split, make_model in (
        ("detection", detection_split, make_detector),
        ("segmentation", segmentation_split, make_segmenter),
    ):
        split = make_split(directory / task, SIZES).take(count)
        with strategy.scope():
            model = make_model()
            evaluate = make_task(task).evaluator(model, dataset(split, split), strategy, recipe(batch_size=4))
        found[task] = evaluate(split, lambda: None).to_line()
    print(json.dumps(found))


if __name__ == "__main__":
    evaluate_under(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))

"""Schedules of detection and segmentation, runs of a number of steps, and targets that are dicts."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from mobiatt_tf import training
from mobiatt_tf.training.optimizer import WarmedUp, make_optimizer, make_schedule
from mobiatt_tf.training.step import make_run_steps
from mobiatt_tf.training.strategy import distribute
from tests.training import small


def rates(recipe: training.Recipe, steps_per_epoch: int, steps: int) -> np.ndarray:
    schedule = make_schedule(recipe, steps_per_epoch)
    return np.array([float(schedule(step)) for step in range(steps)])


def test_coco_falls_to_a_tenth_after_epochs_8_and_11_and_warms_up_for_500_steps() -> None:
    found = rates(training.make_recipe("coco"), 100, 1200)
    expected = np.full(1200, 2e-4)
    expected[800:] *= 0.1
    expected[1100:] *= 0.1
    share = np.arange(500) / 500
    expected[:500] = 2e-7 + (2e-4 - 2e-7) * share
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_ade20k_is_the_polynomial_over_its_steps() -> None:
    recipe = training.make_recipe("ade20k", max_steps=50)
    np.testing.assert_allclose(rates(recipe, 7, 50), 2e-4 * (1 - np.arange(50) / 50) ** 0.9, rtol=1e-5)


def test_the_schedules_survive_serialization() -> None:
    for name in ("coco", "ade20k"):
        schedule = make_schedule(training.make_recipe(name, max_steps=600), 100)
        config = json.loads(json.dumps(keras.optimizers.schedules.serialize(schedule)))
        again = keras.optimizers.schedules.deserialize(config)
        assert isinstance(again, WarmedUp)
        assert [float(again(step)) for step in (0, 100, 599)] == [float(schedule(step)) for step in (0, 100, 599)]


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("decay_epochs", {"schedule": "steps"}),
        ("decay_epochs", {"schedule": "steps", "decay_epochs": "3,2"}),
        ("decay_epochs", {"schedule": "steps", "decay_epochs": "two"}),
        ("decay_epochs", {"decay_epochs": "2"}),
        ("schedule", {"schedule": "linear"}),
        ("scale_high", {"scale_low": 2.0, "scale_high": 1.0}),
        ("scale_low", {"scale_low": 0.0}),
        ("power", {"power": float("nan")}),
        ("flip", {"flip": 1.5}),
        ("max_steps", {"max_steps": -1}),
    ],
)
def test_recipe_refuses(field: str, changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=field):
        small.recipe(**changes)


def test_a_run_of_steps_ends_within_an_epoch_is_evaluated_there_and_resumes(tmp_path: Path) -> None:
    recipe = small.recipe(max_steps=9, schedule="polynomial")
    dataset = small.make_dataset()

    def run(directory: Path) -> dict[str, object]:
        return training.train(
            small.make_model, dataset, recipe, directory, training.make_strategy("one"), show_progress=False
        )

    whole = run(tmp_path / "whole")
    assert (whole["step"], whole["epochs"]) == (9, 1)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [6, 9]
    # The evaluation at the end of the last, unfinished epoch is made up for as that of a whole epoch is.
    (tmp_path / "whole" / "results.json").unlink()
    again = run(tmp_path / "whole")
    assert {name: again[name] for name in ("step", "top1", "loss")} == {
        name: whole[name] for name in ("step", "top1", "loss")
    }


def test_targets_may_be_dicts_and_parts_sum_to_the_whole() -> None:
    """Gradients of a batch in three parts equal those of the batch at once."""
    generator = np.random.default_rng(0)
    images = generator.normal(size=(12, 8, 8, 3)).astype(np.float32)
    targets = {
        "labels": generator.integers(0, small.CLASSES, 12).astype(np.int32),
        "weights": generator.uniform(0.5, 2.0, 12).astype(np.float32),
    }
    batch = tf.data.Dataset.from_tensors((images, targets)).repeat()
    strategy = training.make_strategy("one")

    def kernel_after_three_steps(parts: int) -> np.ndarray:
        recipe = small.recipe(batch_size=12, accumulation=parts, ema_decay=0.0)
        keras.utils.set_random_seed(0)
        with strategy.scope():
            pixels = keras.Input((8, 8, 3))  # no batch norm behind it: its statistics would be those of a part
            logits = keras.layers.Dense(small.CLASSES, name="head")(keras.layers.Flatten()(pixels))
            model = keras.Model(pixels, logits)

            def losses(images: tf.Tensor, targets: dict[str, tf.Tensor]) -> tf.Tensor:
                found = model(images, training=True)
                return targets["weights"] * tf.nn.sparse_softmax_cross_entropy_with_logits(targets["labels"], found)

            optimizer = make_optimizer(recipe, 3, model)
            step = make_run_steps(model, optimizer, None, recipe, strategy, losses=losses)
            step(distribute(strategy, lambda count, replicas: batch), tf.constant(3))
        return np.asarray(model.get_layer("head").kernel)

    np.testing.assert_allclose(kernel_after_three_steps(1), kernel_after_three_steps(3), atol=1e-6)

"""AdamW with warm-up and cosine, a learning rate for each layer, and the variables spared from weight decay."""

from collections.abc import Sequence
from typing import Any

import keras
from absl import logging

from mobiatt_tf.training.identity import total_steps
from mobiatt_tf.training.layer_decay import layer_scales
from mobiatt_tf.training.recipes import Recipe

_SPARED = (
    "position_embedding",
    "pos_embed",
    "class_token",
    "cls_token",
    "distillation_token",
    "dist_token",
    "attention_bias",
)


def is_decayed(path: str, rank: int) -> bool:
    """Whether weight decay applies to a variable.

    Spared are biases and the scales and offsets of normalisation and of layer scale (all of rank 0 or 1), position
    embeddings, class and distillation tokens, and attention bias tables: DeiT's `no_weight_decay` and timm's rule for
    one-dimensional parameters. Kernels of any rank, depthwise ones included, decay.

    Args:
        path: the variable's path, such as "blocks_0/attention/query/kernel".
        rank: its number of dimensions.
    """
    return rank > 1 and not any(name in path for name in _SPARED)


def make_schedule(recipe: Recipe, steps_per_epoch: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """Linear warm-up from `warmup_learning_rate`, then the recipe's schedule.

    The cosine begins when the warm-up ends and has its minimum at the last step. Steps and the polynomial count from
    the first step of the run, and the warm-up rises towards them, as in mmcv (runner/hooks/lr_updater.py).
    """
    steps = total_steps(recipe, steps_per_epoch)
    warmup_steps = min(recipe.warmup_steps or round(recipe.warmup_epochs * steps_per_epoch), steps - 1)
    if warmup_steps > steps / 2:
        logging.warning("The warm-up takes %d of %d steps: choose fewer, or train longer.", warmup_steps, steps)
    if recipe.schedule == "steps":
        boundaries = [epoch * steps_per_epoch - 1 for epoch in recipe.decay_epoch_numbers()]  # the last before the drop
        values = [recipe.learning_rate * 0.1**index for index in range(len(boundaries) + 1)]
        main = keras.optimizers.schedules.PiecewiseConstantDecay(boundaries, values)
        return WarmedUp(main, recipe.warmup_learning_rate, warmup_steps)
    if recipe.schedule == "polynomial":
        main = keras.optimizers.schedules.PolynomialDecay(
            recipe.learning_rate, steps, recipe.minimum_learning_rate, recipe.power
        )
        return WarmedUp(main, recipe.warmup_learning_rate, warmup_steps)
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=recipe.warmup_learning_rate if warmup_steps else recipe.learning_rate,
        decay_steps=max(steps - 1 - warmup_steps, 1),
        alpha=recipe.minimum_learning_rate / recipe.learning_rate,
        warmup_target=recipe.learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
    )


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class WarmedUp(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule with linear warm-up in front: first + (schedule(step) - first) * step / steps for the first steps.

    Args:
        schedule: what it rises to and then follows; counts from the first step too.
        first: value at step 0.
        steps: of the warm-up; 0: none.
    """

    def __init__(self, schedule: keras.optimizers.schedules.LearningRateSchedule, first: float, steps: int) -> None:
        super().__init__()
        self.schedule, self.first, self.steps = schedule, first, steps

    def __call__(self, step: Any) -> Any:
        value = self.schedule(step)
        if not self.steps:
            return value
        share = keras.ops.cast(step, "float32") / self.steps
        return keras.ops.where(share < 1.0, self.first + (value - self.first) * share, value)

    def get_config(self) -> dict[str, Any]:
        schedule = keras.optimizers.schedules.serialize(self.schedule)
        return {"schedule": schedule, "first": self.first, "steps": self.steps}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WarmedUp":
        return cls(**{**config, "schedule": keras.optimizers.schedules.deserialize(config["schedule"])})


class AdamW(keras.optimizers.AdamW):
    """Keras' AdamW for gradients that have been summed over the devices already, with scaled learning rates.

    Keras' own sums them itself, but clips by norm before: every device would clip its own share of the gradient. And it
    has one learning rate, where PyTorch's parameter groups scale the steps of a variable and its weight decay alike.
    """

    scales: Sequence[float] | None = None  # of the variables it is built on, in their order; None: 1 for all

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        if self.scales is not None:
            learning_rate = learning_rate * self.scales[self._get_variable_index(variable)]
        if self._use_weight_decay(variable):
            rate = keras.ops.cast(learning_rate, variable.dtype)
            self.assign_sub(variable, variable * keras.ops.cast(self.weight_decay, variable.dtype) * rate)
        super().update_step(gradient, variable, learning_rate)

    def _apply_weight_decay(self, variables: Any) -> None:
        """Nothing: `update_step` does it, where the variable's learning rate is known."""

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        return grads_and_vars


def make_optimizer(recipe: Recipe, steps_per_epoch: int, model: keras.Model) -> AdamW:
    """AdamW (betas .9 and .999, epsilon 1e-8 as in PyTorch and timm), built on the model's trainable variables.

    Keras adds epsilon before the bias correction, PyTorch after it: in the first steps the two differ for gradients
    that are themselves near epsilon. Call it under the strategy's scope.

    Raises:
        ValueError: `layer_decay` is not 1 and the model is not one of `keras_models`.
    """
    optimizer = AdamW(
        learning_rate=make_schedule(recipe, steps_per_epoch), weight_decay=recipe.weight_decay, epsilon=1e-8
    )
    spared = [variable for variable in model.trainable_variables if not is_decayed(variable.path, len(variable.shape))]
    optimizer.exclude_from_weight_decay(var_list=spared)
    optimizer.build(model.trainable_variables)
    if recipe.layer_decay != 1:
        optimizer.scales = layer_scales([variable.path for variable in model.trainable_variables], recipe.layer_decay)
    return optimizer

"""The compiled part of the loop: forward, backward, sum over the devices, clip, AdamW, moving average."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from mobiatt_tf.training.clipping import adaptive_clip
from mobiatt_tf.training.distillation import Teacher
from mobiatt_tf.training.ema import WeightAverage
from mobiatt_tf.training.optimizer import AdamW
from mobiatt_tf.training.recipes import Recipe
from mobiatt_tf.training.task import Classification, Losses

LossAndGradients = tuple[tf.Tensor, list[tf.Tensor]]
RunSteps = Callable[[Iterator[Any], tf.Tensor], tf.Tensor]


def make_run_steps(
    model: keras.Model,
    optimizer: AdamW,
    average: WeightAverage | None,
    recipe: Recipe,
    strategy: tf.distribute.Strategy,
    jit_compile: bool = False,
    teacher: Teacher | None = None,
    losses: Losses | None = None,
) -> RunSteps:
    """A function (batches, count) that takes `count` training steps and returns their losses, float32 [count].

    `batches` is an iterator of (images float32 [B, H, W, 3], targets) from `strategy.distribute`; targets are a tensor
    or a dict of tensors, each [B, ...]. `count` is an int32 tensor, so that no number of steps compiles anew. The loss
    of a step is the mean over the whole batch plus what the layers add, and its gradient is the same for any number of
    devices. With `recipe.accumulation` a device's share of the batch is computed in that many parts, one after the
    other, whose gradients are summed.

    Args:
        model: a built model.
        optimizer: from `make_optimizer`; its `iterations` count the steps.
        average: updated after every step, if given.
        recipe: batch size, accumulation, clipping and seed are used here; the rest is the task's.
        strategy: the model, optimizer and average were made under its scope.
        jit_compile: compile forward and backward with XLA (not with synchronized batch norm on several devices).
        teacher: images to its logits, float32 [B, classes]; needed by `recipe.distillation`.
        losses: of a task, see `Task.losses`; None: those of classification.

    Raises:
        ValueError: the recipe distills and there is no teacher.
    """
    example_losses = losses or Classification().losses(model, recipe, teacher)
    replicas, parts = strategy.num_replicas_in_sync, recipe.accumulation
    weights = {id(weight) for weight in model.weights}
    seeds = [variable for variable in model.variables if id(variable) not in weights]

    def forward_backward(images: tf.Tensor, targets: Any, numbers: tf.Tensor) -> LossAndGradients:
        for seed, number in zip(seeds, tf.unstack(numbers), strict=True):
            seed.assign(number)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(example_losses(images, targets)) / recipe.batch_size
            if model.losses:
                loss += tf.cast(tf.add_n(model.losses), tf.float32) / (replicas * parts)
        return loss, tape.gradient(loss, [variable.value for variable in model.trainable_variables])

    if jit_compile:
        forward_backward = tf.function(forward_backward, jit_compile=True)

    def accumulate(images: tf.Tensor, targets: Any, step: tf.Tensor, device: tf.Tensor) -> LossAndGradients:
        """Loss and gradients of a device's images [parts * b, H, W, 3]."""
        total: tf.Tensor = 0.0
        gradients: list[tf.Tensor] = []
        pieces = [tf.split(tensor, parts) for tensor in tf.nest.flatten((images, targets))]
        for part, tensors in enumerate(zip(*pieces, strict=True)):
            some_images, some_targets = tf.nest.pack_sequence_as((images, targets), tensors)
            # Randomness is a function of seed, step and the place of these images in the step's batch, so there is
            # nothing to save, and two devices draw what one device draws in two parts.
            place = (step * parts + part) * replicas + device
            numbers = tf.random.stateless_uniform(
                (len(seeds), 2), (recipe.seed, place), minval=0, maxval=2**31 - 1, dtype=tf.int64, alg="philox"
            )
            with tf.control_dependencies(gradients):  # else TensorFlow holds the activations of all parts at once
                loss, found = forward_backward(some_images, some_targets, numbers)
            total += loss
            gradients = [old + new for old, new in zip(gradients, found, strict=True)] if gradients else found
        return total, gradients

    def replica_step(images: tf.Tensor, targets: Any) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        device = tf.cast(context.replica_id_in_sync_group, tf.int64)
        step = tf.cast(optimizer.iterations.value, tf.int64)
        loss, gradients = accumulate(images, targets, step, device)
        gradients = context.all_reduce("SUM", gradients)
        if recipe.adaptive_clip:
            gradients = adaptive_clip(gradients, model.trainable_variables, recipe.adaptive_clip)
        if recipe.clip_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, recipe.clip_norm)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    @tf.function(reduce_retracing=True)
    def run_steps(batches: Iterator[Any], count: tf.Tensor) -> tf.Tensor:
        losses = tf.TensorArray(tf.float32, size=count)
        for index in tf.range(count):
            step = tf.identity(optimizer.iterations.value)
            loss = strategy.run(replica_step, args=next(batches))
            losses = losses.write(index, strategy.reduce("SUM", loss, axis=None))
            if average is not None:
                average.update(step)
        return losses.stack()  # [count]

    return run_steps

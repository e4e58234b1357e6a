"""Where a run computes: one device, or all devices of this machine with mirrored weights."""

from collections.abc import Iterator
from typing import Any

import tensorflow as tf

STRATEGIES = ("one", "mirrored")


def make_logical_cpu_devices(count: int) -> None:
    """Splits the CPU into `count` logical devices, so that `mirrored` can be exercised without GPUs.

    Must be called before TensorFlow runs its first operation.

    Raises:
        ValueError: `count` is below 1.
        RuntimeError: TensorFlow has already started.
    """
    if count < 1:
        raise ValueError(f"The number of logical devices is {count}; it must be at least 1.")
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration() for _ in range(count)])


def make_strategy(name: str) -> tf.distribute.Strategy:
    """The strategy of that name over the GPUs of this machine, or over its (logical) CPU devices when it has none.

    Multi-worker and TPU strategies run under the same loop: `train` accepts any `tf.distribute.Strategy`.

    Args:
        name: "one" (the first device) or "mirrored" (all devices, same weights, gradients summed over them).

    Raises:
        ValueError: there is no such strategy.
    """
    if name not in STRATEGIES:
        raise ValueError(f"There is no strategy {name!r}; allowed are {', '.join(STRATEGIES)}.")
    devices = [device.name for device in tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")]
    if name == "one":
        return tf.distribute.OneDeviceStrategy(devices[0])
    # On CPU devices the default is collective operations, and those of synchronized batch norm and of the gradients
    # were seen to meet each other ("Shape mismatch in the collective instance"). GPUs keep the default, NCCL.
    reduction = tf.distribute.ReductionToOneDevice() if "CPU" in devices[0] else None
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=reduction)


def distribute(strategy: tf.distribute.Strategy, batches: tf.data.Dataset) -> Iterator[Any]:
    """Iterates over the batches, each split evenly over the strategy's devices."""
    if isinstance(strategy, tf.distribute.OneDeviceStrategy) and "CPU" in strategy.extended.worker_devices[0]:
        # The batches are where they are needed. TensorFlow's multi-device iterator would copy them and set malloc's
        # trim threshold to 128 KiB in the whole process: 2,400 page faults and 15 % more time in a step of 256 images.
        return iter(batches)
    return iter(strategy.experimental_distribute_dataset(batches))

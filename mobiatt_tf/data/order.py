"""Which image comes when, and the random numbers that go with it.

Training data depend on (seed, epoch, position) alone, so a run that stops can go on at the next step as if nothing had
happened, whatever the number of threads, devices or machines. Order and augmentation come from NumPy's counter-based
generator Philox 4x64 with the key (seed, epoch), whose raw stream NumPy keeps the same in all versions.
"""

from collections.abc import Sequence

import numpy as np

from mobiatt_tf.data.dataset import Split

ORDER, AUGMENTATION, MIXING = 0, 1, 2  # streams of random numbers


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """How many whole batches a split has.

    Raises:
        ValueError: not one, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if len(split) < batch_size:
        raise ValueError(
            f"{len(split)} training images do not fill one batch of {batch_size}. Use a smaller batch or more images."
        )
    return len(split) // batch_size


def epoch_order(count: int, batch_size: int, seed: int, epoch: int, repeats: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Which examples the steps of an epoch take.

    With `repeats` above 1 (repeated augmentation, Hoffer et al., CVPR 2020, as RASampler of facebookresearch/deit has
    it) a step takes batch_size / repeats different examples, each `repeats` times. A batch holds them all once, then
    all again, so that devices, which get consecutive shares, see different copies, and neighbours are different
    examples.

    Args:
        count: examples of the split.
        batch_size: at most `count`.
        seed: 0 or more.
        epoch: 0 or more.
        repeats: 1 or more.

    Returns:
        Examples, int64 [steps, batch_size], and the row of random numbers that each is augmented with, of the same
        shape: example + copy * count.
    """
    steps = count // batch_size
    # A stable sort of random numbers: ties, of which there are none in practice, change nothing between machines.
    order = np.argsort(random_numbers(seed, epoch, ORDER, count, 1)[:, 0], kind="stable")
    different = -(-batch_size // repeats)  # examples of a step
    positions = np.arange(batch_size)
    examples = order[: steps * different].reshape(steps, different)[:, positions % different]
    return examples, examples + positions // different * count


def deal(order: np.ndarray, first_step: int, parts: int, replica_count: int, replicas: Sequence[int]) -> np.ndarray:
    """The share of each device in each step, as rows.

    A step's images are dealt out part by part: the first 1 / parts of them to the replicas in turn, then the next. So
    the images of a part, over all replicas, do not depend on how many there are.

    Args:
        order: int [steps, batch_size].
        first_step: how many steps to skip.
        parts: in how many parts a device computes its share.
        replica_count: devices that share a step.
        replicas: those of them whose shares are wanted.

    Returns:
        int [(steps - first_step) * len(replicas), batch_size / replica_count]: step by step, the replicas in their
        order.
    """
    steps, batch_size = order.shape
    share = batch_size // replica_count
    dealt = order[first_step:].reshape(steps - first_step, parts, replica_count, share // parts)
    return dealt[:, :, list(replicas)].transpose(0, 2, 1, 3).reshape(-1, share)


def step_names(split: Split, batch_size: int, seed: int, epoch: int, step: int, repeats: int = 1) -> list[str]:
    """The images of one step of an epoch, in order: file paths, "shard:record", or "image 123".

    Args:
        split: what the batches are drawn from.
        batch_size: over all devices.
        seed: of the run.
        epoch: 0 or more.
        step: of this epoch, from 0.
        repeats: as in `epoch_order`.
    """
    examples = epoch_order(len(split), batch_size, seed, epoch, repeats)[0][step]
    return [split.name_of(int(index)) for index in examples]


def random_numbers(seed: int, epoch: int, stream: int, examples: int, count: int) -> np.ndarray:
    """uint64 [examples, count]; row i depends on (seed, epoch, stream, i) alone."""
    generator = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64))
    return generator.random_raw(examples * count).reshape(examples, count)

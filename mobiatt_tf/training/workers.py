"""Several processes that train one model: who is the chief, and how they agree on what none may decide alone."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf

from mobiatt_tf.errors import UserError, first_line

# What TensorFlow raises in a process whose peer has died: seen were Unavailable ("Connection reset by peer"), Aborted,
# Internal ("Collective ops is aborted by ...") and DeadlineExceeded, by the moment at which the peer dies.
_LOST_PEER = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
)


class Workers:
    """The processes of a strategy. With one process every method returns at once.

    Attributes:
        count: processes.
        index: this one, from 0.
        is_chief: whether this process writes the logs, checkpoints and results.
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self._strategy = strategy
        self.count, self.index = 1, 0
        if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            resolver = strategy.cluster_resolver
            jobs = resolver.cluster_spec().as_dict()
            self.count = max(sum(len(jobs.get(job, [])) for job in ("chief", "worker")), 1)
            self.index = (resolver.task_id or 0) + (len(jobs.get("chief", [])) if resolver.task_type == "worker" else 0)
        self.is_chief = self.index == 0

        @tf.function(reduce_retracing=True)
        def total(values: tf.Tensor) -> tf.Tensor:
            def replica(values: tf.Tensor) -> tf.Tensor:
                # An argument has no device, and all_reduce goes by it ("destinations can not be empty").
                return tf.distribute.get_replica_context().all_reduce("SUM", tf.identity(values))

            return strategy.experimental_local_results(strategy.run(replica, args=(values,)))[0]

        self._total = total

    def gather(self, values: Sequence[int]) -> np.ndarray:
        """int64 [count, n]: the n values of every process, the same array in each. All must call it together."""
        if self.count == 1:
            return np.array([values], np.int64)
        table = np.zeros((self.count, len(values)), np.float64)
        table[self.index] = values
        local = self._strategy.num_replicas_in_sync // self.count  # each device of this process adds the table once
        return np.rint(self._total(tf.constant(table / local)).numpy()).astype(np.int64)  # sixths do not add up exactly

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The elementwise sum of an array over the processes, float64 of any shape; the same in each.

        All must call it together, with arrays of one shape.
        """
        if self.count == 1:
            return np.asarray(values, np.float64)
        local = self._strategy.num_replicas_in_sync // self.count  # each device of this process adds the array once
        return np.asarray(self._total(tf.constant(np.asarray(values, np.float64) / local)).numpy())

    def from_chief(self, value: int) -> int:
        """The chief's value, in every process."""
        return int(self.gather([value])[0, 0])

    def wait(self) -> None:
        """Returns when every process has called it."""
        self.gather([0])

    def require_same(self, identity: dict[str, Any]) -> None:
        """Checks that all processes were started alike.

        Raises:
            UserError: they differ in recipe, dataset or model; in every process.
        """
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()
        numbers = self.gather(list(digest[:16]))
        if others := [str(index) for index in range(self.count) if (numbers[index] != numbers[0]).any()]:
            raise UserError(
                f"Worker {', '.join(others)} and worker 0 differ in recipe, dataset or model. Start the same command "
                "with the same flags, data and code on every machine; only TF_CONFIG's task differs."
            )

    @contextmanager
    def lost_peers(self, advice: str) -> Iterator[None]:
        """Turns TensorFlow's errors about a process that has died into one line.

        Raises:
            UserError: another process has gone.
        """
        try:
            yield
        except _LOST_PEER as error:
            if self.count == 1:
                raise
            raise UserError(
                f"Worker {self.index} has lost another worker ({first_line(error)[:200]}). If one has said why it "
                f"stopped, mend that first. {advice}"
            ) from error

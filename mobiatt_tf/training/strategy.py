"""Where a run computes: one device, all devices of this machine, several machines, or a TPU."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from mobiatt_tf.errors import UserError, first_line

STRATEGIES = ("one", "mirrored", "multi_worker", "tpu")
_TF_CONFIG = '{"cluster": {"worker": ["host1:12345", "host2:12345"]}, "task": {"type": "worker", "index": 0}}'
_SLURM_PORT = 18888  # of the first task on each node; task i of a node listens on the i-th port after it

# (number of replicas, those that this process feeds) -> a dataset with one element per step for each of them, in order.
MakeBatches = Callable[[int, Sequence[int]], tf.data.Dataset]


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


def make_strategy(name: str, tpu: str | None = None) -> tf.distribute.Strategy:
    """The strategy of that name. Call it before TensorFlow runs its first operation.

    Args:
        name: "one": the first GPU of this machine, or its CPU when it has none.
            "mirrored": all of them, with the same weights; gradients are summed over them.
            "multi_worker": the same over several machines, each of which runs this program. Who they are stands in
            TF_CONFIG, as {"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}, or, when
            that is not set, in the variables of SLURM.
            "tpu": a TPU.
        tpu: name or address of the TPU; without it the TPU of this virtual machine ("local").

    Raises:
        ValueError: there is no such strategy.
        UserError: the machines or the TPU are not described, or cannot be reached.
    """
    if name not in STRATEGIES:
        raise ValueError(f"There is no strategy {name!r}; allowed are {', '.join(STRATEGIES)}.")
    if name == "tpu":
        return _tpu(tpu or "local")
    if name == "multi_worker":
        return _multi_worker()
    devices = [device.name for device in tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")]
    if name == "one":
        return tf.distribute.OneDeviceStrategy(devices[0])
    # On CPU devices the default is collective operations, and those of synchronized batch norm and of the gradients
    # were seen to meet each other ("Shape mismatch in the collective instance"). GPUs keep the default, NCCL.
    reduction = tf.distribute.ReductionToOneDevice() if "CPU" in devices[0] else None
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=reduction)


def cluster_resolver() -> tf.distribute.cluster_resolver.ClusterResolver:
    """The machines of a "multi_worker" run.

    Raises:
        UserError: neither TF_CONFIG nor SLURM describes them, or TF_CONFIG is wrong.
    """
    if text := os.environ.get("TF_CONFIG"):
        _check_tf_config(text)
        return tf.distribute.cluster_resolver.TFConfigClusterResolver()
    if "SLURM_PROCID" in os.environ:
        try:
            if shutil.which("nvidia-smi"):  # the resolver counts the GPUs of a node and shares them out to its tasks
                return tf.distribute.cluster_resolver.SlurmClusterResolver(port_base=_SLURM_PORT)
            # It numbers the ports by GPUs: without any, every task counts as one.
            tasks = int(re.split(r"[(,]", os.environ["SLURM_STEP_TASKS_PER_NODE"])[0])  # such as "4(x2)": of each node
            return tf.distribute.cluster_resolver.SlurmClusterResolver(
                port_base=_SLURM_PORT, gpus_per_node=tasks, gpus_per_task=1, auto_set_gpu=False
            )
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"SLURM's variables do not describe the workers ({error!r}). Start them with srun."
            ) from error
    raise UserError(
        f"--strategy=multi_worker needs to know the machines: set TF_CONFIG to {_TF_CONFIG}, on each with its own "
        "index, or start the program with srun."
    )


def _check_tf_config(text: str) -> None:
    """Raises UserError where TF_CONFIG does not name this process among the workers."""
    try:
        config = json.loads(text)
        cluster, task = config["cluster"], config["task"]
        address = cluster[task["type"]][int(task["index"])]
        right = isinstance(address, str) and set(cluster) <= {"chief", "worker"} and int(task["index"]) >= 0
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"TF_CONFIG is {text[:200]} ({type(error).__name__}: {error}); it must be JSON as in {_TF_CONFIG}."
        ) from error
    if not right:
        raise UserError(f"TF_CONFIG is {text[:200]}: allowed are workers (and a chief), each as host:port.")


def _multi_worker() -> tf.distribute.Strategy:
    resolver = cluster_resolver()
    cluster = resolver.cluster_spec().as_dict()  # SLURM's hides other tasks' GPUs, before TensorFlow looks for any
    # Rings over gRPC work for CPUs; for GPUs TensorFlow chooses (NCCL where it is there).
    has_gpu = bool(tf.config.list_physical_devices("GPU"))
    collectives = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=collectives.AUTO if has_gpu else collectives.RING
    )
    try:
        return tf.distribute.MultiWorkerMirroredStrategy(resolver, options)
    except (tf.errors.OpError, RuntimeError, ValueError) as error:
        raise UserError(
            f"The workers of {cluster} do not find each other ({first_line(error)}). Start "
            "the program on each of them, with its own index; the port must be free there and open between them."
        ) from error


def _tpu(address: str) -> tf.distribute.Strategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=address)
        if address != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except (tf.errors.OpError, RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"There is no TPU {address!r} ({first_line(error)}). On a TPU virtual machine install tensorflow-tpu and "
            "leave --tpu out; elsewhere give its name or grpc:// address."
        ) from error


def distribute(strategy: tf.distribute.Strategy, make_batches: MakeBatches) -> Iterator[Any]:
    """Iterates over the steps; each element holds what every device of this process gets.

    Every process makes the batches of its own devices alone. How the images of a step are spread is up to
    `make_batches`, which sees the devices by their number in the whole run.
    """
    if isinstance(strategy, tf.distribute.OneDeviceStrategy) and "CPU" in strategy.extended.worker_devices[0]:
        # The batches are where they are needed. TensorFlow's multi-device iterator would copy them and set malloc's
        # trim threshold to 128 KiB in the whole process: 2,400 page faults and 15 % more time in a step of 256 images.
        return iter(make_batches(1, [0]))
    replicas = strategy.num_replicas_in_sync

    def of_pipeline(context: tf.distribute.InputContext) -> tf.data.Dataset:
        here = replicas // context.num_input_pipelines
        first = context.input_pipeline_id * here
        return make_batches(replicas, range(first, first + here))

    return iter(strategy.distribute_datasets_from_function(of_pipeline))

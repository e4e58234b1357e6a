"""The child process that takes training steps: `python -m benchmarks.training_worker`, see `tflite.process.Worker`.

One network in one framework for each process, so that memory, thread pools and compiled code are its own. Requests and
replies are JSON objects, one a line, as in `tflite.worker`; the clock and the turns are the same for both frameworks.
"""

import gc
import os
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from tflite.memory import reset_peak, resident_bytes, resident_peak_bytes
from tflite.serving import serve

CLASSES = 1000
LABEL_SMOOTHING = 0.1
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.05
_PEAK_SIDE = 2048


def batch(batch_size: int, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The batch of every step: noise, float32 [B, S, S, 3], and labels, int32 [B]."""
    generator = np.random.default_rng(0)
    images = generator.normal(size=(batch_size, image_size, image_size, 3)).astype("float32")
    return images, generator.integers(CLASSES, size=batch_size).astype("int32")


def build_keras(family: str, variant: str, image_size: int, head_dim: int | None) -> Any:
    """The seeded network without stochastic depth; `head_dim` as for `benchmarks.peers.ours.build`.

    The published dropout of Mobile-Attention, 0.05 after its output, stays.
    """
    import keras

    import keras_models

    keras.utils.set_random_seed(0)
    options: dict[str, Any] = {"attention": "softmax"} if head_dim is None else {"head_dim": head_dim}
    return keras_models.FAMILIES[family].build(variant, image_size=image_size, drop_path=0.0, **options)


class Session:
    """One process's state. Every public method answers the request of its name."""

    def __init__(self) -> None:
        self.take_step: Callable[[], float] | None = None

    def load_keras(
        self, network: dict[str, Any], precision: str, batch_size: int, num_threads: int, jit_compile: bool
    ) -> dict[str, Any]:
        """This project's training step (`mobiatt_tf.training.step`), ready to run.

        Args:
            network: the arguments of `build_keras`.
            precision: "float32" or "mixed_bfloat16".
            batch_size: images of a step.
            num_threads: threads.
            jit_compile: compile forward and backward with XLA.

        Returns:
            `logits` of the first image before any step, `baseline_bytes` (the process with its libraries, without the
            network) and `versions`.
        """
        import tensorflow as tf

        from mobiatt_tf.models import dtype_policy
        from mobiatt_tf.training.optimizer import make_optimizer
        from mobiatt_tf.training.recipes import Recipe
        from mobiatt_tf.training.step import make_run_steps

        tf.config.threading.set_intra_op_parallelism_threads(num_threads)
        tf.config.threading.set_inter_op_parallelism_threads(num_threads)
        baseline = _settled_bytes()
        recipe = Recipe(
            epochs=1,
            batch_size=batch_size,
            learning_rate=LEARNING_RATE,
            warmup_epochs=0,
            weight_decay=WEIGHT_DECAY,
            label_smoothing=LABEL_SMOOTHING,
            precision=precision,
        )
        strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
        with strategy.scope():
            with dtype_policy(precision):
                model = build_keras(**network)
            optimizer = make_optimizer(recipe, 10**6, model)
            run_steps = make_run_steps(model, optimizer, None, recipe, strategy, jit_compile)
        images, labels = batch(batch_size, network["image_size"])
        logits = model(images[:1], training=False).numpy()
        batches = iter(tf.data.Dataset.from_tensors((images, labels)).repeat())
        self.take_step = lambda: float(run_steps(batches, tf.constant(1)).numpy()[0])
        return _loaded(logits, baseline, ("tensorflow", "keras"))

    def load_torch(
        self, network: dict[str, Any], precision: str, batch_size: int, num_threads: int, compiled: bool
    ) -> dict[str, Any]:
        """The same in PyTorch: forward, cross entropy, backward and AdamW in its fused form.

        Args:
            network: the arguments of `benchmarks.peers.hosts.build`.
            precision: "float32", or "mixed_bfloat16": float32 weights under PyTorch's autocast.
            batch_size: images of a step.
            num_threads: threads.
            compiled: the model through torch.compile.
        """
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else a pool of processes stays with each worker
        import torch

        from benchmarks.peers import hosts

        torch.set_num_threads(num_threads)
        hosts.import_timm()
        baseline = _settled_bytes()
        model = hosts.build(**network)
        decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
            lr=LEARNING_RATE,
            fused=True,
        )
        criterion = torch.nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
        images, labels = batch(batch_size, network["image_size"])
        # PyTorch's own order of axes: nobody pays for it while the clock runs.
        x, y = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels.astype("int64"))
        half = precision == "mixed_bfloat16"

        def forward(some: Any) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                return call(some)

        call: Any = model
        with torch.no_grad():
            logits = forward(x[:1]).float().numpy()
        call = torch.compile(model) if compiled else model
        model.train()

        def take_step() -> float:
            optimizer.zero_grad(set_to_none=True)
            loss = criterion(forward(x).float(), y)
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        self.take_step = take_step
        return _loaded(logits, baseline, ("torch", "timm"))

    def load_peak(self, precision: str, num_threads: int) -> dict[str, Any]:
        """A product of two large square matrices in PyTorch, which stands for the processor's best rate.

        Returns:
            `multiply_adds` of a step.
        """
        import torch

        torch.set_num_threads(num_threads)
        dtype = torch.float32 if precision == "float32" else torch.bfloat16
        left, right = (torch.randn(_PEAK_SIDE, _PEAK_SIDE).to(dtype) for _ in range(2))

        def take_step() -> float:
            return float((left @ right)[0, 0])

        self.take_step = take_step
        return {"multiply_adds": _PEAK_SIDE**3}

    def steps(self, unrecorded: int, recorded: int) -> dict[str, Any]:
        """Seconds and loss of each of `recorded` steps after `unrecorded` ones, and processor time of all threads."""
        assert self.take_step is not None, "load comes first"
        clock, step = time.perf_counter, self.take_step
        for _ in range(unrecorded):
            step()
        latencies, losses = [], []
        cpu, wall = time.process_time(), clock()
        for _ in range(recorded):
            start = clock()
            losses.append(step())
            latencies.append(clock() - start)
        return {
            "latencies": latencies,
            "losses": losses,
            "cpu_seconds": time.process_time() - cpu,
            "wall_seconds": clock() - wall,
        }

    def forget_peak(self) -> None:
        """Starts the peak of memory anew: what compiled the step does not count."""
        gc.collect()
        gc.disable()  # a collection in the middle of a step would be charged to it
        reset_peak()

    def peak(self) -> int:
        """The most bytes held since `forget_peak`."""
        return resident_peak_bytes()


def _settled_bytes() -> int | None:
    gc.collect()
    return resident_bytes()


def _loaded(logits: np.ndarray, baseline: int | None, packages: tuple[str, ...]) -> dict[str, Any]:
    return {
        "logits": np.asarray(logits, "float64").reshape(-1).tolist(),
        "baseline_bytes": baseline,
        "versions": {package: metadata.version(package) for package in packages},
    }


def reason(error: Exception) -> str:
    """The line of a message that says what happened: TensorFlow's come after a heading and lines of source files."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.endswith(":") and not line.startswith(('File "', "[[{{"))]
    return telling[0].split(" in %")[0] if telling else repr(error)  # XLA goes on with an instruction and its source


if __name__ == "__main__":
    serve(Session(), reason)

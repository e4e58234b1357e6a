"""The child process that runs one network: `python -m benchmarks.peers.worker`, started by `tflite.process.Worker`.

It runs in the peers' environments as well as in this project's, so it imports a runtime only where one is asked for.
Requests and replies are JSON objects, one a line, as in `tflite.worker`; the clock, the turns and the pauses between
them are the same for every runtime.
"""

import gc
import os
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from tflite.serving import serve

# What a runtime makes of a network: something to call once per run, and something that gives the last run's logits.
Runner = tuple[Callable[[], Any], Callable[[], np.ndarray]]


def run_litert(source: dict[str, Any], images: np.ndarray, num_threads: int) -> Runner:
    """A .tflite file in LiteRT, with XNNPACK as its interpreter chooses by default."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=source["path"], num_threads=num_threads)
    interpreter.allocate_tensors()
    (given,) = interpreter.get_input_details()
    (found,) = interpreter.get_output_details()
    interpreter.set_tensor(given["index"], _quantized(images, given))
    return interpreter.invoke, lambda: _dequantized(interpreter.get_tensor(found["index"]), found)


def run_torch(
    source: dict[str, Any], images: np.ndarray, num_threads: int, compiled: bool = False, frozen: bool = False
) -> Runner:
    """A PyTorch network as it is, or through torch.compile: Inductor's default mode, `frozen` with constant weights."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else a pool of processes stays with each worker
    # torch 2.13 takes code compiled for one thread from its cache when two are set, so each number has its own.
    cache = os.path.join(tempfile.gettempdir(), f"mobiatt_tf_torchinductor_{num_threads}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
    import torch

    from benchmarks.peers import hosts

    torch.set_num_threads(num_threads)
    network: Any = hosts.build(**source["network"])
    if compiled:
        import torch._inductor.config

        torch._inductor.config.freezing = frozen
        network = torch.compile(network)
    x = torch.from_numpy(_channels_first(images))
    last: list[Any] = [None]

    def invoke() -> None:
        with torch.inference_mode():
            last[0] = network(x)

    return invoke, lambda: last[0].numpy()


def run_torch_compile(source: dict[str, Any], images: np.ndarray, num_threads: int) -> Runner:
    """`run_torch` through torch.compile."""
    return run_torch(source, images, num_threads, compiled=True)


def run_torch_frozen(source: dict[str, Any], images: np.ndarray, num_threads: int) -> Runner:
    """`run_torch_compile` with Inductor's freezing, which packs the weights."""
    return run_torch(source, images, num_threads, compiled=True, frozen=True)


def run_onnxruntime(source: dict[str, Any], images: np.ndarray, num_threads: int) -> Runner:
    """An .onnx file in onnxruntime's CPU provider with all its graph optimizations (the default)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    session = onnxruntime.InferenceSession(source["path"], options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    value = images if given.shape[-1] == 3 else _channels_first(images)
    last: list[Any] = [None]

    def invoke() -> None:
        last[0] = session.run(None, {given.name: value})

    return invoke, lambda: np.asarray(last[0][0])


def run_executorch(source: dict[str, Any], images: np.ndarray, num_threads: int) -> Runner:
    """A .pte file in executorch's Python binding, with the threads of its pool."""
    import torch
    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(num_threads)
    module = portable_lib._load_for_executorch(source["path"])
    x = torch.from_numpy(_channels_first(images))
    last: list[Any] = [None]

    def invoke() -> None:
        last[0] = module.forward([x])

    return invoke, lambda: np.asarray(last[0][0].numpy())


# Runtime -> how it runs a network, and the packages whose versions say what ran.
RUNTIMES: dict[str, tuple[Callable[..., Runner], tuple[str, ...]]] = {
    "litert": (run_litert, ("ai-edge-litert",)),
    "torch": (run_torch, ("torch", "timm")),
    "torch_compile": (run_torch_compile, ("torch", "timm")),
    "torch_frozen": (run_torch_frozen, ("torch", "timm")),
    "onnxruntime": (run_onnxruntime, ("onnxruntime",)),
    "executorch": (run_executorch, ("executorch",)),
}


def _channels_first(images: np.ndarray) -> np.ndarray:
    """[1, height, width, 3] to [1, 3, height, width], PyTorch's own order: nobody pays for it while the clock runs."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _quantized(value: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    dtype, (scale, zero_point) = np.dtype(detail["dtype"]), detail["quantization"]
    if dtype.kind == "f":
        return value.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(value / scale) + zero_point, limits.min, limits.max).astype(dtype)


def _dequantized(value: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    scale, zero_point = detail["quantization"]
    return value if value.dtype.kind == "f" else (value.astype("float32") - zero_point) * np.float32(scale)


class Session:
    """One process's state. Every public method answers the request of its name."""

    def __init__(self) -> None:
        self.runner: Runner | None = None

    def load(self, runtime: str, source: dict[str, Any], images: str, num_threads: int) -> dict[str, Any]:
        """Loads a network, runs it once and gives the logits of that run.

        Args:
            runtime: a key of `RUNTIMES`.
            source: `path` of a file, or `network`, the arguments of `hosts.build`.
            images: a .npy file, float32 [1, height, width, 3].
            num_threads: threads.
        """
        start = time.perf_counter()
        load, packages = RUNTIMES[runtime]
        self.runner = load(source, np.load(images, allow_pickle=False), num_threads)
        loaded = time.perf_counter()
        invoke, logits = self.runner
        invoke()
        first = time.perf_counter() - loaded
        gc.collect()
        gc.disable()  # a collection in the middle of a run would be charged to the network
        return {
            "load_seconds": loaded - start,
            "first_run_seconds": first,
            "logits": np.asarray(logits(), "float64").reshape(-1).tolist(),
            "versions": {package: metadata.version(package) for package in packages},
        }

    def invoke(self, unrecorded: int, recorded: int) -> dict[str, Any]:
        """Latencies in seconds of `recorded` runs, after `unrecorded` runs, and what they took together.

        `cpu_seconds` counts all threads of this process: over `wall_seconds` it says how many cores were at work.
        """
        assert self.runner is not None, "load comes first"
        invoke, clock = self.runner[0], time.perf_counter
        for _ in range(unrecorded):
            invoke()
        latencies = []
        cpu, wall = time.process_time(), clock()
        for _ in range(recorded):
            start = clock()
            invoke()
            latencies.append(clock() - start)
        return {
            "latencies": latencies,
            "cpu_seconds": time.process_time() - cpu,
            "wall_seconds": clock() - wall,
        }


if __name__ == "__main__":
    serve(Session())

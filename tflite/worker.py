"""The child process that touches a model with native code: `python -m tflite.worker`, started by `tflite.process`.

A damaged file, an operator's own check (int8 DIV by a zero divisor, for one) or a changed native interface can end a
process with a signal. Here it ends this one, and the command that started it reports one line. A process of its own per
model also keeps the figures of several models apart: memory, thread pool and caches.

Requests and replies are JSON objects, one a line, on standard input and output; the process ends with its input.
"""

import gc
import time
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from tflite.memory import reset_peak, resident_bytes, resident_peak_bytes
from tflite.serving import serve


class Session:
    """One process's state: the loaded interpreter, if any. Every public method answers the request of its name."""

    def __init__(self) -> None:
        self.interpreter: Interpreter | None = None

    def describe(self, path: str, num_threads: int) -> dict[str, Any]:
        """What the file holds and what the runtime makes of it.

        The interpreter's constructor runs the flatbuffer verifier, so the schema classes, which check nothing, read the
        file only after it.
        """
        from tflite import flatbuffer  # here alone, so that measuring processes stay small

        interpreter = Interpreter(model_path=path, num_threads=num_threads)
        contents = flatbuffer.read(Path(path).read_bytes())
        try:
            interpreter.allocate_tensors()
        except (RuntimeError, ValueError):
            missing = contents["flex_ops"] + contents["custom_ops"]
            if not missing:
                raise
            reason = f"the runtime has no kernel for {', '.join(missing)}"
            return contents | {"delegation": None, "undelegated_reason": reason}
        return contents | {"delegation": _delegation(interpreter, contents["nodes"]), "undelegated_reason": None}

    def load(self, path: str, num_threads: int, inputs: list[str] | None, seed: int) -> dict[str, Any]:
        """Loads the model, sets its inputs and runs it once, timing each step in seconds.

        `baseline_bytes` is what the process held before: Python, NumPy and the runtime's libraries.
        """
        gc.collect()
        baseline = resident_bytes()
        reset_peak()
        start = time.perf_counter()
        self.interpreter = Interpreter(model_path=path, num_threads=num_threads)
        self.interpreter.allocate_tensors()
        loaded = time.perf_counter()
        for detail, value in zip(
            self.interpreter.get_input_details(), make_inputs(self.interpreter, inputs, seed), strict=True
        ):
            self.interpreter.set_tensor(detail["index"], value)
        gc.collect()
        gc.disable()  # a collection in the middle of a run would be charged to the model
        before = time.perf_counter()
        self.interpreter.invoke()
        first = time.perf_counter() - before
        return {"load_seconds": loaded - start, "first_run_seconds": first, "baseline_bytes": baseline}

    def invoke(self, unrecorded: int, recorded: int) -> list[float]:
        """Latencies in seconds of `recorded` runs, after `unrecorded` runs."""
        assert self.interpreter is not None, "load comes first"
        invoke, clock = self.interpreter.invoke, time.perf_counter
        for _ in range(unrecorded):
            invoke()
        latencies = []
        for _ in range(recorded):
            start = clock()
            invoke()
            latencies.append(clock() - start)
        return latencies

    def peak(self) -> int | None:
        """The largest resident size of this process since the model began to load, in bytes."""
        return resident_peak_bytes()

    def profile(
        self, path: str, num_threads: int, runs: int, warmup: int, files: list[str] | None, seed: int
    ) -> dict[str, Any]:
        """Time per operator, see `tflite.profiler.profile`."""
        from tflite import profiler

        interpreter = Interpreter(model_path=path, num_threads=num_threads)
        interpreter.allocate_tensors()
        inputs = make_inputs(interpreter, files, seed)
        return profiler.profile(path, num_threads=num_threads, runs=runs, warmup=warmup, inputs=inputs)


def make_inputs(interpreter: Interpreter, files: list[str] | None, seed: int) -> list[np.ndarray]:
    """One array per model input: read from `.npy` files, or random within what the input can hold.

    Float inputs are uniform in [-1, 1), as images after the usual normalization; quantized ones use the whole range of
    their integer type; other integers are 0 or 1, which any embedding table can look up.

    Raises:
        ValueError: a file's shape or type does not fit the model's input.
    """
    details = interpreter.get_input_details()
    if files is not None and len(files) != len(details):
        raise ValueError(f"the model has {len(details)} inputs and --input names {len(files)} files")
    random = np.random.default_rng(seed)
    if files is None:
        return [_random_input(detail, random) for detail in details]
    return [_read_input(detail, file) for detail, file in zip(details, files, strict=True)]


def _random_input(detail: dict[str, Any], random: np.random.Generator) -> np.ndarray:
    shape, dtype = tuple(detail["shape"]), np.dtype(detail["dtype"])
    if dtype.kind == "f":
        return random.uniform(-1, 1, shape).astype(dtype)
    if dtype.kind in "iu" and detail["quantization"][0] != 0:
        limits = np.iinfo(dtype)
        return random.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
    return random.integers(0, 2, shape).astype(dtype)


def _read_input(detail: dict[str, Any], file: str) -> np.ndarray:
    value = np.load(file, allow_pickle=False)
    shape, dtype = tuple(int(size) for size in detail["shape"]), np.dtype(detail["dtype"])
    scale, zero_point = detail["quantization"]
    if value.shape != shape:
        raise ValueError(f"{file} has shape {value.shape}; the model's input {detail['name']} has {shape}")
    if value.dtype == dtype:
        return value
    if value.dtype.kind == "f" and dtype.kind == "f":
        return value.astype(dtype)
    if value.dtype.kind == "f" and scale != 0:
        limits = np.iinfo(dtype)
        return np.clip(np.rint(value / scale) + zero_point, limits.min, limits.max).astype(dtype)
    raise ValueError(f"{file} holds {value.dtype}; the model's input {detail['name']} takes {dtype}")


def _delegation(interpreter: Interpreter, nodes: int) -> dict[str, Any]:
    """How many of the file's `nodes` operators run inside delegates, and which do not.

    The runtime appends one DELEGATE node per partition after the file's own nodes and keeps the replaced ones in its
    list, without saying which they are. They are found by walking from a delegate's outputs back to its inputs: every
    live node of a partition leads to one of its outputs, and nothing outside it is reached without crossing an input.
    """
    details = interpreter._get_ops_details()
    own, delegates = details[:nodes], details[nodes:]
    producer = {int(tensor): node for node in own for tensor in node["outputs"]}
    replaced: set[int] = set()
    for delegate in delegates:
        seen = {int(tensor) for tensor in delegate["inputs"]}
        pending = [int(tensor) for tensor in delegate["outputs"]]
        while pending:
            tensor = pending.pop()
            if tensor in seen or tensor not in producer:
                continue
            seen.add(tensor)
            replaced.add(producer[tensor]["index"])
            pending.extend(int(source) for source in producer[tensor]["inputs"])
    undelegated: dict[str, int] = {}
    for node in own:
        if node["index"] not in replaced:
            undelegated[node["op_name"]] = undelegated.get(node["op_name"], 0) + 1
    return {
        "partitions": len(delegates),
        "delegated_nodes": len(replaced),
        "undelegated_ops": dict(sorted(undelegated.items())),
    }


if __name__ == "__main__":
    serve(Session())

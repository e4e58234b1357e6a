"""Time per operator through the C API of the libLiteRt that ai-edge-litert ships.

The Python package has no profiler. The library's exported C functions (litert/c/litert_profiler.h,
litert_compiled_model.h and litert_opaque_options.h of google-ai-edge/LiteRT) do: a compiled model created with the
option `enable_profiling` records one event per operator, inside XNNPACK too. Seen to work with 2.3.0. The functions are
called by name and nothing promises that they keep their arguments, so this runs in a process of its own
(`tflite.worker`) and every answer is checked.

What is measured: the same kernels as the interpreter's, called through LiteRT's compiled-model API, with the recording
of events on top. Times are whole microseconds, rounded down by the runtime, so an operator below one microsecond reads
as 0; `unattributed` is what remains of the whole invocation.
"""

import ctypes
import importlib.util
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_HANDLE = ctypes.c_void_p
_CPU = 1  # kLiteRtHwAcceleratorCpu
_MAIN = ctypes.c_size_t(0)  # the first signature and its subgraph
_LOCK_WRITE = 1  # kLiteRtTensorBufferLockModeWrite
_MAX_TYPE_BYTES = 512  # a LiteRtRankedTensorType, filled and read by the library only
# tflite::Profiler::EventType
_DEFAULT, _OPERATOR, _DELEGATE_OPERATOR, _DELEGATE_PROFILED_OPERATOR = 1, 2, 4, 8
_EVENT_TYPES = frozenset(1 << shift for shift in range(9))
_MARK = b"\xa5"
_MAX_EVENT_BYTES = 512


@dataclass(frozen=True)
class Event:
    """One record of the runtime: `index` is the file's node for builtin kernels, the delegate's own otherwise."""

    tag: str
    type: int
    microseconds: int
    index: int


def profile(path: str, *, num_threads: int, runs: int, warmup: int, inputs: Sequence[np.ndarray]) -> dict[str, Any]:
    """Profiles a model.

    Args:
        path: a .tflite file with a static input shape.
        num_threads: threads of XNNPACK's pool.
        runs: recorded invocations.
        warmup: invocations before them.
        inputs: one array per model input, of the model's dtype and shape.

    Returns:
        `invoke_seconds`, `unattributed_seconds` (means per invocation) and `nodes`: in order of execution, each with
        `op`, `where` ("builtin" or "delegate <partition>"), `index` and `seconds` (mean per invocation). The means are
        over the faster half of the invocations: one that the system interrupted for milliseconds would otherwise put
        them all on whichever operator was running. `runs` is how many that is.

    Raises:
        RuntimeError: the library's interface is not the one known here.
    """
    library = _Library()
    session = _Session(library, path, num_threads, inputs)
    for _ in range(warmup):
        session.run()
    return summarize([session.run_recorded() for _ in range(runs)])


def summarize(runs: Sequence[Sequence[Event]]) -> dict[str, Any]:
    """Averages the events of several invocations of one model, see `profile`."""
    operators = [
        [event for event in run if event.type in (_OPERATOR, _DELEGATE_OPERATOR, _DELEGATE_PROFILED_OPERATOR)]
        for run in runs
    ]
    orders = {tuple((event.tag, event.index) for event in run) for run in operators}
    if len(orders) != 1:
        raise RuntimeError("the invocations did not record the same operators")
    invocations = [
        max((event.microseconds for event in run if event.type == _DEFAULT and event.tag == "Invoke"), default=0)
        for run in runs
    ]
    seconds = np.array([[event.microseconds for event in run] for run in operators]) * 1e-6  # (runs, operators)
    if not operators[0] or min(invocations) == 0 or seconds.sum(axis=1).max() > 2e-6 * max(invocations):
        raise RuntimeError("the recorded times do not add up")
    fast = np.argsort(invocations, kind="stable")[: (len(runs) + 1) // 2]
    seconds = seconds[fast]  # (faster runs, operators)
    invoke = float(np.mean([invocations[run] for run in fast])) * 1e-6
    nodes = []
    partition, previous = -1, -1
    for event, mean in zip(operators[0], seconds.mean(axis=0), strict=True):
        if event.type == _OPERATOR:
            where, previous = "builtin", -1
        else:
            # Every partition counts its operators from 0, and a builtin kernel ends one.
            partition += event.index <= previous or previous == -1
            where, previous = f"delegate {partition}", event.index
        nodes.append({"op": event.tag, "where": where, "index": event.index, "seconds": float(mean)})
    return {
        "runs": len(fast),
        "invoke_seconds": invoke,
        "unattributed_seconds": invoke - float(seconds.sum(axis=1).mean()),
        "nodes": nodes,
    }


class _Library:
    """libLiteRt with its status codes turned into exceptions."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("ai_edge_litert")
        found = sorted(Path(spec.origin).parent.glob("libLiteRt.*")) if spec and spec.origin else []
        if not found:
            raise RuntimeError("ai-edge-litert ships no libLiteRt here")
        self._library = ctypes.CDLL(str(found[0]))

    def call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name, None)
        if function is None:
            raise RuntimeError(f"libLiteRt has no {name}")
        function.restype = ctypes.c_int
        if status := function(*arguments):
            raise RuntimeError(f"{name} answered with status {status}")

    def create(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """Calls a function whose last argument receives a handle."""
        handle = _HANDLE()
        self.call(name, *arguments, ctypes.byref(handle))
        if not handle:
            raise RuntimeError(f"{name} gave no handle")
        return handle


class _Session:
    """A compiled model with its buffers and profiler. Nothing is freed: the process ends soon."""

    def __init__(self, library: _Library, path: str, num_threads: int, inputs: Sequence[np.ndarray]) -> None:
        self.library = library
        self.environment = library.create("LiteRtCreateEnvironment", 0, None)
        self.model = library.create("LiteRtCreateModelFromFile", self.environment, str(path).encode())
        self._options = [b"enable_profiling = true\n", b"num_threads = %d\n" % num_threads]  # kept alive here
        self.compiled = library.create(
            "LiteRtCreateCompiledModel", self.environment, self.model, self._compile_options()
        )
        self.graph = library.create("LiteRtGetModelSubgraph", self.model, _MAIN)
        self.inputs = self._buffers("Input")
        self.outputs = self._buffers("Output")
        for buffer, value in zip(self.inputs, inputs, strict=True):
            self._write(_HANDLE(buffer), np.ascontiguousarray(value))
        self.profiler = library.create("LiteRtCompiledModelGetProfiler", self.compiled)

    def _compile_options(self) -> ctypes.c_void_p:
        options = self.library.create("LiteRtCreateOptions")
        self.library.call("LiteRtSetOptionsHardwareAccelerators", options, _CPU)
        for identifier, payload in zip((b"runtime_options_string", b"xnnpack"), self._options, strict=True):
            opaque = self.library.create("LiteRtCreateOpaqueOptions", identifier, payload, _keep)
            self.library.call("LiteRtAddOpaqueOptions", options, opaque)
        return options

    def _buffers(self, kind: str) -> ctypes.Array[ctypes.c_void_p]:
        count = ctypes.c_size_t()
        self.library.call(f"LiteRtGetNumSubgraph{kind}s", self.graph, ctypes.byref(count))
        handles = []
        for index in map(ctypes.c_size_t, range(count.value)):
            tensor = self.library.create(f"LiteRtGetSubgraph{kind}", self.graph, index)
            tensor_type = ctypes.create_string_buffer(_MAX_TYPE_BYTES)
            self.library.call("LiteRtGetRankedTensorType", tensor, tensor_type)
            needs = self.library.create(f"LiteRtGetCompiledModel{kind}BufferRequirements", self.compiled, _MAIN, index)
            handles.append(
                self.library.create(
                    "LiteRtCreateManagedTensorBufferFromRequirements", self.environment, tensor_type, needs
                )
            )
        return (_HANDLE * count.value)(*handles)

    def _write(self, buffer: ctypes.c_void_p, value: np.ndarray) -> None:
        size = ctypes.c_size_t()
        self.library.call("LiteRtGetTensorBufferPackedSize", buffer, ctypes.byref(size))
        if size.value != value.nbytes:
            raise RuntimeError(f"an input buffer has {size.value} bytes for an array of {value.nbytes}")
        address = _HANDLE()
        self.library.call("LiteRtLockTensorBuffer", buffer, ctypes.byref(address), _LOCK_WRITE)
        ctypes.memmove(address, value.ctypes.data, value.nbytes)
        self.library.call("LiteRtUnlockTensorBuffer", buffer)

    def run(self) -> None:
        self.library.call(
            "LiteRtRunCompiledModel",
            self.compiled,
            _MAIN,
            ctypes.c_size_t(len(self.inputs)),
            self.inputs,
            ctypes.c_size_t(len(self.outputs)),
            self.outputs,
        )

    def run_recorded(self) -> list[Event]:
        self.library.call("LiteRtStartProfiler", self.profiler)  # also empties the record
        self.run()
        self.library.call("LiteRtStopProfiler", self.profiler)
        count = ctypes.c_int()
        self.library.call("LiteRtGetNumProfilerEvents", self.profiler, ctypes.byref(count))
        content = ctypes.create_string_buffer(_MARK * (count.value * _MAX_EVENT_BYTES), count.value * _MAX_EVENT_BYTES)
        self.library.call("LiteRtGetProfilerEvents", self.profiler, count, content)
        return decode_events(content.raw, count.value)


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _keep(payload: int) -> None:
    """The library's way to free an option's text, which Python owns here."""


def decode_events(content: bytes, count: int) -> list[Event]:
    """Reads an array of `ProfiledEventData` (litert/c/litert_profiler_event.h) of unknown element size.

    The structure holds two memory readings whose size differs between the C and the C++ header. The buffer was filled
    with a mark, so the last byte that changed tells the size; the fields are found from both ends.
    """
    size = -(-len(content.rstrip(_MARK)) // (8 * count)) * 8 if count else 0
    if not 64 <= size <= _MAX_EVENT_BYTES:
        raise RuntimeError(f"{count} events came with {size} bytes each")
    events = []
    for start in range(0, count * size, size):
        tag, kind, _, elapsed = struct.unpack_from("<QI4xQQ", content, start)
        (index,) = struct.unpack_from("<q", content, start + size - 24)
        if kind not in _EVENT_TYPES:
            raise RuntimeError(f"an event has the unknown type {kind}")
        text = ctypes.string_at(tag).decode(errors="replace")
        events.append(Event(text, kind, elapsed, index))
    return events

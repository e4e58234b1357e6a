"""Google's benchmark_model: its command line, and what it prints.

The format is that of its public source: tensorflow/lite/tools/benchmark (benchmark_model.cc, benchmark_tflite_model.cc,
profiling in profile_summarizer.cc), the statistics of stats_calculator.h, the delegates' lines of subgraph.cc, and for
LiteRT's CompiledModel litert/tools/benchmark_litert_model.h. Older programs print less; what is missing is None.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mobiatt_tf.errors import UserError
from tflite.measurements import Delegation, Node, Profile, Statistics

_MIB = 1024 * 1024  # its "MB" are KiB / 1024
_PROFILE_EVENTS = 16384  # room for the operators inside of a delegate, too; the default is 1024
GPU_PRECISION_FLAG = "gpu_precision_loss_allowed"
_DELEGATES = {"XNNPACK": "TfLiteXNNPackDelegate", "GPU": "TfLiteGpuDelegateV2"}
_NUMBER = r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf)"
_COUNT = re.compile(rf"count=\d+(?: \w+={_NUMBER}(?:\(all same\))?)*\s*$")
# A column of the profile by its head. All others hold a number, and one with % if the head has one.
_COLUMNS = {
    "node type": r"(?P<op>\S.*?)",
    "avg ms": rf"(?P<ms>{_NUMBER})",
    "times called": r"(?P<times>\d+)",
    "Name": r"(?P<name>\S.*)",
}
_TABLE = re.compile(r"=+ (.*?) =+\s*$")


@dataclass(frozen=True)
class Report:
    """What one process of benchmark_model said. Times in seconds, sizes in bytes.

    Attributes:
        load_seconds: from the file to an interpreter that is ready.
        first_run_seconds: the first invocation.
        runs: of the recorded invocations. The median is the upper one of an even number; `p90` is not reported.
        peak_bytes: largest resident size of the process.
        growth_bytes: by how much the largest resident size grew since the program started.
        delegations: what each delegate took, in the order of the delegates.
        profile: mean times of all recorded invocations.
        ignored: flags that this program does not know.
    """

    load_seconds: float
    first_run_seconds: float
    runs: Statistics
    peak_bytes: int | None
    growth_bytes: int | None
    delegations: tuple[Delegation, ...]
    profile: Profile | None
    ignored: tuple[str, ...]

    def delegation(self, delegate: str) -> Delegation | None:
        """What this delegate ("XNNPACK", "GPU") took."""
        return next((one for one in self.delegations if one.delegate == delegate), None)


def arguments(
    graph: str,
    *,
    threads: int,
    runs: int,
    warmup: int,
    backend: str,
    seconds: float,
    memory: bool = False,
    profile: bool = False,
) -> list[str]:
    """The flags for one process.

    Args:
        graph: the model's path on the phone.
        threads: threads.
        runs: recorded invocations.
        warmup: unrecorded ones before them; at least one, the first.
        backend: "XNNPACK", "GPU" (XNNPACK takes what the GPU leaves) or "CPU" (the runtime's own kernels).
        seconds: after so long it stops by itself, once in the warm-up and once in the recorded runs.
        memory: also watch the peak of the memory, which takes a thread.
        profile: also record time per operator, which slows the invocations.
    """
    delegates = {
        "XNNPACK": ["--use_xnnpack=true"],
        # Delegates are applied in the order of their flags. The precision is the default, said aloud.
        "GPU": ["--use_gpu=true", f"--{GPU_PRECISION_FLAG}=true", "--use_xnnpack=true"],
        "CPU": ["--use_xnnpack=false"],
    }[backend]
    flags = [f"--graph={graph}", f"--num_threads={threads}", f"--num_runs={runs}", f"--warmup_runs={max(1, warmup)}"]
    flags += ["--min_secs=0", "--warmup_min_secs=0", f"--max_secs={seconds:.0f}", *delegates]
    if memory:
        flags += ["--report_peak_memory_footprint=true"]
    if profile:
        # The second is the name of the same switch in the program for LiteRT's CompiledModel.
        flags += ["--enable_op_profiling=true", f"--max_profiling_buffer_entries={_PROFILE_EVENTS}"]
        flags += ["--use_profiler=true"]
    return flags


def parse(text: str) -> Report:
    """Reads what benchmark_model printed, both streams.

    Raises:
        UserError: it has no latencies.
    """
    lines = [re.sub(r"^(?:INFO|WARN|WARNING|VERBOSE): ", "", line.rstrip()) for line in text.splitlines()]
    counts = [fields for line in lines if _COUNT.match(line) and "curr" in (fields := _fields(line))]
    if len(counts) < 2 or not all(map(math.isfinite, [*counts[-2].values(), *counts[-1].values()])):
        raise UserError(f"benchmark_model printed no latencies. {last_words(text)}")
    warm, recorded = counts[-2:]
    initialized = re.search(rf"Initialized session in ({_NUMBER})\s*ms", text)
    if not initialized:
        raise UserError(f"benchmark_model printed no time of initialization. {last_words(text)}")
    return Report(
        load_seconds=float(initialized[1]) / 1e3,
        first_run_seconds=warm.get("first", warm["curr"]) / 1e6,
        runs=_statistics(recorded),
        peak_bytes=_mebibytes(text, r"Overall peak memory footprint \(MB\) via periodic monitoring: |Peak memory:\s+"),
        growth_bytes=_mebibytes(
            text, rf"(?:Memory|Peak memory) footprint.*\(MB\): init={_NUMBER} overall=|Overall footprint:\s+"
        ),
        delegations=tuple(_delegations(lines)),
        profile=_profile(lines, recorded),
        ignored=_ignored(lines),
    )


def quotable(runs: Statistics) -> Statistics:
    """The statistics, if they can be quoted and be the base of a ratio; a single latency among them may be 0.

    Raises:
        UserError: the graph is too fast for benchmark_model's clock.
    """
    if runs.typical > 0 and runs.mean > 0:
        return runs
    raise UserError(
        "benchmark_model reports a latency of 0: the graph is faster than its clock, which counts whole microseconds, "
        "so nothing can be said of it. Take a larger graph."
    )


def last_words(text: str) -> str:
    """The line of an output that most likely says why it failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if re.match(r"(ERROR|FATAL|error)\b", line) and "Benchmarking failed" not in line]
    if not lines:
        return "It printed nothing."
    return f"It said: {(telling or lines)[-1]}"


def _fields(line: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(rf"(\w+)=({_NUMBER})", line)}


def _statistics(fields: dict[str, float]) -> Statistics:
    """Of a line such as `count=10 first=5 curr=4 min=4 max=6 avg=4.8 std=1 p5=4 median=5 p95=6`, in microseconds.

    If all are alike, only `count` and `curr` are there. `std` is that of the population, in whole microseconds.
    """
    count, same = int(fields["count"]), fields["curr"]
    median = fields.get("median", None if "min" in fields else same)
    return Statistics(
        runs=count,
        min=fields.get("min", same) / 1e6,
        median=None if median is None else median / 1e6,
        p90=None,
        mean=fields.get("avg", same) / 1e6,
        standard_deviation=fields.get("std", 0.0) / 1e6 * math.sqrt(count / (count - 1)) if count > 1 else 0.0,
    )


def _mebibytes(text: str, before: str) -> int | None:
    match = re.search(rf"(?:{before})({_NUMBER})", text)
    return round(float(match[1]) * _MIB) if match else None


def _delegations(lines: Sequence[str]) -> Iterator[Delegation]:
    """What each delegate says of the main graph.

    `Replacing 3 out of 5 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 3 partitions ...` counts the
    parts that are left, too; how many are the delegate's, another line says, unless there is one part.
    """
    text = "\n".join(lines)
    for delegate, kernel in _DELEGATES.items():
        replaced = re.search(
            rf"Replacing (\d+) (?:out of (\d+) )?node\(s\) with delegate \({kernel}\) node, yielding (\d+) partitions",
            text,
        )
        applied = re.search(
            rf"Explicitly applied {delegate} delegate, and the model graph will be "
            r"(?:(completely)|partially) executed by the delegate(?: w/ (\d+) delegate kernels)?",
            text,
        )
        if not replaced and not applied:
            continue
        partitions = None
        if applied and (applied[1] or applied[2]):
            partitions = int(applied[2] or 1)
        elif replaced and int(replaced[3]) == 1:
            partitions = 1
        nodes = int(replaced[2]) if replaced and replaced[2] else None
        yield Delegation(delegate, nodes, int(replaced[1]) if replaced else None, partitions)


def _profile(lines: Sequence[str], recorded: dict[str, float]) -> Profile | None:
    """The table "Run Order" of the recorded runs (not that of the initialization, nor those of other subgraphs)."""
    start = next((at for at, line in enumerate(lines) if "Operator-wise Profiling Info for Regular" in line), 0)
    titles = [(at, match[1]) for at, line in enumerate(lines) if at >= start and (match := _TABLE.match(line))]
    first = next((at for at, title in titles if title == "Run Order"), None)
    if first is None:
        return None
    row_pattern = _row_pattern(lines[first + 1] if first + 1 < len(lines) else "")
    nodes: list[Node] = []
    for line in lines[first + 2 :]:
        if row_pattern is None or not (row := row_pattern.match(line)):
            break
        # [avg ms] is per call; several nodes of one name share a row.
        inside = row["name"].startswith("Delegate/")
        index = re.search(r":(\d+)$", row["name"])
        node = Node(
            row["op"], "delegate" if inside else "builtin", int(index[1]) if index else 0, float(row["ms"]) / 1e3
        )
        nodes += [node] * int(row["times"])
    invoke = recorded.get("avg", recorded["curr"]) / 1e6
    if not nodes or invoke <= 0:  # 0: faster than the clock, and no base for shares
        return None
    attributed = math.fsum(node.seconds for node in nodes)
    return Profile(int(recorded["count"]), invoke, max(0.0, invoke - attributed), tuple(nodes), all_runs=True)


def _row_pattern(heads: str) -> re.Pattern[str] | None:
    """What a row of a profile looks like below these heads, which differ with the program's age; None: unknown.

    The number of columns decides where the operator's name ends, which may itself end in a number ("Conv 2").
    """
    names = re.findall(r"\[([^][]+)\]", heads)
    if names[:1] != ["node type"] or names[-1:] != ["Name"] or any(names.count(name) != 1 for name in _COLUMNS):
        return None
    cells = [_COLUMNS.get(name, f"{_NUMBER}%" if "%" in name else _NUMBER) for name in names]
    return re.compile(r"\s*" + r"\s+".join(cells) + "$")


def _ignored(lines: Sequence[str]) -> tuple[str, ...]:
    for line in lines:
        if "Unconsumed cmdline flags:" in line:
            return tuple(re.findall(r"--(\w+)", line))
    return ()

"""What Google's benchmark_model prints, read: texts in the format of its public source with made-up values."""

import contextlib
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobiatt_tf.errors import UserError
from tflite.adb import native
from tflite.measurements import Delegation, Node

# Test fixtures: what three generations of benchmark_model print (stats_calculator.h, benchmark_tflite_model.cc).
NEW = """INFO: STARTING!
INFO: Log parameter values verbosely: [0]
INFO: Min num runs: [10]
INFO: Graph: [/data/local/tmp/mobiatt/cache/0123]
INFO: Loaded model /data/local/tmp/mobiatt/cache/0123
INFO: Initialized TensorFlow Lite runtime.
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
VERBOSE: Replacing 310 out of 321 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 5 partitions for \
subgraph 0 (main).
INFO: Explicitly applied XNNPACK delegate, and the model graph will be partially executed by the delegate w/ 3 \
delegate kernels.
INFO: The input model file size (MB): 0.651
INFO: Initialized session in 12.345ms.
INFO: Running benchmark for at least 2 iterations and at least 0 seconds but terminate if exceeding 150 seconds.
INFO: count=2 first=1500 curr=1100 min=1100 max=1500 avg=1300 std=200 p5=1100 median=1500 p95=1500

INFO: Running benchmark for at least 4 iterations and at least 0 seconds but terminate if exceeding 150 seconds.
INFO: count=4 first=1000 curr=1030 min=1000 max=1030 avg=1015 std=11 p5=1000 median=1020 p95=1030

INFO: Inference timings in us: Init: 12345, First inference: 1500, Warmup (avg): 1300, Inference (avg): 1015
INFO: Note: as the benchmark tool itself affects memory footprint, the following is only APPROXIMATE to the actual \
memory footprint of the model at runtime. Take the information at your discretion.
INFO: Memory footprint delta from the start of the tool (MB): init=6.5 overall=8.25
INFO: Overall peak memory footprint (MB) via periodic monitoring: 14.5
INFO: Memory status at the end of exeution:
INFO: - VmRSS              : 14 MB
"""

OLD = """STARTING!
Duplicate flags: num_threads
Loaded model /data/local/tmp/model.tflite
INFO: Replacing 26 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 1 partitions.
Initialized session in 0.855ms.
Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
count=1 curr=49060

Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
count=50 first=1719375 curr=1733978 min=1702641 max=1734005 avg=1.71938e+06 std=4500

Average inference timings in us: Warmup: 49060, Init: 855, Inference: 1.71938e+06
Peak memory footprint (MB): init=0 overall=12.8672
"""

COMPILED_MODEL = """INFO: Unconsumed cmdline flags: --use_xnnpack=true --enable_op_profiling=true
INFO: Replacing 5 out of 5 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 1 partitions for subgraph 0.
INFO: Initialized session in 3.5ms.
INFO: count=1 curr=900 p5=900 median=900 p95=900
INFO: count=3 curr=500(all same) p5=500 median=500 p95=500
INFO: [benchmark_litert_model.h:89]
========== BENCHMARK RESULTS ==========
INFO: [benchmark_litert_model.h:94] Model initialization: 3.50 ms
INFO: [benchmark_litert_model.h:127] Overall footprint:    9.00 MB
INFO: [benchmark_litert_model.h:132] Peak memory:          21.50 MB
INFO: [benchmark_litert_model.h:179]
============================== Run Order ==============================
\t                             [node type]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
\t        LiteRT::Run[buffer registration]\t    0.020\t    0.010\t  3.309%\t  3.309%\t     0.000\t        1\t\
LiteRT::Run[buffer registration]/0
\t                         AllocateTensors\t    0.291\t    0.291\t  0.022%\t  3.331%\t   452.000\t        0\t\
AllocateTensors/0
\t         Fully Connected (NC, PF32) GEMM\t    0.538\t    0.400\t 92.948%\t 97.018%\t     0.000\t        1\t\
Delegate/Fully Connected (NC, PF32) GEMM:1

============================== Top by Computation Time ==============================
\t                             [node type]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
\t         Fully Connected (NC, PF32) GEMM\t    0.538\t    0.400\t 92.948%\t 97.018%\t     0.000\t        1\t\
Delegate/Fully Connected (NC, PF32) GEMM:1
"""

PROFILE = """INFO: Profiling Info for Benchmark Initialization:
============================== Run Order ==============================
\t                             [node type]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
\t                 ModifyGraphWithDelegate\t    6.348\t    6.348\t 55.640%\t 55.640%\t  7148.000\t        1\t\
ModifyGraphWithDelegate/0

INFO: Operator-wise Profiling Info for Regular Benchmark Runs:
============================== Run Order ==============================
\t                             [node type]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
\t                                QUANTIZE\t    0.199\t    0.200\t  1.328%\t  1.328%\t     0.000\t        1\t\
[tfl.quantize]:0
\t          Convolution (NHWC, QC8) DWConv\t    0.428\t    0.050\t  4.317%\t  8.304%\t     0.000\t        3\t\
Delegate/Convolution (NHWC, QC8) DWConv:1
\t                         FULLY_CONNECTED\t    0.100\t    0.300\t  -nan%\t  -nan%\t     0.000\t        1\t\
[a, b; c:0]:64

============================== Top by Computation Time ==============================
\t                             [node type]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
\t                         FULLY_CONNECTED\t    0.100\t    0.300\t  -nan%\t  -nan%\t     0.000\t        1\t\
[a, b; c:0]:64

Number of nodes executed: 3
============================== Summary by node type ==============================
\t                             [Node type]\t  [count]\t  [avg ms]\t    [avg %]\t    [cdf %]\t  [mem KB]\t[times called]
\t                         FULLY_CONNECTED\t        1\t     0.300\t    50.000%\t    50.000%\t     0.000\t        1

Timings (microseconds): count=4 first=650 curr=650 min=640 max=660 avg=650 std=7
Memory (bytes): count=0
3 nodes observed
"""


def test_new_output_is_read_in_seconds_and_bytes() -> None:
    report = native.parse(NEW)
    assert report.load_seconds == pytest.approx(0.012345)
    assert report.first_run_seconds == pytest.approx(0.0015)
    assert report.runs.runs == 4
    assert report.runs.min == pytest.approx(0.001)
    assert report.runs.median == pytest.approx(0.00102)
    assert report.runs.mean == pytest.approx(0.001015)
    assert report.runs.p90 is None
    # The printed deviation is the population's.
    assert report.runs.standard_deviation == pytest.approx(11e-6 * math.sqrt(4 / 3))
    assert report.peak_bytes == int(14.5 * 2**20)
    assert report.growth_bytes == int(8.25 * 2**20)
    assert report.profile is None
    assert report.ignored == ()


def test_of_five_partitions_the_three_of_the_delegate_are_counted() -> None:
    assert native.parse(NEW).delegation("XNNPACK") == Delegation("XNNPACK", 321, 310, 3)
    assert native.parse(NEW).delegation("GPU") is None


def test_old_output_lacks_what_it_does_not_say() -> None:
    report = native.parse(OLD)
    assert report.first_run_seconds == pytest.approx(0.04906)
    assert report.runs.mean == pytest.approx(1.71938)
    assert report.runs.median is None
    assert report.peak_bytes is None  # what it calls so is a difference
    assert report.growth_bytes == round(12.8672 * 2**20)
    assert report.delegation("XNNPACK") == Delegation("XNNPACK", None, 26, 1)


def test_the_program_for_compiled_models_is_read_too() -> None:
    report = native.parse(COMPILED_MODEL)
    assert report.ignored == ("use_xnnpack", "enable_op_profiling")
    assert report.runs.median == report.runs.mean == report.runs.min == pytest.approx(0.0005)
    assert (report.peak_bytes, report.growth_bytes) == (int(21.5 * 2**20), 9 * 2**20)
    assert report.profile is not None
    assert [node.op for node in report.profile.nodes] == [
        "LiteRT::Run[buffer registration]",
        "Fully Connected (NC, PF32) GEMM",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("INFO: Explicitly applied GPU delegate, and the model graph will be completely executed by the delegate.", 1),
        ("Though GPU delegate is explicitly applied, the model graph will not be executed by the delegate.", None),
        ("Replacing 3 out of 9 node(s) with delegate (TfLiteGpuDelegateV2) node, yielding 1 partitions.", 1),
        ("Replacing 3 out of 9 node(s) with delegate (TfLiteGpuDelegateV2) node, yielding 4 partitions.", None),
    ],
)
def test_partitions_are_known_only_where_the_output_says_so(line: str, expected: int | None) -> None:
    found = native.parse(f"{NEW}{line}\n").delegation("GPU")
    assert (found.partitions if found else None) == expected
    assert (found is None) == line.startswith("Though")


def test_profile_is_that_of_the_recorded_runs() -> None:
    profile = native.parse(NEW + PROFILE).profile
    assert profile is not None
    assert profile.runs == 4
    assert profile.invoke_seconds == pytest.approx(0.001015)
    assert [(node.op, node.where, node.index) for node in profile.nodes] == [
        ("QUANTIZE", "builtin", 0),
        *[("Convolution (NHWC, QC8) DWConv", "delegate", 1)] * 3,
        ("FULLY_CONNECTED", "builtin", 64),
    ]
    assert profile.by_type()["Convolution (NHWC, QC8) DWConv"] == (3, pytest.approx(150e-6))
    assert profile.unattributed_seconds == pytest.approx(0.001015 - 0.00065)


def test_columns_of_older_tables_and_pasted_spaces_are_read() -> None:
    old = PROFILE.replace("[node type]\t", "[node type]\t          [start]\t").replace(
        "\t    0.199", "\t    0.000\t    0.199"
    )
    spaced = old.expandtabs(8)
    for text in (old, spaced):
        profile = native.parse(NEW + text).profile
        assert profile is not None
        assert profile.nodes[0] == Node("QUANTIZE", "builtin", 0, pytest.approx(0.0002))


def test_a_number_at_the_end_of_an_operators_name_belongs_to_it() -> None:
    named = PROFILE.replace("Convolution (NHWC, QC8) DWConv\t", "Conv 2\t").replace("QUANTIZE\t", "Custom 1 2.5\t")
    started = "\n".join(
        line.replace("[node type]\t", "[node type]\t  [start]\t").replace("\t    0.", "\t    0.001\t    0.", 1)
        for line in named.splitlines()
    )
    for text in (named, started, named.expandtabs(8), started.expandtabs(8)):
        profile = native.parse(NEW + text).profile
        assert profile is not None
        assert [node.op for node in profile.nodes] == ["Custom 1 2.5", *["Conv 2"] * 3, "FULLY_CONNECTED"]
        assert [node.seconds for node in profile.nodes] == pytest.approx([200e-6, 50e-6, 50e-6, 50e-6, 300e-6])


@pytest.mark.parametrize("heads", ["", "[node type] [avg ms]", "[node type] [first] [avg ms] [%] [Name]"])
def test_a_table_with_unknown_heads_is_no_profile(heads: str) -> None:
    table = "".join(f"{heads}\n" if "[node type]" in line else f"{line}\n" for line in PROFILE.splitlines())
    assert native.parse(NEW + table).profile is None


@pytest.mark.parametrize(
    "line",
    [
        "count=3 curr=0(all same)",
        "count=3 curr=0(all same) p5=0 median=0 p95=0",
        "count=3 first=1 curr=0 min=0 max=1 avg=0.333333 std=0 p5=0 median=0 p95=1",
        "count=3 first=0 curr=0 min=0 max=0 avg=0 std=0",
    ],
)
def test_latencies_below_the_clocks_resolution_are_no_result(line: str) -> None:
    with pytest.raises(UserError, match="latency of 0: the graph is faster than its clock") as raised:
        native.quotable(native.parse(f"Initialized session in 1ms.\ncount=1 curr=7\n{line}\n").runs)
    assert "\n" not in str(raised.value)
    assert native.parse(f"Initialized session in 1ms.\ncount=1 curr=0\ncount=3 curr=0\n{PROFILE}").profile is None


@pytest.mark.parametrize(("rest", "median"), [("", None), (" p5=0 median=1 p95=1", 1e-6)])
def test_a_single_latency_of_0_is_a_latency(rest: str, median: float | None) -> None:
    line = f"count=3 first=1 curr=1 min=0 max=1 avg=0.666667 std=0{rest}"
    runs = native.parse(f"Initialized session in 1ms.\ncount=1 curr=0\n{line}\n").runs
    assert runs.min == 0
    assert runs.median == (None if median is None else pytest.approx(median))
    assert native.quotable(runs) == runs


def test_a_failure_quotes_the_line_that_tells() -> None:
    text = "INFO: STARTING!\nERROR: Failed to load model /x\nERROR: Benchmarking failed.\n"
    with pytest.raises(UserError, match=r"no latencies. It said: ERROR: Failed to load model /x$"):
        native.parse(text)
    with pytest.raises(UserError, match=r"It printed nothing\.$"):
        native.parse("\n")


def test_a_run_that_was_cut_off_has_no_latencies() -> None:
    with pytest.raises(UserError, match="no latencies"):
        native.parse(NEW.partition("INFO: count=4")[0])


def print_statistics(latencies: list[int]) -> str:
    """What tsl::StatWithPercentiles prints of whole microseconds (stats_calculator.h), written anew."""
    ordered = sorted(latencies)
    rest = "".join(
        f" {name}={ordered[len(ordered) * at // 100]}" for name, at in (("p5", 5), ("median", 50), ("p95", 95))
    )
    if ordered[0] == ordered[-1]:
        return f"count={len(latencies)} curr={latencies[-1]}{'(all same)' if len(latencies) > 1 else ''}{rest}"
    return (
        f"count={len(latencies)} first={latencies[0]} curr={latencies[-1]} min={ordered[0]} max={ordered[-1]} "
        f"avg={statistics.fmean(latencies):.6g} std={int(statistics.pstdev(latencies))}{rest}"
    )


@given(st.lists(st.integers(min_value=1, max_value=10**8), min_size=1, max_size=40))
def test_any_latencies_come_back(latencies: list[int]) -> None:
    line = print_statistics(latencies)
    runs = native.parse(f"Initialized session in 1ms.\ncount=1 curr=7\n{line}\n").runs
    assert runs.runs == len(latencies)
    assert runs.min == pytest.approx(min(latencies) / 1e6)
    assert runs.mean == pytest.approx(statistics.fmean(latencies) / 1e6, rel=1e-5)
    assert runs.median == pytest.approx(sorted(latencies)[len(latencies) // 2] / 1e6)
    if len(latencies) > 1:
        slack = math.sqrt(2) * 1e-6 + 1e-9  # the printed one is cut to whole microseconds
        assert runs.standard_deviation <= statistics.stdev(latencies) / 1e6 + 1e-9
        assert runs.standard_deviation >= statistics.stdev(latencies) / 1e6 - slack


@given(st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 40), st.text("count=12 .e-+naif\n\t%:()", max_size=8))))
def test_damaged_output_is_no_traceback(edits: list[tuple[int, int, str]]) -> None:
    text = NEW + PROFILE
    for start, length, replacement in edits:
        text = text[:start] + replacement + text[start + length :]
    with contextlib.suppress(UserError):
        report = native.parse(text)
        assert math.isfinite(report.runs.mean)


def test_flags_say_exactly_what_is_measured() -> None:
    flags = native.arguments("/m", threads=4, runs=10, warmup=0, backend="XNNPACK", seconds=90.4)
    assert flags == [
        "--graph=/m",
        "--num_threads=4",
        "--num_runs=10",
        "--warmup_runs=1",  # without a first run there is no time of a first run
        "--min_secs=0",
        "--warmup_min_secs=0",
        "--max_secs=90",
        "--use_xnnpack=true",
    ]
    gpu = native.arguments("/m", threads=1, runs=1, warmup=1, backend="GPU", seconds=9, memory=True, profile=True)
    assert gpu.index("--use_gpu=true") < gpu.index("--use_xnnpack=true")
    assert "--gpu_precision_loss_allowed=true" in gpu
    assert "--gpu_precision_loss_allowed=true" not in flags
    assert {"--report_peak_memory_footprint=true", "--enable_op_profiling=true"} < set(gpu)
    cpu = native.arguments("/m", threads=1, runs=1, warmup=1, backend="CPU", seconds=9)
    assert "--use_xnnpack=false" in cpu

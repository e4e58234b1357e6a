"""Measuring on this machine with the real runtime: figures, reports, refusals, interruption."""

import ctypes
import json
import math
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from hypothesis import given
from hypothesis import strategies as st

from mobiatt_tf.errors import UserError
from tflite import profiler, summary, worker
from tflite.benchmark import benchmark
from tflite.host import HostDevice
from tflite.inspect import describe
from tflite.measurements import Measurement, Measurements, Node, Plan, Profile, ratio, summarize
from tflite.results import to_json


@pytest.fixture(scope="module")
def found(tflite_files: dict[str, Path]) -> Measurements:
    graphs = (tflite_files["float"], tflite_files["int8"])
    plan = Plan(graphs, num_threads=(1, 2), runs=5, warmup=1, runs_per_round=2, profile_runs=4)
    return benchmark(plan, HostDevice())


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tflite.benchmark", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_every_graph_is_measured_at_every_thread_count(found: Measurements) -> None:
    measured = [(measurement.label, measurement.num_threads) for measurement in found.measurements]
    assert measured == [("float", 1), ("int8", 1), ("float", 2), ("int8", 2)]
    for measurement in found.measurements:
        assert [len(latencies) for latencies in measurement.rounds] == [2, 2, 1]
        assert all(0 < latency < 60 for latency in measurement.latencies)
        assert measurement.load_seconds > 0
        assert measurement.first_run_seconds > 0


def test_memory_is_that_of_one_small_process(found: Measurements) -> None:
    for measurement in found.measurements:
        assert measurement.peak_bytes is not None
        assert measurement.baseline_bytes is not None
        assert measurement.baseline_bytes < measurement.peak_bytes
        assert measurement.peak_bytes < 200e6  # this test's own process holds TensorFlow and is several times larger


def test_larger_models_take_more_memory(tmp_path: Path) -> None:
    import keras
    import tensorflow as tf

    plans = []
    for width in (64, 2048):
        x = keras.Input((width,), batch_size=1)
        model = keras.Model(x, keras.layers.Dense(width)(x))
        path = tmp_path / f"width{width}.tflite"
        path.write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())
        plans.append(path)
    small, large = HostDevice().run(Plan(tuple(plans), runs=1, warmup=0, profile=False)).measurements
    assert small.model_bytes is not None
    assert large.model_bytes is not None
    assert large.model_bytes - small.model_bytes > 0.9 * 4 * (2048**2 - 64**2)  # at least the packed weights


def test_profile_names_the_operators_outside_the_delegate(found: Measurements) -> None:
    """The profiler and the walk over the delegates' tensors are independent; both must find the same operators."""
    for measurement in found.measurements:
        profile = measurement.profile
        assert profile is not None, measurement.profile_error
        description = found.descriptions[measurement.graph]
        builtin = Counter(node.op for node in profile.nodes if node.where == "builtin")
        assert builtin == description.undelegated_ops
        partitions = {node.where for node in profile.nodes} - {"builtin"}
        assert 1 <= len(partitions) <= (description.delegate_partitions or 0)
        total = sum(node.seconds for node in profile.nodes)
        assert profile.invoke_seconds == pytest.approx(total + profile.unattributed_seconds)
        assert sum(seconds for _, seconds in profile.by_type().values()) == pytest.approx(total)
        assert any("Fully Connected" in node.op for node in profile.nodes)


def test_missing_profile_leaves_the_latencies(tflite_files: dict[str, Path], tmp_path: Path) -> None:
    """LiteRT's compiled models refuse a free batch size, which the interpreter runs as 1."""
    found = HostDevice().run(Plan((tflite_files["dynamic"],), runs=2, warmup=0, profile_runs=1))
    (measurement,) = found.measurements
    assert len(measurement.latencies) == 2
    assert measurement.profile is None
    assert measurement.profile_error is not None
    assert "profile not available with ai-edge-litert" in measurement.profile_error
    assert measurement.profile_error in summary.format_table(found)
    assert all(path.stat().st_size > 0 for path in summary.write(found, tmp_path))


@pytest.mark.parametrize(
    ("invoke", "unattributed", "doubted"), [(1.2e-3, 0.1e-3, False), (2e-3, 0.1e-3, True), (1.2e-3, 0.7e-3, True)]
)
def test_a_profile_far_from_the_latency_says_so(invoke: float, unattributed: float, doubted: bool) -> None:
    profile = Profile(5, invoke, unattributed, (Node("ADD", "delegate 0", 0, invoke - unattributed),))
    measurement = Measurement(0, "model", 1, 0.0, 0.0, rounds=[[1e-3, 1e-3]], profile=profile)
    assert any("NOT REPRESENTATIVE" in line for line in summary._profile_lines(measurement)) == doubted


def test_report_carries_every_raw_latency(found: Measurements, tmp_path: Path) -> None:
    results, picture = summary.write(found, tmp_path / "new" / "directory")
    value = json.loads(results.read_text())
    assert [entry["rounds"] for entry in value["measurements"]] == [m.rounds for m in found.measurements]
    assert value["measurements"][1]["ratio_to_first_graph"]["median"] > 0
    assert value["measurements"][0]["ratio_to_first_graph"] == {"median": 1, "min": 1, "max": 1}
    assert value["graphs"][1]["undelegated_ops"] == found.descriptions[1].undelegated_ops
    for name in ("cpu", "logical_cores", "os", "python", "ai_edge_litert", "date"):
        assert value["device"][name]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in picture.parent.iterdir()) == ["benchmark.json", "benchmark.png"]
    table = summary.format_table(found)
    assert "int8" in table
    assert "not delegated" in table
    assert max(map(len, table.splitlines())) < 200


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=50))
def test_statistics_are_numpys(latencies: list[float]) -> None:
    found = summarize(latencies)
    assert found is not None
    assert found.min <= found.median <= found.p90 * (1 + 1e-12)
    assert found.min * (1 - 1e-12) <= found.mean <= max(latencies) * (1 + 1e-12)
    assert found.median == pytest.approx(np.median(latencies))
    assert found.p90 == pytest.approx(np.quantile(latencies, 0.9))


@given(
    st.lists(st.lists(st.floats(1e-4, 1), min_size=3, max_size=3), min_size=1, max_size=6),
    st.floats(0.1, 10),
    st.lists(st.floats(0.1, 10), min_size=6, max_size=6),
)
def test_ratio_ignores_drift_between_rounds(rounds: list[list[float]], factor: float, drift: list[float]) -> None:
    slow = [[run * scale for run in runs] for runs, scale in zip(rounds, drift, strict=False)]
    reference = Measurement(0, "a", 1, 0, 0, rounds=slow)
    other = Measurement(1, "b", 1, 0, 0, rounds=[[run * factor for run in runs] for runs in slow])
    relative = ratio(other, reference)
    assert relative is not None
    assert relative.median == pytest.approx(factor)
    assert relative.max == pytest.approx(relative.min)


@given(st.integers(1, 1000), st.integers(1, 100))
def test_rounds_add_up_to_the_runs(runs: int, runs_per_round: int) -> None:
    rounds = Plan((Path("a"),), runs=runs, runs_per_round=runs_per_round).rounds
    assert sum(rounds) == runs
    assert len(rounds) == math.ceil(runs / runs_per_round)
    assert 0 < min(rounds) <= max(rounds) <= runs_per_round


@given(st.lists(st.sampled_from(["a.tflite", "b.tflite", "x/a.tflite", "y/a.tflite"]), min_size=1, max_size=6))
def test_labels_are_distinct(names: list[str]) -> None:
    labels = Plan(tuple(Path(name) for name in names)).labels
    assert len(set(labels)) == len(names)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"graphs": ()}, "no graph"),
        ({"num_threads": ()}, "num_threads is empty"),
        ({"num_threads": (1, 0)}, "num_threads is 1,0"),
        ({"num_threads": (2, 2)}, "twice"),
        ({"num_threads": (100_000,)}, "at most 256"),
        ({"runs": 0}, "runs is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"runs_per_round": 0}, "runs_per_round is 0"),
        ({"cooldown_seconds": -0.5}, "cooldown_seconds is -0.5"),
        ({"cooldown_seconds": math.nan}, "cooldown_seconds is nan"),
    ],
)
def test_plan_refuses(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Plan(**{"graphs": (Path("a.tflite"),), **change})  # type: ignore[arg-type]


def test_random_inputs_are_the_models_and_repeat(tflite_files: dict[str, Path]) -> None:
    for name, low, high in (("float", -1, 1), ("int8", -128, 127)):
        interpreter = Interpreter(str(tflite_files[name]))
        (value,) = worker.make_inputs(interpreter, None, seed=3)
        (detail,) = interpreter.get_input_details()
        assert value.dtype == detail["dtype"]
        assert value.shape == tuple(detail["shape"])
        assert low <= value.min() < 0.9 * low
        assert 0.9 * high < value.max() <= high
        np.testing.assert_array_equal(value, worker.make_inputs(interpreter, None, seed=3)[0])


def test_float_input_is_quantized_for_an_int8_model(tflite_files: dict[str, Path], tmp_path: Path) -> None:
    interpreter = Interpreter(str(tflite_files["int8"]))
    scale, zero_point = interpreter.get_input_details()[0]["quantization"]
    image = np.random.default_rng(0).normal(size=(1, 16, 16, 3)).astype("float32")
    np.save(tmp_path / "image.npy", image)
    (value,) = worker.make_inputs(interpreter, [str(tmp_path / "image.npy")], seed=0)
    restored = (value.astype("float32") - zero_point) * scale
    inside = np.abs(image) < 126 * scale - abs(zero_point) * scale
    assert np.abs(restored - image)[inside].max() <= 0.5001 * scale


@pytest.mark.parametrize(
    ("value", "words"),
    [(np.zeros((1, 8, 8, 3), "float32"), "has shape"), (np.zeros((1, 16, 16, 3), "int64"), "holds int64")],
)
def test_unfit_input_is_refused(tflite_files: dict[str, Path], tmp_path: Path, value: np.ndarray, words: str) -> None:
    np.save(tmp_path / "input.npy", value)
    plan = Plan((tflite_files["float"],), runs=1, warmup=0, profile=False, inputs=(tmp_path / "input.npy",))
    with pytest.raises(UserError, match=words):
        HostDevice().run(plan)


def test_model_that_fails_to_run_is_one_line(tflite_files: dict[str, Path]) -> None:
    """An int8 quotient meets a divisor of zero."""
    with pytest.raises(UserError, match=r"divide\.tflite: .*DIV"):
        HostDevice().run(Plan((tflite_files["divide"],), runs=1, warmup=0))


def test_model_without_kernels_is_refused(tflite_files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"flex\.tflite cannot run here: .*FlexMatrixInverse"):
        HostDevice().run(Plan((tflite_files["flex"],)))


@pytest.mark.parametrize("memory_bytes", [16, 24, 32])
def test_events_are_read_whatever_their_size(memory_bytes: int) -> None:
    """The size of the memory readings differs between the library's headers; the fields around them do not move."""
    tags = [ctypes.create_string_buffer(name) for name in (b"Invoke", b"Add (ND)", b"POW")]
    content = b"".join(
        struct.pack("<QI4xQQ", ctypes.addressof(tag), kind, 1000, 7 + index)
        + bytes(2 * memory_bytes)
        + struct.pack("<qqI", index, 0, 0)
        + b"\xa5" * 4
        for index, (tag, kind) in enumerate(zip(tags, (1, 8, 2), strict=True))
    )
    events = profiler.decode_events(content + b"\xa5" * 400, 3)
    assert [(event.tag, event.type, event.microseconds, event.index) for event in events] == [
        ("Invoke", 1, 7, 0),
        ("Add (ND)", 8, 8, 1),
        ("POW", 2, 9, 2),
    ]


def test_unknown_events_are_refused() -> None:
    with pytest.raises(RuntimeError, match="bytes each"):
        profiler.decode_events(b"\xa5" * 512, 1)
    with pytest.raises(RuntimeError, match="unknown type"):
        profiler.decode_events(bytes(range(1, 105)), 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--graph={absent}"], "no file"),
        (["--graph={corrupt}"], "valid Flatbuffer"),
        (["--graph={float}", "--num_threads=0"], "num_threads is 0"),
        (["--graph={float}", "--num_threads=two"], "not a list of numbers"),
        (["--graph={float}", "--device=toaster"], "--device=toaster is unknown; allowed: host"),
        (["--graph={float}", "--input={absent}"], "no input file"),
        ([], "no graph"),
    ],
)
def test_command_refuses_in_one_line(
    tflite_files: dict[str, Path], tmp_path: Path, arguments: list[str], words: str
) -> None:
    corrupt = tmp_path / "corrupt.tflite"
    corrupt.write_bytes(tflite_files["float"].read_bytes()[:3000])
    names = {"absent": tmp_path / "absent", "corrupt": corrupt, "float": tflite_files["float"]}
    done = run_benchmark(*(argument.format(**names) for argument in arguments), f"--output_dir={tmp_path / 'out'}")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not (tmp_path / "out").exists()


def test_command_runs_without_tensorflow(tflite_files: dict[str, Path], tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from tflite import benchmark, summary; from tflite.host import HostDevice\n"
        "plan = benchmark.Plan((Path(sys.argv[1]),), runs=2, profile_runs=2)\n"
        "summary.write(benchmark.benchmark(plan, HostDevice()), Path(sys.argv[2]))\n"
        "print(sorted({'tensorflow', 'keras'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, str(tflite_files["power"]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_ctrl_c_keeps_what_was_measured(tflite_files: dict[str, Path], tmp_path: Path) -> None:
    graphs = f"--graph={tflite_files['float']},{tflite_files['int8']}"
    command = [sys.executable, "-m", "tflite.benchmark", graphs, "--runs=200000", f"--output_dir={tmp_path}"]
    with open(tmp_path / "stderr", "w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        deadline = time.monotonic() + 120
        while "measure" not in (tmp_path / "stderr").read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "INTERRUPTED after" in output
    value = json.loads((tmp_path / "benchmark.json").read_text())
    assert value["interrupted"] is True
    assert 0 < value["measurements"][0]["latency_seconds"]["runs"] < 200000
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_json_of_a_description_is_shared_with_inspect(found: Measurements, tflite_files: dict[str, Path]) -> None:
    assert to_json(found)["graphs"][0]["nodes"] == describe(tflite_files["float"]).nodes

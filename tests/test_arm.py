"""Counting the instructions of the aarch64 runtime: the arithmetic around it, and real counts in the emulator."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from benchmarks import arm
from mobiatt_tf.errors import UserError
from tools.arm import emulator
from tools.arm.emulator import CLASSES, Count

TOKENS, MODEL_DIM = 49, 192
FLOOR_MACS = 4 * TOKENS * MODEL_DIM**2
ENVIRONMENT = {"cpu": "cortex-a76", "qemu": "7.2.22 (Debian 1:7.2+dfsg-7)", "ai_edge_litert": "2.3.0"}


def counted(instructions: int, nodes: int = 1) -> Count:
    return Count(nodes, dict.fromkeys(CLASSES, 0) | {"simd": instructions})


def marks(executed: list[int]) -> str:
    """What the plugin writes where each inference executes so many instructions of every class, after 1000 others."""
    totals = [1000 + sum(executed[:number]) for number in range(len(executed) + 1)]
    return "".join(
        json.dumps({"mark": mark} | dict.fromkeys(CLASSES, total)) + "\n" for mark, total in enumerate(totals)
    )


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=9), st.lists(st.integers(0, 10**12), max_size=3))
def test_a_count_is_the_median_inference_after_the_skipped_ones(executed: list[int], skipped: list[int]) -> None:
    found = emulator.parse(marks(skipped + executed), len(skipped), len(executed))
    assert found == dict.fromkeys(CLASSES, statistics.median_low(executed))


@pytest.mark.parametrize(
    "text", ["", marks([]), marks([5, 5]), marks([5] * 4), "".join(marks([5] * 4).splitlines(True)[1:])]
)
def test_marks_that_are_missing_are_noticed(text: str) -> None:
    with pytest.raises(ValueError, match=r"marks for 2 \+ 1 inferences"):
        emulator.parse(text, skipped=2, inferences=1)


@given(st.integers(1000, 10**9), st.floats(0.5, 1.5))
def test_only_a_rise_is_worse_and_small_changes_are_neither(known: int, factor: float) -> None:
    found = round(known * factor)
    worse, better = arm.compare({"block": counted(found)}, {"block": counted(known)})
    assert len(worse) == (found > known * (1 + arm.TOLERANCE))
    assert len(better) == (found < known * (1 - arm.TOLERANCE))
    assert all("update the baseline" in line for line in better)


def test_graphs_that_come_go_fail_or_change_are_named() -> None:
    fails = Count(3, error="failed to prepare")
    worse, better = arm.compare(
        {"new": counted(100), "broken": fails, "still": fails, "mended": counted(100), "grown": counted(200, nodes=4)},
        {"lost": counted(100), "broken": counted(100), "still": fails, "mended": fails, "grown": counted(100, nodes=3)},
    )
    assert [line.split(":")[0] for line in worse] == ["broken", "grown", "lost"]
    assert [line.split(":")[0] for line in better] == ["new", "mended"]
    assert "failed to prepare" in worse[0]
    assert "+100.00%" in worse[1]
    assert "4 nodes, it had 3" in worse[1]


def test_other_versions_are_told_apart_but_not_bug_fix_releases_of_qemu() -> None:
    assert emulator.other_environment(ENVIRONMENT, ENVIRONMENT | {"qemu": "7.2.7 (Debian 1:7.2+dfsg-1)"}) is None
    for name, other in (("qemu", "8.2.22"), ("qemu", "7.1.22"), ("ai_edge_litert", "2.3.1"), ("cpu", "cortex-a72")):
        reason = emulator.other_environment(ENVIRONMENT, ENVIRONMENT | {name: other})
        assert reason is not None
        assert name in reason


def test_counts_survive_their_file() -> None:
    counts = {"block/float32": counted(7), "block/float16": Count(3, error="failed to prepare")}
    assert arm.from_json(json.loads(json.dumps(arm.to_json(counts, ENVIRONMENT)))) == counts
    assert "does not run: failed to prepare" in arm.table(counts)


def test_wrong_outputs_are_found() -> None:
    native = np.linspace(-2, 1, 50, dtype="float32")
    assert emulator.difference(native + np.float32(1e-6), native, "float32") is None
    for wrong in (native + np.float32(1e-3), np.where(native > 0, np.nan, native)):
        assert "differs from this machine's" in str(emulator.difference(wrong, native, "float32"))
    assert emulator.difference(native + np.float32(1e-3), native, "float16") is None
    assert "float32 arithmetic" in str(emulator.difference(native, native, "float16"))
    integers = np.arange(-5, 5, dtype="int8")
    assert emulator.difference(integers, integers, "int8") is None
    assert emulator.difference(integers + np.int8(1), integers, "int8")


@pytest.fixture(scope="module")
def toolchain() -> Path:
    """What `make arm` prepares; returns at once where that has been run."""
    command = [str(emulator.TOOLS / "setup.sh")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    debian_12 = "bookworm" in Path("/etc/os-release").read_text() if Path("/etc/os-release").is_file() else False
    can_install = debian_12 and os.geteuid() == 0 and shutil.which("apt-get")
    if done.returncode and not can_install:
        pytest.skip(f"the emulator cannot be had here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return emulator.TOOLCHAIN


@pytest.fixture(scope="module")
def floor(toolchain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The four projections, as float32, with dynamic range, and marked for float16 arithmetic."""
    from benchmarks import blocks

    contents = {format: blocks.graph("floor", TOKENS, MODEL_DIM, format) for format in ("float32", "dynamic")}
    contents["float16"] = emulator.with_float16(contents["float32"])
    unmarked = emulator.with_float16(contents["float16"], allowed=False)
    assert [emulator.allows_float16(each) for each in (*contents.values(), unmarked)] == [False, False, True, False]
    directory = tmp_path_factory.mktemp("floor")
    for name, content in contents.items():
        (directory / f"{name}.tflite").write_bytes(content)
    return {name: directory / f"{name}.tflite" for name in contents}


@pytest.mark.slow
def test_vector_instructions_are_those_of_the_matrix_products(floor: dict[str, Path]) -> None:
    # Multiply-adds of one vector instruction: FMLA of 4 floats or 8 half floats, SDOT of 16 int8 (16 bytes each).
    for format, per_instruction in (("float32", 4), ("float16", 8), ("dynamic", 16)):
        found = emulator.count(floor[format], inferences=2)
        assert found.classes is not None, found.error
        least = FLOOR_MACS / per_instruction
        assert least <= found.classes["simd"] < 1.5 * least, format
        assert found.classes["other"] == 0


@pytest.mark.slow
def test_counts_repeat_through_the_command_line(floor: dict[str, Path], tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "benchmarks/arm.py", f"--output_dir={tmp_path}", *arguments]
        return subprocess.run(
            command, cwd=arm.ROOT, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True
        )

    name = str(floor["float32"])
    done = run(f"--graph={name}")
    assert done.returncode == 0, done.stderr
    assert "Instructions executed per inference, not time" in done.stdout
    assert (tmp_path / "arm.png").stat().st_size > 1000
    first = arm.from_json(json.loads((tmp_path / "arm.json").read_text()))[name]
    second = emulator.count(floor["float32"], inferences=2)
    assert first.instructions == pytest.approx(second.instructions, rel=1e-5)

    done = run(f"--graph={name}", "--check")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "Leave --graph out" in done.stderr

    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps(arm.to_json({"floor": first}, emulator.environment() | {"qemu": "6.0"})))
    done = run(f"--baseline={baseline}", "--check")
    assert done.returncode == arm.OTHER_ENVIRONMENT
    assert "cannot be compared" in done.stderr


@pytest.mark.slow
def test_a_graph_that_the_runtime_refuses_is_a_row_and_others_are_refused(toolchain: Path, tmp_path: Path) -> None:
    import tensorflow as tf

    def converted(*shapes: tuple[int, ...]) -> bytes:
        @tf.function(input_signature=[tf.TensorSpec(shape) for shape in shapes])
        def product(*values: tf.Tensor) -> tf.Tensor:
            return tf.matmul(values[0], tf.nn.sigmoid(values[-1]), transpose_a=True)

        converter = tf.lite.TFLiteConverter.from_concrete_functions([product.get_concrete_function()], product)
        return bytes(converter.convert())

    # XNNPACK (ai-edge-litert 2.3) has no float16 BATCH_MATMUL with a transposed first operand.
    path = tmp_path / "product.tflite"
    path.write_bytes(emulator.with_float16(converted((1, 3, 24, 32))))
    found = emulator.count(path, inferences=1)
    assert found.instructions is None
    assert "failed to prepare" in str(found.error)

    path.write_bytes(converted((1, 3, 24, 32), (1, 3, 24, 32)))
    with pytest.raises(UserError, match="takes one input of a fixed shape"):
        emulator.count(path, inferences=1)
    path.write_bytes(b"no model")
    with pytest.raises(UserError):
        emulator.count(path, inferences=1)
    with pytest.raises(UserError, match=r"Run tools/arm/setup\.sh"):
        emulator.environment(tmp_path)


@pytest.mark.slow
def test_no_block_costs_more_than_the_committed_baseline(toolchain: Path, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/arm.py", "--check", "--inferences=1", f"--output_dir={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(arm.ROOT)}
    done = subprocess.run(command, cwd=arm.ROOT, capture_output=True, text=True, env=environment)
    if done.returncode == arm.OTHER_ENVIRONMENT:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "arm.json").read_text())["graphs"]
    runs = {name for name, row in rows.items() if row["error"] is None}
    assert {"mobile_d8/float16", "mobile_d4/float16", "softmax_d64/float16"} <= runs  # no adj_x in what we export

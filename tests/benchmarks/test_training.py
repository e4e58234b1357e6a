"""benchmarks/training.py: ratios, a real run against PyTorch, and docs/accuracy.md, which shows its results."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import training, training_report, training_worker
from tflite.measurements import Measurement

RESULTS = json.loads(training_report.RESULTS.read_text())
SETTINGS = {"image_size": 32, "batch_size": 2, "head_dim": 8, "num_threads": 1, "precisions": ["float32"]}


def row(program: str, rounds: list[list[float]], multiply_adds: int | None = None) -> training.Row:
    measurement = Measurement(0, program, 1, 0.0, 9.0, baseline_bytes=10**8, peak_bytes=3 * 10**8, rounds=rounds)
    return training.Row(program, "float32", measurement, {}, 1e-6, multiply_adds, 1.0, 1.0, [6.9, 6.8])


@given(
    drift=st.lists(st.floats(0.5, 4), min_size=1, max_size=9),
    ours=st.floats(0.05, 20),
    peak=st.floats(0.01, 1),
    batch_size=st.integers(1, 64),
)
def test_ratios_are_free_of_the_machines_drift(drift: list[float], ours: float, peak: float, batch_size: int) -> None:
    """A machine that slows down between rounds changes images per second, and neither speed nor floor."""
    rows = [
        row("ours", [[pace * ours] * 3 for pace in drift]),
        row("pytorch", [[pace] * 3 for pace in drift]),
        row("peak", [[pace * peak] * 3 for pace in drift], 1000),
    ]
    found = [training._to_json(one, rows, 5000, batch_size) for one in rows]
    for value in found[0]["speed"].values():
        assert math.isclose(value, 1 / ours)
    assert found[1]["speed"] == {"median": 1, "min": 1, "max": 1}
    assert math.isclose(found[0]["to_floor"], ours / (5 * peak))  # five times the peak's multiply-adds in a step
    assert math.isclose(found[0]["images_per_second"] * found[0]["step_seconds"], batch_size)


def test_the_table_has_what_was_measured_and_what_was_not() -> None:
    rows = [row("pytorch", [[2.0], [2.0]]), row("ours", [[1.0], [0.5]]), row("peak", [[0.1], [0.1]], 1000)]
    case: dict[str, Any] = {
        "model": "deit/tiny",
        "network": "mobile",
        "settings": SETTINGS,
        "rows": [training._to_json(one, rows, 5000, 2) for one in rows],
        "skipped": [{"program": "pytorch_compile", "precision": "float32", "reason": "no compiler"}],
    }
    assert training_report.table({"cases": {"deit/tiny mobile": case}}).splitlines()[2:] == [
        "| deit/tiny, mobile | float32 | this project | 2.7 | 3.00 (2.00 to 4.00) | 1.5 | 300 (100) | 9.0 |",
        "| deit/tiny, mobile | float32 | PyTorch | 1.0 | 1.00 (1.00 to 1.00) | 4.0 | 300 (100) | 9.0 |",
        "",
        "- not measured: deit/tiny, mobile, PyTorch, torch.compile, float32: no compiler",
    ]


def test_the_reason_of_a_failure_is_the_telling_line() -> None:
    message = (
        'Graph execution error:\n\nDetected at node x defined at:\n  File "a.py", line 7, in b\n\nmixed precision\n'
    )
    assert training_worker.reason(RuntimeError(message + "\t [[{{node x}}]] [Op:y]")) == "mixed precision"
    assert training_worker.reason(ValueError("no place")) == "no place"
    assert training_worker.reason(ValueError()) == "ValueError()"


@pytest.mark.slow
def test_a_real_step_is_measured_in_both_frameworks(tmp_path: Path) -> None:
    """Equal logits before the first step, a loss that falls, and a second call that measures nothing again."""
    command = [
        *(sys.executable, str(training.ROOT / "benchmarks" / "training.py"), "--quick", "--models=deit/tiny"),
        *("--networks=mobile", "--programs=ours,pytorch", "--precisions=float32", f"--output_dir={tmp_path}"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(training.ROOT)}
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    results = json.loads((tmp_path / "training.json").read_text())
    case = results["cases"]["deit/tiny mobile"]
    rows = {one["program"]: one for one in case["rows"]}
    assert set(rows) == {"ours", "pytorch", "peak"}, case["skipped"]
    for program in ("ours", "pytorch"):
        assert rows[program]["difference"] < 1e-4
        assert rows[program]["last_loss"] < 6  # ln(1000) = 6.9 before the first step
        assert rows[program]["peak_bytes"] > rows[program]["baseline_bytes"] + 4 * 4 * case["parameters"]
    assert training_report.table(results) in said
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    again = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert "measured before" in again
    assert json.loads((tmp_path / "training.json").read_text()) == results


@pytest.mark.slow
def test_a_peer_with_other_logits_is_not_timed(tmp_path: Path) -> None:
    """PyTorch's softmax host is given where Mobile-Attention is expected."""
    from benchmarks.training_worker import build_keras
    from mobiatt_tf.interop import save_pytorch

    softmax = {"family": "deit", "variant": "tiny", "image_size": 32, "head_dim": None}
    model = build_keras(**softmax)
    save_pytorch(model, tmp_path / "weights.safetensors")
    settings = SETTINGS | {"programs": ["pytorch"], "rounds": 1, "steps": 1}
    wrong = training.reference_logits(build_keras(**(softmax | {"head_dim": 8})), 32)
    rows, skipped = training._measure(softmax, str(tmp_path / "weights.safetensors"), wrong, settings)
    assert [one.program for one in rows] == ["peak"]
    assert "its logits differ" in skipped[0]["reason"]
    right = training.reference_logits(model, 32)
    rows, skipped = training._measure(softmax, str(tmp_path / "weights.safetensors"), right, settings)
    assert [one.program for one in rows] == ["pytorch", "peak"]
    assert not skipped


def test_the_document_has_the_table_of_the_results() -> None:
    assert f"\n{training_report.table(RESULTS)}\n" in training_report.DOCUMENT.read_text()


def test_the_results_are_of_every_family_and_say_where_they_were_measured() -> None:
    assert {name.split("/")[0] for name in RESULTS["cases"]} == {"deit", "pvt_v2", "efficientformer_v2"}
    for case in RESULTS["cases"].values():
        assert case["device"]["cpu"]
        rows = {(one["program"], one["precision"]): one for one in case["rows"]}
        for precision in training.PRECISIONS:
            for program in ("ours", "pytorch"):
                assert rows[program, precision]["difference"] < training.TOLERANCES[precision]

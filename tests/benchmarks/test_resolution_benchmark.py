"""benchmarks/resolution.py: ratios, tables, the limit of memory, and a real run on small models."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import resolution, resolution_report, resolution_worker
from mobiatt_tf.errors import UserError
from mobiatt_tf.layers import MobileAttention
from tflite.measurements import Measurement
from tflite.process import Worker

SETTINGS = {"num_threads": 1, "rounds": 3, "seconds": 0.1, "memory_gigabytes": 8.0}


def measurement(name: str, rounds: list[list[float]], megabytes: int = 100) -> Measurement:
    return Measurement(0, name, 1, 0, 0.5, baseline_bytes=10**8, peak_bytes=(100 + megabytes) * 10**6, rounds=rounds)


def figures(rows: dict[str, list[float]], failures: dict[str, str] | None = None) -> dict[str, Any]:
    """Rows of a case as the JSON has them: seconds of each round by name, and failures."""
    measured = {name: measurement(name, [[second] for second in seconds]) for name, seconds in rows.items()}
    return {name: resolution.to_json(name, found, None, measured) for name, found in measured.items()} | {
        name: {"failure": reason} for name, reason in (failures or {}).items()
    }


def case(tokens: int, phase: str, rows: dict[str, Any]) -> dict[str, Any]:
    side = 4 * int(tokens**0.5)
    return {
        "subject": "pvt_v2/b0/backbone",
        "image_size": [side, side],
        "tokens": tokens,
        "phase": phase,
        "settings": SETTINGS,
        "device": {"cpu": "a processor", "ai_edge_litert": "2"},
        "rows": rows,
    }


@given(drift=st.lists(st.floats(0.5, 4), min_size=1, max_size=9), mobile=st.floats(0.05, 20), floor=st.floats(0.01, 1))
def test_ratios_are_free_of_the_machines_drift(drift: list[float], mobile: float, floor: float) -> None:
    rows = figures(
        {"mobile": [pace * mobile for pace in drift], "softmax": drift, "floor": [pace * floor for pace in drift]}
    )
    assert rows["mobile"]["to_softmax"]["median"] == pytest.approx(mobile)
    assert rows["mobile"]["to_softmax"]["min"] == pytest.approx(rows["mobile"]["to_softmax"]["max"])
    assert rows["mobile"]["to_floor"]["median"] == pytest.approx(mobile / floor)
    assert "to_softmax" not in rows["softmax"]


def test_the_table_says_what_did_not_fit(tmp_path: Path) -> None:
    whole = case(3136, "tflite", figures({"mobile": [0.02, 0.02], "softmax": [0.04, 0.05], "floor": [0.01, 0.01]}))
    failed = case(16384, "training", figures({"mobile": [2.0]}, {"softmax": "out of memory: more than 8 GB"}))
    results = {"cases": {"a": whole, "b": failed}}
    assert resolution_report.table(results).splitlines()[2:] == [
        "| pvt_v2/b0/backbone | 224 x 224 | 3,136 | TFLite | 100, 0.02 | 100, 0.045 | 0.45 (0.40 to 0.50) | 2.00 |",
        "| pvt_v2/b0/backbone | 512 x 512 | 16,384 | training step | 100, 2 | out of memory |  |  |",
        "",
        "- pvt_v2/b0/backbone, 512 x 512, training step, softmax: out of memory: more than 8 GB",
    ]
    resolution_report.draw(results, tmp_path / "resolution.png")
    assert (tmp_path / "resolution.png").read_bytes().startswith(b"\x89PNG")


def test_a_process_that_takes_too_much_is_ended_and_its_row_says_so() -> None:
    """A real process: TensorFlow alone takes several times the 100 MB that it may."""
    request = {"subject": "pvt_v2/quickstart/backbone", "image_size": [32, 32], "attention": "mobile", "num_threads": 1}
    with Worker("mobile", module="benchmarks.resolution_worker", path=[str(resolution.ROOT)]) as worker:
        worker.request("peak")
        most = resolution._resident_bytes(worker.pid) + 10**8
        with resolution.MemoryLimit(worker.pid, most) as limit:
            row = resolution.Row("mobile", worker, limit, measurement("mobile", []))
            row.attempt(lambda: worker.request("load_dense", **request), most)
            assert limit.exceeded
    assert row.failure is not None
    assert row.failure == f"out of memory: more than {most / 1e9:.3g} GB"


def test_another_failure_keeps_its_reason() -> None:
    most, path = 10**12, [str(resolution.ROOT)]
    with (
        Worker("mobile", module="tflite.worker", path=path) as worker,
        resolution.MemoryLimit(worker.pid, most) as limit,
    ):
        row = resolution.Row("mobile", worker, limit, measurement("mobile", []))
        row.attempt(lambda: worker.request("invoke", unrecorded=0, recorded=1), most)
    assert row.failure == "load comes first"


def test_the_limit_ends_with_its_block() -> None:
    with Worker("x", module="tflite.worker", path=[str(resolution.ROOT)]) as worker:
        worker.request("peak")
        with resolution.MemoryLimit(worker.pid, 10**12) as limit:
            time.sleep(0.05)
        assert not limit.exceeded
        assert resolution._resident_bytes(worker.pid) > 10**6
    assert resolution._resident_bytes(worker.pid) == 0


@pytest.mark.parametrize("subject", ["pvt_v2/quickstart/backbone", "pvt_v2/quickstart/segmenter"])
def test_the_scale_is_that_of_the_trained_size(subject: str) -> None:
    model = resolution_worker.build(subject, (64, 96), "mobile")
    references = [layer.reference_tokens for layer in model.layers if isinstance(layer, MobileAttention)]
    assert references == [256, 64, 16, 4]  # of 32 x 32 pixels with strides 2, 4, 8, 16
    assert resolution.tokens_of(subject, (64, 96)) == 32 * 48


def test_a_backbone_ends_in_one_output() -> None:
    model = resolution_worker.with_one_output(resolution_worker.build("pvt_v2/quickstart/backbone", (32, 32), "mobile"))
    assert model.output_shape == (None, 16 + 32 + 48 + 64)
    deit = resolution_worker.with_one_output(resolution_worker.build("deit/quickstart/backbone", (28, 28), "softmax"))
    assert len(deit.output_shape) == 2
    assert np.isfinite(deit.predict_on_batch(np.ones((1, 28, 28, 3), "float32"))).all()


def test_cases_go_curve_by_curve_from_small_to_large() -> None:
    found = list(resolution.cases(["a/b/backbone"], ["224", "800x1344"], ["tflite", "training"]))
    assert [key for key, *_ in found] == [
        "a/b/backbone 224x224 tflite",
        "a/b/backbone 800x1344 tflite",
        "a/b/backbone 224x224 training",
        "a/b/backbone 800x1344 training",
    ]
    with pytest.raises(UserError, match="224x is not a size"):
        list(resolution.cases(["a/b/backbone"], ["224x"], ["tflite"]))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/resolution.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(resolution.ROOT)}
    return subprocess.run(command, cwd=resolution.ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_a_small_backbone_is_measured_in_both_phases_and_not_twice(tmp_path: Path) -> None:
    arguments = (
        "--subjects=pvt_v2/quickstart/backbone",
        "--image_sizes=32",
        "--num_threads=1",
        "--rounds=2",
        "--seconds=0",
        f"--output_dir={tmp_path}",
    )
    first = run(*arguments)
    assert first.returncode == 0, first.stderr
    cases = json.loads((tmp_path / "resolution.json").read_text())["cases"]
    assert [(one["phase"], list(one["rows"])) for one in cases.values()] == [
        ("tflite", ["mobile", "softmax", "floor"]),
        ("training", ["mobile", "softmax"]),
    ]
    for one in cases.values():
        for row in one["rows"].values():
            assert row["failure"] is None
            assert row["median_seconds"] > 0
            assert row["process_bytes"] > row["peak_bytes"] > 0
            assert row["rounds"] == 3
        assert one["tokens"] == 256
    assert cases["pvt_v2/quickstart/backbone 32x32 tflite"]["rows"]["mobile"]["to_floor"]["median"] > 1
    assert (tmp_path / "resolution.png").is_file()
    before = (tmp_path / "resolution.json").read_bytes()
    second = run(*arguments)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "resolution.json").read_bytes() == before


@pytest.mark.slow
def test_a_case_in_which_nothing_fits_into_memory_is_recorded() -> None:
    settings = {"num_threads": 1, "rounds": 2, "seconds": 0.0, "memory_gigabytes": 0.02}  # LiteRT alone has more
    found = resolution.case("pvt_v2/quickstart/backbone", (32, 32), "tflite", settings)
    assert found["rows"].keys() == {"mobile", "softmax", "floor"}
    assert {row["failure"] for row in found["rows"].values()} == {"out of memory: more than 0.02 GB"}
    assert resolution_report.table({"cases": {"": found}}).count("out of memory") == 2 + 3  # cells, and why below


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--subjects=resnet/50/backbone", "--subjects=resnet/50/backbone is not possible. Choose from pvt_v2/b0/backb"),
        ("--image_sizes=33", "multiple"),
    ],
)
def test_wrong_flags_are_refused(argument: str, message: str, tmp_path: Path) -> None:
    result = run("--subjects=pvt_v2/quickstart/backbone", argument, f"--output_dir={tmp_path}")
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]

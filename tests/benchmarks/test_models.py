"""Reports of whole models: ratios, tables and pictures, and a real run of our own rows."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.peers import measurement, report
from benchmarks.peers.programs import Variant
from tflite.measurements import Measurement

ROOT = Path(__file__).resolve().parents[2]
OURS = Variant("ours", "mobile d=8", "float32")
OUR_SOFTMAX = Variant("ours", "softmax", "float32")
THEIR_SOFTMAX = Variant("litert_torch", "softmax", "float32")


def row(variant: Variant, rounds: list[list[float]], threads: int = 1) -> measurement.Row:
    wall = sum(map(sum, rounds))
    return measurement.Row(
        variant, Measurement(0, str(variant), threads, 0.1, 0.1, rounds=rounds), 1e-6, {}, threads * wall, wall
    )


@given(
    drift=st.lists(st.floats(0.5, 4), min_size=1, max_size=9),
    factor=st.floats(0.05, 20),
    threads=st.integers(1, 4),
)
def test_ratios_are_free_of_the_machines_drift(drift: list[float], factor: float, threads: int) -> None:
    """A machine that slows down between rounds changes latencies, and no ratio."""
    rows = [
        row(variant, [[pace * speed] * 3 for pace in drift], threads)
        for variant, speed in ((OURS, factor), (OUR_SOFTMAX, 2.0), (THEIR_SOFTMAX, 1.0))
    ]
    ours, our_softmax, their_softmax = measurement.to_json(rows)
    assert ours["ratio"]["median"] == pytest.approx(factor)
    assert ours["ratio"]["min"] == pytest.approx(ours["ratio"]["max"])
    assert our_softmax["ratio"]["median"] == pytest.approx(2)
    assert their_softmax["ratio"]["median"] == pytest.approx(1)
    assert ours["cpu_per_wall"] == pytest.approx(threads)
    without_peers = measurement.to_json(rows[:2])
    assert without_peers[0]["ratio"]["median"] == pytest.approx(factor / 2)


def test_the_reference_has_as_many_threads() -> None:
    rows = [row(OUR_SOFTMAX, [[1.0]], 1), row(OUR_SOFTMAX, [[0.5]], 2), row(OURS, [[0.4]], 2)]
    assert [value["ratio"]["median"] for value in measurement.to_json(rows)] == [1, 1, 0.8]
    assert measurement.to_json([row(OURS, [[0.4]])])[0]["ratio"] is None


def case(rows: list[measurement.Row], threads: list[int], skipped: Any = ()) -> dict[str, Any]:
    return {
        "model": "deit/tiny",
        "image_size": 224,
        "settings": {"num_threads": threads, "runs": 3},
        "device": {"cpu": "a processor"},
        "rows": measurement.to_json(rows),
        "skipped": list(skipped),
    }


def test_the_table_has_a_line_for_each_program_and_format_and_names_what_is_missing(tmp_path: Path) -> None:
    floor = Variant("floor", "floor", "float32")
    rows = [row(v, [[s]], n) for n in (1, 2) for v, s in ((OUR_SOFTMAX, 0.02), (OURS, 0.017), (floor, 0.01))]
    skipped = {"program": "executorch", "network": "mobile d=8", "format": "int8", "reason": "it has cycles"}
    found = case(rows, [1, 2], [{**skipped, "num_threads": None}, {**skipped, "num_threads": 2}])
    text = report.table(found)
    assert "| program | format | softmax, 1 thread | mobile d=8, 1 thread | softmax, 2 threads |" in text
    line = "| mobiatt_tf (LiteRT) | float32 | 1.000 (20.0; 1.00) | 0.850 (17.0; 1.00) | 1.000 (20.0; 2.00) |"
    assert line in text
    assert "| its matrix products alone (LiteRT) | float32 |  | 0.500 (10.0; 1.00) |  | 0.500 (10.0; 2.00) |" in text
    assert "relative to mobiatt_tf (LiteRT), softmax, float32" in text
    assert text.endswith(
        "- not measured: executorch (XNNPACK), mobile d=8, int8: it has cycles\n"
        "- not measured: executorch (XNNPACK), mobile d=8, int8, 2 threads: it has cycles"
    )
    report.draw([found, found], tmp_path / "models.png")
    assert (tmp_path / "models.png").read_bytes().startswith(b"\x89PNG")


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/models.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_our_rows_alone(tmp_path: Path) -> None:
    arguments = (
        "--models=deit/quickstart",
        "--image_sizes=28",
        "--num_threads=1",
        "--runs=4",
        "--peers=none",
        f"--output_dir={tmp_path}",
    )
    first = run(*arguments)
    assert first.returncode == 0, first.stderr
    (found,) = json.loads((tmp_path / "models.json").read_text())["cases"].values()
    assert [(row["program"], row["network"], row["format"]) for row in found["rows"]] == [
        ("ours", "softmax", "float32"),
        ("ours", "softmax", "dynamic"),
        ("ours", "softmax", "int8"),
        ("ours", "mobile d=8", "float32"),
        ("ours", "mobile d=8", "dynamic"),
        ("ours", "mobile d=8", "int8"),
        ("floor", "floor", "float32"),
        ("floor", "floor", "dynamic"),
    ]
    assert found["skipped"] == []
    for values in found["rows"]:
        assert values["median_seconds"] > 0
        assert values["ratio"]["min"] <= values["ratio"]["median"] <= values["ratio"]["max"]
        assert values["versions"]["ai-edge-litert"]
        assert (values["difference"] is None) == (values["program"] == "floor")
    assert found["rows"][0]["difference"] < 1e-4
    assert "| mobiatt_tf (LiteRT) | float32 | 1.000 (" in first.stdout
    assert (tmp_path / "models.png").is_file()
    second = run(*arguments)
    assert "measured before" in second.stdout
    assert second.stdout.count("| mobiatt_tf (LiteRT) | float32 |") == 1


@pytest.mark.slow
def test_a_peer_that_cannot_be_installed_is_left_out_with_its_reason(tmp_path: Path) -> None:
    """pip, told to look in no index, finds nothing."""
    result = run(
        "--models=deit/quickstart",
        "--image_sizes=28",
        "--num_threads=1",
        "--formats=float32",
        "--runs=1",
        "--peers=torch",
        f"--output_dir={tmp_path / 'out'}",
        f"--environments={tmp_path / 'peers'}",
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS="",
    )
    assert result.returncode == 0, result.stderr
    (found,) = json.loads((tmp_path / "out" / "models.json").read_text())["cases"].values()
    assert {row["program"] for row in found["rows"]} == {"ours", "floor"}
    programs, networks = ("torch_eager", "torch_compile", "torch_frozen"), ("softmax", "mobile d=8")
    missing = {(one["program"], one["network"]) for one in found["skipped"]}
    assert missing == set(itertools.product(programs, networks))
    for one in found["skipped"]:
        assert "requirements-pytorch.txt cannot be installed: ERROR: No matching distribution found" in one["reason"]
    assert "- not measured: PyTorch eager, softmax, float32: requirements-pytorch.txt cannot" in result.stdout


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--models=resnet/50", "--models=resnet/50 is not possible. Choose from deit/tiny"),
        ("--peers=torch,none", "Choose from litert_torch, torch, onnxruntime, executorch"),
        ("--num_threads=0", "--num_threads=0 is not a list of numbers"),
    ],
)
def test_wrong_flags_are_refused(argument: str, message: str, tmp_path: Path) -> None:
    result = run(argument, f"--output_dir={tmp_path}")
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]

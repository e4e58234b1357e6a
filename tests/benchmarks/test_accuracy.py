"""The sweep of benchmarks/accuracy.py: its statistics, its resuming, and docs/accuracy.md, which shows its results."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks import accuracy, accuracy_report
from benchmarks.accuracy_run import BUDGETS
from mobiatt_tf.errors import UserError

RESULTS = json.loads(accuracy_report.RESULTS.read_text())
TINY = {"epochs": 1, "limit_train": 128, "limit_test": 50}


def results(network: str, top1: float, dataset: str = "digits", **recipe: Any) -> dict[str, Any]:
    """As results.json has it, with the fields that the sweep reads."""
    attention, _, head_dim = network.partition("_d")
    return {
        "epochs": 2,
        "top1": top1,
        "loss": 1 - top1,
        "train_seconds": 1.0,
        "recipe": {**BUDGETS[dataset], "seed": 0, **recipe},
        "dataset": {"name": dataset, "train_images": 1442, "test_images": 355},
        "model": {
            "family": "deit",
            "variant": "quickstart",
            "input_shape": [35, 35, 3],
            "attention": attention,
            "head_dim": int(head_dim),
            "parameters": 140_000,
        },
        "device": "a processor",
        "cpu_threads": 1,
        "versions": {"tensorflow": "2", "keras": "3"},
    }


@given(st.lists(st.floats(0, 1), min_size=2, max_size=10))
def test_spread_is_students(values: list[float]) -> None:
    found = accuracy_report.spread(values)
    error = stats.sem(values)
    assert math.isclose(found["mean"], np.mean(values), abs_tol=1e-12)
    assert math.isclose(found["deviation"], np.std(values, ddof=1), abs_tol=1e-12)
    assert math.isclose(found["interval95"], stats.t.ppf(0.975, len(values) - 1) * error, rel_tol=1e-3, abs_tol=1e-12)


def test_one_seed_has_no_deviation() -> None:
    assert accuracy_report.spread([0.5]) == {"mean": 0.5, "deviation": None, "interval95": None}


def test_networks_are_compared_over_the_seeds_that_both_have() -> None:
    runs = {
        ("digits", "softmax_d16", 0): results("softmax_d16", 0.80),
        ("digits", "softmax_d16", 1): results("softmax_d16", 0.90),
        ("digits", "mobile_d4", 1): results("mobile_d4", 0.93),
        ("digits", "mobile_d4", 0): results("mobile_d4", 0.82),
        ("digits", "mobile_d4", 2): results("mobile_d4", 0.10),
        ("digits", "mobile_d2", 2): results("mobile_d2", 0.10),
    }
    summary = accuracy_report.summarize(runs)
    networks = summary["datasets"]["digits"]["networks"]
    assert math.isclose(networks["mobile_d4"]["to_softmax"]["mean"], 0.025)
    assert math.isclose(networks["mobile_d4"]["to_softmax"]["deviation"], 0.01 / 2**0.5)
    assert networks["mobile_d2"]["to_softmax"] is None
    table = accuracy_report.table(summary, "digits")
    assert "| softmax | 16 | 85.00 ± 7.07 | 80.00, 90.00 |  | 0.150 ± 0.071 |" in table
    assert "| Mobile-Attention | 4 | 61.67 ± 45.08 | 82.00, 93.00, 10.00 | +2.50 (-3.85 to +8.85) |" in table
    assert json.loads(json.dumps(summary)) == summary


def test_an_interval_without_zero_is_bold() -> None:
    runs = {("digits", "softmax_d16", seed): results("softmax_d16", 0.8 + seed / 100) for seed in range(3)}
    runs |= {("digits", "linear_d2", seed): results("linear_d2", 0.7 + seed / 99) for seed in range(3)}
    assert "**-9.99 (-10.01 to -9.96)**" in accuracy_report.table(accuracy_report.summarize(runs), "digits")


def test_a_sweep_that_is_cut_short_compares_equals() -> None:
    """Every dataset and network of the issue has its first seed before any has its second; the extra one comes last."""
    runs = accuracy.planned(accuracy.DATASETS, accuracy.NETWORKS, 3)
    assert len(runs) == len(set(runs)) == 48
    asked = {("softmax", 16), ("linear", 16), *(("mobile", head_dim) for head_dim in (32, 16, 8, 4, 2))}
    assert {(run.attention, run.head_dim) for run in runs[:42]} == asked
    assert [run.seed for run in runs[:42]] == sorted(run.seed for run in runs[:42])
    assert {(run.attention, run.head_dim) for run in runs[42:]} == {("linear", 2)}


def test_finished_runs_are_read_and_those_of_another_budget_refused(tmp_path: Path) -> None:
    run = accuracy.Run("digits", "mobile", 4, 0)
    assert accuracy.finished(run, tmp_path, {}) is None
    run.directory(tmp_path).mkdir(parents=True)
    file = run.directory(tmp_path) / "results.json"
    file.write_text(json.dumps(results("mobile_d4", 0.5)))
    assert accuracy.finished(run, tmp_path, {}) == results("mobile_d4", 0.5)
    assert accuracy.finished(run, tmp_path, {"limit_train": 1442}) is not None
    for other in ({"epochs": 3}, {"batch_size": 64}, {"limit_train": 100}):
        with pytest.raises(UserError, match="another --output_dir"):
            accuracy.finished(run, tmp_path, other)
    file.write_text(json.dumps(results("mobile_d4", 0.5) | {"epochs": 1}))  # evaluated on the way
    assert accuracy.finished(run, tmp_path, {}) is None


@pytest.mark.slow
def test_a_sweep_is_stopped_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    """Two real networks on real digits; Ctrl-C in the middle of the first."""
    arguments = ["--datasets=digits", "--networks=linear_d16,mobile_d32", "--seeds=1", "--epochs=2"]
    limits = ["--limit_train=1280", "--limit_test=50", "--batch_size=8", f"--output_dir={tmp_path}"]
    command = [sys.executable, str(accuracy.ROOT / "benchmarks" / "accuracy.py"), *arguments, *limits]
    environment = {**os.environ, "PYTHONPATH": str(accuracy.ROOT)}
    first, second = accuracy.planned(["digits"], [("linear", 16), ("mobile", 32)], 1)
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as stopped:
        while accuracy.steps_done(first, tmp_path) == 0:
            assert stopped.poll() is None
            time.sleep(0.1)
        stopped.send_signal(signal.SIGINT)
        _, said = stopped.communicate()
    assert stopped.returncode == 130, said
    assert "saved at step" in accuracy.said_by(first, tmp_path).read_text()
    overrides = {"epochs": 2, "limit_train": 1280, "limit_test": 50, "batch_size": 8}
    assert accuracy.finished(first, tmp_path, overrides) is None

    accuracy.sweep([first, second], tmp_path, overrides, workers=2, threads=1)
    lines = (first.directory(tmp_path) / "log.jsonl").read_text().splitlines()
    steps = [line["step"] for line in map(json.loads, lines) if line["kind"] == "train"]
    assert steps == sorted(set(steps))
    assert steps[-1] == accuracy.total_steps(first, overrides) == 320

    processes = {run: accuracy.said_by(run, tmp_path).stat().st_mtime_ns for run in (first, second)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert {run: accuracy.said_by(run, tmp_path).stat().st_mtime_ns for run in (first, second)} == processes
    summary = json.loads((tmp_path / "accuracy.json").read_text())
    assert accuracy_report.table(summary, "digits") in done.stdout
    networks = summary["datasets"]["digits"]["networks"]
    assert networks["linear_d16"]["parameters"] == networks["mobile_d32"]["parameters"]
    for run in (first, second):
        found = json.loads((run.directory(tmp_path) / "results.json").read_text())
        assert networks[run.network]["seeds"]["0"]["top1"] == found["top1"]
        assert found["images"] == 50
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_the_document_has_the_tables_of_the_results() -> None:
    text = accuracy_report.DOCUMENT.read_text()
    for dataset in RESULTS["datasets"]:
        assert f"\n{accuracy_report.table(RESULTS, dataset)}\n" in text


@pytest.mark.parametrize(("dataset", "images"), [("fashion_mnist", (60_000, 10_000)), ("mnist_sample", (4_000, 1_000))])
def test_all_that_was_asked_for_was_run(dataset: str, images: tuple[int, int]) -> None:
    """All networks with three seeds, whole datasets, one budget and one number of parameters."""
    about = RESULTS["datasets"][dataset]
    assert (about["data"]["train_images"], about["data"]["test_images"]) == images
    assert about["recipe"].items() >= BUDGETS[dataset].items()
    for attention, head_dim in accuracy.NETWORKS:
        row = about["networks"][f"{attention}_d{head_dim}"]
        assert set(row["seeds"]) == {"0", "1", "2"}
    assert len({row["parameters"] for row in about["networks"].values()}) == 1
    assert RESULTS["device"]
    assert RESULTS["versions"]["tensorflow"]


@pytest.mark.parametrize("dataset", accuracy.DATASETS)
def test_the_documents_statements(dataset: str) -> None:
    networks = RESULTS["datasets"][dataset]["networks"]
    mobile = {row["head_dim"]: row for row in networks.values() if row["attention"] == "mobile"}
    softmax = networks["softmax_d16"]["seeds"]
    for row in mobile.values():  # behind softmax with every seed
        assert all(values["top1"] < softmax[seed]["top1"] for seed, values in row["seeds"].items())
    widest = mobile[32]["top1"]["mean"]
    assert all(row["top1"]["mean"] > widest for head_dim, row in mobile.items() if head_dim < 32)
    linear, narrow = networks["linear_d16"]["top1"]["mean"], networks["linear_d2"]
    assert narrow["top1"]["mean"] > linear
    assert all(values["top1"] > mobile[2]["seeds"][seed]["top1"] for seed, values in narrow["seeds"].items())

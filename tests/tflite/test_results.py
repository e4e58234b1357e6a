"""The JSON of a benchmark: the way there and back, refusals, the export's part, pooled rounds, results side by side."""

import dataclasses
import json
import statistics
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from mobiatt_tf import files
from mobiatt_tf.errors import UserError
from tflite import results, summary
from tflite.beside import format_beside, pairs
from tflite.host import HostDevice
from tflite.inspect import describe
from tflite.measurements import Delegation, Measurement, Measurements, Plan, Statistics, pooled, summarize


@pytest.fixture(scope="module")
def found(tflite_files: dict[str, Path]) -> Measurements:
    graphs = (tflite_files["float"], tflite_files["power"])
    return HostDevice().run(Plan(graphs, num_threads=(1, 2), runs=4, warmup=1, runs_per_round=2, profile_runs=2))


def on_a_phone(found: Measurements, factor: float = 10.0) -> Measurements:
    """The same graphs as a phone would report them: summaries of rounds, its own delegation."""
    measured = [
        dataclasses.replace(
            one,
            rounds=[],
            round_statistics=[
                Statistics(2, factor * min(round), None, None, factor * statistics.fmean(round), 1e-6)
                for round in one.rounds
            ],
            profile=None,
            delegation=Delegation("TfLiteXNNPackDelegate", 26, 26, 1),
        )
        for one in found.measurements
    ]
    device = {"kind": "adb", "name": "a phone", "runtime": "native", "date": "2026-01-01", "headline": ["a phone"]}
    return dataclasses.replace(found, device=device, measurements=measured, warnings=["battery at 15 %"])


def test_what_is_written_is_read_back(found: Measurements, tmp_path: Path) -> None:
    for number, value in enumerate((found, on_a_phone(found))):
        path = tmp_path / f"{number}.json"
        files.write_json(path, results.to_json(value))
        assert results.load(path) == value
        assert json.loads(json.dumps(results.to_json(results.load(path)))) == json.loads(path.read_text())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no file"),
        ("{", "not valid JSON"),
        ("[]", "not the result of a benchmark"),
        ('{"kind": "another"}', "not the result of a benchmark"),
        ('{"kind": "mobiatt-tf benchmark", "version": 3}', "has version 3"),
        ('{"device": {}, "plan": {}, "measurements": []}', "has version 1"),
        ('{"kind": "mobiatt-tf benchmark", "version": 2}', "is damaged: KeyError 'plan'"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "given.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        results.load(path)
    assert "given.json" in str(caught.value)


@pytest.mark.parametrize("key", ["device", "graphs", "measurements", "warnings", "exports", "interrupted", "failure"])
def test_a_part_that_is_missing_is_damage(found: Measurements, tmp_path: Path, key: str) -> None:
    value = results.to_json(found)
    del value[key]
    files.write_json(tmp_path / "a.json", value)
    with pytest.raises(UserError, match=f"damaged: KeyError '{key}'"):
        results.load(tmp_path / "a.json")


def test_a_measurement_of_no_graph_is_damage(found: Measurements, tmp_path: Path) -> None:
    value = results.to_json(found)
    value["measurements"][0]["graph"] = 2
    files.write_json(tmp_path / "a.json", value)
    with pytest.raises(UserError, match="graph 2"):
        results.load(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("key", "value"), [("load_seconds", "soon"), ("load_seconds", float("nan")), ("rounds", [["1"]]), ("label", 3)]
)
def test_a_value_of_another_type_is_damage(found: Measurements, tmp_path: Path, key: str, value: object) -> None:
    content = results.to_json(found)
    content["measurements"][0][key] = value
    files.write_json(tmp_path / "a.json", content)
    with pytest.raises(UserError, match=r"a\.json is damaged"):
        results.load(tmp_path / "a.json")


def test_the_export_is_read_by_checksum(tflite_files: dict[str, Path], tmp_path: Path) -> None:
    graph = tmp_path / "graph.tflite"
    graph.write_bytes(tflite_files["float"].read_bytes())
    description = describe(graph)
    assert results.read_export(description) is None
    sidecar = {
        "sha256": description.sha256,
        "format": "float32",
        "tokens": [16],
        "verification": {"file_top1": 0.5, "images": 8},
    }
    files.write_json(graph.with_suffix(".json"), sidecar)
    assert results.read_export(description) == {"format": "float32", "tokens": [16], "top1": 0.5, "images": 8}
    files.write_json(graph.with_suffix(".json"), sidecar | {"sha256": "0" * 64})
    assert results.read_export(description) is None


@given(st.lists(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=8), min_size=1, max_size=6))
def test_pooled_rounds_are_all_runs_together(rounds: list[list[float]]) -> None:
    parts = [summarize(latencies) for latencies in rounds]
    whole = [latency for latencies in rounds for latency in latencies]
    found = pooled([part for part in parts if part])
    assert found is not None
    assert found.runs == len(whole)
    assert found.min == min(whole)
    assert found.mean == pytest.approx(np.mean(whole))
    expected = np.std(whole, ddof=1) if len(whole) > 1 else 0.0
    assert found.standard_deviation == pytest.approx(expected, abs=1e-7 * max(whole))
    assert found.median == pytest.approx(np.median([np.median(latencies) for latencies in rounds]))
    assert pooled([]) is None


def test_the_table_of_a_phone_says_what_it_does_not_know(found: Measurements, tmp_path: Path) -> None:
    phone = on_a_phone(found)
    table = summary.format_table(phone)
    assert table.startswith("a phone\nnote: battery at 15 %\n")
    assert "summary of each round" in table
    assert "26 of 26 nodes on the device's TfLiteXNNPackDelegate in 1 partition(s)" in table
    assert all(path.stat().st_size > 0 for path in summary.write(phone, tmp_path))


def test_a_name_is_no_formula(found: Measurements, tmp_path: Path) -> None:
    """Whoever holds a phone types its name; file names become labels."""
    labelled = [dataclasses.replace(one, label=f"a $\\frac$ {one.label}") for one in found.measurements]
    named = dataclasses.replace(found, device=found.device | {"name": "$x_$ y"}, measurements=labelled)
    assert summary.write(named, tmp_path)[1].read_bytes().startswith(b"\x89PNG")


def test_the_same_files_meet_by_checksum_threads_and_backend(found: Measurements) -> None:
    joined = pairs(on_a_phone(found), found)
    assert len(joined) == 4
    for pair in joined:
        assert pair.same_file
        assert pair.own.graph == pair.other.graph
        assert pair.own.num_threads == pair.other.num_threads
        mean = statistics.fmean(pair.other.latencies)
        assert pair.own.statistics is not None
        assert pair.own.statistics.typical == pytest.approx(10 * mean)
    table = format_beside(on_a_phone(found), found, "phone", "this computer")
    assert "a phone" in table
    assert found.device["cpu"] in table
    assert table.count("XNNPACK") >= 4


def test_another_file_of_the_same_name_is_marked(found: Measurements) -> None:
    changed = tuple(dataclasses.replace(one, sha256="0" * 64) for one in found.descriptions)
    table = format_beside(found, dataclasses.replace(found, descriptions=changed), "now", "old.json")
    assert table.count("(another file)") == 4
    assert "(another file)" not in format_beside(found, found, "now", "old.json")


def test_another_machine_and_an_interruption_are_said(found: Measurements) -> None:
    other = dataclasses.replace(found, device=found.device | {"name": "another"}, interrupted=True)
    table = format_beside(found, other, "now", "old.json")
    assert "another name: old.json has another" in table
    assert "old.json was interrupted" in table


@pytest.mark.parametrize("key", ["serial", "fingerprint", "governor", "taskset", "runtime"])
def test_what_a_phone_differs_in_is_said(found: Measurements, key: str) -> None:
    phone = on_a_phone(found)
    changed = dataclasses.replace(phone, device=phone.device | {key: "f0"})
    assert f"another {key}: old.json has " in format_beside(phone, changed, "now", "old.json")
    assert "another" not in format_beside(phone, phone, "now", "old.json")


def test_a_backend_that_the_other_lacks_meets_its_only_one(found: Measurements) -> None:
    wasm = dataclasses.replace(
        found, measurements=[dataclasses.replace(one, backend="WASM") for one in found.measurements]
    )
    assert [pair.other.backend for pair in pairs(wasm, found)] == ["XNNPACK"] * 4
    assert "WASM, XNNPACK" in format_beside(wasm, found, "browser", "host")
    gpu = [dataclasses.replace(one, backend="GPU") for one in found.measurements]
    both = dataclasses.replace(found, measurements=[*found.measurements, *gpu])
    assert pairs(wasm, both) == []  # which of the two is meant is not known
    assert "no graph" in format_beside(wasm, both, "browser", "host")


def test_ratios_stay_within_a_backend(found: Measurements) -> None:
    slow = [
        dataclasses.replace(one, backend="GPU", rounds=[[100 * latency for latency in r] for r in one.rounds])
        for one in found.measurements
    ]
    value = results.to_json(dataclasses.replace(found, measurements=[*found.measurements, *slow]))
    ratios = [one["ratio_to_first_graph"]["median"] for one in value["measurements"]]
    assert ratios[4:] == pytest.approx(ratios[:4])


def test_a_measurement_without_runs_has_no_statistics() -> None:
    assert Measurement(0, "a", 1, 0.0, 0.0).statistics is None
    assert Measurement(0, "a", 1, 0.0, 0.0).round_latencies == []

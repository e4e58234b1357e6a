"""The computer's side of a benchmark in a browser: what it copies, and what ends it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mobiatt_tf.errors import UserError
from mobiatt_tf.files import sha256
from tests.browser.test_protocol import measurement, posted
from tflite.browser import device, job
from tflite.measurements import Measurements, Plan


@pytest.fixture
def graph(graphs: dict[str, Path], tmp_path: Path) -> Path:
    """A file of its own, with the JSON of its export beside it."""
    file = tmp_path / "model.tflite"
    shutil.copy(graphs["float32"], file)
    file.with_suffix(".json").write_text(json.dumps({"sha256": sha256(file), "format": "float32"}))
    return file


@pytest.fixture
def prepared(graph: Path, tmp_path: Path) -> job.Job:
    (tmp_path / "job").mkdir()
    return job.prepare(Plan((graph,), runs=5, runs_per_round=3), tmp_path / "job", webgpu=False, stay=True)


def result(**phone: Any) -> dict[str, Any]:
    return {"phone": posted()["phone"] | phone, "entries": [{"graphs": [measurement()]}]}


def waited(prepared: job.Job, values: list[dict[str, Any]], **settings: Any) -> Measurements:
    """What the device returns after these posts, with --stay unless told otherwise."""
    made = device.Settings(**{"stay": True, **settings})
    inbox = device.Inbox(prepared, made.stay)
    for value in values:
        inbox.posts["result"].take(value)
    return device.BrowserDevice(made)._wait(prepared, inbox)


def test_with_stay_one_phone_s_failure_is_not_the_end(prepared: job.Job, capsys: pytest.CaptureFixture[str]) -> None:
    """One that can measure nothing, one that fails, one whose result cannot be written; Ctrl-C while one is written."""
    kept: list[str] = []

    def keep(found: Measurements) -> None:
        kept.append(found.device["name"])
        if len(kept) == 1:
            raise UserError("No space left while writing benchmark.json.")
        if len(kept) == 3:
            raise KeyboardInterrupt

    nothing = {"phone": posted()["phone"] | {"name": "iPhone"}, "entries": [{"skipped": "out of memory"}]}
    failure = {"phone": posted()["phone"] | {"name": "Pixel"}, "error": "the outputs are wrong"}
    values = [nothing, failure, *(result(name=f"Phone {number}") for number in range(3))]
    found = waited(prepared, values, keep=keep)
    assert kept == ["Phone 0", "Phone 1", "Phone 2"]
    assert found.device["name"] == "Phone 2"
    said = capsys.readouterr().err
    assert "iPhone measured nothing. WASM, 1 thread: out of memory\n" in said
    assert "Pixel: the outputs are wrong\n" in said
    assert "No space left while writing benchmark.json.\n" in said


def test_without_stay_it_is_the_end(prepared: job.Job) -> None:
    nothing = {"phone": posted()["phone"], "entries": [{"skipped": "out of memory"}]}
    with pytest.raises(UserError, match="measured nothing"):
        waited(prepared, [nothing], stay=False)
    assert waited(prepared, [result()], stay=False).device["name"] == "Pixel of a test"


def test_a_graph_and_its_export_are_those_of_the_start(graph: Path, graphs: dict[str, Path], prepared: job.Job) -> None:
    digest = sha256(graph)
    shutil.copyfile(graphs["other"], graph)
    graph.with_suffix(".json").unlink()
    served = prepared.files["models/0.tflite"].content
    assert isinstance(served, Path)
    assert sha256(served) == digest == prepared.descriptions[0].sha256
    assert waited(prepared, [result()], stay=False).exports == ({"format": "float32"},)


def test_a_graph_that_changes_while_it_is_read(
    graph: Path, graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = job.describe

    def slowly(path: Path, num_threads: int) -> Any:
        found = describe(path, num_threads)
        shutil.copyfile(graphs["other"], path)
        return found

    monkeypatch.setattr(job, "describe", slowly)
    (tmp_path / "job").mkdir()
    with pytest.raises(UserError, match=r"model\.tflite has changed while it was read\. Wait until it is written"):
        job.prepare(Plan((graph,)), tmp_path / "job")


def test_strays_beside_the_page_s_files_are_not_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = shutil.copytree(job._PAGE, tmp_path / "page")
    expected = sorted(job.page_files())
    for name in (".DS_Store", "app.js~", "._app.js", ".app.js.swp", "#app.js#", "notes", "app.js.orig"):
        (page / name).write_text("stray")
    (page / "folder.js").mkdir()
    monkeypatch.setattr(job, "_PAGE", page)
    assert sorted(job.page_files()) == expected
    assert {"", "app.js", "style.css", "index.html"} <= set(expected)


def test_two_results_of_one_second_have_a_directory_each(tmp_path: Path) -> None:
    told = {"name": "Pixel 6 (Anna)", "date": "2025-01-02T03:04:05+00:00"}
    made = [device.new_directory(tmp_path / "results", told) for _ in range(3)]
    assert [one.name for one in made] == [f"pixel-6-anna-20250102030405{end}" for end in ("", "-2", "-3")]
    assert all(one.is_dir() for one in made)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be made .*: give another --output_dir"):
        device.new_directory(tmp_path / "file", told)

"""What the report does with the files that it is given, and its command."""

import copy
import dataclasses
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mobiatt_tf import files
from mobiatt_tf.errors import UserError
from tests.tflite.report_results import evaluation, write_changed
from tflite.checking import check_values
from tflite.measurements import Measurements
from tflite.reporting import page
from tflite.reporting.collect import collect


def refused(paths: list[Path]) -> str:
    with pytest.raises(UserError) as caught:
        collect(paths)
    return str(caught.value)


def test_wrong_files_are_refused_by_name(measured: Measurements, paths: list[Path], tmp_path: Path) -> None:
    assert "No file is given" in refused([])
    host = paths[0]
    content = host.read_text()
    older = {key: value for key, value in json.loads(content).items() if key not in ("kind", "version")}
    cases: dict[str, tuple[str | bytes, str]] = {
        "empty": ("", "not valid JSON"),
        "truncated": (content[: len(content) // 2], "not valid JSON"),
        "binary": (b"TFL3\xff\xfe\x00", "not valid JSON"),
        "list": ("[1, 2]", "is neither a benchmark.json"),
        "other": ('{"results": 3}', "is neither a benchmark.json"),
        "older": (json.dumps(older), "measure again"),
        "version": (json.dumps({**json.loads(content), "version": 99}), "version 99"),
        "deep": ("[" * 100_000, "nested too deep"),
        "surrogate": (content.replace('"kind": "host"', '"kind": "\\ud800"'), "no Unicode"),
        "evaluation": ('{"dataset": {"name": "x"}, "results": []}', "not a whole evaluation.json"),
    }
    for name, (text, words) in cases.items():
        path = tmp_path / f"{name}.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        message = refused([host, path])
        assert str(path) in message
        assert words in message
        assert "\n" not in message
    assert f"There is no file {tmp_path / 'absent.json'}" in refused([tmp_path / "absent.json"])
    assert str(tmp_path) in refused([tmp_path])  # a directory
    files.write_json(tmp_path / "good.json", evaluation("a.tflite", "0" * 64, 0.5))
    assert "no benchmark is among them" in refused([tmp_path / "good.json"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value["measurements"][0]["rounds"][0].__setitem__(0, math.nan), "rounds"),
        (lambda value: value["measurements"][0]["rounds"][0].__setitem__(0, 0.0), "not above 0"),
        (lambda value: value["measurements"][0].__setitem__("load_seconds", "soon"), "load_seconds is 'soon'"),
        (lambda value: value["measurements"].append(value["measurements"][0]), "twice"),
        (lambda value: value["measurements"].clear(), "no latency"),
        (lambda value: value["measurements"][0]["profile"].__setitem__("invoke_seconds", 0.0), "no time"),
        (lambda value: value["graphs"][0].__setitem__("sha256", "abc"), "SHA-256"),
        (lambda value: value["exports"].__setitem__(0, {"tokens": [-1]}), "tokens"),
        (lambda value: value["exports"].__setitem__(0, {"tokens": 5}), "float.tflite are 5"),
        (lambda value: value["exports"].__setitem__(0, {"top1": 87.0, "images": 3}), "top1"),
        (lambda value: value["device"].pop("runtime"), "runtime"),
    ],
)
def test_impossible_figures_are_refused(paths: list[Path], tmp_path: Path, change: Any, words: str) -> None:
    value = json.loads(paths[0].read_text())
    change(value)
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(value))
    message = refused([path])
    assert str(path) in message
    assert words in message


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(entries):
        yield value, key
        yield from places(entry)


def test_a_damaged_value_is_shown_or_refused_never_a_crash(paths: list[Path], tmp_path: Path) -> None:
    random_ = random.Random(0)
    outcomes = {"shown": 0, "refused": 0}
    for path in paths[:2]:
        for number in range(60):
            value = json.loads(path.read_text())
            container, key = random_.choice(list(places(value)))
            if random_.random() < 0.3 and isinstance(container, dict):
                del container[key]
            else:
                container[key] = random_.choice([None, "x", -1, 1e300, [], {}, True, [[1]], {"a": None}])
            damaged = tmp_path / f"{path.stem}{number}.json"
            damaged.write_text(json.dumps(value))
            try:
                page.render(collect([damaged]))
            except UserError as error:
                message = str(error)
                outcomes["refused"] += 1
            else:
                message = str(damaged)
                outcomes["shown"] += 1
            assert str(damaged) in message
    assert min(outcomes.values()) > 10


def test_the_same_file_twice_is_shown_once(paths: list[Path], tmp_path: Path) -> None:
    copied = tmp_path / "copy.json"
    copied.write_bytes(paths[0].read_bytes())
    found = collect([paths[0], paths[0], copied])
    assert len(found.results) == 1
    assert [f"{path} holds the same as {paths[0]} and is shown once." for path in (paths[0], copied)] == [*found.notes]
    assert "is shown once" in page.render(found)


def test_the_same_device_on_two_days_has_two_names(measured: Measurements, tmp_path: Path) -> None:
    old = write_changed(
        tmp_path / "old.json", measured, device={**measured.device, "date": "2020-01-01T00:00:00+00:00"}
    )
    found = collect([old, write_changed(tmp_path / "new.json", measured)])
    assert len({result.name for result in found.results}) == 2
    assert found.results[0].name.endswith(", 2020-01-01T00:00")


def test_a_graph_given_twice_stays_two(measured: Measurements, tmp_path: Path) -> None:
    twice = copy.deepcopy(measured)
    twice.plan = dataclasses.replace(twice.plan, graphs=(twice.plan.graphs[0],) * 3)
    twice.descriptions = (twice.descriptions[0],) * 3
    for one in twice.measurements:
        one.label = twice.plan.labels[one.graph]
    found = collect([write_changed(tmp_path / "twice.json", twice)])
    assert [graph.name for graph in found.graphs] == list(twice.plan.labels)
    assert len(set(twice.plan.labels)) == 3


def test_one_graph_without_profile(measured: Measurements, tmp_path: Path) -> None:
    one = copy.deepcopy(measured.measurements[0])
    one.profile = None
    path = tmp_path / "one.json"
    write_changed(
        path,
        measured,
        plan=dataclasses.replace(measured.plan, graphs=measured.plan.graphs[:1], num_threads=(1,), profile=False),
        descriptions=measured.descriptions[:1],
        exports=(None,),
        measurements=[one],
    )
    html = page.render(collect([path]))
    assert "No result has a profile" in html
    assert "1 graph on 1 device" in html


def test_values_of_wrong_types_are_found(measured: Measurements) -> None:
    check_values(measured)
    for change in ({"interrupted": 1}, {"warnings": "none"}, {"exports": ({1: 2},)}, {"measurements": [None]}):
        with pytest.raises(ValueError, match="measurements"):
            check_values(dataclasses.replace(measured, **change))


# The command.


def run_report(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tflite.report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_command_writes_page_and_pictures(paths: list[Path], tmp_path: Path) -> None:
    (tmp_path / "report_accuracy.png").write_bytes(b"of an earlier report")
    done = run_report(*map(str, paths), f"--output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    names = ["report.html", *(f"report_{name}.png" for name in ("delegates", "devices", "operators", "tokens"))]
    assert sorted(path.name for path in tmp_path.iterdir()) == names  # nothing is known of accuracy
    assert (tmp_path / "report.html").read_text() == page.render(collect(paths))
    for name in names[1:]:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 500
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20


def test_command_refuses_in_one_line(tmp_path: Path, paths: list[Path]) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    for arguments, words in (
        ([], "FILE"),
        ([str(tmp_path / "absent.json")], "absent.json"),
        ([str(paths[0]), f"--output_dir={occupied}"], "cannot be written"),
    ):
        done = run_report(*arguments)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert words in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_report_needs_no_tensorflow(paths: list[Path], tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from tflite import report; from tflite.reporting.collect import collect\n"
        "report.write(collect([Path(sys.argv[1])]), Path(sys.argv[2]))\n"
        "print(sorted({'tensorflow', 'keras'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, str(paths[0]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

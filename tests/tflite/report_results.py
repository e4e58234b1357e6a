"""Results for the tests of the report: one really measured, two constructed from it, and the page taken apart."""

import copy
import dataclasses
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mobiatt_tf import files
from tflite import results
from tflite.benchmark import benchmark
from tflite.host import HostDevice
from tflite.measurements import Delegation, Measurements, Node, Plan, Profile, Statistics

EMULATED = "Constructed in a test: not a phone's figures"


def measure(tflite_files: dict[str, Path]) -> Measurements:
    """Measured here."""
    graphs = tuple(tflite_files[name] for name in ("float", "int8", "power"))
    plan = Plan(graphs, num_threads=(1, 2), runs=7, warmup=1, runs_per_round=3, profile_runs=4)
    return benchmark(plan, HostDevice())


def phone_fixture(measured: Measurements) -> Measurements:
    """Test fixture, not measured on a phone: what adb and benchmark_model would report, under other file names."""
    found = copy.deepcopy(measured)
    found.plan = dataclasses.replace(found.plan, graphs=tuple(Path(f"/phone/renamed{i}.tflite") for i in range(3)))
    found.device = {
        "kind": "adb",
        "name": "Test phone",
        "runtime": "benchmark_model 0123456789ab",
        "date": "2026-01-02T03:04:05+00:00",
        "headline": ["Test phone, Android 14, arm64-v8a"],
        "emulated": EMULATED,
    }
    found.warnings = ["The battery is <b>low</b>."]
    found.measurements = []
    for measurement in measured.measurements:
        for backend, factor in (("XNNPACK", 3.0), ("GPU", 0.5)):
            one = copy.deepcopy(measurement)
            one.label, one.backend = found.plan.labels[one.graph], backend
            one.round_statistics = [
                Statistics(len(r), min(r) * factor, None, None, sum(r) / len(r) * factor, 1e-6) for r in one.rounds
            ]
            one.rounds = []
            one.delegation = Delegation(backend, None, 5, 2)
            if backend == "GPU":
                one.profile, one.profile_error = None, "no operators of the GPU"
            found.measurements.append(one)
    return found


def browser_fixture(measured: Measurements) -> Measurements:
    """Test fixture, not measured in a browser: a coarse clock, no profile, stopped after two rounds."""
    found = copy.deepcopy(measured)
    found.device = {
        "kind": "browser",
        "name": "Test browser",
        "runtime": "@litertjs/core 0.0.0",
        "date": "2026-01-03T00:00:00+00:00",
        "headline": ["Test browser"],
    }
    found.interrupted = True
    for one in found.measurements:
        one.backend = "WASM"
        one.rounds = [[latency * 2 for latency in latencies] for latencies in one.rounds[:2]]
        one.invocations_per_latency, one.output_error = 4, 1.5e-6
        one.peak_bytes = one.baseline_bytes = one.profile = None
    return found


def write_results(directory: Path, measured: Measurements) -> list[Path]:
    """host.json, phone.json and browser.json."""
    found = {"host": measured, "phone": phone_fixture(measured), "browser": browser_fixture(measured)}
    for name, each in found.items():
        files.write_json(directory / f"{name}.json", results.to_json(each))
    return [directory / f"{name}.json" for name in found]


def write_hostile(directory: Path, measured: Measurements) -> tuple[Path, str]:
    """A result whose every text tries to leave its place, with hundreds of operators and a very long name."""
    evil = "</title></style></svg><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp; $x_1$ \x07 漢字"
    found = copy.deepcopy(measured)
    name = evil.replace("/", "|") + "long" * 60
    found.plan = dataclasses.replace(found.plan, graphs=(Path(f"{name}.tflite"), *found.plan.graphs[1:]))
    found.device |= {"name": evil, "runtime": evil, "headline": [evil], "emulated": evil}
    found.warnings = [evil]
    described = dataclasses.replace(found.descriptions[0], undelegated_ops={f"{evil}{i}": i for i in range(90)})
    found.descriptions = (described, *found.descriptions[1:])
    found.exports = (
        {"format": evil, "target": evil, "model": evil, "tokens": [4], "top1": 0.5, "images": 9},
        None,
        None,
    )
    first = found.measurements[0]
    first.label, first.profile_error = name, evil
    nodes = tuple(Node(f"{evil}{index % 300}", "builtin", index, 1e-6) for index in range(900))
    first.profile = Profile(3, 1e-3, 1e-4, nodes)
    path = directory / "evil&<b>.json"
    files.write_json(path, results.to_json(found))
    return path, evil


def write_changed(path: Path, found: Measurements, **changes: Any) -> Path:
    files.write_json(path, results.to_json(dataclasses.replace(copy.deepcopy(found), **changes)))
    return path


def evaluation(graph: str, digest: str, top1: float, images: int = 1000) -> dict[str, Any]:
    """What the report reads of an evaluation.json."""
    dataset = {"name": "fashion_mnist", "classes": [], "test_images": 10000, "fingerprint": "abc"}
    result = {"graph": graph, "format": "tflite", "sha256": digest, "top1": top1, "images": images}
    return {"dataset": {**dataset, "evaluated_images": images}, "results": [result]}


class Parsed(HTMLParser):
    """The page's elements, texts and tables; a cell is its text and the value of its `data`."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.texts: list[str] = []
        self._caption, self._in_cell = "", False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.append((tag, values))
        if values.get("class") == "scroll":
            self._caption = str(values["aria-label"])
            self.tables[self._caption] = []
        elif tag == "tr":
            self.tables[self._caption].append([])
        elif tag in ("td", "th"):
            self.tables[self._caption][-1].append(("", None))
            self._in_cell = True
        elif tag == "data":
            self.tables[self._caption][-1][-1] = ("", values["value"])

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._in_cell:
            text, value = self.tables[self._caption][-1][-1]
            self.tables[self._caption][-1][-1] = (text + data, value)

    def rows(self, caption: str) -> list[dict[str, tuple[str, str | None]]]:
        heads, *rows = self.tables[caption]
        return [{head: cell for (head, _), cell in zip(heads, row, strict=True)} for row in rows]

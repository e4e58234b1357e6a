"""The report: figures equal the JSON's, accuracy joined by checksum, hostile content, refusals, a real browser."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobiatt_tf import files
from mobiatt_tf.errors import UserError
from tests.tflite.report_results import (
    EMULATED,
    Parsed,
    evaluation,
    phone_fixture,
    write_changed,
)
from tflite import report
from tflite.measurements import Measurements
from tflite.reporting import charts, drawing, page
from tflite.reporting.collect import collect
from tflite.reporting.drawing import Mark, Shape, domain_of
from tflite.reporting.figures import figures

# Figures.


def assert_shows(cell: tuple[str, str | None], value: float | None, scale: float = 1.0) -> None:
    """The cell's value is exactly the JSON's, and its text is that value times `scale`, rounded."""
    text, written = cell
    if value is None:
        assert (text, written) == ("\N{EN DASH}", None)
        return
    assert written is not None
    assert float(written) == value
    shown = float(text.replace(",", "").rstrip("%"))
    digits = len(text.rstrip("%").split("e")[0].rpartition(".")[2]) if "." in text else 0
    step = 10.0**-digits * (10.0 ** int(text.split("e")[1]) if "e" in text else 1)
    assert shown == pytest.approx(value * scale, abs=0.5001 * step)


def test_every_latency_in_the_table_is_the_jsons(paths: list[Path]) -> None:
    shown = Parsed(page.render(collect(paths))).rows("Latency and memory")
    names = ("float", "int8", "power")
    count = 0
    for path, device in zip(paths, (None, f"Test phone ({EMULATED})", "Test browser"), strict=True):
        value = json.loads(path.read_text())
        for measurement in value["measurements"]:
            key = (f"{measurement['graph'] + 1} {names[measurement['graph']]}", measurement["backend"])
            (row,) = [
                row
                for row in shown
                if (row["graph"][0], row["backend"][0]) == key
                and row["threads"][0] == str(measurement["num_threads"])
                and row["device"][0].startswith(device or value["device"]["name"])
            ]
            statistics, ratio = measurement["latency_seconds"], measurement["ratio_to_first_graph"]
            assert_shows(row["runs"], statistics["runs"])
            for head, name in (("median ms", "median"), ("min ms", "min"), ("p90 ms", "p90"), ("mean ms", "mean")):
                assert_shows(row[head], statistics[name], 1e3)
            assert_shows(row["deviation ms"], statistics["standard_deviation"], 1e3)
            latencies = [latency for latencies in measurement["rounds"] for latency in latencies]
            if latencies:
                low, high = np.quantile(latencies, (0.25, 0.75))
                assert row["range is of"][0] == "quartiles"
            else:
                means = [one["mean"] for one in measurement["round_statistics"]]
                low, high = min(means), max(means)
                assert row["range is of"][0] == "rounds"
            assert_shows(row["from ms"], float(low), 1e3)
            assert_shows(row["to ms"], float(high), 1e3)
            assert_shows(row["to first graph"], ratio["median"])
            assert row["over rounds"][0] == f"{ratio['min']:.3f} to {ratio['max']:.3f}"
            assert_shows(row["load ms"], measurement["load_seconds"], 1e3)
            assert_shows(row["first run ms"], measurement["first_run_seconds"], 1e3)
            assert_shows(row["peak MiB"], measurement["peak_bytes"], 2**-20)
            assert_shows(row["model MiB"], measurement["model_bytes"], 2**-20)
            assert_shows(row["output error"], measurement["output_error"])
            count += 1
    assert count == len(shown) == 6 + 12 + 6


def test_every_operator_and_node_in_the_tables_is_the_jsons(paths: list[Path]) -> None:
    parsed = Parsed(page.render(collect(paths[:1])))
    value = json.loads(paths[0].read_text())
    operators = parsed.rows("Time per operator type")
    expected = 0
    for measurement in value["measurements"]:
        profile = measurement["profile"]
        rows = [
            row
            for row in operators
            if row["graph"][0].startswith(str(measurement["graph"] + 1))
            and row["threads"][0] == str(measurement["num_threads"])
        ]
        by_type = {row["operator"][0]: row for row in rows}
        for entry in profile["by_type"]:
            row = by_type[entry["op"]]
            assert_shows(row["nodes"], entry["count"])
            assert_shows(row["ms"], entry["seconds"], 1e3)
            assert_shows(row["share"], entry["share"], 100)
        assert_shows(by_type["(not attributed)"]["ms"], profile["unattributed_seconds"], 1e3)
        expected += len(profile["by_type"]) + 1
    assert len(operators) == expected
    for row, graph in zip(parsed.rows("Nodes that delegates take"), value["graphs"], strict=True):
        assert_shows(row["nodes"], graph["nodes"])
        assert_shows(row["delegated"], graph["delegated_nodes"])
        assert_shows(row["partitions"], graph["delegate_partitions"])
        undelegated = ", ".join(f"{count} {name}" for name, count in graph["undelegated_ops"].items())
        assert row["not delegated"][0] == (undelegated or "\N{EN DASH}")
    for row, graph in zip(parsed.rows("The graphs"), value["graphs"], strict=True):
        assert_shows(row["MB"], graph["size_bytes"], 1e-6)
        assert_shows(row["parameters"], graph["parameters"])
        assert row["SHA-256"][0] == graph["sha256"][:12]


def test_bars_are_as_long_as_the_latencies(paths: list[Path]) -> None:
    found = collect(paths)
    (panel,) = figures(found)[0].panels
    for width in (324.0, 1086.0):
        marks = [item for item in panel.draw(width).items if isinstance(item, Mark)]
        entries = sorted(found.entries, key=lambda entry: (entry.graph.number, entry.result.number))
        scales = []
        for mark, entry in zip(marks, entries, strict=True):
            shape = next(part for part in mark.parts if isinstance(part, Shape))
            left, right = min(x for x, _ in shape.points), max(x for x, _ in shape.points)
            if right - left > 1.01:  # the shortest bars are one pixel
                scales.append((right - left) / entry.seconds)
            assert shape.faint == (entry.result.number > 1)  # emulated and interrupted
            assert mark.tip == charts.describe_entry(entry)
        assert len(scales) > 10
        assert max(scales) == pytest.approx(min(scales))


@given(st.floats(1e-6, 1e6), st.floats(1.001, 1e6), st.booleans())
def test_axes_hold_their_values_and_ticks(low: float, factor: float, logarithmic: bool) -> None:
    values = [low, low * math.sqrt(factor), low * factor]
    domain = domain_of(values, logarithmic)
    placed = [domain.place(value, 10, 110) for value in values]
    assert 10 <= placed[0] < placed[1] < placed[2] <= 110
    if logarithmic:
        assert placed[1] == pytest.approx((placed[0] + placed[2]) / 2)
    else:
        assert placed[2] - 10 == pytest.approx((placed[0] - 10) * factor)
    ticks = domain.ticks(5)
    assert 2 <= len(ticks) <= 40
    assert ticks == sorted(ticks)
    assert all(10 - 1e-6 <= domain.place(tick, 10, 110) <= 110 + 1e-6 for tick in ticks)


@given(st.text(max_size=80), st.floats(30, 400))
def test_shortened_text_fits(text: str, width: float) -> None:
    assert drawing.text_width(drawing.shorten(text, width)) <= width
    assert all(drawing.text_width(line) <= width for line in drawing.wrap(text, width))


def test_ratios_between_devices_are_of_the_same_file(measured: Measurements, tmp_path: Path) -> None:
    phone = phone_fixture(measured)
    # The third graph keeps its name but is another file now: it must not be compared.
    phone.plan = dataclasses.replace(phone.plan, graphs=(*phone.plan.graphs[:2], measured.plan.graphs[2]))
    other = dataclasses.replace(phone.descriptions[2], sha256="0" * 64)
    phone.descriptions = (*phone.descriptions[:2], other)
    for one in phone.measurements:
        one.label = phone.plan.labels[one.graph]
    host = write_changed(tmp_path / "host.json", measured)
    found = collect([host, write_changed(tmp_path / "phone.json", phone)])
    assert len(found.graphs) == 4
    assert {graph.name for graph in found.graphs[2:]} == {
        f"power ({graph.description.sha256[:8]})" for graph in found.graphs[2:]
    }
    for entry in found.entries:
        if entry.result.number == 1 or entry.graph.number == 4:
            assert entry.to_first_device is None
            continue
        reference = next(
            one.statistics
            for one in measured.measurements
            if one.graph == entry.graph.number - 1 and one.num_threads == entry.measurement.num_threads
        )
        assert reference is not None
        assert entry.to_first_device == pytest.approx(entry.seconds / reference.median)
    assert "Not measured on every device: 3 power" in page.render(found)


# Accuracy and tokens.


def test_accuracy_is_joined_by_checksum_never_by_name(measured: Measurements, tmp_path: Path) -> None:
    from mobiatt_tf.training.graphs import content_sha256

    by_name = dict(zip(measured.plan.labels, measured.plan.graphs, strict=True))
    renamed = tmp_path / "evaluated-elsewhere.tflite"
    renamed.write_bytes(by_name["float"].read_bytes())
    content = evaluation(str(renamed), content_sha256([renamed]), 0.875)
    namesake = evaluation(str(by_name["int8"]), "1" * 64, 0.5)  # the same name, another file
    content["results"] += namesake["results"]
    files.write_json(tmp_path / "evaluation.json", content)
    host = write_changed(tmp_path / "host.json", measured)
    found = collect([tmp_path / "evaluation.json", host])
    known, *unknown = found.graphs
    assert [(each.top1, each.images) for each in known.accuracies] == [(0.875, 1000)]
    assert not any(graph.accuracies for graph in unknown)
    assert any("int8.tflite is in no benchmark" in note for note in found.notes)
    html = page.render(found)
    assert "No accuracy known: 2 int8, 3 power." in html
    rows = Parsed(html).rows("Latency and accuracy")
    assert {row["graph"][0] for row in rows} == {"1 float"}
    for row in rows:
        assert_shows(row["top-1"], 0.875, 100)
        assert row["on"][0] == "1,000 test images of fashion_mnist (of 10,000)"


def test_check_images_of_the_export_are_labelled_and_tokens_drawn(measured: Measurements, tmp_path: Path) -> None:
    exports = (
        {"format": "float32", "target": "arm", "tokens": [49, 16], "model": "m", "top1": 0.75, "images": 128},
        {"format": "int8", "target": "arm", "tokens": [196], "model": "m"},
        None,
    )
    found = collect([write_changed(tmp_path / "host.json", measured, exports=exports)])
    assert [graph.most_tokens for graph in found.graphs] == [49, 196, None]
    html = page.render(found)
    assert "128 check images at export" in html
    assert "not an evaluation" in html
    assert "No accuracy known: 2 int8, 3 power." in html
    assert "Neither tokens nor an image as input: 3 power." in html
    rows = Parsed(html).rows("Latency and tokens")
    assert {(row["graph"][0], row["most tokens"][1]) for row in rows} == {("1 float", "49"), ("2 int8", "196")}
    unknown = page.render(collect([write_changed(tmp_path / "without.json", measured, exports=(None,) * 3)]))
    assert "Tokens unknown, because no export stands beside the file: 1 float, 2 int8" in unknown
    assert {row["pixels"][1] for row in Parsed(unknown).rows("Latency and tokens")} == {"256"}
    assert "unknown (16 x 16 pixels)" in unknown
    assert 'id="accuracy"' in unknown
    assert "No accuracy known: 1 float, 2 int8, 3 power." in unknown


def test_two_evaluations_that_differ_are_reported(measured: Measurements, tmp_path: Path) -> None:
    digest = measured.descriptions[0].sha256
    host = write_changed(tmp_path / "host.json", measured)
    for name, top1 in (("a", 0.9), ("b", 0.8)):
        files.write_json(tmp_path / f"{name}.json", evaluation("float.tflite", digest, top1))
    files.write_json(tmp_path / "few.json", evaluation("float.tflite", digest, 0.7, images=100))
    found = collect([host, *(tmp_path / f"{name}.json" for name in ("a", "b", "few"))])
    assert [(each.top1, each.images) for each in found.graphs[0].accuracies] == [(0.9, 1000), (0.7, 100)]
    assert any("a.json says 90.00% and" in note and "b.json 80.00%" in note for note in found.notes)
    assert "cannot be compared" in page.render(found)  # two sets of images, two charts
    assert len(figures(found)[1].panels) == 2


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_evaluations_for_other_tasks_are_refused_by_name(task: str, measured: Measurements, tmp_path: Path) -> None:
    host = write_changed(tmp_path / "host.json", measured)
    content = evaluation("float.tflite", measured.descriptions[0].sha256, 0.9)
    del content["results"][0]["top1"]
    files.write_json(tmp_path / "evaluation.json", {"task": task, **content})
    with pytest.raises(UserError, match=f"is an evaluation for {task}: the report takes those of classifiers only"):
        collect([host, tmp_path / "evaluation.json"])


# What is to be seen.


def test_marked_results_are_marked_wherever_they_are_drawn(paths: list[Path]) -> None:
    found = collect(paths)
    for figure in figures(found):
        for panel in (*figure.panels, *figure.more):
            words = " ".join((panel.title, *panel.lines))
            if "Test phone" in words:
                assert any(EMULATED in mark for mark in panel.marks)
            if "Test browser" in words:
                assert any("interrupted after 2 of 3 rounds" in mark for mark in panel.marks)
            assert any("thread" in line for line in panel.lines), figure.name
            assert any(result.date in words for result in found.results), figure.name
            assert any(result.runtime in words for result in found.results)
    html = page.render(found)
    assert "The battery is &lt;b&gt;low&lt;/b&gt;." in html
    assert "No profile on Test phone, GPU, 1 thread, of 1 float, 2 int8, 3 power: no operators of the GPU" in html
    assert "Test browser does not say what its delegate takes." in html
    assert "summary of each round only" in html
    assert "the mean of up to 4 inferences" in html
    assert html.count('<p class="best">') == 1  # no headline figure of what must not be quoted


def test_a_failure_is_part_of_the_mark(measured: Measurements, tmp_path: Path) -> None:
    path = write_changed(tmp_path / "cut.json", measured, interrupted=True, failure="The phone was unplugged.")
    assert "(The phone was unplugged.)" in collect([path]).results[0].marks[0]


def test_everything_is_escaped(hostile: tuple[Path, str], tmp_path: Path) -> None:
    path, evil = hostile
    html = page.render(collect([path]))
    parsed = Parsed(html)
    names = [tag for tag, _ in parsed.tags]
    assert names.count("script") == 1
    assert not {"img", "b>"} & set(names)
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    visible = evil.replace("\x07", "\N{REPLACEMENT CHARACTER}")
    assert sum(visible in text for text in parsed.texts) > 5
    assert len(parsed.rows("Time per operator type")) > 300
    written = report.write(collect([path]), tmp_path)
    assert len(written) == 6


def test_the_page_asks_for_nothing(paths: list[Path], hostile: tuple[Path, str]) -> None:
    for given_paths in (paths, [hostile[0]]):
        html = page.render(collect(given_paths))
        parsed = Parsed(html)
        (policy,) = [a["content"] for tag, a in parsed.tags if tag == "meta" and a.get("http-equiv")]
        assert policy is not None
        assert policy.startswith("default-src 'none';")
        for tag, attributes in parsed.tags:
            assert tag not in ("link", "iframe", "object", "embed", "base", "image", "use", "img", "video")
            assert not {"src", "srcset", "xlink:href", "style"} & attributes.keys()
            assert (attributes.get("href") or "#").startswith("#")
        style = html.split("<style>")[1].split("</style>")[0]
        assert "url(" not in style
        assert "@import" not in style
        assert "http" not in style
        identifiers = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
        assert len(set(identifiers)) == len(identifiers)


def test_charts_have_names_and_tables(paths: list[Path]) -> None:
    parsed = Parsed(page.render(collect(paths)))
    drawn = [attributes for tag, attributes in parsed.tags if tag == "svg" and "aria-hidden" not in attributes]
    assert len(drawn) > 15
    assert all(attributes["aria-label"] and attributes["tabindex"] == "0" for attributes in drawn)
    marks = [attributes for tag, attributes in parsed.tags if tag == "g"]
    assert all(attributes["aria-label"] and attributes["role"] == "img" for attributes in marks)
    assert set(parsed.tables) == {
        "The graphs",
        "Latency and memory",
        "Latency and tokens",
        "Time per operator type",
        "Nodes that delegates take",
    }


def luminance(color: str) -> float:
    channels = [int(color[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_can_be_seen() -> None:
    """Contrast to the surface by WCAG 2.2: 4.5 for text, 3 for marks, in the light and in the dark."""
    for theme in (0, 1):
        surface = luminance(drawing.PALETTE["surface"][theme])
        for role, colors in drawing.PALETTE.items():
            needed = 4.5 if role in ("ink", "muted", "warn") else 3 if role.startswith("c") else 1
            one, other = sorted((surface, luminance(colors[theme])))
            assert (other + 0.05) / (one + 0.05) >= needed, (role, theme)

"""What the page may post, field by field."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mobiatt_tf.errors import UserError
from tflite import results
from tflite.browser import device, job, protocol
from tflite.browser.site import RefusedError
from tflite.measurements import Plan

PHONE = {  # as headless Chromium posts it
    "name": "Pixel of a test",
    "user_agent": "Mozilla/5.0 (Linux; Android 10; K) AppleWebKit/537.36",
    "browser": "Chrome 150.0.0.0",
    "os": "Android 16.0.0",
    "model": "Pixel 6",
    "logical_cores": 8,
    "memory_gib": 8,
    "gpu": None,
    "cross_origin_isolated": True,
    "relaxed_simd": True,
    "secure_context": True,
    "timer_resolution_seconds": 5e-6,
}


@pytest.fixture(scope="module")
def prepared(graphs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> job.Job:
    """Two graphs, one and two threads and the GPU, five runs in rounds of three and two."""
    plan = Plan((graphs["float32"], graphs["int8"]), num_threads=(1, 2), runs=5, runs_per_round=3)
    return job.prepare(plan, tmp_path_factory.mktemp("job"))


def measurement(**changes: Any) -> dict[str, Any]:
    value = {
        "load_seconds": 0.25,
        "first_run_seconds": 0.01,
        "output_error": 1e-6,
        "invocations": 1,
        "fully_accelerated": True,
        "rounds": [[0.001, 0.002, 0.003], [0.001, 0.002]],
    }
    return value | changes


def posted() -> dict[str, Any]:
    entry = {"graphs": [measurement(), measurement()]}
    return {"phone": copy.deepcopy(PHONE), "entries": [entry, copy.deepcopy(entry), {"skipped": "there is no WebGPU"}]}


def test_an_honest_result_becomes_measurements(prepared: job.Job) -> None:
    result = protocol.parse_result(posted(), prepared)
    assert isinstance(result, protocol.Result)
    found = device.measurements(prepared, result)
    assert [(one.label, one.backend, one.num_threads) for one in found.measurements] == [
        ("float32", "WASM", 1),
        ("int8", "WASM", 1),
        ("float32", "WASM", 2),
        ("int8", "WASM", 2),
    ]
    assert found.measurements[0].rounds == [[0.001, 0.002, 0.003], [0.001, 0.002]]
    assert found.warnings == ["WebGPU: not measured, there is no WebGPU"]
    assert found.device["name"] == "Pixel of a test"
    assert found.device["headline"][0] == "Pixel of a test: Android 16.0.0, 8 logical cores, 8 GiB or more"
    assert "emulated" not in found.device
    assert results.from_json(results.to_json(found)) == found


def test_a_graph_that_the_gpu_took_in_part_is_marked(prepared: job.Job) -> None:
    value = posted()
    value["entries"][2] = {"graphs": [measurement(fully_accelerated=False), measurement(invocations=7)]}
    result = protocol.parse_result(value, prepared)
    assert isinstance(result, protocol.Result)
    found = device.measurements(prepared, result)
    assert found.measurements[4].delegation is not None
    assert found.measurements[5].delegation is None
    assert "WebGPU took only a part of float32; the rest ran on WASM." in found.warnings
    assert any("the mean of up to 7 consecutive invocations" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("isolated", "relaxed", "said"),
    [
        (True, True, "isolated (threads)"),
        (True, False, "isolated, without relaxed SIMD (no threads)"),  # Safari
        (False, True, "not isolated (no threads)"),
    ],
)
def test_who_has_threads(prepared: job.Job, isolated: bool, relaxed: bool, said: str) -> None:
    value = posted()
    value["phone"] |= {"cross_origin_isolated": isolated, "relaxed_simd": relaxed}
    result = protocol.parse_result(value, prepared)
    assert isinstance(result, protocol.Result)
    assert f"Chrome 150.0.0.0, {said}, " in device.measurements(prepared, result).device["headline"][1]


def test_nothing_measured_is_an_error(prepared: job.Job) -> None:
    value = posted()
    value["entries"] = [{"skipped": "out of memory"}] * 3
    result = protocol.parse_result(value, prepared)
    assert isinstance(result, protocol.Result)
    with pytest.raises(UserError, match=r"Pixel of a test measured nothing\. WASM, 1 thread: out of memory; WASM"):
        device.measurements(prepared, result)


def test_a_failure_is_a_line(prepared: job.Job) -> None:
    value = {"phone": PHONE, "error": "the outputs are wrong"}
    failure = protocol.parse_result(value, prepared)
    assert isinstance(failure, protocol.Failure)
    assert (failure.phone.name, failure.reason) == ("Pixel of a test", "the outputs are wrong")
    with pytest.raises(RefusedError, match="error must be a printable text"):
        protocol.parse_result({"phone": PHONE, "error": "\x1b[2J"}, prepared)


def put(*path: Any) -> Callable[[dict[str, Any], Any], None]:
    def change(value: dict[str, Any], new: Any) -> None:
        place: Any = value
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = new

    return change


FIRST = ("entries", 0, "graphs", 0)
NUMBERS = [True, None, "1", [], {}, -1.0, math.inf, 1e999, math.nan, 10**400]
TEXTS = [None, 5, "", "  ", "x" * 500, "a\nb", "\x1b[31mred", "a\u202eb", ["a"]]
COUNTS = [True, 0, -1, 1.0, 10**9, "1", None]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (put("entries"), [None, {}, [], [{"skipped": "x"}] * 2, [{"skipped": "x"}] * 4, 3]),
        (put("entries", 0), [None, [], {}, {"graphs": []}, {"skipped": ""}, {"skipped": "x", "graphs": []}, "x"]),
        (put(*FIRST[:3]), [None, {}, [], [measurement()], [measurement()] * 3]),
        (put(*FIRST), [None, [], {}, measurement(more=1), {"rounds": []}]),
        (put(*FIRST, "load_seconds"), NUMBERS),
        (put(*FIRST, "first_run_seconds"), NUMBERS),
        (put(*FIRST, "output_error"), [*NUMBERS, 2e-3]),  # the last one is more than a float32 graph may differ
        (put(*FIRST, "invocations"), COUNTS),
        (put(*FIRST, "rounds"), [None, [], {}, [[1.0] * 3], [[1.0] * 3] * 2, [[1.0] * 2] * 2, [[1.0] * 3, 5]]),
        (put(*FIRST, "rounds", 1, 0), [*NUMBERS, 0, 0.0, 3601.0, [1.0]]),
        (put("phone"), [None, [], {}, {**PHONE, "more": 1}]),
        (put("phone", "name"), [*TEXTS, "x" * 81]),
        (put("phone", "user_agent"), TEXTS),
        (put("phone", "browser"), TEXTS),
        (put("phone", "os"), TEXTS),
        (put("phone", "model"), TEXTS[1:]),
        (put("phone", "gpu"), TEXTS[1:]),
        (put("phone", "logical_cores"), COUNTS[:-1]),
        (put("phone", "memory_gib"), [-1, "8", True, 1e999]),
        (put("phone", "cross_origin_isolated"), [None, 1, "true"]),
        (put("phone", "relaxed_simd"), [None, 1, "true"]),
        (put("phone", "secure_context"), [None, 0, []]),
        (put("phone", "timer_resolution_seconds"), [*NUMBERS, 0, 1.5]),
        (put("more"), [1]),
    ],
)
def test_refuses_everything_else(
    prepared: job.Job, change: Callable[[dict[str, Any], Any], None], wrong: list[Any]
) -> None:
    for new in wrong:
        value = posted()
        change(value, new)
        with pytest.raises(RefusedError):
            protocol.parse_result(value, prepared)


def test_a_character_that_is_newer_than_python_is_replaced(prepared: job.Job) -> None:
    value = posted()
    value["phone"]["name"] = "Pixel \U0001fadf\u0378"
    result = protocol.parse_result(value, prepared)
    assert result.phone.name in ("Pixel \ufffd\ufffd", "Pixel \U0001fadf\ufffd")


def test_the_flag_of_the_gpu_is_needed_for_the_gpu_alone(prepared: job.Job) -> None:
    value = posted()
    value["entries"][2] = {"graphs": [measurement(fully_accelerated=None), measurement()]}
    with pytest.raises(RefusedError, match="fully_accelerated must be true or false"):
        protocol.parse_result(value, prepared)


def test_the_limit_of_a_post_fits_every_honest_one(prepared: job.Job) -> None:
    """The longest numbers that JavaScript writes, and texts of the greatest length in a script of three bytes."""
    import json

    value = posted()
    long = 0.00012345678901234567
    full = measurement(rounds=[[long] * 3, [long] * 2], load_seconds=long, first_run_seconds=long, output_error=long)
    value["entries"] = [{"graphs": [full, full]}] * 2 + [{"skipped": "機" * 300}]
    value["phone"] |= {"name": "機" * 80, "user_agent": "機" * 300, "gpu": "機" * 300}
    assert len(json.dumps(value, ensure_ascii=False).encode()) < protocol.post_bytes(prepared)


@pytest.mark.parametrize("stay", [False, True])
def test_a_second_result_is_taken_only_where_the_server_stays(prepared: job.Job, stay: bool) -> None:
    inbox = device.Inbox(prepared, stay)
    take = inbox.posts["result"].take
    with pytest.raises(RefusedError):
        take({})  # does not count
    assert take(posted()) == {"stay": stay}
    if stay:
        take(posted())
    else:
        with pytest.raises(RefusedError, match="A result has been taken already") as refused:
            take(posted())
        assert refused.value.status == 409
    assert inbox.messages.qsize() == 1 + stay


def test_a_graph_that_cannot_run_is_refused_before_a_phone_is_asked(tmp_path: Path) -> None:
    (tmp_path / "broken.tflite").write_bytes(b"\x00\x00\x00\x00TFL3 and nothing more")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"broken\.tflite"):
        job.prepare(Plan((tmp_path / "broken.tflite",)), tmp_path / "out")
    with pytest.raises(UserError, match=r"There is no file .*missing\.tflite"):
        job.prepare(Plan((tmp_path / "missing.tflite",)), tmp_path / "out")

"""What the page posts, checked to the last field: it comes from a network."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tflite.browser.job import Configuration, Job
from tflite.browser.site import RefusedError
from tflite.measurements import Delegation, Measurement

_LONGEST_TEXT = 300
_LONGEST_LATENCY_SECONDS = 3600.0
_MOST_INVOCATIONS = 1_000_000
_GREATEST_ERROR = 1e30  # a difference that is still a number
_POST_BYTES = 20_000  # for everything but latencies
_LATENCY_BYTES = 32
PROGRESS_BYTES = 1_000


@dataclass(frozen=True)
class Phone:
    """What a browser told of itself and its phone; None where it did not say."""

    name: str
    user_agent: str
    browser: str
    os: str
    model: str | None
    logical_cores: int | None
    memory_gib: float | None
    gpu: str | None
    cross_origin_isolated: bool
    relaxed_simd: bool
    secure_context: bool
    timer_resolution_seconds: float


@dataclass(frozen=True)
class Result:
    """A finished run: measurements, and for what was not measured, why."""

    phone: Phone
    measurements: list[Measurement]
    skipped: dict[Configuration, str]
    partial: list[str]


@dataclass(frozen=True)
class Failure:
    """A run that ended without figures: one line says why."""

    phone: Phone
    reason: str


@dataclass(frozen=True)
class Progress:
    """How far a phone is: `done` of `total` steps."""

    done: int
    total: int


def post_bytes(job: Job) -> int:
    """The size that no honest result exceeds."""
    latencies = job.plan.runs * len(job.configurations) * len(job.plan.graphs)
    entries = len(job.configurations) * len(job.plan.graphs)
    return _POST_BYTES + 1_000 * entries + _LATENCY_BYTES * latencies


def parse_progress(value: Any) -> Progress:
    """Raises `RefusedError` for anything else than {"done": n, "total": m} with n <= m."""
    found = _object(value, "progress", {"done", "total"})
    total = _integer(found["total"], "total", 1, 1_000_000)
    return Progress(_integer(found["done"], "done", 0, total), total)


def parse_result(value: Any, job: Job) -> Result | Failure:
    """What the page measured, or why it could not.

    Raises:
        RefusedError: a field is missing, unknown, of another type, not finite, out of range, or does not fit the plan.
    """
    if isinstance(value, dict) and "error" in value:
        found = _object(value, "result", {"phone", "error"})
        return Failure(_phone(found["phone"]), _text(found["error"], "error"))
    found = _object(value, "result", {"phone", "entries"})
    entries = found["entries"]
    if not isinstance(entries, list) or len(entries) != len(job.configurations):
        raise RefusedError(f"entries must be a list of {len(job.configurations)}.")
    result = Result(_phone(found["phone"]), [], {}, [])
    for entry, configuration in zip(entries, job.configurations, strict=True):
        _entry(entry, configuration, job, result)
    return result


def _entry(value: Any, configuration: Configuration, job: Job, result: Result) -> None:
    """One configuration: either {"skipped": reason} or {"graphs": one measurement each}."""
    if isinstance(value, dict) and "skipped" in value:
        result.skipped[configuration] = _text(_object(value, "entry", {"skipped"})["skipped"], "skipped")
        return
    graphs = _object(value, "entry", {"graphs"})["graphs"]
    if not isinstance(graphs, list) or len(graphs) != len(job.plan.graphs):
        raise RefusedError(f"graphs must be a list of {len(job.plan.graphs)}.")
    for number, graph in enumerate(graphs):
        result.measurements.append(_measurement(graph, number, configuration, job, result))


def _measurement(value: Any, number: int, configuration: Configuration, job: Job, result: Result) -> Measurement:
    names = {"load_seconds", "first_run_seconds", "output_error", "invocations", "fully_accelerated", "rounds"}
    found = _object(value, "measurement", names)
    label = job.plan.labels[number]
    error = _number(found["output_error"], "output_error", 0, _GREATEST_ERROR)
    if error > (most := job.tolerances[number][configuration.backend]):
        raise RefusedError(
            f"output_error of {label} is {error:.3g}; at most {most:g} is taken, and no figures without.", 422
        )
    delegation = None
    if configuration.backend == "WebGPU" and not _boolean(found["fully_accelerated"], "fully_accelerated"):
        delegation = Delegation("WebGPU", job.descriptions[number].nodes, None, None)
        result.partial.append(label)
    return Measurement(
        graph=number,
        label=label,
        num_threads=configuration.num_threads,
        backend=configuration.backend,
        load_seconds=_seconds(found["load_seconds"], "load_seconds"),
        first_run_seconds=_seconds(found["first_run_seconds"], "first_run_seconds"),
        rounds=_rounds(found["rounds"], job.plan.rounds),
        invocations_per_latency=_integer(found["invocations"], "invocations", 1, _MOST_INVOCATIONS),
        output_error=error,
        delegation=delegation,
    )


def _rounds(value: Any, lengths: tuple[int, ...]) -> list[list[float]]:
    if not isinstance(value, list) or len(value) != len(lengths):
        raise RefusedError(f"rounds must be a list of {len(lengths)}.")
    for latencies, length in zip(value, lengths, strict=True):
        if not isinstance(latencies, list) or len(latencies) != length:
            raise RefusedError(f"each round must be a list of its number of runs: {list(lengths)}.")
    return [
        [_number(latency, "latency", 1e-9, _LONGEST_LATENCY_SECONDS) for latency in latencies] for latencies in value
    ]


def _phone(value: Any) -> Phone:
    found = _object(value, "phone", set(Phone.__annotations__))
    cores, memory = found["logical_cores"], found["memory_gib"]
    return Phone(
        name=_text(found["name"], "name", 80),
        user_agent=_text(found["user_agent"], "user_agent"),
        browser=_text(found["browser"], "browser", 80),
        os=_text(found["os"], "os", 80),
        model=None if found["model"] is None else _text(found["model"], "model", 80),
        logical_cores=None if cores is None else _integer(cores, "logical_cores", 1, 4096),
        memory_gib=None if memory is None else _number(memory, "memory_gib", 0, 1 << 20),
        gpu=None if found["gpu"] is None else _text(found["gpu"], "gpu"),
        cross_origin_isolated=_boolean(found["cross_origin_isolated"], "cross_origin_isolated"),
        relaxed_simd=_boolean(found["relaxed_simd"], "relaxed_simd"),
        secure_context=_boolean(found["secure_context"], "secure_context"),
        timer_resolution_seconds=_number(found["timer_resolution_seconds"], "timer_resolution_seconds", 1e-9, 1),
    )


def _object(value: Any, name: str, keys: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict) or set(value) != keys:
        raise RefusedError(f"{name} must be an object with exactly {', '.join(sorted(keys))}.")
    return value


def _text(value: Any, name: str, longest: int = _LONGEST_TEXT) -> str:
    """Texts are printed on a terminal, so no control characters; characters newer than Python's tables are replaced."""
    if isinstance(value, str):
        value = "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(one) == "Cn" else one for one in value)
    if not isinstance(value, str) or not value.strip() or len(value) > longest or not value.isprintable():
        raise RefusedError(f"{name} must be a printable text of 1 to {longest} characters.")
    return value.strip()


def _boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise RefusedError(f"{name} must be true or false.")
    return value


def _integer(value: Any, name: str, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise RefusedError(f"{name} must be an integer from {least} to {most}.")
    return value


def _number(value: Any, name: str, least: float, most: float) -> float:
    """Finite, because all limits are; NaN compares false, and JSON's 1e999, infinity in Python, is too large."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise RefusedError(f"{name} must be a finite number from {least:g} to {most:g}.")
    return float(value)


def _seconds(value: Any, name: str) -> float:
    return _number(value, name, 0, _LONGEST_LATENCY_SECONDS)

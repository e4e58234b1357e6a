"""The JSON of a benchmark: written, read back, and what the JSON beside an exported file adds to it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mobiatt_tf import files
from mobiatt_tf.errors import UserError
from tflite import measurements
from tflite.checking import check_values
from tflite.inspect import Description, Signature, Tensor
from tflite.measurements import Delegation, Measurement, Measurements, Node, Plan, Profile, Statistics

KIND = "mobiatt-tf benchmark"
VERSION = 2
# What a report joins with latency; an export's JSON has more.
_EXPORT_KEYS = ("format", "target", "tokens", "model")


def to_json(found: Measurements) -> dict[str, Any]:
    """Everything as plain values: plan, device, descriptions, every raw latency in order, statistics, profiles."""
    plan = asdict(found.plan)
    plan["graphs"] = [str(graph) for graph in found.plan.graphs]
    plan["inputs"] = [str(path) for path in found.plan.inputs] if found.plan.inputs else None
    return {
        "kind": KIND,
        "version": VERSION,
        "interrupted": found.interrupted,
        "failure": found.failure,
        "warnings": found.warnings,
        "device": found.device,
        "plan": plan,
        "graphs": [asdict(description) for description in found.descriptions],
        "exports": list(found.exports or [None] * len(found.descriptions)),
        "measurements": [_measurement_to_json(measurement, found) for measurement in found.measurements],
    }


def _measurement_to_json(measurement: Measurement, found: Measurements) -> dict[str, Any]:
    statistics = measurement.statistics
    relative = measurements.ratio(measurement, measurements.reference_of(found, measurement))
    value = asdict(measurement)
    value["model_bytes"] = measurement.model_bytes
    value["latency_seconds"] = asdict(statistics) if statistics else None
    value["ratio_to_first_graph"] = asdict(relative) if relative else None
    if measurement.profile:
        value["profile"]["by_type"] = [
            {"op": name, "count": count, "seconds": seconds, "share": seconds / measurement.profile.invoke_seconds}
            for name, (count, seconds) in measurement.profile.by_type().items()
        ]
    return value


def load(path: str | Path) -> Measurements:
    """Reads a benchmark.json.

    Raises:
        UserError: the file is missing, is not JSON or not the result of a benchmark; see `checked`.
    """
    value = files.read_json(path)
    if not is_benchmark(value):
        raise UserError(f"{path} is not the result of a benchmark: give a benchmark.json of tflite.benchmark.")
    return checked(value, path)


def is_benchmark(value: Any) -> bool:
    """Whether the content of a JSON file is a benchmark's, of whatever version."""
    first_version = isinstance(value, dict) and {"device", "plan", "measurements"} <= value.keys()  # it had no kind
    return first_version or (isinstance(value, dict) and value.get("kind") == KIND)


def checked(value: Mapping[str, Any], path: str | Path) -> Measurements:
    """`from_json` of what was read from `path`.

    Raises:
        UserError: it has another version, or is damaged: a part is missing, a value is of another type or no number.
    """
    if value.get("version") != VERSION:
        raise UserError(
            f"{path} has version {value.get('version', 1)} of the results' format; this program reads {VERSION}. "
            "Measure again."
        )
    try:
        found = from_json(value)
        check_values(found)
        return found
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}. Measure again.") from error


def from_json(value: Mapping[str, Any]) -> Measurements:
    """The inverse of `to_json`.

    Raises:
        KeyError, TypeError, ValueError: the value is not what `to_json` writes.
    """
    plan = dict(value["plan"])
    plan["graphs"] = tuple(Path(graph) for graph in plan["graphs"])
    plan["num_threads"] = tuple(plan["num_threads"])
    plan["inputs"] = tuple(Path(path) for path in plan["inputs"]) if plan["inputs"] else None
    found = Measurements(
        device=_checked_device(value["device"]),
        plan=Plan(**plan),
        descriptions=tuple(_description(graph) for graph in value["graphs"]),
        measurements=[_measurement(measurement) for measurement in value["measurements"]],
        interrupted=bool(value["interrupted"]),
        failure=value["failure"],
        warnings=[str(warning) for warning in value["warnings"]],
        exports=tuple(value["exports"]),
    )
    if not len(found.plan.graphs) == len(found.descriptions) == len(found.exports):
        raise ValueError("numbers of graphs, descriptions and exports differ")
    for measurement in found.measurements:
        if not 0 <= measurement.graph < len(found.descriptions):
            raise ValueError(f"a measurement of graph {measurement.graph}, which is not there")
    return found


def _checked_device(device: dict[str, Any]) -> dict[str, Any]:
    for key in ("kind", "name", "runtime", "date"):
        if not isinstance(device[key], str):
            raise TypeError(f"device.{key} is no text")
    if not isinstance(device["headline"], list) or not all(isinstance(line, str) for line in device["headline"]):
        raise TypeError("device.headline is no list of texts")
    return device


def _description(value: Mapping[str, Any]) -> Description:
    def tensors(name: str) -> tuple[Tensor, ...]:
        return tuple(Tensor(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in value[name])

    signatures = tuple(
        Signature(entry["key"], tuple(entry["inputs"]), tuple(entry["outputs"])) for entry in value["signatures"]
    )
    known = {
        **value,
        "inputs": tensors("inputs"),
        "outputs": tensors("outputs"),
        "signatures": signatures,
        "custom_ops": tuple(value["custom_ops"]),
        "flex_ops": tuple(value["flex_ops"]),
    }
    return Description(**known)


def _measurement(value: Mapping[str, Any]) -> Measurement:
    names = {field.name for field in dataclasses.fields(Measurement)}
    known = {name: entry for name, entry in value.items() if name in names}  # the others follow from these
    known["rounds"] = [list(latencies) for latencies in value["rounds"]]
    known["round_statistics"] = [Statistics(**statistics) for statistics in value["round_statistics"]]
    known["delegation"] = Delegation(**value["delegation"]) if value["delegation"] else None
    if profile := value["profile"]:
        known["profile"] = Profile(
            profile["runs"],
            profile["invoke_seconds"],
            profile["unattributed_seconds"],
            tuple(Node(**node) for node in profile["nodes"]),
            profile["all_runs"],
        )
    return Measurement(**known)


def read_export(description: Description) -> dict[str, Any] | None:
    """What the JSON beside an exported file says of it, as far as reports use it; None without one.

    Returns:
        `format`, `target`, `tokens`, `model` where the export knows them, and with labelled images `top1` (a share in
        [0, 1]) and `images`, their number. Only if the JSON is of this very file, by its SHA-256.
    """
    try:
        value = files.read_json(Path(description.path).with_suffix(".json"))
    except (UserError, OSError):
        return None
    if not isinstance(value, dict) or value.get("sha256") != description.sha256:
        return None
    export = {key: value[key] for key in _EXPORT_KEYS if value.get(key) is not None}
    verification = value.get("verification")
    if isinstance(verification, dict) and isinstance(verification.get("file_top1"), float):
        export |= {"top1": verification["file_top1"], "images": verification["images"]}
    return export

"""Measurements as text, JSON and a picture."""

from pathlib import Path

import numpy as np

from mobiatt_tf import files
from tflite import measurements, results
from tflite.inspect import format_delegation
from tflite.measurements import Delegation, Measurement, Measurements

_MIB = 1024 * 1024
_TOP = 10


def write(found: Measurements, directory: Path) -> list[Path]:
    """Writes benchmark.json and benchmark.png, each whole or not at all, and returns their paths.

    Raises:
        UserError: the directory cannot be written or the disk is full.
    """
    values, picture = directory / "benchmark.json", directory / "benchmark.png"
    files.write_json(values, results.to_json(found))
    with files.atomic_path(picture) as temporary:
        draw(found, temporary)
    return [values, picture]


def format_table(found: Measurements) -> str:
    """The whole report as fixed-width text."""
    lines = [*found.device["headline"], *(f"note: {warning}" for warning in found.warnings)]
    if found.interrupted:
        complete = min(len(measurement.round_latencies) for measurement in found.measurements)
        lines.append(f"INTERRUPTED after {complete} of {len(found.plan.rounds)} rounds: these results are partial.")
    lines += ["", *_graph_lines(found), "", *_latency_lines(found)]
    for measurement in found.measurements:
        lines += ["", *_profile_lines(measurement)] if measurement.profile or measurement.profile_error else []
    return "\n".join(lines)


def _graph_lines(found: Measurements) -> list[str]:
    width = _label_width(found)
    here = "" if found.device["kind"] == "host" else " (on this computer)"
    lines = [f"{'graph':<{width}} {'MB':>8} {'nodes':>6}  delegation{here}"]
    for label, description in zip(found.plan.labels, found.descriptions, strict=True):
        lines.append(
            f"{label:<{width}} {description.size_bytes / 1e6:>8.2f} {description.nodes:>6}  "
            f"{format_delegation(description)}{_undelegated(description.undelegated_ops)}"
        )
    for measurement in found.measurements:
        if measurement.delegation:
            lines.append(f"{title(measurement)}: {_device_delegation(measurement.delegation)}")
    return lines


def _device_delegation(delegation: Delegation) -> str:
    """One phrase on what the device's delegate took."""
    if delegation.delegated_nodes is None:
        return f"{delegation.delegate}, nodes unknown"
    nodes = "" if delegation.nodes is None else f" of {delegation.nodes}"
    partitions = "" if delegation.partitions is None else f" in {delegation.partitions} partition(s)"
    return f"{delegation.delegated_nodes}{nodes} nodes on the device's {delegation.delegate}{partitions}"


def title(measurement: Measurement) -> str:
    """The graph's name, threads and backend, as tables and pictures head them."""
    return f"{measurement.label}, {measurement.num_threads} thread(s), {measurement.backend}"


def _undelegated(ops: dict[str, int] | None) -> str:
    return "; not delegated: " + ", ".join(f"{count} {name}" for name, count in ops.items()) if ops else ""


def _latency_lines(found: Measurements) -> list[str]:
    width = _label_width(found)
    columns = {"backend": 7, "threads": 7, "runs": 5, "min": 9, "median": 9, "p90": 9, "mean": 9, "ratio": 6}
    columns |= {"(rounds)": 13, "load": 9, "first": 9, "peak MiB": 9, "model": 8}
    lines = [
        "latency in ms; ratio to the first graph, median and range over rounds; peak: resident size of the process",
        "that holds this model alone, model: the part of it above the size before loading",
        *_latency_notes(found),
        f"{'graph':<{width}} " + " ".join(f"{head:>{size}}" for head, size in columns.items()),
    ]
    for measurement in found.measurements:
        cells = _latency_cells(measurement, found)
        lines.append(
            f"{measurement.label:<{width}} "
            + " ".join(f"{cell:>{size}}" for cell, size in zip(cells, columns.values(), strict=True))
        )
    return lines


def _latency_notes(found: Measurements) -> list[str]:
    """What else a reader must know of the figures of such a device."""
    notes = []
    if any(measurement.round_statistics for measurement in found.measurements):
        notes.append("the device reports a summary of each round: the median is that of the rounds' medians, no p90")
    most = max((measurement.invocations_per_latency for measurement in found.measurements), default=1)
    if most > 1:
        notes.append(f"its clock is coarse: a latency is the mean of up to {most} invocations")
    errors = [one.output_error for one in found.measurements if one.output_error is not None]
    if errors:
        notes.append(f"its outputs differ from this computer's by at most {max(errors):.1e} of their largest value")
    return notes


def _latency_cells(measurement: Measurement, found: Measurements) -> list[str]:
    statistics = measurement.statistics
    relative = measurements.ratio(measurement, measurements.reference_of(found, measurement))
    times = (
        [
            "-" if value is None else f"{value * 1e3:.3f}"
            for value in (statistics.min, statistics.median, statistics.p90, statistics.mean)
        ]
        if statistics
        else ["-"] * 4
    )
    return [
        measurement.backend,
        str(measurement.num_threads),
        str(statistics.runs if statistics else 0),
        *times,
        f"{relative.median:.3f}" if relative else "-",
        f"{relative.min:.3f}-{relative.max:.3f}" if relative else "-",
        f"{measurement.load_seconds * 1e3:.2f}",
        f"{measurement.first_run_seconds * 1e3:.2f}",
        f"{measurement.peak_bytes / _MIB:.1f}" if measurement.peak_bytes is not None else "-",
        f"{measurement.model_bytes / _MIB:.1f}" if measurement.model_bytes is not None else "-",
    ]


def _profile_lines(measurement: Measurement) -> list[str]:
    name = title(measurement)
    profile = measurement.profile
    if profile is None:
        return [f"{name}: {measurement.profile_error}"]
    total = profile.invoke_seconds

    def line(text: str, count: str, seconds: float) -> str:
        return f"  {text:<60} {count:>6} {seconds * 1e3:>10.4f} {seconds / total:>8.1%}"

    chosen = f"all {profile.runs}" if profile.all_runs else f"the faster half ({profile.runs}) of the"
    lines = [
        f"{name}: operators by type, mean of {chosen} profiled runs",
        "  (recording slows them; times are whole microseconds rounded down, and the rest is not attributed)",
        *_profile_doubts(measurement),
        f"  {'operator':<60} {'nodes':>6} {'ms':>10} {'share':>8}",
    ]
    types = list(profile.by_type().items())
    lines += [line(op, str(count), seconds) for op, (count, seconds) in types[:_TOP]]
    if rest := types[_TOP:]:
        lines.append(
            line(
                f"{len(rest)} other types",
                str(sum(count for _, (count, _) in rest)),
                sum(seconds for _, (_, seconds) in rest),
            )
        )
    lines.append(line("(not attributed)", "", profile.unattributed_seconds))
    lines.append(line("invocation", str(len(profile.nodes)), total))
    lines.append("  slowest nodes")
    for node in profile.slowest(_TOP):
        if node.seconds > 0:
            kind = "node" if node.where == "builtin" else "operator"
            lines.append(line(f"{node.op}, {node.where} {kind} {node.index}", "", node.seconds))
    return lines


def is_doubtful(measurement: Measurement) -> bool:
    """Whether the profile says little about the latency: recording, or what no operator accounts for, dominates it."""
    profile, statistics = measurement.profile, measurement.statistics
    if profile is None or statistics is None:
        return False
    slowed = profile.invoke_seconds > 1.5 * statistics.typical
    return slowed or profile.unattributed_seconds > 0.5 * profile.invoke_seconds


def _profile_doubts(measurement: Measurement) -> list[str]:
    """A warning where `is_doubtful`."""
    if not is_doubtful(measurement):
        return []
    assert measurement.profile is not None
    assert measurement.statistics is not None
    invoke, unattributed = measurement.profile.invoke_seconds, measurement.profile.unattributed_seconds
    median = measurement.statistics.typical
    return [
        f"  NOT REPRESENTATIVE: a profiled invocation takes {invoke * 1e3:.3f} ms, a plain one {median * 1e3:.3f} ms, "
        f"and {unattributed / invoke:.0%} is not attributed"
    ]


def _label_width(found: Measurements) -> int:
    return max(len("graph"), *(len(label) for label in found.plan.labels))


def draw(found: Measurements, path: Path) -> None:
    """Draws latency distributions and, for each graph that has a profile, its slowest operator types, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    profiled = [
        measurement
        for measurement in found.measurements
        if measurement.profile and measurement.num_threads == found.plan.num_threads[0]
    ]
    measured = [measurement for measurement in found.measurements if measurement.statistics]
    heights = [1.2 + 0.4 * len(measured)] + [3.2] * len(profiled)
    figure = Figure(figsize=(10, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    # A device that reports only summaries of its rounds is drawn by the rounds' medians.
    milliseconds = [
        [latency * 1e3 for latency in measurement.latencies or measurement.round_latencies] for measurement in measured
    ]
    axes[0].boxplot(milliseconds, orientation="horizontal", widths=0.6, flierprops={"markersize": 3})
    # A few runs that the system interrupted would flatten every box: they are counted in words instead of drawn.
    right = 1.5 * max(float(np.percentile(latencies, 90)) for latencies in milliseconds)
    beyond = [sum(latency > right for latency in latencies) for latencies in milliseconds]
    axes[0].set_yticks(
        range(1, len(measured) + 1),
        [
            title(measurement) + (f"\n({count} runs beyond)" if count else "")
            for measurement, count in zip(measured, beyond, strict=True)
        ],
    )
    axes[0].invert_yaxis()
    axes[0].set_xlim(0, right)
    axes[0].set_xlabel("latency in ms (box: quartiles, whiskers: 1.5 times their range)")
    axes[0].set_title("INTERRUPTED, partial results" if found.interrupted else "latency")
    for axis, measurement in zip(axes[1:], profiled, strict=True):
        assert measurement.profile is not None
        types = list(measurement.profile.by_type().items())[:_TOP]
        axis.barh([f"{op} ({count})" for op, (count, _) in types], [seconds * 1e3 for _, (_, seconds) in types])
        axis.invert_yaxis()
        axis.set_xlabel("ms per profiled invocation")
        doubts = " (NOT REPRESENTATIVE, see the table)" if _profile_doubts(measurement) else ""
        axis.set_title(f"{title(measurement)}: operators by type{doubts}")
    device = found.device
    figure.suptitle(f"{device['name']}, {device['runtime']}, {device['date']}", fontsize=9)
    # A phone's name and a file's are plain text: a "$" in them begins no formula.
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    figure.savefig(path, dpi=120)

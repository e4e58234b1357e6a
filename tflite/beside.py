"""Two results of the same graphs beside each other: a phone and this computer, or today and an earlier day."""

from dataclasses import dataclass

from tflite.measurements import Measurement, Measurements

# What two devices of one kind may differ in without looking different in the table.
_COMPARED = (
    "name",
    "serial",
    "fingerprint",
    "os",
    "browser",
    "runtime",
    "governor",
    "gpu_precision",
    "taskset",
    "emulated",
)


@dataclass(frozen=True)
class Pair:
    """A measurement and the other result's of the same graph; `same_file`: their SHA-256 are equal."""

    own: Measurement
    other: Measurement
    same_file: bool

    @property
    def ratio(self) -> float | None:
        """The typical latency as a multiple of the other's; None where one of them has none."""
        own, other = self.own.statistics, self.other.statistics
        return own.typical / other.typical if own and other else None


def pairs(found: Measurements, other: Measurements) -> list[Pair]:
    """Joins two results: by the file's SHA-256, else by its label; at equal threads; by backend where both have it.

    A backend that the other result does not have (a browser's WASM beside this computer) meets the other's only one.
    """
    joined = []
    for own in found.measurements:
        checksum = found.descriptions[own.graph].sha256
        same_threads = [one for one in other.measurements if one.num_threads == own.num_threads]
        same_file = [one for one in same_threads if other.descriptions[one.graph].sha256 == checksum]
        candidates = same_file or [one for one in same_threads if one.label == own.label]
        backends = {one.backend for one in candidates}
        if own.backend in backends:
            candidates = [one for one in candidates if one.backend == own.backend]
        elif len(backends) > 1:
            continue
        if candidates:
            joined.append(Pair(own, candidates[0], bool(same_file)))
    return joined


def format_beside(found: Measurements, other: Measurements, own_name: str, other_name: str) -> str:
    """A table of the pairs, with what makes them hard to compare said above it.

    Args:
        found: the result in question.
        other: what it is compared with.
        own_name: how the table calls the first: "phone", "now".
        other_name: how it calls the second: "this computer", "old.json".
    """
    joined = pairs(found, other)
    lines = [
        f"{own_name} beside {other_name}: typical latency in ms (median, or mean where there is no median)",
        *(f"  {own_name}: {line}" for line in found.device["headline"]),
        *(f"  {other_name}: {line}" for line in other.device["headline"]),
    ]
    lines += [f"  note: {doubt}" for doubt in _doubts(found, other, other_name)]
    if not joined:
        return "\n".join([*lines, "  no graph, or no thread count, is in both"])
    width = max(len("graph"), *(len(_name(pair)) for pair in joined))
    lines.append(f"{'graph':<{width}} {'backend':>15} {'threads':>7} {own_name:>15} {other_name:>15} {'ratio':>7}")
    for pair in joined:
        backends = pair.own.backend if pair.own.backend == pair.other.backend else _both_backends(pair)
        times = [one.statistics.typical * 1e3 if one.statistics else None for one in (pair.own, pair.other)]
        cells = ["-" if time is None else f"{time:.3f}" for time in times]
        ratio = "-" if pair.ratio is None else f"{pair.ratio:.3f}"
        lines.append(
            f"{_name(pair):<{width}} {backends:>15} {pair.own.num_threads:>7} {cells[0]:>15} {cells[1]:>15} {ratio:>7}"
        )
    return "\n".join(lines)


def _name(pair: Pair) -> str:
    return pair.own.label if pair.same_file else f"{pair.own.label} (another file)"


def _both_backends(pair: Pair) -> str:
    return f"{pair.own.backend}, {pair.other.backend}"


def _doubts(found: Measurements, other: Measurements, other_name: str) -> list[str]:
    doubts = []
    if found.device["kind"] == other.device["kind"]:
        for key in _COMPARED:
            own, others = found.device.get(key), other.device.get(key)
            if own != others:
                doubts.append(f"another {key}: {other_name} has {others or 'none'}, now {own or 'none'}")
    if other.interrupted:
        doubts.append(f"{other_name} was interrupted: its results are partial")
    return doubts

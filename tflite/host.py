"""Measures on this machine, through ai-edge-litert's interpreter with XNNPACK."""

import contextlib
import datetime
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from mobiatt_tf.errors import UserError
from mobiatt_tf.machine import cpu_name, usable_cores
from tflite import results
from tflite.inspect import describe
from tflite.measurements import Measurement, Measurements, Node, Plan, Profile
from tflite.process import Worker
from tflite.turns import in_turns, progress

_PROFILE_TIMEOUT_SECONDS = 600
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


class HostDevice:
    """This machine. Implements `tflite.measurements.Device`."""

    def run(self, plan: Plan) -> Measurements:
        """Measures every graph at every thread count, each in a process of its own.

        All processes are loaded first; the rounds then go over them in turn, starting with another one each time, so
        that drift of the machine (heat, other loads) meets all alike. A process that waits for its turn sleeps.
        """
        for file in plan.inputs or ():
            if not file.is_file():
                raise UserError(f"There is no input file {file}.")
        descriptions = tuple(describe(graph, max(plan.num_threads)) for graph in plan.graphs)
        found = Measurements(
            device=describe_host(),
            plan=plan,
            descriptions=descriptions,
            measurements=[],
            exports=tuple(results.read_export(description) for description in descriptions),
        )
        for description in found.descriptions:
            if description.delegate_partitions is None:
                raise UserError(f"{description.path} cannot run here: {description.undelegated_reason}.")
        with contextlib.ExitStack() as stack:
            try:
                workers = [
                    self._load(stack, plan, graph, threads, found)
                    for threads in plan.num_threads
                    for graph in range(len(plan.graphs))
                ]
                self._measure(plan, found, workers)
                stack.close()  # the profiled processes get the machine to themselves
                if plan.profile:
                    for measurement in progress(found.measurements, "profile"):
                        self._profile(plan, measurement)
            except KeyboardInterrupt:
                if not any(measurement.rounds for measurement in found.measurements):
                    raise
                found.interrupted = True
        return found

    def _load(self, stack: contextlib.ExitStack, plan: Plan, graph: int, threads: int, found: Measurements) -> Worker:
        path = plan.graphs[graph]
        worker = stack.enter_context(Worker(str(path)))
        loaded = worker.request(
            "load",
            path=str(path.absolute()),
            num_threads=threads,
            inputs=[str(file.absolute()) for file in plan.inputs] if plan.inputs else None,
            seed=plan.seed,
        )
        worker.request("invoke", unrecorded=plan.warmup, recorded=0)
        found.measurements.append(Measurement(graph, plan.labels[graph], threads, **loaded))
        return worker

    def _measure(self, plan: Plan, found: Measurements, workers: list[Worker]) -> None:
        turns = list(zip(workers, found.measurements, strict=True))
        for runs, (worker, measurement), _ in in_turns(plan, turns):
            measurement.rounds.append(worker.request("invoke", unrecorded=1, recorded=runs))
            measurement.peak_bytes = worker.request("peak")

    def _profile(self, plan: Plan, measurement: Measurement) -> None:
        path = plan.graphs[measurement.graph]
        try:
            with Worker(f"per-operator profile not available with ai-edge-litert {_litert_version()}") as worker:
                value = worker.request(
                    "profile",
                    timeout_seconds=_PROFILE_TIMEOUT_SECONDS,
                    path=str(path.absolute()),
                    num_threads=measurement.num_threads,
                    runs=plan.profile_runs,
                    warmup=plan.warmup,
                    files=[str(file.absolute()) for file in plan.inputs] if plan.inputs else None,
                    seed=plan.seed,
                )
        except UserError as error:  # the latencies stand without it
            measurement.profile_error = str(error)
            return
        nodes = tuple(Node(**node) for node in value.pop("nodes"))
        measurement.profile = Profile(**value, nodes=nodes)


def _litert_version() -> str:
    return metadata.version("ai-edge-litert")


def describe_host() -> dict[str, Any]:
    """What a reader needs to know about this machine to judge the figures; None where the system does not say."""
    governor = None
    with contextlib.suppress(OSError):
        governor = _GOVERNOR.read_text().strip()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    runtime = f"ai-edge-litert {_litert_version()}"
    return {
        "kind": "host",
        "name": cpu_name(),
        "cpu": cpu_name(),
        "logical_cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "governor": governor,
        "load_average_1_minute": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "ai_edge_litert": _litert_version(),
        "delegate": "XNNPACK",
        "runtime": runtime,
        "date": date,
        "headline": [
            f"{cpu_name()}, {usable_cores()} of {os.cpu_count()} cores usable, governor {governor or 'unknown'}, "
            f"{platform.platform()}",
            f"{runtime}, XNNPACK, python {platform.python_version()}, {date}",
        ],
    }

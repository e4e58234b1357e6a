"""Measures on a phone, through adb and Google's benchmark_model."""

import functools
import re
import signal
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tqdm import tqdm

from mobiatt_tf import files
from mobiatt_tf.errors import UserError
from tflite import results
from tflite.adb import native
from tflite.adb.binary import check_abi, find_binary
from tflite.adb.client import Adb, LostPhoneError, find_adb
from tflite.adb.cooling import Cooling
from tflite.adb.phone import (
    abis_of,
    describe_phone,
    doubts,
    phone_cores,
    phone_properties,
    phone_state,
    with_unknown_precision,
)
from tflite.adb.storage import PhoneStorage
from tflite.inspect import describe
from tflite.measurements import Measurement, Measurements, Plan
from tflite.process import signal_name
from tflite.turns import in_turns, progress

_LOAD_SECONDS = 300.0  # the limit for one load and two invocations
_SPARE_SECONDS = 60.0  # to every limit
_PATIENCE = 20  # a process may take this many times what the first one lets expect


@dataclass(frozen=True)
class AdbDevice:
    """A phone. Implements `tflite.measurements.Device`.

    Attributes:
        serial: which phone; None: the only one.
        adb: the adb program; None: that on PATH.
        benchmark_binary: Google's benchmark_model; None: see `tflite.adb.binary.find_binary`.
        taskset: mask of the cores to use, in hexadecimal.
        backend: "XNNPACK", "GPU" or "CPU".
        max_cooldown_seconds: how long to wait for a hot phone at a time.
        clean: leave nothing on the phone, not even verified files for the next time.
    """

    serial: str | None = None
    adb: str | None = None
    benchmark_binary: str | None = None
    taskset: str | None = None
    backend: str = "XNNPACK"
    max_cooldown_seconds: float = 600.0
    clean: bool = False

    def run(self, plan: Plan) -> Measurements:
        """Measures every graph at every thread count, each round in a process of its own on the phone.

        The rounds go over graphs and thread counts in turn, starting with another one each time, so that drift of the
        phone meets all alike. A round counts only if the phone did not throttle before and after it.
        """
        self._check(plan)
        descriptions = tuple(describe(graph, max(plan.num_threads)) for graph in plan.graphs)
        with _sigterm_as_exit():
            adb = Adb.connect(find_adb(self.adb), self.serial)
            abis = abis_of(phone_properties(adb))
            binary = find_binary(self.benchmark_binary, abis)
            check_abi(binary, abis)
            self._check_taskset(phone_cores(adb))
            with PhoneStorage(adb, self.clean) as storage:
                remote = storage.provide([binary, *plan.graphs])
                cooling = Cooling(adb, phone_state(adb), self.max_cooldown_seconds)
                with progress([], "cool") as bar:
                    start = cooling.wait(bar)
                runtime = f"benchmark_model {files.sha256(binary)[:12]}"
                device = describe_phone(adb, start, runtime=runtime, backend=self.backend, taskset=self.taskset)
                found = Measurements(
                    device=device,
                    plan=plan,
                    descriptions=descriptions,
                    measurements=[],
                    warnings=doubts(device, start),
                    exports=tuple(results.read_export(description) for description in descriptions),
                )
                runner = _Runner(storage, remote, remote[binary], self.taskset, self.backend, plan)
                _measure_all(runner, cooling, found)
        return found

    def _check(self, plan: Plan) -> None:
        if plan.inputs:
            raise UserError("--input is not read with --device=adb: benchmark_model draws random inputs itself.")
        if self.taskset is not None and not re.fullmatch(r"(0x)?0*[1-9a-fA-F][0-9a-fA-F]*", self.taskset):
            raise UserError(
                f"--taskset={self.taskset} is no mask of cores: give it in hexadecimal, as in f0 for cores 4 to 7."
            )
        if not 0 <= self.max_cooldown_seconds < float("inf"):
            raise UserError(f"--max_cooldown_seconds={self.max_cooldown_seconds}: it must be 0 or more.")

    def _check_taskset(self, cores: int | None) -> None:
        if self.taskset is not None and cores is not None and int(self.taskset, 16) >= 1 << cores:
            raise UserError(f"--taskset={self.taskset} names cores that the phone lacks: it has {cores}.")


@dataclass(frozen=True)
class _Runner:
    """Runs benchmark_model on the phone."""

    storage: PhoneStorage
    remote: dict[Path, str]
    binary: str
    taskset: str | None
    backend: str
    plan: Plan

    def report(
        self, graph: int, threads: int, runs: int, warmup: int, expected_seconds: float, **options: bool
    ) -> native.Report:
        """Of one process.

        Args:
            graph: index into the plan's graphs.
            threads: threads.
            runs: recorded invocations.
            warmup: unrecorded ones.
            expected_seconds: how long all of it takes; it is given up after `_PATIENCE` times that.
            options: of `native.arguments`.

        Raises:
            LostPhoneError: the phone went away, or it takes far longer than expected.
            UserError: the model does not run there.
        """
        path = self.plan.graphs[graph]
        limit = _SPARE_SECONDS + _PATIENCE * expected_seconds
        flags = native.arguments(
            self.remote[path],
            threads=threads,
            runs=runs,
            warmup=warmup,
            backend=self.backend,
            seconds=limit,
            **options,
        )
        prefix = ["taskset", self.taskset.removeprefix("0x")] if self.taskset else []
        what = f"benchmark_model with {path}, {threads} thread(s) and {warmup} + {runs} runs"
        output = self.storage.execute([*prefix, self.binary, *flags], limit + _SPARE_SECONDS, what)
        if output.status != 0:
            raise UserError(
                f"{path} does not run on the phone: {_failure(output.status)}. {native.last_words(output.text)}"
            )
        try:
            report = native.parse(output.text)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        if self.backend != "XNNPACK" and {"use_xnnpack", "use_gpu"} & set(report.ignored):
            raise UserError(
                f"This benchmark_model lacks the switch for the backend {self.backend}. Take another build."
            )
        if report.runs.runs != runs:
            raise UserError(f"{path}: only {report.runs.runs} of {runs} runs ended within {limit:.0f} s.")
        return report


def _measure_all(runner: _Runner, cooling: Cooling, found: Measurements) -> None:
    """Fills in the measurements. Ctrl-C and a phone that goes away keep the rounds so far."""
    plan = found.plan
    turns = [(graph, threads) for threads in plan.num_threads for graph in range(len(plan.graphs))]
    try:
        for graph, threads in (bar := progress(turns, "load")):
            found.measurements.append(_load(runner, cooling, graph, threads, found, bar))
        _measure_rounds(runner, cooling, found)
        if plan.profile:
            for measurement in (bar := progress(found.measurements, "profile")):
                _profile(runner, cooling, measurement, bar)
    except (KeyboardInterrupt, LostPhoneError) as error:
        if not any(measurement.round_statistics for measurement in found.measurements):
            raise
        found.interrupted = True
        found.failure = str(error) or None
    found.warnings += cooling.warnings()


def _name(measurement: Measurement) -> str:
    return f"{measurement.label}, {measurement.num_threads} thread(s)"


def _load(
    runner: _Runner, cooling: Cooling, graph: int, threads: int, found: Measurements, bar: "tqdm[Any]"
) -> Measurement:
    """Runs the model once: memory, and what the delegate takes."""
    label = found.plan.labels[graph]
    report = cooling.measure(
        label, functools.partial(runner.report, graph, threads, 1, 1, _LOAD_SECONDS / _PATIENCE, memory=True), bar
    )
    if runner.backend == "GPU" and native.GPU_PRECISION_FLAG in report.ignored:
        found.device = with_unknown_precision(found.device)
    taken = report.delegation(runner.backend)
    if runner.backend == "GPU" and (taken is None or taken.delegated_nodes == 0):
        raise UserError(f"{found.plan.graphs[graph]}: the phone's GPU delegate took no operator. Leave out --use_gpu.")
    if runner.backend == "XNNPACK" and taken is None:
        found.warnings.append(f"{label}: benchmark_model did not say that XNNPACK took any operator.")
    return Measurement(
        graph,
        label,
        threads,
        load_seconds=report.load_seconds,
        first_run_seconds=report.first_run_seconds,
        backend=runner.backend,
        peak_bytes=report.peak_bytes,
        baseline_bytes=(
            max(0, report.peak_bytes - report.growth_bytes)
            if report.peak_bytes is not None and report.growth_bytes is not None
            else None
        ),
        delegation=taken,
    )


def _measure_rounds(runner: _Runner, cooling: Cooling, found: Measurements) -> None:
    plan, turns = found.plan, found.measurements
    reports: dict[int, list[native.Report]] = {id(measurement): [] for measurement in turns}
    for runs, measurement, bar in in_turns(plan, turns):
        report = cooling.measure(_name(measurement), _once(runner, measurement, runs), bar)
        try:
            measurement.round_statistics.append(native.quotable(report.runs))
        except UserError as error:
            raise UserError(f"{plan.graphs[measurement.graph]}: {error}") from None
        # Each round is a process that loads the model anew, without the watch over memory of the first.
        own = reports[id(measurement)]
        own.append(report)
        measurement.load_seconds = statistics.median(one.load_seconds for one in own)
        measurement.first_run_seconds = statistics.median(one.first_run_seconds for one in own)


def _once(runner: _Runner, measurement: Measurement, runs: int, **options: bool) -> Callable[[], native.Report]:
    """One process, of which the first one lets expect how long it takes."""
    warmup = runner.plan.warmup
    expected = measurement.load_seconds + (runs + warmup) * measurement.first_run_seconds
    return functools.partial(
        runner.report, measurement.graph, measurement.num_threads, runs, warmup, expected, **options
    )


def _profile(runner: _Runner, cooling: Cooling, measurement: Measurement, bar: "tqdm[Any]") -> None:
    once = _once(runner, measurement, runner.plan.profile_runs, profile=True)
    report = cooling.measure(_name(measurement), once, bar)
    measurement.profile = report.profile
    if report.profile is None:
        measurement.profile_error = "benchmark_model printed no per-operator profile, or a total of 0"


def _failure(status: int) -> str:
    """What an exit status of the phone's shell means."""
    if status > 128:
        return f"ended by {signal_name(status - 128)}"
    return {126: "benchmark_model may not be executed there", 127: "a program is missing there"}.get(
        status, f"benchmark_model ended with status {status}"
    )


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """SIGTERM leaves through all `with` blocks, which tidy up the phone, with the shell's status 143."""

    def leave(number: int, _: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    except SystemExit:
        print("SIGTERM: the phone is tidied up, and nothing is written.", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)

"""Measures .tflite files: latency, memory, time per operator, delegation.

python -m tflite.benchmark --graph=A.tflite[,B.tflite] --num_threads=1,2 --runs=50 --output_dir=runs/benchmark
python -m tflite.benchmark --device=adb --benchmark_binary=PATH --graph=A.tflite
python -m tflite.benchmark --device=browser --graph=A.tflite

Several graphs and thread counts are measured in turns; ratios refer to the first graph of the same command.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from mobiatt_tf import cli, files
from mobiatt_tf.errors import UserError
from tflite import adb, browser, results, summary
from tflite.beside import format_beside
from tflite.host import HostDevice
from tflite.measurements import Device, Measurements, Plan

# From the flags to a device. Each package says of itself what it needs.
_HOST = "host.json"  # beside a phone's benchmark.json

DEVICES: dict[str, Callable[[], Device]] = {"host": HostDevice, "adb": adb.from_flags, "browser": browser.from_flags}


def benchmark(plan: Plan, device: Device) -> Measurements:
    """Runs the plan on the device.

    Raises:
        UserError: a file is missing or damaged, or does not run on the device.
    """
    return device.run(plan)


def define_flags() -> None:
    """The command line's flags; a function, because several commands share their names."""
    flags.DEFINE_list("graph", [], "The .tflite files; ratios refer to the first.")
    flags.DEFINE_list("num_threads", ["1"], "Thread counts; every graph is measured with each.")
    flags.DEFINE_integer("runs", 50, "Recorded runs per graph and thread count.")
    flags.DEFINE_integer("warmup", 10, "Unrecorded runs before them.")
    flags.DEFINE_integer("runs_per_round", 10, "Recorded runs before the next graph's turn.")
    flags.DEFINE_float("cooldown_seconds", 0.0, "Pause after each round.")
    flags.DEFINE_bool("profile", True, "Also record time per operator.")
    flags.DEFINE_integer("profile_runs", 20, "Profiled runs; the time per operator averages the faster half.")
    flags.DEFINE_list("input", [], "The inputs as .npy files, in the model's order; random ones if not given.")
    flags.DEFINE_integer("seed", 0, "Seed of the random inputs.")
    flags.DEFINE_string("device", "host", f"Where to measure: {', '.join(DEVICES)}.")
    flags.DEFINE_bool("beside_host", True, "Also measure on this computer, for a table beside the phone's figures.")
    flags.DEFINE_string("compare", None, "An earlier benchmark.json to print the results beside.")
    flags.DEFINE_string("output_dir", "runs/benchmark", "Directory for benchmark.json and benchmark.png.")
    adb.define_flags()
    browser.define_flags()


def plan_from_flags() -> Plan:
    """The plan that the flags describe.

    Raises:
        UserError: a flag's value is not allowed.
    """
    values = flags.FLAGS
    try:
        threads = tuple(int(count) for count in values.num_threads)
    except ValueError:
        given = ",".join(values.num_threads)
        raise UserError(f"--num_threads={given} is not a list of numbers; give it as in --num_threads=1,2.") from None
    try:
        return Plan(
            graphs=tuple(files.user_path(path) for path in values.graph),
            num_threads=threads,
            runs=values.runs,
            warmup=values.warmup,
            runs_per_round=values.runs_per_round,
            cooldown_seconds=values.cooldown_seconds,
            profile=values.profile,
            profile_runs=values.profile_runs,
            inputs=tuple(files.user_path(path) for path in values.input) or None,
            seed=values.seed,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def main(argv: Sequence[str]) -> None:
    name = flags.FLAGS.device
    if name not in DEVICES:
        raise UserError(f"--device={name} is unknown; allowed: {', '.join(DEVICES)}.")
    compare = flags.FLAGS.compare
    earlier = results.load(files.user_path(compare)) if compare else None  # before the minutes of measuring
    plan, directory = plan_from_flags(), files.user_path(flags.FLAGS.output_dir)
    found = benchmark(plan, DEVICES[name]())
    print(summary.format_table(found), flush=True)
    written = summary.write(found, directory)
    beside = directory / _HOST
    beside.unlink(missing_ok=True)  # an earlier run's would be taken for this one's
    host = None
    if not found.interrupted and name != "host" and flags.FLAGS.beside_host:
        host = HostDevice().run(dataclasses.replace(plan, profile=False))
        print("\n" + format_beside(found, host, found.device["kind"], "host"), flush=True)
        files.write_json(beside, results.to_json(host))
        written.append(beside)
    if earlier:
        print("\n" + format_beside(found, earlier, "now", Path(compare).name), flush=True)
    print("\nwritten: " + ", ".join(str(path) for path in written), flush=True)
    if found.failure:
        raise UserError(found.failure)
    if found.interrupted or (host and host.interrupted):
        raise KeyboardInterrupt


if __name__ == "__main__":
    define_flags()
    cli.run(main)

"""The claim, tested: top-1 of one small DeiT with softmax, linear and Mobile-Attention over the channels of a head.

PYTHONPATH=. python benchmarks/accuracy.py --workers=2

Every network gets the same parameters, epochs, order of the data and learning rate, which is tuned for none of them;
the seed chooses weights and order, so networks are compared seed by seed. Each run is a directory under --output_dir:
finished ones are read, unfinished ones go on from their last checkpoint, so Ctrl-C costs nothing and the same command
goes on. Writes accuracy.json, accuracy.png and Markdown tables, of the runs that are finished. `--render` only rewrites
the tables in docs/accuracy.md from docs/accuracy.json.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from benchmarks.accuracy_run import BUDGETS
from mobiatt_tf import cli, files
from mobiatt_tf.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DATASETS = ("fashion_mnist", "mnist_sample")
# (attention, channels of a head); the last row shows what so narrow heads cost linear attention.
NETWORKS = (
    ("softmax", 16),
    ("linear", 16),
    *(("mobile", head_dim) for head_dim in (32, 16, 8, 4, 2)),
    ("linear", 2),
)
_FIRST = 7  # rows whose runs come before those of the rest
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Run:
    """One training run."""

    dataset: str
    attention: str
    head_dim: int
    seed: int

    @property
    def network(self) -> str:
        """Such as "mobile_d8"."""
        return f"{self.attention}_d{self.head_dim}"

    def directory(self, output: Path) -> Path:
        """Where the run is under `output`."""
        return output / self.dataset / self.network / f"seed{self.seed}"


def planned(datasets: Sequence[str], networks: Sequence[tuple[str, int]], seeds: int) -> list[Run]:
    """All runs in the order they are done: seed by seed, so that a sweep that is cut short compares equals."""
    first = [network for network in networks if network in NETWORKS[:_FIRST]]
    rest = [network for network in networks if network not in first]
    return [
        Run(dataset, attention, head_dim, seed)
        for part in (first, rest)
        for seed in range(seeds)
        for dataset in datasets
        for attention, head_dim in part
    ]


def budget(dataset: str, overrides: dict[str, int]) -> dict[str, Any]:
    """The fields of the recipe that a run on `dataset` must have."""
    return {**BUDGETS[dataset], **{name: overrides[name] for name in ("epochs", "batch_size") if name in overrides}}


def finished(run: Run, output: Path, overrides: dict[str, int]) -> dict[str, Any] | None:
    """The results of a run that is complete, else None.

    Raises:
        UserError: the directory holds a finished run of another budget.
    """
    file = run.directory(output) / "results.json"
    if not file.is_file():
        return None
    results: dict[str, Any] = files.read_json(file)
    found = {name: results["recipe"][name] for name in budget(run.dataset, overrides)}
    found |= {name: results[part][count] for name, part, count in _LIMITS if name in overrides}
    wanted = {
        **budget(run.dataset, overrides),
        **{name: overrides[name] for name, _, _ in _LIMITS if name in overrides},
    }
    if found != wanted:
        raise UserError(f"{file.parent} was made with {found}, not with {wanted}. Choose another --output_dir.")
    return results if results["epochs"] == wanted["epochs"] else None


_LIMITS = (("limit_train", "dataset", "train_images"), ("limit_test", "dataset", "test_images"))


def start(run: Run, output: Path, overrides: dict[str, int], threads: int) -> subprocess.Popen[bytes]:
    """Starts the process of a run; what it says is in its directory, process.txt."""
    directory = run.directory(output)
    directory.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "accuracy_run.py"),
        f"--dataset={run.dataset}",
        f"--attention={run.attention}",
        f"--head_dim={run.head_dim}",
        f"--seed={run.seed}",
        f"--threads={threads}",
        f"--output_dir={directory}",
        *(f"--{name}={value}" for name, value in overrides.items()),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    with open(said_by(run, output), "ab") as text:
        # A session of its own: Ctrl-C is for this process, which passes it on once.
        return subprocess.Popen(command, stdout=text, stderr=text, env=environment, start_new_session=True)


def said_by(run: Run, output: Path) -> Path:
    """Standard output and error of the run's processes."""
    return run.directory(output).with_suffix(".txt")


def steps_done(run: Run, output: Path) -> int:
    """The step of the last line in the run's log."""
    from mobiatt_tf.training.logs import read_log

    file = run.directory(output) / "log.jsonl"
    lines = read_log(file) if file.is_file() else []
    return max((line["step"] for line in lines), default=0)


def total_steps(run: Run, overrides: dict[str, int]) -> int:
    """Training steps of a run."""
    from mobiatt_tf import data

    wanted = budget(run.dataset, overrides)
    images = min(len(data.load(run.dataset).train), overrides.get("limit_train", sys.maxsize))
    return wanted["epochs"] * (images // wanted["batch_size"])


@contextlib.contextmanager
def stopping(processes: dict[Run, subprocess.Popen[bytes]]) -> Iterator[None]:
    """SIGTERM acts like Ctrl-C; on the way out every process is asked to save and waited for."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)


def sweep(runs: Sequence[Run], output: Path, overrides: dict[str, int], workers: int, threads: int) -> None:
    """Does what is missing of `runs`, `workers` processes at a time.

    Raises:
        UserError: a process failed, or a directory holds something else.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the processes have saved.
    """
    waiting = [run for run in runs if finished(run, output, overrides) is None]
    if not waiting:
        return
    of_dataset = {run.dataset: total_steps(run, overrides) for run in runs}
    steps = {run: of_dataset[run.dataset] for run in runs}
    done = {run: 0 if run in waiting else steps[run] for run in runs}
    done |= {run: steps_done(run, output) for run in waiting if run.directory(output).is_dir()}
    active: dict[Run, subprocess.Popen[bytes]] = {}
    seconds = 0.5 if sys.stderr.isatty() else 30.0
    bar = tqdm(
        total=sum(steps.values()),
        initial=sum(done.values()),
        unit="step",
        smoothing=0.02,
        desc="all runs",
        mininterval=seconds,
    )
    with contextlib.closing(bar), stopping(active):
        while waiting or active:
            while waiting and len(active) < workers:
                run = waiting.pop(0)
                active[run] = start(run, output, overrides, threads)
            time.sleep(_POLL_SECONDS)
            for run in active:
                done[run] = steps_done(run, output)
            for run in [run for run, process in active.items() if process.poll() is not None]:
                process = active.pop(run)
                results = finished(run, output, overrides) if process.returncode == 0 else None
                if results is None:
                    raise UserError(f"{run} ended with status {process.returncode}; see {said_by(run, output)}.")
                bar.write(f"{run.dataset} {run.network} seed {run.seed}: top-1 {results['top1']:.2%}", file=sys.stderr)
            bar.update(sum(done.values()) - bar.n)


def main(_: Sequence[str]) -> None:
    """Trains what is missing, then writes JSON, tables and picture of what is finished."""
    from benchmarks import accuracy_report

    values = flags.FLAGS
    if values.render:
        accuracy_report.render()
        return
    given = {name: getattr(values, name) for name in ("epochs", "batch_size", "limit_train", "limit_test")}
    overrides = {name: value for name, value in given.items() if value is not None}
    output = files.user_path(values.output_dir)
    runs = planned(_datasets(), _networks(), values.seeds)
    try:
        if not values.report_only:
            sweep(runs, output, overrides, values.workers, values.threads)
    finally:
        found = {run: results for run in runs if (results := finished(run, output, overrides)) is not None}
        if found:
            summary = accuracy_report.summarize({(run.dataset, run.network, run.seed): r for run, r in found.items()})
            files.write_json(output / "accuracy.json", summary)
            accuracy_report.draw(summary, output / "accuracy.png")
            print("\n\n".join(accuracy_report.table(summary, dataset) for dataset in summary["datasets"]))
            print(f"\n{len(found)} of {len(runs)} runs finished; written: {output / 'accuracy.json'}, accuracy.png")


def _datasets() -> list[str]:
    given = list(dict.fromkeys(flags.FLAGS.datasets))
    if not given or set(given) - set(BUDGETS):
        raise UserError(f"--datasets={','.join(given)} is not possible. Choose from {', '.join(BUDGETS)}.")
    return given


def _networks() -> list[tuple[str, int]]:
    names = {f"{attention}_d{head_dim}": (attention, head_dim) for attention, head_dim in NETWORKS}
    given = list(dict.fromkeys(flags.FLAGS.networks))
    if not given or set(given) - set(names):
        raise UserError(f"--networks={','.join(given)} is not possible. Choose from {', '.join(names)}.")
    return [names[name] for name in given]


if __name__ == "__main__":
    flags.DEFINE_list("datasets", list(DATASETS), f"What to train on: {', '.join(BUDGETS)}.")
    flags.DEFINE_list("networks", [f"{kind}_d{d}" for kind, d in NETWORKS], "Attention and channels of a head.")
    flags.DEFINE_integer("seeds", 3, "Runs of each network on each dataset.", lower_bound=1)
    flags.DEFINE_integer("workers", 1, "Runs at a time.", lower_bound=1)
    flags.DEFINE_integer("threads", 1, "Threads of each run.", lower_bound=1)
    flags.DEFINE_integer("epochs", None, "Instead of the budget's.", lower_bound=1)
    flags.DEFINE_integer("batch_size", None, "Instead of the budget's.", lower_bound=1)
    flags.DEFINE_integer("limit_train", None, "Only so many training images.", lower_bound=1)
    flags.DEFINE_integer("limit_test", None, "Only so many test images.", lower_bound=1)
    flags.DEFINE_bool("report_only", False, "Train nothing; write what the finished runs say.")
    flags.DEFINE_bool("render", False, "Only rewrite the tables in docs/accuracy.md from docs/accuracy.json.")
    flags.DEFINE_string("output_dir", "runs/accuracy", "Gets a directory for each run, accuracy.json, accuracy.png.")
    cli.run(main)

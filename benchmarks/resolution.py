"""Peak memory and latency against the number of tokens: backbones, detector and segmenter, in TFLite and in training.

PYTHONPATH=. python benchmarks/resolution.py --image_sizes=224,512 --subjects=pvt_v2/b0/backbone

Mobile-Attention and the softmax host run in turns, each in a process of its own, and ratios are paired by round; beside
the backbones runs their floor in time, the dense layers and convolutions alone. Memory is what the process grew by, at
most: weights, packed weights and every tensor, and in training the graph and what its first step left. A process that
holds more than --memory_gigabytes is ended, and the result says so. A training step is forward, the task's loss,
backward and AdamW for one image in float32. Writes JSON after every case (a second call with the same flags goes on
from there; --minutes ends one between two cases) and a PNG.
`--render` only makes the table in docs/performance.md and its picture from docs/resolution.json.
"""

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from benchmarks import resolution_report
from benchmarks.resolution_worker import PARTS, build, with_one_output
from mobiatt_tf import cli, files
from mobiatt_tf.errors import UserError
from tflite.host import describe_host
from tflite.measurements import Measurement, ratio, rotated
from tflite.process import Worker

ROOT = Path(__file__).resolve().parents[1]
SUBJECTS = ("pvt_v2/b0/backbone", "deit/tiny/backbone", "pvt_v2/b0/detector", "pvt_v2/b0/segmenter")
SIZES = ("224", "512", "800x1344", "1024", "2048")
ATTENTIONS = ("mobile", "softmax")
FLOOR = "floor"
PHASES = ("tflite", "training")
_TIMEOUT_SECONDS = 600
_LEAST_ROUNDS = 3
_FAST_SECONDS = 0.3  # shorter runs come three to a turn, after one that warms the caches


class MemoryLimit:
    """Ends a process that holds more than some bytes; a context manager that watches it until it is left.

    Resident memory is watched, not address space: TensorFlow reserves far more of that than it touches.
    """

    def __init__(self, pid: int, most_bytes: int) -> None:
        self.exceeded = False
        self._pid, self._most = pid, most_bytes
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            if _resident_bytes(self._pid) > self._most:
                self.exceeded = True
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
                return

    def __enter__(self) -> "MemoryLimit":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Watches no longer: the number of a process that has ended may be given to another."""
        self._done.set()
        self._thread.join()


def _resident_bytes(pid: int) -> int:
    """0 of a process that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


@dataclass
class Row:
    """One network of a case: its process and what was measured, or why it was not."""

    name: str
    worker: Worker
    limit: MemoryLimit
    measurement: Measurement
    failure: str | None = None

    def attempt(self, action: Callable[[], None], most_bytes: int) -> None:
        """Does something with the process; if that ends, or refuses, the row keeps the reason and is left out."""
        try:
            action()
        except UserError as error:
            text = str(error).removeprefix(f"{self.worker.subject}: ")
            if self.limit.exceeded:
                text = f"out of memory: more than {most_bytes / 1e9:.3g} GB"
            elif "SIGKILL" in text:
                text = "killed from outside, probably because the machine had no memory left"
            elif any(word in text for word in ("OOM", "bad_alloc", "allocate memory")):
                text = f"out of memory: {text}"
            self.failure = text
            self.limit.stop()
            self.worker.close()


def case(subject: str, image_size: tuple[int, int], phase: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Both attentions at one size, and in TFLite the floor of a backbone, as resolution.json has it.

    Args:
        subject: FAMILY/VARIANT/PART.
        image_size: (height, width).
        phase: one of `PHASES`.
        settings: num_threads, rounds (the most), seconds (about as long each network is measured) and
            memory_gigabytes.

    Raises:
        ValueError: there is no such model, or it cannot have that size.
    """
    found = _tflite(subject, image_size, settings) if phase == "tflite" else _training(subject, image_size, settings)
    rows, extra = found
    by_name = {row.name: row.measurement for row in rows if row.failure is None}
    return {
        "subject": subject,
        "image_size": list(image_size),
        "tokens": tokens_of(subject, image_size),
        "phase": phase,
        "settings": settings,
        "device": describe_host(),
        **extra,
        "rows": {row.name: to_json(row.name, row.measurement, row.failure, by_name) for row in rows},
    }


def to_json(name: str, measurement: Measurement, failure: str | None, others: dict[str, Measurement]) -> dict[str, Any]:
    """A row's figures, with ratios paired by round to the softmax host and to the floor where these were measured."""
    if failure is not None:
        return {"failure": failure}
    assert measurement.statistics is not None
    ratios = {
        f"to_{other}": asdict(found)
        for other in ("softmax", FLOOR)
        if other != name and other in others and (found := ratio(measurement, others[other])) is not None
    }
    return {
        "failure": None,
        "median_seconds": measurement.statistics.typical,
        "rounds": len(measurement.rounds),
        "first_run_seconds": measurement.first_run_seconds,
        "peak_bytes": measurement.model_bytes,
        "process_bytes": measurement.peak_bytes,
        **ratios,
    }


def tokens_of(subject: str, image_size: tuple[int, int]) -> int:
    """Tokens of the first attention, which has most of them."""
    from keras_models import deit, pvt_v2

    family, variant, _ = subject.split("/")
    stride = deit.VARIANTS[variant].patch_size if family == "deit" else pvt_v2.VARIANTS[variant].stem[1]
    return (image_size[0] // stride) * (image_size[1] // stride)


def _tflite(subject: str, image_size: tuple[int, int], settings: dict[str, Any]) -> tuple[list[Row], dict[str, Any]]:
    import keras

    from benchmarks.peers.ours import products
    from tflite import convert

    is_backbone = subject.endswith("/backbone")
    sizes = {}
    with tempfile.TemporaryDirectory() as directory, _Rows(settings) as rows:
        for name in (*ATTENTIONS, *((FLOOR,) if is_backbone else ())):
            model = build(subject, image_size, "mobile" if name == FLOOR else name)
            if is_backbone:
                model = products(model) if name == FLOOR else with_one_output(model)
            path = Path(directory) / f"{name}.tflite"
            path.write_bytes(convert.convert(model, "float32", convert.formulation_for("float32", "x86")))
            sizes[name] = path.stat().st_size
            del model
            keras.backend.clear_session()
            rows.load(
                name,
                "tflite.worker",
                {"do": "load", "path": str(path), "num_threads": settings["num_threads"], "inputs": None, "seed": 0},
            )
        rows.take_turns("invoke", lambda answer: answer)
    return rows.found, {"file_bytes": sizes}


def _training(subject: str, image_size: tuple[int, int], settings: dict[str, Any]) -> tuple[list[Row], dict[str, Any]]:
    with _Rows(settings) as rows:
        for name in ATTENTIONS:
            request = {"do": "load_dense", "subject": subject, "image_size": list(image_size), "attention": name}
            rows.load(name, "benchmarks.resolution_worker", {**request, "num_threads": settings["num_threads"]})
        rows.take_turns("steps", lambda answer: answer["latencies"])
    return rows.found, {"versions": rows.versions}


class _Rows:
    """The rows of one case: loads each in its process, then runs them in turns; ends all processes when it is left."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.found: list[Row] = []
        self.versions: dict[str, str] = {}
        self._settings = settings
        self._most_bytes = int(settings["memory_gigabytes"] * 1e9)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def load(self, name: str, module: str, request: dict[str, Any]) -> None:
        """Starts a process and takes the first run there, which compiles or packs and does not count."""
        worker = self._stack.enter_context(Worker(name, module=module))
        limit = self._stack.enter_context(MemoryLimit(worker.pid, self._most_bytes))
        measurement = Measurement(len(self.found), name, self._settings["num_threads"], 0.0, 0.0)
        row = Row(name, worker, limit, measurement)

        def first_run() -> None:
            loaded = worker.request(**request, timeout_seconds=_TIMEOUT_SECONDS)
            measurement.baseline_bytes = loaded["baseline_bytes"]
            if "versions" in loaded:  # a training step: the first one compiles
                self.versions = loaded["versions"]
                worker.request("steps", unrecorded=1, recorded=0, timeout_seconds=_TIMEOUT_SECONDS)
                worker.request("forget_peak")
                second = worker.request("steps", unrecorded=0, recorded=1, timeout_seconds=_TIMEOUT_SECONDS)
                measurement.first_run_seconds = second["latencies"][0]
            else:
                measurement.first_run_seconds = loaded["first_run_seconds"]

        row.attempt(first_run, self._most_bytes)
        self.found.append(row)

    def take_turns(self, request: str, latencies: Callable[[Any], list[float]]) -> None:
        """Measures the rows that are left, each round from another one on."""
        turns = [row for row in self.found if row.failure is None]
        if not turns:
            return
        slowest = max(row.measurement.first_run_seconds for row in turns)
        fitting = int(self._settings["seconds"] / max(slowest, 1e-9))
        fast = slowest < _FAST_SECONDS  # alike for all: a run that comes alone finds colder caches
        counts = {"unrecorded": int(fast), "recorded": 3 if fast else 1}
        for number in range(max(_LEAST_ROUNDS, min(self._settings["rounds"], fitting))):
            for row in rotated(turns, number):

                def one_turn(row: Row = row) -> None:
                    answer = row.worker.request(request, **counts, timeout_seconds=_TIMEOUT_SECONDS)
                    row.measurement.rounds.append(latencies(answer))
                    row.measurement.peak_bytes = row.worker.request("peak")

                if row.failure is None:
                    row.attempt(one_turn, self._most_bytes)


def cases(
    subjects: Sequence[str], sizes: Sequence[str], phases: Sequence[str]
) -> Iterator[tuple[str, str, tuple[int, int], str]]:
    """(key in the JSON file, subject, image size, phase) of what is wanted: one curve after the other."""
    for subject in subjects:
        for phase in phases:
            for text in sizes:
                size = cli.image_size(text)
                assert size is not None
                yield f"{subject} {size[0]}x{size[1]} {phase}", subject, size, phase


def main(_: Sequence[str]) -> None:
    """Measures what is missing, then writes JSON, table and picture."""
    values = flags.FLAGS
    if values.render:
        resolution_report.render()
        return
    subjects, phases = _subjects(values.subjects), _chosen("phases", PHASES)
    if not values.image_sizes:
        raise UserError("--image_sizes is empty; give sizes as in --image_sizes=224,800x1344.")
    settings = {name: getattr(values, name) for name in ("num_threads", "rounds", "seconds", "memory_gigabytes")}
    output = files.user_path(values.output_dir)
    file = output / "resolution.json"
    results = files.read_json(file) if file.is_file() else {"cases": {}}
    wanted = list(cases(subjects, values.image_sizes, phases))
    device = describe_host()
    start = time.monotonic()
    for key, subject, size, phase in (progress := tqdm(wanted, desc="cases", mininterval=30)):
        known = results["cases"].get(key, {})
        if known.get("settings") == settings and _same_machine(known.get("device"), device):
            continue
        if values.minutes and time.monotonic() - start > 60 * values.minutes:
            progress.write(f"{values.minutes:g} minutes are over: {key} is next. The same command goes on there.")
            break
        progress.write(f"{key} ...")
        try:
            results["cases"][key] = case(subject, size, phase, settings)
        except ValueError as error:
            raise UserError(str(error)) from error
        files.write_json(file, results)
    shown = {"cases": {key: results["cases"][key] for key, *_ in wanted if key in results["cases"]}}
    if not shown["cases"]:
        return
    print(resolution_report.table(shown))
    resolution_report.draw(shown, output / "resolution.png")
    print(f"\nwritten: {file}, {output / 'resolution.png'}")


def _same_machine(known: Any, device: dict[str, Any]) -> bool:
    """Whether figures of one description may stand beside those of the other; its date and load may differ."""
    told = ("cpu", "usable_cores", "os", "python", "ai_edge_litert")
    return isinstance(known, dict) and all(known.get(name) == device[name] for name in told)


def _subjects(given: Sequence[str]) -> list[str]:
    import keras_models

    known = [
        f"{family}/{variant}/{part}"
        for family in ("pvt_v2", "deit")
        for variant in keras_models.FAMILIES[family].variants
        for part in PARTS
        if variant != "b2_li"  # has no other attention than softmax
    ]
    if not given or set(given) - set(known):
        raise UserError(f"--subjects={','.join(given)} is not possible. Choose from {', '.join(known)}.")
    return list(dict.fromkeys(given))


def _chosen(name: str, allowed: Sequence[str]) -> list[str]:
    given = list(dict.fromkeys(getattr(flags.FLAGS, name)))
    if not given or set(given) - set(allowed):
        raise UserError(f"--{name}={','.join(given)} is not possible. Choose from {', '.join(allowed)}.")
    return given


if __name__ == "__main__":
    flags.DEFINE_list("subjects", list(SUBJECTS), "FAMILY/VARIANT/PART, comma separated.")
    flags.DEFINE_list("image_sizes", list(SIZES), "Sides in pixels, or HEIGHTxWIDTH.")
    flags.DEFINE_list("phases", list(PHASES), "What runs: " + ", ".join(PHASES) + ".")
    flags.DEFINE_integer("num_threads", 2, "Threads of each process.", lower_bound=1)
    flags.DEFINE_integer("rounds", 10, "How often the networks take turns, at most.", lower_bound=1)
    flags.DEFINE_float("seconds", 5.0, "About how long each network is measured; three rounds at least.", lower_bound=0)
    flags.DEFINE_float(
        "memory_gigabytes", 9.0, "What a process may hold; two or three live at a time.", lower_bound=0.1
    )
    flags.DEFINE_float("minutes", 0.0, "No new case after so many; 0: all that are wanted.", lower_bound=0)
    flags.DEFINE_bool("render", False, "Only make table and picture of docs/performance.md from docs/resolution.json.")
    flags.DEFINE_string("output_dir", "runs/resolution_benchmark", "Gets resolution.json and resolution.png.")
    cli.run(main)

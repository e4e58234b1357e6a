"""Images per second and memory of a training step, against the same network in PyTorch on the same cores.

PYTHONPATH=. python benchmarks/training.py --models=deit/tiny,pvt_v2/b0 --networks=mobile

A step is forward, backward and AdamW: ours is `mobiatt_tf.training.step`, with XLA and without; PyTorch's is timm's
host, for "mobile" with the published equations in it, with a fused AdamW, eager and through torch.compile. Both
have the same weights: a row whose logits are not ours before the first step is not timed. Every row is a process of
its own; the processes take turns, and ratios are paired by round. The floor is the time that the multiply-adds of
forward and backward (three times those of the forward pass) take at the rate of a large matrix product. Writes
training.json after each case (a second call with the same flags goes on from there), training.png and a Markdown
table. `--quick` takes a minute; `--render` only rewrites the table in docs/accuracy.md from docs/training_speed.json.
"""

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from benchmarks import training_report
from benchmarks.peers.measurement import progress
from mobiatt_tf import cli, files
from mobiatt_tf.errors import UserError
from tflite.host import describe_host
from tflite.measurements import Measurement, ratio, rotated
from tflite.process import Worker

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = ("float32", "mixed_bfloat16")
NETWORKS = ("mobile", "softmax")
PEAK = "peak"
# Program -> the request that loads it and what is particular to it.
PROGRAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("load_keras", {"jit_compile": False}),
    "ours_xla": ("load_keras", {"jit_compile": True}),
    "pytorch": ("load_torch", {"compiled": False}),
    "pytorch_compile": ("load_torch", {"compiled": True}),
}
REFERENCE = "pytorch"  # ratios are to it, in the same precision
TOLERANCES = {"float32": 1e-3, "mixed_bfloat16": 0.1}  # of logits, relative to the largest of the Keras model's
_QUICK: dict[str, Any] = {"image_size": 64, "batch_size": 4, "rounds": 2, "steps": 1}
_LOAD_TIMEOUT_SECONDS = 900


@dataclass
class Row:
    """One program in one precision; its rounds are filled as they are run."""

    program: str
    precision: str
    measurement: Measurement
    versions: dict[str, str] = field(default_factory=dict)
    difference: float | None = None  # of the logits before the first step
    multiply_adds: int | None = None  # of a step of PEAK
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


def case(model: str, network: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One network in all programs and precisions, as training.json has it.

    Raises:
        UserError: a process ended in the middle of the run.
    """
    from benchmarks.training_worker import build_keras
    from mobiatt_tf.complexity import count_macs, trainable_parameters
    from mobiatt_tf.interop import save_pytorch

    family, variant = model.split("/")
    head_dim = settings["head_dim"] if network == "mobile" else None
    about: dict[str, Any] = {
        "family": family,
        "variant": variant,
        "image_size": settings["image_size"],
        "head_dim": head_dim,
    }
    with tempfile.TemporaryDirectory() as directory:
        weights = str(Path(directory) / "weights.safetensors")
        built = build_keras(**about)
        save_pytorch(built, weights)
        rows, skipped = _measure(about, weights, reference_logits(built, settings["image_size"]), settings)
    multiply_adds = 3 * count_macs(built) * settings["batch_size"]
    return {
        "model": model,
        "network": network,
        "settings": settings,
        "device": describe_host(),
        "parameters": trainable_parameters(built),
        "multiply_adds": multiply_adds,
        "rows": [_to_json(row, rows, multiply_adds, settings["batch_size"]) for row in rows],
        "skipped": skipped,
    }


def reference_logits(model: Any, image_size: int) -> np.ndarray:
    """What a Keras model makes of the first image of the batch, [classes]."""
    from benchmarks.training_worker import batch

    return np.asarray(model(batch(1, image_size)[0], training=False))[0]


def _measure(
    about: dict[str, Any], weights: str, logits: np.ndarray, settings: dict[str, Any]
) -> tuple[list[Row], list[dict[str, str]]]:
    """Loads every row in its process, then runs them in turns."""
    wanted = [(program, precision) for precision in settings["precisions"] for program in (*settings["programs"], PEAK)]
    rows: list[Row] = []
    workers: list[Worker] = []
    skipped: list[dict[str, str]] = []
    with contextlib.ExitStack() as stack:
        for program, precision in progress(wanted, "load"):
            subject = f"{program}, {precision}"
            worker = stack.enter_context(
                Worker(subject, module="benchmarks.training_worker", path=[str(ROOT)], runtime=program)
            )
            row = Row(program, precision, Measurement(len(rows), subject, settings["num_threads"], 0.0, 0.0))
            try:
                _load(worker, row, about, weights, logits, settings)
            except UserError as error:
                reason = str(error).removeprefix(f"{subject}: ")
                tqdm.write(f"skipped: {subject}: {reason}", file=sys.stderr)
                skipped.append({"program": program, "precision": precision, "reason": reason})
                worker.close()
                continue
            rows.append(row)
            workers.append(worker)
        _rounds(rows, workers, settings)
    return rows, skipped


def _load(
    worker: Worker, row: Row, about: dict[str, Any], weights: str, logits: np.ndarray, settings: dict[str, Any]
) -> None:
    """Loads a row and takes its first steps.

    Raises:
        UserError: it cannot be loaded, or its logits before the first step are not `logits`.
    """
    common = {"precision": row.precision, "num_threads": settings["num_threads"]}
    if row.program == PEAK:
        row.multiply_adds = worker.request("load_peak", **common)["multiply_adds"]
    else:
        load, options = PROGRAMS[row.program]
        network = {**about, "weights": weights} if load == "load_torch" else about
        common |= {"network": network, "batch_size": settings["batch_size"]}
        loaded = worker.request(load, timeout_seconds=_LOAD_TIMEOUT_SECONDS, **common, **options)
        row.versions = loaded["versions"]
        row.measurement.baseline_bytes = loaded["baseline_bytes"]
        row.difference = float(np.abs(np.array(loaded["logits"]) - logits).max() / np.abs(logits).max())
        if not row.difference <= TOLERANCES[row.precision]:
            raise UserError(f"its logits differ by {row.difference:.2g} of the largest from those of the Keras model")
    found = worker.request("steps", timeout_seconds=_LOAD_TIMEOUT_SECONDS, unrecorded=0, recorded=1)
    row.measurement.first_run_seconds = found["latencies"][0]
    worker.request("steps", unrecorded=1, recorded=0)
    worker.request("forget_peak")


def _rounds(rows: list[Row], workers: list[Worker], settings: dict[str, Any]) -> None:
    """Every round starts with another row, so that drift of the machine meets all alike."""
    turns = list(zip(rows, workers, strict=True))
    schedule = [turn for number in range(settings["rounds"]) for turn in rotated(turns, number)]
    for row, worker in progress(schedule, "measure"):
        # The turns of the others emptied the caches.
        found = worker.request("steps", unrecorded=1, recorded=settings["steps"])
        row.measurement.rounds.append(found["latencies"])
        row.cpu_seconds += found["cpu_seconds"]
        row.wall_seconds += found["wall_seconds"]
        row.losses += found["losses"]
    for row, worker in turns:
        row.measurement.peak_bytes = worker.request("peak")


def _to_json(row: Row, rows: list[Row], multiply_adds: int, batch_size: int) -> dict[str, Any]:
    """`speed` is PyTorch's time over the row's, by round; `to_floor` the row's time over the floor's, by round."""
    by_name = {(other.program, other.precision): other for other in rows}
    reference = by_name.get((REFERENCE, row.precision))
    speed = ratio(reference.measurement, row.measurement) if reference and row.program != PEAK else None
    seconds = statistics.median(row.measurement.latencies)
    value: dict[str, Any] = {
        "program": row.program,
        "precision": row.precision,
        "step_seconds": seconds,
        "first_step_seconds": row.measurement.first_run_seconds,
        "cpu_per_wall": row.cpu_seconds / row.wall_seconds,
    }
    if row.program == PEAK:
        assert row.multiply_adds is not None
        return value | {"gflops": 2e-9 * row.multiply_adds / seconds}
    peak = by_name.get((PEAK, row.precision))
    to_floor = None
    if peak is not None:
        assert peak.multiply_adds is not None
        to_peak = ratio(row.measurement, peak.measurement)
        to_floor = to_peak.median * peak.multiply_adds / multiply_adds if to_peak else None
    return value | {
        "images_per_second": batch_size / seconds,
        "speed": asdict(speed) if speed else None,
        "to_floor": to_floor,
        "peak_bytes": row.measurement.peak_bytes,
        "baseline_bytes": row.measurement.baseline_bytes,
        "difference": row.difference,
        "last_loss": row.losses[-1],
        "versions": row.versions,
    }


def main(_: Sequence[str]) -> None:
    """Measures what is missing, then writes table and picture."""
    import keras_models
    from mobiatt_tf.machine import usable_cores

    values = flags.FLAGS
    if values.render:
        training_report.render()
        return
    known = [
        f"{family}/{variant}"
        for family, row in keras_models.FAMILIES.items()
        for variant in row.variants
        if variant not in ("quickstart", "b2_li")  # timm has no such hosts, or the attention is softmax's alone
    ]
    settings: dict[str, Any] = {
        "image_size": values.image_size,
        "batch_size": values.batch_size,
        "head_dim": values.head_dim,
        "precisions": _chosen("precisions", PRECISIONS),
        "programs": _chosen("programs", PROGRAMS),
        "num_threads": values.num_threads or usable_cores(),
        "rounds": values.rounds,
        "steps": values.steps,
    }
    if values.quick:
        settings |= _QUICK
    output = files.user_path(values.output_dir)
    file = output / "training.json"
    results = files.read_json(file) if file.is_file() else {"cases": {}}
    wanted = [(model, network) for model in _chosen("models", known) for network in _chosen("networks", NETWORKS)]
    for model, network in wanted:
        name = f"{model} {network}"
        if results["cases"].get(name, {}).get("settings") == settings:
            print(f"{name}: measured before, {file}")
            continue
        print(f"{name} ...", flush=True)
        results["cases"][name] = case(model, network, settings)
        files.write_json(file, results)
    training_report.draw(results, output / "training.png")
    print(f"{training_report.table(results)}\n\nwritten: {file}, {output / 'training.png'}")


def _chosen(name: str, allowed: Sequence[str] | dict[str, Any]) -> list[str]:
    given = list(dict.fromkeys(getattr(flags.FLAGS, name)))
    if not given or set(given) - set(allowed):
        raise UserError(f"--{name}={','.join(given)} is not possible. Choose from {', '.join(allowed)}.")
    return given


if __name__ == "__main__":
    flags.DEFINE_list("models", ["deit/tiny", "pvt_v2/b0", "efficientformer_v2/s0"], "FAMILY/VARIANT, comma separated.")
    flags.DEFINE_list("networks", list(NETWORKS), "Attention: mobile, softmax.")
    flags.DEFINE_list("precisions", list(PRECISIONS), "Precisions: " + ", ".join(PRECISIONS) + ".")
    flags.DEFINE_list("programs", list(PROGRAMS), "Programs: " + ", ".join(PROGRAMS) + ".")
    flags.DEFINE_integer("image_size", 224, "Side in pixels.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 8, "Images of a step.", lower_bound=1)
    flags.DEFINE_integer("head_dim", 8, "Channels of a head of Mobile-Attention.", lower_bound=1)
    flags.DEFINE_integer("num_threads", None, "Threads of each process; all usable cores without it.", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "How often the rows take turns.", lower_bound=1)
    flags.DEFINE_integer("steps", 3, "Recorded steps of each row in a round, after one unrecorded.", lower_bound=1)
    flags.DEFINE_bool("quick", False, "Small images and few steps, to see that everything runs.")
    flags.DEFINE_bool("render", False, "Only rewrite the table in docs/accuracy.md from docs/training_speed.json.")
    flags.DEFINE_string("output_dir", "runs/training_benchmark", "Gets training.json and training.png.")
    cli.run(main)

"""Images per second and core: decoding, cropping and the whole of DeiT's augmentation, against two other libraries.

PYTHONPATH=. python benchmarks/feeding.py --rounds=15

JPEG files of about 500 x 375 pixels, cut from two photographs at run time, go through this project's functions in
tf.data, through albumentations with OpenCV (installed into runs/feeding_peers; left out with a message where that is
impossible) and, for the operations alone, through `keras.layers.RandAugment`. Each is a process of its own on the same
core with one thread. They take turns, so that ratios are paired by round. Writes JSON and a PNG.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import numpy as np
from absl import flags
from tqdm import tqdm

from benchmarks.peers import environment
from mobiatt_tf import cli, files
from mobiatt_tf.errors import UserError
from mobiatt_tf.machine import cpu_name

ROOT = Path(__file__).resolve().parents[1]
OURS, ALBUMENTATIONS, KERAS = "mobiatt_tf", "albumentations", "keras"
STAGES = {
    "decode": "decode, about 500 x 375",
    "crop": "decode, random resized crop to 224, flip",
    "rand_augment": "RandAugment alone, 224",
    "full": "everything DeiT does, to mixed batches, 224",
}
BATCH = 32


class Worker:
    """A process that feeds images on one core. A context manager.

    Args:
        name: for messages.
        command: what to run.
        core: the number of the core it may use.
    """

    def __init__(self, name: str, command: list[str], core: int) -> None:
        self.name = name
        threads = {variable: "1" for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        environment_variables = os.environ | threads | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by __exit__)
        self._process = subprocess.Popen(
            ["taskset", "--cpu-list", str(core), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment_variables,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def seconds(self, stage: str, images: int) -> float | None:
        """How long so many images take; None if it does not have this stage.

        Raises:
            UserError: the process ended; says with which message.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{stage} {images}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline().strip()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._errors.seek(0)
            raise UserError(f"{self.name} stopped at {stage}: {environment.error_in(self._errors.read())}")
        return None if answer == "none" else float(answer)


def write_photographs(folder: Path, count: int) -> None:
    """JPEG files, quality 90, of about 500 x 375 pixels: windows of scikit-learn's two sample photographs."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    generator = np.random.default_rng(0)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]  # 640 x 427
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        share = generator.uniform(0.75, 1)
        width, height = int(photograph.width * share), int(photograph.height * share)
        left = int(generator.integers(0, photograph.width - width + 1))
        top = int(generator.integers(0, photograph.height - height + 1))
        size = (500, int(generator.integers(333, 418)))
        window = photograph.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        window.save(folder / f"{number:03d}.jpg", quality=90)


def measure(workers: list[Worker], rounds: int, images: int) -> dict[str, dict[str, list[float]]]:
    """Seconds for an image: of each stage, of each worker that has it, of each round. Workers take turns."""
    found: dict[str, dict[str, list[float]]] = {stage: {} for stage in STAGES}
    present = []
    for stage in STAGES:
        for worker in workers:
            if worker.seconds(stage, BATCH) is not None:
                present.append((stage, worker))
                found[stage][worker.name] = []
    for number in tqdm(range(rounds), desc="rounds", mininterval=10):
        for stage in STAGES:
            turn = [worker for having, worker in present if having == stage]
            for worker in turn if number % 2 else turn[::-1]:
                # Keras takes twenty times as long; a few images are as exact there.
                count = BATCH if worker.name == KERAS else images
                seconds = worker.seconds(stage, count)
                assert seconds is not None
                found[stage][worker.name].append(seconds / count)
    return found


def ratio(slower: list[float], faster: list[float]) -> dict[str, float]:
    """How many times as fast the second is: median and quartiles of the rounds' ratios."""
    ratios = np.array(slower) / np.array(faster)
    low, median, high = np.percentile(ratios, [25, 50, 75])
    return {"median": float(median), "quartile_1": float(low), "quartile_3": float(high)}


def summary(found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Images a second, medians, and what this project is faster by."""
    rows: dict[str, Any] = {}
    for stage, workers in found.items():
        rows[stage] = {
            "images_per_second": {name: 1 / statistics.median(seconds) for name, seconds in workers.items()},
            "times_as_fast_as": {
                name: ratio(seconds, workers[OURS]) for name, seconds in workers.items() if name != OURS
            },
        }
    keras_seconds = found["rand_augment"][KERAS]
    rows["full"]["times_as_fast_as"]["keras.layers.RandAugment alone"] = ratio(keras_seconds, found["full"][OURS])
    return rows


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        "| images per second and core | mobiatt-tf | albumentations | keras.layers.RandAugment | times as fast as |",
        "|---|---|---|---|---|",
    ]
    for stage, title in STAGES.items():
        row = results["stages"][stage]
        rates = [row["images_per_second"].get(name) for name in (OURS, ALBUMENTATIONS, KERAS)]
        cells = ["" if rate is None else f"{rate:.0f}" for rate in rates]
        faster = ", ".join(f"{name}: {value['median']:.2f}" for name, value in row["times_as_fast_as"].items())
        lines.append(f"| {title} | {' | '.join(cells)} | {faster} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Bars of images per second for each stage and library."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axis = figure.subplots()
    for offset, name in enumerate((OURS, ALBUMENTATIONS, KERAS)):
        for place, stage in enumerate(STAGES):
            rate = results["stages"][stage]["images_per_second"].get(name)
            if rate is not None:
                bar = axis.bar(
                    place + 0.27 * (offset - 1), rate, 0.25, color=f"C{offset}", label=name if place == 2 else None
                )
                axis.bar_label(bar, fmt="%.0f", fontsize=8)
    axis.set_xticks(range(len(STAGES)), [title.replace(", ", "\n") for title in STAGES.values()], fontsize=8)
    axis.set(yscale="log", ylabel="images per second and core")
    axis.legend()
    machine = results["machine"]
    axis.set_title(f"{machine['cpu']}, one core, one thread, TensorFlow {machine['tensorflow']}", fontsize=9)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(_: Sequence[str]) -> None:
    """Measures, prints the table, writes JSON and picture."""
    values = flags.FLAGS
    output = files.user_path(values.output_dir)
    commands = {
        OURS: [sys.executable, str(ROOT / "benchmarks" / "feeding_worker.py"), OURS],
        KERAS: [sys.executable, str(ROOT / "benchmarks" / "feeding_worker.py"), KERAS],
    }
    try:
        python = environment.python_of(ALBUMENTATIONS, files.user_path("runs/feeding_peers"))
        commands[ALBUMENTATIONS] = [str(python), str(ROOT / "benchmarks" / "peers" / "feed_albumentations.py")]
    except UserError as error:
        print(f"albumentations is left out: {error}", file=sys.stderr)
    core = values.core if values.core is not None else max(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), 64)
        workers = [Worker(name, [*command, folder], core) for name, command in commands.items()]
        try:
            found = measure(workers, values.rounds, values.images)
        finally:
            for worker in workers:
                worker.__exit__()
    results = {
        "stages": summary(found),
        "seconds_per_image": found,
        "rounds": values.rounds,
        "images_per_round": values.images,
        "machine": {
            "cpu": cpu_name(),
            "threads": 1,
            "tensorflow": metadata.version("tensorflow"),
            "keras": metadata.version("keras"),
            **(environment.versions(ALBUMENTATIONS, ("albumentations", "opencv-python-headless"))),
        },
    }
    files.write_json(output / "feeding.json", results)
    draw(results, output / "feeding.png")
    print(f"\n{table(results)}\n\nwritten: {output / 'feeding.json'}, {output / 'feeding.png'}")


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 15, "Rounds in which each library takes its turn.", lower_bound=1)
    flags.DEFINE_integer("images", 128, "Images of a turn (of Keras: 32).", lower_bound=BATCH)
    flags.DEFINE_integer("core", None, "The core to run on; the default is the last one.", lower_bound=0)
    flags.DEFINE_string("output_dir", "runs/feeding", "Gets feeding.json and feeding.png.")
    cli.run(main)

"""From nothing to a measured TFLite model in a few minutes: `make quickstart`.

Runs the project's own commands one after the other, prints each before it runs, and gathers their results in one
table, one JSON file and one picture under runs/quickstart. Run again, it resumes where it was stopped.
"""

import dataclasses
import itertools
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from mobiatt_tf import cli, files
from mobiatt_tf.errors import UserError

OUTPUT = Path("runs/quickstart")
TRAIN = OUTPUT / "train"
GRAPHS = {"float32": OUTPUT / "model.tflite", "dynamic": OUTPUT / "model_dynamic.tflite"}

# What to train on, best first, what to change in the recipe, and the top-1 that a sound installation reaches. The
# digits come with scikit-learn and need no network; there are 1,797 of 8 x 8 pixels, so they take more epochs.
DATASETS: dict[str, dict[str, Any]] = {
    "fashion_mnist": {},
    "digits": {"epochs": 60, "batch_size": 64, "augmentation": "crop"},
}
EXPECTED_TOP1 = {"fashion_mnist": 0.85, "digits": 0.90}


def main(_: object) -> None:
    """Trains, exports, benchmarks and reports."""
    os.chdir(Path(__file__).resolve().parents[1])
    dataset = choose_dataset()
    python = sys.executable
    changes = [f"--{name}={value}" for name, value in DATASETS[dataset].items()]
    train = [python, "train_tpu_gpu.py", f"--dataset={dataset}", "--variant=quickstart", "--recipe=quickstart"]
    run([*train, *changes, "--jit_compile", "--log_every=20", f"--output_dir={TRAIN}"])
    for format, graph in GRAPHS.items():
        command = [python, "-m", "tflite.export", f"--checkpoint={TRAIN}", f"--format={format}"]
        run([*command, "--check_images=10000", f"--output={graph}"])
    graphs = ",".join(str(graph) for graph in GRAPHS.values())
    benchmark = [python, "-m", "tflite.benchmark", f"--graph={graphs}", "--num_threads=1,2", "--runs=200"]
    run([*benchmark, f"--output_dir={OUTPUT / 'benchmark'}"])

    results = gather(dataset)
    files.write_json(OUTPUT / "results.json", results)
    with files.atomic_path(OUTPUT / "quickstart.png") as temporary:
        draw(results, temporary)
    print("\n" + format_table(results))
    print(f"\nresults  {OUTPUT / 'results.json'}\npicture  {OUTPUT / 'quickstart.png'}\nmodel    {GRAPHS['float32']}")
    if results["training"]["top1"] < EXPECTED_TOP1[dataset]:
        raise UserError(f"The model should reach {EXPECTED_TOP1[dataset]:.0%} on {dataset}: something is wrong here.")


def choose_dataset() -> str:
    """The dataset of an earlier, unfinished or finished run here, else the first that can be had.

    A run of another version of this project, with another recipe, is moved aside.
    """
    from mobiatt_tf import data, training

    if (TRAIN / "run.json").is_file():
        earlier = files.read_json(TRAIN / "run.json")
        name = str(earlier["dataset"]["name"])
        if earlier["recipe"] == dataclasses.asdict(training.make_recipe("quickstart", **DATASETS.get(name, {}))):
            return name
        aside = next(path for number in itertools.count(1) if not (path := TRAIN.with_name(f"old{number}")).exists())
        TRAIN.rename(aside)
        print(f"{TRAIN} is of another recipe and was moved to {aside}.")
    for name in DATASETS:
        try:
            found = data.load(name)
        except UserError as error:
            print(f"{name} cannot be had: {error}\n")
            continue
        print(f"Dataset: {name}, {len(found.train)} training and {len(found.test)} test images.")
        return name
    raise UserError("No dataset could be loaded; the messages above say why.")


def run(command: list[str], again: str = "make quickstart") -> None:
    """Prints a command and runs it; its failure ends the quickstart with its own message and what to call again."""
    print(f"\n$ {shlex.join(['python', *command[1:]])}", flush=True)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "TF_CPP_MIN_LOG_LEVEL": "2"}
    with subprocess.Popen(command, env=environment) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it has had the signal too and saves its state
            raise
    if status:
        raise UserError(f"The command above ended with status {status}. Once mended, `{again}` goes on from there.")


def gather(dataset: str) -> dict[str, Any]:
    """Everything the steps wrote, in one value."""
    from mobiatt_tf.training.logs import read_log

    return {
        "dataset": dataset,
        "training": files.read_json(TRAIN / "results.json"),
        "learning_curve": read_log(TRAIN / "log.jsonl"),
        "exports": {format: files.read_json(graph.with_suffix(".json")) for format, graph in GRAPHS.items()},
        "benchmark": files.read_json(OUTPUT / "benchmark" / "benchmark.json"),
    }


def median_milliseconds(results: dict[str, Any], graph: int, threads: int) -> float:
    """Median latency of the benchmark in milliseconds."""
    for measurement in results["benchmark"]["measurements"]:
        if measurement["graph"] == graph and measurement["num_threads"] == threads:
            return float(measurement["latency_seconds"]["median"]) * 1e3
    raise UserError(f"The benchmark has no figure for graph {graph} with {threads} threads. Run it again.")


def format_table(results: dict[str, Any]) -> str:
    """The closing table."""
    training = results["training"]
    lines = [
        f"DeiTMobiAtt quickstart, {training['model']['parameters']:,} parameters, {results['dataset']}, "
        f"{training['epochs']} epochs in {training['train_seconds']:.0f} s",
        "",
        "{:<16}{:>12}{:>12}{:>12}{:>12}{:>12}{:>12}".format(
            "model", "test top-1", "same class", "size", "1 thread", "2 threads", "partitions"
        ),
        f"{'Keras':<16}{training['top1']:>12.2%}",
    ]
    for index, (format, export) in enumerate(results["exports"].items()):
        check, description = export["verification"], export["description"]
        lines.append(
            f"{'TFLite ' + format:<16}{check['file_top1']:>12.2%}{check['agreement']:>12.2%}"
            f"{description['size_bytes'] / 1e3:>9.0f} kB{median_milliseconds(results, index, 1):>9.3f} ms"
            f"{median_milliseconds(results, index, 2):>9.3f} ms{description['delegate_partitions']:>12}"
        )
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Learning curve, confusion matrix and latency, side by side."""
    from matplotlib.figure import Figure

    training = results["training"]
    figure = Figure(figsize=(16, 5), layout="constrained")
    curve, matrix, bars = figure.subplots(1, 3)
    steps = [line for line in results["learning_curve"] if line["kind"] == "train"]
    tests = [line for line in results["learning_curve"] if line["kind"] == "evaluation"]
    curve.plot([line["step"] for line in steps], [line["loss"] for line in steps], color="0.6")
    curve.set(xlabel="step", ylabel="training loss (grey)", title=f"Learning curve, {results['dataset']}")
    accuracy = curve.twinx()
    accuracy.plot([line["step"] for line in tests], [100 * line["top1"] for line in tests], "o-")
    accuracy.set_ylabel("test top-1 (%, blue)")

    names = list(training["per_class"])
    counts = training["confusion_matrix"]
    matrix.imshow([[count / max(sum(row), 1) for count in row] for row in counts], cmap="Blues", vmin=0, vmax=1)
    matrix.set_xticks(range(len(names)), names, rotation=90)
    matrix.set_yticks(range(len(names)), names)
    matrix.set(xlabel="predicted", ylabel="true", title=f"Confusion on {training['images']:,} test images")
    for row, values in enumerate(counts):
        for column, count in enumerate(values):
            if count:
                color = "white" if count > sum(values) / 2 else "black"
                matrix.text(column, row, count, ha="center", va="center", fontsize=7, color=color)

    labels = [f"{format}\n{threads} thread{'s' * (threads > 1)}" for format in results["exports"] for threads in (1, 2)]
    latencies = [median_milliseconds(results, index, threads) for index in range(len(GRAPHS)) for threads in (1, 2)]
    bars.bar_label(bars.bar(labels, latencies), fmt="%.3f")
    device = results["benchmark"]["device"]
    bars.set(ylabel="median latency (ms)", title=f"TFLite on {device['cpu']}")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    cli.run(main)

"""From nothing to a measured detector and segmenter in TFLite, in under 15 minutes: `make quickstart-dense`.

Runs the project's own commands one after the other, prints each before it runs, and gathers their results in one
table, one JSON file and one picture under runs/quickstart_dense. Run again, it resumes where it was stopped. The data
are the scenes that this project draws (docs/scenes.md): the objects of the test occur nowhere in training.
"""

import functools
import itertools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from mobiatt_tf import cli, files
from mobiatt_tf.errors import UserError
from tools import quickstart

# What a sound installation reaches of each task's measure: average precision at an overlap of .5, and the mean
# intersection over union, both on 200 scenes of objects and photographs that training did not show.
EXPECTED = {"detection": ("ap50", 0.5), "segmentation": ("miou", 0.5)}
MEASURES = {"detection": "mAP50", "segmentation": "mIoU"}
MODEL = (
    "--dataset=scenes",
    "--model=efficientformer_v2",
    "--variant=quickstart",
    "--image_size=64",
    "--training_size=64",
)
FORMATS = ("float32", "dynamic")
PICTURES = 6  # held-out images that are drawn
BRIEF_FLAGS = ("--epochs=1", "--limit_train=64", "--limit_test=8")
BRIEF_IMAGES = 8
run = functools.partial(quickstart.run, again="make quickstart-dense")


def main(_: Sequence[str]) -> None:
    """Trains, exports, measures and draws both tasks."""
    root = Path(__file__).resolve().parents[1]
    output = (Path.cwd() / files.user_path(flags.FLAGS.output_dir)).resolve()
    os.chdir(root)
    start = time.monotonic()
    photos = held_out_images(PICTURES)
    for task in EXPECTED:
        run_task(task, output, photos, flags.FLAGS.brief)
    results = {task: gather(task, output, flags.FLAGS.brief) for task in EXPECTED}
    files.write_json(output / "results.json", {**results, "seconds": round(time.monotonic() - start)})
    with files.atomic_path(output / "dense.png") as temporary:
        draw(results, output, photos, temporary)
    print("\n" + format_table(results))
    print(f"\nresults  {output / 'results.json'}\npicture  {output / 'dense.png'}")
    if not flags.FLAGS.brief:
        require_expected(results)


def held_out_images(count: int) -> list[Path]:
    """The first `count` test images of the scenes, which are drawn first where they are missing."""
    from mobiatt_tf.data import dense

    found = dense.load_detection("scenes")
    print(f"Dataset: scenes, {len(found.train)} training and {len(found.test)} test images.")
    return [Path(path) for path in (found.test.images.files or ())[:count]]


def run_task(task: str, output: Path, photos: Sequence[Path], brief: bool) -> None:
    """Runs the commands of one task."""
    python, run_directory = sys.executable, output / task
    changes = BRIEF_FLAGS if brief else ()
    move_aside_other_recipe(task, run_directory, changes)
    train = [python, "train_tpu_gpu.py", f"--task={task}", *MODEL, f"--recipe=quickstart_{task}", *changes]
    run([*train, "--evaluate_every=5", "--log_every=20", f"--output_dir={run_directory}"])
    for format in FORMATS:
        graph = graph_path(task, output, format)
        command = [python, "-m", "tflite.export", f"--checkpoint={run_directory}", f"--format={format}"]
        run([*command, f"--check_images={BRIEF_IMAGES if brief else 64}", f"--output={graph}"])
    predict = [python, "-m", "tflite.predict", f"--model={graph_path(task, output, 'float32')}"]
    run([*predict, f"--output_dir={pictures_path(task, output)}", *map(str, photos)])


def graph_path(task: str, output: Path, format: str) -> Path:
    """Where an exported file lies."""
    return output / f"{task}_{format}.tflite"


def pictures_path(task: str, output: Path) -> Path:
    """Where the drawn predictions of a task lie."""
    return output / f"{task}_pictures"


def move_aside_other_recipe(task: str, run_directory: Path, changes: Sequence[str]) -> None:
    """Keeps a run of another version of this project, with another recipe, out of the way of this one."""
    import dataclasses

    from mobiatt_tf import training

    if not (run_directory / "run.json").is_file():
        return
    fields = {field.name for field in dataclasses.fields(training.Recipe)}
    given = dict(change.removeprefix("--").split("=") for change in changes)
    overrides = {name: int(value) for name, value in given.items() if name in fields}
    recipe = dataclasses.asdict(training.make_recipe(f"quickstart_{task}", **overrides))
    if files.read_json(run_directory / "run.json")["recipe"] != recipe:
        names = (run_directory.with_name(f"{task}_old{number}") for number in itertools.count(1))
        aside = next(path for path in names if not path.exists())
        run_directory.rename(aside)
        print(f"{run_directory} is of another recipe and was moved to {aside}.")


def gather(task: str, output: Path, brief: bool) -> dict[str, Any]:
    """What the steps of a task wrote, and what each of its files reaches on the test images."""
    from mobiatt_tf.training.logs import read_log

    exports = {format: graph_path(task, output, format) for format in FORMATS}
    return {
        "training": files.read_json(output / task / "results.json"),
        "learning_curve": read_log(output / task / "log.jsonl"),
        "exports": {format: files.read_json(graph.with_suffix(".json")) for format, graph in exports.items()},
        "files": {format: measure(task, graph, brief) for format, graph in exports.items()},
    }


def measure(task: str, graph: Path, brief: bool) -> dict[str, Any]:
    """What a .tflite file reaches, by the code that measures the Keras model, as in its results.json."""
    from mobiatt_tf import tasks
    from mobiatt_tf.tasks import detection, segmentation
    from tflite import predictor

    model = predictor.load(graph, None, 1)
    dataset = tasks.load_dataset(task, "scenes")
    split = dataset.test.take(BRIEF_IMAGES) if brief else dataset.test
    evaluate: Any = {"detection": detection, "segmentation": segmentation}[task].evaluate_outputs
    return dict(evaluate(model.run, dataset, split, model.image_size).to_json(dataset.class_names))


def format_table(results: dict[str, Any]) -> str:
    """The closing table."""
    lines = []
    for task, (key, _) in EXPECTED.items():
        found = results[task]
        training = found["training"]
        lines += [
            f"{task}: {training['model']['parameters']:,} parameters, {training['epochs']} epochs in "
            f"{training['train_seconds']:.0f} s",
            f"  {'model':<18}{MEASURES[task]:>10}{'size':>12}{'1 thread':>12}",
            f"  {'Keras':<18}{training[key]:>10.2%}",
        ]
        for format, export in found["exports"].items():
            lines.append(
                f"  {'TFLite ' + format:<18}{found['files'][format][key]:>10.2%}"
                f"{export['description']['size_bytes'] / 1e3:>9.0f} kB"
                f"{export['latency']['median_seconds'] * 1e3:>9.2f} ms"
            )
        per_class = {name: values.get("ap50", values.get("iou")) for name, values in training["per_class"].items()}
        shown = (f"{name} {value:.0%}" for name, value in per_class.items() if value is not None)
        lines += [f"  {MEASURES[task]} of each class: {', '.join(shown)}", ""]
    return "\n".join(lines).rstrip()


def require_expected(results: dict[str, Any]) -> None:
    """Raises UserError where a model or a file falls short of `EXPECTED`."""
    for task, (key, expected) in EXPECTED.items():
        scores = {"Keras": results[task]["training"], **results[task]["files"]}
        for name, score in scores.items():
            if score[key] < expected:
                raise UserError(
                    f"{task}, {name}: {MEASURES[task]} is {score[key]:.1%}; a sound installation reaches more than "
                    f"{expected:.0%} on the scenes. Something is wrong here."
                )


def draw(results: dict[str, Any], output: Path, photos: Sequence[Path], path: Path) -> None:
    """Both learning curves, and what either model sees in held-out images."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(3 * len(photos), 11), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=(1.2, 1, 1))
    curves, boxes, regions = parts
    for axes, task in zip(curves.subplots(1, len(EXPECTED)), EXPECTED, strict=True):
        draw_curve(axes, results[task], task)
    for part, task, suffix in ((boxes, "detection", "boxes"), (regions, "segmentation", "regions")):
        part.suptitle(f"{task.capitalize()}: the .tflite file on images of objects that training did not show")
        for axes, photo in zip(np.ravel(part.subplots(1, len(photos))), photos, strict=True):
            with Image.open(pictures_path(task, output) / f"{photo.stem}_{suffix}.jpg") as picture:
                axes.imshow(np.asarray(picture))
            axes.axis("off")
    figure.savefig(path, dpi=90)


def draw_curve(axes: Any, found: dict[str, Any], task: str) -> None:
    """Training loss and the task's measure on the test images, over the steps."""
    key, expected = EXPECTED[task]
    steps = [line for line in found["learning_curve"] if line["kind"] == "train"]
    tests = [line for line in found["learning_curve"] if line["kind"] == "evaluation"]
    axes.plot([line["step"] for line in steps], [line["loss"] for line in steps], color="0.6")
    axes.set(xlabel="step", ylabel="training loss (grey)", title=f"{task.capitalize()}, scenes")
    measure_axes = axes.twinx()
    measure_axes.plot([line["step"] for line in tests], [100 * line[key] for line in tests], "o-")
    measure_axes.axhline(100 * expected, color="tab:blue", linestyle=":", linewidth=1)
    measure_axes.set(ylabel=f"{MEASURES[task]} on held-out objects (%, blue)", ylim=(0, 100))


if __name__ == "__main__":
    flags.DEFINE_string("output_dir", "runs/quickstart_dense", "Gets everything.")
    flags.DEFINE_bool("brief", False, "One epoch on a few images: a trial of the commands, not of the models.")
    cli.run(main)

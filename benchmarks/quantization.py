"""What quantization costs and saves: accuracy of trained models, and size, partitions and latency at full size.

PYTHONPATH=. python benchmarks/quantization.py

Trains small models on Fashion-MNIST at several token counts, quantizes each by every method (tflite.quantize) and with
training (tflite.qat), and compares all files on the 10,000 test images. Then converts full-size models with random
weights and measures their files in one interleaved run each. Everything that was done is kept: a second call goes on
from there. `--render` only rewrites the tables in docs/quantization.md from docs/quantization.json.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.model_table import put_into
from mobiatt_tf import cli, files
from mobiatt_tf.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "quantization.json"

# Model, its tokens (largest stage) and the training flags; the larger inputs see fewer images to stay within minutes.
TRAINED: dict[str, tuple[str, int, list[str]]] = {
    "deit_28": ("DeiT", 16, ["--jit_compile"]),
    "deit_49": ("DeiT", 49, ["--image_size=49", "--epochs=3", "--jit_compile"]),
    "deit_98": (
        "DeiT",
        196,
        ["--image_size=98", "--epochs=3", "--batch_size=64", "--limit_train=24000", "--jit_compile"],
    ),
    "deit_196": (
        "DeiT",
        784,
        ["--image_size=196", "--epochs=2", "--batch_size=32", "--limit_train=16000", "--jit_compile"],
    ),
    "pvt_v2_32": ("PVTv2", 256, ["--model=pvt_v2", "--epochs=2"]),
    "pvt_v2_64": (
        "PVTv2",
        1024,
        ["--model=pvt_v2", "--image_size=64", "--epochs=1", "--limit_train=24000", "--batch_size=64"],
    ),
    "efficientformer_v2_32": ("EfficientFormerV2", 4, ["--model=efficientformer_v2", "--epochs=1"]),
    "efficientformer_v2_112": (
        "EfficientFormerV2",
        49,
        ["--model=efficientformer_v2", "--image_size=112", "--epochs=1", "--limit_train=12000", "--batch_size=64"],
    ),
}
METHODS = ("int8", "int8_full", "dynamic", "litert_dynamic", "tf_int8", "litert_int8")
QAT_FLAGS = ["--limit_train=6000", "--batch_size=64"]
FULL_SIZE = {
    "DeiT tiny": ("deit", "tiny"),
    "PVTv2 b0": ("pvt_v2", "b0"),
    "EfficientFormerV2 s0": ("efficientformer_v2", "s0"),
}
FULL_SIZE_METHODS = ("float32", "float16", "dynamic", "int8", "int8_full")


def run(arguments: list[str]) -> None:
    """Runs one of the project's commands; it resumes by itself."""
    print(f"\n$ python {' '.join(arguments)}", flush=True)
    if subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode not in (0, 1):
        raise UserError("The command above failed.")


def trained(name: str, directory: Path) -> dict[str, Any]:
    """The two reports of one small model."""
    title, tokens, training_flags = TRAINED[name]
    float_run, dataset = directory / name / "float", "--dataset=fashion_mnist"
    small = ["--variant=quickstart", "--recipe=quickstart", dataset]
    run(["train_tpu_gpu.py", *small, *training_flags, f"--output_dir={float_run}"])
    common = [f"--checkpoint={float_run}", dataset]
    for output, command in (
        ("after", ["tflite.quantize", f"--method={','.join(METHODS)}"]),
        ("qat", ["tflite.qat", "--policy=int8", *QAT_FLAGS]),
    ):
        if not (directory / name / output / "report.json").is_file():
            run(["-m", *command, *common, f"--output_dir={directory / name / output}"])
    reports = {output: files.read_json(directory / name / output / "report.json") for output in ("after", "qat")}
    training_results = files.read_json(float_run / "results.json")
    return {
        "family": title,
        "tokens": tokens,
        "train_images": training_results["dataset"]["train_images"] * training_results["epochs"],
        **reports,
    }


def full_size(family: str, variant: str, runs: int) -> dict[str, Any]:
    """Size, partitions and latency of the files of one published model with random weights."""
    import keras

    import keras_models
    from mobiatt_tf import quantization
    from mobiatt_tf.verification import photographs
    from tflite import convert
    from tflite.host import HostDevice
    from tflite.measurements import Plan, ratio, reference_of

    keras.utils.set_random_seed(0)
    model = keras_models.FAMILIES[family].build(variant)
    images = photographs(model.input_shape[1:3], 16)
    with tempfile.TemporaryDirectory() as directory:
        paths = []
        for method in FULL_SIZE_METHODS:
            source, format = model, method
            if method.startswith("int8"):
                source, format = quantization.quantize_aware(model, method), method
                quantization.calibrate(source, [images])
            paths.append(Path(directory) / f"{method}.tflite")
            paths[-1].write_bytes(convert.convert(source, format))
        found = HostDevice().run(Plan(graphs=tuple(paths), runs=runs, profile=False))
    if found.interrupted:
        raise KeyboardInterrupt
    return {
        "device": found.device,
        "runs": runs,
        "threads": 1,
        "files": {
            method: {
                "size_bytes": description.size_bytes,
                "nodes": description.nodes,
                "partitions": description.delegate_partitions,
                "undelegated_ops": description.undelegated_ops,
                "latency_ratio": ratio(measurement, reference_of(found, measurement)).median,  # type: ignore[union-attr]
            }
            for method, description, measurement in zip(
                FULL_SIZE_METHODS, found.descriptions, found.measurements, strict=True
            )
        },
    }


def accuracy_table(results: dict[str, Any]) -> str:
    """Top-1 of every method on every trained model, as Markdown."""
    columns = ("float32", "int8, trained", "int8", "int8_full", "dynamic", "litert dynamic", "tf_int8", "litert int8")
    lines = [
        f"| model, tokens | {' | '.join(columns)} | file as fake-quant |",
        f"| --- |{' ---: |' * (len(columns) + 1)}",
    ]
    for row in results["trained"].values():
        after, qat = _by_name(row["after"]), _by_name(row["qat"])
        cells = [_percent(after["Keras float32"]), _percent(qat["int8.tflite"])]
        for method in METHODS:
            cells.append(
                "does not run"
                if f"{method}.tflite" in row["after"]["failures"]
                else _percent(after.get(f"{method}.tflite"))
            )
        agreement = qat["int8.tflite"]["agreement_with_fake_quant"]
        lines.append(f"| {row['family']}, {row['tokens']} | {' | '.join(cells)} | {100 * agreement:.2f} % |")
    return "\n".join(lines)


def cost_table(results: dict[str, Any]) -> str:
    """Size, partitions and latency at 224 x 224, as Markdown."""
    lines = [
        "| model | file | size | of float32 | XNNPACK partitions | latency of float32 |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for title, row in results["full_size"].items():
        reference = row["files"]["float32"]["size_bytes"]
        for method, file in row["files"].items():
            size = file["size_bytes"]
            lines.append(
                f"| {title} | {method} | {size / 1e6:.2f} MB | {size / reference:.3f} | {file['partitions']} "
                f"| {file['latency_ratio']:.2f} |"
            )
    return "\n".join(lines)


def _by_name(report: dict[str, Any]) -> dict[str, Any]:
    return {row["name"]: row for row in report["rows"]}


def _percent(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{100 * row['top1']:.2f} %"


def render(results: dict[str, Any]) -> None:
    """Rewrites the tables of the documentation."""
    document = ROOT / "docs" / "quantization.md"
    put_into(document, accuracy_table(results), "accuracy table")
    put_into(document, cost_table(results), "cost table")


def draw(results: dict[str, Any], path: Path) -> None:
    """Points of top-1 lost, and latency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5), layout="constrained")
    loss, latency = figure.subplots(1, 2)
    names = [f"{row['family']}\n{row['tokens']} tokens" for row in results["trained"].values()]
    for offset, (label, part, file) in enumerate(
        (
            ("int8, trained", "qat", "int8.tflite"),
            ("int8, calibrated", "after", "int8.tflite"),
            ("dynamic", "after", "dynamic.tflite"),
        )
    ):
        values = []
        for row in results["trained"].values():
            rows = _by_name(row[part])
            values.append(100 * (rows["Keras float32"]["top1"] - rows[file]["top1"]))
        loss.bar([index + 0.27 * offset for index in range(len(names))], values, width=0.25, label=label)
    loss.set_xticks(range(len(names)), names, fontsize=8)
    loss.axhline(0.5, color="0.6", linestyle=":")
    loss.legend()
    loss.set_ylabel("points of top-1 lost on 10,000 test images")
    for offset, (title, row) in enumerate(results["full_size"].items()):
        values = [file["latency_ratio"] for file in row["files"].values()]
        bars = latency.bar([index + 0.27 * offset for index in range(len(values))], values, width=0.25, label=title)
        latency.bar_label(bars, fmt="%.2f", fontsize=7)
    latency.set_xticks(range(len(FULL_SIZE_METHODS)), FULL_SIZE_METHODS)
    latency.legend()
    device = next(iter(results["full_size"].values()))["device"]
    latency.set(ylabel="latency, float32 = 1", title=f"224 x 224, 1 thread, {device['cpu']}")
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(_: Sequence[str]) -> None:
    """Does what is missing, then writes JSON, tables and picture."""
    values = flags.FLAGS
    if values.render:
        render(files.read_json(RESULTS))
        print("docs/quantization.md has the tables of docs/quantization.json.")
        return
    if unknown := [name for name in values.trained if name not in TRAINED]:
        raise UserError(f"There is no model {', '.join(unknown)}. Choose from {', '.join(TRAINED)}.")
    output = files.user_path(values.output_dir)
    file = output / "quantization.json"
    results = files.read_json(file) if file.is_file() else {"trained": {}, "full_size": {}}
    for title, (family, variant) in FULL_SIZE.items():
        if title not in results["full_size"]:
            results["full_size"][title] = full_size(family, variant, values.runs)
            files.write_json(file, results)
    for name in values.trained:
        if name not in results["trained"]:
            results["trained"][name] = trained(name, output)
            files.write_json(file, results)
    results["trained"] = {name: results["trained"][name] for name in TRAINED if name in results["trained"]}
    files.write_json(file, results)
    draw(results, output / "quantization.png")
    print(f"{accuracy_table(results)}\n\n{cost_table(results)}\n\nwritten: {file}, {output / 'quantization.png'}")


if __name__ == "__main__":
    flags.DEFINE_list("trained", list(TRAINED), "Which of the small models, comma separated.")
    flags.DEFINE_integer("runs", 50, "Recorded runs of each full-size graph.", lower_bound=3)
    flags.DEFINE_bool("render", False, "Only rewrite the tables in docs/quantization.md from docs/quantization.json.")
    flags.DEFINE_string("output_dir", "runs/quantization", "Gets quantization.json, quantization.png and all runs.")
    cli.run(main)

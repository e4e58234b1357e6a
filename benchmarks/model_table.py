"""Every model of the three families: parameters, multiply-adds, tokens, heads, TFLite sizes and latency.

PYTHONPATH=. python benchmarks/model_table.py --models=pvt_v2/b0,efficientformer_v2/s0

For each variant one interleaved run through LiteRT (XNNPACK) times the softmax host, the Mobile-Attention model, the
same with int8 weights, and a chain of large dense layers. That chain gives the processor's best rate; a model's
multiply-adds at that rate are its floor. Writes JSON after every variant (a second call goes on from there), a Markdown
table and a PNG. `--render` only rewrites the tables in README.md and docs/models.md from a JSON file.
"""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
from absl import flags
from tqdm import tqdm

import keras_models
from mobiatt_tf import cli, files
from mobiatt_tf.complexity import attention_stages, count_macs, trainable_parameters
from mobiatt_tf.errors import UserError
from tflite import convert
from tflite.host import HostDevice
from tflite.measurements import Plan, ratio

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "models.json"
PUBLISHED = [
    f"{family}/{variant}"
    for family, row in keras_models.FAMILIES.items()
    for variant in row.variants
    if variant not in ("quickstart", "b2_li")  # the second exists with softmax only
]
TITLES = {"deit": "DeiT", "pvt_v2": "PVTv2", "efficientformer_v2": "EfficientFormerV2"}
_PEAK_WIDTH, _PEAK_TOKENS, _PEAK_LAYERS = 1024, 512, 4


def shape_of(family: str, variant: str) -> dict[str, Any]:
    """What follows from the architecture alone, without conversion: parameters, multiply-adds, tokens and heads."""
    mobile = build(family, variant, "mobile")
    softmax = build(family, variant, "softmax")
    return {
        "parameters": trainable_parameters(mobile),
        "softmax_parameters": trainable_parameters(softmax),
        "macs": count_macs(mobile),
        "softmax_macs": count_macs(softmax),
        "attention": attention_stages(mobile),
    }


def build(family: str, variant: str, attention: str) -> keras.Model:
    """The model at its published image size, with one classifier head of 1000 classes."""
    return keras_models.FAMILIES[family].build(variant, attention=attention)


def measure(family: str, variant: str, runs: int, threads: int, directory: Path) -> dict[str, Any]:
    """Sizes in bytes, and latency in one interleaved run."""
    mobile = build(family, variant, "mobile")
    contents = {
        "softmax": convert.convert(build(family, variant, "softmax"), "float32"),
        **{
            format: convert.convert(mobile, format, convert.formulation_for(format, "x86"))
            for format in ("float32", "dynamic", "float16")
        },
        "peak": convert.convert(peak_model(), "float32"),
    }
    sizes = {name: len(content) for name, content in contents.items() if name in convert.FORMATS}
    del contents["float16"]  # on this runtime float16 weights run at the speed of float32
    graphs = []
    for name, content in contents.items():
        graphs.append(directory / f"{name}.tflite")
        graphs[-1].write_bytes(content)
    contents.clear()
    plan = Plan(graphs=tuple(graphs), num_threads=(threads,), runs=runs, runs_per_round=3, warmup=3, profile=False)
    found = HostDevice().run(plan)
    if found.interrupted:
        raise KeyboardInterrupt
    softmax, float32, dynamic, peak = found.measurements
    medians = [sorted(one.latencies)[len(one.latencies) // 2] for one in found.measurements]
    rate = _PEAK_LAYERS * _PEAK_TOKENS * _PEAK_WIDTH**2 / medians[3]
    return {
        "size_bytes": sizes,
        "partitions": {graph.stem: d.delegate_partitions for graph, d in zip(graphs, found.descriptions, strict=True)},
        "milliseconds": {graph.stem: 1e3 * median for graph, median in zip(graphs, medians, strict=True)},
        "ratio_to_softmax": {
            "float32": relative(float32, softmax),
            "dynamic": relative(dynamic, softmax),
        },
        "peak_macs_per_second": rate,
        "ratio_of_peak_chain": relative(float32, peak),
        "device": found.device,
        "threads": threads,
        "runs": runs,
    }


def relative(measurement: Any, reference: Any) -> dict[str, float]:
    """Median, least and greatest of the ratios paired by round."""
    found = ratio(measurement, reference)
    assert found is not None
    return {"median": found.median, "min": found.min, "max": found.max}


def peak_model() -> keras.Model:
    """Large dense layers alone: the rate of multiply-adds that nothing here exceeds."""
    tokens = keras.Input((_PEAK_TOKENS, _PEAK_WIDTH), batch_size=1)
    chain = keras.Sequential([keras.layers.Dense(_PEAK_WIDTH) for _ in range(_PEAK_LAYERS)])
    return keras.Model(tokens, chain(tokens))


def floor_share(row: dict[str, Any]) -> float:
    """Latency of the float32 model over that of its multiply-adds at the peak rate of the same run."""
    chain = _PEAK_LAYERS * _PEAK_TOKENS * _PEAK_WIDTH**2
    return float(row["ratio_of_peak_chain"]["median"] * chain / row["macs"])


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| model | parameters | MACs | attention: layers x tokens, heads | float32 / float16 / int8 weights | latency "
        "| to softmax host | int8 weights to softmax host | to floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results["models"].items():
        family, variant = name.split("/")
        attention = "; ".join(f"{stage['layers']} x {stage['tokens']}, {stage['heads']}" for stage in row["attention"])
        sizes = " / ".join(f"{row['size_bytes'][format] / 1e6:.1f}" for format in ("float32", "float16", "dynamic"))
        cells = [
            f"{TITLES[family]} {variant}",
            f"{row['parameters']:,} ({row['softmax_parameters']:,})",
            f"{row['macs'] / 1e9:.3f} G ({row['softmax_macs'] / 1e9:.3f} G)",
            attention,
            f"{sizes} MB",
            f"{row['milliseconds']['float32']:.1f} ms",
            *(f"{row['ratio_to_softmax'][format]['median']:.2f}" for format in ("float32", "dynamic")),
            f"{floor_share(row):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def short_table(results: dict[str, Any]) -> str:
    """The columns that the README has room for."""
    lines = ["| model | parameters | MACs | int8 weights | latency to softmax host: float32, int8 weights |"]
    lines.append("|---|---|---|---|---|")
    for name, row in results["models"].items():
        family, variant = name.split("/")
        ratios = ", ".join(f"{row['ratio_to_softmax'][format]['median']:.2f}" for format in ("float32", "dynamic"))
        cells = [
            f"{TITLES[family]} {variant}",
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['macs'] / 1e9:.2f} G",
            f"{row['size_bytes']['dynamic'] / 1e6:.1f} MB",
            ratios,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def put_into(document: Path, text: str, name: str = "model table") -> None:
    """Replaces what stands between the two comments that mark the table called `name`.

    Raises:
        UserError: the document has no such comments.
    """
    old = document.read_text()
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
    new, count = re.subn(pattern, lambda match: f"{match[1]}{text}\n{match[2]}", old, flags=re.DOTALL)
    if count != 1:
        raise UserError(f"{document} has no place for the table: <!-- {name} --> and <!-- end of {name} -->.")
    files.write_bytes(document, new.encode())


def draw(results: dict[str, Any], path: Path) -> None:
    """Latency over multiply-adds, Mobile-Attention beside its softmax host."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    for color, family in zip(("C0", "C1", "C2"), TITLES, strict=True):
        rows = {name.split("/")[1]: row for name, row in results["models"].items() if name.startswith(f"{family}/")}
        for key, macs, style, label in (
            ("float32", "macs", "o-", "Mobile-Attention"),
            ("dynamic", "macs", "^:", "Mobile-Attention, int8 weights"),
            ("softmax", "softmax_macs", "x--", "softmax host"),
        ):
            if points := sorted((row[macs] / 1e9, row["milliseconds"][key]) for row in rows.values()):
                axis.plot(*zip(*points, strict=True), style, color=color, label=f"{TITLES[family]}: {label}")
        for variant, row in rows.items():
            axis.annotate(variant, (row["macs"] / 1e9, row["milliseconds"]["float32"]), fontsize=8, va="bottom")
    device = next(iter(results["models"].values()))["device"]
    axis.set(xscale="log", yscale="log", xlabel="multiply-adds (G)", ylabel="median latency (ms), 1 thread")
    axis.set_title(f"224 x 224, {device['cpu']}, ai-edge-litert {device['ai_edge_litert']}")
    axis.legend(fontsize=8)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(_: Sequence[str]) -> None:
    """Measures what is missing, then writes JSON, table and picture."""
    values = flags.FLAGS
    if values.render:
        results = files.read_json(RESULTS)
        put_into(ROOT / "docs" / "models.md", table(results))
        put_into(ROOT / "README.md", short_table(results))
        print("README.md and docs/models.md have the tables of docs/models.json.")
        return
    if unknown := [name for name in values.models if name not in PUBLISHED]:
        raise UserError(f"There is no model {', '.join(unknown)}. Choose from {', '.join(PUBLISHED)}.")
    output = files.user_path(values.output_dir)
    file = output / "models.json"
    results = files.read_json(file) if file.is_file() else {"models": {}}
    for name in (progress := tqdm(values.models, desc="models", mininterval=30)):
        if name in results["models"]:
            continue
        progress.write(f"{name} ...")
        with tempfile.TemporaryDirectory() as directory:
            family, variant = name.split("/")
            row = measure(family, variant, values.runs, values.num_threads, Path(directory))
            results["models"][name] = {**shape_of(family, variant), **row}
        results["models"] = {name: results["models"][name] for name in PUBLISHED if name in results["models"]}
        files.write_json(file, results)
    draw(results, output / "models.png")
    print(table(results))
    print(f"\nwritten: {file}, {output / 'models.png'}")


if __name__ == "__main__":
    flags.DEFINE_list("models", PUBLISHED, "FAMILY/VARIANT, comma separated.")
    flags.DEFINE_integer("runs", 30, "Recorded runs of each graph.", lower_bound=3)
    flags.DEFINE_integer("num_threads", 1, "Threads.", lower_bound=1)
    flags.DEFINE_bool("render", False, "Only rewrite the tables in README.md and docs/ from docs/models.json.")
    flags.DEFINE_string("output_dir", "runs/models", "Gets models.json and models.png.")
    cli.run(main)

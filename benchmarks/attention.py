"""Latency of attention blocks as .tflite files, relative to the floor of their four dense projections.

PYTHONPATH=. python benchmarks/attention.py --tokens=49,196,784 --model_dims=192 --head_dims=8

The blocks of one size are measured in one interleaved run through LiteRT and XNNPACK; ratios are paired by round. The
floor is a graph of the four projections alone: no attention can do with less. A chain of large dense layers runs beside
them: its rate of multiply-adds is the roof, and each block's share of it is shown. Writes JSON after every size (a
second call goes on from there) and a PNG. `--render` only rewrites the tables in docs/performance.md.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from benchmarks import blocks
from benchmarks.model_table import put_into, relative
from mobiatt_tf import cli, files
from mobiatt_tf.errors import UserError
from mobiatt_tf.formulation import Formulation
from tflite import convert
from tflite.host import HostDevice
from tflite.measurements import Plan

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "attention.json"
COMPARED = ("mobile_d{d}", "training_form_d{d}", "naive_d{d}", "softmax_d64", "linear_d64")
TITLES = {
    "mobile": "Mobile-Attention",
    "training_form": "as trained",
    "naive": "published layout",
    "softmax": "softmax",
    "linear": "linear (elu + 1)",
}


def names_for(model_dim: int, head_dim: int) -> list[str]:
    """The blocks that are compared at one size; the first is the floor, the last the peak."""
    wide = min(64, model_dim)
    compared = [name.format(d=head_dim).replace("_d64", f"_d{wide}") for name in COMPARED]
    return [blocks.FLOOR, *compared, blocks.PEAK]


def measure(
    tokens: int, model_dim: int, head_dim: int, format: str, threads: int, runs: int, formulation: Formulation
) -> dict[str, Any]:
    """One size in one interleaved run."""
    names = names_for(model_dim, head_dim)
    with tempfile.TemporaryDirectory() as directory:
        graphs = [Path(directory) / f"{name}.tflite" for name in names]
        for name, path in zip(names, graphs, strict=True):
            path.write_bytes(blocks.graph(name, tokens, model_dim, format, formulation))
        found = HostDevice().run(Plan(graphs=tuple(graphs), num_threads=(threads,), runs=runs, profile=False))
    if found.interrupted:
        raise KeyboardInterrupt
    floor, peak = found.measurements[0], found.measurements[-1]
    rows = {}
    for name, measurement, description in zip(names, found.measurements, found.descriptions, strict=True):
        median = sorted(measurement.latencies)[len(measurement.latencies) // 2]
        multiply_adds = blocks.multiply_adds(name, tokens, model_dim, format)
        to_peak = relative(measurement, peak)["median"] * blocks.multiply_adds(blocks.PEAK, tokens, model_dim, format)
        rows[name] = {
            "milliseconds": 1e3 * median,
            "to_floor": relative(measurement, floor),
            "gflops": 2e-9 * multiply_adds / median,
            "share_of_peak": multiply_adds / to_peak,
            "nodes": description.nodes,
            "partitions": description.delegate_partitions,
        }
    return {
        "tokens": tokens,
        "model_dim": model_dim,
        "head_dim": head_dim,
        "format": format,
        "threads": threads,
        "runs": runs,
        "blocks": rows,
        "device": found.device,
    }


def key_of(tokens: int, model_dim: int, head_dim: int, format: str, threads: int) -> str:
    """The name of one size in the JSON file."""
    return f"{format}, {threads} thread(s), {tokens} tokens, width {model_dim}, d={head_dim}"


def table(results: dict[str, Any], format: str, threads: int) -> str:
    """Ratios to the floor of one format as a Markdown table, a row for each size."""
    lines = [
        "| tokens x width, d | floor | Mobile-Attention | as trained | published layout | softmax | linear (elu + 1) "
        "| share of the core's peak: floor, Mobile-Attention, softmax |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results.values():
        if (row["format"], row["threads"]) != (format, threads):
            continue
        floor, *compared, _ = row["blocks"].values()
        shares = (floor, compared[0], compared[3])
        cells = [
            f"{row['tokens']} x {row['model_dim']}, {row['head_dim']}",
            f"{floor['milliseconds']:.3f} ms",
            *(f"{block['to_floor']['median']:.2f}" for block in compared),
            ", ".join(f"{block['share_of_peak']:.0%}" for block in shares),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Ratio to the floor over the number of tokens, a panel for each format, at the width that has most sizes."""
    from matplotlib.figure import Figure

    rows = [row for row in results.values() if row["threads"] == 1] or list(results.values())
    widths = [(row["model_dim"], row["head_dim"]) for row in rows]
    width, head_dim = max(set(widths), key=widths.count)
    formats = sorted({row["format"] for row in rows}, reverse=True)
    figure = Figure(figsize=(6.5 * len(formats), 4.8), layout="constrained")
    for axis, format in zip(figure.subplots(1, len(formats), squeeze=False)[0], formats, strict=True):
        chosen = [
            row for row in rows if (row["model_dim"], row["head_dim"], row["format"]) == (width, head_dim, format)
        ]
        chosen.sort(key=lambda row: row["tokens"])
        for name in names_for(width, head_dim)[1:-1]:
            kind, _, channels = name.rpartition("_d")
            ratios = [row["blocks"][name]["to_floor"]["median"] for row in chosen]
            axis.plot([row["tokens"] for row in chosen], ratios, "o-", label=f"{TITLES[kind]}, d={channels}")
        axis.axhline(1, color="0.7", linestyle="--", label="floor: the four projections")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="latency relative to the floor")
        axis.set_title(f"{format}, width {width}, {rows[0]['threads']} thread(s)")
        axis.set_xticks([row["tokens"] for row in chosen], [str(row["tokens"]) for row in chosen])
        axis.legend(fontsize=8)
    device = rows[0]["device"]
    figure.suptitle(f"{device['cpu']}, ai-edge-litert {device['ai_edge_litert']}", fontsize=9)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def render() -> None:
    """Writes the tables of the committed results into docs/performance.md."""
    results = files.read_json(RESULTS)
    for format in ("float32", "dynamic"):
        for threads in (1, 2):
            name = f"attention {format} {threads}"
            put_into(ROOT / "docs" / "performance.md", table(results, format, threads), name)


def main(_: Sequence[str]) -> None:
    """Measures what is missing, then writes JSON, tables and picture."""
    values = flags.FLAGS
    if values.render:
        render()
        return
    lists = {name: _numbers(name) for name in ("tokens", "model_dims", "head_dims", "num_threads")}
    if unknown := [format for format in values.formats if format not in convert.FORMATS]:
        raise UserError(f"There is no format {', '.join(unknown)}. Choose from {', '.join(convert.FORMATS)}.")
    output = files.user_path(values.output_dir)
    file = output / "attention.json"
    results = files.read_json(file) if file.is_file() else {}
    changes = {name: getattr(values, name) for name in ("group_width", "chunk_tokens") if getattr(values, name)}
    if "chunk_tokens" in changes:
        changes["chunk_from"] = 1
    chosen = {
        format: dataclasses.replace(convert.formulation_for(format, "x86"), **changes) for format in values.formats
    }
    written = "".join(f", {name}={value}" for name, value in changes.items() if name != "chunk_from")
    sizes = [
        (tokens, model_dim, head_dim, format, threads)
        for format in values.formats
        for threads in lists["num_threads"]
        for model_dim in lists["model_dims"]
        for head_dim in lists["head_dims"]
        for tokens in lists["tokens"]
    ]
    for size in (progress := tqdm(sizes, desc="sizes", mininterval=30)):
        key = f"{key_of(*size)}{written}"
        if results.get(key, {}).get("runs") == values.runs:
            continue
        progress.write(f"{key} ...")
        try:
            results[key] = measure(*size, values.runs, chosen[size[3]])
        except ValueError as error:
            raise UserError(str(error)) from error
        files.write_json(file, results)
    for format in values.formats:
        for threads in lists["num_threads"]:
            print(
                f"\n{format}, {threads} thread(s): latency relative to the floor\n\n{table(results, format, threads)}"
            )
    draw(results, output / "attention.png")
    print(f"\nwritten: {file}, {output / 'attention.png'}")


def _numbers(flag: str) -> list[int]:
    """A flag that lists positive numbers."""
    given = flags.FLAGS[flag].value
    if not given or not all(number.isdecimal() and int(number) for number in given):
        raise UserError(f"--{flag}={','.join(given)} is not a list of numbers; give it as in --{flag}=49,196.")
    return [int(number) for number in given]


if __name__ == "__main__":
    flags.DEFINE_list("tokens", ["49", "196", "784"], "Numbers of tokens.")
    flags.DEFINE_list("model_dims", ["192"], "Widths of the block.")
    flags.DEFINE_list("head_dims", ["8"], "Channels of a head of Mobile-Attention.")
    flags.DEFINE_list("formats", ["float32"], f"Some of {', '.join(convert.FORMATS)}.")
    flags.DEFINE_list("num_threads", ["1"], "Threads.")
    flags.DEFINE_integer("runs", 60, "Recorded runs of each graph.", lower_bound=1)
    flags.DEFINE_integer("group_width", None, "Instead of the default for x86.", lower_bound=1)
    flags.DEFINE_integer("chunk_tokens", None, "Cut every sequence into chunks of so many tokens.", lower_bound=1)
    flags.DEFINE_bool("render", False, "Only rewrite the tables in docs/performance.md from docs/attention.json.")
    flags.DEFINE_string("output_dir", "runs/attention", "Gets attention.json and attention.png.")
    cli.run(main)

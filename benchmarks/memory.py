"""Peak memory and latency of attention blocks as .tflite files against the number of tokens.

PYTHONPATH=. python benchmarks/memory.py --tokens=196,784,3136,12544

Each file is loaded in a process of its own; peak memory is what that process grew by, at most, from before it loaded
the file to the end of the runs: weights, packed weights and every tensor. Writes JSON after every size (a second call
goes on from there) and a PNG. `--render` only rewrites the table in docs/performance.md.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from benchmarks import blocks
from benchmarks.model_table import put_into
from mobiatt_tf import cli, files
from mobiatt_tf.errors import UserError
from tflite import convert
from tflite.host import HostDevice
from tflite.measurements import Plan

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "memory.json"
TITLES = {
    blocks.FLOOR: "four projections",
    "mobile_d8": "Mobile-Attention",
    "training_form_d8": "as trained",
    "naive_d8": "published layout",
    "softmax_d64": "softmax",
}


def measure(tokens: int, model_dim: int, format: str, runs: int, most_softmax_tokens: int) -> dict[str, Any]:
    """Every block at one number of tokens; softmax only up to `most_softmax_tokens`."""
    names = [name for name in TITLES if name != "softmax_d64" or tokens <= most_softmax_tokens]
    with tempfile.TemporaryDirectory() as directory:
        graphs = [Path(directory) / f"{name}.tflite" for name in names]
        for name, path in zip(names, graphs, strict=True):
            path.write_bytes(blocks.graph(name, tokens, model_dim, format))
        plan = Plan(graphs=tuple(graphs), runs=runs, runs_per_round=2, warmup=1, profile=False)
        found = HostDevice().run(plan)
    if found.interrupted:
        raise KeyboardInterrupt
    rows = {}
    for name, measurement in zip(names, found.measurements, strict=True):
        median = sorted(measurement.latencies)[len(measurement.latencies) // 2]
        rows[name] = {"peak_bytes": measurement.model_bytes, "microseconds_per_token": 1e6 * median / tokens}
    return {
        "tokens": tokens,
        "model_dim": model_dim,
        "format": format,
        "runs": runs,
        "blocks": rows,
        "device": found.device,
    }


def table(results: dict[str, Any]) -> str:
    """Megabytes and microseconds a token as a Markdown table, a row for each number of tokens."""
    lines = [
        f"| tokens | {' | '.join(f'{title}: MB, µs a token' for title in TITLES.values())} |",
        f"|---|{'---|' * len(TITLES)}",
    ]
    for row in results.values():
        cells = [
            f"{row['blocks'][name]['peak_bytes'] / 1e6:.1f}, {row['blocks'][name]['microseconds_per_token']:.2f}"
            if name in row["blocks"]
            else "not measured"
            for name in TITLES
        ]
        lines.append(f"| {row['tokens']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Peak memory, and time for a token, over the number of tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    memory, time = figure.subplots(1, 2)
    for name, title in TITLES.items():
        rows = [row for row in results.values() if name in row["blocks"]]
        tokens = [row["tokens"] for row in rows]
        memory.plot(tokens, [row["blocks"][name]["peak_bytes"] / 1e6 for row in rows], "o-", label=title)
        time.plot(tokens, [row["blocks"][name]["microseconds_per_token"] for row in rows], "o-", label=title)
    memory.set(xscale="log", yscale="log", xlabel="tokens", ylabel="peak memory (MB)")
    time.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time for a token (µs)")
    memory.legend(fontsize=8)
    first = next(iter(results.values()))
    device = first["device"]
    figure.suptitle(
        f"width {first['model_dim']}, {first['format']}, 1 thread, {device['cpu']}, "
        f"ai-edge-litert {device['ai_edge_litert']}",
        fontsize=9,
    )
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(_: Sequence[str]) -> None:
    """Measures what is missing, then writes JSON, table and picture."""
    values = flags.FLAGS
    if values.render:
        put_into(ROOT / "docs" / "performance.md", table(files.read_json(RESULTS)), "memory")
        return
    if not values.tokens or not all(count.isdecimal() and int(count) for count in values.tokens):
        raise UserError(f"--tokens={','.join(values.tokens)} is not a list of numbers; give it as in --tokens=196,784.")
    output = files.user_path(values.output_dir)
    file = output / "memory.json"
    results = files.read_json(file) if file.is_file() else {}
    for tokens in (progress := tqdm([int(count) for count in values.tokens], desc="sizes", mininterval=30)):
        key = f"{values.format}, width {values.model_dim}, {tokens} tokens"
        if results.get(key, {}).get("runs") == values.runs:
            continue
        progress.write(f"{key} ...")
        try:
            results[key] = measure(tokens, values.model_dim, values.format, values.runs, values.most_softmax_tokens)
        except ValueError as error:
            raise UserError(str(error)) from error
        files.write_json(file, results)
    shown = {
        key: row
        for key, row in results.items()
        if (row["format"], row["model_dim"]) == (values.format, values.model_dim)
    }
    print(table(shown))
    draw(shown, output / "memory.png")
    print(f"\nwritten: {file}, {output / 'memory.png'}")


if __name__ == "__main__":
    flags.DEFINE_list("tokens", ["196", "784", "3136", "12544"], "Numbers of tokens.")
    flags.DEFINE_integer("model_dim", 192, "Width of the block, a multiple of 64.", lower_bound=64)
    flags.DEFINE_enum("format", "float32", list(convert.FORMATS), "Precision of the files.")
    flags.DEFINE_integer("runs", 10, "Recorded runs of each graph.", lower_bound=1)
    flags.DEFINE_integer("most_softmax_tokens", 4096, "Above, softmax would need gigabytes.", lower_bound=1)
    flags.DEFINE_bool("render", False, "Only rewrite the table in docs/performance.md from docs/memory.json.")
    flags.DEFINE_string("output_dir", "runs/memory", "Gets memory.json and memory.png.")
    cli.run(main)

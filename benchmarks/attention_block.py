"""Latency of one attention block as a TFLite file, against the floor of its four dense projections.

PYTHONPATH=. python benchmarks/attention_block.py --tokens=49,196,784 --model_dim=192

All files of one size are measured in one interleaved run through LiteRT and XNNPACK; ratios are paired by round. The
floor is a graph of the four projections alone: no attention can be faster. Writes JSON and a PNG.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
from absl import flags

from mobiatt_tf import cli, files
from mobiatt_tf.errors import UserError
from mobiatt_tf.layers import ATTENTIONS
from tflite import convert
from tflite.host import HostDevice
from tflite.measurements import Plan, ratio, to_json


def floor(model_dim: int) -> keras.Sequential:
    """The four projections of an attention block one after the other, and nothing between them."""
    return keras.Sequential([keras.layers.Dense(model_dim, name=name) for name in ("query", "key", "value", "out")])


def blocks(model_dim: int, head_dim: int, softmax_head_dim: int) -> dict[str, Any]:
    """The graphs to compare by name; the first is the one that ratios refer to."""
    mobile, softmax, linear = (ATTENTIONS[kind] for kind in ("mobile", "softmax", "linear"))
    return {
        "floor": floor(model_dim),
        f"mobile_d{head_dim}": mobile(model_dim // head_dim),
        f"mobile_d{softmax_head_dim}": mobile(model_dim // softmax_head_dim),
        f"softmax_d{softmax_head_dim}": softmax(model_dim // softmax_head_dim),
        f"linear_d{softmax_head_dim}": linear(model_dim // softmax_head_dim),
    }


def measure(tokens: int, format: str, directory: Path) -> Any:
    """Converts every block at `tokens` tokens and measures them in one run."""
    values = flags.FLAGS
    graphs = []
    for name, block in blocks(values.model_dim, values.head_dim, values.softmax_head_dim).items():
        inputs = keras.Input((tokens, values.model_dim), batch_size=1)
        graphs.append(directory / f"{name}_n{tokens}.tflite")
        graphs[-1].write_bytes(convert.convert(keras.Model(inputs, block(inputs)), format))
    threads = (values.num_threads,)
    return HostDevice().run(Plan(graphs=tuple(graphs), num_threads=threads, runs=values.runs, profile=False))


def main(_: Sequence[str]) -> None:
    """Measures every number of tokens and writes the report."""
    values = flags.FLAGS
    for name in ("head_dim", "softmax_head_dim"):
        if values.model_dim % getattr(values, name):
            raise UserError(f"--{name}={getattr(values, name)} does not divide --model_dim={values.model_dim}.")
    if not values.tokens or not all(count.isdecimal() and int(count) for count in values.tokens):
        raise UserError(f"--tokens={','.join(values.tokens)} is not a list of numbers; give it as in --tokens=49,196.")
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        for tokens in (int(count) for count in values.tokens):
            found = measure(tokens, values.format, Path(directory))
            results[tokens] = found
            device = found.device
    print(
        f"{device['cpu']}, ai-edge-litert {device['ai_edge_litert']}, {values.num_threads} thread(s), {values.format}"
    )
    print(f"width {values.model_dim}; median latency relative to the four projections of the same size (the floor)\n")
    names = list(blocks(values.model_dim, values.head_dim, values.softmax_head_dim))
    print(f"{'tokens':>8}{'floor ms':>12}" + "".join(f"{name:>14}" for name in names[1:]))
    ratios: dict[int, list[float]] = {}
    for tokens, found in results.items():
        first = found.measurements[0]
        ratios[tokens] = [ratio(measurement, first).median for measurement in found.measurements[1:]]
        milliseconds = sorted(first.latencies)[len(first.latencies) // 2] * 1e3
        print(f"{tokens:>8}{milliseconds:>12.3f}" + "".join(f"{value:>14.2f}" for value in ratios[tokens]))
    output = files.user_path(values.output_dir)
    files.write_json(
        output / "attention_block.json", {str(tokens): to_json(found) for tokens, found in results.items()}
    )
    with files.atomic_path(output / "attention_block.png") as temporary:
        draw(ratios, names[1:], temporary)
    print(f"\nwritten: {output / 'attention_block.json'}, {output / 'attention_block.png'}")


def draw(ratios: dict[int, list[float]], names: list[str], path: Path) -> None:
    """Ratio to the floor over the number of tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for index, name in enumerate(names):
        axis.plot(list(ratios), [values[index] for values in ratios.values()], "o-", label=name)
    axis.axhline(1, color="0.7", linestyle="--", label="floor: four projections")
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="latency relative to the floor")
    axis.set_xticks(list(ratios), [str(tokens) for tokens in ratios])
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    flags.DEFINE_list("tokens", ["49", "196", "784"], "Numbers of tokens.")
    flags.DEFINE_integer("model_dim", 192, "Width of the block.", lower_bound=1)
    flags.DEFINE_integer("head_dim", 8, "Channels of a head of Mobile-Attention.", lower_bound=1)
    flags.DEFINE_integer("softmax_head_dim", 64, "Channels of a head of the others.", lower_bound=1)
    flags.DEFINE_integer("num_threads", 1, "Threads.", lower_bound=1)
    flags.DEFINE_integer("runs", 100, "Recorded runs of each graph.", lower_bound=1)
    flags.DEFINE_enum("format", "float32", list(convert.FORMATS), "Precision of the files.")
    flags.DEFINE_string("output_dir", "runs/attention_block", "Gets the JSON and the PNG.")
    cli.run(main)

"""Instructions that the aarch64 build of LiteRT executes for one inference, in QEMU's emulation of a Cortex-A76.

tools/arm/setup.sh && PYTHONPATH=. python benchmarks/arm.py

It is no time and no speed: a multiply-add of four floats, a cache miss and a division all count as one instruction, and
nothing is known of pipelines, clocks or batteries. It is the same number on every machine and run, so it shows what a
change does to the code that a phone executes: which kernels run, and how much is spent between the matrix products.
One thread; the instructions of the Python call around an inference are included. The outputs must be those
that LiteRT computes on this machine.

Without --graph the attention blocks are counted, relative to the float32 floor (the four dense projections alone). The
graphs named float16 are the float32 files with a mark that lets XNNPACK compute in float16, which an A76 can.
--check compares the counts with those in --baseline: exit status 1 where one rose, 2 where QEMU or LiteRT is another.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from mobiatt_tf import cli, files
from mobiatt_tf.errors import UserError
from tools.arm import emulator
from tools.arm.emulator import CLASSES, CPU, Count

ROOT = Path(__file__).resolve().parents[1]
BASELINE = ROOT / "docs" / "arm.json"
TOLERANCE = 0.005  # relative change of a count that --check reports
TOKENS, MODEL_DIM = 196, 192
OTHER_ENVIRONMENT = 2  # exit status
BLOCKS = ("floor", "mobile_d8", "mobile_d4", "training_form_d8", "naive_d8", "softmax_d64")


def graphs(directory: Path) -> dict[str, Path]:
    """Writes the project's graphs to `directory`: "block/format" to .tflite file. The first is the floor in float32."""
    import keras

    from benchmarks import blocks
    from tflite import convert

    keras.utils.set_random_seed(0)
    contents = {}
    for name in BLOCKS:
        for format in ("float32", "dynamic"):
            contents[f"{name}/{format}"] = blocks.graph(
                name, TOKENS, MODEL_DIM, format, convert.formulation_for(format, "arm")
            )
        contents[f"{name}/float16"] = emulator.with_float16(contents[f"{name}/float32"])
    paths = {name: directory / f"{name.replace('/', '.')}.tflite" for name in contents}
    for name, path in paths.items():
        path.write_bytes(contents[name])
    return paths


def compare(counts: dict[str, Count], baseline: dict[str, Count]) -> tuple[list[str], list[str]]:
    """One line for each graph that got worse, and one for each that the baseline is out of date for."""
    worse, better = [], []
    for name, found in counts.items():
        known = baseline.get(name)
        if known is None:
            better.append(f"{name}: not in the baseline; update the baseline.")
        elif found.instructions is None:
            if known.instructions is not None:
                worse.append(f"{name}: does not run any more: {found.error}")
        elif known.instructions is None:
            better.append(f"{name}: runs now; update the baseline.")
        else:
            change = found.instructions / known.instructions - 1
            nodes = "" if found.nodes == known.nodes else f" The file has {found.nodes} nodes, it had {known.nodes}."
            line = f"{name}: {found.instructions:,} instructions executed, {change:+.2%} against the baseline"
            if change > TOLERANCE:
                worse.append(f"{line}.{nodes}")
            elif change < -TOLERANCE:
                better.append(f"{line}; update the baseline.{nodes}")
    worse += [f"{name}: in the baseline, but not counted." for name in baseline if name not in counts]
    return worse, better


def table(counts: dict[str, Count]) -> str:
    """The counts as text; ratios are to the first graph."""
    width = max(len(name) for name in counts)
    first = next(iter(counts.values())).instructions
    lines = [f"{'':{width}}{'nodes':>7}{'instructions':>14}{'ratio':>8}" + "".join(f"{name:>9}" for name in CLASSES)]
    for name, found in counts.items():
        line = f"{name:{width}}{found.nodes:>7}"
        if found.classes is None or found.instructions is None:
            lines.append(f"{line}  does not run: {found.error}")
            continue
        ratio = f"{found.instructions / first:>8.3f}" if first else f"{'':>8}"
        shares = "".join(f"{value / found.instructions:>9.1%}" for value in found.classes.values())
        lines.append(f"{line}{found.instructions:>14,}{ratio}{shares}")
    return "\n".join(lines)


def markdown(counts: dict[str, Count]) -> str:
    """The counts as a Markdown table: a row for each block, millions of instructions and ratio to the first graph."""
    first = next(iter(counts.values())).instructions
    assert first is not None
    lines = ["| block | float32 | dynamic | float16 |", "|---|---|---|---|"]
    for block in dict.fromkeys(name.partition("/")[0] for name in counts):
        cells = []
        for format in ("float32", "dynamic", "float16"):
            executed = counts[f"{block}/{format}"].instructions
            cells.append("does not run" if executed is None else f"{executed / 1e6:.2f} M, {executed / first:.3f}")
        lines.append(f"| {block} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(counts: dict[str, Count], path: Path) -> None:
    """Bars of instructions executed, by class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.35 * len(counts)), layout="constrained")
    axis = figure.subplots()
    names = [f"{name} (does not run)" if found.error else name for name, found in counts.items()]
    left = np.zeros(len(counts))
    for key, title in CLASSES.items():
        values = np.array([found.classes[key] if found.classes else 0 for found in counts.values()]) / 1e6
        if values.any():
            axis.barh(names, values, left=left, label=title)
        left += values
    axis.invert_yaxis()
    axis.set(xlabel=f"million instructions executed per inference (emulated {CPU}; not time)")
    axis.legend()
    figure.savefig(path, dpi=120)


def from_json(value: dict[str, Any]) -> dict[str, Count]:
    """The counts of a baseline."""
    return {
        name: Count(row["nodes"], row["instructions_executed"], row["error"]) for name, row in value["graphs"].items()
    }


def to_json(counts: dict[str, Count], found: dict[str, str]) -> dict[str, Any]:
    """Everything as plain values; `from_json` reads the counts back."""
    return {
        "what": "instructions executed per inference under emulation, by class; not time",
        "environment": found,
        "threads": 1,
        "graphs": {
            name: {"nodes": row.nodes, "instructions_executed": row.classes, "error": row.error}
            for name, row in counts.items()
        },
    }


def main(_: Sequence[str]) -> None:
    """Counts, prints the table, writes JSON and a PNG, and compares with or rewrites the baseline."""
    values = flags.FLAGS
    compared = values.check or values.update
    if compared and values.graph:
        raise UserError("--check and --update are about the project's own graphs. Leave --graph out.")
    if values.check and values.update:
        raise UserError("--check reads the baseline, --update rewrites it. Give one of them.")
    baseline_path, output = files.user_path(values.baseline), files.user_path(values.output_dir)
    if values.check and not baseline_path.is_file():
        raise UserError(f"There is no baseline {baseline_path}. Write it with --update, or name one with --baseline.")
    if values.render:
        from benchmarks.model_table import put_into

        put_into(ROOT / "docs" / "performance.md", markdown(from_json(files.read_json(baseline_path))), "arm")
        return
    found = emulator.environment()
    baseline = files.read_json(baseline_path) if values.check else None
    if baseline and (reason := emulator.other_environment(found, baseline["environment"])):
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(OTHER_ENVIRONMENT)
    with tempfile.TemporaryDirectory() as directory:
        paths = {path: files.user_path(path) for path in values.graph} or graphs(Path(directory))
        counts = {
            name: emulator.count(path, values.inferences)
            for name, path in tqdm(paths.items(), leave=False, mininterval=0.5 if sys.stderr.isatty() else 30)
        }
    print(f"Instructions executed per inference, not time: LiteRT {found['ai_edge_litert']} for aarch64, one thread,")
    print(f"{found['cpu']} emulated by QEMU {found['qemu']}. Ratios are to {next(iter(counts))}.\n")
    print(table(counts))
    files.write_json(output / "arm.json", to_json(counts, found))
    with files.atomic_path(output / "arm.png") as temporary:
        draw(counts, temporary)
    print(f"\nwritten: {output / 'arm.json'}, {output / 'arm.png'}")
    if values.update:
        files.write_json(baseline_path, to_json(counts, found))
        print(f"written: {baseline_path}")
    if baseline:
        worse, stale = compare(counts, from_json(baseline))
        print("\n".join(["", *stale, *worse] if stale or worse else ["", "All counts are the baseline's."]))
        if worse:
            raise UserError(f"{len(worse)} of {len(counts)} graphs got worse than {baseline_path}; see above.")


if __name__ == "__main__":
    flags.DEFINE_list("graph", [], ".tflite files to count; without it, the project's attention blocks.")
    flags.DEFINE_integer("inferences", 2, f"Counted inferences, after {emulator.SKIPPED} others.", lower_bound=1)
    flags.DEFINE_string("baseline", str(BASELINE), "The counts to compare with.")
    flags.DEFINE_bool("check", False, f"Fail where a count rose by more than {TOLERANCE:.1%}.")
    flags.DEFINE_bool("update", False, "Rewrite the baseline.")
    flags.DEFINE_bool("render", False, "Only rewrite the table in docs/performance.md from the baseline.")
    flags.DEFINE_string("output_dir", "runs/arm", "Gets the JSON and the PNG.")
    cli.run(main)

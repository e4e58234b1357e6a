"""What each rewrite of an exported model gains: DeiT as trained, then one rewrite after the other, in one run.

PYTHONPATH=. python benchmarks/rewrites.py

Latency of every step in float32, with dynamic range and in int8 relative to the float32 file as trained, one thread.
Writes JSON and a Markdown table. `--render` only rewrites the table in docs/performance.md.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
from absl import flags

import keras_models
from benchmarks.model_table import put_into, relative
from mobiatt_tf import cli, files, quantization
from mobiatt_tf.lean import lean
from mobiatt_tf.models import rebuild
from mobiatt_tf.verification import photographs
from tflite import convert, float_ops
from tflite.host import HostDevice
from tflite.measurements import Plan

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "rewrites.json"
FORMATS = ("float32", "dynamic", "int8")
STEPS = {  # name -> what is rewritten: attention, patches, scales and offsets of norms, means of streams
    "as trained": (False, False, False, False),
    "attention in its own formulation": (True, False, False, False),
    "patch embedding as a dense layer over whole patches": (True, True, False, False),
    "LayerNorm's scale and offset in the projections behind it": (True, True, True, False),
    "residual stream freed of its mean: LayerNorm becomes a root mean square": (True, True, True, True),
}


def file_of(model: keras.Model, format: str, step: str) -> bytes:
    """A float model as a file with the rewrites of one of `STEPS`; int8 is calibrated on two photographs."""
    formulated, dense_patches, folded, centred = STEPS[step]
    if folded:
        model = lean(model, centre=centred)
    if format == "int8":
        float_model, model = model, quantization.quantize_aware(model, "int8")
        quantization.calibrate(model, [photographs(float_model.input_shape[1:3], 2)])
    copy = rebuild(model, batch_size=1, dense_patches=dense_patches)
    if format == "int8":
        quantization.bake(copy)
    if formulated:
        convert.use_formulation(copy, convert.formulation_for(format, "x86"))
    content = convert.through_converter(copy, format, int8=format == "int8")
    return float_ops.to_float(content) if format == "int8" else content


def table(results: dict[str, Any]) -> str:
    """A row for each step, a column for each format."""
    lines = [f"| | {' | '.join(FORMATS)} |", f"|---|{'---|' * len(FORMATS)}"]
    for step in STEPS:
        cells = [f"{results['ratios'][f'{format}, {step}']['median']:.3f}" for format in FORMATS]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    """Measures and writes the results."""
    values = flags.FLAGS
    if values.render:
        put_into(ROOT / "docs" / "performance.md", table(files.read_json(RESULTS)), "rewrites")
        return
    keras.utils.set_random_seed(0)
    model = keras_models.DeiTMobiAtt(values.variant)
    names = [f"{format}, {step}" for format in FORMATS for step in STEPS]
    with tempfile.TemporaryDirectory() as directory:
        graphs = []
        for index, name in enumerate(names):
            format, _, step = name.partition(", ")
            graphs.append(Path(directory) / f"{index}.tflite")
            graphs[-1].write_bytes(file_of(model, format, step))
        plan = Plan(graphs=tuple(graphs), runs=values.runs, runs_per_round=5, warmup=3, profile=False)
        found = HostDevice().run(plan)
    if found.interrupted:
        raise KeyboardInterrupt
    first = found.measurements[0]
    ratios = {name: relative(one, first) for name, one in zip(names, found.measurements, strict=True)}
    results = {"variant": values.variant, "runs": values.runs, "threads": 1, "device": found.device, "ratios": ratios}
    output = files.user_path(values.output_dir)
    files.write_json(output / "rewrites.json", results)
    print(f"{table(results)}\n\nwritten: {output / 'rewrites.json'}")


if __name__ == "__main__":
    flags.DEFINE_string("variant", "tiny", "Of DeiT.")
    flags.DEFINE_integer("runs", 60, "Recorded runs of each file.", lower_bound=1)
    flags.DEFINE_bool("render", False, "Only rewrite the table in docs/performance.md from docs/rewrites.json.")
    flags.DEFINE_string("output_dir", "runs/rewrites", "Gets rewrites.json.")
    cli.run(main)

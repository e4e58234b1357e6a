"""Detectors and segmenters of every published backbone: parameters and multiply-adds, from their shapes alone.

PYTHONPATH=. python benchmarks/dense_table.py

Builds each at its published size, with Mobile-Attention and with softmax, writes docs/dense_models.json (a second call
goes on from there) and the table in docs/dense.md. `--render` only rewrites the table.
"""

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
from absl import flags
from tqdm import tqdm

import keras_models
from benchmarks.model_table import ROOT, TITLES, put_into
from mobiatt_tf import cli, files
from mobiatt_tf.complexity import count_macs, trainable_parameters

RESULTS = ROOT / "docs" / "dense_models.json"
DOCUMENT = ROOT / "docs" / "dense.md"
SIZES = {"detection": (800, 1344), "segmentation": (512, 512)}
PUBLISHED = [
    f"{family}/{variant}"
    for family, row in keras_models.FAMILIES.items()
    for variant in row.variants
    if variant not in ("quickstart", "b2_li")  # the second exists with softmax only
]


def size_of(task: str, name: str, attention: str) -> list[int]:
    """[trainable parameters, multiply-adds] of the detector or segmenter on a backbone such as "pvt_v2/b0"."""
    family, variant = name.split("/")
    model = keras_models.DENSE[task](family, variant, image_size=SIZES[task], attention=attention)
    return [trainable_parameters(model), count_macs(model)]


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| backbone | RetinaNet, 80 classes: parameters | MACs at 800 x 1344 | Semantic FPN, 150 classes: parameters "
        "| MACs at 512 x 512 |",
        "|---|---|---|---|---|",
    ]
    for name, row in results.items():
        family, variant = name.split("/")
        cells = [f"{TITLES[family]} {variant}"]
        for task in SIZES:
            mobile, softmax = row[task]["mobile"], row[task]["softmax"]
            cells += [
                f"{mobile[0] / 1e6:.2f} M ({softmax[0] / 1e6:.2f} M)",
                f"{mobile[1] / 1e9:.1f} G ({softmax[1] / 1e9:.1f} G)",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in [] if flags.FLAGS.render else tqdm([name for name in PUBLISHED if name not in results]):
        row: dict[str, dict[str, list[int]]] = {task: {} for task in SIZES}
        for task in SIZES:
            for attention in ("mobile", "softmax"):
                row[task][attention] = size_of(task, name, attention)
                keras.backend.clear_session()
                gc.collect()
        results[name] = row
        files.write_json(RESULTS, results)
    put_into(Path(DOCUMENT), table(results))


if __name__ == "__main__":
    flags.DEFINE_bool("render", False, "Only write the table of the results that are there.")
    cli.run(main)

"""What a trained model says of the same images at other sizes, with its `reference_tokens` and without.

PYTHONPATH=. python tools/resolution.py --checkpoint=runs/quickstart/train --output=runs/resolution.png

Mobile-Attention sums over tokens: at twice the size its output is four times as large, unless `reference_tokens` scales
it back to the size the model was trained at. Writes a picture and, beside it, the numbers as JSON.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import flags

import keras_models
from mobiatt_tf import cli, data, files
from mobiatt_tf.errors import UserError
from mobiatt_tf.models import load_trained
from mobiatt_tf.verification import dataset_images, keras_logits


def logits_at(
    model: keras.Model, dataset: data.Dataset, size: tuple[int, int], count: int, rescaled: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32 [count, classes] of the model at another image size, and the labels.

    Args:
        model: the trained model.
        dataset: its dataset; the images are test images.
        size: (height, width) that both the images and the model are resized to.
        count: how many images.
        rescaled: keep `reference_tokens`; otherwise every layer sums as published, whatever the size.
    """
    resized = keras_models.resize(model, size)
    if not rescaled:
        for layer in resized.layers:
            if hasattr(layer, "reference_tokens"):
                layer.reference_tokens = None
    images, labels = dataset_images(dataset, size, count)
    return keras_logits(resized, images), labels


def compare_sizes(
    model: keras.Model, dataset: data.Dataset, factors: Sequence[float], count: int, rescaled: bool = True
) -> list[dict[str, Any]]:
    """One entry for each factor of the trained size; arguments as in `logits_at`.

    Each has `size`, `top1`, `agreement` (share of images with the class that the trained size gives them), `drift`
    (mean over images of the distance of the logits from those at the trained size, relative to the latter's length)
    and `scale` (mean length of the logits, relative to the trained size).
    """
    trained = tuple(model.input_shape[1:3])
    reference, _ = logits_at(model, dataset, trained, count, rescaled)
    lengths = np.linalg.norm(reference, axis=-1)
    rows = []
    for factor in factors:
        size = (round(trained[0] * factor), round(trained[1] * factor))
        logits, labels = logits_at(model, dataset, size, count, rescaled)
        rows.append(
            {
                "factor": factor,
                "size": size,
                "top1": float(np.mean(logits.argmax(-1) == labels)),
                "agreement": float(np.mean(logits.argmax(-1) == reference.argmax(-1))),
                "drift": float(np.mean(np.linalg.norm(logits - reference, axis=-1) / lengths)),
                "scale": float(np.mean(np.linalg.norm(logits, axis=-1)) / np.mean(lengths)),
            }
        )
    return rows


def draw(found: dict[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    """Accuracy, agreement and drift of the logits over the image size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = {
        "top1": "top-1 on test images (%)",
        "agreement": "same class as at the trained size (%)",
        "drift": "distance of the logits from the trained size's\n(relative)",
    }
    for axis, (key, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for (name, rows), style in zip(found.items(), ("o-", "x--", ".:"), strict=False):
            values = [row[key] * (1 if key == "drift" else 100) for row in rows]
            axis.plot([row["size"][0] for row in rows], values, style, label=name)
        axis.set(xlabel="image side (pixels)", ylabel=label, ylim=(0, None))
        axis.set_xticks([row["size"][0] for row in next(iter(found.values()))])
        axis.legend()
    figure.suptitle(title)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(_: Sequence[str]) -> None:
    """Compares, prints, draws."""
    values = flags.FLAGS
    try:
        factors = [float(factor) for factor in values.factors]
        if not factors or not all(0 < factor < float("inf") for factor in factors):
            raise ValueError
    except ValueError:
        given = ",".join(values.factors)
        raise UserError(f"--factors={given} are not all positive numbers; give them as in --factors=1,1.5,2.") from None
    model, dataset = load_trained(values.checkpoint), data.load(values.dataset)
    runs = {"with reference_tokens": (model, True), "without": (model, False)}
    if values.softmax_checkpoint:
        runs["softmax host"] = (load_trained(values.softmax_checkpoint), True)
    try:
        found = {
            name: compare_sizes(trained, dataset, factors, values.images, rescaled)
            for name, (trained, rescaled) in runs.items()
        }
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"{model.name}, {dataset.name}, {min(values.images, len(dataset.test))} test images\n")
    print(f"{'':<24}{'size':>7}{'top-1':>10}{'same class':>12}{'drift':>8}{'scale':>8}")
    for name, rows in found.items():
        for row in rows:
            print(
                f"{name:<24}{row['size'][0]:>3}x{row['size'][1]:<3}{row['top1']:>10.2%}{row['agreement']:>12.2%}"
                f"{row['drift']:>8.2f}{row['scale']:>8.2f}"
            )
    output = files.user_path(values.output)
    draw(found, f"{model.name} trained at {model.input_shape[1]} pixels, {dataset.name}", output)
    files.write_json(output.with_suffix(".json"), {"model": model.name, "dataset": dataset.name, "found": found})
    print(f"\nwritten: {output}, {output.with_suffix('.json')}")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "Output directory of a training run, or a .keras file.", required=True)
    flags.DEFINE_string("softmax_checkpoint", None, "The softmax host after the same training, to compare with.")
    flags.DEFINE_string("dataset", "fashion_mnist", "Where the test images come from.")
    flags.DEFINE_list("factors", ["1", "1.5", "2"], "Sizes relative to the trained one.")
    flags.DEFINE_integer("images", 2000, "How many test images.", lower_bound=1)
    flags.DEFINE_string("output", "runs/resolution.png", "The picture to write; a .json goes beside it.")
    cli.run(main)

"""The picture of a verification: where precision is lost, and how near float16's limit the numbers come."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coreml.graph import FLOAT16_MAX


def draw(title: str, layers: Sequence[Any], operators: Sequence[Any], path: Path) -> None:
    """Writes a PNG with the error of every Keras layer and the largest number of every operator.

    Args:
        title: of the picture.
        layers: `probe.LayerCheck`, in order; may be empty.
        operators: `probe.OperatorCheck`, in order.
        path: the .png file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    errors, magnitudes = figure.subplots(2, 1)
    errors.set_title(title)
    if layers:
        errors.plot(np.linspace(0, 1, len(layers)), [_drawable(layer.error) for layer in layers], label="Keras layers")
    places = np.linspace(0, 1, len(operators))
    errors.plot(
        places, [_drawable(operator.error) for operator in operators], lw=0.8, label="operators, against float32"
    )
    errors.set_yscale("log")
    errors.set_ylabel("error / largest number")
    errors.legend(loc="lower right")
    magnitudes.plot(places, [_drawable(operator.largest) for operator in operators], lw=0.8)
    magnitudes.axhline(FLOAT16_MAX, color="tab:red", ls="--", label="float16's largest number")
    magnitudes.set_yscale("log")
    magnitudes.set_ylabel("largest magnitude")
    magnitudes.set_xlabel("from the image (0) to the logits (1)")
    magnitudes.legend(loc="lower right")
    for axes in (errors, magnitudes):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _drawable(value: float) -> float:
    """A number that a logarithmic axis can show."""
    return float(np.clip(value, 1e-7, 1e9)) if np.isfinite(value) else 1e9

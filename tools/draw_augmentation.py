"""Draws what augmentation does to photographs: each operation of RandAugment, the other steps, whole pipelines.

PYTHONPATH=. python tools/draw_augmentation.py --output=docs/images/augmentation.png

The photographs are scikit-learn's two samples.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from absl import flags

from mobiatt_tf import cli, files
from mobiatt_tf.augment import Augmentation, color_jitter, mix, rand_augment, random_erasing
from mobiatt_tf.augment.rand_augment import OPERATIONS
from mobiatt_tf.data import IMAGENET_MEAN, IMAGENET_STD, normalize

_SIZE = 112
_COLUMNS = 9
_TEXT = "rand-m9-mstd0.5-inc1"
_UNSIGNED = ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd")


def photographs() -> list[np.ndarray]:
    """scikit-learn's sample photographs, their middle, uint8 [S, S, 3]."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    found = []
    for pixels in load_sample_images().images:  # 427 x 640
        image = Image.fromarray(pixels)
        left = (image.width - image.height) // 2
        square = (left, 0, left + image.height, image.height)
        found.append(np.asarray(image.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC, square)))
    return found


def operations(image: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """A title and the image for every operation at level 9, as "m9" has it; with a sign, once for each."""
    shown = [("original", image)]
    for operation in OPERATIONS:
        for sign in (1.0,) if operation.name in _UNSIGNED else (1.0, -1.0):
            argument = operation.argument(tf.constant(9.0, tf.float64), tf.constant(sign, tf.float64))
            result = operation.apply(tf.constant(image), argument).numpy()
            title = operation.name if operation.name in _UNSIGNED[:3] else f"{operation.name} {argument.numpy():.3g}"
            shown.append((title, result))
    return shown


def other_steps(images: list[np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """Colour jitter, random erasing, mixup and CutMix, each twice."""
    first = tf.constant(images[1])
    shown = [(f"colour jitter 0.4, draw {draw}", color_jitter(first, _seed(draw), 0.4).numpy()) for draw in (1, 2)]
    for draw in (1, 5):
        shown.append((f"random erasing, draw {draw}", pixels_of(random_erasing(normalize(first), _seed(draw), 1.0))))
    batch = normalize(np.stack(images))
    for name, augmentation in (("mixup", Augmentation(mixup=0.8)), ("CutMix", Augmentation(cutmix=1.0))):
        for draw in (3, 5):
            mixed, labels = mix(batch, tf.eye(2), _seed(draw), augmentation)
            shown.append((f"{name}, label {labels[0, 0]:.2f} : {labels[0, 1]:.2f}", pixels_of(mixed[0])))
    return shown


def pipelines(images: list[np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """DeiT's whole augmentation but the crop: mixed in batches of two."""
    shown = []
    augmentation = Augmentation(mixup=0.8, cutmix=1.0)
    for draw in range(_COLUMNS):
        prepared = []
        for number, image in enumerate(images):
            seed = _seed(100 + 2 * draw + number)
            flipped = tf.constant(image[:, :: -1 if draw % 2 else 1])
            prepared.append(random_erasing(normalize(rand_augment(flipped, seed, _TEXT)), seed, 0.25))
        mixed, labels = mix(tf.stack(prepared), tf.eye(2), _seed(200 + draw), augmentation)
        shown += [(f"label {labels[i, 0]:.2f} : {labels[i, 1]:.2f}", pixels_of(mixed[i])) for i in range(2)]
    return shown


def pixels_of(image: tf.Tensor) -> np.ndarray:
    """Normalized float32 [H, W, 3] back to uint8."""
    pixels = 255 * (image.numpy() * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN))
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def draw(path: Path) -> None:
    """Writes the picture."""
    from matplotlib.figure import Figure
    from PIL import Image

    images = photographs()
    groups = [
        ("RandAugment's operations at level 9, in both directions where the sign is drawn", operations(images[0])),
        ("Colour jitter, random erasing, mixup, CutMix", other_steps(images)),
        (
            f"DeiT's augmentation after the crop: flip, {_TEXT}, erasing 0.25, mixup 0.8 or CutMix 1.0",
            pipelines(images),
        ),
    ]
    rows = [-(-len(shown) // _COLUMNS) for _, shown in groups]
    figure = Figure(figsize=(1.3 * _COLUMNS, 1.5 * sum(rows) + 0.3 * len(groups)), layout="constrained")
    parts: Any = figure.subfigures(len(groups), 1, height_ratios=[1.5 * count + 0.3 for count in rows])
    for part, count, (title, shown) in zip(parts, rows, groups, strict=True):
        part.suptitle(title, fontsize=9, fontweight="bold")
        axes = part.subplots(count, _COLUMNS, squeeze=False).ravel()
        for axis in axes:
            axis.axis("off")
        for axis, (name, image) in zip(axes, shown, strict=False):
            axis.imshow(image)
            axis.set_title(name, fontsize=6.5, pad=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90)
    with Image.open(buffer) as picture, files.atomic_path(path) as temporary:
        pixels = picture.convert("RGB")
        # 256 colours, dithered, take half of the bytes.
        reduced = pixels.quantize(palette=pixels.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)
        reduced.save(temporary, format="png", optimize=True)


def _seed(number: int) -> tf.Tensor:
    return tf.constant([number, 0], tf.int64)


def main(_: Sequence[str]) -> None:
    """Draws."""
    path = files.user_path(flags.FLAGS.output)
    draw(path)
    print(f"written: {path}")


if __name__ == "__main__":
    flags.DEFINE_string("output", "docs/images/augmentation.png", "The picture.")
    cli.run(main)

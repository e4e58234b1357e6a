"""Draws docs/images/scenes.png: training and test scenes with their boxes, and their label images.

Example:
    PYTHONPATH=. python tools/draw_scenes.py --output=docs/images/scenes.png
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from mobiatt_tf import cli, files

OUTPUT = flags.DEFINE_string("output", "docs/images/scenes.png", "The picture.")
COLUMNS = 9
COLOURS = ("tab:orange", "tab:pink", "tab:cyan", "tab:red")


def main(_: Sequence[str]) -> None:
    """Draws the first scenes of each split: the image with its boxes above its label image."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from PIL import Image

    from mobiatt_tf.data import dense

    detection: Any
    segmentation: Any
    detection, segmentation = dense.load_detection("scenes"), dense.load_segmentation("scenes")
    figure = Figure(figsize=(1.5 * COLUMNS, 6.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1)
    for part, title, boxes_split, masks_split in (
        (parts[0], "training", detection.train, segmentation.train),
        (parts[1], "test: other objects, other photographs", detection.test, segmentation.test),
    ):
        part.suptitle(title)
        for index, (above, below) in enumerate(part.subplots(2, COLUMNS).T):
            above.imshow(np.asarray(Image.open(boxes_split.images.files[index])))
            for (x1, y1, x2, y2), label in zip(boxes_split.boxes[index], boxes_split.labels[index], strict=True):
                box = Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color=COLOURS[label], linewidth=1.5)
                above.add_patch(box)
            labels = np.asarray(Image.open(masks_split.masks.files[index]))
            below.imshow(labels, cmap=ListedColormap(["0.9", *COLOURS]), vmin=0, vmax=len(COLOURS))
            for axes in (above, below):
                axes.axis("off")
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS]
    figure.legend(handles, detection.class_names, loc="outside lower center", ncols=len(COLOURS))
    with files.atomic_path(files.user_path(OUTPUT.value)) as temporary:
        figure.savefig(temporary, dpi=80)


if __name__ == "__main__":
    cli.run(main)

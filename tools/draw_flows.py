"""Draws what the heads of a trained model do on real images: competition and allocation, block by block.

PYTHONPATH=. python tools/draw_flows.py --checkpoint=runs/quickstart/train --output=runs/flows.png
"""

from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
from absl import flags

from mobiatt_tf import cli, data, files
from mobiatt_tf.errors import UserError
from mobiatt_tf.introspection import model_flows
from mobiatt_tf.layers import PositionEmbedding
from mobiatt_tf.models import load_trained

_SHOWN = ("competition", "allocation")


def draw(model: keras.Model, images: np.ndarray, pictures: np.ndarray, path: Path) -> None:
    """One row an image: the image, then for each block the competition and allocation of its most selective head.

    Args:
        model: a trained DeiT with Mobile-Attention.
        images: float32 [B, height, width, 3], normalised.
        pictures: the same images as shown, [B, height, width, 3] in 0 to 1.
        path: the .png to write.
    """
    from matplotlib.figure import Figure

    position = next(layer for layer in model.layers if isinstance(layer, PositionEmbedding))
    seen = model_flows(model, images)
    columns = 1 + len(_SHOWN) * len(seen)
    figure = Figure(figsize=(1.4 * columns, 1.55 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), columns, squeeze=False)
    for row, picture in enumerate(pictures):
        axes[row, 0].imshow(picture)
        column = 1
        for block, flows in enumerate(seen.values()):
            # Competition averages 1 over the tokens of a head; the head that strays most from it chooses most.
            head = int(np.argmax(flows["competition"][row].std(axis=-1)))
            for name in _SHOWN:
                grid = flows[name][row, head, position.prefix :].reshape(position.grid)
                axes[row, column].imshow(grid, cmap="magma" if name == "competition" else "viridis")
                if row == 0:
                    axes[row, column].set_title(f"block {block}\n{name}", fontsize=8)
                axes[row, column].set_xlabel(f"head {head}: {grid.min():.2f} to {grid.max():.2f}", fontsize=6)
                column += 1
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def main(_: Sequence[str]) -> None:
    """Draws the first test image of each of the first classes."""
    values = flags.FLAGS
    model = load_trained(values.checkpoint)
    test = data.load(values.dataset).test
    firsts = np.unique(test.labels, return_index=True)[1][: values.images]
    batches = data.test_batches(test.select(firsts), image_size=model.input_shape[1:3], batch_size=len(firsts))
    images = next(batches.as_numpy_iterator())[0]
    pictures = np.clip(images * np.array(data.IMAGENET_STD) + np.array(data.IMAGENET_MEAN), 0, 1)
    try:
        draw(model, images, pictures, files.user_path(values.output))
    except ValueError as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "Output directory of a training run, or a .keras file.", required=True)
    flags.DEFINE_string("dataset", "fashion_mnist", "Where the images come from.")
    flags.DEFINE_integer("images", 5, "How many classes to show, one image each.", lower_bound=1)
    flags.DEFINE_string("output", "runs/flows.png", "The .png to write.")
    cli.run(main)

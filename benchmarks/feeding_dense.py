"""Images per second and core of the pipelines for detection and segmentation.

PYTHONPATH=. python benchmarks/feeding_dense.py --rounds=15

JPEG files of 640 x 480 pixels, as most of COCO's, cut from two photographs at run time, with boxes at random and label
PNGs made of their colours, go through `detection_pipeline` and `segmentation_pipeline` on one core with one thread.
Stages take turns. The time is the processor's, so that what else runs on the computer hardly counts. Writes JSON and a
PNG.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from tqdm import tqdm

from mobiatt_tf import cli, files
from mobiatt_tf.errors import UserError
from mobiatt_tf.machine import cpu_name

if TYPE_CHECKING:
    import tensorflow as tf

    from mobiatt_tf.data.dense import DetectionSplit, SegmentationSplit

SIZE = (480, 640)
BATCH = 4
BOXES = 7  # COCO's mean


def write_examples(folder: Path, count: int) -> "tuple[DetectionSplit, SegmentationSplit]":
    """Windows of scikit-learn's two sample photographs, JPEG with quality 90; labels are the upper two bits of red."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    from mobiatt_tf.data import Split
    from mobiatt_tf.data.dense import DetectionSplit, SegmentationSplit

    generator = np.random.default_rng(0)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]  # 640 x 427
    height, width = SIZE
    for number in range(count):
        left, top = generator.uniform(0, 100, 2)
        box = (left, top, left + 540, top + 327)
        window = photographs[number % 2].resize((width, height), Image.Resampling.BICUBIC, box)
        window.save(folder / f"{number:03d}.jpg", quality=90)
        Image.fromarray(np.asarray(window)[..., 0] // 64).save(folder / f"{number:03d}.png")
    images, masks = (
        Split(np.zeros(count, np.int32), files=tuple(str(path) for path in sorted(folder.glob(pattern))))
        for pattern in ("*.jpg", "*.png")
    )
    corners = generator.uniform(0, [width, height], (count, BOXES, 2, 2))
    boxes = np.concatenate([corners.min(2), corners.max(2)], -1).astype(np.float32)  # [count, BOXES, 4]
    upright = np.ones(count, np.uint8)
    detection = DetectionSplit(
        images=images,
        boxes=tuple(boxes),
        labels=tuple(np.zeros((count, BOXES), np.int32)),
        crowd=tuple(np.zeros((count, BOXES), bool)),
        areas=tuple((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])),
        sizes=np.tile(np.array(SIZE, np.int32), (count, 1)),
        image_ids=np.arange(count),
        orientations=upright,
    )
    return detection, SegmentationSplit(images, masks, upright, upright, np.arange(256, dtype=np.uint8))


def stages(
    detection: "DetectionSplit", segmentation: "SegmentationSplit"
) -> "dict[str, Callable[[int], tf.data.Dataset]]":
    """What is measured: functions of an epoch."""
    import tensorflow as tf

    from mobiatt_tf.data import detection_pipeline, segmentation_pipeline
    from mobiatt_tf.data.reading import image_reader, mask_reader

    read, read_mask = image_reader(detection), mask_reader(segmentation)
    count = len(detection)

    def boxes(size: tuple[int, int], **settings: Any) -> "Callable[[int], tf.data.Dataset]":
        return lambda epoch: detection_pipeline.train_batches(
            detection, image_size=size, batch_size=BATCH, seed=0, epoch=epoch, **settings
        )

    def masks(size: tuple[int, int], **settings: Any) -> "Callable[[int], tf.data.Dataset]":
        return lambda epoch: segmentation_pipeline.train_batches(
            segmentation, image_size=size, batch_size=BATCH, seed=0, epoch=epoch, **settings
        )

    return {
        "decode the image": lambda _: tf.data.Dataset.range(count).map(read),
        "decode image and labels": lambda _: tf.data.Dataset.range(count).map(lambda i: (read(i), read_mask(i))),
        "detection, 512 x 512": boxes((512, 512)),
        "detection, 800 x 1344": boxes((800, 1344)),
        "detection, 800 x 1344, scale 0.5 to 2": boxes((800, 1344), scale=(0.5, 2.0)),
        "segmentation, 512 x 512, colours as they are": masks((512, 512), photometric=False),
        "segmentation, 512 x 512": masks((512, 512)),
    }


def measure(makers: "dict[str, Callable[[int], tf.data.Dataset]]", images: int, rounds: int) -> dict[str, list[float]]:
    """Processor seconds for an image, of each stage and round; the first, which traces graphs, does not count."""
    import tensorflow as tf

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    options.autotune.enabled = False
    found: dict[str, list[float]] = {name: [] for name in makers}
    for epoch in tqdm(range(rounds + 1), desc="rounds", mininterval=10):
        for name, make in makers.items():
            batches = make(epoch).with_options(options)
            start = time.process_time()
            for _ in batches:
                pass
            if epoch:
                found[name].append((time.process_time() - start) / images)
    return found


def table(rates: dict[str, float]) -> str:
    """Images a second and milliseconds for an image, in Markdown."""
    lines = ["| one core, one thread | images per second | ms for an image |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {rate:.0f} | {1000 / rate:.1f} |" for name, rate in rates.items()])


def draw(results: dict[str, Any], path: Path) -> None:
    """A bar of images per second for each stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axis = figure.subplots()
    rates = results["images_per_second"]
    axis.bar_label(axis.barh(list(rates), list(rates.values())), fmt="%.0f", fontsize=8, padding=2)
    axis.invert_yaxis()
    axis.set(xlabel="images per second and core")
    axis.margins(x=0.1)
    machine = results["machine"]
    axis.set_title(f"{machine['cpu']}, one core, one thread, TensorFlow {machine['tensorflow']}", fontsize=9)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(_: Sequence[str]) -> None:
    """Measures, prints the table, writes JSON and picture."""
    values = flags.FLAGS
    output = files.user_path(values.output_dir)
    if values.images % BATCH:
        raise UserError(f"--images={values.images} must be a multiple of {BATCH}: batches are whole.")
    os.sched_setaffinity(0, {values.core if values.core is not None else max(os.sched_getaffinity(0))})
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(stages(*write_examples(Path(folder), values.images)), values.images, values.rounds)
    results = {
        "images_per_second": {name: 1 / statistics.median(seconds) for name, seconds in found.items()},
        "seconds_per_image": found,
        "rounds": values.rounds,
        "images_per_round": values.images,
        "machine": {"cpu": cpu_name(), "threads": 1, "tensorflow": metadata.version("tensorflow")},
    }
    files.write_json(output / "feeding_dense.json", results)
    draw(results, output / "feeding_dense.png")
    written = f"{output / 'feeding_dense.json'}, {output / 'feeding_dense.png'}"
    print(f"\n{table(results['images_per_second'])}\n\nwritten: {written}")


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 15, "Rounds in which each stage takes its turn.", lower_bound=1)
    flags.DEFINE_integer("images", 32, "Images of a turn.", lower_bound=BATCH)
    flags.DEFINE_integer("core", None, "The core to run on; the default is the last one.", lower_bound=0)
    flags.DEFINE_string("output_dir", "runs/feeding_dense", "Gets feeding_dense.json and feeding_dense.png.")
    cli.run(main)

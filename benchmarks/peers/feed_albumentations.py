"""Feeds images through albumentations and OpenCV on one core; benchmarks/feeding.py starts it.

Runs in an environment of its own, so it imports nothing of this project. Reads lines "stage images" from standard input
and writes the seconds that so many images took, "none" for a stage it does not have.

The pipeline is what albumentations has for DeiT's: its random resized crop (OpenCV's bicubic interpolation, which does
not antialias), flip, two draws from its counterparts of RandAugment's operations at about timm's strength for m9, each
with probability 1/2, normalization, erasing, then stacking and mixup with NumPy.
"""

import itertools
import os
import sys
import time
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask the network for a newer version

import albumentations
import cv2
import numpy as np

SIZE, BATCH, CLASSES = 224, 32, 1000
FILL = (124, 116, 104)


def operations() -> albumentations.OneOf:
    """One of the counterparts of RandAugment's operations; "solarize add" has none, a tone curve stands for it."""
    shift = {"interpolation": cv2.INTER_CUBIC, "fill": FILL, "p": 1}
    angle = 15.1  # arctan 0.27
    return albumentations.OneOf(
        [
            albumentations.AutoContrast(p=1),
            albumentations.Equalize(p=1),
            albumentations.InvertImg(p=1),
            albumentations.Rotate((-27, 27), border_mode=cv2.BORDER_CONSTANT, **shift),
            albumentations.Posterize(num_bits=1, p=1),
            albumentations.Solarize((0.1, 0.1), p=1),
            albumentations.RandomToneCurve(p=1),
            albumentations.ColorJitter((1, 1), (1, 1), (0.19, 1.81), (0, 0), p=1),
            albumentations.RandomBrightnessContrast((0, 0), (-0.81, 0.81), p=1),
            albumentations.RandomBrightnessContrast((-0.81, 0.81), (0, 0), p=1),
            albumentations.Sharpen(p=1),
            albumentations.Affine(shear={"x": (-angle, angle), "y": 0}, **shift),
            albumentations.Affine(shear={"x": 0, "y": (-angle, angle)}, **shift),
            albumentations.Affine(translate_percent={"x": (-0.4, 0.4), "y": 0}, **shift),
            albumentations.Affine(translate_percent={"x": 0, "y": (-0.4, 0.4)}, **shift),
        ],
        p=0.5,
    )


def transforms() -> dict[str, albumentations.Compose]:
    """The pipelines of two stages."""
    crop = [
        albumentations.RandomResizedCrop((SIZE, SIZE), interpolation=cv2.INTER_CUBIC),
        albumentations.HorizontalFlip(),
    ]
    erasing = albumentations.Erasing(scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), fill="random", p=0.25)
    rand_augment = [operations(), operations()]
    return {
        "crop": albumentations.Compose(crop, seed=0),
        "rand_augment": albumentations.Compose(rand_augment, seed=0),
        "full": albumentations.Compose([*crop, *rand_augment, albumentations.Normalize(), erasing], seed=0),
    }


def mixed(
    images: list[np.ndarray], labels: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """mixup or CutMix for a batch, as timm does them."""
    batch = np.stack(images)
    if generator.random() < 0.5:
        share = np.float32(generator.beta(0.8, 0.8))
        batch = batch * share + batch[::-1] * (1 - share)
    else:
        side = int(SIZE * np.sqrt(1 - generator.beta(1, 1)))
        top, left = np.maximum(generator.integers(0, SIZE, 2) - side // 2, 0)
        box = (slice(None), slice(top, top + side), slice(left, left + side))
        share = np.float32(1 - batch[box][0, :, :, 0].size / SIZE**2)
        batch[box] = batch[::-1][box].copy()
    return batch, labels * share + labels[::-1] * (1 - share)


def main() -> None:
    """Answers until the input ends."""
    cv2.setNumThreads(1)
    paths = itertools.cycle(sorted(str(path) for path in Path(sys.argv[1]).glob("*.jpg")))
    pipelines = transforms()
    generator = np.random.default_rng(0)
    labels = np.eye(CLASSES, dtype=np.float32)[:BATCH]
    small = [cv2.resize(cv2.imread(next(paths), cv2.IMREAD_COLOR_RGB), (SIZE, SIZE)) for _ in range(BATCH)]

    def batch(stage: str) -> object:
        if stage == "rand_augment":
            return np.stack([pipelines[stage](image=image)["image"] for image in small])
        images = []
        for _ in range(BATCH):
            image = cv2.imdecode(np.fromfile(next(paths), np.uint8), cv2.IMREAD_COLOR_RGB)
            images.append(image.size if stage == "decode" else pipelines[stage](image=image)["image"])
        return mixed(images, labels, generator) if stage == "full" else np.stack(images)

    warm = set()
    for line in sys.stdin:
        stage, images = line.split()
        if stage not in warm:
            batch(stage)
            warm.add(stage)
        start = time.perf_counter()
        for _ in range(int(images) // BATCH):
            batch(stage)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()

"""Small photographs for tests."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RED, GREEN, BLUE = (220, 20, 20), (20, 200, 20), (20, 20, 220)


def two_halves(width: int = 96, height: int = 64) -> np.ndarray:
    """uint8 [height, width, 3]: red at the left, blue at the right."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2], image[:, width // 2 :] = RED, BLUE
    return image


def save(image: np.ndarray, path: Path, **options: Any) -> Path:
    Image.fromarray(image).save(path, **options)
    return path

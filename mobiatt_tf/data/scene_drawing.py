"""Draws scenes with known boxes and masks: cut-outs with an alpha channel, pasted over photographs.

A scene depends on its numbers, its cut-outs and its photograph alone. The numbers are the raw stream of NumPy's
Philox 4x64, which stays the same in all versions; Pillow resizes, rotates and blends.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

_OPAQUE = 128  # alpha from which a pixel belongs to the object
_PLACES = 20  # tries to find a place for an object
_VISIBLE = 0.6  # an object that is hidden more than this leaves visible is hard to call one
_SMALLEST = 40  # pixels of the mask below which an object is left out


class Numbers:
    """Random numbers of one scene.

    Args:
        seed: 0 or more.
        scene: 0 or more; another stream for every scene.
    """

    def __init__(self, seed: int, scene: int) -> None:
        self._generator = np.random.Philox(key=np.array([seed, scene], np.uint64))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        return low + (high - low) * (int(self._generator.random_raw()) >> 11) * 2.0**-53  # 53 bits fill a double

    def below(self, count: int) -> int:
        """An integer in [0, count)."""
        return int(self.uniform(0, count))


@dataclass(frozen=True, eq=False)
class Object:
    """What a scene shows of one cut-out.

    Attributes:
        label: class index from 0.
        mask: bool [H, W], the pixels where it is seen: not hidden by later objects.
        name: of the cut-out.
    """

    label: int
    mask: np.ndarray
    name: str

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The smallest box (x1, y1, x2, y2) around the mask, in pixels; x2 and y2 are the first outside."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True, eq=False)
class Scene:
    """A drawn scene.

    Attributes:
        image: uint8 [H, W, 3].
        objects: from the rearmost to the foremost; each has at least `_SMALLEST` visible pixels.
    """

    image: np.ndarray
    objects: tuple[Object, ...]

    def label_map(self) -> np.ndarray:
        """uint8 [H, W]: 0 where the photograph is seen, else 1 + the object's class."""
        labels = np.zeros(self.image.shape[:2], np.uint8)
        for shown in self.objects:
            labels[shown.mask] = 1 + shown.label
        return labels


@dataclass(frozen=True, eq=False)
class CutOut:
    """A picture of one object on nothing.

    Attributes:
        image: an RGBA picture, cropped to what is opaque.
        label: class index from 0.
        name: as `Object` shows it.
    """

    image: Image.Image
    label: int
    name: str


def cut_out(image: Image.Image, label: int, name: str, largest_side: int = 192) -> CutOut:
    """A cut-out from a picture with an alpha channel, cropped to its opaque part and shrunk to `largest_side` pixels.

    Raises:
        ValueError: nothing in the picture is opaque.
    """
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha >= _OPAQUE)).getbbox()
    if box is None:
        raise ValueError(f"{name} has no opaque pixel.")
    image = image.crop(box)
    image.thumbnail((largest_side, largest_side), Image.Resampling.LANCZOS)
    return CutOut(image, label, name)


def draw_scene(
    classes: list[list[CutOut]],
    photograph: Image.Image,
    numbers: Numbers,
    *,
    sides: tuple[int, int] = (96, 160),
    objects: tuple[int, int] = (1, 3),
    extent: tuple[float, float] = (0.4, 0.85),
) -> Scene:
    """Draws one scene.

    Args:
        classes: the cut-outs of each class; a class is drawn first, then one of its cut-outs.
        photograph: what they are pasted over, RGB: a part of it, of random size and place.
        numbers: of this scene; how many are used depends on what happens.
        sides: least and largest height and width in pixels.
        objects: least and largest number of objects that are tried; one that finds no place is left out.
        extent: least and largest longer side of an object, as a part of the scene's shorter side.

    Returns:
        The scene.
    """
    height, width = (int(numbers.uniform(sides[0], sides[1] + 1)) for _ in range(2))
    canvas = _background(photograph, height, width, numbers)
    shown: list[Object] = []
    for _ in range(objects[0] + numbers.below(objects[1] - objects[0] + 1)):
        chosen = classes[numbers.below(len(classes))]
        cut = chosen[numbers.below(len(chosen))]
        size = min(height, width) * numbers.uniform(*extent)
        pasted = _varied(cut.image, size, numbers)
        opaque = np.asarray(pasted.getchannel("A")) >= _OPAQUE  # [h, w]
        whole = [np.count_nonzero(other.mask) for other in shown]
        for _ in range(_PLACES):
            left = numbers.below(max(width - pasted.width, 0) + 1)
            top = numbers.below(max(height - pasted.height, 0) + 1)
            mask = np.zeros((height, width), bool)
            part = mask[top : top + pasted.height, left : left + pasted.width]
            part[:] = opaque[: part.shape[0], : part.shape[1]]
            if np.count_nonzero(mask) < _SMALLEST:
                continue
            hidden = [other.mask & ~mask for other in shown]
            if all(np.count_nonzero(rest) >= _VISIBLE * area for rest, area in zip(hidden, whole, strict=True)):
                canvas.paste(pasted, (left, top), pasted)
                shown = [Object(other.label, rest, other.name) for other, rest in zip(shown, hidden, strict=True)]
                shown.append(Object(cut.label, mask, cut.name))
                break
    return Scene(np.asarray(canvas), tuple(shown))


def _background(photograph: Image.Image, height: int, width: int, numbers: Numbers) -> Image.Image:
    """A random part of a photograph at this size: its place, its scale, whether it is flipped, and its light vary."""
    fitting = min(photograph.width / width, photograph.height / height)  # pixels of the photograph for one, at most
    scale = fitting * numbers.uniform(0.35, 1.0)
    left = numbers.uniform(0, photograph.width - scale * width)
    top = numbers.uniform(0, photograph.height - scale * height)
    part = photograph.resize(
        (width, height), Image.Resampling.BILINEAR, (left, top, left + scale * width, top + scale * height)
    )
    if numbers.uniform() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gains = [numbers.uniform(0.75, 1.25) for _ in range(3)]  # a grey photograph becomes a tinted one
    pixels = np.asarray(part, np.float32) * np.asarray(gains, np.float32)
    return Image.fromarray(np.minimum(pixels + 0.5, 255).astype(np.uint8))


def _varied(image: Image.Image, size: float, numbers: Numbers) -> Image.Image:
    """A cut-out, its longer side `size` pixels, then flipped or not, turned by up to 20 degrees, in other light."""
    scale = size / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    if numbers.uniform() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(numbers.uniform(-20, 20), Image.Resampling.BILINEAR, expand=True)
    alpha = image.getchannel("A")
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(numbers.uniform(0.75, 1.25))
    image.putalpha(alpha)
    return image.crop(alpha.point(lambda value: 255 * (value >= _OPAQUE)).getbbox())

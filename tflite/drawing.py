"""Boxes and regions drawn on a photograph, in colours that stay apart, with names that can be read."""

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np

_LEAST_SIDE = 320  # smaller pictures are enlarged before anything is drawn, else names would cover them
_GOLDEN = 0.618033988749895  # hues at multiples of the golden ratio stay far apart however many there are
_MOST_LEGEND_ENTRIES = 24
_BACKGROUND = "background"
_CHUNK_PIXELS = 1 << 22  # counted at a time: np.bincount makes 8 bytes of each
_PAPER, _INK = (255, 255, 255), (32, 32, 32)


def class_color(index: int) -> tuple[int, int, int]:
    """RGB of a class, the same in every picture; neighbours differ in hue, those far apart in lightness, too."""
    lightness = (0.50, 0.36, 0.64)[index // 12 % 3]
    red, green, blue = colorsys.hls_to_rgb((0.02 + index * _GOLDEN) % 1.0, lightness, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(image: np.ndarray, boxes: np.ndarray, captions: Sequence[str], labels: Sequence[int]) -> Any:
    """Boxes with their captions; the first ones, which are the surest, are drawn last.

    Args:
        image: uint8 [H, W, 3].
        boxes: float [N, 4], x1, y1, x2, y2 in its pixels.
        captions: N texts.
        labels: N class indices, which choose the colours.

    Returns:
        A PIL image; twice as large or more, where the photograph is tiny.
    """
    from PIL import Image, ImageDraw

    factor = _enlargement(image)
    picture = Image.fromarray(image)
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    draw, short = ImageDraw.Draw(picture), min(picture.size)
    font, width = _font(max(13, short // 36)), max(2, short // 240)
    for box, caption, label in reversed(list(zip(boxes, captions, labels, strict=True))):
        left, top, right, bottom = (float(value) * factor for value in box)
        color = class_color(int(label))
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=color, width=width)
        _draw_caption(draw, caption, left, top, color, font, picture.size)
    return picture


def _draw_caption(
    draw: Any, text: str, left: float, top: float, color: tuple[int, int, int], font: Any, size: tuple[int, int]
) -> None:
    """On a plate of the box's colour above its corner; inside the picture, wherever the corner is."""
    x1, y1, x2, y2 = draw.textbbox((0, 0), text, font=font)
    margin = max(2, (y2 - y1) // 5)
    width, height = x2 - x1 + 2 * margin, y2 - y1 + 2 * margin
    left = min(max(0.0, left), max(0.0, size[0] - width))
    top = top - height if top >= height else max(0.0, min(top, size[1] - height))
    draw.rectangle((left, top, left + width, top + height), fill=color)
    draw.text((left + margin - x1, top + margin - y1), text, font=font, fill=_ink_on(color))


def count_labels(labels: np.ndarray, classes: int) -> np.ndarray:
    """How many pixels of a label image [H, W] each of `classes` classes has, int64 [classes]."""
    flat, counts = labels.reshape(-1), np.zeros(classes, np.int64)
    for start in range(0, flat.size, _CHUNK_PIXELS):
        counts += np.bincount(flat[start : start + _CHUNK_PIXELS], minlength=classes)
    return counts


def draw_regions(
    image: np.ndarray, labels: np.ndarray, class_names: Sequence[str], counts: np.ndarray, opacity: float = 0.55
) -> Any:
    """The photograph tinted by the class of each pixel, outlined where classes meet, with a legend at its right.

    A class called "background" is what is left of the photograph: it has no tint.

    Args:
        image: uint8 [H, W, 3].
        labels: uint8 or int [H, W], class indices.
        class_names: of all classes; the legend has those that are there, largest area first.
        counts: of the labels, see `count_labels`.
        opacity: of the tint, in [0, 1].

    Returns:
        A PIL image.
    """
    from PIL import Image

    factor, pixels = _enlargement(image), labels.size
    if factor > 1:
        image, labels = (x.repeat(factor, axis=0).repeat(factor, axis=1) for x in (image, labels))
    tint = label_picture(labels, len(class_names)).convert("RGB")
    picture = np.array(Image.blend(Image.fromarray(image), tint, opacity))  # [H, W, 3], in bytes throughout
    nothing = [index for index, name in enumerate(class_names) if name == _BACKGROUND]
    for index in nothing:
        np.copyto(picture, image, where=(labels == index)[..., None])
    edges = np.zeros(labels.shape, bool)
    edges[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edges[1:] |= labels[1:] != labels[:-1]
    picture[edges] = 255
    present = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    entries = [
        (_PAPER if index in nothing else class_color(index), f"{class_names[index]}  {counts[index] / pixels:.1%}")
        for index in present[:_MOST_LEGEND_ENTRIES]
    ]
    if len(present) > _MOST_LEGEND_ENTRIES:
        entries.append((_PAPER, f"and {len(present) - _MOST_LEGEND_ENTRIES} more"))
    return _with_legend(Image.fromarray(picture), entries)


def _with_legend(picture: Any, entries: Sequence[tuple[tuple[int, int, int], str]]) -> Any:
    from PIL import Image, ImageDraw

    size = max(13, min(picture.size) // 36)
    font, margin = _font(size), size
    width = max(round(font.getlength(text)) for _, text in entries) + 2 * size + 2 * margin
    line = round(1.6 * size)
    canvas = Image.new(
        "RGB", (picture.width + width, max(picture.height, line * len(entries) + 2 * margin)), color=_PAPER
    )
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for number, (color, text) in enumerate(entries):
        left, top = picture.width + margin, margin + number * line
        draw.rectangle((left, top, left + size, top + size), fill=color)
        draw.text((left + 2 * size, top + size // 2), text, font=font, fill=_INK, anchor="lm")
    return canvas


def label_picture(labels: np.ndarray, classes: int) -> Any:
    """A label image whose stored values are class indices, and which shows as `class_color`.

    Args:
        labels: [H, W], class indices below `classes`.
        classes: how many there are, 256 at most.

    Returns:
        A PIL image with a palette.
    """
    from PIL import Image

    picture = Image.fromarray(labels.astype(np.uint8)).convert("L")
    picture.putpalette([channel for index in range(classes) for channel in class_color(index)])
    return picture


def _enlargement(image: np.ndarray) -> int:
    return max(1, -(-_LEAST_SIDE // max(image.shape[:2])))


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _ink_on(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is read more easily on the colour (luma of ITU-R BT.601)."""
    luma = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    return (0, 0, 0) if luma > 140 else (255, 255, 255)

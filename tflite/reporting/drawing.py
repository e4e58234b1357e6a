"""Charts as data: shapes in pixels with roles instead of colours. `svg` and `png` render the same drawing.

A role is a name of `PALETTE`; the page gives it another colour in the dark.
"""

import bisect
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Categorical colours in an order whose neighbours stay apart under colour-blindness: (light, dark).
PALETTE = {
    "c1": ("#2a78d6", "#3987e5"),
    "c2": ("#d95926", "#e8743b"),
    "c3": ("#12805c", "#1baf7a"),
    "c4": ("#a87400", "#d99a1c"),
    "c5": ("#4a3aa7", "#9085e9"),
    "c6": ("#c2185b", "#ee6aa0"),
    "c7": ("#00727a", "#2bb3c0"),
    "c8": ("#6b5a4b", "#b29f8c"),
    "ink": ("#16181d", "#f1f2f4"),
    "muted": ("#5b616e", "#a9afba"),
    "grid": ("#e4e6ea", "#30343b"),
    "axis": ("#9aa0ab", "#656b76"),
    "rest": ("#b9bec7", "#565c67"),
    "surface": ("#ffffff", "#1a1c20"),
    "warn": ("#a1350b", "#ff9a6b"),
}
CATEGORIES = 8
FONT_SIZE = 12.0
_LOGARITHMIC_FROM = 8.0  # a range of values wider than this is drawn on a logarithmic axis


@dataclass(frozen=True)
class Text:
    """One line; y is its baseline. `anchor` is start, middle or end; `halo` keeps it readable over lines."""

    x: float
    y: float
    text: str
    role: str = "ink"
    anchor: str = "start"
    size: float = FONT_SIZE
    bold: bool = False
    halo: bool = False


@dataclass(frozen=True)
class Line:
    """A straight stroke."""

    x1: float
    y1: float
    x2: float
    y2: float
    role: str
    width: float = 1.0
    dashed: bool = False


@dataclass(frozen=True)
class Shape:
    """A closed polygon; `stroke` is the role of its outline. A `faint` one is filled lightly and outlined in dashes."""

    points: tuple[tuple[float, float], ...]
    fill: str | None = None
    stroke: str | None = None
    width: float = 1.0
    faint: bool = False


@dataclass(frozen=True)
class Mark:
    """What belongs to one figure of the data, and the words for it."""

    tip: str
    parts: tuple["Text | Line | Shape", ...]


Item = Text | Line | Shape | Mark


@dataclass(frozen=True)
class Drawing:
    """A chart of `width` x `height` pixels; `label` says in words what is drawn."""

    width: float
    height: float
    items: tuple[Item, ...]
    label: str


def bar(left: float, top: float, width: float, height: float, role: str, faint: bool = False) -> Shape:
    """A rectangle; faint for figures that are not to be quoted."""
    right, bottom = left + max(width, 1.0), top + height
    points = ((left, top), (right, top), (right, bottom), (left, bottom))
    return Shape(points, role, role if faint else None, 1.2, faint)


MARKERS = ("circle", "square", "diamond", "up", "down", "pentagon")


def marker(kind: int, x: float, y: float, role: str, hollow: bool = False, radius: float = 5.5) -> Shape:
    """Marker number `kind` of `MARKERS`, counted on from the first where there are more, around (x, y)."""
    name = MARKERS[kind % len(MARKERS)]
    corners, turn, size = {
        "circle": (24, 0.0, 1.0),
        "square": (4, math.pi / 4, 1.25),
        "diamond": (4, 0.0, 1.3),
        "up": (3, -math.pi / 2, 1.35),
        "down": (3, math.pi / 2, 1.35),
        "pentagon": (5, -math.pi / 2, 1.2),
    }[name]
    angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
    points = tuple((x + radius * size * math.cos(angle), y + radius * size * math.sin(angle)) for angle in angles)
    return Shape(points, "surface" if hollow else role, role if hollow else "surface", 2.0 if hollow else 1.5)


def text_width(text: str, size: float = FONT_SIZE) -> float:
    """About how wide a text is in pixels, on the large side for the sans-serif fonts of browsers and matplotlib."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    narrow = sum(letter in " .,:;'|!ijl·" for letter in text)
    return size * (1.05 * wide + 0.36 * narrow + 0.63 * (len(text) - wide - narrow))


def shorten(text: str, width: float, size: float = FONT_SIZE) -> str:
    """The text, its middle left out where it is wider than `width` pixels: the ends of file names tell them apart."""
    text = " ".join(text.split())
    if text_width(text, size) <= width:
        return text

    def cut(kept: int) -> str:
        head = math.ceil(kept / 2)
        return f"{text[:head]}…{text[len(text) - (kept - head) :]}"

    kept = bisect.bisect_right(range(len(text)), width, key=lambda kept: text_width(cut(kept), size)) - 1
    return cut(max(kept, 0))


def wrap(text: str, width: float, size: float = FONT_SIZE) -> list[str]:
    """Lines of at most `width` pixels; a word that is longer is shortened."""
    lines: list[str] = []
    for word in re.split(r"[ \t\r\n]+", text.strip()):
        if lines and text_width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(shorten(word, width, size))
    return lines


@dataclass(frozen=True)
class Domain:
    """The values that an axis covers."""

    low: float
    high: float
    logarithmic: bool = False

    def place(self, value: float, start: float, end: float) -> float:
        """Where the value lies between the pixels `start` (of `low`) and `end`."""
        low, high = (math.log(self.low), math.log(self.high)) if self.logarithmic else (self.low, self.high)
        share = ((math.log(value) if self.logarithmic else value) - low) / (high - low)
        return start + share * (end - start)

    def ticks(self, most: int) -> list[float]:
        """At most `most` round values in the domain, or two more."""
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)) - 1, math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [
                    value
                    for decade in decades
                    for step in steps
                    if self.low <= (value := float(f"{step}e{decade}")) <= self.high
                ]
                if len(found) <= most or steps == (1,):
                    return found if len(found) > 1 else [self.low, self.high]
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) for index in range(first, last + 1)]


def domain_of(values: Iterable[float], logarithmic: bool | None = None, from_zero: bool = True) -> Domain:
    """A domain around the values with room at its ends.

    Args:
        values: finite; positive for a logarithmic axis.
        logarithmic: None: where the values differ by more than a factor of 8.
        from_zero: a linear axis starts at 0.
    """
    values = list(values)
    low, high = min(values), max(values)
    if logarithmic is None:
        logarithmic = low > 0 and high / low > _LOGARITHMIC_FROM
    if logarithmic:
        room = max((high / low) ** 0.12, 1.25)
        return Domain(low / room, high * room, True)
    if from_zero:
        return Domain(0.0, high * 1.12 if high > 0 else 1.0)
    room = max((high - low) * 0.2, abs(high) * 1e-3, 1e-9)
    return Domain(low - room, high + room)


def number(value: float) -> str:
    """A tick's label."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def counted(count: int, what: str) -> str:
    """As in "1 graph" or "2 graphs"."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def milliseconds(seconds: float) -> str:
    """Without the unit: as many digits as the tables of the benchmark print, fewer above 100 ms."""
    value = seconds * 1e3
    if value >= 100:
        return f"{value:,.1f}"
    return f"{value:.3f}" if value >= 0.01 or value == 0 else f"{value:.2g}"


def place_labels(
    anchors: Sequence[tuple[float, float, Sequence[str]]], left: float, top: float, right: float, bottom: float
) -> list[Text]:
    """A label beside each marker, where it covers neither another label nor a marker.

    Args:
        anchors: x and y of the marker, and texts in the order of preference, the last as short as can be.
        left, top, right, bottom: the room for labels.
    """
    size = FONT_SIZE - 0.5
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in anchors]
    placed: list[Text] = []
    for x, y, texts in anchors:
        options = [text for name in texts for text in _beside(x, y, name, size)]
        boxes = [_box(text) for text in options]
        fitting = [
            index
            for index, box in enumerate(boxes)
            if box[0] >= left and box[2] <= right and box[1] >= top and box[3] <= bottom
            if not any(_overlap(box, other) for other in taken)
        ]
        if options:
            chosen = fitting[0] if fitting else len(options) - 1  # a covered number is better than none
            placed.append(options[chosen])
            taken.append(boxes[chosen])
    return placed


def _beside(x: float, y: float, text: str, size: float) -> list[Text]:
    """Where the label of a marker at (x, y) may stand, the best place first."""
    places = ((-9, 4, "end"), (0, -9, "middle"), (9, 4, "start"), (0, 17, "middle"))
    corners = ((-7, -7, "end"), (7, -7, "start"), (-7, 15, "end"), (7, 15, "start"))
    return [
        Text(x + right, y + down, text, "ink", anchor, size, halo=True) for right, down, anchor in (*places, *corners)
    ]


def _box(text: Text) -> tuple[float, float, float, float]:
    width = text_width(text.text, text.size)
    start = text.x - {"start": 0.0, "middle": width / 2, "end": width}[text.anchor]
    return start, text.y - text.size + 2, start + width, text.y + 2


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]

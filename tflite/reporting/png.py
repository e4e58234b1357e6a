"""A figure as PNG: the drawings of the page in its light colours, with the words that stand around them there."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tflite.reporting.drawing import PALETTE, Drawing, Item, Line, Mark, Shape, Text, marker, text_width, wrap
from tflite.reporting.figures import Figure, Panel

_DPI = 100
_SCALE = 2.0  # pixels of the picture for one of the drawing
_MOST_PIXELS = 30_000  # of a side
_MARGIN = 28.0
_COLUMN = 420.0
_GAP = 32.0
_WIDE = 860.0


def write(figure: Figure, legend: Sequence[str], path: Path) -> None:
    """Draws the figure's panels in one picture.

    Args:
        figure: with at least one panel.
        legend: numbers and names of the graphs.
        path: a .png file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    columns = min(len(figure.panels), 3)
    width = _WIDE if columns == 1 else columns * _COLUMN + (columns - 1) * _GAP
    panel_width = width if columns == 1 else _COLUMN
    items: list[Item] = []
    y = _MARGIN
    y = _lines(items, [figure.title], y, 18, "ink", width, bold=True) + 2
    y = _lines(items, [figure.caption], y, 12, "muted", width) + 10
    for start in range(0, len(figure.panels), columns):
        row = figure.panels[start : start + columns]
        places = [index * (_COLUMN + _GAP) for index in range(len(row))]
        y = max(_head(items, panel, x, y, panel_width) for panel, x in zip(row, places, strict=True))
        drawings = [panel.draw(panel_width) for panel in row]
        for drawing, x in zip(drawings, places, strict=True):
            items.extend(_moved(item, x, y) for item in _flat(drawing))
        y += max(drawing.height for drawing in drawings) + 22
    notes = [*figure.notes, *([f"{len(figure.more)} more charts are in the page."] if figure.more else [])]
    y = _lines(items, ["Graphs: " + " · ".join(legend), *notes], y, 12, "muted", width)
    total_width, height = width + 2 * _MARGIN, y + _MARGIN
    canvas = Canvas(figsize=(total_width / _DPI, height / _DPI), facecolor=PALETTE["surface"][0])
    FigureCanvasAgg(canvas)
    axes = canvas.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(-_MARGIN, width + _MARGIN), ylim=(height, 0))
    axes.axis("off")
    for item in items:
        _draw(axes, item)
    scale = min(_SCALE, _MOST_PIXELS / max(total_width, height))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # a box stands for the letter
        canvas.savefig(path, dpi=_DPI * scale)


def _lines(
    items: list[Item],
    texts: Sequence[str],
    y: float,
    size: float,
    role: str,
    width: float,
    x: float = 0,
    bold: bool = False,
) -> float:
    """Adds wrapped text from y downwards; the y below it."""
    for text in texts:
        for line in wrap(text, width, size):
            items.append(Text(x, y + size, line, role, "start", size, bold))
            y += size * 1.4
    return y


def _head(items: list[Item], panel: Panel, x: float, y: float, width: float) -> float:
    """Adds the words above a chart; the y below them."""
    y = _lines(items, [panel.title], y, 13, "ink", width, x, bold=True)
    y = _lines(items, panel.lines, y, 11, "muted", width, x)
    y = _lines(items, [f"! {mark}" for mark in panel.marks], y, 11, "warn", width, x)
    key_x, y = x, y + 4
    for shape, words in panel.keys:
        needed = text_width(words, 11) + 34
        if key_x > x and key_x + needed > x + width:
            key_x, y = x, y + 18
        items.append(marker(shape, key_x + 7, y + 8, panel.role, bool(panel.marks), 4.5))
        items.append(Text(key_x + 18, y + 12, words, "ink", size=11))
        key_x += needed
    return y + (26 if panel.keys else 4)


def _flat(drawing: Drawing) -> list[Text | Line | Shape]:
    found: list[Text | Line | Shape] = []
    for item in drawing.items:
        if isinstance(item, Mark):
            found += item.parts
        else:
            found.append(item)
    return found


def _moved(item: Text | Line | Shape, x: float, y: float) -> Text | Line | Shape:
    if isinstance(item, Text):
        return Text(item.x + x, item.y + y, item.text, item.role, item.anchor, item.size, item.bold, item.halo)
    if isinstance(item, Line):
        return Line(item.x1 + x, item.y1 + y, item.x2 + x, item.y2 + y, item.role, item.width, item.dashed)
    points = tuple((point_x + x, point_y + y) for point_x, point_y in item.points)
    return Shape(points, item.fill, item.stroke, item.width, item.faint)


def _draw(axes: Any, item: Item) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Polygon
    from matplotlib.patheffects import withStroke

    points = 72 / _DPI  # matplotlib measures fonts and lines in points
    if isinstance(item, Text):
        axes.text(
            item.x,
            item.y,
            item.text,
            parse_math=False,
            path_effects=[withStroke(linewidth=3 * points, foreground=PALETTE["surface"][0])] if item.halo else [],
            zorder=5,
            color=PALETTE[item.role][0],
            fontsize=item.size * points * 0.94,  # matplotlib's own font is wide
            fontweight="bold" if item.bold else "normal",
            ha={"start": "left", "middle": "center", "end": "right"}[item.anchor],
            va="baseline",
        )
    elif isinstance(item, Line):
        axes.plot(
            [item.x1, item.x2],
            [item.y1, item.y2],
            color=PALETTE[item.role][0],
            lw=item.width * points,
            ls=(0, (4, 3)) if item.dashed else "-",
            solid_capstyle="butt",
        )
    elif isinstance(item, Shape):
        axes.add_patch(
            Polygon(
                item.points,
                facecolor=to_rgba(PALETTE[item.fill][0], 0.16 if item.faint else 1) if item.fill else "none",
                edgecolor=PALETTE[item.stroke][0] if item.stroke else "none",
                lw=item.width * points if item.stroke else 0,
                ls=(0, (2.2, 1.5)) if item.faint else "-",
                zorder=3,
            )
        )

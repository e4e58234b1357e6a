"""A drawing as inline SVG: text for assistive technology, tooltips, and classes that the page's style colours."""

from html import escape

from tflite.reporting.drawing import Drawing, Item, Line, Mark, Shape, Text


def render(drawing: Drawing) -> str:
    """One `<svg>` element. Each mark is a named image with its words as `<title>`, which browsers show on hover."""
    body = "".join(_item(item) for item in drawing.items)
    return (
        f'<svg viewBox="0 0 {_n(drawing.width)} {_n(drawing.height)}" width="{_n(drawing.width)}" '
        f'height="{_n(drawing.height)}" role="group" tabindex="0" aria-label="{words(drawing.label)}">{body}</svg>'
    )


def words(text: str) -> str:
    """Text for HTML: escaped, and without the control characters that it forbids."""
    allowed = (letter if letter.isprintable() or letter.isspace() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return escape("".join(allowed))


def _item(item: Item) -> str:
    if isinstance(item, Mark):
        parts = "".join(_item(part) for part in item.parts)
        tip = words(item.tip)
        return f'<g class="mark" role="img" aria-label="{tip}"><title>{tip}</title>{parts}</g>'
    if isinstance(item, Text):
        anchor = "" if item.anchor == "start" else f' text-anchor="{item.anchor}"'
        weight = ' font-weight="600"' if item.bold else ""
        classes = f"f-{item.role}" + (" halo" if item.halo else "")
        return (
            f'<text class="{classes}" x="{_n(item.x)}" y="{_n(item.y)}" font-size="{_n(item.size)}"'
            f"{anchor}{weight}>{words(item.text)}</text>"
        )
    if isinstance(item, Line):
        dash = ' stroke-dasharray="4 3"' if item.dashed else ""
        return (
            f'<line class="s-{item.role}" x1="{_n(item.x1)}" y1="{_n(item.y1)}" x2="{_n(item.x2)}" y2="{_n(item.y2)}" '
            f'stroke-width="{_n(item.width)}"{dash}/>'
        )
    return _shape(item)


def _shape(shape: Shape) -> str:
    points = " ".join(f"{_n(x)},{_n(y)}" for x, y in shape.points)
    classes = [f"f-{shape.fill}" if shape.fill else "f-none"]
    stroke = ""
    if shape.stroke:
        classes.append(f"s-{shape.stroke}")
        stroke = f' stroke-width="{_n(shape.width)}"'
    if shape.faint:
        stroke += ' stroke-dasharray="3 2" fill-opacity=".16"'
    return f'<polygon class="{" ".join(classes)}" points="{points}"{stroke}/>'


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")

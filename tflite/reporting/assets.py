"""The page's style and script. They stand in the page itself, so that one file is all of it."""

from pathlib import Path

from tflite.reporting.drawing import PALETTE

_HERE = Path(__file__).parent


def style() -> str:
    """The style sheet, with the palette's roles as classes: f-ROLE fills, s-ROLE strokes, b-ROLE is a card's edge."""
    light = "".join(f"--{role}:{colors[0]};" for role, colors in PALETTE.items())
    dark = "".join(f"--{role}:{colors[1]};" for role, colors in PALETTE.items())
    roles = "".join(f".f-{role}{{fill:var(--{role})}}.s-{role}{{stroke:var(--{role})}}" for role in PALETTE)
    edges = "".join(f".card.b-{role}{{border-top:4px solid var(--{role})}}" for role in PALETTE)
    return (
        f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{roles}.f-none{{fill:none}}\n"
        f"{(_HERE / 'report.css').read_text()}{edges}"
    )


def script() -> str:
    """Tooltips for fingers and keyboards; without it browsers show the marks' titles."""
    return (_HERE / "report.js").read_text()

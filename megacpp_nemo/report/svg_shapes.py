"""The few shapes that pictures are drawn with, as SVG elements."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from megacpp_nemo.lowering.seams import Seam
from megacpp_nemo.report.colors import DARK

FONT = "DejaVu Sans, Verdana, sans-serif"
GREY, QUIET = "#595959", "#bbbbbb"
BLOCK, FLOPS = "#444444", "#8a8a8a"
DASHES = ' stroke-dasharray="4 3"'


def text(
    x: float,
    y: float,
    words: str,
    *,
    size: int = 13,
    fill: str = DARK,
    weight: str = "normal",
    anchor: str = "start",
) -> str:
    """Return a line of text; `y` is its base line."""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(words)}</text>'
    )


def titled(words: str, **attributes: str) -> str:
    """Return the title of what it stands in."""
    own = "".join(f" {name}={quoteattr(value)}" for name, value in attributes.items())
    return f"<title{own}>{escape(words)}</title>"


def frame(x: float, y: float, width: float, height: float, *, fill: str, seam: Seam | None) -> str:
    """Return a cell: framed where it is a seam's, by dashes where nobody builds it yet."""
    line = ""
    if seam is not None:
        line = f' stroke="{DARK}" stroke-width="2.5"' + ("" if seam.built else DASHES)
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" '
        f'fill="{fill}"{line}/>'
    )

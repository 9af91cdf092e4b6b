"""A picture as SVG: cells with letters, whose they are, their bytes and operations, the stages.

Every cell has a `<title>`, which a browser shows on hover. Nothing outside the file is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.sax.saxutils import quoteattr

from megacpp_nemo.report.colors import DARK, LIGHT, paint_of
from megacpp_nemo.report.numbers import size, work
from megacpp_nemo.report.picture import Cell, Picture, summary
from megacpp_nemo.report.svg_legend import legend
from megacpp_nemo.report.svg_shapes import BLOCK, FLOPS, FONT, GREY, QUIET, frame, text, titled

MARGIN, LABELS, STEP, WIDTH, HEIGHT = 28, 60, 36, 32, 36
TOP, ROW, END_GAP, STAGE_GAP = 92, 136, 10, 16
MARK, BAR, BARS = 14, 24, (48, 78)
NARROWEST = 760


def svg(picture: Picture) -> str:
    """Return a picture as the text of one SVG file."""
    most = picture.most
    lines = [_placed(picture, place, cells) for place, cells in enumerate(picture.rows)]
    lines += [_spread(depth, MARGIN + LABELS) for depth in picture.depths]
    parts, top = list(_title(picture)), TOP
    for line in lines:
        parts += _line(line, top, most)
        top += ROW
    drawn, bottom = legend(picture, MARGIN, top - 6, most)
    width = max(NARROWEST, *(line[-1][1] + STEP + MARGIN for line in lines))
    height = bottom + MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-labelledby="title" '
        f"font-family={quoteattr(FONT)}>"
    )
    paper = f'<rect width="{width}" height="{height}" fill="{LIGHT}"/>'
    return "\n".join([head, paper, *parts, *drawn, "</svg>"]) + "\n"


Line = list[tuple[Cell, int]]


def _placed(picture: Picture, place: int, cells: Sequence[Cell]) -> Line:
    """Return a line of the main pattern with left edges, embedding and head at its ends."""
    start = MARGIN + LABELS
    first = _spread(picture.before, start) if place == 0 else []
    line = _spread(cells, start + STEP * len(picture.before) + END_GAP)
    if place == len(picture.rows) - 1:
        return first + line + _spread(picture.after, line[-1][1] + STEP + END_GAP)
    return first + line


def _spread(cells: Sequence[Cell], left: int) -> Line:
    line: Line = []
    for cell in cells:
        if line and line[-1][0].stage != cell.stage:
            left += STAGE_GAP
        line.append((cell, left))
        left += STEP
    return line


def _title(picture: Picture) -> Iterator[str]:
    name = picture.title
    yield titled(f"{name}: {summary(picture)}", id="title")
    yield text(MARGIN, MARGIN + 16, name, size=20, weight="bold")
    yield text(MARGIN, MARGIN + 38, summary(picture), fill=GREY)


def _line(line: Line, top: int, most: tuple[int, float]) -> Iterator[str]:
    for down, name in zip(BARS, ("weights", "FLOPs"), strict=True):
        yield text(MARGIN, top + down + BAR, name, size=11, fill=GREY)
    depth = line[0][0].piece.depth
    if depth:
        yield text(MARGIN, top + 23, f"depth {depth}", size=12, weight="bold")
    for place, (cell, x) in enumerate(line):
        yield from _cell(cell, x, top, most)
        if place and line[place - 1][0].stage != cell.stage:
            yield from _boundary(cell, x - (STAGE_GAP + STEP - WIDTH) / 2, top)


def _cell(cell: Cell, x: int, top: int, most: tuple[int, float]) -> Iterator[str]:
    paint, middle = paint_of(cell.piece.family), x + WIDTH / 2
    about = f"{size(cell.weight_bytes)} of weights, {work(cell.cost.forward_flops)} a token"
    yield '<g class="cell">' + titled(f"{cell.title}; {cell.stage}; {about}")
    if cell.piece.number:
        yield text(middle, top - 5, str(cell.piece.number), size=9, fill=GREY, anchor="middle")
    yield frame(x, top, WIDTH, HEIGHT, fill=paint.fill, seam=cell.seam)
    big = 16 if len(cell.letter) == 1 else 11
    yield text(
        middle, top + 24, cell.letter, size=big, weight="bold", fill=paint.ink, anchor="middle"
    )
    if cell.mark:
        yield text(middle, top + HEIGHT + MARK, cell.mark, size=11, weight="bold", anchor="middle")
    if cell.piece.family:
        yield _bar(x, top + BARS[0] + BAR, cell.weight_bytes / most[0], BLOCK)
        yield _bar(x, top + BARS[1] + BAR, cell.cost.forward_flops / most[1], FLOPS)
    yield "</g>"


def _bar(x: int, foot: int, part: float, fill: str) -> str:
    tall = max(round((BAR - 6) * part, 1), 1)
    return (
        f'<rect x="{x + 4}" y="{foot - tall:g}" width="{WIDTH - 8}" height="{tall:g}" '
        f'fill="{fill}"/><rect x="{x}" y="{foot}" width="{WIDTH}" height="0.75" fill="{QUIET}"/>'
    )


def _boundary(cell: Cell, x: float, top: int) -> Iterator[str]:
    yield (
        f'<line x1="{x:g}" x2="{x:g}" y1="{top - 16}" y2="{top + BARS[1] + BAR}" '
        f'stroke="{DARK}" stroke-width="1.5" stroke-dasharray="2 3"/>'
    )
    yield text(x + 4, top - 18, cell.stage, size=10)

"""The legend of a picture: what the letters, the frames and the bars mean."""

from __future__ import annotations

from collections.abc import Iterator

from megacpp_nemo.lowering.seams import NEMO_ONLY
from megacpp_nemo.report.colors import LIGHT, paint_of
from megacpp_nemo.report.numbers import count, share, size, work
from megacpp_nemo.report.picture import Picture, by_letter
from megacpp_nemo.report.svg_shapes import GREY, frame, text

STEP, SWATCH = 26, (28, 20)
WORDS, COLUMNS = 42, (420, 500, 630)


def legend(picture: Picture, left: int, top: int, most: tuple[int, float]) -> tuple[list[str], int]:
    """Return the legend's elements, and where it ends.

    Args:
        picture: What it is of.
        left: Its left edge.
        top: Its upper edge.
        most: Bytes and operations that the tallest bars stand for.
    """
    parts: list[str] = []
    for lines in (_families(picture), _seams(picture), _notes(picture, most)):
        for line in lines:
            parts.append(f'<g transform="translate({left} {top})">{line}</g>')
            top += STEP
        top += STEP // 4
    return parts, top


def _families(picture: Picture) -> Iterator[str]:
    cells = list(picture.cells)
    whole = sum(cell.cost.count.total for cell in cells)
    flops = sum(cell.cost.forward_flops for cell in cells)
    for (letter, words), own in by_letter(cells).items():
        paint = paint_of(own[0].piece.family)
        parameters = sum(cell.cost.count.total for cell in own)
        columns = (
            count(parameters) + " parameters",
            share(parameters, whole),
            share(sum(cell.cost.forward_flops for cell in own), flops) + " of FLOPs",
        )
        yield (
            _swatch(letter, paint.ink, frame(0, 0, *SWATCH, fill=paint.fill, seam=None))
            + text(
                WORDS, 15, words + (f" \N{MULTIPLICATION SIGN} {len(own)}" if len(own) > 1 else "")
            )
            + "".join(
                text(at, 15, column, anchor="end")
                for at, column in zip(COLUMNS, columns, strict=True)
            )
        )


def _seams(picture: Picture) -> Iterator[str]:
    for mark, seam in picture.seams.items():
        built = "" if seam.built else f"; {NEMO_ONLY}, so dashed"
        drawn = frame(1, 1, SWATCH[0] - 2, SWATCH[1] - 2, fill=LIGHT, seam=seam)
        yield _swatch(mark, "#111111", drawn) + text(
            WORDS, 15, f"seam {seam.id}: {seam.what}{built}"
        )


def _notes(picture: Picture, most: tuple[int, float]) -> Iterator[str]:
    bars = f"The tallest bars: {size(most[0])} of weights, {work(most[1])} a token forward."
    frames = " Cells without a frame are the release's own." if picture.release else ""
    yield text(0, 15, bars + frames, fill=GREY)


def _swatch(letter: str, ink: str, drawn: str) -> str:
    middle = SWATCH[0] / 2
    return drawn + text(middle, 14, letter, size=11, weight="bold", fill=ink, anchor="middle")

"""The strip of the layers in a terminal, with a bar for the bytes and the operations of each.

      1  AEMEDEMEDEMR
         1...2...2..3   who builds it: a dot is the release's own
         ▁█▃█▁█▃█▁█▃▁   weights
         ▁█▃█▁█▃█▁█▃▁   FLOPs

In ASCII a bar is a digit, 9 for the most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from megacpp_nemo.cli.layer_strip import style_of
from megacpp_nemo.cli.screen import Screen
from megacpp_nemo.contract.errors import MegaCppError
from megacpp_nemo.lowering.features import ranges
from megacpp_nemo.lowering.seams import NEMO_ONLY
from megacpp_nemo.report.numbers import count, share, size, work
from megacpp_nemo.report.picture import Cell, Picture, by_letter, summary

BLOCKS, DIGITS = "▁▂▃▄▅▆▇█", "0123456789"
LABEL, AFTER = 5, 13
NAMES = ("", "who builds it", "weights", "FLOPs")


def strip_text(picture: Picture, screen: Screen, refusal: MegaCppError | None = None) -> str:
    """Return a picture as text that fits the screen."""
    parts = [[screen.heading(picture.title), screen.wrapped(summary(picture))]]
    if refusal is not None:
        parts.append([screen.wrapped(f"Nobody is told to build it: {refusal.what}.")])
    parts.append(_strip(picture.layers, picture, screen))
    for number, depth in enumerate(picture.depths, 1):
        layers = [cell for cell in depth if cell.piece.family]
        title = f"Multi-token prediction depth {number}"
        parts.append([screen.heading(title), *_strip(layers, picture, screen)])
    parts += [[_table(picture, screen)], list(_notes(picture, screen))]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _strip(cells: Sequence[Cell], picture: Picture, screen: Screen) -> list[str]:
    lines: list[str] = []
    bars = sum(one.stage != other.stage for one, other in pairwise(cells))
    room = screen.width - LABEL - AFTER - 3 - bars
    whole = room // picture.row * picture.row
    step = whole or max(room // 10 * 10, 10)
    for start in range(0, len(cells), step):
        part, before = cells[start : start + step], cells[max(start - 1, 0)]
        rows = [_row(part, before, picture, line, screen) for line in range(len(NAMES))]
        number = f"{part[0].piece.number:>{LABEL - 2}}  "
        for text, name in zip(rows, NAMES, strict=True):
            if picture.release or name != NAMES[1]:
                lines.append(f"{number}{text}   {screen.paint(name, 'dim')}".rstrip())
            number = " " * LABEL
    return lines


def _row(part: Sequence[Cell], before: Cell, picture: Picture, line: int, screen: Screen) -> str:
    """Return one of the lines: letters, owners, weights or operations."""
    text, most = "", picture.most
    for cell in part:
        if cell.stage != before.stage:
            text += screen.mark("│", "|") if line == 0 else " "
        before = cell
        style = style_of(cell.seam) if picture.release else ""
        text += screen.paint(_sign(cell, most, line, screen), style if line < 2 else "")
    return text


def _sign(cell: Cell, most_of: tuple[int, float], line: int, screen: Screen) -> str:
    if line == 0:
        return cell.letter
    if line == 1:
        return cell.mark or screen.mark("·", ".")
    cost, most = (cell.weight_bytes, cell.cost.forward_flops)[line - 2], most_of[line - 2]
    marks = screen.mark(BLOCKS, DIGITS)
    return marks[round((len(marks) - 1) * cost / most)]


def _table(picture: Picture, screen: Screen) -> str:
    cells = list(picture.cells)
    parameters = sum(cell.cost.count.total for cell in cells)
    flops = sum(cell.cost.forward_flops for cell in cells)
    rows = []
    for (letter, words), own in by_letter(cells).items():
        held, done = sum(c.cost.count.total for c in own), sum(c.cost.forward_flops for c in own)
        rows.append(
            (
                letter,
                words,
                str(len(own)),
                count(held),
                share(held, parameters),
                size(sum(c.weight_bytes for c in own)),
                work(done),
                share(done, flops),
            )
        )
    head = ("", "part", "count", "parameters", "share", "weights", "a token", "share")
    return screen.table(head, rows)


def _notes(picture: Picture, screen: Screen) -> Iterator[str]:
    if picture.release:
        yield screen.wrapped(f"{screen.mark('·', '.')} native: the release builds it itself", "  ")
    for mark, seam in picture.seams.items():
        missing = "" if seam.built else f", {NEMO_ONLY}"
        told = screen.wrapped(f"{mark} seam {seam.id}: {seam.what}{missing}", "  ")
        yield screen.paint(told, style_of(seam))
    taken = [cell for cell in picture.layers if cell.letter == "D" and cell.a_rank is not None]
    if taken:
        yield screen.wrapped(f"D: A layers that DSA takes, A-ranks {ranges(_ranks(taken))}")


def _ranks(cells: Sequence[Cell]) -> Iterator[int]:
    return (cell.a_rank for cell in cells if cell.a_rank is not None)

"""The section of the layers: the strip, what a cell tells, and every layer as a table."""

from __future__ import annotations

from typing import Any

from megacpp_nemo.planner.activations import saved_bytes
from megacpp_nemo.planner.pieces import Piece
from megacpp_nemo.report.numbers import count, size, work
from megacpp_nemo.report.picture import Cell, Picture, by_letter
from megacpp_nemo.report.subject import Subject
from megacpp_nemo.report.tables import Table


def layers(subject: Subject) -> dict[str, Any]:
    """Return what `templates/layers.html` draws."""
    picture = subject.picture
    most = picture.most
    return {
        "picture": picture,
        "details": details(subject),
        "refusal": subject.refusal,
        "families": [
            {
                "letter": letter,
                "words": words,
                "key": own[0].piece.family.letter if own[0].piece.family else "none",
            }
            for (letter, words), own in by_letter(picture.cells).items()
        ],
        "most": f"{size(most[0])}, {work(most[1])} a token",
        "table": _table(picture),
    }


def details(subject: Subject) -> dict[Piece, list[tuple[str, str]]]:
    """Return what each cell tells when it is pointed at: names and values.

    Raises:
        RecipeError: If no rule says what a part keeps for the backward pass.
    """
    kept: dict[object, int] = {}
    found = {}
    for cell in subject.picture.cells:
        # Pieces of a kind keep the same.
        kind = cell.piece.role, cell.piece.family
        if kind not in kept:
            kept[kind] = sum(saved_bytes(subject.recipe, cell.piece).values())
        found[cell.piece] = _details(cell, kept[kind])
    return found


def _details(cell: Cell, kept_bytes: int) -> list[tuple[str, str]]:
    found = []
    if cell.a_rank is not None:
        found.append(("A-rank", str(cell.a_rank)))
    if cell.owned:
        found.append(("owner", cell.owned))
    if cell.seam:
        owner = cell.seam.nemo_owner or cell.seam.owner
        found.append(("built by", owner.removeprefix("megacpp_nemo.")))
    cost = cell.cost
    found += [
        ("pipeline", cell.stage),
        ("parameters", count(cost.count.total)),
        ("active for a token", count(cost.count.active)),
        ("weights", size(cell.weight_bytes)),
        ("forward, a token", work(cost.forward_flops)),
        ("kept for backward", f"{size(kept_bytes)} a micro-batch, on a rank"),
    ]
    return found


def _table(picture: Picture) -> Table:
    rows = [
        (
            cell.piece.name,
            cell.letter,
            cell.words,
            cell.owned or "-",
            cell.stage,
            f"{cell.cost.count.total:,}",
            size(cell.weight_bytes),
            work(cell.cost.forward_flops),
        )
        for cell in picture.cells
    ]
    return Table(
        caption="Every part of the model, in the order a token meets them",
        head=(
            "part",
            "family",
            "what",
            "owner",
            "pipeline",
            "parameters",
            "weights",
            "forward, a token",
        ),
        rows=rows,
        words=(1, 2, 3, 4),
    )

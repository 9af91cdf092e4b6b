"""The description that every picture of a model is drawn from: its layers, one cell each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.lowering.lower import Lowering
from megacpp_nemo.lowering.plan import NATIVE
from megacpp_nemo.lowering.roles import Role as LayerRole
from megacpp_nemo.lowering.roles import role_of
from megacpp_nemo.lowering.seams import NEMO_ONLY, Seam
from megacpp_nemo.planner.costs import Cost, operations
from megacpp_nemo.planner.counts import counts
from megacpp_nemo.planner.pieces import Piece, Role, pieces
from megacpp_nemo.planner.saved import element_bytes
from megacpp_nemo.report.numbers import count, work

MARKS = "123456789abcdefghijklmnopqrstuvwxyz"
LETTERS = {Role.EMBEDDING: "in", Role.HEAD: "out", Role.DEPTH_ENTRY: "+"}
IN_EMBEDDING = ("ngram-hash", "structure")
MOST_IN_A_ROW = 26
# Of a seam that the release's script cannot be given; a NeMo run may have it.


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One part of a model in a picture.

    Args:
        piece: The part: a layer, or what stands before and after the layers.
        letter: What is written on it: the letter of its family, D where DSA takes an A layer.
        words: What it is.
        owner: `native`, the id of a seam, or empty where no release has been asked.
        seam: Its seam; None if it is native, or no release has been asked.
        mark: The seam's digit in this picture; empty without one.
        a_rank: 0-based index among the A layers, of those that DSA could take; None for others.
        cost: Its parameters and operations.
        weight_bytes: Its parameters as the forward pass reads them, over all ranks.
    """

    piece: Piece
    letter: str
    words: str
    owner: str
    seam: Seam | None
    mark: str
    a_rank: int | None
    cost: Cost
    weight_bytes: int

    @property
    def stage(self) -> str:
        """Its pipeline stage in words, from 1 on, and the virtual chunk behind the first."""
        piece = self.piece
        return f"stage {piece.stage + 1}" + (f", chunk {piece.chunk + 1}" if piece.chunk else "")

    @property
    def title(self) -> str:
        """It in a line: number, what it is, whose it is."""
        name = self.piece.name[0].upper() + self.piece.name[1:]
        rank = f", A-rank {self.a_rank}" if self.a_rank is not None else ""
        words = "" if self.words == self.piece.name else f": {self.words}{rank}"
        return name + words + (f"; {self.owned}" if self.owned else "")

    @property
    def owned(self) -> str:
        """Whose it is in words; empty where no release has been asked."""
        if self.seam is None:
            return self.owner
        return f"seam {self.seam.id}" + ("" if self.seam.built else f", {NEMO_ONLY}")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A model as cells in the order a token meets them.

    Args:
        name: The recipe's name.
        release: Megatron's release that the owners are of; empty where none was asked.
        before: The embedding.
        layers: The main pattern, one cell a layer.
        after: Final norm and output head.
        depths: Prediction depths, each its cells.
        seams: Every seam that is marked, by its mark.
        row: Cells that a line of the main pattern takes, a whole number of tiles if there is room.
        stages: Pipeline stages times chunks.
    """

    name: str
    release: str
    before: tuple[Cell, ...]
    layers: tuple[Cell, ...]
    after: tuple[Cell, ...]
    depths: tuple[tuple[Cell, ...], ...]
    seams: Mapping[str, Seam]
    row: int
    stages: int

    @property
    def cells(self) -> Iterator[Cell]:
        """Every cell."""
        yield from (*self.before, *self.layers, *self.after)
        for depth in self.depths:
            yield from depth

    @property
    def title(self) -> str:
        """The recipe's name, and the release that its owners are of."""
        return self.name + (f" on Megatron-LM {self.release}" if self.release else "")

    @property
    def every_layer(self) -> list[Cell]:
        """Every cell that is a layer, of the main pattern and of the prediction depths."""
        return [cell for cell in self.cells if cell.piece.family]

    @property
    def most(self) -> tuple[int, float]:
        """The most weight bytes and operations of a layer, at least 1: what full bars stand for."""
        own = self.every_layer
        most = max(cell.weight_bytes for cell in own), max(cell.cost.forward_flops for cell in own)
        return max(1, most[0]), max(1.0, most[1])

    @property
    def rows(self) -> list[tuple[Cell, ...]]:
        """The main pattern in lines."""
        cells = self.layers
        return [cells[start : start + self.row] for start in range(0, len(cells), self.row)]

    @property
    def segments(self) -> list[tuple[Cell, ...]]:
        """The main pattern by pipeline segment."""
        grouped = groupby(self.layers, lambda cell: (cell.piece.chunk, cell.piece.stage))
        return [tuple(cells) for _, cells in grouped]


def picture_of(recipe: HybridRecipe, lowering: Lowering | None = None) -> Picture:
    """Return the picture of a recipe.

    Args:
        recipe: The recipe.
        lowering: Its lowering, which says who owns each layer; None where no release has it.

    Raises:
        RecipeError: If a block's costs are not known.
    """
    draw = _Draw(recipe, lowering)
    cells = [draw.cell(piece) for piece in pieces(recipe)]

    def those(*roles: Role) -> tuple[Cell, ...]:
        return tuple(cell for cell in cells if cell.piece.role in roles)

    depths = range(1, recipe.model.mtp.num_layers + 1)
    chunks = recipe.parallelism.virtual_pipeline_model_parallel_size or 1
    return Picture(
        name=recipe.name,
        release=lowering.release if lowering else "",
        before=those(Role.EMBEDDING),
        layers=those(Role.LAYER),
        after=those(Role.FINAL_NORM, Role.HEAD),
        depths=tuple(tuple(c for c in cells if c.piece.depth == depth) for depth in depths),
        seams={mark: draw.seams[name] for name, mark in draw.marks.items()},
        row=_row(recipe),
        stages=recipe.parallelism.pipeline_model_parallel_size * chunks,
    )


def by_letter(cells: Iterable[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """Return cells by their letter and what they are, in the order they first appear."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.letter, cell.words), []).append(cell)
    return found


def summary(picture: Picture) -> str:
    """Return a model in a line: layers, depths, stages, parameters and operations."""
    cells = list(picture.cells)
    parts = [f"{len(picture.layers)} layers"]
    if depths := len(picture.depths):
        parts.append(f"{depths} prediction depth{'s' * (depths > 1)}")
    if picture.stages > 1:
        parts.append(f"{picture.stages} pipeline segments")
    parts.append(f"{count(sum(cell.cost.count.total for cell in cells))} parameters")
    parts.append(f"{work(sum(cell.cost.forward_flops for cell in cells))} a token forward")
    return ", ".join(parts)


class _Draw:
    """What cells are made from: a recipe's costs, and a lowering's owners and seams."""

    def __init__(self, recipe: HybridRecipe, lowering: Lowering | None) -> None:
        self.recipe, self.operations = recipe, operations(recipe)
        self.counts = dict(counts(recipe).pieces)
        self.ranks = {number: rank for rank, number in recipe.layers.a_ranks().items()}
        seams = lowering.seams if lowering else ()
        self.seams = {seam.id: seam for seam in seams}
        self.marks = dict(zip(self.seams, MARKS, strict=False))
        self.main = lowering.layers if lowering else ()
        self.prediction = lowering.prediction if lowering else ()

    def cell(self, piece: Piece) -> Cell:
        """Return a piece's cell."""
        owner = self._owner(piece)
        role = self._role(piece)
        in_main = piece.role is Role.LAYER
        return Cell(
            piece=piece,
            letter=piece.family.letter if piece.family else LETTERS.get(piece.role, "n"),
            words=role.words if role else piece.role.value,
            owner=owner,
            seam=self.seams.get(owner),
            mark=self.marks.get(owner, ""),
            a_rank=self.ranks.get(piece.number) if in_main and piece.number else None,
            cost=replace(self.operations(piece), count=self.counts[piece], pieces=1),
            weight_bytes=self.counts[piece].total * element_bytes(self.recipe),
        )

    def _role(self, piece: Piece) -> LayerRole | None:
        return role_of(piece.family, self.recipe) if piece.family else None

    def _owner(self, piece: Piece) -> str:
        if not self.main:
            return ""
        if piece.number and piece.depth is None:
            return self.main[piece.number - 1].owner
        if piece.depth is not None:
            own = "mtp" if "mtp" in self.seams else NATIVE
            return (
                self.prediction[piece.number - 1].owner if piece.number and own == NATIVE else own
            )
        ours = [name for name in IN_EMBEDDING if name in self.seams]
        return ours[0] if ours and piece.role is Role.EMBEDDING else NATIVE


def _row(recipe: HybridRecipe) -> int:
    """Return the cells of a line: so many tiles that the same layers stand below each other."""
    tile = len(recipe.pattern)
    whole = MOST_IN_A_ROW // tile * tile
    return whole or MOST_IN_A_ROW

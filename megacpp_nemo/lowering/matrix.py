"""The matrix: which recipes lower to which releases, and what Megatron does not own there.

    for cell in matrix():
        print(cell.words, cell.release, cell.seams or cell.refusal)

The full-size families x modes x precisions x prediction depths x sparse attention x releases.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from megacpp_nemo.contract.errors import MegaCppError
from megacpp_nemo.contract.families import FAMILIES, recipe
from megacpp_nemo.contract.parallelism import ParallelismMode
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.contract.training import Precision
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.lowering.releases import RELEASE_NAMES, Release, load_release

PRECISIONS = (Precision.BF16.value, Precision.FP8_EXPERTS.value)
DEPTHS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe of the matrix.

    Args:
        family: Name of the full-size recipe.
        mode: Parallelism mode.
        precision: Arithmetic.
        mtp: Multi-token prediction depths.
        sparse: Whether sparse attention is on.
    """

    family: str
    mode: str
    precision: str
    mtp: int
    sparse: bool

    @property
    def recipe(self) -> HybridRecipe:
        """The recipe itself."""
        changes = {
            "precision": self.precision,
            "model.mtp.num_layers": self.mtp,
            "features.sparse_attention": self.sparse,
        }
        return recipe(self.family, mode=self.mode, changes=changes)

    @property
    def words(self) -> tuple[str, ...]:
        """What `megacpp lower` takes for it."""
        return (
            self.family,
            f"mode={self.mode}",
            f"precision={self.precision}",
            f"model.mtp.num_layers={self.mtp}",
            f"features.sparse_attention={str(self.sparse).lower()}",
        )


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A recipe on a release.

    Args:
        case: The recipe.
        release: The release's name.
        seams: Ids of the seams that are left; empty for an all-native model, or a refusal.
        refusal: First line of why it cannot be lowered; empty if it can.
    """

    case: Case
    release: str
    seams: tuple[str, ...] = ()
    refusal: str = ""


def cases() -> tuple[Case, ...]:
    """Return every recipe of the matrix, in order."""
    modes = [mode.value for mode in ParallelismMode]
    axes = itertools.product(FAMILIES, modes, PRECISIONS, (False, True), DEPTHS)
    return tuple(
        Case(family=family, mode=mode, precision=precision, mtp=mtp, sparse=sparse)
        for family, mode, precision, sparse, mtp in axes
    )


def matrix(releases: Sequence[str] = RELEASE_NAMES) -> tuple[Cell, ...]:
    """Return every recipe on every release: its seams, or why it is refused.

    Raises:
        LoweringError: If there is no such release.
    """
    known = [load_release(release) for release in releases]
    return tuple(_cell(case, release) for case in cases() for release in known)


def _cell(case: Case, release: Release) -> Cell:
    try:
        seams = lower(case.recipe, release=release).seams
    except MegaCppError as error:
        return Cell(case=case, release=release.name, refusal=error.what.splitlines()[0])
    return Cell(case=case, release=release.name, seams=tuple(seam.id for seam in seams))

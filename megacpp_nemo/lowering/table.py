"""The correspondence table: every setting and all its places.

Every leaf field of `HybridRecipe` has a row, and so has every setting that recipes fix. The
NeMo recipe is built from this table; lowering, lifting, the audit, the hook for NeMo recipes
and the documentation read it. A test holds it complete: adding a field to the contract without
a row fails.

The rows stand in `rows_model` and `rows_blocks` (what the model is), `rows_run` (how a run goes),
`rows_recompute` (what it computes twice), `rows_plasticity` (what is done to a run in progress) and
`rows_fixed` (what every recipe fixes).
"""

from __future__ import annotations

from typing import Any

from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.lowering.row import CONFIG, Condition, Row, Spelling
from megacpp_nemo.lowering.rows_blocks import BLOCK_ROWS
from megacpp_nemo.lowering.rows_fixed import FIXED_ROWS, HOST_ROWS
from megacpp_nemo.lowering.rows_model import MODEL_ROWS
from megacpp_nemo.lowering.rows_plasticity import PLASTICITY_ROWS
from megacpp_nemo.lowering.rows_run import GPU_PACKAGES, RUN_ROWS

__all__ = [
    "CONFIG",
    "FRAME",
    "GPU_PACKAGES",
    "ROWS",
    "TABLE",
    "Condition",
    "Row",
    "Spelling",
    "carried",
]

# Rows of recipe fields, and all rows.
ROWS: tuple[Row, ...] = (*MODEL_ROWS, *BLOCK_ROWS, *RUN_ROWS, *PLASTICITY_ROWS)
FRAME: tuple[Row, ...] = (*FIXED_ROWS, *HOST_ROWS)
TABLE: tuple[Row, ...] = (*ROWS, *FRAME)


def carried(recipe: HybridRecipe) -> dict[str, Any]:
    """Return every path of the NeMo recipe that carries a setting, with its value."""
    return {
        path: row.spell(row.value(recipe), recipe)
        for row in TABLE
        if row.when(recipe)
        for path in row.nemo
    }

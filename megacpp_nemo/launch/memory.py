"""Whether a layout holds its model, by the planner's account."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from megacpp_nemo.contract import HybridRecipe
from megacpp_nemo.launch.errors import LaunchError
from megacpp_nemo.planner.gpus import GIB, GPUS

PLANNER = "megacpp_nemo.planner.memory"


def needed_bytes(recipe: HybridRecipe) -> int | None:
    """Return the bytes that the most loaded rank needs; None where nothing counts them."""
    if importlib.util.find_spec(PLANNER) is None:
        return None
    planner: Any = importlib.import_module(PLANNER)
    return int(planner.most_loaded(recipe).total_bytes)


def check_memory(recipe: HybridRecipe, gpu: str) -> None:
    """Refuse a layout whose most loaded rank needs more than a GPU has.

    Raises:
        LaunchError: By how many GiB, if it does not fit.
    """
    needed, have = needed_bytes(recipe), GPUS[gpu].memory_bytes
    if needed is not None and needed > have:
        raise LaunchError(
            f"The model does not fit: the most loaded rank needs {(needed - have) / GIB:.1f} GiB "
            f"more than an {gpu.upper()} has",
            given=f"{needed / GIB:.1f} GiB on one rank, {have / GIB:.1f} GiB of memory",
            allowed=f"a layout of up to {have / GIB:.1f} GiB a rank",
            hint="a smaller micro_batch_size, larger parallel sizes, or more nodes",
        )

"""The section of the memory: what a rank of each stage holds, beside the GPU's memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megacpp_nemo.planner.memory import RankMemory
from megacpp_nemo.planner.plan import Plan
from megacpp_nemo.report.numbers import size
from megacpp_nemo.report.tables import Table

# The length of a bar, in the units of its drawing.
LENGTH = 1000
PARTS = {
    "weights": "weights_bytes",
    "gradients": "gradients_bytes",
    "optimizer": "optimizer_bytes",
    "activations": "activations_bytes",
    "logits": "logits_bytes",
}


def memory(plan: Plan) -> dict[str, Any]:
    """Return what `templates/memory.html` draws."""
    gpu, ranks = plan.gpu, plan.memory
    whole = max(gpu.memory_bytes, *(rank.total_bytes for rank in ranks))
    return {
        "verdict": verdict(plan),
        "names": list(PARTS),
        "bars": [
            {
                "name": f"Stage {rank.stage + 1}" if len(ranks) > 1 else "Every rank",
                "total": size(rank.total_bytes),
                "room": size(gpu.memory_bytes),
                "limit": round(LENGTH * gpu.memory_bytes / whole) - 3,
                "parts": list(_parts(rank, whole)),
            }
            for rank in ranks
        ],
        "table": _table(ranks),
    }


def verdict(plan: Plan) -> str:
    """Return whether the layout fits, and by how much."""
    fullest = f", of stage {plan.fullest.stage + 1}," if len(plan.memory) > 1 else ""
    if plan.missing_bytes > 0:
        lacks = size(plan.missing_bytes)
        return f"The fullest rank{fullest} does not fit into an {plan.gpu.title}: {lacks} too much."
    free = size(-plan.missing_bytes)
    return (
        f"The fullest rank{fullest} leaves {free} of an {plan.gpu.title} for what is not counted."
    )


def _parts(rank: RankMemory, whole: int) -> Iterator[dict[str, Any]]:
    held = 0
    for place, (name, field) in enumerate(PARTS.items()):
        own = getattr(rank, field)
        left, right = LENGTH * held / whole, LENGTH * (held + own) / whole
        held += own
        yield {
            "place": place,
            "name": name,
            "size": size(own),
            "left": f"{left:.2f}",
            "width": f"{right - left:.2f}",
        }


def _table(ranks: Sequence[RankMemory]) -> Table:
    rows = [
        (
            f"stage {rank.stage + 1}",
            *(size(getattr(rank, field)) for field in PARTS.values()),
            size(rank.total_bytes),
        )
        for rank in ranks
    ]
    tables = max(rank.tables_bytes for rank in ranks)
    within = f" Of the weights, up to {size(tables)} are n-gram tables." if tables else ""
    if host := max(rank.host_bytes for rank in ranks):
        within = f" N-gram tables are trained in host memory: {size(host)} a process."
    return Table(
        caption="What a rank of each stage holds",
        head=("rank of", *PARTS, "all"),
        rows=rows,
        note="No layer is run again in the backward pass, and kernels are the fused ones. Not "
        "counted: the CUDA context, the allocator's fragmentation, buffers of collectives."
        + within,
    )

"""The parallel sizes of a layout, and all of them over a number of GPUs."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.gpus import Gpu, PlanError

MOST = 65_536


class Sizes(NamedTuple):
    """The parallel sizes of a layout, as people abbreviate them.

    Args:
        tp: Tensor-parallel ranks.
        pp: Pipeline stages.
        vpp: Virtual chunks on each stage, 1 for none.
        cp: Context-parallel ranks.
        ep: Expert-parallel ranks.
        etp: Tensor-parallel ranks of an expert.
        dp: Data-parallel ranks.
    """

    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    etp: int
    dp: int

    def __str__(self) -> str:
        return " ".join(f"{name.upper()}{size}" for name, size in self._asdict().items())


def sizes_of(recipe: HybridRecipe) -> Sizes:
    """Return the parallel sizes of a recipe's layout."""
    layout = recipe.parallelism
    return Sizes(
        tp=layout.tensor_model_parallel_size,
        pp=layout.pipeline_model_parallel_size,
        vpp=layout.virtual_pipeline_model_parallel_size or 1,
        cp=layout.context_parallel_size,
        ep=layout.expert_model_parallel_size,
        etp=layout.expert_tensor_size,
        dp=layout.data_parallel_size,
    )


def nodes_of(count: int, gpu: Gpu) -> tuple[int, int]:
    """Return the nodes that hold a number of GPUs, and the GPUs of each.

    Raises:
        PlanError: If it is none of those: not positive, beyond `MOST`, or no multiple of a node.
    """
    if isinstance(count, int) and count > MOST:
        raise PlanError(
            f"Layouts are looked for on up to {MOST:,} GPUs",
            given=f"count={count}",
            allowed=f"1 to {MOST}",
            hint=f"count={MOST}",
        )
    whole = isinstance(count, int) and not isinstance(count, bool) and count > 0
    if whole and count <= gpu.per_node:
        return 1, count
    if whole and count % gpu.per_node == 0:
        return count // gpu.per_node, gpu.per_node
    near = max(1, round(count / gpu.per_node)) * gpu.per_node if whole else gpu.per_node
    raise PlanError(
        f"GPUs come in nodes of {gpu.per_node}",
        given=f"count={count!r}",
        allowed=f"1 to {gpu.per_node}, or a multiple of {gpu.per_node}",
        hint=f"count={near}",
    )


def every_size(layers: int, count: int, devices: int) -> Iterator[Sizes]:
    """Yield all parallel sizes over `count` GPUs, `devices` in a node."""
    for pp in divisors(count):
        ranks = count // pp
        # One chunk a stage also where even that is too many for the layers: to be refused.
        chunks = range(1, max(layers // pp, 1) + 1) if pp > 1 else (1,)
        dense = [
            (tp, cp) for tp in divisors(ranks) if tp <= devices for cp in divisors(ranks // tp)
        ]
        sparse = [(e, t) for e in divisors(ranks) for t in divisors(ranks // e) if t <= devices]
        for tp, cp in dense:
            for ep, etp in sparse:
                for vpp in chunks:
                    yield Sizes(tp, pp, vpp, cp, ep, etp, ranks // (tp * cp))


@functools.cache
def divisors(number: int) -> tuple[int, ...]:
    """Return the divisors of a number in order."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return tuple(sorted({*small, *(number // divisor for divisor in small)}))

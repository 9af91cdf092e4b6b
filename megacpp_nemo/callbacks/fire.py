"""FIRE, Frobenius-isometry reinitialization (arXiv 2602.08040), of a model's projections.

At a phase boundary each matrix W `[out, in]` becomes the nearest of the matrices whose singular
values are all `s = sqrt(out / in)`: s times its polar factor. What it has learned stays in its
singular vectors, and all of them can learn again. Optimizer moments belong to the old weights and
become zero.

Measured, with d the short side of W:

    DfI / d = ||(W / s)^T (W / s) - I||_F^2 / d        how far from such a matrix it is
    SFE     = ||W - s polar(W)||_F^2                   how far it was moved

Fused matrices are projected one logical matrix at a time, experts one by one, and a matrix that
tensor ranks share as the one matrix it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megacpp_nemo.callbacks.journal import Action
from megacpp_nemo.callbacks.matrices import Matrix, check_selection, hybrid_models, matrices_of
from megacpp_nemo.callbacks.optimizers import OptimizerStates
from megacpp_nemo.callbacks.polar import deviation, polar_
from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.plasticity import FireLever


@torch.no_grad()
def fire(
    models: Any,
    lever: FireLever,
    optimizers: OptimizerStates | Iterable[Any] | None = None,
    *,
    step: int = 0,
    cause: str = "python",
) -> Action:
    """Project the selected matrices towards isometry, and reset their optimizer state.

    Collective over all ranks, each with the current weights of all it holds. A matrix that is
    within the tolerance already, or all zeros, is left as it is, its moments included. Masters
    follow the new weights; step counts stay.

    Args:
        models: The model in training or at rest: NeMo's `MegatronParallel`, wrapped or bare.
        lever: What to do.
        optimizers: The run's optimizers, or their states; None where there are none.
        step: Optimizer steps taken, for the journal.
        cause: Why, for the journal.

    Returns:
        What was done to the matrices this rank speaks for: `dfi_before` and `dfi_after`, both
        DfI / d and the latter of the weights as written; `sfe`; `iterations`; `reached`, 1 if the
        tolerance was reached, before rounding to the weights' type, or 0. `merged` of the journal
        puts ranks together.

    Raises:
        RecipeError: If nothing is selected on any rank, or a layer the model lacks.
        RuntimeRefusal: On every rank and before anything is written, if a selected weight is not
            finite; or if an optimizer keeps its masters in a way that is not known.
    """
    began = time.perf_counter()
    bare = hybrid_models(models)
    states = None if optimizers is None else _states(optimizers)
    matrices = matrices_of(bare, lever.selection)
    check_selection(bare, lever.selection, len(matrices))
    _refuse_not_finite(matrices)
    found = {matrix: _project(matrix, lever) for matrix in matrices}
    if states is not None:
        _reset([matrix for matrix in matrices if found[matrix]["iterations"]], states)
    reports = {m.name: values for m, values in found.items() if m.is_reported_here}
    return Action(
        lever="fire",
        step=step,
        cause=cause,
        matrices=reports,
        totals=_totals(reports),
        seconds=time.perf_counter() - began,
        bytes=sum(
            m.shape[0] * m.shape[1] * m.weight.element_size()
            for m, values in found.items()
            if m.is_reported_here and values["iterations"]
        ),
    )


def _project(matrix: Matrix, lever: FireLever) -> dict[str, float]:
    """Project one matrix; collective over the ranks that share it."""
    scale = math.sqrt(matrix.shape[0] / matrix.shape[1])
    whole: dict[str, Any] = {"shape": matrix.shape, "split": matrix.split, "group": matrix.group}
    share = matrix.read().div_(scale)
    outcome = polar_(share, **whole, tolerance=lever.tolerance, max_iterations=lever.max_iterations)
    after, moved = outcome.after, 0.0
    if outcome.iterations:
        share.mul_(scale)
        change = torch.linalg.vector_norm(matrix.read().sub_(share))
        moved = float(matrix.reduce(change.square()))
        matrix.write(share)
        del share
        after = deviation(matrix.read().div_(scale), **whole)
    return {
        "dfi_before": outcome.before,
        "dfi_after": after,
        "sfe": moved,
        "iterations": float(outcome.iterations),
        "reached": float(outcome.reached),
    }


def _states(optimizers: OptimizerStates | Iterable[Any]) -> OptimizerStates:
    return optimizers if isinstance(optimizers, OptimizerStates) else OptimizerStates(optimizers)


def _reset(changed: Sequence[Matrix], states: OptimizerStates) -> None:
    """Bring the optimizer in line with the matrices that changed, and with nothing else."""
    of_parameter: dict[nn.Parameter, list[Matrix]] = {}
    for matrix in changed:
        of_parameter.setdefault(matrix.weight, []).append(matrix)
    for weight, own in of_parameter.items():
        all_of_it = len(own) == len(own[0].parameter.parts)
        rows: Tensor | None = None
        if not all_of_it:
            rows = torch.stack([matrix.mask() for matrix in own]).any(0)
        states.follow(weight, rows, reset=True)


def _refuse_not_finite(matrices: Sequence[Matrix]) -> None:
    """Refuse NaN and infinity in any matrix of any rank; collective over all ranks."""
    spans = [(matrix, span) for matrix in matrices for span in matrix.part.rows]
    # The least and the largest are NaN where anything is, and need no copy.
    ends = [torch.stack(m.weight.detach()[a:b].aminmax()) for m, (a, b) in spans]
    bad = (~torch.isfinite(torch.stack(ends)).all(1)).tolist() if ends else []
    names: list[Any] = [next((m.name for (m, _), b in zip(spans, bad, strict=True) if b), None)]
    if torch.distributed.is_initialized():
        own, names = names[0], [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(names, own)
    first = next(filter(None, names), None)
    if first:
        raise RuntimeRefusal(
            "A weight that FIRE is to project is not finite",
            given=f"NaN or infinity in {first}",
            allowed="finite weights; nothing was changed",
            hint="a checkpoint from before they appeared",
        )


def _totals(reports: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the number of matrices, and the mean of each quantity over them."""
    if not reports:
        return {}
    names = next(iter(reports.values()))
    means = {name: sum(v[name] for v in reports.values()) / len(reports) for name in names}
    return {"matrices": float(len(reports)), **means}

"""Periodic shrink: a rule that circulates under the name of DASH, and is another one.

DASH acts once, at a boundary, and shrinks vectors that point away from where the new data's
negative gradient would take them. This rule acts again and again while training goes on, uses
the gradient of a single step, and shrinks a little the vectors that agree with the positive
gradient, that is, those which the step makes shorter anyway.
"""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from megacpp_nemo.callbacks.factors import shrink_vectors
from megacpp_nemo.callbacks.gradients import cosines, last_gradient, with_biases
from megacpp_nemo.callbacks.journal import Action
from megacpp_nemo.callbacks.matrices import hybrid_models, matrices_of
from megacpp_nemo.callbacks.optimizers import OptimizerStates
from megacpp_nemo.contract.plasticity import ShrinkLever


def shrink(trainer: Any, lever: ShrinkLever, *, cause: str = "step") -> Action:
    """Shrink the selected vectors by how far they agree with the last step's gradient.

    Moments are kept. Collective over all ranks, in `on_train_batch_end`, where the gradient of
    the step is still there.

    Args:
        trainer: Lightning's trainer, right after a step.
        lever: What to do.
        cause: Why, for the journal.

    Returns:
        What was done to the matrices this rank speaks for.

    Raises:
        RuntimeRefusal: On every rank and before anything is written, if a weight or gradient is
            not finite.
    """
    began = time.perf_counter()
    models = hybrid_models(trainer.strategy.megatron_parallel)
    states = OptimizerStates(trainer.optimizers)
    matrices = with_biases(models, matrices_of(models, lever.selection))
    factors = [shrink_factors(each, lever) for each in cosines(matrices, last_gradient, states)]
    reports, changed = shrink_vectors(trainer.strategy, matrices, factors, states)
    return Action(
        lever="shrink",
        step=trainer.global_step,
        cause=cause,
        matrices=reports,
        seconds=time.perf_counter() - began,
        bytes=changed,
    )


def shrink_factors(cosine: Tensor, lever: ShrinkLever) -> Tensor:
    """Return `clamp(1 - rate * max(cos - threshold, 0), floor, 1)` of each vector, `[vectors]`.

    Args:
        cosine: With the positive gradient; NaN stays NaN.
        lever: The rule's numbers.
    """
    excess = (cosine - lever.threshold).clamp(min=0)
    return (1 - lever.rate * excess).clamp(lever.floor, 1)

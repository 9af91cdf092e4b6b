"""DASH, direction-aware shrinking (arXiv 2410.23495): the rule of the paper.

Before training on new data, each weight vector is shrunk by how far it points from where that
data's gradient would take it: noise memorised from the old data shrinks, what the new data keeps
does not. `shrink` has another rule that circulates under this name.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from megacpp_nemo.callbacks.factors import shrink_vectors
from megacpp_nemo.callbacks.gradients import cosines, last_gradient, with_biases
from megacpp_nemo.callbacks.journal import Action
from megacpp_nemo.callbacks.matrices import Matrix, hybrid_models, matrices_of
from megacpp_nemo.callbacks.optimizers import OptimizerStates
from megacpp_nemo.callbacks.rehearsal import backward, undisturbed, upcoming
from megacpp_nemo.contract.plasticity import DashLever


def dash(trainer: Any, lever: DashLever, *, cause: str = "step") -> Action:
    """Shrink the selected vectors by their cosine with the averaged negative gradient.

    The gradients are of the batches that the run trains on next, and of its loss with the
    routers' auxiliary losses but not STP's. No step is taken, moments are kept, and but for the
    weights the run goes on as if nothing had happened. Collective over all ranks, between two
    steps or before the first.

    Args:
        trainer: Lightning's trainer, with the model, the optimizer and the data set up.
        lever: What to do.
        cause: Why, for the journal.

    Returns:
        What was done to the matrices this rank speaks for.

    Raises:
        RuntimeRefusal: On every rank and before anything is written, if a weight or gradient is
            not finite, or there is not enough data.
    """
    began = time.perf_counter()
    models = hybrid_models(trainer.strategy.megatron_parallel)
    states = OptimizerStates(trainer.optimizers)
    matrices = with_biases(models, matrices_of(models, lever.selection))
    averages = averaged_descent(trainer, lever, matrices, states)
    found = cosines(matrices, lambda parameter, owned: averages[parameter], states)
    factors = [each.clamp(lever.floor, 1) for each in found]
    reports, changed = shrink_vectors(trainer.strategy, matrices, factors, states)
    return Action(
        lever="dash",
        step=trainer.global_step,
        cause=cause,
        matrices=reports,
        seconds=time.perf_counter() - began,
        bytes=changed,
    )


@torch.no_grad()
def averaged_descent(
    trainer: Any, lever: DashLever, matrices: list[Matrix], states: OptimizerStates
) -> dict[nn.Parameter, Tensor]:
    """Return the moving average of the negative gradient, from zero, over coming batches.

    Returns:
        What this rank owns of it, `[end - begin]` in fp32, by parameter.
    """
    averages = {}
    for matrix in matrices:
        owned = states.owned(matrix.weight)
        averages[matrix.weight] = owned.master.new_zeros(
            owned.end - owned.begin, dtype=torch.float32
        )
    data = upcoming(trainer, lever.batches)
    with undisturbed(trainer):
        for _ in range(lever.batches):
            backward(trainer, data)
            for parameter, average in averages.items():
                gradient = last_gradient(parameter, states.owned(parameter))
                average.mul_(1 - lever.averaging).sub_(gradient, alpha=lever.averaging)
    return averages

"""Small training runs in which something acts on the weights between two steps."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.processes import in_processes
from tests.support.training import configure, make_recorder, small_recipe

# Megatron cuts its buffers at multiples of 64, which are within rows of 40.
SMALL: dict[str, Any] = {
    "depth": 4,
    "pattern": "AEMR",
    "model.experts.ffn_hidden_size": 40,
    "model.experts.shared_expert_size": 40,
}
TWO = {"devices_per_node": 2}
DISTRIBUTED = {**TWO, "use_distributed_optimizer": True}
OVERLAPPED = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}


def configured(
    sources: Path,
    folder: Path,
    *,
    steps: int = 4,
    save_interval: int | None = None,
    **changes: Any,
) -> Any:
    """Return the configuration of a run of four layers; gradients in several buckets.

    It writes no checkpoint unless it is told after how many steps.
    """
    intent = small_recipe(**{**SMALL, **changes})
    partial = configure(intent, sources, folder, steps=steps, save_interval=save_interval)
    partial.trainer.strategy.ddp.bucket_size = 6_000
    return partial


def train_with(partial: Any, *callbacks: Any) -> dict[str, list[float]]:
    """Run a configuration with callbacks added, and return its losses and gradient norms."""
    import fiddle as fdl

    recorder = make_recorder()
    run = fdl.build(partial)
    run.keywords["trainer"].callbacks.extend([*callbacks, recorder])
    run()
    values: dict[str, list[float]] = recorder.values
    return values


def on_ranks(function: Callable[..., Any], *args: Any, ranks: int = 1) -> list[Any]:
    """Return what a function returns on each forked rank; it may hold tensors.

    Sent as they are, tensors are shared memory, which ends with the rank that made it.
    """
    results = in_processes(lambda: pickle.dumps(function(*args)), ranks=ranks)
    return [pickle.loads(result) for result in results]


def at_step(step: int | Sequence[int], act: Callable[[Any], None]) -> Any:
    """Return a callback that calls `act(trainer)` after so many steps; 0 is before the first."""
    steps = [step] if isinstance(step, int) else step
    import lightning.pytorch as pl

    class AtStep(pl.Callback):
        def on_train_start(self, trainer: Any, *args: Any) -> None:
            if 0 in steps:
                act(trainer)

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step in steps:
                act(trainer)

    return AtStep()


def named_parameters(trainer: Any) -> dict[str, nn.Parameter]:
    """Return the trained parameters of this rank's stage by Megatron's names."""
    from megacpp_nemo.callbacks.matrices import hybrid_models

    (model,) = hybrid_models(trainer.strategy.megatron_parallel)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def shares(trainer: Any) -> dict[str, tuple[int | None, Tensor]]:
    """Return this rank's share of every logical matrix and bias, and how it is split, by name."""
    from megacpp_nemo.callbacks.gradients import with_biases
    from megacpp_nemo.callbacks.matrices import hybrid_models, matrices_of
    from megacpp_nemo.contract.parameters import Selection

    models = hybrid_models(trainer.strategy.megatron_parallel)
    matrices = with_biases(models, matrices_of(models, Selection()))
    # A bias is a matrix of one row.
    return {m.name: (m.split, _share(m)) for m in matrices}


def _share(matrix: Any) -> Tensor:
    rows = [matrix.weight.detach()[begin:end] for begin, end in matrix.part.rows]
    share = torch.cat(rows) if rows else matrix.weight.detach()[:0]
    return share.float().view(1, -1) if share.dim() == 1 else share.float()


def whole(of_ranks: list[dict[str, tuple[int | None, Tensor]]]) -> dict[str, Tensor]:
    """Return whole matrices by name from the shares of ranks that differ in one parallel way."""
    held: dict[str, list[tuple[int | None, Tensor]]] = {}
    for of_rank in of_ranks:
        for name, share in of_rank.items():
            held.setdefault(name, []).append(share)
    joined = {}
    for name, parts in held.items():
        split, tensors = parts[0][0], [tensor for _, tensor in parts]
        if split is None:
            assert all(torch.equal(tensors[0], other) for other in tensors), f"copies of {name}"
        joined[name] = tensors[0] if split is None else torch.cat(tensors, split)
    return joined

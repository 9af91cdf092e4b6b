"""Passes over training data between two steps of a run, which must not notice them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megacpp_nemo.contract.errors import RuntimeRefusal
from tests.callbacks.runs import (
    OVERLAPPED,
    TWO,
    at_step,
    configured,
    named_parameters,
    on_ranks,
    train_with,
)

TRACELESS: dict[str, dict[str, Any]] = {
    "alone": {},
    "dp2_overlapped_bf16": {**OVERLAPPED, "micro_batch_size": 1, "precision": "bf16"},
    "pp2": {**TWO, "pipeline_model_parallel_size": 2, "micro_batch_size": 1},
    "tp2": {**TWO, "tensor_model_parallel_size": 2, "sequence_parallel": True},
}


def observed(sources: Path, folder: Path, changes: dict[str, Any], steps: tuple[int, ...]) -> Any:
    """Return all that is known of a run in which DASH with a floor of 1 acts at some steps."""
    import lightning.pytorch as pl
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.transformer.moe import moe_utils

    from megacpp_nemo.callbacks.dash import dash
    from megacpp_nemo.callbacks.matrices import hybrid_models
    from megacpp_nemo.contract.plasticity import DashLever

    class Observer(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []
            self.tokens: list[Tensor] = []

        def on_megatron_microbatch_start(self, step: Any, batch: Any) -> None:
            self.tokens.append(batch["document_ids"])

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            models = hybrid_models(trainer.strategy.megatron_parallel)
            losses = moe_utils.get_moe_layer_wise_logging_tracker()
            self.seen.append(
                {
                    "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
                    "buffers": {n: b.clone() for m in models for n, b in m.named_buffers()},
                    "weights": {
                        n: p.detach().clone() for n, p in named_parameters(trainer).items()
                    },
                    "random": torch.get_rng_state(),
                    "tracked": {
                        n: s.clone() for n, s in get_cuda_rng_tracker().get_states().items()
                    },
                    "auxiliary": {name: each["values"].clone() for name, each in losses.items()},
                    "step": trainer.global_step,
                }
            )

    def act(trainer: Any) -> None:
        action = dash(trainer, DashLever(batches=2, floor=1.0))
        assert action.bytes == 0
        assert all(
            p.grad is None and not p.main_grad.any() for p in named_parameters(trainer).values()
        )

    partial = configured(sources, folder, steps=4, **changes)
    partial.model.config.hidden_dropout = partial.model.config.attention_dropout = 0.1
    observer = Observer()
    losses = train_with(partial, observer, at_step(steps, act))
    return losses, observer.seen, observer.tokens


@pytest.mark.parametrize("layout", TRACELESS)
def test_dash_with_a_floor_of_one_leaves_no_trace(
    layout: str, sources: Path, tmp_path: Path
) -> None:
    changes = TRACELESS[layout]
    ranks = changes.get("devices_per_node", 1)
    plain, acted = (
        on_ranks(observed, sources, tmp_path / f"{len(steps)}", changes, steps, ranks=ranks)
        for steps in ((), (0, 2))
    )
    for one, other in zip(plain, acted, strict=True):
        assert same(one, other)
    losses, seen, _ = plain[0]
    assert len(set(losses["loss"])) == 4
    assert any(name.endswith("expert_bias") for name in seen[-1]["buffers"]) or ranks == 2


def same(one: Any, other: Any) -> bool:
    """Return whether two nested values are equal bit for bit."""
    if isinstance(one, dict):
        return set(one) == set(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_the_batches_are_those_the_run_trains_on_next(sources: Path, tmp_path: Path) -> None:
    import lightning.pytorch as pl

    from megacpp_nemo.callbacks.rehearsal import upcoming

    class Watcher(pl.Callback):
        def __init__(self) -> None:
            self.trained: list[Tensor] = []

        def on_megatron_microbatch_start(self, step: Any, batch: Any) -> None:
            self.trained.append(batch["tokens"])

    def run() -> Any:
        watcher, coming = Watcher(), []

        def act(trainer: Any) -> None:
            data = upcoming(trainer, 2)
            coming.extend(next(data)[0]["tokens"] for _ in range(8))
            with pytest.raises(RuntimeRefusal, match="batches=1000000"):
                upcoming(trainer, 1_000_000)
            # At the end of the data, its last batches.
            everything = trainer.train_dataloader.batch_sampler.total_samples // 4
            assert len(list(upcoming(trainer, everything))) == 4 * everything

        partial = configured(sources, tmp_path, steps=3, micro_batch_size=1)
        train_with(partial, watcher, at_step(1, act))
        return watcher.trained, coming

    trained, coming = on_ranks(run, ranks=1)[0]
    assert same(trained[4:], coming)

"""A recipe with sparse attention (DSA) trains, and says how its indexer and its experts fare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import in_process
from tests.support.training import configure, small_recipe, train

KL, LOSS = "dsa_indexer_kl/layer_5", "dsa_indexer_loss"


def test_the_indexers_loss_is_trained_and_logged(sources: Path, tmp_path: Path) -> None:
    def run() -> dict[str, Any]:
        import nemo_run
        from lightning.pytorch.loggers import TensorBoardLogger
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        # Weights large enough for heads that look at some keys more than at others.
        changes = {"sparse_attention.indexer_topk": 8, "sparse_attention.indexer_loss_coeff": 0.5}
        intent = small_recipe(sparse_attention=True, **changes, **{"model.init_std": 0.2})
        partial = configure(intent, sources, tmp_path, steps=4, save_interval=None)
        partial.log.tensorboard = nemo_run.Config(TensorBoardLogger, save_dir="tb", name="")
        losses = train(partial)["loss"]
        events = EventAccumulator(str(next(tmp_path.rglob("events.out.*")).parent)).Reload()
        curves = {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if tag.startswith(("dsa_", "experts/"))
        }
        return {"losses": losses, **curves}

    found = in_process(run)
    assert len(found["losses"]) == 4
    assert [step for step, _ in found[KL]] == [1, 2, 3, 4]
    values = [value for _, value in found[KL]]
    assert all(1e-3 < value < 3 for value in values)
    # Layer 5 is the only sparse one, A-rank 1.
    assert [v for _, v in found[LOSS]] == pytest.approx([0.5 * value for value in values])
    # So are the loads of the experts: busiest and idlest over the mean.
    for number in (2, 4, 6, 8, 10):
        most, least = (found[f"experts/layer_{number}/{name}"] for name in ("most", "least"))
        assert [step for step, _ in most] == [1, 2, 3, 4]
        assert all(low <= 1 <= high for (_, low), (_, high) in zip(least, most, strict=True))

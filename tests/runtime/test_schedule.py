"""The learning rate follows the recipe, not the trainer."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch


def rates(steps: int, *, max_steps: int | None = None, **settings: float) -> list[float]:
    from megacpp_nemo.host.schedule import CosineSchedule

    module = CosineSchedule(**settings)  # type: ignore[arg-type]
    if max_steps is not None:
        module.max_steps = max_steps  # what NeMo's strategy writes onto every schedule
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = module.scheduler(None, optimizer)["lr_scheduler"]["scheduler"]
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


@pytest.fixture(autouse=True)
def _imports(sources: Path) -> None:
    """NeMo is imported."""


def test_it_warms_up_linearly_and_falls_as_a_cosine() -> None:
    values = rates(60, warmup_steps=10, decay_steps=50, min_lr=0.1)
    assert all(later > earlier for earlier, later in itertools.pairwise(values[:10]))
    for step in (20, 30, 40):
        share = (step - 10) / (50 - 10)
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2
        assert values[step] == pytest.approx(expected, rel=1e-6)
    assert values[50:] == pytest.approx([0.1] * 10)


def test_the_trainers_length_changes_nothing() -> None:
    settings = {"warmup_steps": 5, "decay_steps": 40, "min_lr": 0.1}
    assert rates(20, max_steps=10, **settings) == rates(20, max_steps=20, **settings)

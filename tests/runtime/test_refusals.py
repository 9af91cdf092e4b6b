"""What would be silently wrong stops before the first step, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import RankError, in_process, in_processes
from tests.support.training import configure, small_recipe, train


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"precision": "fp8_experts"}, "FP8 without Transformer Engine"),
        ({"features.kernels": "required"}, "transformer-engine, mamba-ssm, causal-conv1d"),
    ],
)
def test_a_setting_nothing_carries_out_is_refused(
    changes: dict[str, Any], named: str, sources: Path, tmp_path: Path
) -> None:
    def run() -> None:
        train(configure(small_recipe(**changes), sources, tmp_path, steps=1))

    with pytest.raises(RankError, match=rf"(?s)RuntimeRefusal.*{named}.*allowed:.*try:"):
        in_process(run)


@pytest.mark.two_process
def test_expert_ranks_that_would_draw_the_same_experts_are_refused(
    sources: Path, tmp_path: Path
) -> None:
    def run() -> None:
        intent = small_recipe(devices_per_node=2, expert_model_parallel_size=2)
        partial = configure(intent, sources, tmp_path, steps=1)
        partial.model.config.use_cpu_initialization = True
        train(partial)

    with pytest.raises(RankError, match=r"(?s)RuntimeRefusal.*draws the same experts"):
        in_processes(run, ranks=2)


@pytest.mark.two_process
def test_tensor_parallel_experts_without_sequence_parallelism_are_refused(
    sources: Path, tmp_path: Path
) -> None:
    def run() -> None:
        intent = small_recipe(
            devices_per_node=2, tensor_model_parallel_size=2, sequence_parallel=True
        )
        partial = configure(intent, sources, tmp_path, steps=1)
        partial.model.config.sequence_parallel = False
        partial.trainer.strategy.sequence_parallel = False
        train(partial)

    with pytest.raises(RankError, match=r"(?s)RecipeError.*needs sequence parallelism"):
        in_processes(run, ranks=2)

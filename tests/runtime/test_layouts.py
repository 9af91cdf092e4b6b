"""The same checkpoint trains alike however it is laid over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import RankError, in_process, in_processes
from tests.support.training import configure, small_recipe, train

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_sequence_parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2_uneven_recomputed": {
        "pipeline_model_parallel_size": 2,
        "pattern": "AEMEA|EMEAEMR",
        "recompute": "full",
    },
    "ep2": {"expert_model_parallel_size": 2},
    "dp2": {},
    "dp2_distributed_optimizer": {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
}
STEPS = 3


def continue_from(
    checkpoint: Path, sources: Path, folder: Path, **changes: Any
) -> dict[str, list[float]]:
    """Train three steps from a checkpoint's weights, with a new optimizer."""
    import nemo_run as run
    from nemo.lightning import RestoreConfig

    partial = configure(small_recipe(**changes), sources, folder, steps=STEPS)
    partial.resume.restore_config = run.Config(RestoreConfig, path=str(checkpoint))
    return train(partial)


@pytest.fixture(scope="module")
def single(checkpoint: Path, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("single")
    return in_process(continue_from, checkpoint, sources, folder)


def test_a_single_process_continues_from_the_checkpoints_loss(single: Any) -> None:
    # A fresh model of 512 tokens starts at ln 512 = 6.24.
    assert len(single["loss"]) == STEPS
    assert single["loss"][0] < 6.2


@pytest.mark.two_process
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_give_the_single_processs_losses(
    layout: str, single: Any, checkpoint: Path, sources: Path, tmp_path: Path
) -> None:
    def run() -> dict[str, list[float]]:
        return continue_from(checkpoint, sources, tmp_path, devices_per_node=2, **LAYOUTS[layout])

    for values in in_processes(run, ranks=2):
        assert values["loss"] == pytest.approx(single["loss"], rel=1e-5)
        assert values["grad_norm"][0] == pytest.approx(single["grad_norm"][0], rel=1e-5)


@pytest.mark.two_process
def test_a_checkpoint_written_by_two_tensor_ranks_resumes_on_one_process(
    sources: Path, tmp_path: Path
) -> None:
    def train_two() -> dict[str, list[float]]:
        partial = configure(
            small_recipe(devices_per_node=2, **LAYOUTS["tp2_sequence_parallel"]),
            sources,
            tmp_path / "two",
            steps=4,
            save_interval=2,
        )
        return train(partial)

    def train_one() -> dict[str, list[float]]:
        partial = configure(small_recipe(), sources, tmp_path / "one", steps=4)
        partial.resume.resume_from_path = str(tmp_path / "two" / "checkpoints" / "step=2")
        return train(partial)

    unbroken = in_processes(train_two, ranks=2)[0]
    resumed = in_process(train_one)
    assert resumed["loss"] == pytest.approx(unbroken["loss"][2:], rel=1e-4)


@pytest.mark.two_process
def test_an_optimizer_of_another_expert_layout_is_refused_by_name(
    checkpoint: Path, sources: Path, tmp_path: Path
) -> None:
    def run() -> None:
        partial = configure(
            small_recipe(devices_per_node=2, **LAYOUTS["ep2"]), sources, tmp_path, steps=4
        )
        partial.resume.resume_from_path = str(checkpoint)
        train(partial)

    with pytest.raises(RankError, match=r"(?s)RuntimeRefusal.*expert_model_parallel_size"):
        in_processes(run, ranks=2)


def test_bf16_mixed_precision_learns(sources: Path, tmp_path: Path) -> None:
    def run() -> dict[str, list[float]]:
        intent = small_recipe(precision="bf16", pattern="AEMR", depth=4)
        return train(configure(intent, sources, tmp_path, steps=25, save_interval=None))

    losses = in_process(run)["loss"]
    assert losses[-1] < 0.85 * losses[0]


def test_the_seed_decides_the_initial_weights(sources: Path, tmp_path: Path) -> None:
    def first_loss(seed: int, run: str) -> float:
        partial = configure(small_recipe(), sources, tmp_path / run, steps=1, save_interval=None)
        partial.model.config.seed = seed
        return train(partial)["loss"][0]

    losses = [in_process(first_loss, seed, f"{i}") for i, seed in enumerate((1, 1, 2))]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]

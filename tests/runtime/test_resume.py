"""Stopping, being killed and resuming."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megacpp_nemo.contract import RuntimeRefusal
from tests.support.processes import RankError, in_process
from tests.support.training import configure, small_recipe, train


def run_steps(sources: Path, folder: Path, steps: int, **settings: Any) -> dict[str, list[float]]:
    """Train to a step, writing a checkpoint every five; resume what is in the folder."""
    intent = small_recipe(pattern="AEMR", depth=4, **settings)
    return train(configure(intent, sources, folder, steps=steps, save_interval=5))


@pytest.fixture(scope="module")
def unbroken(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The losses and gradient norms of a run of 20 steps."""
    return in_process(run_steps, sources, tmp_path_factory.mktemp("unbroken"), 20)


def test_ten_and_ten_steps_are_twenty_bit_for_bit(
    unbroken: Any, sources: Path, tmp_path: Path
) -> None:
    first = in_process(run_steps, sources, tmp_path / "stopped", 10)
    second = in_process(run_steps, sources, tmp_path / "stopped", 20)
    assert len(first["loss"]) == len(second["loss"]) == 10
    assert first["loss"] + second["loss"] == unbroken["loss"]
    assert first["grad_norm"] + second["grad_norm"] == unbroken["grad_norm"]


def test_a_completed_run_started_again_trains_no_step(sources: Path, tmp_path: Path) -> None:
    in_process(run_steps, sources, tmp_path, 5)
    again = in_process(run_steps, sources, tmp_path, 5)
    assert again["loss"] == []


def kill_during_save(sources: Path, folder: Path, *, at_step: int, moment: str) -> None:
    """Train, and kill this process in the middle of writing the checkpoint of `at_step`."""
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategy

    from megacpp_nemo.host import checkpoint

    target = checkpoint.LatestCheckpoints
    if moment == "weights":
        owner, name = torch_strategy.TorchDistSaveShardedStrategy, "async_save"
    else:
        owner, name = target, "remove_checkpoint_unfinished_marker"
    original = getattr(owner, name)

    def die(*args: Any, **kwargs: Any) -> Any:
        step = current["trainer"].global_step
        if step < at_step:
            return original(*args, **kwargs)
        if moment == "weights":
            folder_now = Path(args[2]) if len(args) > 2 else Path(kwargs["checkpoint_dir"])
            (folder_now / "half_written.distcp").write_bytes(b"\0" * 100)
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    current: dict[str, Any] = {}
    save = target._save_checkpoint

    def remember(self: Any, trainer: Any, filepath: str) -> None:
        current["trainer"] = trainer
        save(self, trainer, filepath)

    target._save_checkpoint = remember
    setattr(owner, name, die if moment == "weights" else staticmethod(die))
    run_steps(sources, folder, 15)


@pytest.mark.parametrize("moment", ["weights", "marker"])
@pytest.mark.parametrize("at_step", [5, 10])
def test_a_kill_during_a_save_loses_at_most_that_checkpoint(
    moment: str, at_step: int, unbroken: Any, sources: Path, tmp_path: Path
) -> None:
    with pytest.raises((RankError, EOFError)):
        in_process(
            lambda: kill_during_save(sources, tmp_path / "killed", at_step=at_step, moment=moment)
        )
    resumed = in_process(run_steps, sources, tmp_path / "killed", 15)
    before = at_step - 5
    assert len(resumed["loss"]) == 15 - before
    assert resumed["loss"] == unbroken["loss"][before:15]


def test_only_the_newest_checkpoints_are_kept(sources: Path, tmp_path: Path) -> None:
    in_process(run_steps, sources, tmp_path, 23)
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"step=15", "step=20", "step=23"}


def test_resuming_the_distributed_optimizer_on_a_cpu_is_refused(
    sources: Path, tmp_path: Path
) -> None:
    settings = {"use_distributed_optimizer": True}
    in_process(lambda: run_steps(sources, tmp_path, 5, **settings))
    with pytest.raises(RankError, match=r"(?s)RuntimeRefusal.*distributed optimizer"):
        in_process(lambda: run_steps(sources, tmp_path, 10, **settings))


def test_a_path_that_is_no_checkpoint_is_refused(sources: Path, tmp_path: Path) -> None:
    def run() -> None:
        partial = configure(small_recipe(), sources, tmp_path, steps=5)
        partial.resume.resume_from_path = str(tmp_path / "nothing")
        train(partial)

    with pytest.raises(RankError, match=r"RuntimeRefusal: There is no complete checkpoint"):
        in_process(run)


def test_a_wrong_optimizer_step_count_is_refused() -> None:
    from megacpp_nemo.host.preflight import check_optimizer_steps

    state = {0: {"step": 4}, 1: {"step": 3}}
    optimizer = SimpleNamespace(optimizer=SimpleNamespace(state=state))
    with pytest.raises(RuntimeRefusal, match="wrong step count"):
        check_optimizer_steps(optimizer, expected=4)
    state[1]["step"] = 4
    check_optimizer_steps(optimizer, expected=4)

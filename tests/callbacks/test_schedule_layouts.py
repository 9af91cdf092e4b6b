"""A schedule acts alike however the model is laid over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megacpp_nemo.contract.journal import read_journal
from megacpp_nemo.contract.plasticity import FireLever, Plasticity
from tests.runtime.test_layouts import LAYOUTS
from tests.support.processes import in_process, in_processes
from tests.support.training import configure, small_recipe, train

FIRE = Plasticity(fire=FireLever(boundaries=("data",)))
ONE_OF_EACH = ("tp2_sequence_parallel", "pp2", "ep2", "dp2_distributed_optimizer")


def fired(checkpoint: Path, sources: Path, folder: Path, **changes: Any) -> list[float]:
    """Train three steps from a checkpoint's weights after FIRE; return the losses."""
    import nemo_run as run
    from nemo.lightning import RestoreConfig

    from megacpp_nemo.callbacks.schedule import PlasticitySchedule

    callback = run.Config(PlasticitySchedule, plasticity=FIRE)
    intent = small_recipe(**changes)
    partial = configure(intent, sources, folder, steps=3, callbacks=[callback], save_interval=None)
    partial.resume.restore_config = run.Config(RestoreConfig, path=str(checkpoint))
    return train(partial)["loss"]


def action_of(folder: Path) -> dict[str, Any]:
    (action,) = [event for event in read_journal(folder) if event["event"] == "action"]
    assert (action["lever"], action["step"], action["cause"]) == ("fire", 0, "data")
    return action


@pytest.fixture(scope="module")
def alone(
    checkpoint: Path, sources: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone")
    losses = in_process(fired, checkpoint, sources, folder)
    return losses, action_of(folder)


@pytest.mark.two_process
@pytest.mark.parametrize("layout", ONE_OF_EACH)
def test_after_fire_two_processes_train_as_one_and_journal_the_same(
    layout: str, alone: Any, checkpoint: Path, sources: Path, tmp_path: Path
) -> None:
    def run() -> list[float]:
        return fired(checkpoint, sources, tmp_path, devices_per_node=2, **LAYOUTS[layout])

    losses, action = alone
    for values in in_processes(run, ranks=2):
        assert values == pytest.approx(losses, rel=1e-5)
    own = action_of(tmp_path)
    assert own["bytes"] == action["bytes"]
    assert own["matrices"].keys() == action["matrices"].keys()
    for name, values in own["matrices"].items():
        for quantity in ("dfi_before", "sfe"):
            assert values[quantity] == pytest.approx(action["matrices"][name][quantity], rel=1e-4)
        assert values["dfi_after"] <= 1e-6

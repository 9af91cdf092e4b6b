"""A real run, stopped and resumed: its folder says what it went through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megacpp_nemo.runs.curves import LOSS
from megacpp_nemo.runs.events import read_history
from megacpp_nemo.runs.folders import find_run
from megacpp_nemo.runs.summary import End, summary


@pytest.fixture(scope="module")
def trained(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Four steps, then a process that goes on to seven; the losses as the trainer had them."""
    from tests.support.processes import in_process

    folder = tmp_path_factory.mktemp("real") / "run"

    def part(steps: int) -> list[float]:
        import nemo_run as run
        from lightning.pytorch.loggers import TensorBoardLogger

        from tests.support.training import configure, small_recipe, train

        partial = configure(small_recipe(**{"mtp.num_layers": 1}), sources, folder, steps=steps)
        partial.log.tensorboard = run.Config(TensorBoardLogger, save_dir="tensorboard", name="")
        return train(partial)["loss"]

    return folder, in_process(part, 4) + in_process(part, 7)


def test_the_curve_is_what_the_trainer_had_at_each_step(trained):
    folder, losses = trained
    history = read_history(find_run(folder).events)
    assert [point.step for point in history.curves[LOSS]] == [1, 2, 3, 4, 5, 6, 7]
    assert [point.value for point in history.curves[LOSS]] == pytest.approx(losses)
    assert history.resumed == [4]
    assert [point.step for point in history.curves["experts/most"]] == [1, 2, 3, 4, 5, 6, 7]
    assert "mtp_1_loss" in history.curves


def test_the_card_is_of_the_process_that_went_on(trained):
    folder, _ = trained
    card = json.loads((folder / "run.json").read_text())
    assert (card["start_step"], card["max_steps"], card["processes"]) == (4, 7, 1)
    assert (card["seq_length"], card["global_batch_size"]) == (32, 4)
    run = find_run(folder / "checkpoints" / "step=7")
    about = summary(run, read_history(run.events))
    assert (about.end, about.step, about.checkpoint) == (End.FINISHED, 7, 7)
    assert about.recipe == "AEMEAEMEAEMR"
    assert about.tokens_per_second

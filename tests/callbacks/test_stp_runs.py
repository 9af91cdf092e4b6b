"""STP in real runs: off, measured and in force, over layouts and across a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megacpp_nemo.contract.plasticity import StpLever
from tests.support.processes import RankError, in_process, in_processes
from tests.support.training import configure, small_recipe, train

SEED = 7
MODEL = {"pattern": "AEMR", "depth": 4}
# A weight at which the loss is not small beside the main one.
LEVER = StpLever(weight=0.5, start_step=0, layers=(2, 4), spans=4)
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "pp2": {"pipeline_model_parallel_size": 2},
    "tp2_sequence_parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}


class Straighten:
    """What a run with the loss gave: its losses, gradient norms and values of STP."""

    def __init__(self, sources: Path, folder: Path) -> None:
        self.sources, self.folder, self.runs = sources, folder, 0

    def __call__(
        self, lever: StpLever | None = LEVER, *, steps: int = 4, ranks: int = 1, **changes: Any
    ) -> list[dict[str, list[float]]]:
        """Run on `ranks` processes and return the values of each."""
        self.runs += 1
        folder = self.folder / str(self.runs)
        return in_processes(self._run, lever, steps, folder, changes, ranks=ranks)

    def _run(self, lever: StpLever | None, steps: int, folder: Path, changes: Any) -> Any:
        restored, resumed = changes.pop("start", None), changes.pop("resume", None)
        saved, settings = changes.pop("save_interval", None), changes.pop("settings", {})
        callback = make_callback(lever)
        recipe = small_recipe(**{**MODEL, **changes})
        partial = configure(
            recipe,
            self.sources,
            folder,
            steps=steps,
            callbacks=[callback],
            save_interval=saved,
        )
        for name, value in settings.items():
            setattr(partial.model.config, name, value)
        if restored:
            import nemo_run as run
            from nemo.lightning import RestoreConfig

            partial.resume.restore_config = run.Config(RestoreConfig, path=str(restored))
        if resumed:
            partial.resume.resume_from_path = str(resumed)
        return {**train(partial), "stp": callback.values}


def make_callback(lever: StpLever | None) -> Any:
    """Return a callback that brackets every step, as that of the schedule does."""
    import lightning.pytorch as pl

    from megacpp_nemo.callbacks.matrices import hybrid_models
    from megacpp_nemo.callbacks.stp import SemanticTube

    class Callback(pl.Callback):
        def __init__(self) -> None:
            self.values: list[float | None] = []

        def on_train_start(self, trainer: Any, *_: Any) -> None:
            models = hybrid_models(trainer.strategy.megatron_parallel)
            self.tube = SemanticTube(models, lever, SEED) if lever else None

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if self.tube:
                self.tube.begin_step(trainer.global_step)

        def on_train_batch_end(self, *_: Any) -> None:
            if self.tube:
                self.tube.end_step()
                self.values.append(self.tube.value)

    return Callback()


@pytest.fixture(scope="module")
def straighten(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Straighten:
    return Straighten(sources, tmp_path_factory.mktemp("stp"))


@pytest.fixture(scope="module")
def checkpoint(straighten: Straighten) -> Path:
    """A checkpoint of two steps without STP."""
    straighten(None, steps=2, save_interval=2)
    return straighten.folder / str(straighten.runs) / "checkpoints" / "step=2"


@pytest.fixture(scope="module")
def plain(straighten: Straighten) -> dict[str, list[float]]:
    return straighten(None)[0]


@pytest.fixture(scope="module")
def single(straighten: Straighten, checkpoint: Path) -> dict[str, list[float]]:
    return straighten(start=checkpoint)[0]


def test_measuring_leaves_the_run_bit_for_bit_as_it_was(straighten, plain):
    (measured,) = straighten(StpLever(measure=True, layers=(2, 4)))
    assert measured["loss"] == plain["loss"]
    assert measured["grad_norm"] == plain["grad_norm"]
    assert all(0 < value < 2 for value in measured["stp"])


def test_the_loss_is_off_before_its_first_step_and_on_from_there(straighten, plain):
    (gated,) = straighten(StpLever(weight=0.5, start_step=2))
    assert gated["loss"][:3] == plain["loss"][:3]  # that of step 2 is before its update
    assert gated["grad_norm"][:2] == plain["grad_norm"][:2]
    assert gated["loss"][3] != plain["loss"][3]
    assert gated["stp"][:2] == [None, None]
    assert all(gated["stp"][2:])


@pytest.mark.two_process
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_give_the_single_processs_run(straighten, single, checkpoint, layout):
    found = straighten(start=checkpoint, ranks=2, devices_per_node=2, **LAYOUTS[layout])
    for values in found:
        assert values["loss"] == pytest.approx(single["loss"], rel=1e-5)
        assert values["grad_norm"][0] == pytest.approx(single["grad_norm"][0], rel=1e-5)
        assert values["stp"][0] == pytest.approx(single["stp"][0], rel=1e-5)


@pytest.mark.two_process
@pytest.mark.parametrize("granularity", [None, "full"], ids=["kept", "recomputed"])
def test_a_stage_may_free_and_recompute_the_output_that_it_straightens(
    straighten, single, checkpoint, granularity
):
    # The first stage runs both micro-batches forward before it recomputes the first.
    settings = {"deallocate_pipeline_outputs": True, "recompute_granularity": granularity}
    changes = {"settings": settings, **LAYOUTS["pp2"]}
    for values in straighten(start=checkpoint, ranks=2, devices_per_node=2, **changes):
        assert values["loss"] == pytest.approx(single["loss"], rel=1e-5)
        assert values["stp"][0] == pytest.approx(single["stp"][0], rel=1e-5)


def test_the_scale_does_not_depend_on_the_number_of_micro_batches(straighten, single, checkpoint):
    # Load balancing is the one loss that depends on which rows are together.
    alone = {"model.experts.aux_loss_coeff": 0.0, "start": checkpoint}
    one, four = (straighten(micro_batch_size=size, **alone)[0] for size in (4, 1))
    assert four["stp"][0] == pytest.approx(one["stp"][0], rel=1e-5)
    assert four["grad_norm"][0] == pytest.approx(one["grad_norm"][0], rel=1e-5)
    assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_a_resumed_run_draws_the_same_positions(straighten):
    (unbroken,) = straighten(save_interval=2)
    checkpoint = straighten.folder / str(straighten.runs) / "checkpoints" / "step=2"
    (resumed,) = straighten(resume=checkpoint, save_interval=4)
    assert resumed["loss"] == unbroken["loss"][2:]
    assert resumed["stp"] == unbroken["stp"][2:]


def test_bf16_measures_what_fp32_does_at_the_first_step(straighten, single, checkpoint):
    (low,) = straighten(start=checkpoint, precision="bf16")
    assert low["stp"][0] == pytest.approx(single["stp"][0], rel=2e-2)
    assert low["loss"] == pytest.approx(single["loss"], rel=2e-2)


def test_states_become_straighter_under_the_loss(straighten):
    weights = (0.0, 0.5)
    runs = [
        straighten(StpLever(weight=weight, start_step=0, measure=True), steps=30)[0]
        for weight in weights
    ]
    without, with_loss = (1 - sum(run["stp"][-10:]) / 10 for run in runs)
    assert with_loss > without + 0.1


def test_a_run_whose_collector_is_off_the_path_stops(straighten):
    def run() -> None:
        callback = make_callback(LEVER)
        begin = callback.on_train_batch_start

        def without_hooks(trainer: Any, *rest: Any) -> None:
            callback.tube.close()
            begin(trainer, *rest)

        callback.on_train_batch_start = without_hooks
        recipe, folder = small_recipe(**MODEL), straighten.folder / "off"
        train(configure(recipe, straighten.sources, folder, steps=2, callbacks=[callback]))

    with pytest.raises(RankError, match=r"(?s)RuntimeRefusal.*layer 2: 0 forward passes"):
        in_process(run)

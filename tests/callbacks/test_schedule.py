"""The schedule of a run: what acts when, what is kept of it, and what happens when it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megacpp_nemo.contract.journal import read_journal
from megacpp_nemo.contract.plasticity import (
    DashLever,
    FireLever,
    Plasticity,
    RedoLever,
    ShrinkLever,
    StpLever,
)
from tests.support.processes import RankError, in_process, in_processes
from tests.support.training import configure, small_recipe, train, write_sources

EVERYTHING = Plasticity(
    fire=FireLever(steps=(4, 12), target="attention"),
    dash=DashLever(steps=(6,), batches=2, target="mamba"),
    shrink=ShrinkLever(interval=5, target="experts"),
    redo=RedoLever(steps=(8, 14), report_interval=4, threshold=0.5, decay=0.5),
    stp=StpLever(weight=0.05, start_step=3, layers=(3, 4)),
)
MODEL = {"pattern": "AEMR", "depth": 4}


def scheduled(
    sources: Path, folder: Path, steps: int, plasticity: Plasticity, **changes: Any
) -> dict[str, list[float]]:
    """Train to a step with levers, writing a checkpoint every five; resume what is there."""
    import nemo_run as run

    from megacpp_nemo.callbacks.schedule import PlasticitySchedule

    callback = run.Config(PlasticitySchedule, plasticity=plasticity)
    intent = small_recipe(**MODEL, **changes)
    return train(
        configure(intent, sources, folder, steps=steps, callbacks=[callback], save_interval=5)
    )


def actions_of(folder: Path) -> list[tuple[int, str, str]]:
    return [
        (event["step"], event["lever"], event["cause"])
        for event in read_journal(folder)
        if event["event"] in ("action", "report")
    ]


@pytest.fixture(scope="module")
def whole(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of 20 steps with every lever on, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, in_process(scheduled, sources, folder, 20, EVERYTHING)


def test_every_lever_acts_when_it_is_told_to_and_is_journalled(whole: tuple[Path, Any]) -> None:
    assert actions_of(whole[0]) == [
        (4, "fire", "step"),
        (4, "redo", "report"),
        (5, "shrink", "step"),
        (6, "dash", "step"),
        (8, "redo", "step"),
        (8, "redo", "report"),
        (10, "shrink", "step"),
        (12, "fire", "step"),
        (12, "redo", "report"),
        (14, "redo", "step"),
        (15, "shrink", "step"),
        (16, "redo", "report"),
        (20, "shrink", "step"),
        (20, "redo", "report"),
    ]


def test_the_journal_says_what_came_of_an_action(whole: tuple[Path, Any]) -> None:
    events = read_journal(whole[0])
    first = next(event for event in events if event.get("lever") == "fire")
    assert first["seconds"] > 0
    assert first["bytes"] > 0
    # One attention layer: four parameters of two to one matrices, seven in all.
    assert first["totals"]["matrices"] == len(first["matrices"]) == 7
    for name, values in first["matrices"].items():
        assert ".self_attention." in name
        assert values["dfi_after"] < 1e-4 < values["dfi_before"]
    curves = [event for event in events if event["event"] == "curves"]
    assert [event["step"] for event in curves] == list(range(1, 21))
    assert [("stp_loss" in event["values"]) for event in curves] == [False] * 3 + [True] * 17


def test_an_action_is_in_tensorboard_at_its_step(sources: Path, tmp_path: Path) -> None:
    def run() -> dict[str, list[tuple[int, float]]]:
        import nemo_run
        from lightning.pytorch.loggers import TensorBoardLogger
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        from megacpp_nemo.callbacks.schedule import PlasticitySchedule

        levers = Plasticity(fire=FireLever(steps=(2,)), stp=StpLever(weight=0.1, start_step=0))
        callback = nemo_run.Config(PlasticitySchedule, plasticity=levers)
        intent = small_recipe(**MODEL)
        partial = configure(intent, sources, tmp_path, steps=4, callbacks=[callback])
        partial.log.tensorboard = nemo_run.Config(TensorBoardLogger, save_dir="tb", name="")
        partial.trainer.log_every_n_steps = 3
        train(partial)
        (events,) = tmp_path.rglob("events.out.tfevents*")
        read = EventAccumulator(str(events))
        read.Reload()
        return {tag: [e.step for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}

    steps = in_process(run)
    assert steps["fire/dfi_after"] == [2]
    assert steps["stp_loss"] == [3]


def test_a_run_resumed_in_the_middle_of_a_schedule_is_the_uninterrupted_one_bit_for_bit(
    whole: tuple[Path, Any], sources: Path, tmp_path: Path
) -> None:
    first = in_process(scheduled, sources, tmp_path, 10, EVERYTHING)
    second = in_process(scheduled, sources, tmp_path, 20, EVERYTHING)
    assert first["loss"] + second["loss"] == whole[1]["loss"]
    assert first["grad_norm"] + second["grad_norm"] == whole[1]["grad_norm"]
    assert actions_of(tmp_path) == actions_of(whole[0])


def test_an_action_cut_short_leaves_the_checkpoint_before_it_to_return_to(
    whole: tuple[Path, Any], sources: Path, tmp_path: Path
) -> None:
    def cut() -> None:
        from megacpp_nemo.callbacks import matrices, schedule

        write, fire = matrices.Matrix.write, schedule.fire
        written = []

        def half(self: Any, values: Any) -> None:
            if len(written) == 5:
                raise KeyboardInterrupt
            written.append(self.name)
            write(self, values)

        def interrupted(*args: Any, step: int, **more: Any) -> Any:
            if step == 12:
                matrices.Matrix.write = half
            return fire(*args, step=step, **more)

        schedule.fire = interrupted
        scheduled(sources, tmp_path, 20, EVERYTHING)

    with pytest.raises((RankError, EOFError)):
        in_process(cut)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step=10", "step=5"]
    resumed = in_process(scheduled, sources, tmp_path, 20, EVERYTHING)
    assert resumed["loss"] == whole[1]["loss"][10:]
    assert actions_of(tmp_path) == actions_of(whole[0])


def test_a_schedule_without_levers_changes_no_loss(sources: Path, tmp_path: Path) -> None:
    plain = in_process(
        lambda: train(configure(small_recipe(**MODEL), sources, tmp_path / "plain", steps=4))
    )
    with_none = in_process(scheduled, sources, tmp_path / "none", 4, Plasticity())
    assert plain == with_none


@pytest.mark.two_process
@pytest.mark.parametrize("layout", [{"pipeline_model_parallel_size": 2}, {}], ids=["pp2", "dp2"])
def test_all_levers_together_train_alike_on_two_processes(
    layout: dict[str, Any], whole: tuple[Path, Any], sources: Path, tmp_path: Path
) -> None:
    def run() -> dict[str, list[float]]:
        return scheduled(sources, tmp_path, 9, EVERYTHING, devices_per_node=2, **layout)

    for values in in_processes(run, ranks=2):
        # Single and two processes draw other initial weights: what is compared is the schedule.
        assert len(values["loss"]) == 9
    assert actions_of(tmp_path) == [action for action in actions_of(whole[0]) if action[0] <= 9]


FIRE_AT_DATA = Plasticity(fire=FireLever(boundaries=("data",), target="attention"))


def test_fire_acts_when_a_run_resumes_on_other_data(sources: Path, tmp_path: Path) -> None:
    other = write_sources(tmp_path / "corpus" / "other", seed=1)
    folder = tmp_path / "run"
    in_process(scheduled, sources, folder, 5, FIRE_AT_DATA)
    in_process(scheduled, sources, folder, 10, FIRE_AT_DATA)
    assert actions_of(folder) == []
    in_process(scheduled, other, folder, 15, FIRE_AT_DATA)
    assert actions_of(folder) == [(10, "fire", "data")]
    in_process(scheduled, other, folder, 20, FIRE_AT_DATA)
    assert actions_of(folder) == [(10, "fire", "data")]


def test_fire_acts_on_queries_and_keys_when_rows_grow(sources: Path, tmp_path: Path) -> None:
    lever = Plasticity(fire=FireLever(boundaries=("context",), target="attention_qk"))
    in_process(scheduled, sources, tmp_path, 5, lever)
    in_process(lambda: scheduled(sources, tmp_path, 6, lever, seq_length=48))
    assert actions_of(tmp_path) == [(5, "fire", "context")]
    event = next(event for event in read_journal(tmp_path) if event["event"] == "action")
    ends = {name.rpartition("[")[2] for name in event["matrices"]}
    assert ends == {"q]", "k]", "k_rotary]"}


def test_fire_acts_when_a_run_starts_from_another_runs_weights(
    checkpoint: Path, sources: Path, tmp_path: Path
) -> None:
    def run() -> Any:
        import nemo_run
        from nemo.lightning import RestoreConfig

        from megacpp_nemo.callbacks.schedule import PlasticitySchedule

        callback = nemo_run.Config(PlasticitySchedule, plasticity=FIRE_AT_DATA)
        partial = configure(small_recipe(), sources, tmp_path, steps=1, callbacks=[callback])
        partial.resume.restore_config = nemo_run.Config(RestoreConfig, path=str(checkpoint))
        return train(partial)

    in_process(run)
    assert actions_of(tmp_path) == [(0, "fire", "data")]


def refused(sources: Path, folder: Path, plasticity: Plasticity, steps: int = 10) -> str:
    with pytest.raises(RankError) as caught:
        in_process(scheduled, sources, folder, steps, plasticity)
    return str(caught.value)


@pytest.fixture(scope="module")
def five_steps(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of five steps without levers."""
    folder = tmp_path_factory.mktemp("five")
    intent = small_recipe(**MODEL)
    in_process(lambda: train(configure(intent, sources, folder, steps=5, save_interval=5)))
    return folder


@pytest.mark.parametrize(
    ("plasticity", "words"),
    [
        (Plasticity(fire=FireLever(steps=(3, 8))), "already past"),
        (FIRE_AT_DATA, "cannot be told"),
        (Plasticity(fire=FireLever(steps=(8,), layers=(99,))), "layer is not on this model"),
        (
            Plasticity(fire=FireLever(steps=(8,), target="experts", families=("A",))),
            "Nothing in this model is selected",
        ),
        (Plasticity(stp=StpLever(weight=0.1, layers=(99,))), "99"),
    ],
    ids=["past", "unknown phase", "layer", "empty", "stp layer"],
)
def test_a_schedule_that_cannot_be_kept_is_refused_before_the_first_step(
    plasticity: Plasticity, words: str, five_steps: Path, sources: Path
) -> None:
    text = refused(sources, five_steps, plasticity)
    assert words in text
    assert not (five_steps / "checkpoints" / "step=10").exists()


def test_one_lever_in_two_schedules_is_refused(sources: Path, tmp_path: Path) -> None:
    def run() -> Any:
        import nemo_run

        from megacpp_nemo.callbacks.schedule import PlasticitySchedule

        callbacks = [
            nemo_run.Config(PlasticitySchedule, plasticity=Plasticity(fire=FireLever(steps=(n,))))
            for n in (2, 3)
        ]
        intent = small_recipe(**MODEL)
        return train(configure(intent, sources, tmp_path, steps=4, callbacks=callbacks))

    with pytest.raises(RankError, match="in two schedules"):
        in_process(run)


def test_nan_weights_are_refused_and_nothing_is_written(sources: Path, tmp_path: Path) -> None:
    def run() -> list[bool]:
        import lightning.pytorch as pl
        import nemo_run
        import torch

        from megacpp_nemo.callbacks.matrices import hybrid_models
        from megacpp_nemo.callbacks.schedule import PlasticitySchedule

        seen: dict[str, Any] = {}

        class Poison(pl.Callback):
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                model = hybrid_models(list(trainer.strategy.megatron_parallel))[0]
                if trainer.global_step == 2:
                    last = model.decoder.layers[-1].mixer.out_proj.weight
                    last.data[0, 0] = float("nan")
                    seen["model"] = model
                    seen["before"] = {n: p.clone() for n, p in model.named_parameters()}

        callback = nemo_run.Config(
            PlasticitySchedule, plasticity=Plasticity(fire=FireLever(steps=(2,)))
        )
        callbacks = [Poison(), callback]
        partial = configure(small_recipe(**MODEL), sources, tmp_path, steps=3, callbacks=callbacks)
        with pytest.raises(Exception, match="finite") as caught:
            train(partial)
        assert "out_proj" in str(caught.value)
        return [
            torch.equal(p, seen["before"][n]) or bool(p.isnan().any())
            for n, p in seen["model"].named_parameters()
        ]

    assert all(in_process(run))

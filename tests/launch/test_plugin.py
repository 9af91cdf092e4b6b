"""`LoweringPlugin`: a folder of files for each recipe of an experiment, whole or not at all."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from megacpp_nemo.contract import LoweringError, recipe
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.lowering.policy import LaunchOptions

NAMES = ["launch.env", "megatron.args", "seams.json", "seams.md"]


@pytest.fixture(scope="module", autouse=True)
def _imported_once() -> None:
    import megacpp_nemo.recipes  # noqa: F401


def folders(base: Path) -> list[str]:
    """Return every folder with files in it, below `base`."""
    return sorted(
        {str(path.parent.relative_to(base)) for path in base.rglob("*") if path.is_file()}
    )


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


@pytest.fixture
def experiment():
    import nemo_run as run

    with run.Experiment("exp", executor=run.LocalExecutor(), id="exp_1") as entered:
        yield entered


def test_a_task_gets_the_lowering_of_its_recipe(experiment, tmp_path):
    from megacpp_nemo.launch import LoweringPlugin
    from megacpp_nemo.recipes import nam56r

    options = LaunchOptions(cache_dir="/cache", environment={"A": "1"})
    task = nam56r(log_dir=str(tmp_path / "run"))
    task.data.num_workers = 3
    before = task.clone()
    experiment.add(
        task, name="train", plugins=[LoweringPlugin(release="0.19.0", launch=options)]
    )  # fmt: skip
    assert task == before
    told = files(tmp_path / "run" / "lowering" / "exp_1" / "train")
    assert list(told) == NAMES
    expected = lower(
        recipe("nam56r", changes={"name": "run", "files.run_dir": str(tmp_path / "run")}),
        release="0.19.0",
        launch=LaunchOptions(cache_dir="/cache", environment={"A": "1"}, data_workers=3),
    )
    assert told["megatron.args"].splitlines() == list(expected.command)
    assert json.loads(told["seams.json"])["argv"] == list(expected.argv)
    assert json.loads(told["seams.json"])["seams"] == expected.to_dict()["seams"]
    variables = told["launch.env"].splitlines()
    assert variables == sorted(variables)
    assert dict(line.split("=", 1) for line in variables) == expected.policy.environment
    assert all(seam.id in told["seams.md"] for seam in expected.seams)


def test_the_experiment_still_runs_dry_with_the_plugin(experiment, tmp_path, capsys):
    from megacpp_nemo.launch import LoweringPlugin
    from megacpp_nemo.recipes import nam52_tiny

    experiment.add(nam52_tiny(), name="train", plugins=[LoweringPlugin()])
    experiment.dryrun()
    assert "train" in capsys.readouterr().out
    assert folders(tmp_path / "runs") == ["nam52_tiny/lowering/exp_1/train"]


def test_several_tasks_of_one_name_have_a_folder_each(experiment, tmp_path):
    from megacpp_nemo.launch import LoweringPlugin
    from megacpp_nemo.recipes import nam52_tiny

    for steps in (7, 8, 9):
        task = nam52_tiny(train_steps=steps)
        experiment.add(task, name="train", plugins=[LoweringPlugin()])
    base = tmp_path / "runs" / "nam52_tiny" / "lowering" / "exp_1"
    assert folders(base) == ["train", "train_2", "train_3"]
    for steps, name in zip((7, 8, 9), folders(base), strict=True):
        given = (base / name / "megatron.args").read_text().splitlines()
        assert given[given.index("--train-iters") + 1] == str(steps)


def test_a_group_of_tasks_has_a_folder_each(experiment, tmp_path):
    import nemo_run as run

    from megacpp_nemo.launch import LoweringPlugin
    from megacpp_nemo.recipes import nam52_tiny, nam56r_tiny

    tasks = [nam52_tiny(), nam56r_tiny()]
    executors = [run.LocalExecutor(), run.LocalExecutor()]
    experiment.add(
        tasks, executor=executors, name="both", plugins=[LoweringPlugin(folder=str(tmp_path))]
    )
    assert folders(tmp_path / "exp_1") == ["both", "both_2"]
    names = [
        json.loads((tmp_path / "exp_1" / folder / "seams.json").read_text())["recipe"]
        for folder in ("both", "both_2")
    ]
    assert names == ["nam52_tiny", "nam56r_tiny"]


def refused(experiment, task, **options) -> LoweringError:
    from megacpp_nemo.launch import LoweringPlugin

    with pytest.raises(LoweringError) as caught:
        experiment.add(task, name="train", plugins=[LoweringPlugin(**options)])
    return caught.value


def test_a_refusal_stops_the_experiment_and_leaves_nothing(experiment, tmp_path):
    import nemo_run as run

    from megacpp_nemo.recipes import nam56r, nam56r_tiny

    task = nam56r_tiny()
    task.model.config.distribute_saved_activations = True
    assert "model.config.distribute_saved_activations" in str(refused(experiment, task))
    assert "seams are left" in refused(experiment, nam56r(), seams="native-only").what
    assert "Unknown way" in refused(experiment, nam56r(), seams="natively").what
    assert "No Megatron-LM release" in refused(experiment, nam56r(), release="0.1").what
    other = run.Partial(json.dumps, obj=1)
    assert refused(experiment, other).what == "This is not a recipe's configuration"
    assert not (tmp_path / "runs").exists()
    assert experiment.jobs == []


def test_a_line_break_in_an_argument_is_refused(experiment, tmp_path):
    from megacpp_nemo.recipes import nam56r

    task = nam56r(tokenizer_dir="/data/two\nlines")
    assert "line break" in refused(experiment, task).what
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_written_is_told(experiment, tmp_path):
    from megacpp_nemo.recipes import nam56r

    (tmp_path / "file").write_text("")
    error = refused(experiment, nam56r(), folder=str(tmp_path / "file" / "x"))
    assert "cannot be written" in error.what
    assert "folder=" in error.hint


@pytest.mark.parametrize("folder", [None, 3])
def test_a_folder_that_is_no_path_is_told(folder):
    from megacpp_nemo.launch import LoweringPlugin

    with pytest.raises(LoweringError, match="is a path"):
        LoweringPlugin(folder=folder)


def test_a_write_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    from megacpp_nemo.launch.files import write_folder

    written = Path.write_text

    def full(self: Path, text: str, **options: object) -> int:
        if self.name == "b":
            raise OSError(28, "No space left on device")
        return written(self, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(LoweringError, match="No space left"):
        write_folder(tmp_path / "folder", {"a": "1", "b": "2"})
    assert os.listdir(tmp_path) == []


def test_a_script_is_passed_over_and_the_log_says_so(experiment, tmp_path, caplog):
    import nemo_run as run

    from megacpp_nemo.launch import LoweringPlugin

    with caplog.at_level(logging.WARNING, logger="megacpp_nemo.launch.plugin"):
        experiment.add(run.Script(inline="echo data"), name="data", plugins=[LoweringPlugin()])
    assert "has no recipe" in caplog.text
    assert len(experiment.jobs) == 1
    assert not (tmp_path / "runs").exists()

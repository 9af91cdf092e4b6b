"""Which folders are runs, and what they say."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.runs.folders import find_run, find_runs, read_run
from megacpp_nemo.runs.summary import End, summarized
from tests.runs.writing import steps, write_card, write_events, write_run


def write_checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step={step}"
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "metadata.json").write_text("{}")
    (folder / "context").mkdir()
    return folder


def test_runs_are_found_wherever_they_lie(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "sweep" / "lr" / "b")
    write_checkpoint(tmp_path / "c", 4)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("no run")
    found = find_runs(tmp_path)
    assert [str(run.folder.relative_to(tmp_path)) for run in found] == ["a", "c", "sweep/lr/b"]
    assert [run.folder for run in find_runs(tmp_path / "a")] == [tmp_path / "a"]


def test_anything_in_a_run_means_the_run(tmp_path):
    run = write_run(tmp_path / "a")
    step = write_checkpoint(run, 10)
    events = next((run / "tensorboard").iterdir())
    for path in (run, run / "checkpoints", step, step / "weights", run / "tensorboard", events):
        assert find_run(path).folder == run


def test_a_run_is_named_by_its_command_or_by_its_shape(tmp_path):
    write_card(tmp_path)
    assert read_run(tmp_path).recipe == "nam56r_tiny"
    write_card(tmp_path, hidden_size=3584, num_layers=52, pattern="AEMEAEMEAEMM")
    assert read_run(tmp_path).recipe == "nam52"
    write_card(tmp_path, hidden_size=96)
    assert read_run(tmp_path).recipe == "AEMEAEMEAEMR"
    command = "/bin/nemo llm pretrain --factory nam56r_smoke(log_dir='x') trainer.max_steps=2"
    (tmp_path / "cmd-args.log").write_text(command)
    assert read_run(tmp_path).recipe == "nam56r_smoke"


def test_a_checkpoint_tells_what_a_run_without_a_card_is(tmp_path):
    context = write_checkpoint(tmp_path, 60) / "context"
    (context / "model.yaml").write_text(
        "config:\n  hidden_size: 128\n  hybrid_override_pattern: AEMEAEMEAEMR\n"
        "  moe_hidden_size: 1\n  num_layers: 12\n  seq_length: 256\n"
    )
    (context / "io.json").write_text('"value": 60, "paths": ["<root>.trainer.max_steps"]')
    run = read_run(tmp_path)
    assert (run.recipe, run.seq_length, run.max_steps, run.checkpoint) == (
        "nam56r_tiny",
        256,
        60,
        60,
    )
    assert summarized(run).end is End.FINISHED


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 99}', '{"schema": 1, "x": 2}', "[1]"])
def test_a_card_that_cannot_be_read_is_no_card(tmp_path, text):
    write_run(tmp_path)
    (tmp_path / "run.json").write_text(text)
    assert read_run(tmp_path).recipe == ""


@pytest.mark.parametrize(
    "wrong", [{"seq_length": 10**400}, {"seq_length": "256"}, {"pattern": 5}, {"max_steps": None}]
)
def test_a_card_with_a_value_of_no_run_is_no_card(tmp_path, wrong):
    write_run(tmp_path)
    write_card(tmp_path, **wrong)
    assert read_run(tmp_path).seq_length is None
    assert summarized(read_run(tmp_path)).tokens_per_second is None


def test_links_hide_no_run_and_list_none_twice(tmp_path):
    write_run(tmp_path / "a")
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "above").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to("a")
    assert [run.folder.name for run in find_runs(tmp_path)] == ["a"]


def test_whether_a_run_is_over_is_told_by_its_steps_and_by_when_it_wrote(tmp_path):
    now = time.time()
    write_run(tmp_path / "whole")
    assert summarized(read_run(tmp_path / "whole"), now).end is End.FINISHED
    write_run(tmp_path / "half", last=5)
    half = read_run(tmp_path / "half")
    written = summarized(half, now).written
    assert written is not None
    assert summarized(half, written + 60).end is End.RUNNING
    assert summarized(half, written + 600).end is End.STOPPED


def test_a_slow_run_is_given_more_time(tmp_path):
    write_card(tmp_path, max_steps=1000)
    slow = [(tag, step * 100, value) for tag, step, value in steps(1, 3)]
    write_events(tmp_path / "tensorboard", slow, began=1000.0)
    run = read_run(tmp_path)
    written = summarized(run).written
    assert written is not None
    assert summarized(run, written + 1500).end is End.RUNNING
    assert summarized(run, written + 2500).end is End.STOPPED


def test_a_damaged_run_is_listed_with_what_is_wrong(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1.x").write_bytes(b"damaged")
    about = summarized(read_run(tmp_path))
    assert (about.end, about.loss) == (End.UNREADABLE, None)
    assert "damaged from its beginning" in about.notes[0]


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        ((), "nothing", "There is no such run"),
        (("empty/",), "empty", "This folder is empty"),
        (("notes/text",), "notes", "This folder is no run"),
        (("step=4/weights/metadata.json",), "step=4", "This is a checkpoint without its run"),
        (("runs/a/tensorboard/events.out.tfevents.1.x",), "runs", "This folder holds runs"),
    ],
)
def test_what_is_no_run_is_refused_by_what_it_is(tmp_path, make, given, message):
    for name in make:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text("")
    with pytest.raises(DataError, match=message):
        find_run(tmp_path / given)


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(DataError, match="no runs in this folder"):
        find_runs(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        find_runs(tmp_path / "nowhere")

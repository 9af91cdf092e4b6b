"""What a run prints, and what it leaves in its folder."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megacpp_nemo.runs.events import read_history
from megacpp_nemo.runs.folders import find_run
from tests.support.processes import in_process
from tests.support.training import configure, small_recipe


@pytest.fixture(scope="module")
def printed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder, standard output and standard error of one run of seven steps."""
    folder = tmp_path_factory.mktemp("printed")

    def run() -> tuple[str, str]:
        import contextlib
        import io
        import os

        import fiddle as fdl
        import nemo_run as run
        from lightning.pytorch.loggers import TensorBoardLogger

        from megacpp_nemo.host.progress import RunProgress, RunSummary

        os.chdir(folder)
        partial = configure(small_recipe(), sources, folder / "run", steps=7)
        partial.trainer.limit_val_batches = partial.trainer.num_sanity_val_steps = 2
        partial.trainer.val_check_interval = 3
        partial.trainer.callbacks = [run.Config(RunProgress), run.Config(RunSummary)]
        partial.log.tensorboard = run.Config(TensorBoardLogger, save_dir="tensorboard", name="")
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            fdl.build(partial)()
        return out.getvalue(), err.getvalue()

    out, err = in_process(run)
    return folder / "run", out, err


def test_the_bar_shows_step_loss_and_rate(printed: tuple[Path, str, str]) -> None:
    _, out, err = printed
    bar = (out + err).replace("\r", "\n").splitlines()
    last = [line for line in bar if line.startswith("step") and "tokens/s" in line][-1]
    assert "7/7" in last
    assert "loss=" in last


def test_the_last_lines_give_the_validation_loss(printed: tuple[Path, str, str]) -> None:
    lines = printed[1].strip().splitlines()
    assert "at step 0" in lines[-5]
    assert "at step 7" in lines[-5]
    assert lines[-2].startswith("validation: ")
    assert lines[-2].endswith("nats per token")
    assert "bits per byte, on files never trained on" in lines[-1]


def test_bits_per_byte_are_nats_over_bytes_in_base_two() -> None:
    from megacpp_nemo.host.progress import RunSummary

    summary = RunSummary()
    summary.initial_loss, summary.final_loss, summary.final_step = 8.0, 3 * math.log(2), 9
    trainer: Any = SimpleNamespace(checkpoint_callback=None, logger=None)
    lines = summary.lines(trainer, bytes_per_token=3.0)
    assert lines[-1].startswith("validation: 1.0000 bits per byte")
    assert lines[-2] == f"validation: {3 * math.log(2):.4f} nats per token"
    assert "(-74.0%)" in lines[0]
    assert all("bits" not in line for line in summary.lines(trainer, bytes_per_token=None))


def test_the_run_leaves_checkpoints_and_tensorboard_logs(
    printed: tuple[Path, str, str],
) -> None:
    folder = printed[0]
    assert (folder / "checkpoints" / "step=7" / "weights" / "metadata.json").is_file()
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))


def test_every_validation_stands_at_the_steps_done_before_it(
    printed: tuple[Path, str, str],
) -> None:
    history = read_history(find_run(printed[0]).events)
    assert [point.step for point in history.curves["val_loss"]] == [3, 6, 7]


def test_the_log_file_says_what_the_layers_are_built_from(
    printed: tuple[Path, str, str],
) -> None:
    folder, _, err = printed
    text = "".join(path.read_text() for path in folder.glob("nemo_log_*.txt"))
    assert "portable Mamba mixer" in text
    assert "portable Mamba mixer" in err


def test_the_terminal_is_spared_upstreams_chatter(printed: tuple[Path, str, str]) -> None:
    _, out, err = printed
    assert "[NeMo I" not in (out + err).split("portable Mamba mixer")[-1]
    assert "CPU RNG state changed" not in out + err

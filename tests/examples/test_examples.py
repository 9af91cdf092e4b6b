"""Each example as a user starts it, only shorter."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megacpp_nemo.host.checkpoint_folder import is_complete
from tests.support.processes import in_process
from tests.support.training import write_sources

EXAMPLES = Path(__file__).parents[2] / "examples"
SHARED = "comparison.py"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != SHARED)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import megacpp_nemo.recipes  # noqa: F401 - the forked scripts share the import

    return write_sources(tmp_path_factory.mktemp("examples") / "sources", files=80)


@pytest.fixture(autouse=True)
def _private_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from nemo_run import config as nemo_run_home

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    before = nemo_run_home.get_nemorun_home()
    nemo_run_home.set_nemorun_home(str(tmp_path / "nemo_run"))
    yield
    nemo_run_home.set_nemorun_home(before)


LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


def script(name: str, *args: str) -> str:
    """Run an example as `python examples/NAME ARGS` does; return what it says on failing."""
    for variable in LAUNCHED:
        os.environ.pop(variable, None)
    sys.argv = [name, *args]
    sys.path.insert(0, str(EXAMPLES))  # as Python does for a script
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    except SystemExit as end:
        return str(end.code or "")
    return ""


def test_each_guards_its_start_and_is_short():
    assert [
        *("compose.py", "input_side.py", "own_sources.py", "two_processes.py", "warm_start.py")
    ] == SCRIPTS
    for name in SCRIPTS:
        text = (EXAMPLES / name).read_text()
        assert 'if __name__ == "__main__":' in text
        assert len(text.splitlines()) < 230


@pytest.mark.parametrize("name", ["compose.py", "two_processes.py"])
def test_a_dry_run_prints_the_task_and_writes_no_run(name, sources, tmp_path, capfd):
    assert in_process(script, name, "--dryrun") == ""
    assert "fdl_runner" in "".join(capfd.readouterr().out.split())
    assert not (tmp_path / "runs").exists()


def test_own_sources_trains_and_starting_again_resumes(sources, tmp_path, capfd):
    command = ("own_sources.py", str(sources), "--log-dir", "runs/mine", "--steps")
    assert in_process(script, *command, "1") == ""
    assert in_process(script, *command, "2") == ""
    assert is_complete(tmp_path / "runs" / "mine" / "checkpoints" / "step=2")
    out = capfd.readouterr().out
    assert "at step 1 " in out
    assert "at step 2 " in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("own_sources.py", "/no/such/folder"), "does not exist"),
        (("own_sources.py", "{sources}", "--steps", "0"), "train_steps cannot be 0"),
        (("compose.py", "--stages", "3"), "do not divide evenly"),
    ],
)
def test_wrong_arguments_end_in_four_parts_and_no_traceback(sources, args, said):
    message = in_process(script, *(arg.format(sources=sources) for arg in args))
    assert said in message
    assert message.count("\n") == 3


def test_compose_runs_through_an_executor(sources, tmp_path, capfd):
    assert in_process(script, "compose.py", "--steps", "2", "--sources", str(sources)) == ""
    assert is_complete(tmp_path / "runs" / "compose" / "checkpoints" / "step=2")
    assert "at step 2" in capfd.readouterr().out


def test_compose_says_that_its_run_failed_and_where_the_log_is(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # for the process it starts
    said = in_process(script, "compose.py")
    assert said.startswith("compose: the run failed; its log is in")
    log = Path(said.rpartition(" ")[2])
    assert log.is_dir()
    assert log.is_relative_to(tmp_path)


@pytest.mark.two_process
def test_two_processes_train_one_model(sources, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # without torchrun
    assert in_process(script, "two_processes.py", "--steps", "1") == ""
    weights = tmp_path / "runs" / "two_processes" / "checkpoints" / "step=1" / "weights"
    assert is_complete(weights)
    ranks = {path.name.split("_")[2] for path in weights.glob("__*.distcp")}
    assert ranks == {"0", "1"}
    assert "at step 1" in capfd.readouterr().out


def test_warm_start_goes_on_from_the_first_half_with_each_lever(sources, tmp_path):
    def made() -> Path:
        from megacpp_nemo.data.corpus import CorpusSpec, build_corpus

        return build_corpus(CorpusSpec(root=str(sources), vocab_size=2048)).tokenizer_dir

    folder = tmp_path / "warm"
    shutil.copytree(in_process(made), folder / "tokenizer")
    common = ("--folder", str(folder), "--steps", "4", "--corpus", str(sources))
    for arm in ("first", "fire", "shrink_perturb"):
        words = (*common, "--later", "file_1*", "--only", "1", arm)
        assert in_process(script, "warm_start.py", *words) == ""
        assert json.loads((folder / "seed_1" / arm / "curve.json").read_text())[-1][0] == 4
    journal = (folder / "seed_1" / "fire" / "plasticity" / "journal.jsonl").read_text()
    assert '"cause": "data"' in journal


def test_the_input_side_is_compared_arm_by_arm(sources, tmp_path, capfd):
    folder = tmp_path / "inputs"
    words = ("--folder", str(folder), "--seeds", "1", "--steps", "4", "--corpus", str(sources))
    for arm in ("none", "both"):
        assert in_process(script, "input_side.py", *words, "--only", "1", arm) == ""
    none, both = (
        json.loads((folder / "seed_1" / arm / "curve.json").read_text()) for arm in ("none", "both")
    )
    assert [step for step, _ in none] == [step for step, _ in both] == [0, 1, 2, 3, 4]
    # The features are there, and change nothing before they are trained.
    assert none[-1][1] != both[-1][1]
    assert none[0][1] == both[0][1]

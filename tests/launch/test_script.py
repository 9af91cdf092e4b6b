"""`to_script`: the lowered command reaches Megatron's entry script as it is, whoever starts it."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from megacpp_nemo.contract import HybridRecipe, LoweringError, recipe
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.lowering.policy import LaunchOptions

# A shell, a glob and a template each have something to take away from these.
ODD = 'a  b\' "$HOME" *;|'


def odd_recipe(**changes: object) -> HybridRecipe:
    fields = {
        "corpus": "indexed",
        "data_path": ("30", f"/data/{ODD}", "70", "/data/b"),
        "tokenizer_dir": "/data/my tokenizer",
        "devices_per_node": 2,
        "pipeline_model_parallel_size": 2,
        **changes,
    }
    return recipe("nam56r_tiny", changes=fields)


def words(script: str) -> list[str]:
    """Return the words of the script's last command, read as a shell reads them."""
    exports, _, command = script.partition("exec python ")
    assert all(line[:7] in ("# nam56", "set -eu", "export ") for line in exports.splitlines())
    return shlex.split(command.replace(" \\\n", " "))


@pytest.mark.parametrize("release", ["0.16.1", "0.17.1", "0.18.2"])
def test_the_script_is_the_lowered_command_and_the_policys_environment(release, megatron):
    from megacpp_nemo.launch import to_script

    root = megatron(release)
    options = LaunchOptions(data_workers=2, environment={"ODD": ODD})
    script = to_script(odd_recipe(), root, release=release, launch=options)
    lowering = lower(odd_recipe(), release=release, launch=options)
    assert words(script.inline) == [
        str(root / lowering.policy.entry_script), *lowering.command
    ]  # fmt: skip
    assert (script.args, script.env, script.path) == ([], {}, "")
    exported = [line for line in script.inline.splitlines() if line.startswith("export ")]
    told = dict(shlex.split(line)[1].split("=", 1) for line in exported)
    assert told == lowering.policy.environment
    assert told["ODD"] == ODD


@pytest.mark.parametrize(("launcher", "ranks"), [("torchrun", 2), (None, 1)])
def test_a_local_run_hands_megatron_every_word_as_it_is(launcher, ranks, megatron, tmp_path,
                                                        monkeypatch):  # fmt: skip
    import nemo_run as run

    from megacpp_nemo.launch import to_script

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    options = LaunchOptions(environment={"ODD": ODD, "TOLD": str(tmp_path)})
    script = to_script(odd_recipe(), megatron(), launch=options)
    executor = run.LocalExecutor(ntasks_per_node=ranks, launcher=launcher)
    executor.env_vars = {"ODD": "the executor's"}
    with run.Experiment("local", executor=executor) as experiment:
        experiment.add(script, name="train")
        experiment.run(sequential=True)
    lowering = lower(odd_recipe(), launch=options)
    for rank in range(ranks):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told["argv"] == list(lowering.command)
        assert told["environment"].items() >= lowering.policy.environment.items()
        assert told["environment"].get("WORLD_SIZE") == (str(ranks) if launcher else None)


def dryrun(executor, script, capsys, monkeypatch) -> tuple[str, Path]:
    """Return what an executor would run, and the folder of the task."""
    import nemo_run as run

    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr("sys.stdin", io.StringIO())  # pytest's cannot be read, and Slurm's is
    with run.Experiment("dry", executor=executor) as experiment:
        experiment.add(script, name="train")
        experiment.dryrun(delete_exp_dir=False)
        folder = Path(experiment._exp_dir, "train")
    return " ".join(capsys.readouterr().out.split()), folder


def test_slurm_renders_torchrun_over_the_script(megatron, tmp_path, capsys, monkeypatch):
    import nemo_run as run

    from megacpp_nemo.launch import to_script

    script = to_script(odd_recipe(num_nodes=2, global_batch_size=16), megatron())
    executor = run.SlurmExecutor(
        account="a", partition="p", nodes=2, ntasks_per_node=2, launcher="torchrun",
        packager=run.Packager(), tunnel=run.LocalTunnel(job_dir=str(tmp_path / "cluster")),
    )  # fmt: skip
    shown, folder = dryrun(executor, script, capsys, monkeypatch)
    for said in ("#SBATCH --nodes=2", "--nnodes 2 --nproc-per-node 2", "--no-python", "train.sh"):
        assert said in shown
    assert "srun" in shown
    text = (folder / "scripts" / "train.sh").read_text()
    assert text == f"#!/usr/bin/bash\n{script.inline}"
    assert "megatron" not in shown.partition("srun")[2].partition("torchrun")[2].lower()


def test_docker_renders_torchrun_over_the_script(megatron, capsys, monkeypatch):
    import nemo_run as run

    from megacpp_nemo.launch import to_script

    script = to_script(odd_recipe(), megatron())
    executor = run.DockerExecutor(
        container_image="image", ntasks_per_node=2, launcher="torchrun", packager=run.Packager()
    )
    shown, folder = dryrun(executor, script, capsys, monkeypatch)
    for said in ("- torchrun", "--nproc-per-node - '2'", "--no-python", "train.sh"):
        assert said in shown
    assert (folder / "scripts" / "train.sh").read_text().endswith(script.inline)


def refused(*args: object, **options: object) -> LoweringError:
    from megacpp_nemo.launch import to_script

    with pytest.raises(LoweringError) as caught:
        to_script(odd_recipe(), *args, **options)
    error = caught.value
    assert None not in (error.given, error.allowed, error.hint)
    return error


def test_a_tree_of_another_release_is_refused_with_both(megatron):
    error = refused(megatron("0.17.1"), release="0.16.1")
    assert error.what == "The tree is Megatron-LM 0.17.1, and the recipe is lowered to 0.16.1"
    assert error.hint == "release='0.17.1'"


def test_a_tree_of_an_unknown_version_is_refused_with_what_to_do(megatron):
    error = refused(megatron("0.99.0"), release="0.16.1")
    assert "0.99.0" in error.what
    assert "megacpp releases add" in error.hint


def test_a_folder_that_is_no_tree_is_refused(tmp_path, megatron):
    assert "no folder" in refused(tmp_path / "missing").what
    assert "not a Megatron-LM source tree" in refused(tmp_path).what
    root = megatron()
    (root / "pretrain_mamba.py").unlink()
    assert "lacks Megatron-LM's pretrain_mamba.py" in refused(root).what


def test_a_tree_that_only_the_cluster_has_is_not_looked_at():
    from megacpp_nemo.launch import to_script

    script = to_script(odd_recipe(), "/on/the/cluster", release="0.18.2", check=False)
    assert words(script.inline)[0] == "/on/the/cluster/pretrain_hybrid.py"


def test_what_cannot_be_lowered_has_no_script(megatron):
    assert "seams are left" in refused(megatron(), seams="native-only").what
    assert "No Megatron-LM release" in refused(megatron("0.16.0"), release="0.16.0").what


@pytest.mark.parametrize("root", [None, 5, "", "~", "~/Megatron-LM", "a\nb", b"/x"])
@pytest.mark.parametrize("check", [True, False])
def test_a_root_that_is_not_written_out_is_refused(root, check):
    assert "written out" in refused(root, check=check).what

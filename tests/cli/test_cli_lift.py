"""`megacpp lift`: what it prints lowers to the command line that it read."""

from __future__ import annotations

import io
import json
import shlex
import sys

import pytest

from megacpp_nemo.contract import RECIPE_NAMES

STAGES = "pattern=AEME|AEMR depth=8 pipeline_model_parallel_size=2 a_ranks=1".split()  # noqa: SIM905
SOME = (
    ("nam52", "0.19.0"),
    ("nam56r", "0.16.1", "precision=fp8", "hidden_size=1792", "run_dir=my runs"),
    ("nam56r:mode=author_dp", "0.17.1", "mtp.num_layers=0"),
    ("nam56r_4096", "0.18.2", 'data_path=["30","/a b","70","/c"]', "tokenizer_dir=/t"),
    ("nam56r", "0.19.0", *STAGES),
    ("nam56r", "0.16.1", "run_dir=a#b\\'\"\u2028$x\r"),
    ("nam52", "0.16.1", "run_dir=-x", "tokenizer_dir=-h x", "data_path=--save y"),
)


@pytest.mark.parametrize(("name", "release", "changes"), [(a, b, c) for a, b, *c in SOME])
@pytest.mark.parametrize("form", ["argv", "shell"])
def test_what_is_lifted_lowers_to_the_same_arguments(
    megacpp, tmp_path, name, release, changes, form
):
    at = ("--release", release)
    file = tmp_path / "command"
    megacpp("lower", name, *changes, *at, "--format", form, "--out", str(file))
    lifted = megacpp("lift", *at, "--file", str(file))
    assert lifted.code == 0, lifted.err
    words = shlex.split(lifted.out)
    argv = [
        megacpp("lower", *one, *at, "--format", "argv").out for one in (words, [name, *changes])
    ]
    assert argv[0] == argv[1]


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_named_recipe_is_found_by_its_name(megacpp, tmp_path, name):
    file = tmp_path / "run.sh"
    megacpp("lower", name, "--format", "shell", "--out", str(file))
    assert megacpp("lift", "--release", "0.16.1", "--file", str(file)).out == f"{name}\n"


def test_arguments_may_stand_behind_two_dashes_or_come_from_standard_input(megacpp, monkeypatch):
    argv = megacpp("lower", "nam52", "lr=0.001", "--format", "argv").out
    behind = megacpp("lift", "--release", "0.16.1", "--", *argv.splitlines())
    stdin = io.TextIOWrapper(io.BytesIO(argv.encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert megacpp("lift", "--release", "0.16.1", "--file", "-") == behind
    assert behind.out.splitlines() == [
        "nam52",
        "parallelism.devices_per_node=2",
        "schedule.lr=0.001",
    ]


def test_json_has_every_field(megacpp):
    argv = megacpp("lower", "nam52", "--format", "argv").out.splitlines()
    out = megacpp(
        *("lift", "--release", "0.16.1", "--devices-per-node", "8", "--format", "json", "--"), *argv
    ).out
    found = json.loads(out)
    assert (found["closest"], found["words"]) == ("nam52", ["nam52"])
    assert found["fields"]["model.hidden_size"] == 3584
    assert found["fields"]["files.data_path"] == []


def test_shell_is_a_command_that_lowers_alike(megacpp):
    argv = megacpp("lower", "nam52", "lr=0.001", "--format", "argv").out.splitlines()
    said = megacpp("lift", "--release", "0.16.1", "--format", "shell", "--", *argv).out
    program, *words = shlex.split(said.replace("\\\n", " "))
    assert program == "megacpp"
    assert megacpp(*words, "--format", "argv").out.splitlines() == argv


def test_sizes_of_torchrun_are_read_and_ours_stand_for_them(megacpp, tmp_path):
    text = megacpp("lower", "nam52", "num_nodes=2", "--format", "shell").out
    file = tmp_path / "run.sh"
    lift = ("lift", "--release", "0.16.1", "--file", str(file))
    plain = "--nnodes 2 --rdzv"
    assert plain in text
    for spelled in (plain, "--nnodes=2 --rdzv", "--nnodes '2' --rdzv"):
        file.write_text(text.replace(plain, spelled))
        assert megacpp(*lift).out.splitlines() == ["nam52", "parallelism.num_nodes=2"]
    for size in ("$NNODES", '"$NNODES"', "1:4", "0", "two", "\u0662"):
        file.write_text(text.replace(plain, f"--nnodes {size} --rdzv"))
        result = megacpp(*lift)
        assert result.code == 2
        assert "torchrun's --nnodes is not a plain number" in result.err
        assert "try:     --num-nodes N" in result.err
        assert megacpp(*lift, "--num-nodes", "2").out.splitlines()[1:] == [
            "parallelism.num_nodes=2"
        ]


def test_a_whole_command_may_stand_behind_two_dashes(megacpp):
    argv = megacpp("lower", "nam52", "--format", "argv").out.splitlines()
    command = ["torchrun", "--nnodes", "1", "--nproc_per_node=8", "pretrain_mamba.py", *argv]
    assert megacpp("lift", "--release", "0.16.1", "--", *command).out == "nam52\n"


def test_one_line_of_shell_text_is_read(megacpp, tmp_path):
    argv = megacpp("lower", "nam52", "--format", "argv").out.splitlines()
    (tmp_path / "run").write_text("torchrun --nproc-per-node 8 x.py " + shlex.join(argv))
    lift = ("lift", "--release", "0.16.1", "--file", str(tmp_path / "run"))
    assert megacpp(*lift).out == "nam52\n"


def test_sizes_that_nam56r_could_not_have_are_lifted(megacpp, tmp_path):
    words = [
        "latent_attention=false",
        "sparse_attention=false",
        "mtp.num_layers=0",
        "ngram_hash=false",
    ]
    file, at = tmp_path / "q", ("--release", "0.19.0")
    megacpp("lower", "nam56r_smoke", *words, *at, "--format", "argv", "--out", str(file))
    lifted = megacpp("lift", *at, "--file", str(file))
    assert lifted.code == 0, lifted.err
    again = megacpp("lower", *shlex.split(lifted.out), *at, "--format", "argv").out
    assert again == file.read_text()


def test_letters_that_ascii_lacks_and_control_characters_stay_as_they_are(megacpp, tmp_path):
    file = tmp_path / "command"
    folder = "r\u00fcns\x1b[31m\t\u2028x"
    megacpp("lower", "nam52", f"run_dir={folder}", "--format", "argv", "--out", str(file))
    said = megacpp("lift", "--release", "0.16.1", "--file", str(file)).out
    assert f"files.run_dir={folder}" in shlex.split(said)


def test_quotes_that_do_not_match_are_refused(megacpp, tmp_path):
    (tmp_path / "x").write_text("--a 'x")
    result = megacpp("lift", "--release", "0.16.1", "--file", str(tmp_path / "x"))
    assert result.code == 2
    assert "no closing quotation" in result.err

"""`megacpp lift`: what it prints lowers to the command line that it read."""

from __future__ import annotations

import io
import json
import shlex
import sys

import pytest

from megacpp_nemo.cli.lift import split
from megacpp_nemo.contract import RECIPE_NAMES

STAGES = "pattern=AEME|AEMR depth=8 pipeline_model_parallel_size=2 a_ranks=1".split()  # noqa: SIM905
SOME = (
    ("nam52", "0.19.0"),
    ("nam56r", "0.16.1", "precision=fp8", "hidden_size=1792", "run_dir=my runs"),
    ("nam56r:mode=author_dp", "0.17.1", "mtp.num_layers=0"),
    ("nam56r_4096", "0.18.2", 'data_path=["30","/a b","70","/c"]', "tokenizer_dir=/t"),
    ("nam56r", "0.19.0", *STAGES),
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
    words = [shlex.split(line)[0] for line in lifted.out.splitlines()]
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


@pytest.mark.parametrize(
    ("text", "arguments", "sizes"),
    [
        ("--a\nx y\n--b\n", ["--a", "x y", "--b"], {}),
        ("--a 'x y' --b", ["--a", "x y", "--b"], {}),
        ("--a 1 \\\n  --b", ["--a", "1", "--b"], {}),
        ('# note\ntorchrun --nnodes 2 "$M/x.py" \\\n--a', ["--a"], {"--nnodes": 2}),
        ("", [], {}),
    ],
)
def test_text_is_read_by_lines_or_as_a_shell_would(text, arguments, sizes):
    assert split(text) == (arguments, sizes)


def test_quotes_that_do_not_match_are_refused(megacpp, tmp_path):
    (tmp_path / "x").write_text("--a 'x")
    result = megacpp("lift", "--release", "0.16.1", "--file", str(tmp_path / "x"))
    assert result.code == 2
    assert "no closing quotation" in result.err

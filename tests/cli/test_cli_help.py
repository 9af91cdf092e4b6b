"""Every example of every help does what it shows."""

from __future__ import annotations

import importlib
import io
import shlex
import sys
from pathlib import Path

import pytest

from megacpp_nemo.cli.usage import COMMANDS, overview
from megacpp_nemo.lowering.releases import FOLDER

# They read what only a run, a checkout or an earlier example leaves behind.
NEEDS_A_RUN = (
    *("megacpp plasticity report", "megacpp generate", "megacpp runs", "megacpp show"),
    "megacpp data",
)


def examples(text: str) -> list[str]:
    """Return the commands of a help, each on one line."""
    listed = text.partition("\nexamples:\n")[2].partition("\n\n")[0].replace("\\\n", " ")
    return [line.strip() for line in listed.splitlines()]


def every_example() -> list[str]:
    helps = [overview()]
    for command in COMMANDS:
        module = importlib.import_module(f"megacpp_nemo.cli.{command.module}")
        helps.append(module.parser(command.name).format_help())
    found = dict.fromkeys(example for text in helps for example in examples(text))
    return list(found)


def that_need_no_run() -> list[str]:
    return [example for example in every_example() if not example.startswith(NEEDS_A_RUN)]


def test_there_are_examples_of_every_command():
    named = {example.split()[1] for example in every_example()}
    assert named == {command.name for command in COMMANDS}


@pytest.mark.parametrize("example", that_need_no_run())
def test_an_example_runs(megacpp, tmp_path, monkeypatch, example):
    def add(path, *, name, out, overwrite):
        text = (FOLDER / "0.19.0.json").read_text().replace('"name": "0.19.0"', f'"name": "{name}"')
        Path(out).write_text(text)
        return Path(out)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megacpp_nemo.lowering.tree.add_release", add)
    add("", name="mine", out="mine.json", overwrite=False)
    (tmp_path / "docs").mkdir()
    release = example.partition("--release ")[2].partition(" ")[0] or "0.16.1"
    if "--file run.sh" in example:
        megacpp("lower", "nam56r", "--release", release, "--format", "shell", "--out", "run.sh")
    said = b""
    for command in example.split(" | "):
        program, *words = shlex.split(command)
        if program == "xargs":
            program, *words = [*words, *shlex.split(said.decode())]
        assert program == "megacpp"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said)))
        result = megacpp(*words)
        assert result.code == 0, result.err
        said = result.out.encode()

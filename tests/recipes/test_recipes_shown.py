"""NeMo's commands in the documentation resolve, and change what they say they change."""

from __future__ import annotations

import re

import pytest

from tests.support.shown import ROOT, shown_commands

COMMANDS = [words for words in shown_commands("nemo llm") if "--factory" in words]


def test_there_are_commands_to_try():
    assert len(COMMANDS) > 8
    assert {words[0] for words in COMMANDS} == {"pretrain", "finetune"}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_shown_command_resolves(nemo, words, tmp_path, monkeypatch):
    # The executor's file that the commands name is the one that the page shows.
    page = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
    (tmp_path / "ours.yaml").write_text(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0])
    monkeypatch.chdir(tmp_path)
    command, option, factory, *rest = words
    assert option == "--factory"
    if command == "finetune":
        # Its checkpoint is a run's, which nobody made here; that it is read is what shows.
        assert "checkpoints" in nemo.refused(factory, *_overrides(rest), command=command)
        return
    task = nemo.resolved(factory, *_overrides(rest), command=command)
    assert task.model.config.num_layers > 0


def _overrides(words: list[str]) -> list[str]:
    return [word for word in words if word not in ("--yes", "--dryrun")]

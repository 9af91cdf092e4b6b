"""`megacpp data build`, and the group of commands it belongs to."""

from __future__ import annotations

import json
import os
import shlex

import pytest

from megacpp_nemo.cli.data import ACTIONS, parser
from megacpp_nemo.cli.data_summary import facts_of, summary
from megacpp_nemo.cli.screen import Screen
from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
from megacpp_nemo.data.corpus_spec import Corpus
from tests.cli.corpora import apart
from tests.cli.test_cli_help import examples


def test_the_group_lists_its_commands_and_names_none_for_you(megacpp):
    shown = megacpp("data", "--help")
    assert shown.code == 0
    for action in ACTIONS:
        assert f"  {action.name:<8} {action.summary}" in shown.out
        assert f"megacpp data {action.name} " in shown.out.partition("examples:")[2]
    assert megacpp("data") == (2, shown.out, "")


@pytest.mark.parametrize("name", [action.name for action in ACTIONS])
def test_each_command_has_help_with_examples(megacpp, name):
    result = megacpp("data", name, "--help")
    assert result.code == 0
    assert result.out.startswith(f"usage: megacpp data {name} ")
    assert f"examples:\n  megacpp data {name} " in result.out


def test_every_example_is_one_that_is_taken(megacpp):
    for action in ACTIONS:
        for example in examples(megacpp("data", action.name, "--help").out):
            words = shlex.split(example)[1:]
            assert parser("data").read(words[1:]).command == f"data {action.name}"


def test_what_is_built_is_counted(corpus):
    facts = corpus.facts
    assert facts["total"]["files"] == facts["total"]["documents"] == 9
    assert facts["skipped"] == {"duplicate": 1, "empty": 1, "not_text": 1}
    read = [path for path in corpus.sources.iterdir() if path.name not in ("copy.h", "latin.h")]
    assert facts["total"]["source_bytes"] == sum(path.stat().st_size for path in read)
    assert sum(facts["structure"]["files_parsed"].values()) == 9
    assert facts["structure"]["files_parsed"]["whole"] == 8
    assert facts["structure"]["channels"] == list(STRUCTURE_CHANNELS)
    rates = facts["built"]
    assert rates["files_per_second"] == pytest.approx(9 / rates["seconds"])


def test_it_says_how_to_train(corpus):
    verify, train = corpus.facts["next"]
    assert verify == f"megacpp data verify {corpus.folder}"
    assert shlex.split(train) == [
        *("nemo", "llm", "pretrain", "--factory", "nam56r_tiny(structure='core')"),
        *(f"data=corpus_folders(folders={corpus.folder})", "--yes"),
    ]


def test_a_corpus_that_is_there_is_kept(megacpp, corpus):
    manifest = (corpus.folder / "manifest.json").read_bytes()
    words = ("--vocab-size", "300", "--workers", "1")
    result = megacpp("data", "build", str(corpus.sources), "--out", str(corpus.folder), *words)
    assert result.code == 0, result.err
    assert "9: " in result.out
    assert "3 files: 1 duplicate, 1 empty, 1 not text" in result.out
    assert "before, and kept" in result.out
    assert (corpus.folder / "manifest.json").read_bytes() == manifest


def test_a_build_that_went_on_tells_no_rate(corpus):
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    whole = Corpus(folder=corpus.folder, manifest=manifest)
    facts = facts_of(whole, corpus.folder, 2.5, resumed=True)
    assert facts["built"]["files_per_second"] is None
    assert "built       in 2.5 s, going on with a stopped build\n" in summary(facts, Screen())
    for key in ("total", "splits", "skipped", "structure", "next"):
        assert facts[key] == corpus.facts[key]


def test_other_settings_do_not_replace_a_corpus(megacpp, corpus):
    words = ("--vocab-size", "310", "--workers", "1")
    result = megacpp("data", "build", str(corpus.sources), "--out", str(corpus.folder), *words)
    assert result.code == 3
    assert "other sources or settings" in result.err


def test_tokens_alone_of_some_files_with_a_tokenizer_that_is_there(corpus, tmp_path):
    out = tmp_path / "tokens.json"
    tokenizer = str(corpus.folder / "tokenizer")
    done = apart(
        *("data", "build", str(corpus.sources), "--out", str(out), "--workers", "1"),
        *("--structure", "none", "--tokenizer", tokenizer, "--exclude", "unit*"),
        *("--exclude", "broken.h", "--suffixes", "h,cpp"),
    )
    assert done.returncode == 0, done.stderr
    # The name of the folder does not choose the format.
    assert "files       2: 1 in train and 1 in validation" in done.stdout
    assert "channels" not in done.stdout
    assert "--factory nam56r_tiny " in done.stdout.replace('"', "")
    assert not list(out.glob("*category*"))
    # No bar where nobody looks at one.
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "code", "what", "hint"),
    [
        ("bild", 2, "data has no command 'bild'", "build"),
        ("--format json", 2, "data takes one of its commands first", "megacpp data build"),
        ("--out x build", 2, "data takes one of its commands first", "megacpp data build"),
        ("build", 2, "data build needs a folder", "megacpp data build src --out"),
        ("build src", 2, "data build needs --out", "megacpp data build src --out"),
        ("build src --out -", 2, "data build needs --out", "megacpp data build src --out"),
        ("build src more --out x", 2, "data build takes one folder", "megacpp data build --help"),
        ("build nowhere --out x", 3, "The folder of sources cannot be read", "another folder"),
        ("build src/base.h --out x", 3, "The folder of sources cannot be read", "another"),
        ("build src --out x --workers 0", 2, "--workers takes a whole number", "--workers 8"),
        ("build src --out x --seed -1", 2, "--seed takes a whole number, 0", "--seed 1234"),
        ("build src --out x --structure coer", 2, "--structure knows no 'coer'", "--structure co"),
        (
            *("build src --out x --structure category+category", 2),
            *("A channel is named twice", "--structure category"),
        ),
        ("build src --out x --suffixes ,", 2, "--suffixes lists endings", "--suffixes .h,.cpp"),
        ("build src --out x --validation-fraction 1", 2, "--validation-fraction takes", "--valid"),
        ("build src --out x --vocab-size 9", 3, "The vocabulary is too small", "--vocab-size 4096"),
        ("build src --out x --tokenizer src", 3, "The tokenizer folder holds no", "--tokenizer "),
        (
            *("build src --out x --tokenizer src --vocab-size 300", 2),
            *("A tokenizer that is given has its own", "one of the two"),
        ),
        ("build src --out src", 3, "The output folder is not free", "choose another folder"),
        ("build src --out x --exclude *", 3, "No usable C++ source file", "check the folder"),
        ("build src --out x -- y", 2, "data build takes no words behind '--'", "megacpp data"),
    ],
)
def test_what_cannot_be_built_is_said_and_nothing_is_left(
    megacpp, corpus, monkeypatch, words, code, what, hint
):
    monkeypatch.chdir(corpus.sources.parent)
    before = sorted(os.listdir("."))
    result = megacpp("data", *words.split())
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith(f"megacpp: {what}")
    assert "\n  given:   " in result.err
    assert f"\n  try:     {hint}" in result.err
    assert sorted(os.listdir(".")) == before


def test_an_interrupt_ends_it_as_a_shell_reports_one(megacpp, corpus, monkeypatch, tmp_path):
    def interrupted(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("megacpp_nemo.data.corpus_folder.build_folder", interrupted)
    result = megacpp("data", "build", str(corpus.sources), "--out", str(tmp_path / "x"))
    assert (result.code, result.out) == (130, "")

"""`megacpp data verify`."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from tests.cli.corpora import apart


@pytest.fixture
def copy(corpus, tmp_path):
    """A corpus to be spoiled."""
    return shutil.copytree(corpus.folder, tmp_path / "corpus")


def test_a_whole_corpus_is_well(megacpp, corpus):
    result = megacpp("data", "verify", str(corpus.folder))
    assert (result.code, result.err) == (0, "")
    assert "documents   9\n" in result.out
    assert f"tokens      {corpus.facts['total']['tokens']:,}\n" in result.out
    assert result.out.endswith("\nAll is well.\n")


def test_documents_are_made_again_and_compared(corpus):
    done = apart("data", "verify", str(corpus.folder), "--reparse", "99", "--format", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["ok"], found["findings"]) == (True, [])
    assert (found["reparsed"], found["not_reparsed"]) == (9, 0)


def test_a_changed_byte_is_found(megacpp, copy):
    path = copy / "train.ast_depth.bin"
    ids = np.fromfile(path, np.uint8)
    ids[3] = 200
    ids.tofile(path)
    result = megacpp("data", "verify", str(copy))
    assert result.code == 1
    assert "things are wrong" in result.out
    assert "train.ast_depth.bin does not match its hash" in result.out
    assert "out of range" in result.out


def test_what_is_missing_is_found(megacpp, copy):
    (copy / "validation.category.idx").unlink()
    result = megacpp("data", "verify", str(copy), "--format", "json")
    assert result.code == 1
    found = json.loads(result.out)
    assert not found["ok"]
    assert any("validation.category.idx" in finding for finding in found["findings"])


def test_a_manifest_that_cannot_be_read_is_found(megacpp, copy):
    (copy / "manifest.json").write_text("{")
    result = megacpp("data", "verify", str(copy))
    assert result.code == 1
    assert "One thing is wrong" in result.out
    assert "manifest.json" in result.out


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        ("", 2, "data verify takes one folder"),
        ("a b", 2, "data verify takes one folder"),
        ("nowhere", 3, "The folder of a corpus cannot be read"),
        ("src/base.h", 3, "The folder of a corpus cannot be read"),
        ("src", 3, "This folder holds no corpus"),
        ("corpus --reparse -1", 2, "--reparse takes a whole number, 0 or more"),
        ("corpus --format yaml", 2, "data verify knows no --format 'yaml'"),
    ],
)
def test_what_is_no_corpus_is_refused(megacpp, corpus, monkeypatch, words, code, what):
    monkeypatch.chdir(corpus.sources.parent)
    result = megacpp("data", "verify", *words.split())
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith(f"megacpp: {what}")
    assert "\n  try:     " in result.err

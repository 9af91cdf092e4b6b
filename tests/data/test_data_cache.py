from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data import corpus as corpus_module
from megacpp_nemo.data import corpus_build, shard_file
from megacpp_nemo.data.corpus import build_corpus
from megacpp_nemo.data.indexed_writer import IndexedWriter


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
    )


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_manifest(path: Path) -> None:
    manifest = json.loads(path.read_text())
    manifest["splits"]["validation"]["source_bytes"] += 1
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("train.idx", lambda path: os.truncate(path, 30), "30 bytes instead of"),
        ("train.bin", flip_last_byte, "does not match its hash"),
        ("validation.bin", Path.unlink, "is missing"),
        ("tokenizer/tokenizer.json", lambda path: os.truncate(path, 0), "0 bytes instead of"),
        ("manifest.json", lambda path: path.write_text("{"), "cannot be read"),
        ("manifest.json", lambda path: path.write_text("[]"), "cannot be read"),
        ("manifest.json", Path.unlink, "cannot be read"),
        ("manifest.json", edit_manifest, "does not match its checksum"),
    ],
)
def test_a_damaged_corpus_is_rebuilt_with_a_warning(
    make_spec, tmp_path, caplog, name, damage, reason
):
    good = build_corpus(make_spec(), tmp_path / "c", progress=False)
    content = (good.folder / name).read_bytes()
    damage(good.folder / name)
    again = build_corpus(make_spec(), tmp_path / "c", progress=False)
    assert again == good
    assert (again.folder / name).read_bytes() == content
    assert [r.levelname for r in caplog.records if reason in r.getMessage()] == ["WARNING"]
    assert [path.name for path in good.folder.parent.iterdir()] == [good.folder.name]


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("indexed", FULL),
        ("indexed", OSError(errno.EDQUOT, "Disk quota exceeded")),
        ("shard", FULL),
        # As the tokenizers library reports it.
        ("tokenizer", Exception("No space left on device (os error 28)")),
    ],
)
def test_a_full_disk_leaves_an_empty_cache_and_says_what_is_needed(
    make_spec, tmp_path, monkeypatch, place, error
):
    def fail(*_, **__):
        raise error

    if place == "indexed":
        monkeypatch.setattr(IndexedWriter, "add", fail)
    elif place == "shard":
        monkeypatch.setattr(shard_file, "_flush", fail)
    else:
        monkeypatch.setattr(corpus_build, "save_tokenizer", fail)
    with pytest.raises(DataError, match=r"No space left(.|\n)*about [\d,]+ bytes free"):
        build_corpus(make_spec(), tmp_path / "c", progress=False)
    assert list((tmp_path / "c" / "corpora").iterdir()) == []
    monkeypatch.undo()
    assert build_corpus(make_spec(), tmp_path / "c", progress=False).tokens("train") > 0


def test_a_cache_that_cannot_be_written_is_a_data_error(make_spec, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be written(.|\n)*cache_dir"):
        build_corpus(make_spec(), tmp_path / "file" / "cache", progress=False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_interrupted_build_leaves_nothing(make_spec, tmp_path, monkeypatch, error):
    def interrupt(*_, **__):
        raise error

    monkeypatch.setattr(corpus_build, "make_shards", interrupt)
    with pytest.raises(error):
        build_corpus(make_spec(), tmp_path / "c", progress=False)
    assert list((tmp_path / "c" / "corpora").iterdir()) == []


HANG = """
    import sys, time
    from megacpp_nemo.data import corpus_build
    from megacpp_nemo.data.corpus import CorpusSpec, build_corpus

    def hang(job, shards, folder, done):
        (folder / "train.bin").write_bytes(b"half")
        print("half-way", flush=True)
        time.sleep(60)

    corpus_build.merge_shards = hang
    spec = CorpusSpec(root=sys.argv[1], vocab_size=300, validation_fraction=0.25)
    build_corpus(spec, sys.argv[2], progress=False)
"""


def test_a_killed_build_is_never_taken_for_complete_and_the_next_one_cleans_up(
    make_spec, tree, tmp_path
):
    victim = start(HANG, tree, tmp_path / "c")
    assert victim.stdout is not None
    assert victim.stdout.readline() == "half-way\n"
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    (left,) = (tmp_path / "c" / "corpora").iterdir()
    assert (left / "train.bin").read_bytes() == b"half"
    corpus = build_corpus(make_spec(), tmp_path / "c", progress=False)
    assert [path.name for path in corpus.folder.parent.iterdir()] == [corpus.folder.name]


RACE = """
    import os, sys, time
    from megacpp_nemo.data import corpus
    from megacpp_nemo.data.corpus import CorpusSpec, build_corpus

    real = corpus.write_corpus
    def counted(*args, **kwargs):
        print("building", flush=True)
        return real(*args, **kwargs)

    corpus.write_corpus = counted
    while not os.path.exists(sys.argv[3]):
        time.sleep(0.01)
    spec = CorpusSpec(root=sys.argv[1], vocab_size=300, validation_fraction=0.25)
    print(build_corpus(spec, sys.argv[2], progress=False).tokens("train"))
"""


def test_of_two_processes_one_builds_and_both_load_the_same(tree, tmp_path):
    both = [start(RACE, tree, tmp_path / "c", tmp_path / "go") for _ in range(2)]
    time.sleep(0.5)
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=120)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(map(len, outputs)) == [1, 2]
    assert outputs[0][-1] == outputs[1][-1]


def test_a_corpus_that_appears_while_waiting_is_loaded_not_built(make_spec, tmp_path, monkeypatch):
    build_corpus(make_spec(), tmp_path / "c", progress=False)
    real, calls = corpus_module._load, []

    def absent_at_first(folder, warn=False):
        calls.append(folder)
        return None if len(calls) == 1 else real(folder, warn)

    monkeypatch.setattr(corpus_module, "_load", absent_at_first)
    monkeypatch.setattr(corpus_module, "_build", lambda *_, **__: pytest.fail("built again"))
    build_corpus(make_spec(), tmp_path / "c", progress=False)
    assert len(calls) == 2

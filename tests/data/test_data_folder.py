"""Corpora in folders of their own: the same bytes however they are built, or nothing."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
from megacpp_nemo.data import corpus_build, corpus_folder, shard_file, shards, workers
from megacpp_nemo.data.cache import write_manifest
from megacpp_nemo.data.corpus import Corpus, CorpusSpec, build_corpus, build_folder, open_folder
from megacpp_nemo.data.shards import Shard, ShardJob, plan_shards
from megacpp_nemo.data.sources import SourceFile
from megacpp_nemo.syntax import table
from megacpp_nemo.syntax.dependencies import dependency_levels
from megacpp_nemo.syntax.paint import read_syntax
from tests.data.trees import write_tree

ODD = {
    "names.h": '#pragma once\n#include "types.h"\n// größe 数 🙂\nstruct Name { Type type; };\n',
    "types.h": "#pragma once\r\ntypedef int Type;\r\nclass Base {};\r\nclass Far : Base {};\r\n",
    "odd.h": "\ufeffint ok;\nclass } { ) ??? int broken( { ;\nnamespace a { int b; }\n",
    "blank.h": "\n \n",
}


def build(spec: CorpusSpec, out: Path, **more) -> Corpus:
    return build_folder(spec, out, **{"progress": False, "workers": 1, **more})


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def small_shards(monkeypatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 4096)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    root = write_tree(tmp_path_factory.mktemp("odd") / "src", files=24)
    for name, text in ODD.items():
        (root / name).write_bytes(text.encode())
    (root / "latin1.h").write_bytes("// gr\xf6\xdfe".encode("latin-1"))
    (root / "empty.h").touch()
    return root


@pytest.fixture(scope="module")
def spec(sources: Path) -> CorpusSpec:
    return CorpusSpec(root=sources, vocab_size=300, validation_fraction=0.25, structure="all")


@pytest.fixture(scope="module")
def built(spec: CorpusSpec, tmp_path_factory) -> Corpus:
    """Built in this process, in many shards; tests only read it."""
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch)
        return build(spec, tmp_path_factory.mktemp("built") / "corpus")


@pytest.fixture
def copied(built: Corpus, tmp_path: Path) -> Path:
    import shutil

    return shutil.copytree(built.folder, tmp_path / "copied")


def arrays(corpus: Corpus, split: str, channel: str | None = None) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(corpus.prefix(split, channel)))
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_every_channel_is_what_the_syntax_says_of_the_first_byte_of_each_token(built, sources):
    """Documents are parsed again one by one, and tokens spelled out one by one."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(built.tokenizer_dir / "tokenizer.json"))
    names = [(split, path) for split in ("train", "validation") for path in built.documents(split)]
    syntaxes = {path: read_syntax((sources / path).read_bytes()) for _, path in names}
    levels = dict(
        zip(
            [path for _, path in names],
            dependency_levels([(path, syntaxes[path].facts) for _, path in names]),
            strict=True,
        )
    )
    for split in ("train", "validation"):
        found = {name: arrays(built, split, name) for name in STRUCTURE_CHANNELS}
        for i, (path, ids) in enumerate(
            zip(built.documents(split), arrays(built, split), strict=True)
        ):
            source, syntax, at = (sources / path).read_bytes(), syntaxes[path], 0
            for place, token in enumerate(ids[:-1]):
                start = at
                while source[start] & 0xC0 == 0x80:
                    start -= 1
                here = {name: int(painted[start]) for name, painted in syntax.channels.items()}
                unit = int(syntax.units[start])
                level = levels[path].file if unit < 0 else levels[path].units[unit]
                absent = here["category"] == STRUCTURE_CHANNELS["category"]
                here["dependency_level"] = 16 if absent else level
                assert {name: found[name][i][place] for name in found} == here
                at += len(tokenizer.id_to_token(token))
            assert at == len(source)
            assert {name: found[name][i][-1] for name in found} == STRUCTURE_CHANNELS
            assert all(len(found[name][i]) == len(ids) for name in found)


def test_the_manifest_tells_versions_counts_and_skips(built, sources):
    manifest = built.manifest
    assert built.channels == tuple(STRUCTURE_CHANNELS)
    assert manifest["skipped"] == {"empty": 1, "not_text": 1}
    assert manifest["structure"]["mapping_version"] == table.MAPPING_VERSION
    parsed = manifest["structure"]["files_parsed"]
    assert sum(parsed.values()) == sum(s["files"] for s in manifest["splits"].values()) == 28
    for name, absent in manifest["structure"]["absent_tokens"].items():
        ids = [i for s in ("train", "validation") for doc in arrays(built, s, name) for i in doc]
        assert absent == ids.count(STRUCTURE_CHANNELS[name])
    assert sorted(built.documents("train") + built.documents("validation")) == sorted(
        path.relative_to(sources).as_posix()
        for path in sources.rglob("*")
        if path.is_file() and path.name not in ("latin1.h", "empty.h")
    )


def test_two_workers_or_one_shard_size_give_the_same_bytes(built, spec, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        small_shards(patch)
        build(spec, tmp_path / "two", workers=2)
    assert content(tmp_path / "two") == content(built.folder)
    build(spec, tmp_path / "whole")
    assert content(tmp_path / "whole") == content(built.folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two", "whole"]


def test_the_cache_builds_the_same_files(built, spec, tmp_path):
    cached = build_corpus(spec, tmp_path, progress=False)
    assert content(cached.folder) == content(built.folder)
    assert cached.folder.name == built.manifest["key"]


KILLED = """
    import multiprocessing, os, shutil, signal, sys
    from megacpp_nemo.data import corpus_build, shard_file, shards, workers
    from megacpp_nemo.data.corpus import CorpusSpec, build_folder
    from megacpp_nemo.data.indexed_writer import IndexedWriter

    def main():
        shards.SHARD_BYTES = 4096
        left = int(sys.argv[3])

        def dying(function):
            def run(*args, **kwargs):
                nonlocal left
                left -= 1
                if left == 0:
                    children = [p.pid for p in multiprocessing.active_children()]
                    print(*children, flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return run

        os.replace = dying(os.replace)
        shard_file._flush = dying(shard_file._flush)
        IndexedWriter.add = dying(IndexedWriter.add)
        workers.as_completed = (lambda real: lambda f: map(dying(lambda x: x), real(f)))(
            workers.as_completed
        )
        # As it was saved before, without the seconds that importing transformers takes.
        corpus_build.save_tokenizer = lambda _, folder: shutil.copytree(sys.argv[5], folder)
        spec = CorpusSpec(
            root=sys.argv[1], vocab_size=300, validation_fraction=0.25, structure="all"
        )
        build_folder(spec, sys.argv[2], progress=False, workers=int(sys.argv[4]))

    if __name__ == "__main__":
        main()
"""


def run_killed(script: Path, *arguments: object) -> tuple[int, list[int]]:
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    return done.returncode, [int(word) for word in done.stdout.split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_build_killed_at_any_moment_goes_on_to_the_same_bytes(built, sources, tmp_path):
    """It is killed again and again, each time a little later, with one worker and with two."""
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(textwrap.dedent(KILLED))
    kills, orphans = 0, []
    for turn, moment in enumerate([2, 5, 4, 3, 40, 60, 0]):
        code, children = run_killed(script, sources, out, moment, 1 + turn % 2, built.tokenizer_dir)
        orphans += children
        if code != -signal.SIGKILL:
            break
        assert not out.exists()
        kills += 1
    assert code == 0
    assert kills >= 5
    assert content(out) == content(built.folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "script.py"]
    assert orphans
    deadline = time.monotonic() + 10
    while any(map(is_running, orphans)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, orphans))


def test_shards_that_are_whole_are_taken_and_others_are_made_again(
    built, spec, tmp_path, monkeypatch
):
    small_shards(monkeypatch)
    made: list[int] = []
    real = corpus_build.make_shards

    def counted(job, missing, *rest):
        made.append(len(missing))
        real(job, missing, *rest)
        if len(made) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(corpus_build, "make_shards", counted)
    monkeypatch.setattr(corpus_build, "train_tokenizer", once(corpus_build.train_tokenizer))
    with pytest.raises(KeyboardInterrupt):
        build(spec, tmp_path / "out")
    files = sorted((tmp_path / ".out.building").rglob("*.shard"))
    assert len(files) == made[0] > 4
    files[0].write_bytes(files[0].read_bytes()[:-1])
    flipped = bytearray(files[1].read_bytes())
    flipped[200] ^= 1
    files[1].write_bytes(flipped)
    files[2].unlink()
    files[3].with_suffix(".shard.1.partial").write_bytes(b"half")
    build(spec, tmp_path / "out")
    assert made[1:] == [3]
    assert content(tmp_path / "out") == content(built.folder)


def once(function: Callable) -> Callable:
    calls = []

    def run(*args):
        assert not calls
        calls.append(args)
        return function(*args)

    return run


def test_an_interrupt_says_where_to_go_on_from(spec, tmp_path, monkeypatch, caplog):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus_build, "make_shards", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(spec, tmp_path / "out")
    assert f"goes on from what is kept in {tmp_path / '.out.building'}" in caplog.text
    caplog.clear()
    monkeypatch.setattr(corpus_build, "train_tokenizer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(spec, tmp_path / "other")
    assert "goes on from what is kept" not in caplog.text
    assert not (tmp_path / ".other.building").exists()


def test_what_is_kept_of_other_sources_or_settings_is_not_used(built, spec, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(corpus_build, "merge_shards", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(CorpusSpec(**{**vars(spec), "seed": 7}), tmp_path / "out")
    (old,) = [path for path in (tmp_path / ".out.building").iterdir() if (path / "shards").is_dir()]
    assert old.name != built.manifest["key"]
    build(spec, tmp_path / "out")
    assert content(tmp_path / "out") == content(built.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_corpus_that_is_there_is_verified_and_kept(spec, copied):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    assert build(spec, copied).folder == copied
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


def occupy(path: Path, what: str, copied: Path) -> None:
    if what == "a file":
        path.touch()
    elif what == "other files":
        path.mkdir()
        (path / "notes.txt").touch()
    elif what == "a damaged corpus":
        copied.rename(path)
        os.truncate(path / "train.category.bin", 3)
    else:
        copied.rename(path)


@pytest.mark.parametrize(
    ("what", "seed", "message"),
    [
        ("a file", 1234, "it is a file"),
        ("other files", 1234, r"it holds notes\.txt"),
        ("a damaged corpus", 1234, "damaged corpus: train.category.bin has 3 bytes instead of"),
        ("another corpus", 7, "a corpus of other sources or settings"),
    ],
)
def test_what_is_in_the_way_is_told_and_left_alone(spec, copied, tmp_path, what, seed, message):
    occupy(tmp_path / "out", what, copied)
    with pytest.raises(DataError, match=rf"not free(.|\n)*{message}"):
        build(CorpusSpec(**{**vars(spec), "seed": seed}), tmp_path / "out")
    assert (tmp_path / "out").exists()
    assert not (tmp_path / ".out.building").exists()


def test_an_empty_folder_or_a_link_to_one_is_filled(built, spec, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert build(spec, tmp_path / "link").folder == tmp_path / "real"
    assert content(tmp_path / "link") == content(built.folder)


def test_a_second_build_waits_and_takes_what_the_first_one_made(built, spec, tmp_path, caplog):
    from filelock import FileLock

    building = tmp_path / ".out.building"
    building.mkdir()
    with FileLock(building / "build.lock"), caplog.at_level(logging.WARNING):
        second = threading.Thread(target=build, args=(spec, tmp_path / "out"))
        second.start()
        deadline = time.monotonic() + 10
        while "waiting for another process" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        import shutil

        shutil.copytree(built.folder, tmp_path / "out")
        before = (tmp_path / "out").stat().st_ino
        shutil.rmtree(building)
    second.join(30)
    assert not second.is_alive()
    assert "waiting for another process that is building" in caplog.text
    assert (tmp_path / "out").stat().st_ino == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("place", "name"), [(shard_file, "_flush"), (corpus_folder, "write_corpus")]
)
def test_a_full_disk_leaves_nothing_half_written(spec, tmp_path, monkeypatch, place, name):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(place, name, full)
    with pytest.raises(
        DataError, match=r"No space left for the corpus(.|\n)*bytes free(.|\n)*--out"
    ):
        build(spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_a_data_error(spec, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be written(.|\n)*--out"):
        build(spec, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure": "colour"}, "structure channels cannot be read"),
        ({"vocab_size": 9}, "at least"),
    ],
)
def test_bad_settings_are_data_errors_that_leave_nothing(spec, tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        build(CorpusSpec(**{**vars(spec), **changes}), tmp_path / "out")
    with pytest.raises(DataError, match="number of workers"):
        build(spec, tmp_path / "out", workers=0)
    assert list(tmp_path.iterdir()) == []


class Deadly(str):
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (3,)


def job_and_shards(folder: Path, sources: Path, tokenizer: str) -> tuple[ShardJob, list[Shard]]:
    import hashlib

    files = [
        SourceFile(
            path=name,
            size_bytes=len(text.encode()),
            sha256=hashlib.sha256(text.encode()).hexdigest(),
        )
        for name, text in ODD.items()
    ]
    job = ShardJob(
        root=sources,
        folder=folder,
        identity="made for a test",
        tokenizer=tokenizer,
        end_id=0,
        token_dtype="uint16",
        channels=("category",),
    )
    return job, plan_shards({"train": files[:2], "validation": files[2:]})


@pytest.mark.parametrize(
    ("tokenizer", "error", "message"),
    [
        (Deadly("x"), DataError, r"worker.*died(.|\n)*fewer workers"),
        ("", FileNotFoundError, "gone"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_told_here(
    built, sources, tmp_path, tokenizer, error, message
):
    text = tokenizer or (built.tokenizer_dir / "tokenizer.json").read_text()
    job, two = job_and_shards(tmp_path / "gone", sources, text)
    with pytest.raises(error, match=message):
        workers.make_shards(job, two, 2, lambda shard: None)


def test_a_source_that_changes_meanwhile_is_a_data_error(spec, sources, tmp_path, monkeypatch):
    real = corpus_build.make_shards

    def edited(*args):
        (sources / "blank.h").write_text("int now;\n")
        real(*args)

    monkeypatch.setattr(corpus_build, "make_shards", edited)
    try:
        with pytest.raises(DataError, match=r"changed while(.|\n)*blank\.h"):
            build(spec, tmp_path / "out")
    finally:
        (sources / "blank.h").write_text(ODD["blank.h"])
    assert not (tmp_path / "out").exists()


def sealed(folder: Path, **changes) -> None:
    """Change a manifest and seal it again, as another version of the package would have."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    for name in ("checksum", "files"):
        del manifest[name]
    for name, value in changes.items():
        part = manifest
        *path, last = name.split("__")
        for key in path:
            part = part[key]
        part[last] = value
    write_manifest(folder, manifest)


def test_open_folder_returns_what_was_built(built):
    assert open_folder(built.folder) == built
    assert open_folder(str(built.folder)).prefix("train", "category").name == "train.category"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "holds no corpus"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "damaged"),
        (lambda folder: os.truncate(folder / "train.category.bin", 9), "category.bin has 9 bytes"),
        (lambda folder: (folder / "train.idx").unlink(), "train.idx is missing"),
        (
            lambda folder: (folder / "documents.json").write_bytes(b" "),
            "documents.json has 1 bytes",
        ),
        (lambda folder: sealed(folder, schema_version=1), "format is version 1"),
        (lambda folder: sealed(folder, structure__mapping_version=99), "mapping version 99"),
        (lambda folder: sealed(folder, tokenizer__sha256="0"), "another tokenizer"),
    ],
)
def test_open_folder_refuses_what_is_damaged_or_of_another_version(copied, damage, message):
    damage(copied)
    with pytest.raises(DataError, match=message):
        open_folder(copied)


def test_nothing_is_parsed_for_a_corpus_without_structure(spec, tmp_path, monkeypatch):
    for name in ("paint", "table", "dependencies"):
        monkeypatch.setitem(sys.modules, f"megacpp_nemo.syntax.{name}", None)
    plain = build(CorpusSpec(**{**vars(spec), "structure": None}), tmp_path / "out")
    assert plain.channels == ()
    assert "structure" not in plain.manifest
    assert not list(plain.folder.glob("*.*.bin"))
    assert open_folder(plain.folder) == plain


def test_a_worker_imports_nothing_heavy():
    code = """
        import sys
        import megacpp_nemo.data.workers, megacpp_nemo.syntax.paint, tokenizers
        print(sorted({"torch", "megatron", "nemo", "transformers", "lightning"} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_indexed_files_are_those_of_megatrons_builder(tmp_path, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megacpp_nemo.data.indexed_writer import IndexedWriter

    documents = [[1, 2, 3], [7], [200, 0, 4, 5]]
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for ids in documents:
        theirs.add_document(np.array(ids), [len(ids)])
    theirs.finalize(str(tmp_path / "theirs.idx"))
    with IndexedWriter(tmp_path / "ours", dtype) as ours:
        ours.add(np.array([1, 2, 3, 7]), np.array([3, 1]))
        ours.add(np.array([200, 0, 4, 5]), np.array([4]))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (
            tmp_path / f"theirs.{suffix}"
        ).read_bytes()

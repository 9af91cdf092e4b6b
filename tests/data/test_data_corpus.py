from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data.corpus import FORMAT_VERSION, CorpusSpec, build_corpus


def documents(prefix) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def texts(corpus, prefix) -> list[str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_dir / "tokenizer.json"))
    return [tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in documents(prefix)]


def file_times(folder) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_every_file_is_one_document_on_one_side_and_comes_back_exactly(corpus, shared_tree):
    train, validation = (
        texts(corpus, prefix) for prefix in (corpus.train_prefix, corpus.validation_prefix)
    )
    assert train
    assert validation
    assert not set(train) & set(validation)
    sources = [path.read_text() for path in shared_tree.rglob("*.cpp")]
    assert Counter(train + validation) == Counter(sources)


def test_documents_end_in_the_only_end_token_and_are_16_bits_wide(corpus):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for prefix in (corpus.train_prefix, corpus.validation_prefix):
        assert IndexedDataset(str(prefix)).index.dtype == np.uint16
        for ids in documents(prefix):
            assert ids[-1] == 0
            assert 0 not in ids[:-1]


def test_the_manifest_counts_what_is_there(corpus, shared_tree):
    splits = corpus.manifest["splits"]
    for name, prefix in (("train", corpus.train_prefix), ("validation", corpus.validation_prefix)):
        found = documents(prefix)
        assert splits[name]["documents"] == splits[name]["files"] == len(found)
        assert splits[name]["tokens"] == corpus.tokens(name) == sum(map(len, found))
        size_bytes = sum(len(text.encode()) for text in texts(corpus, prefix))
        assert splits[name]["source_bytes"] == size_bytes
        assert corpus.bytes_per_token(name) == pytest.approx(size_bytes / sum(map(len, found)))
    assert corpus.manifest["spec"]["root"] == str(shared_tree)
    assert corpus.manifest["tokenizer"]["vocab_size"] == 300
    assert set(corpus.manifest["files"]) >= {"train.bin", "train.idx", "tokenizer/tokenizer.json"}


def test_two_builds_give_the_same_bytes(make_spec, tmp_path):
    first, second = (
        build_corpus(make_spec(), tmp_path / name, progress=False) for name in ("one", "two")
    )
    assert first.folder != second.folder
    assert first.folder.name == second.folder.name
    names = sorted(p.relative_to(first.folder) for p in first.folder.rglob("*") if p.is_file())
    assert len(names) >= 8
    for name in names:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()


def test_a_second_call_loads_and_writes_nothing(make_spec, tmp_path):
    first = build_corpus(make_spec(), tmp_path / "cache", progress=False)
    before = file_times(first.folder)
    second = build_corpus(make_spec(), tmp_path / "cache", progress=False)
    assert second == first
    assert file_times(first.folder) == before


def test_the_key_follows_content_and_settings_and_not_the_place(make_spec, tree, tmp_path):
    def key(**changes):
        return build_corpus(make_spec(**changes), tmp_path / "c", progress=False).folder.name

    first = key()
    assert key(vocab_size=301) != first
    assert key(seed=5) != first
    moved = tree.rename(tree.parent / "moved")
    assert key(root=moved) == first
    (moved / "part0" / "unit000.cpp").write_text("int edited;")
    assert key(root=moved) != first


def test_unusable_files_are_in_the_manifest(make_spec, tree, tmp_path):
    (tree / "empty.h").touch()
    (tree / "blob.h").write_bytes(b"\0\1")
    corpus = build_corpus(make_spec(), tmp_path / "c", progress=False)
    assert corpus.manifest["skipped"] == {"empty": 1, "not_text": 1}


def test_a_literal_end_token_in_a_source_does_not_split_it(make_spec, tree, tmp_path):
    trap = 'const char* end = "<|endoftext|><|fim_pad|>";\n'
    for number in range(3):
        (tree / f"trap{number}.cpp").write_text(f"// {number}\n" + trap)
    corpus = build_corpus(make_spec(), tmp_path / "c", progress=False)
    found = documents(corpus.train_prefix) + documents(corpus.validation_prefix)
    assert len(found) == 27
    assert all(min(ids[:-1]) > 4 for ids in found)


def test_the_tokenizer_sees_training_files_only(make_spec, tree, tmp_path):
    spec = make_spec()
    before = build_corpus(spec, tmp_path / "c", progress=False)
    held_back = texts(before, before.validation_prefix)
    for path in tree.rglob("*.cpp"):
        if path.read_text() in held_back:
            path.write_text("zzzz_held_back " * 500 + path.name)
    after = build_corpus(spec, tmp_path / "c", progress=False)
    assert after.folder != before.folder
    assert after.manifest["tokenizer"] == before.manifest["tokenizer"]


def test_the_user_cache_is_the_default(make_spec, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    corpus = build_corpus(make_spec(), progress=False)
    assert corpus.folder.parent == tmp_path / "xdg" / "megacpp_nemo" / "corpora"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    corpus = build_corpus(make_spec(), progress=False)
    assert corpus.folder.is_relative_to(tmp_path / "home" / ".cache" / "megacpp_nemo")


def test_progress_is_shown_on_stderr_by_the_first_rank_only(
    make_spec, tmp_path, capfd, monkeypatch
):
    def shown(name: str, **settings) -> str:
        build_corpus(make_spec(), tmp_path / name, **settings)
        out, err = capfd.readouterr()
        assert out == ""
        return err

    err = shown("a")
    assert "encoding" in err
    assert "joining the parts: 100%" in err
    assert shown("b", progress=False) == ""
    monkeypatch.setenv("RANK", "1")
    assert shown("c") == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 100}, "at least 261"),
        ({"validation_fraction": 0.0}, "strictly between"),
        ({"root": "/no/such/folder"}, "does not exist"),
    ],
)
def test_bad_settings_are_data_errors(make_spec, tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        build_corpus(make_spec(**changes), tmp_path / "c", progress=False)


def test_one_usable_file_is_too_few_and_leaves_nothing(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "only.h").write_text("int x;")
    with pytest.raises(DataError, match="cannot be divided"):
        build_corpus(CorpusSpec(root=tmp_path / "src"), tmp_path / "c", progress=False)
    assert list((tmp_path / "c" / "corpora").iterdir()) == []


def test_the_manifest_is_plain_json(corpus):
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    assert manifest["schema_version"] == FORMAT_VERSION
    assert manifest["splits"] == corpus.manifest["splits"]

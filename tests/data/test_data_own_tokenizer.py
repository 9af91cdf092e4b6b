"""A corpus encoded with a tokenizer that is already there."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data.corpus import Corpus, build_corpus
from megacpp_nemo.data.tokenizer import load_trained


@pytest.fixture
def tokenizer_dir(corpus: Corpus, tmp_path: Path) -> Path:
    """A copy of another corpus's tokenizer, with a file beside it that is none of its own."""
    folder = shutil.copytree(corpus.tokenizer_dir, tmp_path / "tokenizer")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def eos_is_9(tokenizer_dir: Path) -> Path:
    """The same tokenizer, ending documents in the ordinary token 9."""
    path = tokenizer_dir / "tokenizer_config.json"
    config = json.loads(path.read_text())
    vocabulary = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]["vocab"]
    config["eos_token"] = next(token for token, number in vocabulary.items() if number == 9)
    path.write_text(json.dumps(config))
    (tokenizer_dir / "special_tokens_map.json").unlink(missing_ok=True)
    return tokenizer_dir


def documents(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_the_files_are_encoded_with_it_and_it_is_copied_with_nothing_else(
    make_spec: Callable, tokenizer_dir: Path, tmp_path: Path
):
    built = build_corpus(make_spec(tokenizer_dir=tokenizer_dir), tmp_path / "c", progress=False)
    names = {path.name for path in built.tokenizer_dir.iterdir()}
    assert names == {path.name for path in tokenizer_dir.iterdir()} - {"model.safetensors"}
    for name in names:
        assert (built.tokenizer_dir / name).read_bytes() == (tokenizer_dir / name).read_bytes()
    tokenizer, end = load_trained(tokenizer_dir)
    assert (end, built.manifest["tokenizer"]["vocab_size"]) == (0, 300)
    sources = {path.read_text() for path in (tmp_path / "src").rglob("*.cpp")}
    found = documents(built.train_prefix) + documents(built.validation_prefix)
    assert {tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in found} == sources


def test_documents_end_in_its_own_end_token(make_spec, eos_is_9, tmp_path):
    built = build_corpus(make_spec(tokenizer_dir=eos_is_9), tmp_path / "c", progress=False)
    assert {ids[-1] for ids in documents(built.train_prefix)} == {9}


def test_the_key_follows_its_content_and_not_its_place_nor_the_vocab_size(
    make_spec, tokenizer_dir, tmp_path
):
    def key(**changes) -> str:
        return build_corpus(make_spec(**changes), tmp_path / "c", progress=False).folder.name

    first = key(tokenizer_dir=tokenizer_dir)
    assert first != key()
    assert first == key(tokenizer_dir=tokenizer_dir, vocab_size=5)
    moved = tokenizer_dir.rename(tmp_path / "moved")
    assert first == key(tokenizer_dir=str(moved))
    path = moved / "tokenizer_config.json"
    path.write_text(path.read_text().replace("}", ' ,"note": 1}', 1))
    assert first != key(tokenizer_dir=moved)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "holds no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be loaded"),
        (
            lambda folder: [
                (folder / name).write_text("{}")
                for name in ("tokenizer_config.json", "special_tokens_map.json")
            ],
            "no end-of-document token",
        ),
    ],
)
def test_an_unusable_tokenizer_is_an_error_before_anything_is_written(
    make_spec, tokenizer_dir, tmp_path, damage, message
):
    damage(tokenizer_dir)
    with pytest.raises(DataError, match=message):
        build_corpus(make_spec(tokenizer_dir=tokenizer_dir), tmp_path / "c", progress=False)
    assert not (tmp_path / "c").exists()


def test_the_data_module_serves_rows_in_its_tokens(eos_is_9, shared_tree, tmp_path):
    module = importlib.import_module("megacpp_nemo.data.module")
    data = module.CppDataModule(
        root=str(shared_tree),
        tokenizer_dir=str(eos_is_9),
        validation_fraction=0.25,
        seq_length=32,
        cache_dir=str(tmp_path / "c"),
    )
    assert (data.tokenizer.vocab_size, data.tokenizer.eod) == (300, 9)
    data.build(4, 2, 2, 1.0)
    row = next(row for row in data._train_ds if (row["document_ids"] > 0).any())
    ends = (row["tokens"][:-1] == 9).nonzero().flatten().tolist()
    starts = row["document_ids"].diff().nonzero().flatten().tolist()
    assert starts == ends

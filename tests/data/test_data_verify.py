"""What a verification says of corpora that are damaged in one place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data.cache import write_manifest
from megacpp_nemo.data.channels import check_channels
from megacpp_nemo.data.corpus import Corpus, CorpusSpec, build_folder
from megacpp_nemo.data.indexed import open_indexed, read_elements
from megacpp_nemo.data.indexed_writer import IndexedWriter
from megacpp_nemo.data.verify import verify_folder
from megacpp_nemo.syntax import table
from tests.data.trees import write_tree


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Corpus:
    root = write_tree(tmp_path_factory.mktemp("sources") / "src", files=8)
    (root / "odd.h").write_text("// größe 数\nclass A { int b; };\n } ? {\n", encoding="utf-8")
    spec = CorpusSpec(root=root, vocab_size=300, validation_fraction=0.25, structure="all")
    out = tmp_path_factory.mktemp("built") / "corpus"
    return build_folder(spec, out, progress=False, workers=1)


@pytest.fixture
def copied(built: Corpus, tmp_path: Path) -> Path:
    return shutil.copytree(built.folder, tmp_path / "copied")


def seal(folder: Path, **changes) -> None:
    """Make checksums fit what is there, so that only the content can be wrong."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    del manifest["checksum"], manifest["files"]
    for name, value in changes.items():
        part, last = name.split("__")
        manifest[part][last] = value
    write_manifest(folder, manifest)


def rewrite(folder: Path, name: str, change) -> None:
    """Write an indexed file again with one of its documents changed."""
    lengths = open_indexed(folder / name).sequence_lengths.copy()
    elements = np.array(read_elements(folder / name))
    documents = change(np.split(elements, np.cumsum(lengths)[:-1]))
    with IndexedWriter(folder / name, elements.dtype) as writer:
        for document in documents:
            writer.add(np.asarray(document), np.array([len(document)]))
    seal(folder)


def shorter(documents: list) -> list:
    return [*documents[:2], documents[2][:-1], *documents[3:]]


def with_id(value: int):
    def change(documents: list) -> list:
        documents[1][3] = value
        return documents

    return change


def test_a_good_corpus_has_no_findings_and_all_is_counted(built):
    found = verify_folder(built.folder, reparse=100)
    assert found.findings == ()
    assert found.ok
    assert found.documents == found.reparsed == 9
    assert found.not_reparsed == 0
    assert found.tokens == built.tokens("train") + built.tokens("validation")
    assert found.channels == built.channels
    sizes = [path.stat().st_size for path in built.folder.rglob("*") if path.is_file()]
    assert found.checked_bytes == sum(sizes) - (built.folder / "manifest.json").stat().st_size


@pytest.mark.parametrize("name", ["train.bin", "train.category.bin", "documents.json"])
def test_a_flipped_byte_in_any_file_is_found(copied, name):
    content = bytearray((copied / name).read_bytes())
    content[-9] ^= 1
    (copied / name).write_bytes(content)
    assert f"{name} does not match its hash." in verify_folder(copied).findings


def test_a_channel_one_element_short_names_channel_and_document(copied, built):
    rewrite(copied, "train.ast_depth", shorter)
    (finding,) = verify_folder(copied).findings
    assert "The channel ast_depth of train has" in finding
    assert f"document 2 ({built.documents('train')[2]})" in finding
    with pytest.raises(DataError, match="ast_depth does not fit"):
        check_channels(str(copied / "train"), built.channels)


def test_a_channel_with_a_document_less_is_found(copied, built):
    rewrite(copied, "validation.category", lambda documents: documents[:-1])
    (finding,) = verify_folder(copied).findings
    assert "The channel category of validation has" in finding
    with pytest.raises(DataError, match="category does not fit"):
        check_channels(str(copied / "validation"), built.channels)


def test_a_file_cut_off_by_one_element_is_found(copied, built):
    path = copied / "train.node_type.bin"
    path.write_bytes(path.read_bytes()[:-2])
    findings = verify_folder(copied).findings
    assert any("The channel node_type of train cannot be read" in text for text in findings)
    with pytest.raises(DataError, match=r"damaged or incomplete(.|\n)*train\.node_type\.bin"):
        check_channels(str(copied / "train"), built.channels)


def test_many_documents_that_differ_are_told_in_part(copied):
    rewrite(copied, "train.category", lambda documents: [ids[:-1] for ids in documents])
    findings = verify_folder(copied).findings
    assert len(findings) == 6
    assert "more documents" in findings[-1]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train.category", 10, r"channel category of train: 1 id is out of range \(0 to 9\)"),
        ("train.node_type", 257, r"channel node_type of train: 1 id is .*\(0 to 256\).*257"),
        ("train", 300, r"The tokens of train: 1 id is out of range \(0 to 299\).*300"),
    ],
)
def test_an_id_out_of_range_is_found_and_its_document_named(copied, built, name, value, message):
    rewrite(copied, name, with_id(value))
    import re

    (finding,) = verify_folder(copied).findings
    assert re.search(message, finding)
    assert f"document 1 ({built.documents('train')[1]})" in finding


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("train", "tokens"),
        ("train.category", "1 ids of category"),
        ("train.ast_depth", "ast_depth"),
    ],
)
def test_what_the_sources_do_not_give_is_found_by_reparsing(copied, built, name, shown):
    def change(documents: list) -> list:
        documents[1][3] = 5 if documents[1][3] != 5 else 6
        return documents

    rewrite(copied, name, change)
    assert verify_folder(copied).ok
    (finding,) = verify_folder(copied, reparse=9).findings
    assert f"Document 1 of train ({built.documents('train')[1]}) is not what" in finding
    assert shown in finding


def test_sources_that_are_gone_or_changed_are_counted_not_found_wrong(copied, built, tmp_path):
    root = shutil.copytree(built.manifest["spec"]["root"], tmp_path / "src")
    (root / built.documents("train")[0]).write_text("int other;\n")
    (root / built.documents("train")[1]).unlink()
    seal(copied, spec__root=str(root))
    found = verify_folder(copied, reparse=9)
    assert (found.ok, found.reparsed, found.not_reparsed) == (True, 7, 2)
    assert verify_folder(copied, reparse=3).reparsed <= 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure__mapping_version": 99}, "mapping version 99, this package's mapping is"),
        ({"tokenizer__sha256": "0" * 64}, "encoded with another tokenizer"),
        ({"splits__train": {"documents": 3, "tokens": 4}}, "the manifest says 4 in 3"),
        ({"structure__channels": ["category", "colour"]}, "colour"),
        ({"structure__channels": 3}, "cannot be understood"),
        ({"splits__train": None}, "cannot be understood"),
    ],
)
def test_a_manifest_that_says_something_else_is_found(copied, changes, message):
    seal(copied, **changes)
    assert any(message in finding for finding in verify_folder(copied, reparse=2).findings)


def test_another_version_of_the_package_finds_the_mapping_old(built, monkeypatch):
    monkeypatch.setattr(table, "MAPPING_VERSION", table.MAPPING_VERSION + 1)
    (finding,) = verify_folder(built.folder).findings
    assert "mapping version" in finding


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text('{"files": 3}'),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "train.idx").write_bytes(b"MMIDIDX"),
        lambda folder: (folder / "documents.json").write_text("[]"),
        lambda folder: (folder / "documents.json").unlink(),
        lambda folder: [shutil.rmtree(folder / "tokenizer"), (folder / "train.bin").unlink()],
    ],
)
def test_any_damage_is_a_finding_and_no_traceback(copied, damage):
    damage(copied)
    found = verify_folder(copied, reparse=2)
    assert found.findings
    assert all(text.endswith((".", ")")) for text in found.findings)


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no corpus folder"):
        verify_folder(tmp_path / "none")

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data.blend import blend_tokens, normalized_paths
from megacpp_nemo.data.indexed import fingerprint, open_indexed


@pytest.fixture
def prefix(write_indexed, documents) -> str:
    return write_indexed("text", documents(40))


def test_the_counts_are_those_of_the_documents(prefix, documents):
    lengths = [len(ids) for ids in documents(40)]
    file = open_indexed(prefix)
    assert file.sequence_lengths.tolist() == lengths
    assert file.tokens() == sum(lengths)
    assert file.tokens(0.5, 0.75) == sum(lengths[20:30])


def test_missing_files_are_named_exactly(prefix, tmp_path):
    with pytest.raises(DataError, match=r"given: +\S*none\.bin, \S*none\.idx\n"):
        open_indexed(tmp_path / "none")
    os.unlink(prefix + ".idx")
    with pytest.raises(DataError, match=r"given: +\S*text\.idx\n"):
        open_indexed(prefix)


@pytest.mark.parametrize(
    ("suffix", "content", "reason"),
    [
        (".idx", b"", "does not start as a Megatron index"),
        (".idx", b"not an index file, only a text of this length", "does not start as"),
        (".idx", b"MMIDIDX\0\0" + b"\7" * 25, "unknown version"),
        (".bin", b"", "0 bytes instead of"),
    ],
)
def test_damaged_files_are_data_errors(prefix, suffix, content, reason):
    Path(prefix + suffix).write_bytes(content)
    with pytest.raises(DataError, match=rf"damaged or incomplete(.|\n)*{reason}"):
        open_indexed(prefix)


def test_an_index_cut_short_is_a_data_error(prefix):
    os.truncate(prefix + ".idx", os.path.getsize(prefix + ".idx") - 1)
    with pytest.raises(DataError, match="bytes instead of"):
        open_indexed(prefix)


def test_a_rewritten_file_has_another_fingerprint(prefix, write_indexed, documents):
    before = fingerprint([prefix])
    assert fingerprint([prefix]) == before
    write_indexed("text", documents(41))
    assert fingerprint([prefix]) != before


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ("a", ["a"]),
        (Path("a"), ["a"]),
        (["a", "b"], ["a", "b"]),
        ((30, "a", "70.5", Path("b")), ["30", "a", "70.5", "b"]),
        (
            {"train": ["1", "a"], "validation": "b"},
            {"train": ["1", "a"], "validation": ["b"], "test": ["b"]},
        ),
    ],
)
def test_every_form_of_paths_that_nemo_takes(paths, expected):
    assert normalized_paths(paths) == expected


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (None, r"data\.paths=/data/cpp_text_document"),
        ([], r"data\.paths="),
        (5, "form that is not known"),
        (["30", "a", "b"], "do not alternate"),
        (["a", "30"], "do not alternate"),
        (["0", "a"], "above 0"),
        ({"train": "a"}, "train and validation"),
        ({"train": "a", "validation": "b", "valid": "c"}, "train and validation"),
    ],
)
def test_bad_paths_are_data_errors(paths, message):
    with pytest.raises(DataError, match=message):
        normalized_paths(paths)


def test_tokens_are_counted_over_the_blend(write_indexed, documents):
    a, b = write_indexed("a", documents(20, seed=1)), write_indexed("b", documents(60, seed=2))
    total = {name: open_indexed(name).tokens() for name in (a, b)}
    counts, prefixes = blend_tokens(
        {"train": ["1", a, "2", b], "validation": [b], "test": [a]}, "", seq_length=8
    )
    assert counts == {"train": total[a] + total[b], "validation": total[b], "test": total[a]}
    assert prefixes == sorted([a, b])
    counts, _ = blend_tokens([a, b], "50,50", seq_length=8)
    assert counts["train"] + counts["validation"] == total[a] + total[b]
    assert counts["test"] == 0


@pytest.mark.parametrize("split", ["", "a,b", "90", "0,1", "1,0,0", "1,1,1,1", "-1,2", None])
def test_a_bad_split_is_a_data_error(prefix, split):
    with pytest.raises(DataError, match="split cannot be read"):
        blend_tokens([prefix], split, seq_length=8)


def test_a_part_shorter_than_a_row_is_a_data_error(prefix):
    with pytest.raises(DataError, match="The test data is shorter than one row"):
        blend_tokens([prefix], "980,19,1", seq_length=8)

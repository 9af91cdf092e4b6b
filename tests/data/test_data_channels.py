"""Rows with structure channels, and channel files that cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
from megacpp_nemo.data.fim import Fim, Sentinels
from tests.support.processes import in_process

# A channel that is a function of the token shows where a row took it from.
PAINT = {"category": lambda token: token % 10, "node_type": lambda token: (token * 7) % 257}
STATUS = Path("/proc/self/status")
SENTINELS = Sentinels(prefix=1, middle=2, suffix=3)


@pytest.fixture
def painted(write_indexed, documents):
    """Return `make(documents)`: the prefix of tokens with both channels beside them."""

    def make(texts=None):
        texts = documents(60) if texts is None else texts
        prefix = write_indexed("text", texts)
        for name, paint in PAINT.items():
            kind = "uint16" if name == "node_type" else "uint8"
            write_indexed(f"text.{name}", [[paint(token) for token in ids] for ids in texts], kind)
        return prefix

    return make


@pytest.fixture
def serve(make_rows):
    def make(prefix, seq_length, **config):
        from megacpp_nemo.data.dataset import DocumentDataset

        return make_rows(DocumentDataset, prefix, seq_length, channels=tuple(PAINT), **config)

    return make


def check_channels_of(row, added=()):
    assert list(row["structure"]) == list(PAINT)
    tokens = row["tokens"]
    stored = ~torch.isin(tokens, torch.tensor(added))
    for name, paint in PAINT.items():
        ids = row["structure"][name]
        assert ids.dtype == torch.int64
        assert torch.equal(ids[stored], paint(tokens[stored]))
        assert (ids[~stored] == STRUCTURE_CHANNELS[name]).all()
    return int((~stored).sum())


@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize("seq_length", [2, 16, 100])
def test_channels_are_those_of_the_rows_tokens(painted, serve, seq_length, extra):
    rows = serve(painted(), seq_length, samples=120, add_extra_token_to_sequence=extra)
    for index in [*range(len(rows)), None]:
        check_channels_of(rows[index])
    batch = torch.utils.data.default_collate([rows[0], rows[1]])
    assert batch["structure"]["node_type"].shape == (2, seq_length)


def test_channels_change_nothing_else(painted, serve, make_rows):
    from megacpp_nemo.data.dataset import DocumentDataset

    prefix = painted()
    plain, rows = make_rows(DocumentDataset, prefix, 16), serve(prefix, 16)
    # The order is one and the same file.
    assert plain.unique_description_hash == rows.unique_description_hash
    for index in range(len(rows)):
        row, expected = rows[index], plain[index]
        assert {name for name in row if name not in expected} == {"structure"}
        assert all(torch.equal(row[name], value) for name, value in expected.items())


def test_permuted_documents_keep_their_channels(painted, serve, documents):
    texts = documents(80)
    fim = Fim(rate=0.6, spm_rate=0.5, sentinels=SENTINELS)
    rows = serve(painted(texts), 16, fim=fim)
    added = sum(check_channels_of(rows[i], (1, 2, 3)) for i in range(len(rows)))
    assert added > 80
    served = sum(len(ids) for ids in texts) + 3 * round(added / 3)
    assert abs(len(rows) * 16 - served) < 32
    for row in (rows[i] for i in range(len(rows))):
        ends = (row["tokens"] == 0).long().cumsum(0)
        assert torch.equal(row["document_ids"][1:], ends[:-1])


def test_only_training_is_permuted_and_the_order_is_named_by_it(painted, serve):
    from megatron.core.datasets.utils import Split

    prefix = painted()
    fim = Fim(rate=1.0, spm_rate=0.5, sentinels=SENTINELS)
    held_back = serve(prefix, 16, fim=fim, index_split=Split.valid)
    plain = serve(prefix, 16, index_split=Split.valid)
    assert len(held_back) == len(plain)
    assert all(torch.equal(held_back[i]["tokens"], plain[i]["tokens"]) for i in range(len(plain)))
    other = Fim(rate=0.5, spm_rate=0.5, sentinels=SENTINELS)
    names = {
        serve(prefix, 16, **settings).unique_description_hash
        for settings in ({}, {"fim": fim}, {"fim": other}, {"fim": fim, "random_seed": 2})
    }
    assert len(names) == 4


def test_padding_is_absent_and_a_document_of_its_own(painted, serve):
    from megatron.core.datasets.utils import Split

    prefix = painted([[7, 8, 9, 0], [11, 12, 13, 0]])
    rows = serve(prefix, 5, index_split=Split.valid, drop_last_partial_validation_sequence=False)
    # Eight tokens in rows of five, the label of a row's last position being the next row's first.
    last = next(row for row in (rows[i] for i in range(2)) if row["loss_mask"][-1] == 0)
    assert last["document_ids"].tolist() == [0, 0, 0, 1, 1]
    for name, paint in PAINT.items():
        ids = last["structure"][name]
        assert torch.equal(ids[:3], paint(last["tokens"][:3]))
        assert (ids[3:] == STRUCTURE_CHANNELS[name]).all()


def test_documents_longer_than_a_row_and_empty_ones(painted, serve):
    texts = [[*range(5, 205), 0], [0], [9, 0], [0], [], [*range(5, 105), 0]]
    rows = serve(painted(texts), 16)
    seen = []
    for index in range(len(rows)):
        check_channels_of(rows[index])
        ids = rows[index]["document_ids"]
        assert ids[0] == 0
        assert set((ids[1:] - ids[:-1]).tolist()) <= {0, 1}
        seen += rows[index]["tokens"].tolist()
    assert seen.count(9) >= 2
    assert len(seen) > 280


def test_ids_a_channel_does_not_have_are_told_with_the_file(painted, write_indexed, serve):
    prefix = painted([[5, 6, 7, 0]] * 9)
    write_indexed("text.category", [[0, 1, 10, 2]] * 9, "uint8")
    with pytest.raises(
        DataError, match=r"category(.|\n)*text\.category\.bin: 10(.|\n)*0 to 8, and 9"
    ):
        serve(prefix, 8)[0]
    write_indexed("text.category", [[0, 1, -1, 2]] * 9, "int8")
    with pytest.raises(DataError, match=r"text\.category\.bin: -1"):
        serve(prefix, 8)[0]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([[1, 2, 3, 4]] * 8, "8 sequences, the tokens have 9"),
        ([[1, 2, 3, 4]] * 8 + [[1, 2, 3]], "sequence 8 has 3 ids for 4 tokens"),
    ],
)
def test_a_channel_that_is_not_aligned_is_a_data_error(painted, write_indexed, serve, wrong, said):
    prefix = painted([[5, 6, 7, 0]] * 9)
    write_indexed("text.node_type", wrong, "uint16")
    with pytest.raises(DataError, match=rf"node_type does not fit(.|\n)*{said}"):
        serve(prefix, 8)


def test_a_channel_one_byte_short_or_missing_is_a_data_error(painted, serve, tmp_path):
    prefix = painted()
    data = tmp_path / "text.category.bin"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"text\.category\.bin: [\d,]+ bytes instead of"):
        serve(prefix, 8)
    data.unlink()
    (tmp_path / "text.node_type.idx").unlink()
    with pytest.raises(DataError, match=r"missing beside the tokens: category, node_type"):
        serve(prefix, 8)


def anonymous_mib():
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def serve_large(make_rows, prefix, seq_length):
    """Return how much a process grows that opens a corpus and serves some of it, in MiB."""
    from megacpp_nemo.data.dataset import DocumentDataset

    make_rows(DocumentDataset, prefix, seq_length, channels=("category",))
    before = anonymous_mib()
    rows = make_rows(DocumentDataset, prefix, seq_length, channels=("category",))
    for index in range(0, len(rows), 4):
        rows[index]
    for order in (rows.document_index, rows.sample_index, rows.shuffle_index):
        assert isinstance(order, np.memmap)
    return anonymous_mib() - before


@pytest.mark.skipif(not STATUS.exists(), reason=f"memory is read off {STATUS}, which Linux has")
def test_memory_does_not_grow_with_the_corpus(make_rows, tmp_path):
    grown = {}
    for documents in (4, 64):
        prefix = write_zeros(tmp_path / f"zeros{documents}", documents, tokens=1 << 20)
        grown[documents] = in_process(serve_large, make_rows, prefix, 4096)
    # The large one holds 128 MiB of tokens and 64 MiB of ids.
    assert grown[64] - grown[4] < 8, grown


def write_zeros(path, documents, tokens):
    """Write sparse files of equal documents, tokens and one channel, and return the prefix."""
    from megatron.core.datasets.indexed_dataset import DType, _IndexWriter

    lengths = [tokens] * documents
    for suffix, dtype in (("", np.uint16), (".category", np.uint8)):
        with open(f"{path}{suffix}.bin", "wb") as data:
            data.truncate(documents * tokens * DType.size(dtype))
        with _IndexWriter(f"{path}{suffix}.idx", dtype) as index:
            index.write(lengths, None, list(range(documents + 1)))
    return str(path)

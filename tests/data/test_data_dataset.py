from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

EOD = 0


def plain_document_ids(tokens: list[int]) -> list[int]:
    """The definition, one position at a time."""
    ids, current = [], 0
    for token in tokens:
        ids.append(current)
        if token == EOD:
            current += 1
    return ids


@pytest.fixture
def build(tmp_path):
    """Return `make(cls, prefix, seq_length, **config)` over a whole indexed file."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    def make(cls, prefix, seq_length, samples=None, pad=4, index_split=Split.train, **config):
        tokenizer = SimpleNamespace(
            eod=EOD, eos=EOD, pad=pad, vocab_size=256, unique_identifiers=OrderedDict()
        )
        settings = {
            "reset_position_ids": False,
            "reset_attention_mask": False,
            "eod_mask_loss": False,
            "create_attention_mask": False,
            **config,
        }
        indexed = IndexedDataset(prefix)
        return cls(
            indexed,
            prefix,
            np.arange(len(indexed), dtype=np.int32),
            samples,
            index_split,
            GPTDatasetConfig(
                random_seed=1,
                sequence_length=seq_length,
                tokenizer=tokenizer,
                path_to_cache=str(tmp_path / "orders"),
                blend=([prefix], None),
                split="1",
                **settings,
            ),
        )

    return make


@pytest.mark.parametrize("seq_length", [2, 16, 64])
def test_document_ids_follow_the_end_tokens(build, write_indexed, documents, seq_length):
    from megacpp_nemo.data.dataset import DocumentDataset

    dataset = build(DocumentDataset, write_indexed("text", documents(60)), seq_length, samples=150)
    several = 0
    for index in range(len(dataset)):
        row = dataset[index]
        assert row["document_ids"].dtype == torch.int64
        assert row["document_ids"].tolist() == plain_document_ids(row["tokens"].tolist())
        several += int(row["document_ids"][-1] > 0)
    assert several > 10


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"create_attention_mask": True},
        {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True},
        {"add_extra_token_to_sequence": False},
    ],
)
def test_everything_else_is_as_upstream_makes_it(build, write_indexed, documents, config):
    from megatron.core.datasets.gpt_dataset import GPTDataset

    from megacpp_nemo.data.dataset import DocumentDataset

    prefix = write_indexed("text", documents(30))
    ours = build(DocumentDataset, prefix, 16, **config)
    upstream = build(GPTDataset, prefix, 16, **config)
    assert len(ours) == len(upstream) > 5
    for index in [*range(len(ours)), None]:
        row, expected = ours[index], upstream[index]
        assert set(row) == {*expected, "document_ids"}
        for name, value in expected.items():
            assert torch.equal(row[name], value)
        assert row["document_ids"].tolist() == plain_document_ids(row["tokens"].tolist())


@pytest.mark.parametrize("pad", [4, EOD])
def test_padding_written_as_token_zero_starts_no_documents(build, write_indexed, pad):
    from megatron.core.datasets.utils import Split

    from megacpp_nemo.data.dataset import DocumentDataset

    prefix = write_indexed("text", [[7, 8, 9, EOD], [11, 12, 13, 14]])
    dataset = build(
        DocumentDataset,
        prefix,
        5,
        pad=pad,
        index_split=Split.valid,
        drop_last_partial_validation_sequence=False,
    )
    rows = {tuple(row["tokens"].tolist()): row for row in (dataset[i] for i in range(2))}
    padded = [row for row in rows.values() if row["loss_mask"][-1] == 0]
    assert len(rows) == 2
    assert len(padded) == 1
    real = int(padded[0]["loss_mask"].sum())
    ids = padded[0]["document_ids"].tolist()
    assert ids[: real + 1] == plain_document_ids(padded[0]["tokens"].tolist()[: real + 1])
    assert len(set(ids[real + 1 :])) <= 1


def test_rows_collate_into_a_batch(build, write_indexed, documents):
    from megacpp_nemo.data.dataset import DocumentDataset

    dataset = build(DocumentDataset, write_indexed("text", documents(30)), 16)
    batch = torch.utils.data.default_collate([dataset[0], dataset[1]])
    assert batch["document_ids"].shape == (2, 16)

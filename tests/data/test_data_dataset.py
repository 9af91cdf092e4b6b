from __future__ import annotations

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


@pytest.mark.parametrize("seq_length", [2, 16, 64])
def test_document_ids_follow_the_end_tokens(make_rows, write_indexed, documents, seq_length):
    from megacpp_nemo.data.dataset import DocumentDataset

    dataset = make_rows(
        DocumentDataset, write_indexed("text", documents(60)), seq_length, samples=150
    )
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
def test_everything_else_is_as_upstream_makes_it(make_rows, write_indexed, documents, config):
    from megatron.core.datasets.gpt_dataset import GPTDataset

    from megacpp_nemo.data.dataset import DocumentDataset

    prefix = write_indexed("text", documents(30))
    ours = make_rows(DocumentDataset, prefix, 16, **config)
    upstream = make_rows(GPTDataset, prefix, 16, **config)
    assert len(ours) == len(upstream) > 5
    for index in [*range(len(ours)), None]:
        row, expected = ours[index], upstream[index]
        assert set(row) == {*expected, "document_ids"}
        for name, value in expected.items():
            assert torch.equal(row[name], value)
        assert row["document_ids"].tolist() == plain_document_ids(row["tokens"].tolist())


@pytest.mark.parametrize("pad", [4, EOD])
def test_padding_written_as_token_zero_starts_no_documents(make_rows, write_indexed, pad):
    from megatron.core.datasets.utils import Split

    from megacpp_nemo.data.dataset import DocumentDataset

    prefix = write_indexed("text", [[7, 8, 9, EOD], [11, 12, 13, 14]])
    dataset = make_rows(
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


def test_rows_collate_into_a_batch(make_rows, write_indexed, documents):
    from megacpp_nemo.data.dataset import DocumentDataset

    dataset = make_rows(DocumentDataset, write_indexed("text", documents(30)), 16)
    batch = torch.utils.data.default_collate([dataset[0], dataset[1]])
    assert batch["document_ids"].shape == (2, 16)

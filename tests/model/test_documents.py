"""Document boundaries against plain loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.model.documents import (
    DocumentBoundaries,
    attention_within_documents,
    document_ids_of,
)


class Config:
    def __init__(self, reset_state: bool = True, reset_attention_mask: bool = False) -> None:
        self.reset_state, self.reset_attention_mask = reset_state, reset_attention_mask


@st.composite
def packed_ids(draw) -> list[list[int]]:
    """Rows of one length whose ids may come back, as those of a sliced corpus do."""
    length = draw(st.integers(1, 9))
    row = st.lists(st.sampled_from([0, 1, 7]), min_size=length, max_size=length)
    return draw(st.lists(row, min_size=1, max_size=3))


def counted(row: list[int]) -> list[int]:
    index = [0]
    for before, now in itertools.pairwise(row):
        index.append(index[-1] + (now != before))
    return index


@given(packed_ids())
@settings(deadline=None, max_examples=60)
def test_the_sequence_index_counts_documents_from_zero_in_each_row(rows):
    found = DocumentBoundaries.from_ids(torch.tensor(rows)).sequence_index()
    assert found.dtype == torch.int32
    assert found.tolist() == [counted(row) for row in rows]


@given(packed_ids())
@settings(deadline=None, max_examples=60)
def test_the_mask_hides_later_tokens_and_other_documents(rows):
    mask = DocumentBoundaries.from_ids(torch.tensor(rows)).attention_mask()
    length = len(rows[0])
    assert mask.shape == (len(rows), 1, length, length)
    for b, row in enumerate(rows):
        index = counted(row)
        for query in range(length):
            for key in range(length):
                sees = key <= query and index[key] == index[query]
                assert bool(mask[b, 0, query, key]) is not sees


def test_boundaries_say_that_activations_keep_their_shape():
    boundaries = DocumentBoundaries.from_ids(torch.zeros(2, 5, dtype=torch.int64))
    assert isinstance(boundaries, PackedSeqParams)
    assert boundaries.qkv_format == "sbhd"
    assert boundaries.max_seqlen_q == boundaries.max_seqlen_kv == 5


def test_recurrent_layers_get_the_documents_where_the_state_is_reset():
    ids = torch.tensor([[0, 0, 1]])
    boundaries = DocumentBoundaries.from_ids(ids)
    assert document_ids_of(Config(), boundaries) is ids
    assert document_ids_of(Config(reset_state=False), boundaries) is None
    assert document_ids_of(Config(), None) is None


def test_megatrons_own_packing_is_refused_by_name():
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 3, 5]))
    with pytest.raises(RuntimeRefusal, match=r"thd[\s\S]*rows of shape \[batch, seq\]"):
        document_ids_of(Config(), packed)


def test_attention_gets_boundaries_as_a_mask_only():
    boundaries = DocumentBoundaries.from_ids(torch.tensor([[0, 0, 1]]))
    given_mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    for reset, expected in ((True, boundaries.attention_mask()), (False, given_mask)):
        arguments = {"packed_seq_params": boundaries}
        mask = attention_within_documents(Config(reset_attention_mask=reset), given_mask, arguments)
        assert torch.equal(mask, expected)
        assert arguments == {"packed_seq_params": None}


def test_attention_passes_megatrons_own_packing_on():
    arguments = {"packed_seq_params": PackedSeqParams(qkv_format="thd")}
    assert attention_within_documents(Config(), None, arguments) is None
    assert arguments["packed_seq_params"].qkv_format == "thd"

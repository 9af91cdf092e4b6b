"""Documents permuted for fill-in-the-middle."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data.fim import Fim, FimOrder, Sentinels, undo_fim
from megacpp_nemo.data.pieces import read_spans

IDS = Sentinels(prefix=1, middle=2, suffix=3)


class InMemory:
    """Documents in place of Megatron's indexed dataset."""

    path_prefix = "nowhere"

    def __init__(self, documents):
        self.documents = [np.array(ids, dtype=np.uint16) for ids in documents]
        self.sequence_lengths = np.array([len(ids) for ids in documents], dtype=np.int32)

    def __len__(self):
        return len(self.documents)

    def get(self, idx, offset=0, length=None):
        end = None if length is None else offset + length
        return self.documents[idx][offset:end]


def order_of(documents, rate=1.0, spm_rate=0.5, seed=0):
    return FimOrder(InMemory(documents), Fim(rate=rate, spm_rate=spm_rate, sentinels=IDS), seed)


def numbered(count, longest=40, seed=0):
    """Documents of tokens that differ from their neighbours, the end token 0 last."""
    rng = random.Random(seed)
    return [[*(10 + i for i in range(rng.randrange(longest))), 0] for _ in range(count)]


documents = st.lists(
    st.lists(st.integers(4, 999), max_size=30).map(lambda text: [*text, 0]), min_size=1, max_size=8
)


@given(documents, st.integers(0, 2**32), st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=150, deadline=None)
def test_undoing_gives_back_the_document_and_lengths_agree(documents, seed, spm_rate):
    order = order_of(documents, spm_rate=spm_rate, seed=seed)
    for number, document in enumerate(documents):
        served = order.get(number).tolist()
        assert undo_fim(served, IDS) == document
        assert len(served) == order.sequence_lengths[number]
        assert len(served) == len(document) + 3 * (len(document) > 3)
        assert served[-1] == 0


@given(st.integers(4, 20), st.data())
@settings(max_examples=100, deadline=None)
def test_a_slice_is_a_slice_of_the_whole(length, data):
    order = order_of([[*range(10, 10 + length), 0]], seed=data.draw(st.integers(0, 999)))
    whole = order.get(0)
    offset = data.draw(st.integers(0, len(whole)))
    count = data.draw(st.integers(0, len(whole) - offset))
    assert order.get(0, offset, count).tolist() == whole[offset : offset + count].tolist()
    assert order.get(0, offset).tolist() == whole[offset:].tolist()


@pytest.mark.parametrize("spm", [False, True])
def test_both_orders_are_as_the_paper_writes_them(spm):
    text = list(range(10, 30))
    seen = set()
    for seed in range(200):
        served = order_of([[*text, 0]], spm_rate=float(spm), seed=seed).get(0).tolist()
        suffix, middle = served.index(IDS.suffix), served.index(IDS.middle)
        after = served[suffix + 1 : middle]
        assert after == text[len(text) - len(after) :]
        if spm:
            assert served[:2] == [IDS.prefix, IDS.suffix]
            assert served[middle + 1 : -1] == text[: len(text) - len(after)]
        else:
            before, inside = served[1:suffix], served[middle + 1 : -1]
            assert before == text[: len(before)]
            assert before + inside + after == text
            assert inside
            seen.add((len(before), len(before) + len(inside)))
    # Cuts at both ends of the text are drawn too.
    assert spm or {0, 20} <= {place for cuts in seen for place in cuts}


def within_sampling_error(hits, trials, rate):
    """Whether a binomial count is within five standard deviations."""
    return abs(hits - trials * rate) <= 5 * math.sqrt(trials * rate * (1 - rate)) + 1e-9


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_rates_are_those_asked_for(rate):
    count = 20_000
    order = order_of([[10, 11, 12, 13, 0]] * count, rate=rate, spm_rate=0.3)
    permuted = np.flatnonzero(order.sequence_lengths > 5)
    assert within_sampling_error(len(permuted), count, rate)
    spm = sum(order.get(number)[1] == IDS.suffix for number in permuted[:3000])
    # PSM with an empty prefix begins alike: 4 of the 10 pairs of cuts begin at 0.
    expected = 0.3 + 0.7 * 0.4
    assert within_sampling_error(spm, len(permuted[:3000]), expected)


def test_every_pair_of_cuts_is_as_likely():
    count = 30_000
    order = order_of([[10, 11, 12, 13, 0]] * count, spm_rate=0.0)
    numbers = np.arange(count)
    cuts = order._cuts(numbers, order.indexed.sequence_lengths.astype(np.int64))
    pairs, hits = np.unique(np.stack([cuts.first, cuts.second]), axis=1, return_counts=True)
    assert pairs.shape[1] == 10
    assert all(within_sampling_error(n, count, 0.1) for n in hits)


def test_rate_zero_and_short_documents_are_served_as_they_are():
    documents = [[0], [10, 0], [10, 11, 0], [10, 11, 12, 0], []]
    lengths = [1, 2, 3, 4, 0]
    assert order_of(documents, rate=0.0).sequence_lengths.tolist() == lengths
    order = order_of(documents)
    assert order.sequence_lengths.tolist() == [1, 2, 3, 7, 0]
    assert [order.get(number).tolist() for number in (0, 1, 2, 4)] == [*documents[:3], []]
    assert undo_fim([], IDS) == []


def test_the_draw_depends_on_seed_file_and_document_alone():
    documents = numbered(300)
    order = order_of(documents, rate=0.5)
    assert np.array_equal(order.sequence_lengths, order_of(documents, rate=0.5).sequence_lengths)
    some = np.array([7, 250, 3])
    assert np.array_equal(order.lengths(some), order.sequence_lengths[some])
    other_seed = order_of(documents, rate=0.5, seed=1).sequence_lengths
    other_file = order_of([*documents, [0]], rate=0.5).sequence_lengths[:-1]
    for other in (other_seed, other_file):
        assert (other != order.sequence_lengths).mean() > 0.2
    assert order.sequence_lengths.dtype == np.int32


def test_channels_travel_with_their_tokens():
    documents = numbered(200)
    order = order_of(documents, rate=0.7)
    channel = InMemory([[token % 9 for token in ids] for ids in documents])
    numbers = np.arange(len(documents))
    lengths = order.lengths(numbers)
    spans = order.spans(numbers, np.zeros_like(numbers), lengths)
    out = np.empty(lengths.sum(), dtype=np.int64)
    tokens = read_spans(order.indexed, spans, order.fill, out.copy())
    ids = read_spans(channel, spans, (9, 9, 9), out.copy())
    added = np.isin(tokens, order.fill)
    assert added.sum() == 3 * (lengths > order.indexed.sequence_lengths).sum() > 200
    assert (ids[added] == 9).all()
    assert (ids[~added] == tokens[~added] % 9).all()


def test_sentinels_come_from_the_tokenizer_or_it_is_a_data_error():
    names = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
    known = dict(zip(names, (1, 2, 3), strict=True))
    tokenizer = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: known))
    assert Sentinels.of(tokenizer) == IDS
    del known["<|fim_suffix|>"]
    with pytest.raises(DataError, match=r"without <\|fim_suffix\|>(.|\n)*data\.fim_rate=0"):
        Sentinels.of(tokenizer)

"""The n-gram hash against a loop over whole numbers, and its memory against a plain formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpp_nemo.contract.errors import RecipeError, RuntimeRefusal
from megacpp_nemo.contract.shapes import NgramHashShape
from megacpp_nemo.model.ngram import MOST_TOKENS, NgramHash, NgramMemory, check_vocabulary
from tests.model.building import assert_near, groups, shaken, small_config

PRIMES = (2, 3, 5, 97, 10_007, 500_009, 2_147_483_647)
DEFAULT = NgramHashShape()


def rows_by_hand(
    hashed: NgramHash, tokens: list[int], documents: list[int] | None
) -> list[list[int]]:
    """Return rows `[seq][tables]` of one row of tokens, by loops over Python's whole numbers."""
    found = []
    heads = len(hashed.table_sizes) // len(hashed.orders)
    for place in range(len(tokens)):
        line = []
        for which, order in enumerate(hashed.orders):
            reached = range(place - order + 1, place + 1)
            whole = reached.start >= 0 and (
                documents is None or not any(documents[p] != documents[p - 1] for p in reached[1:])
            )
            for head in range(heads):
                table, value = which * heads + head, 0
                for back in range(order):
                    token = tokens[place - back] if place >= back else 0
                    value ^= token * hashed.multipliers[which][head][back]
                value ^= hashed.biases[table]
                row = sum(hashed.table_sizes[:table]) + value % hashed.table_sizes[table]
                line.append(row if whole else -1)
        found.append(line)
    return found


@st.composite
def hashes(draw: st.DrawFn) -> NgramHash:
    orders = draw(st.lists(st.integers(2, 5), min_size=1, max_size=3, unique=True))
    heads = draw(st.integers(1, 3))
    count = len(orders) * heads
    return NgramHash(
        orders, draw(st.lists(st.sampled_from(PRIMES), min_size=count, max_size=count))
    )


TOKEN = st.one_of(st.integers(0, 7), st.integers(0, MOST_TOKENS - 1), st.just(MOST_TOKENS - 1))


@given(hashes(), st.data())
@settings(deadline=None, max_examples=150)
def test_rows_are_those_of_a_loop_over_whole_numbers(hashed: NgramHash, data: st.DataObject):
    length = data.draw(st.integers(1, 9))
    batch = data.draw(st.integers(1, 2))
    row = st.lists(TOKEN, min_size=length, max_size=length)
    # Ids may come back: it is where they change that counts.
    ids = st.lists(st.sampled_from([0, 1, 7]), min_size=length, max_size=length)
    tokens = [data.draw(row) for _ in range(batch)]
    documents = [data.draw(ids) for _ in range(batch)] if data.draw(st.booleans()) else None
    found = hashed.rows(
        torch.tensor(tokens), None if documents is None else torch.tensor(documents)
    )
    expected = [
        rows_by_hand(hashed, row, None if documents is None else documents[number])
        for number, row in enumerate(tokens)
    ]
    assert found.dtype == torch.int64
    assert found.tolist() == expected


def test_an_n_gram_reads_no_token_of_another_document_and_none_before_its_row():
    hashed = NgramHash((2, 3), (97, 101))
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10]])
    documents = torch.tensor([[4, 4, 4, 4, 2, 2]])
    whole = (hashed.rows(tokens, documents) != -1)[0].T.tolist()
    assert whole == [
        [False, True, True, True, False, True],
        [False, False, True, True, False, False],
    ]
    other = tokens.clone()
    other[0, 3] = 50
    moved = (hashed.rows(tokens, documents) != hashed.rows(other, documents)).any(-1)
    assert moved.tolist() == [[False, False, False, True, False, False]]


def test_the_hash_is_the_same_for_ever():
    """Trained tables mean nothing under other multipliers: these numbers must never change."""
    hashed = NgramHash(DEFAULT.orders, DEFAULT.table_sizes)
    assert hashed.multipliers[0][0] == [2_101_001_059, 576_206_295]
    assert hashed.multipliers[1][7] == [1_342_349_245, 589_190_145, 1_049_175_197]
    assert (hashed.biases[0], hashed.biases[15]) == (1_671_043_688, 1_916_518_465)
    numbers = [n for order in hashed.multipliers for head in order for n in head]
    assert len(set(numbers)) == len(numbers) == 8 * 2 + 8 * 3
    assert all(n % 2 == 1 and 0 < n < 2**31 for n in numbers)
    assert all(0 <= n < 2**31 for n in hashed.biases)
    assert hashed.table_sizes[:2] == [500_009, 500_029]
    rows = hashed.rows(torch.tensor([[1, 65_535, 31_337, 0]]))
    assert rows[0, 2, [0, 7, 8, 15]].tolist() == [145_467, 3_864_678, 4_274_845, 7_861_876]
    by_hand = 31_337 * 2_101_001_059 ^ 65_535 * 576_206_295 ^ 1_671_043_688
    assert rows[0, 2, 0].item() == by_hand % 500_009


def test_tables_are_spread_evenly_and_differ_in_what_meets():
    hashed = NgramHash((2,), (251, 257, 263, 269))
    tokens = torch.randint(65_536, (64, 256), generator=torch.Generator().manual_seed(0))
    rows = hashed.rows(tokens)[:, 1:].flatten(0, 1)
    for table, size in enumerate(hashed.table_sizes):
        counts = torch.bincount(rows[:, table] - hashed.offsets[table], minlength=size).double()
        expected = len(rows) / size
        # Chi-square of so many cells has mean size - 1 and deviation sqrt(2 size).
        statistic = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(statistic - size) < 6 * (2 * size) ** 0.5
    meet = (rows[1:] == rows[:-1]).sum(-1)
    assert meet.max() <= 2


@pytest.mark.parametrize("size", [2, 65_536, MOST_TOKENS])
def test_the_largest_tokens_hash_without_overflow(size):
    check_vocabulary(size)
    hashed = NgramHash((2, 5), (2_147_483_647, 2_147_483_629))
    rows = hashed.rows(torch.full((1, 9), size - 1))
    assert rows[0].tolist() == rows_by_hand(hashed, [size - 1] * 9, None)


def test_a_vocabulary_that_would_overflow_is_refused():
    with pytest.raises(RuntimeRefusal, match="too large for the n-gram hash") as caught:
        check_vocabulary(MOST_TOKENS + 1)
    assert "2,147,483,649 tokens" in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"ngram_orders": (1, 2)}, {"ngram_orders": (2, 2)}, {"ngram_table_size": 2**31 + 1}]
)
def test_orders_and_sizes_without_a_hash_are_refused(changes):
    with pytest.raises(RecipeError):
        small_config("M", ngram_hash=True, **changes)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("orders", [(2, 3), (4,)])
def test_the_memory_is_its_plain_formula(orders):
    settings: dict[str, Any] = {"ngram_heads_per_order": 2, "ngram_dim": 6, "ngram_table_size": 50}
    config = small_config("M", ngram_hash=True, ngram_orders=orders, **settings)
    shape = NgramHashShape(orders=orders, heads_per_order=2, table_size=50, dim=6)
    memory = shaken(NgramMemory(config, shape, groups().tp))
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(1000, (2, 12), generator=draw)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    rows = memory.hash.rows(tokens, documents)
    found = memory(rows)
    table, projection = memory.table.weight.double(), memory.out_proj.weight.double()
    expected = torch.zeros(12, 2, config.hidden_size, dtype=torch.float64)
    for b in range(2):
        by_hand = rows_by_hand(memory.hash, tokens[b].tolist(), documents[b].tolist())
        for place, line in enumerate(by_hand):
            # Column w * tables + t of the projection reads channel w of table t.
            read = torch.stack([table[row] if row >= 0 else table[0] * 0 for row in line], dim=1)
            expected[place, b] = projection @ read.flatten()
    assert_near(found, expected, 1e-6)
    assert (found[0] == 0).all()


@pytest.mark.usefixtures("one_process")
def test_the_table_starts_as_the_tokens_do_and_the_projection_with_zeros():
    config = small_config("M", ngram_hash=True, ngram_table_size=2000)
    memory = NgramMemory(config, NgramHashShape(table_size=2000), groups().tp)
    table = memory.table.weight
    assert table.shape == (sum(memory.hash.table_sizes), 16)
    assert table.std().item() == pytest.approx(config.init_method_std, rel=0.01)
    assert abs(table.mean().item()) < 0.001
    assert not memory.out_proj.weight.any()

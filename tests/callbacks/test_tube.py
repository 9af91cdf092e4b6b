"""Semantic tube prediction in plain tensors: the loss, and where its positions may lie."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from megacpp_nemo.callbacks.tube import (
    draw_triples,
    row_uniforms,
    tube_loss,
    tube_loss_sequential,
)

few = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**31)
documents = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def states(seed: int, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    s, r, t = torch.randn(3, *shape, generator=generator).unbind(0)
    return s, r, t


def rows_of(*rows: list[int]) -> Tensor:
    """Return document ids of rows from the lengths of their documents; ids come back."""
    return torch.tensor(
        [[n % 2 for n, size in enumerate(row) for _ in range(size)] for row in rows]
    )


def drawn(ids: Tensor | None, seq: int, *, rows: int = 1, spans: int = 50, step: int = 0) -> tuple:
    uniforms = torch.stack([row_uniforms(0, step, row, spans) for row in range(rows)])
    return draw_triples(ids, seq, uniforms)


@few
@given(seeds, st.integers(1, 12), st.integers(1, 20))
def test_the_loss_is_that_of_the_equation_triple_by_triple(seed, count, hidden):
    s, r, t = states(seed, count, hidden)
    assert tube_loss(s, r, t).item() == pytest.approx(tube_loss_sequential(s, r, t), abs=1e-5)


@few
@given(seeds, st.floats(1e-4, 1e4), st.integers(1, 8))
def test_the_loss_lies_between_zero_and_two(seed, size, hidden):
    s, r, t = states(seed, 5, hidden)
    assert 0 <= tube_loss(s * size, r, t * size).item() <= 2


@pytest.mark.parametrize(("turn", "loss"), [(3.0, 0.0), (-3.0, 2.0)])
def test_going_on_costs_nothing_and_turning_back_costs_two(turn, loss):
    s, step, _ = states(0, 7, 16)
    r = s + step
    assert tube_loss(s, r, r + turn * step).item() == pytest.approx(loss, abs=1e-5)


def test_independent_states_cost_one_and_a_half():
    # E[cos] is -1/2: both chords hold r, with opposite signs.
    assert tube_loss(*states(0, 4000, 256)).item() == pytest.approx(1.5, abs=0.01)


def test_without_triples_the_loss_is_zero_and_has_a_gradient():
    s = torch.zeros(0, 4, requires_grad=True)
    loss = tube_loss(s, s, s)
    assert loss.item() == 0
    loss.backward()


@pytest.mark.parametrize("still", [(), (0,), (2,)], ids=["all", "before", "after"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_states_have_no_direction_and_no_gradient(still, dtype):
    parts = [torch.ones(3, 8, dtype=dtype) for _ in range(3)]
    for moved in still:
        parts[moved] = parts[moved] + torch.randn(3, 8).to(dtype)
    parts = [part.requires_grad_() for part in parts]
    loss = tube_loss(*parts)
    loss.backward()
    assert loss.item() == 1
    assert all((part.grad == 0).all() for part in parts)


def test_bf16_states_give_the_loss_of_their_values_in_fp32():
    low = [part.bfloat16() * 300 for part in states(1, 50, 64)]
    loss = tube_loss(*low)
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(tube_loss_sequential(*low), abs=1e-5)


def test_gradients_are_those_of_torchs_cosine_in_fp64():
    single = [part.requires_grad_() for part in states(2, 9, 16)]
    double = [part.detach().double().requires_grad_() for part in single]
    tube_loss(*single).backward()
    s, r, t = double
    (1 - functional.cosine_similarity(t - r, r - s, dim=-1)).mean().backward()
    for part, expected in zip(single, double, strict=True):
        torch.testing.assert_close(part.grad.double(), expected.grad, rtol=1e-5, atol=1e-7)


def test_a_triple_that_does_not_count_leaves_the_others_their_weight():
    s, r, t = states(3, 4, 8)
    kept = torch.tensor([True, False, True, True])
    expected = tube_loss(s[kept], r[kept], t[kept]).item() * 3 / 4
    assert tube_loss(s, r, t, kept).item() == pytest.approx(expected)


@few
@given(seeds, st.lists(documents, min_size=1, max_size=3))
def test_triples_ascend_within_one_document_of_three_tokens_or_more(step, rows):
    seq = max(sum(row) for row in rows)
    ids = rows_of(*[[*row, seq - sum(row)] for row in rows])
    triples = drawn(ids, seq, rows=len(rows), spans=8, step=step)
    for row, positions, valid in zip(ids, triples.positions, triples.valid, strict=True):
        runs = (row[1:] != row[:-1]).cumsum(0)
        document = torch.cat([torch.zeros(1, dtype=torch.int64), runs])
        assert bool(valid) == (document.bincount().max().item() >= 3)
        for s, r, t in positions.tolist() if valid else []:
            assert 0 <= s < r < t < seq
            assert document[s] == document[t]


def test_every_triple_of_a_document_is_drawn_as_often():
    triples = drawn(None, 5, spans=20_000)
    counts = Counter(map(tuple, triples.positions[0].tolist()))
    assert set(counts) == set(combinations(range(5), 3))
    # 2000 each, with a standard deviation of 42.
    assert all(abs(count - 2000) < 200 for count in counts.values())


def test_documents_are_drawn_by_the_tokens_they_have():
    triples = drawn(rows_of([4, 2, 12]), 18, spans=20_000)
    begins = triples.positions[0, :, 0]
    assert (begins < 4).float().mean().item() == pytest.approx(4 / 16, abs=0.02)
    assert not ((begins >= 4) & (begins < 6)).any()


def test_a_row_of_short_documents_is_skipped_and_the_others_are_not():
    triples = drawn(rows_of([2, 2, 1, 1], [3, 2, 1]), 6, rows=2)
    assert triples.valid.tolist() == [False, True]
    assert (triples.positions[0] == 0).all()
    assert (triples.positions[1] == torch.tensor([0, 1, 2])).all()


@pytest.mark.parametrize("seq", [1, 2])
def test_fewer_than_three_tokens_give_no_triples(seq):
    triples = drawn(None, seq)
    assert not triples.valid.any()
    s = torch.randn(1, 50, 4)
    assert tube_loss(s, -s, s, triples.valid.unsqueeze(1)).item() == 0


def test_random_numbers_depend_on_seed_step_and_row_alone():
    before = torch.get_rng_state()
    torch.manual_seed(1)
    first = row_uniforms(5, 6, 7, 4)
    torch.manual_seed(2)
    assert torch.equal(first, row_uniforms(5, 6, 7, 4))
    for other in ((4, 6, 7), (5, 7, 7), (5, 6, 8)):
        assert not torch.equal(first, row_uniforms(*other, 4))
    torch.set_rng_state(before)
    row_uniforms(5, 6, 7, 4)
    assert torch.equal(before, torch.get_rng_state())

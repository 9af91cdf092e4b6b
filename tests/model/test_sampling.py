"""The choice of the next token, against a distribution worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.model.sampling import Sampling, choose, next_token_probabilities

LOGITS = [2.0, -1.0, 0.5, 2.0, 0.0, -3.0, 1.2]


def by_hand(logits: list[float], temperature: float, k: int | None, p: float | None) -> list[float]:
    """Return the distribution, one token after the other from the likeliest down."""
    weights = [math.exp(logit / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: (-weights[token], token))
    order = order[: k or len(order)]
    total = sum(weights[token] for token in order)
    chosen, reached = [], 0.0
    for token in order:
        if p is not None and reached >= p:
            break
        chosen.append(token)
        reached += weights[token] / total
    total = sum(weights[token] for token in chosen)
    return [weights[t] / total if t in chosen else 0.0 for t in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("k", [None, 1, 3, 7, 50])
@pytest.mark.parametrize("p", [None, 0.05, 0.5, 0.9, 1.0])
def test_the_distribution_is_the_one_by_hand(
    temperature: float, k: int | None, p: float | None
) -> None:
    sampling = Sampling(temperature=temperature, top_k=k, top_p=p)
    found = next_token_probabilities(
        torch.tensor([LOGITS, LOGITS[::-1]], dtype=torch.float64), sampling
    )
    assert found[0].tolist() == pytest.approx(by_hand(LOGITS, temperature, k, p), abs=1e-9)
    backwards = by_hand(LOGITS[::-1], temperature, k, p)
    assert found[1].tolist() == pytest.approx(backwards, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(
    # In tenths: no two differ by less than a probability shows.
    logits=st.lists(st.integers(-300, 300).map(lambda n: n / 10), min_size=1, max_size=12),
    k=st.one_of(st.none(), st.integers(1, 12)),
    p=st.one_of(st.none(), st.floats(0.01, 1.0)),
)
def test_the_likeliest_token_always_stays(
    logits: list[float], k: int | None, p: float | None
) -> None:
    sampling = Sampling(temperature=0.7, top_k=k, top_p=p)
    found = next_token_probabilities(torch.tensor([logits]), sampling)[0]
    assert found.sum().item() == pytest.approx(1.0)
    assert found[torch.tensor(logits).argmax()] > 0
    assert int((found > 0).sum()) <= (k or len(logits))


def test_draws_follow_the_distribution() -> None:
    sampling = Sampling(temperature=1.5, top_k=4)
    draw = torch.Generator().manual_seed(0)
    drawn = choose(torch.tensor([LOGITS]).repeat(20_000, 1), sampling, draw)
    shares = torch.bincount(drawn, minlength=len(LOGITS)) / len(drawn)
    assert shares.tolist() == pytest.approx(by_hand(LOGITS, 1.5, 4, None), abs=0.015)


def test_a_seed_repeats_its_draws_and_another_does_not() -> None:
    logits = torch.zeros(64, 32)

    def drawn(seed: int) -> list[int]:
        draw = torch.Generator().manual_seed(seed)
        return choose(logits, Sampling(temperature=1.0, seed=seed), draw).tolist()

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_without_a_temperature_the_likeliest_token_is_taken() -> None:
    assert choose(torch.tensor([[0.0, 2.0, 1.0]]), Sampling(), torch.Generator()).tolist() == [1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
    ],
)
def test_a_value_outside_its_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(RuntimeRefusal, match=name) as refused:
        Sampling(**{"temperature": 1.0, name: value})
    key, _, hint = str(refused.value.hint).partition("=")
    Sampling(**{"temperature": 1.0, key: float(hint) if "." in hint else int(hint)})


@pytest.mark.parametrize("temperature", [1e-309, 1e-12])
def test_a_temperature_near_zero_takes_the_likeliest(temperature):
    logits = torch.tensor([[1.0, 30.0, -4.0], [2.0, 1.0, 1.5]])
    draw = torch.Generator().manual_seed(0)
    chosen = choose(logits, Sampling(temperature=temperature), draw)
    assert chosen.tolist() == [1, 0]


@pytest.mark.parametrize("narrowed", [{"top_k": 4}, {"top_p": 0.5}])
def test_what_narrows_a_draw_is_refused_where_nothing_is_drawn(narrowed):
    with pytest.raises(RuntimeRefusal, match="none is drawn"):
        Sampling(**narrowed)

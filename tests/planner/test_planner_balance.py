"""Stage boundaries are the best there are, and never empty."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpp_nemo.contract import RECIPE_NAMES, LayerPattern, recipe
from megacpp_nemo.planner.balance import balance, balanced_lengths, best_lengths
from megacpp_nemo.planner.gpus import PlanError
from megacpp_nemo.planner.pipeline import LayerLoads, layer_loads

LOADS = st.lists(st.sampled_from((0.0, 0.5, 1.0, 2.0, 3.25, 7.0)), min_size=1, max_size=8)


def every_cut(layers: int, segments: int) -> Iterator[tuple[int, ...]]:
    for cuts in itertools.combinations(range(1, layers), segments - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *cuts, layers)))


def sums(loads: Sequence[float], lengths: Sequence[int], extras: Sequence[float]) -> list[float]:
    ends = [0, *itertools.accumulate(lengths)]
    parts = [sum(loads[a:b]) for a, b in itertools.pairwise(ends)]
    return [part + extra for part, extra in zip(parts, extras, strict=True)]


@settings(max_examples=200, deadline=None)
@given(LOADS, st.data())
def test_the_cut_is_the_best_of_all(loads: list[float], data: Any) -> None:
    segments = data.draw(st.integers(1, len(loads)))
    extras = data.draw(
        st.lists(st.sampled_from((0.0, 1.0, 6.5)), min_size=segments, max_size=segments)
    )
    found = best_lengths(loads, extras)
    assert len(found) == segments
    assert min(found) >= 1
    assert sum(found) == len(loads)
    own = sums(loads, found, extras)
    others = [sums(loads, lengths, extras) for lengths in every_cut(len(loads), segments)]
    assert max(own) == min(map(max, others))
    # Of the cuts with that heaviest segment, the evenest.
    ties = [parts for parts in others if max(parts) == max(own)]
    assert sum(x * x for x in own) == pytest.approx(min(sum(x * x for x in p) for p in ties))


@settings(max_examples=100, deadline=None)
@given(LOADS, st.sampled_from((0.0, 1.0)), st.sampled_from((0.0, 2.0, 6.0)), st.integers(1, 4))
def test_the_most_loaded_stage_is_the_least_loaded_one_there_can_be(
    layers: list[float], before: float, behind: float, stages: int
) -> None:
    if stages > len(layers):
        return
    loads = LayerLoads(before=before, layers=tuple(layers), behind=behind)
    found = loads.of_segments(balanced_lengths(loads, stages, 1))
    every = (loads.of_segments(lengths) for lengths in every_cut(len(layers), stages))
    assert max(found) == pytest.approx(min(map(max, every)))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from((0.5, 1.0, 2.0)), min_size=4, max_size=10),
    st.sampled_from((0.0, 2.0, 6.0)),
)
def test_with_chunks_the_bound_on_every_stage_is_the_least_there_can_be(
    layers: list[float], behind: float
) -> None:
    loads, stages, chunks = LayerLoads(before=0.0, layers=tuple(layers), behind=behind), 2, 2
    extras = [0.0, behind / 2, 0.0, behind / 2]
    lengths = balanced_lengths(loads, stages, chunks)
    bound = chunks * max(sums(layers, lengths, extras))
    every = [chunks * max(sums(layers, cut, extras)) for cut in every_cut(len(layers), 4)]
    assert bound == pytest.approx(min(every))
    parts = loads.of_segments(lengths)
    assert max(sum(parts[stage::stages]) for stage in range(stages)) <= bound + 1e-9


@pytest.mark.parametrize(
    ("name", "pp", "vpp", "at_least"),
    [
        ("nam56r", 2, 1, 1.2),
        ("nam56r", 4, 1, 1.6),
        ("nam56r", 2, 2, 1.2),
        ("nam56r_4096", 2, 1, 1.3),
        ("nam56r_4096", 4, 1, 1.4),
    ],
)
def test_a_full_size_recipe_is_cut_better_than_evenly(
    name: str, pp: int, vpp: int, at_least: float
) -> None:
    found = balance(recipe(name), pp, vpp)
    assert found.factor > at_least
    assert LayerPattern.parse(found.pattern).layers == recipe(name).layers.layers
    assert sum(found.loads) == pytest.approx(sum(found.even_loads))
    assert sum(found.loads) == pytest.approx(sum(found.stage_loads))


@pytest.mark.parametrize("name", [name for name in RECIPE_NAMES if "_" not in name])
def test_the_proposed_fields_make_a_recipe_with_those_stages(name: str) -> None:
    found = balance(recipe(name), 2, 2)
    laid = recipe(name, changes={**found.changes, "batch.global_batch_size": 256})
    assert str(laid.layers) == found.pattern
    assert len(laid.layers.split(4)) == 4


def test_what_is_beside_layers_counts_on_the_last_stage() -> None:
    plain = recipe("nam56r", changes={"mtp.num_layers": 0})
    deep = recipe("nam56r", changes={"mtp.num_layers": 3})
    last = [len(balance(r, 2).pattern.split("|")[-1]) for r in (plain, deep)]
    assert last[0] > last[1]
    assert layer_loads(deep).behind > 3 * layer_loads(plain).behind


def test_boundaries_that_a_recipe_has_are_cut_anew() -> None:
    changes = {"pattern": "A|EMEAEMEAEMR", "depth": 12, "pipeline_model_parallel_size": 2}
    cut = recipe("nam56r_tiny", changes={**changes, "devices_per_node": 2})
    assert balance(cut, 2).pattern == balance(recipe("nam56r_tiny"), 2).pattern


def test_measured_times_serve_as_loads() -> None:
    times = {"A": 1.0, "E": 1.0, "M": 1.0, "R": 9.0}
    found = balance(
        recipe("nam56r_tiny"),
        2,
        load=lambda piece: times[piece.family.value] if piece.family else 0,
    )
    assert found.pattern == "AEMEAEMEAE|MR"
    assert found.loads == (10.0, 10.0)


@pytest.mark.parametrize(
    ("pp", "vpp", "message"),
    [
        (13, 1, "pp=12"),
        (4, 4, "vpp=3"),
        (1, 2, "pp=2"),
        (0, 1, "1 or more"),
        (2, True, "1 or more"),
    ],
)
def test_segments_that_cannot_be_are_refused(pp: int, vpp: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        balance(recipe("nam56r_tiny"), pp, vpp)

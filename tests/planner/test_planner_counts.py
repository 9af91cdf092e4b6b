"""Counts of parameters: total, active, by family and by rank."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest

from megacpp_nemo.contract import HybridRecipe, recipe
from megacpp_nemo.planner.counts import Count, counts, rank_count
from megacpp_nemo.planner.parameters import parameters
from megacpp_nemo.planner.sharding import rank_parameters

LAYOUT: dict[str, Any] = {
    "parallelism.pipeline_model_parallel_size": 2,
    "parallelism.expert_model_parallel_size": 2,
}


def spread() -> HybridRecipe:
    return recipe("nam56r", changes=LAYOUT)


@pytest.mark.parametrize("name", ["nam56r", "nam52_tiny"])
def test_the_total_is_the_sum_of_all_parameters(name: str) -> None:
    intent = recipe(name)
    known = parameters(intent)
    total = sum(prod(parameter.shape) for parameter in known)
    found = counts(intent)
    assert found.whole.total == total
    assert sum((count for _, count in found.pieces), Count()) == found.whole
    assert sum(found.families.values(), Count()) == found.whole
    routed = sum(prod(item.shape) for item in known if ".mlp.experts." in item.name)
    experts = intent.model.experts
    assert found.whole.active == total - routed + routed * experts.topk // experts.num_experts


def test_embeddings_are_what_is_looked_up_and_the_head() -> None:
    found = counts(recipe("nam56r")).whole
    ngram = sum(recipe("nam56r").model.embedding.ngram.table_sizes) * 16
    assert found.embeddings == 2 * 65_536 * 3584 + ngram
    assert found.total_without_embeddings == found.total - found.embeddings
    assert found.active_without_embeddings == found.active - found.embeddings


def test_families_are_told_apart() -> None:
    families = counts(recipe("nam56r")).families
    assert set(families) == {
        "embedding", "A attention", "A attention, sparse", "E experts", "M Mamba", "R M2RNN",
        "final norm", "output head", "prediction depths",
    }  # fmt: skip
    # By hand: two projections of 16 experts and of the shared one, the router and a norm.
    layer = 16 * 2 * 3584 * 896 + 2 * 3584 * 1024 + 16 * 3584 + 3584
    active = 4 * 2 * 3584 * 896 + 2 * 3584 * 1024 + 16 * 3584 + 3584
    assert families["E experts"] == Count(22 * layer, 22 * active)
    # In and out, convolution with bias, norm of the inside, three by head, and a norm.
    channels = 3584 + 2 * 8 * 64
    mamba = 3584 * (3584 + channels + 56) + 3584**2 + 5 * channels + 3584 + 3 * 56 + 3584
    assert families["M Mamba"] == Count(13 * mamba, 13 * mamba)


def test_a_rank_holds_its_part_of_one_stage() -> None:
    intent = spread()
    found = counts(intent)
    sums = [sum(item.count for item in rank_parameters(intent, stage)) for stage in (0, 1)]
    assert list(found.ranks) == sums
    assert found.most_loaded_rank == max(sums) == rank_count(intent, found.most_loaded_stage)
    # The n-gram memory of stage 0 is half as wide on each of two tensor ranks; the last stage
    # has the head, the depth, and a copy of the token embedding.
    assert found.most_loaded_stage == 1

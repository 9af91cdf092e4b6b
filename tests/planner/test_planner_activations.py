"""What the planner says that layers keep is what autograd's hooks count."""

from __future__ import annotations

from typing import Any

import pytest

from megacpp_nemo.contract import HybridRecipe, RecipeError, recipe
from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.planner.activations import (
    held_micro_batches,
    saved_bytes,
    stage_activations,
)
from megacpp_nemo.planner.pieces import Role, pieces
from tests.planner.kept import OUTSIDE, kept_bytes, small
from tests.support.processes import in_process, in_processes

# Asked for are 10%; what the formulas leave out is a few bytes per head.
TOLERANCE = 0.02
AUTHOR = {"features__mamba": "author"}
INPUTS = {"features__ngram_hash": True, "features__structure": "all"}
PLAIN = {"features__latent_attention": False, "features__experts": False}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "every family": ("AEMR", {}),
    "every family in bf16": ("AEMR", {"precision": "bf16"}),
    "documents": ("MR", {"features__reset_state": True}),
    "grouped attention and dense MLP": ("AE", PLAIN),
    "grouped and dense in bf16": ("AE", {**PLAIN, "precision": "bf16"}),
    "one group of queries": ("A", {**PLAIN, "model__attention__num_query_groups": 4}),
    "latent norms": ("A", {"model__latent__layernorm": True}),
    "latent norms in bf16": ("A", {"model__latent__layernorm": True, "precision": "bf16"}),
    "gated experts": ("E", {"model__experts__activation": "swiglu"}),
    "gated MLP in bf16": (
        "E",
        {**PLAIN, "model__experts__activation": "swiglu", "precision": "bf16"},
    ),
    "squared ReLU, no shared expert": (
        "E",
        {"model__experts__activation": "squared_relu", "model__experts__shared_expert_size": 0},
    ),
    "sparse attention": ("DE", {}),
    "sparse attention in bf16": ("D", {"precision": "bf16"}),
    "sparse attention that gathers": ("D", {"model__sparse_attention__indexer_topk": 4}),
    "Mamba-3": ("M", AUTHOR),
    "Mamba-3 in bf16": ("M", {**AUTHOR, "precision": "bf16"}),
    "Mamba-3 of rank 1": ("M", {**AUTHOR, "model__author_mamba__mimo_rank": 1}),
    "Mamba-2, a head to a group": ("M", {"model__mamba__num_groups": 4}),
    "Mamba-2, rows that fill no chunk": ("M", {"model__seq_length": 80}),
    "n-gram memory": ("A", {"features__ngram_hash": True}),
    "structure channels": ("A", {"features__structure": "core"}),
    "input side in bf16": ("A", {**INPUTS, "precision": "bf16"}),
    "prediction depths that read it": ("A", {**INPUTS, "model__mtp__num_layers": 2}),
    "prediction depths": ("AE", {"model__mtp__num_layers": 2}),
    "prediction depths in bf16": ("MM", {"model__mtp__num_layers": 1, "precision": "bf16"}),
}
TENSOR = {
    "parallelism__devices_per_node": 2,
    "parallelism__tensor_model_parallel_size": 2,
    "parallelism__sequence_parallel": True,
}
RECOMPUTED = {
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
}


def planned(intent: HybridRecipe, recompute: str = "none") -> dict[str, int]:
    found: dict[str, int] = {}
    for piece in pieces(intent):
        place = OUTSIDE if piece.family is None else piece.prefix.rstrip(".")
        kept = saved_bytes(intent, piece, recompute=recompute, kernels="portable")
        found[place] = found.get(place, 0) + sum(kept.values())
    return found


def assert_near(plan: dict[str, int], counted: dict[str, int], tolerance: float) -> None:
    off = {
        place: (plan[place], counted.get(place))
        for place in plan
        if abs(plan[place] - counted.get(place, 0)) > tolerance * plan[place]
    }
    assert not off
    assert plan.keys() == counted.keys()


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, int]]:
    """Bytes by layer of each case, all counted in one process that ends with them."""
    return in_process(
        lambda: {name: kept_bytes(small(p, **changes)) for name, (p, changes) in CASES.items()}
    )


@pytest.mark.parametrize("case", CASES)
def test_layers_keep_what_is_planned(case: str, counted: Any) -> None:
    pattern, changes = CASES[case]
    assert_near(planned(small(pattern, **changes)), counted[case], TOLERANCE)


def test_tables_in_host_memory_keep_the_rows_they_move_besides() -> None:
    changes = {"features__ngram_hash": True, "model__embedding__ngram__placement": "host"}
    device, host = (small("A", **given) for given in ({"features__ngram_hash": True}, changes))
    found = in_process(lambda: kept_bytes(host))
    plan = planned(device)
    assert_near(plan, found, TOLERANCE)
    # Autograd has no need of them: they are the leaf that its gradient is left in.
    tokens, tables, width = 2 * 96, 16, 16 * 4
    assert planned(host)[OUTSIDE] - plan[OUTSIDE] == tokens * tables * width


@pytest.mark.two_process
@pytest.mark.parametrize("case", ["tensor", "tensor, input side", "tensor in bf16", "expert"])
def test_split_layers_keep_what_is_planned(case: str) -> None:
    pattern, changes = {
        "tensor": ("AEMRD", TENSOR),
        "tensor, input side": ("M", {**TENSOR, **INPUTS}),
        "tensor in bf16": ("AEMR", {**TENSOR, "precision": "bf16"}),
        "expert": (
            "E",
            {"parallelism__devices_per_node": 2, "parallelism__expert_model_parallel_size": 2},
        ),
    }[case]
    intent = small(pattern, **changes)
    # Ranks of experts do not receive equal shares; their mean is what is planned.
    found = in_processes(kept_bytes, intent, ranks=2)
    mean = {place: sum(rank[place] for rank in found) // 2 for place in found[0]}
    assert_near(planned(intent), mean, 0.03)


@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_recomputation_keeps_what_is_planned(recompute: str) -> None:
    intent = small("AEMR", model__mtp__num_layers=1, model__mtp__pattern="A")
    plan = planned(intent, recompute)
    found = in_process(lambda: kept_bytes(intent, **RECOMPUTED[recompute]))
    if recompute == "full":
        # A layer that runs again keeps its input once it has been left.
        assert set(found) == {OUTSIDE}
        plan = {OUTSIDE: sum(plan.values())}
    assert_near(plan, found, TOLERANCE)


def test_what_a_piece_keeps_is_told_by_what_it_holds() -> None:
    intent = recipe("nam56r")
    (layer,) = [piece for piece in pieces(intent) if piece.number == 1 and piece.depth is None]
    tokens, heads = 4 * 4096, 56 // 2
    kept = saved_bytes(intent, layer)
    assert kept["normed input"] == tokens // 2 * 3584 * 2
    assert kept["queries, keys and values"] == tokens * heads * (128 + 128 + 64) * 2
    assert kept["log sums"] == tokens * heads * 4
    portable = saved_bytes(intent, layer, kernels="portable")
    assert portable["scores"] == tokens * heads * 4096 * (4 + 2)
    assert "scores" not in saved_bytes(intent, layer, kernels="portable", recompute="selective")
    assert saved_bytes(intent, layer, recompute="full") == {"layer's input": tokens // 2 * 3584 * 2}


def test_kernels_keep_less_than_plain_torch() -> None:
    for changes in ({}, {"features.mamba": "author"}):
        intent = recipe("nam56r", changes=changes)
        for piece in pieces(intent):
            if piece.family is BlockFamily.SPARSE_ATTENTION:
                # On a CPU it gathers the chosen keys, on a GPU it masks the others.
                continue
            fused, portable = (
                sum(saved_bytes(intent, piece, kernels=kernels).values())
                for kernels in ("fused", "portable")
            )
            assert fused <= portable, piece.name


def test_a_mamba_path_that_is_demanded_is_counted() -> None:
    by_path = {}
    for path in ("fused", "split", "portable"):
        intent = recipe("nam56r", changes={"features.mamba_path": path})
        mamba = next(p for p in pieces(intent) if p.family is BlockFamily.MAMBA)
        by_path[path] = sum(saved_bytes(intent, mamba).values())
    assert by_path["fused"] < by_path["split"] < by_path["portable"]


@pytest.mark.parametrize(
    ("stages", "chunks", "micro_batches", "expected"),
    [
        (1, None, 8, [(1,)]),
        (4, None, 8, [(4,), (3,), (2,), (1,)]),
        (4, None, 2, [(2,), (2,), (2,), (1,)]),
        # Warm-up of 2 (stages - stage - 1) + (chunks - 1) stages passes, and one more.
        (2, 2, 8, [(3, 2), (2, 1)]),
        (4, 2, 8, [(7, 4), (5, 4), (4, 3), (4, 1)]),
        (2, 2, 2, [(2, 2), (2, 1)]),
    ],
)
def test_a_stage_holds_as_many_micro_batches_as_its_schedule_starts(
    stages: int, chunks: int | None, micro_batches: int, expected: list[tuple[int, ...]]
) -> None:
    intent = small(
        "M" * 8,
        parallelism__devices_per_node=stages,
        parallelism__pipeline_model_parallel_size=stages,
        parallelism__virtual_pipeline_model_parallel_size=chunks,
        batch__global_batch_size=2 * micro_batches,
    )
    assert [held_micro_batches(intent, stage) for stage in range(stages)] == expected


def test_a_stage_keeps_its_micro_batches_and_one_loss() -> None:
    layout = {"parallelism__devices_per_node": 2, "parallelism__pipeline_model_parallel_size": 2}
    intent = small("MM|MM", **layout)
    layer, head = (
        saved_bytes(intent, piece)
        for piece in (pieces(intent)[1], *(p for p in pieces(intent) if p.role is Role.HEAD))
    )
    first, last = (stage_activations(intent, stage) for stage in (0, 1))
    tokens = 2 * 96 * 8
    assert first == (2 * (2 * sum(layer.values()) + tokens), 0, 0)
    # Logits in the model's precision, of which the loss makes its own in fp32.
    assert last.logits == head["logits"] + head["targets"] + 2 * 96 * 512 * 4
    full = stage_activations(intent, 0, recompute="full")
    assert full.working == sum(layer.values())
    assert full.layers < first.layers


def test_what_is_unknown_is_an_error_and_never_zero() -> None:
    intent = recipe("nam56r", changes={"pattern": "G", "depth": 4, "a_ranks": ()})
    delta = next(p for p in pieces(intent) if p.family is BlockFamily.GATED_DELTA_NET)
    with pytest.raises(RecipeError, match="in plain torch is not known"):
        saved_bytes(intent, delta, kernels="portable")
    with pytest.raises(RecipeError, match="Unknown recomputation"):
        saved_bytes(recipe("nam56r"), pieces(recipe("nam56r"))[1], recompute="some")
    with pytest.raises(RecipeError, match="Unknown kernels"):
        saved_bytes(recipe("nam56r"), pieces(recipe("nam56r"))[1], kernels="fast")

"""What fits, fits by the planner's own account; what is out, is out for the reason given."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from typing import Any

import pytest

from megacpp_nemo.contract import HybridRecipe, MegaCppError, RecipeError, recipe, with_paths
from megacpp_nemo.planner.balance import balance
from megacpp_nemo.planner.census import Census, memory_bytes
from megacpp_nemo.planner.collectives import Volume
from megacpp_nemo.planner.communication import volumes
from megacpp_nemo.planner.fit import Fit, fit
from megacpp_nemo.planner.flops import training_flops_per_token
from megacpp_nemo.planner.gpus import GIB, GPUS, PlanError
from megacpp_nemo.planner.layouts import Allowed, Layouts, Refused
from megacpp_nemo.planner.memory import most_loaded, rank_memory
from megacpp_nemo.planner.pipeline import pipeline
from megacpp_nemo.planner.prediction import Prediction
from megacpp_nemo.planner.reasons import Candidate
from megacpp_nemo.planner.sizes import Sizes, every_size

TINY = {"global_batch_size": 16}
POLICIES = ("none", "selective", "full")


@pytest.fixture(scope="module")
def nam56r() -> Fit:
    return fit(recipe("nam56r"), "h100", 8)


def sample(items: Any, count: int = 12) -> list[Any]:
    return random.Random(0).sample(list(items), count)


def refusal(layouts: Layouts, layout: Allowed) -> MegaCppError | None:
    try:
        layouts.recipe_in(layout)
    except MegaCppError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [
        ("nam56r_tiny", TINY, 4),
        ("nam56r", {"sparse_attention": False, "global_batch_size": 24, "micro_batch_size": 3}, 4),
        ("nam56r_tiny", {**TINY, "mamba": "author", "mtp.num_layers": 1}, 8),
    ],
)
def test_a_layout_is_refused_if_and_only_if_the_contract_refuses_it(
    name: str, changes: dict[str, Any], count: int
) -> None:
    layouts = Layouts(recipe(name, changes=changes), 1, count)
    seen = Counter[bool]()
    for found in layouts:
        rows = found.micro_batch_size
        refusals = [
            refusal(layouts, Allowed(found.sizes, size))
            for size in (range(1, 17) if rows is None else [rows])
        ]
        if isinstance(found, Refused):
            own = type(found.error)
            assert all(error and own in (type(error), PlanError) for error in refusals), found
        else:
            assert refusals == [None], found
        seen[isinstance(found, Allowed)] += 1
    assert min(seen.values()) > 10


def test_every_combination_of_sizes_is_tried_within_a_node() -> None:
    every = list(every_size(52, 16, 8))
    assert len(set(every)) == len(every)
    assert all(max(s.tp, s.etp) <= 8 for s in every)
    assert all(s.tp * s.pp * s.cp * s.dp == 16 and 16 % (s.ep * s.etp * s.pp) == 0 for s in every)
    assert Sizes(tp=2, pp=2, vpp=13, cp=2, ep=4, etp=1, dp=2) in every
    assert Sizes(tp=1, pp=16, vpp=1, cp=1, ep=1, etp=1, dp=1) in every


@pytest.mark.parametrize("changes", [{}, {"sparse_attention": False, "mtp.num_layers": 2}])
def test_memory_is_what_the_planner_counts_for_the_recipe(changes: dict[str, Any]) -> None:
    layouts = Layouts(recipe("nam56r", changes=changes), 2, 8)
    census = Census(layouts)
    for layout in sample(found for found in layouts if isinstance(found, Allowed)):
        laid = layouts.recipe_in(layout)
        for policy in POLICIES:
            planned = memory_bytes(census, layout, policy)
            for stage in range(layout.sizes.pp):
                exact = rank_memory(laid, stage, recompute=policy).total_bytes
                assert planned[stage] == pytest.approx(exact, rel=1e-3)


def test_what_fits_fits_with_the_least_recomputation(nam56r: Fit) -> None:
    assert {found.recompute for found in nam56r.candidates} >= {"none", "full"}
    full = [found for found in nam56r.candidates if found.recompute == "full"]
    for found in [*sample(nam56r.candidates), *sample(full, 6)]:
        laid = nam56r.layouts.recipe_in(found.layout)
        held = {p: most_loaded(laid, recompute=p).total_bytes for p in POLICIES}
        assert held[found.recompute] <= nam56r.room_bytes * 1.001
        assert found.memory_bytes == pytest.approx(held[found.recompute], rel=1e-3)
        # Cores of sparse attention are not computed again.
        before = {"full": ("none",), "none": ()}[found.recompute]
        assert all(held[policy] > nam56r.room_bytes * 0.999 for policy in before)


def test_what_is_too_large_says_by_how_much(nam56r: Fit) -> None:
    assert nam56r.room_bytes == int((79.1 - 6) * GIB)
    for found in sample(nam56r.too_large, 6):
        held = most_loaded(nam56r.layouts.recipe_in(found.layout), recompute="full").total_bytes
        assert found.missing_bytes > 0
        assert found.missing_bytes == pytest.approx(held - nam56r.room_bytes, abs=1e-3 * held)


def test_the_best_predicted_comes_first(nam56r: Fit) -> None:
    seconds = [found.time.seconds for found in nam56r.candidates]
    # Times that agree to a millionth are equal: then the larger micro-batch comes first.
    assert seconds == pytest.approx(sorted(seconds), rel=1e-5)
    assert nam56r.tokens_per_second(nam56r.candidates[0]) == 64 * 4096 / seconds[0]


def test_every_layout_is_told_of_once(nam56r: Fit) -> None:
    every = len(list(Layouts(nam56r.recipe, 1, 8)))
    out = sum(reason.count for reason in nam56r.reasons())
    assert len(nam56r.candidates) + out == every
    data = json.loads(json.dumps(nam56r.to_dict(every=True)))
    assert len(data["fits"]) + len(data["out_each"]) == every
    assert {entry["why"] for entry in data["out_each"]} >= {"memory"}


def test_reasons_are_the_contracts_words_and_say_which(nam56r: Fit) -> None:
    reasons = {reason.what: reason for reason in nam56r.reasons()}
    context = reasons["Megatron's DSA does not work with context parallelism"]
    assert context.values == {"cp": (2, 4, 8)}
    heads = reasons["recurrent.num_heads does not divide over tensor_model_parallel_size"]
    assert heads.values == {"tp": (8,)}
    assert heads.hint.startswith("tensor_model_parallel_size=4")
    assert any(what.startswith("More memory than 73.1 GiB") for what in reasons)


def seconds_of(sent: tuple[Volume, ...], near: set[str]) -> float:
    gpu = GPUS["h200"]
    speeds = {True: gpu.nvlink_bytes_per_second, False: gpu.network_bytes_per_second}
    return sum(volume.bytes_per_rank / speeds[volume.group in near] for volume in sent)


@pytest.mark.parametrize("policy", ["none", "full"])
def test_predicted_traffic_is_the_counted_volumes_over_bandwidths(policy: str) -> None:
    layouts = Layouts(recipe("nam56r"), 2, 8)
    layout = Allowed(Sizes(tp=2, pp=2, vpp=1, cp=1, ep=4, etp=1, dp=4), 2)
    laid = layouts.recipe_in(layout)
    found = Prediction(Census(layouts), GPUS["h200"], 0.5).step(layout, policy)
    # A stage is a node: only its neighbours are over the network.
    near = {"tensor", "tensor and context", "tensor and expert", "expert", "expert tensor"}
    once = ("data", "expert data", "embedding")
    exchanged = []
    for stage in range(2):
        sent = [
            v
            for v in volumes(laid, stage, recompute=policy)
            if v.group not in once and "gradients of" not in v.what
        ]
        exchanged.append(seconds_of(tuple(sent), near))
    # Here the first stage, which works longest, sends most as well.
    assert found.exchange == pytest.approx(max(exchanged), rel=1e-4)


def test_predicted_work_is_the_operations_over_the_peak() -> None:
    intent = recipe("nam56r", mode="author_dp")
    layouts = Layouts(intent, 1, 8)
    one = Allowed(Sizes(tp=1, pp=1, vpp=1, cp=1, ep=1, etp=1, dp=8), 4)
    predicted = Prediction(Census(layouts), GPUS["h200"], 0.5)
    tokens = 64 * 4096 / 8
    for policy, more in (("none", False), ("full", True)):
        flops = training_flops_per_token(intent, recompute=more)
        by_hand = tokens * flops / (0.5 * 989.4e12)
        found = predicted.step(one, policy)
        assert found.compute == pytest.approx(by_hand)
        assert (found.exchange, found.bubble) == (0, 0)


def test_the_bubble_and_the_imbalance_are_the_pipelines() -> None:
    layouts = Layouts(recipe("nam56r", mode="author_dp"), 1, 8)
    layout = Allowed(Sizes(tp=1, pp=4, vpp=2, cp=1, ep=1, etp=1, dp=2), 1)
    found = Prediction(Census(layouts), GPUS["h200"], 0.5).step(layout, "none")
    loads = pipeline(layouts.recipe_in(layout))
    assert found.bubble / (found.compute + found.exchange) == pytest.approx(loads.bubble)
    work = loads.micro_batches * 4096 * max(loads.stage_loads) / (0.5 * 989.4e12)
    assert found.compute == pytest.approx(work, rel=1e-6)


def test_overlap_hides_data_traffic_and_its_absence_does_not() -> None:
    own = {"overlap_grad_reduce": False, "overlap_param_gather": False}
    layout = Allowed(Sizes(tp=1, pp=1, vpp=1, cp=1, ep=1, etp=1, dp=16), 1)
    times = []
    for changes in ({}, own, {**own, "use_distributed_optimizer": False}):
        intent = recipe("nam56r", mode="author_dp", changes=changes)
        predicted = Prediction(Census(Layouts(intent, 2, 8)), GPUS["h200"])
        times.append(predicted.step(layout, "none").data)
        if changes == own:
            laid = predicted.census.layouts.recipe_in(layout)
            sent = tuple(v for v in volumes(laid) if v.group == "data" or v.group == "expert data")
            assert times[-1] == pytest.approx(seconds_of(sent, set()), rel=1e-3)
    assert times[0] < times[1] < times[2]


def test_fp8_speeds_up_experts_only_and_needs_a_gpu_that_has_it() -> None:
    layout = Allowed(Sizes(tp=1, pp=1, vpp=1, cp=1, ep=1, etp=1, dp=8), 1)

    def work(precision: str) -> float:
        layouts = Layouts(recipe("nam56r", changes={"precision": precision}), 1, 8)
        return Prediction(Census(layouts), GPUS["h200"]).step(layout, "none").compute

    assert 0.5 * work("bf16") < work("fp8_experts") < work("bf16") < work("fp32")
    with pytest.raises(PlanError, match="has no FP8"):
        fit(recipe("nam56r", changes={"precision": "fp8"}), "a100")


def test_stages_are_cut_as_balance_does_unless_the_pattern_says_otherwise() -> None:
    plain = fit(recipe("nam56r"), count=8)
    cut = {found.layout.sizes: found for found in plain.candidates}
    sizes = Sizes(tp=1, pp=8, vpp=1, cp=1, ep=1, etp=1, dp=1)
    assert plain.changes(cut[sizes])["pattern"] == balance(recipe("nam56r"), 8).pattern
    fixed = recipe(
        "nam56r_tiny",
        changes={**TINY, "pattern": "AEMEAEMEAE|MR", "devices_per_node": 2}
        | {"pipeline_model_parallel_size": 2},
    )
    found = fit(fixed, count=4)
    assert {c.layout.sizes.pp * c.layout.sizes.vpp for c in found.candidates} == {2}
    assert all("pattern" not in found.changes(c) for c in found.candidates)
    assert any("boundaries and the pipeline sizes" in reason.what for reason in found.reasons())


def test_the_fields_of_a_layout_make_its_recipe() -> None:
    found = fit(recipe("nam56r"), count=16)
    for candidate in sample(found.candidates, 8):
        laid = recipe("nam56r", changes=found.changes(candidate))
        assert laid.parallelism.recompute == candidate.recompute
        assert laid == chosen(found, candidate) or _alike(laid, found, candidate)


def chosen(found: Fit, candidate: Candidate) -> HybridRecipe:
    """Return the recipe of a candidate."""
    laid = found.layouts.recipe_in(candidate.layout)
    return with_paths(laid, {"parallelism.recompute": candidate.recompute})


def _alike(laid: HybridRecipe, found: Fit, candidate: Any) -> bool:
    """Whether two recipes differ in nothing but how their untiled pattern is written."""
    other = chosen(found, candidate)
    return (laid.layers, laid.parallelism, laid.batch, laid.model) == (
        other.layers,
        other.parallelism,
        other.batch,
        other.model,
    )


def test_only_recomputation_that_the_recipe_can_have_is_proposed(nam56r: Fit) -> None:
    assert {found.recompute for found in nam56r.candidates} == {"none", "full"}
    with pytest.raises(RecipeError, match="Selective recomputation does not work with DSA"):
        fit(recipe("nam56r"), recompute="selective")
    plain = recipe("nam56r", changes={"sparse_attention": False, "recompute": "full"})
    assert {found.recompute for found in fit(plain, "h200", 8).candidates} >= {"none"}
    only = fit(plain, "h100", 8, recompute="selective").candidates
    assert {found.recompute for found in only} == {"selective"}


@pytest.mark.parametrize("count", [0, -8, 12, 20, True, 8.0])
def test_gpus_come_in_whole_nodes(count: int) -> None:
    with pytest.raises(PlanError, match="nodes of 8"):
        fit(recipe("nam56r"), count=count)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "h20"}, "'h200'"),
        ({"recompute": "half"}, "Unknown recomputation"),
        ({"efficiency": 1.5}, "a share of the GPU's peak"),
        ({"efficiency": float("nan")}, "a share of the GPU's peak"),
        ({"reserve_gib": 200.0}, "part of the GPU's memory"),
        ({"reserve_gib": -1.0}, "part of the GPU's memory"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        fit(recipe("nam56r"), **options)


def test_where_nothing_fits_the_least_lack_is_told() -> None:
    found = fit(recipe("nam56r"), "a100", 1, reserve_gib=70.0)
    assert not found.candidates
    assert found.reasons()[0].what.startswith("More memory than 9.2 GiB")
    assert found.too_large[0].missing_bytes == min(f.missing_bytes for f in found.too_large)


def test_all_layouts_of_64_gpus_take_less_than_two_seconds() -> None:
    began = time.process_time()
    found = fit(recipe("nam56r"), "h200", 64)
    assert time.process_time() - began < 2
    assert len(found.candidates) > 1000


def test_a_nemo_run_is_offered_only_what_it_builds():
    here = fit(recipe("nam56r", changes={"sparse_attention": False}), count=4, lane="nemo")
    everything = fit(recipe("nam56r", changes={"sparse_attention": False}), count=4)
    sizes = [found.layout.sizes for found in here.candidates]
    assert {(own.vpp, own.cp) for own in sizes} == {(1, 1)}
    assert {found.layout.sizes.cp for found in everything.candidates} == {1, 2, 4}
    said = {reason.what for reason in here.reasons()}
    assert "A NeMo run of this package has no context parallelism" in said
    assert "A NeMo run of this package has no virtual pipeline stages" in said

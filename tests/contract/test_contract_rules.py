"""Settings that contradict each other are refused, and the hint leads out of the refusal."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import follow_hints, refusal
from refusals import settings as advice

from megacpp_nemo.contract import (
    BlockFamily,
    HybridRecipe,
    PatternError,
    RecipeError,
    recipe,
    with_paths,
)
from megacpp_nemo.contract.plasticity_rules import acted_layers
from megacpp_nemo.contract.training import OptimizerSchedule

TP, PP, VPP, CP, EP, ETP, SP, NODES, DEVICES = (
    f"parallelism.{name}"
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "sequence_parallel",
        "num_nodes",
        "devices_per_node",
    )
)
HEADS, KV_HEADS = "model.attention.num_heads", "model.attention.num_query_groups"
MAMBA_HEADS, MAMBA_GROUPS = "model.mamba.num_heads", "model.mamba.num_groups"


def case(name, error, base, changes, what, hint):
    return pytest.param(error, base, changes, what, hint, id=name)


# Each case is one rule: what is changed in a recipe, what the refusal says, what its hint sets.
# fmt: off
CASES = [
    case("pipes fix the depth", PatternError, {},
         {"pattern": "AEME|AEMR"},
         "its length must equal the depth", {"depth": 8}),
    case("layers divide over the stages", PatternError, {},
         {PP: 8, TP: 1, SP: False, "depth": 12, "features.sparse_attention": False},
         "do not divide evenly over the pipeline stages", {"pattern": "A|EM|E|AE|M|EA|E|MR"}),
    case("more stages than layers", PatternError, {},
         {PP: 2, VPP: 3, TP: 1, SP: False, "depth": 4, "features.sparse_attention": False},
         "do not divide evenly over the pipeline stages", {"depth": 6}),
    case("pipes are stages", RecipeError, {"depth": 8, "pattern": "AEMEAEMR", "a_ranks": [1]},
         {"pattern": "AEME|AEMR"},
         "'|' boundaries and the pipeline sizes disagree",
         {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": None}),
    case("pipes are stages and chunks", RecipeError,
         {"depth": 8, "pattern": "AEMEAEMR", "a_ranks": [1]},
         {"pattern": "AE|ME|AE|MR", PP: 2},
         "'|' boundaries and the pipeline sizes disagree",
         {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    case("chunks without stages", RecipeError, {},
         {VPP: 2},
         "need more than one pipeline stage", {"virtual_pipeline_model_parallel_size": None}),
    case("sequence parallel at TP 1", RecipeError, {},
         {TP: 1},
         "Sequence parallelism needs tensor parallelism", {"sequence_parallel": False}),
    case("experts at TP 2 without sequence parallel", RecipeError, {},
         {SP: False},
         "with experts needs sequence parallelism", {"sequence_parallel": True}),
    case("cores of sparse attention computed again", RecipeError, {},
         {"parallelism.recompute": "selective"},
         "Selective recomputation does not work with DSA", {"recompute": "full"}),
    case("cores computed again without attention", RecipeError,
         {"pattern": "ME", "sparse_attention": False, "model.mtp.num_layers": 0},
         {"parallelism.recompute": "selective"},
         "of the cores of attention layers", {"recompute": "full"}),
    case("rows over tensor ranks", RecipeError, {},
         {"model.seq_length": 4097},
         "A row does not divide", {"seq_length": 4098}),
    case("rows over twice the context ranks", RecipeError,
         {"sparse_attention": False, TP: 1, SP: False},
         {CP: 4, "model.seq_length": 4100},
         "2 pieces per context rank", {"seq_length": 4104}),
    case("rows over context and tensor ranks", RecipeError,
         {"sparse_attention": False, TP: 4, "batch.global_batch_size": 32},
         {CP: 2, "model.seq_length": 4100},
         "2 pieces per context rank", {"seq_length": 4104}),
    case("DSA with context parallel", RecipeError, {},
         {CP: 2},
         "DSA does not work with context parallelism", {"context_parallel_size": 1}),
    case("explicit D with context parallel", RecipeError, {"sparse_attention": False},
         {CP: 2, "pattern": "ADEMR"},
         "DSA does not work with context parallelism", {"context_parallel_size": 1}),
    case("n-gram tables in host memory over stages", RecipeError,
         {"model.embedding.ngram.placement": "host"},
         {PP: 2},
         "in host memory are trained on a single pipeline stage",
         {"embedding.ngram.placement": "device"}),
    case("dense processes", RecipeError, {},
         {TP: 16},
         "tensor x pipeline x context parallel sizes must divide", {"num_nodes": 2}),
    case("expert processes", RecipeError, {},
         {EP: 8},
         "expert x expert-tensor x pipeline parallel sizes must divide", {"num_nodes": 2}),
    case("experts over ranks", RecipeError,
         {TP: 1, SP: False, DEVICES: 6, "batch.global_batch_size": 24},
         {EP: 6},
         "experts.num_experts does not divide over expert_model_parallel_size",
         {"expert_model_parallel_size": 2}),
    case("expert width over expert-tensor ranks", RecipeError, {},
         {EP: 2, ETP: 4, "model.experts.ffn_hidden_size": 898},
         "experts.ffn_hidden_size does not divide over expert_tensor_parallel_size",
         {"expert_tensor_parallel_size": 2}),
    case("experts split otherwise than the rest", RecipeError, {},
         {ETP: 1},
         "Experts that are split otherwise than the other weights need expert parallelism",
         {"expert_tensor_parallel_size": None}),
    case("expert width over tensor ranks", RecipeError, {},
         {"model.experts.ffn_hidden_size": 897},
         "experts.ffn_hidden_size does not divide over tensor_model_parallel_size",
         {"tensor_model_parallel_size": 1, "sequence_parallel": False}),
    case("shared expert over tensor ranks", RecipeError, {},
         {"model.experts.shared_expert_size": 1023},
         "experts.shared_expert_size does not divide",
         {"tensor_model_parallel_size": 1, "sequence_parallel": False}),
    case("heads over tensor ranks, of which M2RNN has 44", RecipeError, {NODES: 2},
         {TP: 16},
         "attention.num_heads does not divide over tensor_model_parallel_size",
         {"tensor_model_parallel_size": 4}),
    case("query groups over tensor ranks", RecipeError,
         {"latent_attention": False, "sparse_attention": False},
         {"model.attention.num_query_groups": 7},
         "attention.num_query_groups does not divide",
         {"tensor_model_parallel_size": 1, "sequence_parallel": False}),
    case("query groups over heads", RecipeError,
         {"latent_attention": False, "sparse_attention": False},
         {"model.attention.num_query_groups": 10},
         "Query groups must divide the attention heads", {"num_query_groups": 56}),
    case("latent rank over tensor ranks", RecipeError, {},
         {"model.latent.q_lora_rank": 63},
         "latent.q_lora_rank does not divide",
         {"tensor_model_parallel_size": 1, "sequence_parallel": False}),
    case("Mamba groups over tensor ranks", RecipeError, {},
         {"model.mamba.num_groups": 7},
         "mamba.num_groups does not divide",
         {"tensor_model_parallel_size": 1, "sequence_parallel": False}),
    case("Mamba groups over Mamba heads", RecipeError, {},
         {"model.mamba.num_groups": 16},
         "Mamba groups must divide the Mamba heads", {"num_groups": 8}),
    case("Mamba heads over context ranks", RecipeError,
         {"sparse_attention": False, NODES: 3, "global_batch_size": 48},
         {CP: 3, "model.seq_length": 4092, "model.mamba.num_groups": 2},
         "mamba.num_heads per tensor rank does not divide over context_parallel_size",
         {"context_parallel_size": 1}),
    case("Mamba groups over context ranks", RecipeError,
         {"sparse_attention": False, NODES: 3, "global_batch_size": 48},
         {CP: 3, "model.seq_length": 4092, "model.mamba.num_heads": 48},
         "mamba.num_groups per tensor rank does not divide over context_parallel_size",
         {"context_parallel_size": 1}),
    case("Mamba-3 heads over tensor ranks", RecipeError, {"mamba": "author"},
         {"model.author_mamba.num_heads": 111},
         "author_mamba.num_heads does not divide",
         {"tensor_model_parallel_size": 1, "sequence_parallel": False}),
    case("M2RNN heads over tensor ranks", RecipeError, {},
         {TP: 8},
         "recurrent.num_heads does not divide", {"tensor_model_parallel_size": 4}),
    case("M2RNN key heads over its heads", RecipeError, {},
         {"model.recurrent.num_qk_heads": 3},
         "M2RNN query/key heads must divide its value heads", {"num_qk_heads": 1}),
    case("Gated DeltaNet key heads over its value heads", RecipeError, {},
         {"model.gated_delta_net.num_key_heads": 12},
         "Gated DeltaNet key heads must divide its value heads", {"num_key_heads": 4}),
    case("Gated DeltaNet heads over tensor ranks", RecipeError,
         {"pattern": "GE", "sparse_attention": False},
         {"model.gated_delta_net.num_key_heads": 1},
         "gated_delta_net.num_key_heads does not divide",
         {"tensor_model_parallel_size": 1, "sequence_parallel": False}),
    case("dense width over tensor ranks", RecipeError, {"features.experts": False},
         {"model.ffn_hidden_size": 18_945},
         "ffn_hidden_size does not divide",
         {"tensor_model_parallel_size": 1, "sequence_parallel": False}),
    case("top-k of the experts", RecipeError, {},
         {"model.experts.topk": 17},
         "more experts than there are", {"topk": 16}),
    case("batch over data ranks", RecipeError, {},
         {"batch.global_batch_size": 100},
         "whole number of micro-batches", {"global_batch_size": 96}),
    case("batch below one micro-batch per rank", RecipeError, {},
         {"batch.global_batch_size": 1},
         "whole number of micro-batches", {"global_batch_size": 16}),
    case("batch in groups of interleaved stages", RecipeError, {},
         {PP: 2, VPP: 2, "batch.global_batch_size": 24},
         "whole number of pipeline-size groups of micro-batches", {"global_batch_size": 32}),
    case("overlapped gather without the distributed optimizer", RecipeError, {},
         {"parallelism.use_distributed_optimizer": False},
         "needs the distributed optimizer", {"overlap_param_gather": False}),
    case("overlapped gather without overlapped reduction", RecipeError, {},
         {"parallelism.overlap_grad_reduce": False},
         "overlapped gradient reduction", {"overlap_param_gather": False}),
    case("DSA rank outside the A layers", RecipeError, {},
         {"model.sparse_attention.a_ranks": [1, 12, 13]},
         "DSA A-rank 13 has no attention layer: this pattern has 13", {"a_ranks": (1, 12)}),
    case("DSA without A layers", RecipeError, {},
         {"pattern": "EM"},
         "this pattern has 0", {"sparse_attention": False}),
    case("DSA without latent attention", RecipeError, {},
         {"features.latent_attention": False},
         "DSA is built on multi-latent attention", {"sparse_attention": False}),
    case("explicit D without latent attention", RecipeError, {"sparse_attention": False},
         {"features.latent_attention": False, "pattern": "ADEM"},
         "DSA, the pattern's D, is built on multi-latent attention", {"latent_attention": True}),
    case("FP8 without experts", RecipeError, {},
         {"pattern": "AM", "precision": "fp8"},
         "FP8 is for expert layers only", {"precision": "bf16"}),
    case("expert parallel without experts", RecipeError, {},
         {"pattern": "AM", "mtp.num_layers": 0, EP: 4},
         "Expert parallelism needs expert layers", {"expert_model_parallel_size": 1}),
    case("FP8 with dense MLPs", RecipeError, {"features.experts": False},
         {"precision": "fp8"},
         "FP8 is for expert layers only", {"precision": "bf16"}),
    case("expert parallel with dense MLPs", RecipeError, {"features.experts": False},
         {EP: 4},
         "Expert parallelism needs expert layers", {"expert_model_parallel_size": 1}),
    case("indexed files for sources", RecipeError, {"corpus": "sources"},
         {"files.data_path": ["/data/a"]},
         "Indexed files are read only by a recipe whose corpus is indexed",
         {"corpus": "indexed"}),
    case("learning rate that rises", RecipeError, {},
         {"schedule.min_lr": 1e-3},
         "The learning rate falls from lr to min_lr", {"min_lr": 3e-5}),
    case("warm-up past the decay", RecipeError, {},
         {"schedule.decay_steps": 2000},
         "Warm-up must end before the decay does", {"warmup_steps": 200}),
    case("lever on a layer that is not there", RecipeError, {"fire.steps": [10]},
         {"plasticity.fire.layers": [2, 53]},
         "plasticity.fire acts on layers that the model does not have",
         {"plasticity.fire.layers": [2]}),
    case("lever on no layer that is there", RecipeError, {"stp.weight": 0.1},
         {"plasticity.stp.layers": [60]},
         "plasticity.stp acts on layers", {"plasticity.stp.layers": [52]}),
    case("lever on a family that is not there", RecipeError, {"dash.boundaries": ["data"]},
         {"plasticity.dash.families": ["D", "mamba"]},
         "plasticity.dash acts on families", {"plasticity.dash.families": ["mamba"]}),
    case("lever on experts of a model that has none", RecipeError, {"pattern": "AM"},
         {"plasticity.shrink.interval": 5, "plasticity.shrink.target": "experts"},
         "plasticity.shrink selects nothing",
         {"plasticity.shrink.target": "all", "plasticity.shrink.families": [],
          "plasticity.shrink.layers": []}),
    case("lever on routed experts of dense MLPs", RecipeError, {"features.experts": False},
         {"plasticity.fire.steps": [5], "plasticity.fire.target": "experts"},
         "plasticity.fire selects nothing",
         {"plasticity.fire.target": "all", "plasticity.fire.families": [],
          "plasticity.fire.layers": []}),
    case("lever on keys of a layer without them", RecipeError, {"fire.steps": [5]},
         {"plasticity.fire.target": "attention_qk", "plasticity.fire.layers": [3]},
         "plasticity.fire selects nothing",
         {"plasticity.fire.target": "all", "plasticity.fire.families": [],
          "plasticity.fire.layers": []}),
    case("ReDo without expert layers", RecipeError, {"pattern": "AM"},
         {"plasticity.redo.steps": [5]},
         "the model has none", {"plasticity.redo.report_interval": 0, "plasticity.redo.steps": []}),
    case("ReDo on another layer", RecipeError, {"redo.report_interval": 5},
         {"plasticity.redo.layers": [1, 2]},
         "expert layers only", {"plasticity.redo.layers": [2]}),
    case("lever after the end", RecipeError, {"train_steps": 100},
         {"plasticity.fire.steps": [50, 100, 101]},
         "plasticity.fire.steps comes after the run's last step",
         {"plasticity.fire.steps": [50, 100]}),
    case("lever only after the end", RecipeError, {"train_steps": 100},
         {"plasticity.redo.steps": [200]},
         "plasticity.redo.steps comes after", {"plasticity.redo.steps": [100]}),
    case("interval longer than the run", RecipeError, {"train_steps": 100},
         {"plasticity.shrink.interval": 101},
         "plasticity.shrink.interval comes after", {"plasticity.shrink.interval": 100}),
    case("reports after the end", RecipeError, {"train_steps": 100},
         {"plasticity.redo.report_interval": 101},
         "plasticity.redo.report_interval comes", {"plasticity.redo.report_interval": 100}),
    case("STP that would never begin", RecipeError, {"train_steps": 10_000},
         {"plasticity.stp.weight": 0.02},
         "plasticity.stp.start_step comes after", {"plasticity.stp.start_step": 1000}),
    case("STP under context parallelism", RecipeError, {"sparse_attention": False},
         {CP: 2, "plasticity.stp.measure": True},
         "context parallelism cuts rows apart", {"context_parallel_size": 1}),
]
# fmt: on


@pytest.mark.parametrize(("error", "base", "changes", "what", "hint"), CASES)
def test_a_contradiction_is_refused_and_its_hint_leads_out(error, base, changes, what, hint):
    start = recipe("nam56r", changes=base)
    caught = refusal(error, with_paths, start, changes)
    assert what in caught.what
    assert advice(caught) == hint
    _, refusals = follow_hints(start, changes)
    # A hint may leave one more setting to follow, but never the refusal that it answered.
    assert [again.what for again in refusals].count(caught.what) == 1


sizes = st.integers(1, 9)
# Of levers, which share the names of their fields, only what each accepts by itself.
STEPS = st.sets(st.integers(1, 99), max_size=3).map(sorted)
NUMBERS = st.lists(st.integers(1, 60), max_size=3)
DRAWN = {
    **dict.fromkeys((TP, CP, EP, PP, NODES, DEVICES), sizes),
    VPP: st.none() | st.integers(2, 4),
    ETP: st.none() | sizes,
    **dict.fromkeys(
        (
            SP,
            "parallelism.overlap_param_gather",
            "parallelism.overlap_grad_reduce",
            "parallelism.use_distributed_optimizer",
            "features.sparse_attention",
            "features.latent_attention",
        ),
        st.booleans(),
    ),
    "pattern": st.sampled_from(["AEMEAEMEAEMR", "M", "AM", "ADEM", "AE|ME", "A|M|E", "R|R|M|M"]),
    "depth": st.integers(0, 60),
    "features.mamba": st.sampled_from(["native", "author", "authored"]),
    "model.sparse_attention.a_ranks": st.lists(st.integers(0, 20), max_size=4),
    "model.seq_length": st.integers(-1, 5000),
    "model.experts.num_experts": st.integers(0, 70),
    "model.experts.topk": st.integers(0, 9),
    "model.experts.ffn_hidden_size": st.integers(1, 1000),
    **dict.fromkeys((HEADS, KV_HEADS, MAMBA_HEADS, MAMBA_GROUPS), st.integers(1, 64)),
    "model.recurrent.num_heads": st.integers(1, 64),
    "model.recurrent.num_qk_heads": st.integers(1, 8),
    "batch.micro_batch_size": st.integers(1, 9),
    "batch.global_batch_size": st.integers(0, 300),
    "schedule.lr": st.floats(),
    "schedule.min_lr": st.floats(),
    "schedule.warmup_steps": st.integers(-1, 200_000),
    "precision": st.sampled_from(["bf16", "fp8", "fp32", "bf61"]),
    "schedule.train_steps": st.integers(1, 99),
    **{
        f"plasticity.{name}.{field}": values
        for field, values in {
            "steps": STEPS,
            "layers": NUMBERS,
            "target": st.sampled_from(["all", "experts", "attention_qk", "recurrent"]),
            "families": st.lists(st.sampled_from("AEMRD"), max_size=2),
        }.items()
        for name in ("fire", "dash")
    },
    "plasticity.redo.steps": STEPS,
    "plasticity.redo.layers": NUMBERS,
    "plasticity.stp.weight": st.sampled_from([0.0, 0.02]),
    "plasticity.stp.layers": NUMBERS,
}


@settings(deadline=None)
@given(st.fixed_dictionaries({}, optional=DRAWN))
def test_following_the_hints_of_any_broken_recipe_ends_in_a_recipe(changes):
    mended, _ = follow_hints(recipe("nam56r"), changes, steps=40)
    assert_divides_evenly(mended)


def assert_divides_evenly(made: HybridRecipe) -> None:
    """What Megatron would assert, counted from the recipe's own numbers."""
    layout, model = made.parallelism, made.model
    tensor, context = layout.tensor_model_parallel_size, layout.context_parallel_size
    stages, chunks = (
        layout.pipeline_model_parallel_size,
        layout.virtual_pipeline_model_parallel_size,
    )
    copies = layout.world_size // (tensor * context * stages)
    assert copies * tensor * context * stages == layout.world_size
    rows = made.batch.micro_batch_size * copies * (stages if chunks else 1)
    assert made.batch.global_batch_size % rows == 0
    assert len(made.layers.split(stages * (chunks or 1))) == stages * (chunks or 1)
    assert context == 1 or model.seq_length % (2 * context) == 0
    assert not layout.sequence_parallel or model.seq_length % (tensor * context) == 0
    assert set(made.sparse_layer_numbers) <= set(made.layers.layer_numbers(BlockFamily.ATTENTION))
    if made.has(BlockFamily.ATTENTION):
        assert model.attention.num_heads % tensor == 0
    if made.has(BlockFamily.EXPERTS):
        assert model.experts.num_experts % layout.expert_model_parallel_size == 0
        assert model.experts.ffn_hidden_size % layout.expert_tensor_size == 0
        assert layout.sequence_parallel or tensor == 1
    if made.has(BlockFamily.MAMBA) and made.features.mamba == "native":
        assert model.mamba.num_heads % (tensor * context) == 0
        assert model.mamba.num_groups % tensor == 0
        groups = model.mamba.num_groups // tensor
        assert groups % context == 0 or context % groups == 0
    if made.has(BlockFamily.RECURRENT):
        assert model.recurrent.num_heads % tensor == 0


@given(st.floats(1e-12, 1e6), st.floats(1e-12, 1e6), st.integers(1, 10**6))
def test_a_suggested_schedule_is_a_schedule(lr, min_lr, decay):
    wrong = {"lr": lr, "min_lr": max(lr * 1.5, min_lr), "decay_steps": decay, "warmup_steps": 0}
    hint = advice(refusal(RecipeError, OptimizerSchedule, **wrong))
    late = {**wrong, **hint, "warmup_steps": decay}
    assert OptimizerSchedule(**{**late, **advice(refusal(RecipeError, OptimizerSchedule, **late))})


def test_a_lever_that_is_off_is_not_checked():
    away = {"pattern": "AM", "fire.layers": [99], "dash.families": ["E"], "redo.layers": [1],
            "shrink.target": "experts", "stp.layers": [99], "train_steps": 10}  # fmt: skip
    assert recipe("nam56r", changes=away).plasticity.on == ()


def test_a_lever_may_act_on_the_last_step_and_measure_without_ever_being_in_force():
    made = recipe(
        "nam56r",
        changes={"train_steps": 10, "fire.steps": [10], "shrink.interval": 10, "stp.measure": True},
    )
    assert made.plasticity.on == ("stp", "shrink", "fire")


@pytest.mark.parametrize(
    ("changes", "name", "numbers"),
    [
        ({}, "fire", tuple(range(1, 13))),
        ({"fire.target": "experts"}, "fire", (2, 4, 6, 8, 10)),
        ({"fire.target": "mlp", "features.experts": False}, "fire", (2, 4, 6, 8, 10)),
        ({"fire.target": "attention_qk"}, "fire", (1, 5, 9)),
        ({"dash.target": "recurrent"}, "dash", (12,)),
        ({"dash.families": ["M", "attention"]}, "dash", (1, 3, 5, 7, 9, 11)),
        ({"shrink.families": ["M"], "shrink.layers": [3, 12]}, "shrink", (3,)),
        ({"redo.layers": [4, 5]}, "redo", (4,)),
        ({}, "redo", (2, 4, 6, 8, 10)),
        ({}, "stp", (12,)),
        ({"stp.layers": [6, 3, 6]}, "stp", (3, 6)),
    ],
)
def test_a_lever_acts_on_the_layers_that_have_what_it_selects(changes, name, numbers):
    made = recipe("nam56r_tiny", changes=changes)
    assert acted_layers(made.plasticity, name, made.layers, made.features) == numbers


def test_a_slip_of_many_digits_is_refused_at_once():
    """No list of divisors is counted out."""
    refusal(RecipeError, recipe, "nam56r", changes={"q_lora_rank": 10**30 + 1})

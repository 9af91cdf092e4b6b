"""The numbers of the named recipes, from the project's fact sheet on the two families."""

from __future__ import annotations

import pytest
from refusals import refusal

from megacpp_nemo.contract import (
    RECIPE_NAMES,
    BlockFamily,
    ParallelismMode,
    Precision,
    RecipeError,
    describe,
    field_paths,
    recipe,
)

# The column "canonical here", in its order. (No field holds what no recipe changes: RMSNorm, no
# biases, untied embeddings, sigmoid router scores, expert bias, the fp32 router, bf16 indexer.)
NAM56R_FACTS = {
    # hidden / ffn / heads / kv groups (head dim 64)
    "model.hidden_size": 3584,
    "model.ffn_hidden_size": 18_944,
    "model.attention.num_heads": 56,
    "model.attention.num_query_groups": 8,
    "model.attention.head_dim": 64,
    # vocabulary
    "model.embedding.vocab_size": 65_536,
    # sequence length, rope theta
    "model.seq_length": 4096,
    "model.rotary_base": 500_000,
    # MLA
    "model.latent.q_lora_rank": 64,
    "model.latent.kv_lora_rank": 64,
    "model.latent.qk_head_dim": 64,
    "model.latent.qk_pos_emb_head_dim": 64,
    "model.latent.v_head_dim": 64,
    # DSA: 9 of 13 A-ranks, and the indexer
    "model.sparse_attention.a_ranks": (1, 2, 3, 5, 6, 7, 9, 10, 11),
    "model.sparse_attention.indexer_num_heads": 32,
    "model.sparse_attention.indexer_head_dim": 64,
    "model.sparse_attention.indexer_topk": 256,
    "model.sparse_attention.indexer_loss_coeff": 0.001,
    # MoE
    "model.experts.num_experts": 16,
    "model.experts.topk": 4,
    "model.experts.ffn_hidden_size": 896,
    "model.experts.shared_expert_size": 1024,
    "model.experts.aux_loss_coeff": 1e-4,
    "model.experts.activation": "gelu",  # non-gated: the size check counts it so
    # Mamba, native lane: 56 heads x 64, state 64, 8 groups
    "model.mamba.num_heads": 56,
    "model.mamba.head_dim": 64,
    "model.mamba.state_dim": 64,
    "model.mamba.num_groups": 8,
    # Mamba-3, author lane: expand 2, MIMO
    "model.author_mamba.num_heads": 112,
    "model.author_mamba.head_dim": 64,
    "model.author_mamba.mimo_rank": 4,
    "model.author_mamba.chunk_size": 16,
    # M2RNN
    "model.recurrent.key_dim": 64,
    "model.recurrent.value_dim": 16,
    "model.recurrent.num_qk_heads": 1,
    "model.recurrent.num_heads": 44,
    # n-gram hash
    "model.embedding.ngram.orders": (2, 3),
    "model.embedding.ngram.heads_per_order": 8,
    "model.embedding.ngram.table_size": 500_000,
    "model.embedding.ngram.dim": 16,
    # MTP depth
    "model.mtp.num_layers": 1,
    # batch on 8 x H200
    "batch.micro_batch_size": 4,
    "batch.global_batch_size": 64,
    "parallelism.num_nodes": 1,
    "parallelism.devices_per_node": 8,
    # training: AdamW, clip, cosine with warm-up, bf16
    "schedule.adam_beta1": 0.9,
    "schedule.adam_beta2": 0.95,
    "schedule.weight_decay": 0.1,
    "schedule.clip_grad": 1.0,
    "schedule.lr": 3e-4,
    "schedule.min_lr": 3e-5,
    "precision": Precision.BF16,
    # the model's parts that are on
    "features.latent_attention": True,
    "features.sparse_attention": True,
    "features.ngram_hash": True,
    "features.structure": None,
    "depth": 52,
}
# The later production shape, where it differs. Its M2RNN has hidden // 80 = 51 heads, rounded up
# to a number that tensor parallelism divides.
NAM56R_4096_FACTS = {
    "name": "nam56r_4096",
    "model.hidden_size": 4096,
    "model.ffn_hidden_size": 21_504,
    "model.attention.num_heads": 32,
    "model.attention.head_dim": 128,
    "model.mamba.num_heads": 64,
    "model.author_mamba.num_heads": 128,
    "model.recurrent.num_heads": 52,
    "model.mtp.num_layers": 2,
}
MODES = [mode.value for mode in ParallelismMode]
FULL = [name for name in RECIPE_NAMES if not name.endswith(("_tiny", "_smoke"))]


def differences(one, other):
    first, second = field_paths(one), field_paths(other)
    return {path: second[path] for path in first if first[path] != second[path]}


@pytest.mark.parametrize(("path", "value"), NAM56R_FACTS.items())
def test_nam56r_has_its_published_numbers(path, value):
    assert field_paths(recipe("nam56r"))[path] == value


def test_nam56r_is_its_pattern_at_depth_52():
    assert str(recipe("nam56r").pattern) == "AEMEAEMEAEMR"


def test_derived_numbers_of_nam56r():
    model = recipe("nam56r").model
    assert model.attention.num_heads * model.attention.head_dim == model.hidden_size
    assert model.mamba.num_heads * model.mamba.head_dim == model.hidden_size  # expand 1
    assert model.author_mamba.num_heads * model.author_mamba.head_dim == 2 * model.hidden_size
    assert model.recurrent.num_heads == model.hidden_size // 80
    ngram = model.embedding.ngram
    rows = len(ngram.orders) * ngram.heads_per_order * ngram.table_size
    assert rows * ngram.dim == pytest.approx(128.0e6, rel=1e-3)


def test_nam56r_4096_differs_from_nam56r_in_its_shape_alone():
    assert differences(recipe("nam56r"), recipe("nam56r_4096")) == NAM56R_4096_FACTS


@pytest.mark.parametrize("mode", MODES)
def test_nam52_differs_from_nam56r_in_name_and_pattern_alone(mode):
    nam52 = recipe("nam52", mode=mode)
    assert set(differences(recipe("nam56r", mode=mode), nam52)) == {"name", "pattern"}
    assert str(nam52.pattern) == "AEMEAEMEAEMM"
    assert not nam52.has(BlockFamily.RECURRENT)


@pytest.mark.parametrize("size", ["_tiny", "_smoke"])
def test_the_small_sizes_of_nam52_and_nam56r_differ_alike(size):
    small = differences(recipe(f"nam56r{size}"), recipe(f"nam52{size}"))
    assert set(small) == {"name", "pattern"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_every_name_and_mode_constructs(name, mode):
    made = recipe(name, mode=mode)
    assert made.name == name
    assert made == recipe(name, mode=ParallelismMode(mode)) == recipe(name.upper(), mode=mode)
    assert made.features.mamba == {"nemo_native": "native", "author_dp": "author"}[mode]


@pytest.mark.parametrize("name", FULL)
def test_the_native_mode_is_tensor_parallel_2_with_sequence_parallel(name):
    layout = recipe(name, mode="nemo_native").parallelism
    assert (layout.tensor_model_parallel_size, layout.sequence_parallel) == (2, True)
    assert layout.data_parallel_size == 4


@pytest.mark.parametrize("name", FULL)
def test_the_author_mode_is_data_parallel_alone(name):
    layout = recipe(name, mode="author_dp").parallelism
    sizes = (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size)
    assert (*sizes, layout.sequence_parallel, layout.data_parallel_size) == (1, 1, False, 8)


@pytest.mark.parametrize("name", [name for name in RECIPE_NAMES if name.endswith("_tiny")])
def test_tiny_is_one_tile(name):
    tiny = recipe(name)
    assert tiny.depth == len(tiny.pattern) == 12
    assert tiny.layers == tiny.pattern


@pytest.mark.parametrize("name", [name for name in RECIPE_NAMES if name.endswith("_smoke")])
def test_smoke_is_all_52_layers(name):
    assert recipe(name).depth == len(recipe(name).layers) == 52


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in RECIPE_NAMES if name not in FULL])
def test_a_small_size_runs_in_one_process_and_keeps_the_block_families(name, mode):
    small, full = recipe(name, mode=mode), recipe(name.rpartition("_")[0], mode=mode)
    assert small.parallelism.world_size == 1
    assert small.precision is Precision.FP32
    assert small.pattern == full.pattern
    assert small.layers.counts().keys() == full.layers.counts().keys()
    assert small.features.latent_attention
    off = (small.features.sparse_attention, small.features.ngram_hash, small.model.mtp.num_layers)
    assert off == (False, False, 0)
    # Their own corpus packs many documents into a row; full-size rows are Megatron's.
    assert (small.corpus, full.corpus) == ("sources", "indexed")
    assert (small.features.reset_state, full.features.reset_state) == (True, False)


def test_small_sizes_can_turn_on_what_they_leave_off():
    every = {"sparse_attention": True, "ngram_hash": True, "mtp.num_layers": 1, "structure": "all"}
    for name in RECIPE_NAMES:
        assert recipe(name, changes=every)


def test_names_are_families_by_sizes():
    families = ("nam52", "nam56r", "nam56r_4096")
    sizes = ("", "_smoke", "_tiny")
    assert tuple(family + size for family in families for size in sizes) == RECIPE_NAMES


def test_each_name_has_its_own_one_line_description():
    lines = [describe(name) for name in RECIPE_NAMES]
    assert len(set(lines)) == len(lines)
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("nam56", "nam56r"),
        ("nam56r-tiny", "nam56r_tiny"),
        ("NAM52_smok", "nam52_smoke"),
        ("nam56r_4069", "nam56r_4096"),
    ],
)
@pytest.mark.parametrize("act", [recipe, describe])
def test_an_unknown_recipe_suggests_the_closest(act, name, close):
    error = refusal(RecipeError, act, name)
    assert error.what == f"No recipe is called {name!r}"
    assert error.allowed == ", ".join(RECIPE_NAMES)
    assert error.hint == repr(close)


@pytest.mark.parametrize("name", ["", "llama", None, 56, ["nam56r"]])
def test_a_name_that_is_close_to_none(name):
    refusal(RecipeError, recipe, name)


@pytest.mark.parametrize(
    ("mode", "close"), [("native", "nemo_native"), ("author", "author_dp"), ("dp", "nemo_native")]
)
def test_an_unknown_mode_suggests_the_closest(mode, close):
    error = refusal(RecipeError, recipe, "nam56r", mode=mode)
    assert error.allowed == "nemo_native, author_dp"
    assert error.hint == f"mode={close!r}"


@pytest.mark.parametrize("mode", [None, 1, "", True, ["nemo_native"]])
def test_a_mode_that_is_none(mode):
    refusal(RecipeError, recipe, "nam56r", mode=mode)

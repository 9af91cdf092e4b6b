"""The planned parameters are those of the model that is built."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch

from megacpp_nemo.contract import RECIPE_NAMES, BlockFamily, HybridRecipe, RecipeError, recipe
from megacpp_nemo.contract.parameters import ParameterKind, Selection
from megacpp_nemo.planner import layer_tensors
from megacpp_nemo.planner.levers import fire_cost, placement
from megacpp_nemo.planner.parameters import padded_vocabulary, parameters
from tests.support.processes import in_process

# What Megatron's command line builds. `test_planner_sharding` has what a NeMo run builds.
BUILT: dict[str, Any] = {
    "features.sparse_attention": False,
    "features.ngram_hash": False,
    "features.structure": None,
    "features.reset_state": False,
    "model.mtp.num_layers": 0,
}
SMALL = ("nam56r_tiny", {"pattern": "AEMR", "depth": 4})
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in RECIPE_NAMES},
    "grouped and dense": (
        SMALL[0],
        {**SMALL[1], "features.latent_attention": False, "features.experts": False},
    ),
    "gated, with latent norms": (
        SMALL[0],
        {**SMALL[1], "model.experts.activation": "swiglu", "model.latent.layernorm": True},
    ),
    "no shared expert": (SMALL[0], {**SMALL[1], "model.experts.shared_expert_size": 0}),
    "sparse attention": (SMALL[0], {"pattern": "AEMD", "features.sparse_attention": True}),
    "Mamba-3": (SMALL[0], {**SMALL[1], "features.mamba": "author"}),
    "Mamba-3 of rank 1": (
        SMALL[0],
        {**SMALL[1], "features.mamba": "author", "model.author_mamba.mimo_rank": 1},
    ),
}


def intent_of(case: str) -> HybridRecipe:
    name, changes = CASES[case]
    return recipe(name, changes={**BUILT, **changes})


@pytest.fixture(scope="module")
def proofs() -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes by name of each case's model, all built in one process that ends with them."""
    from megacpp_nemo.model.proof import prove

    return in_process(lambda: {case: dict(prove(intent_of(case)).parameters) for case in CASES})


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_those_of_the_built_model(case: str, proofs: Any) -> None:
    intent = intent_of(case)
    planned = {parameter.name: parameter.shape for parameter in parameters(intent)}
    built = {name.replace(".local_experts.", "."): shape for name, shape in proofs[case].items()}
    # What a lowered command line builds has the vocabulary of its tokenizer.
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert planned[name] == (padded_vocabulary(intent), built[name][1])
        built[name] = planned[name]
    assert planned == built


def test_the_vocabulary_is_padded_for_the_tensor_ranks() -> None:
    changes = {**BUILT, "model.embedding.vocab_size": 65_537}
    assert padded_vocabulary(recipe("nam56r", changes=changes)) % 256 == 0
    assert padded_vocabulary(recipe("nam56r", changes=changes)) == 65_792


def test_every_part_of_the_full_model_has_parameters() -> None:
    known = parameters(recipe("nam56r"))
    # One depth: 4 of its own, 6 of its attention, 36 of its experts.
    assert sum(parameter.name.startswith("mtp.") for parameter in known) == 46
    # Projections of queries and keys, a norm of two, and weights of 9 indexers.
    assert sum(".indexer." in parameter.name for parameter in known) == 9 * 5


def test_the_n_gram_memory_has_the_published_size() -> None:
    known = {parameter.name: parameter for parameter in parameters(recipe("nam56r"))}
    table = known["embedding.ngram_hash.table.weight"]
    # 16 tables of about 500 000 rows of 16; published as about 128.0M.
    assert prod(table.shape) / 1e6 == pytest.approx(128.0, abs=0.05)
    assert known["embedding.ngram_hash.out_proj.weight"].shape == (3584, 256)
    assert table.kind is ParameterKind.EMBEDDING


def test_the_tables_of_n_grams_are_different_primes_of_the_size_asked_for() -> None:
    sizes = recipe("nam56r").model.embedding.ngram.table_sizes
    assert len(set(sizes)) == len(sizes) == 2 * 8
    assert sizes[:2] == (500_009, 500_029)
    factors = [size for size in sizes for divisor in range(2, 708) if size % divisor == 0]
    assert not factors


@pytest.mark.parametrize(("choice", "rows"), [("core", (10, 17)), ("all", (10, 17, 65, 65, 257))])
def test_structure_channels_have_a_row_for_what_is_absent(
    choice: str, rows: tuple[int, ...]
) -> None:
    intent = recipe("nam56r_tiny", changes={"features.structure": choice})
    shapes = {parameter.name: parameter.shape for parameter in parameters(intent)}
    assert shapes["embedding.structure.table.weight"] == (sum(rows), 64)
    assert shapes["embedding.structure.scale"] == (len(rows),)
    assert shapes["embedding.structure.up_proj.weight"] == (128, 64)


def test_the_parts_of_gated_delta_net_are_no_queries_of_attention() -> None:
    intent = recipe("nam56r_tiny", changes={"pattern": "AG", "depth": 2})
    known = {parameter.name: parameter for parameter in parameters(intent)}
    prefix = "decoder.layers.1.self_attention"
    projection = known[f"{prefix}.in_proj.weight"]
    heights = [(part.name, part.height) for part in projection.parts]
    keys, values = 16 * 128, 32 * 128
    assert heights == [
        ("q", keys), ("k", keys), ("v", values), ("gate", values), ("beta", 32), ("alpha", 32),
    ]  # fmt: skip
    assert sum(height for _, height in heights) == projection.shape[0]
    assert not any(part.query_key for part in projection.parts)
    assert known[f"{prefix}.A_log"].kind is ParameterKind.STATE
    assert known[f"{prefix}.conv1d.weight"].kind is ParameterKind.CONVOLUTION
    assert known[f"{prefix}.out_norm.weight"].kind is ParameterKind.NORM


def test_an_unknown_block_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(layer_tensors._FAMILIES, BlockFamily.RECURRENT)
    with pytest.raises(RecipeError, match="No rule says what this costs: recurrent"):
        parameters(recipe("nam56r"))


def test_a_placement_tells_every_matrix_once() -> None:
    known = parameters(recipe("nam56r_tiny", changes=BUILT))
    placed = placement(known, Selection(target="attention_qk"))
    assert sum(item.size for item in placed) == sum(prod(p.shape) for p in known)
    assert len({item.name for item in placed}) == len(placed)
    chosen = {item.name.rpartition(".")[0] for item in placed if item.refusal is None}
    assert all("self_attention.linear_" in name for name in chosen)
    assert all(item.refusal for item in placed if "mixer" in item.name)


def test_the_cost_of_fire_counts_its_matrix_products() -> None:
    known = parameters(recipe("nam56r_tiny", changes=BUILT))
    one = [p for p in known if p.name == "decoder.layers.1.mlp.experts.0.linear_fc1.weight"]
    (item,) = placement(one, Selection())
    long, short = max(item.shape), min(item.shape)
    assert long < 2 * short  # so of degree 3, and too small for blocks
    cost = fire_cost([item], iterations=10)
    assert cost.flops == 11 * 2 * long * short**2 + 10 * 2 * long * short**2
    assert cost.extra_bytes == 4 * (long * short + short * short)
    assert fire_cost(placement(one, Selection(target="mamba"))).flops == 0


def test_the_cost_is_of_the_polynomials_and_blocks_that_fire_uses() -> None:
    from megacpp_nemo.callbacks import polar, symmetric
    from megacpp_nemo.planner import levers

    assert levers.QUINTIC_FROM == polar.QUINTIC_FROM
    for size in (64, 256, 257, 1024, 1028, 3584):
        kept = symmetric.Symmetric(size, like=torch.empty(0, device="meta")).flat.numel()
        assert levers._kept(size) == pytest.approx(kept / size**2, abs=0.003)

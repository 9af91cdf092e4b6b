"""The input embedding: a no-op when it is attached, what trains of it, and what reaches it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe import moe_utils
from torch import Tensor, nn

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
from megacpp_nemo.model.documents import DocumentBoundaries
from tests.model.building import (
    TOKENIZER,
    assert_near,
    boundaries_of,
    build_model,
    random_tokens,
    run_model,
    small_config,
)

pytestmark = pytest.mark.usefixtures("one_process")
BATCH, SEQ = 2, 16
INPUTS: dict[str, Any] = {"ngram_hash": True, "ngram_table_size": 40, "structure": "all"}
FACTORS = {
    "ngram_hash.table.weight",
    "ngram_hash.out_proj.weight",
    "structure.scale",
    "structure.table.weight",
    "structure.up_proj.weight",
}


@pytest.fixture(autouse=True)
def fresh_globals() -> Iterator[None]:
    yield
    moe_utils.get_moe_layer_wise_logging_tracker().clear()


def structure_of(seed: int = 0, batch: int = BATCH) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, size + 1, (batch, SEQ), generator=draw)
        for name, size in STRUCTURE_CHANNELS.items()
    }


def run(model: nn.Module, labels: Tensor | None = None, **given: Any) -> Tensor:
    """Return logits or losses of one batch, whose first row holds three documents."""
    tokens = given.pop("tokens", random_tokens(BATCH, SEQ))
    ours = {"structure": structure_of()} if model.config.structure else {}
    return model(
        tokens,
        torch.arange(SEQ).expand_as(tokens),
        None,
        labels=labels,
        packed_seq_params=boundaries_of([5, 1, 10], [16]),
        **{**ours, **given},
    )


def factors_of(model: Any) -> dict[str, nn.Parameter]:
    """Return the parameters that the memory and the channels add, by name."""
    embedding = model.embedding.named_parameters()
    return {name: weight for name, weight in embedding if name in FACTORS}


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        ("AEMR", {}),
        ("AEMR", {"reset_state": False}),
        ("AM", {"mtp_num_layers": 2, "mtp_pattern": "AE"}),
        ("AM", {"position_embedding_type": "learned_absolute"}),
        ("AM", {"hidden_dropout": 0.3}),
        ("AM", {"fp32_residual_connection": True, "mtp_num_layers": 1, "mtp_pattern": "M"}),
    ],
    ids=["families", "carried", "depths", "positions", "dropout", "fp32_residual"],
)
def test_attaching_them_changes_no_loss_and_no_other_gradient(pattern, changes):
    found = []
    for inputs in ({}, INPUTS):
        model = build_model(small_config(pattern, **changes, **inputs), shake=False)
        model_parallel_cuda_manual_seed(5)
        losses = run(model, labels=random_tokens(BATCH, SEQ, seed=1))
        losses.mean().backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        found.append((losses, gradients, model))
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
    (plain, expected, _), (attached, gradients, model) = found
    assert torch.equal(plain, attached)
    added = {f"embedding.{name}" for name in FACTORS}
    assert gradients.keys() - expected.keys() == added
    assert not [name for name in expected if not torch.equal(expected[name], gradients[name])]
    # Exactly one factor of each is zero, and it alone can move at first.
    still = {name for name, weight in factors_of(model).items() if not weight.any()}
    assert still == {"ngram_hash.out_proj.weight", "structure.up_proj.weight"}
    moving = {name for name, weight in factors_of(model).items() if weight.grad.any()}
    assert moving == still


@pytest.mark.parametrize("trap", [False, True], ids=["built", "both_factors_zero"])
def test_all_factors_move_in_20_steps_and_with_both_zero_none_ever_would(trap):
    model = build_model(small_config("M", **INPUTS), shake=False)
    factors = factors_of(model)
    if trap:
        for name in ("ngram_hash.table.weight", "structure.table.weight"):
            nn.init.zeros_(factors[name])
    before = {name: weight.detach().clone() for name, weight in factors.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(20):
        optimizer.zero_grad()
        tokens = random_tokens(BATCH, SEQ, seed=step)
        run(
            model, tokens=tokens, labels=random_tokens(BATCH, SEQ, seed=-step - 1)
        ).mean().backward()
        optimizer.step()
    moved = {name for name, weight in factors.items() if not torch.equal(weight, before[name])}
    assert moved == (set() if trap else FACTORS)
    if trap:
        assert not any(weight.grad.any() for weight in factors.values())


def test_what_is_added_is_the_memory_and_the_channels():
    model = build_model(small_config("M", **INPUTS))
    embedding, tokens = model.embedding, random_tokens(BATCH, SEQ)
    positions, ids = torch.arange(SEQ).expand_as(tokens), structure_of()
    documents = boundaries_of([5, 1, 10], [16]).document_ids
    with embedding.reading(tokens, document_ids=documents, structure=ids):
        found = embedding(tokens, positions)
    expected = embedding.word_embeddings(tokens).transpose(0, 1)
    memory, channels = embedding.ngram_hash, embedding.structure
    expected = expected + memory(memory.hash.rows(tokens, documents))
    expected = expected + channels(channels.rows(ids, tokens))
    assert_near(found, expected, 1e-6)
    # Outside of a model's forward pass each row is one document, without channels.
    alone = embedding(tokens, positions)
    with embedding.reading(tokens):
        assert torch.equal(alone, embedding(tokens, positions))
    assert not torch.equal(alone, found)


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_prediction_depth_reads_what_lies_ahead(ahead):
    model = build_model(small_config("M", **INPUTS))
    embedding, tokens = model.embedding, random_tokens(BATCH, SEQ)
    positions = torch.arange(SEQ).expand_as(tokens)
    rolled = nn.functional.pad(tokens[:, ahead:], (0, ahead))
    documents = boundaries_of([5, 1, 10], [16]).document_ids
    with embedding.reading(tokens, document_ids=documents, structure=structure_of()):
        whole = embedding(tokens, positions)
        moved = embedding(rolled, positions, ahead=ahead)
    assert_near(moved[:-ahead], whole[ahead:], 1e-6)
    # Behind the row's end there is no n-gram, and every channel is absent.
    padding = torch.zeros_like(tokens[:, :ahead])
    behind = embedding.word_embeddings(padding).transpose(0, 1)
    absent = embedding.structure(embedding.structure.rows(None, padding))
    assert_near(moved[-ahead:], behind + absent, 1e-6)


def test_no_n_gram_crosses_a_document_even_where_the_state_does():
    model = build_model(small_config("M", **INPUTS, reset_state=False))
    tokens, positions = random_tokens(1, SEQ), torch.arange(SEQ).unsqueeze(0)
    other = tokens.clone()
    other[0, 4] = (other[0, 4] + 1) % 64
    found = []
    for row in (tokens, other):
        documents = torch.tensor([[0] * 5 + [1] * 11])
        with model.embedding.reading(row, document_ids=documents):
            found.append(model.embedding(row, positions)[:, 0])
    moved = (found[0] != found[1]).any(-1).nonzero().flatten().tolist()
    assert moved == [4]


def test_recomputed_layers_train_the_same():
    gradients = []
    for recompute in (None, "full"):
        depths = {"mtp_num_layers": 1, "mtp_pattern": "M"}
        config = small_config("AM", **INPUTS, **depths, recompute_granularity=recompute)
        model = build_model(config)
        run(model, labels=random_tokens(BATCH, SEQ, seed=1)).mean().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_near(gradients[1][name], gradient)
        assert gradient.any(), name


def test_what_is_added_is_dropped_with_the_tokens():
    torch.manual_seed(0)
    model = build_model(small_config("M", **INPUTS, hidden_dropout=0.5))
    tokens, positions = random_tokens(BATCH, SEQ), torch.arange(SEQ).expand(BATCH, SEQ)
    dropped = model.embedding(tokens, positions)
    whole = model.eval().embedding(tokens, positions)
    kept = dropped != 0
    assert 0.4 < kept.float().mean() < 0.6
    assert_near(dropped[kept], 2 * whole[kept], 1e-6)


def test_in_bf16_their_sum_is_bf16_and_fp32_on_an_fp32_residual_stream():
    for wide in (False, True):
        config = small_config("M", **INPUTS, params_dtype=torch.bfloat16, bf16=True)
        config.fp32_residual_connection = wide
        model = config.configure_model(TOKENIZER)
        tokens = random_tokens(BATCH, SEQ)
        embedded = model.embedding(tokens, torch.arange(SEQ).expand_as(tokens))
        assert embedded.dtype is (torch.float32 if wide else torch.bfloat16)


def test_a_channel_that_does_not_fit_the_tokens_stops_the_model_and_leaves_nothing_behind():
    model = build_model(small_config("M", **INPUTS))
    ids = structure_of()
    expected = run(model)
    with pytest.raises(RuntimeRefusal, match="ast_depth is not aligned"):
        run(model, structure={**ids, "ast_depth": ids["ast_depth"][:, 1:]})
    with pytest.raises(RuntimeRefusal, match="lacks the structure channel node_type"):
        run(model, structure={name: ids[name] for name in ids if name != "node_type"})
    assert torch.equal(run(model), expected)


def test_each_can_be_built_without_the_other():
    for inputs in ({"ngram_hash": True, "ngram_table_size": 40}, {"structure": "core"}):
        model = build_model(small_config("M", **inputs))
        ids = structure_of() if "structure" in inputs else None
        assert run(model, structure=ids).isfinite().all()
        names = {name.split(".")[0] for name in factors_of(model)}
        assert names == {"ngram_hash" if "ngram_hash" in inputs else "structure"}


def test_boundaries_reach_the_memory_through_the_model():
    model = build_model(small_config("M", **INPUTS, reset_state=False))
    tokens = random_tokens(1, SEQ)
    whole = run_model(model, tokens)
    one = run_model(model, tokens, DocumentBoundaries.from_ids(torch.zeros_like(tokens)))
    two = run_model(model, tokens, boundaries_of([5, 11]))
    assert torch.equal(whole, one)
    moved = (two != one).any(-1).flatten()
    assert not moved[:5].any()
    assert moved[5]

"""Planned operations are those that torch counts as the model runs."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from megacpp_nemo.contract import BlockFamily, HybridRecipe, RecipeError, recipe
from megacpp_nemo.planner import flops, flops_mixers
from megacpp_nemo.planner.flops import forward_flops, training_flops, training_flops_per_token
from megacpp_nemo.planner.pieces import Piece, Role, pieces
from megacpp_nemo.planner.upstream import upstream_training_flops
from tests.support.processes import in_process

BATCH = 2
# Mamba-3 multiplies once a row for the state that enters it: 0.04% here.
TOLERANCE = 2e-3
BUILT: dict[str, Any] = {
    "model.experts.aux_loss_coeff": 0.0,
}
INPUTS = {"features.ngram_hash": True, "features.structure": "all"}
SPARSE = {"features.sparse_attention": True, "model.sparse_attention.a_ranks": ()}
AUTHOR = {"features.mamba": "author"}
CASES: dict[str, dict[str, Any]] = {
    "native": {"pattern": "AEMR", "model.seq_length": 128},
    "grouped attention, dense MLPs": {
        "pattern": "AE",
        "model.seq_length": 64,
        "features.latent_attention": False,
        "features.experts": False,
    },
    "gated experts": {
        "pattern": "AE",
        "model.seq_length": 64,
        "model.experts.activation": "swiglu",
    },
    "no shared expert": {
        "pattern": "E",
        "model.seq_length": 64,
        "model.experts.shared_expert_size": 0,
    },
    "half a chunk": {"pattern": "MR", "model.seq_length": 96},
    "less than a chunk": {"pattern": "M", "model.seq_length": 40},
    "Mamba-3": {"pattern": "M", "model.seq_length": 128, **AUTHOR},
    "Mamba-3 of rank 1": {
        "pattern": "M",
        "model.seq_length": 120,
        "model.author_mamba.mimo_rank": 1,
        **AUTHOR,
    },
    "sparse attention": {"pattern": "D", "model.seq_length": 128, **SPARSE},
    "input side": {"pattern": "AE", "model.seq_length": 64, **INPUTS},
}
BOTH_WAYS = ("native", "grouped attention, dense MLPs", "gated experts", "input side")
DEPTHS = {
    "pattern": "A",
    "model.seq_length": 64,
    "model.mtp.num_layers": 2,
    "model.mtp.pattern": "EM",
    **INPUTS,
}
Counted = dict[str, float]


def intent_of(changes: dict[str, Any]) -> HybridRecipe:
    depth = len(changes["pattern"])
    return recipe("nam56r_tiny", changes={**BUILT, "depth": depth, **changes})


@pytest.fixture(scope="module")
def counted() -> dict[str, Counted]:
    """Operations per token by module of each case, as torch counts them, from one process."""
    import tests.model.building
    import tests.planner.building  # noqa: F401  the process shares its imports

    return in_process(_counted)


def _counted() -> dict[str, Counted]:
    logging.disable()
    found = {name: _count(intent_of(changes)) for name, changes in CASES.items()}
    found["sparse attention learns"] = _count(intent_of(CASES["sparse attention"]), trains=True)
    found["prediction depths"] = _count(intent_of(DEPTHS), trains=True)
    for name in BOTH_WAYS:
        changes = {**CASES[name], "pattern": "AE"}
        for backward in (False, True):
            found[f"{name}, {backward=}"] = _count(intent_of(changes), True, backward)
    found["delta rule"] = _delta_rule()
    return found


def _count(intent: HybridRecipe, trains: bool = False, backward: bool = False) -> Counted:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tests.model.building import megatron
    from tests.planner.building import config_of

    with megatron():
        config = config_of(intent, perform_initialization=True)
        vocabulary = intent.model.embedding.vocab_size
        model = config.configure_model(SimpleNamespace(vocab_size=vocabulary)).train(trains)
        rows = BATCH, intent.model.seq_length
        tokens = torch.randint(0, vocabulary, rows)
        positions = torch.arange(rows[1]).expand(rows)
        counter: Any = FlopCounterMode(display=False)
        with torch.set_grad_enabled(trains), counter:
            output = model(tokens, positions, None, labels=tokens if trains else None)
            if backward:
                output.sum().backward()
        by_module = {
            name.partition(".")[2]: sum(operations.values()) / tokens.numel()
            for name, operations in counter.get_flop_counts().items()
        }
        return {**by_module, "all": counter.get_total_flops() / tokens.numel()}


def _delta_rule() -> Counted:
    """Count Megatron's own reference of the gated delta rule, of one head of 32 x 16."""
    import torch
    from megatron.core.ssm.gated_delta_net import torch_chunk_gated_delta_rule
    from torch.utils.flop_counter import FlopCounterMode

    found = {}
    for length in (128, 96, 40):
        keys, values, gates = (torch.rand(BATCH, length, 1, *width) for width in ((32,), (16,), ()))
        counter: Any = FlopCounterMode(display=False)
        with counter:
            torch_chunk_gated_delta_rule(keys, keys, values, g=-gates, beta=gates)
        found[str(length)] = counter.get_total_flops() / BATCH / length
    return found


def of(counts: Counted, piece: Piece) -> float:
    """Return what was counted in a piece's module; nothing was where it is not named."""
    return counts.get(piece.prefix.rstrip("."), 0.0)


def unseen(intent: HybridRecipe, piece: Piece) -> float:
    """Return by hand what of a layer the counter cannot see, per token.

    Convolutions are sums of shifted rows; M2RNN's state is advanced in C, by H W of K V V
    multiply-adds, k v^T of K V and q^T H of K V; masked attention is one fused kernel.
    """
    if piece.family is BlockFamily.MAMBA and intent.features.mamba == "native":
        channels = 4 * 32 + 2 * 2 * 16
        return 2 * 4 * channels
    if piece.family is BlockFamily.RECURRENT:
        heads, key, value = 4, 16, 16
        convolved = 2 * 16 + 4 * 16
        return 2 * 4 * convolved + 2 * heads * (key * value * value + 2 * key * value)
    if piece.family is BlockFamily.SPARSE_ATTENTION:
        heads, width, value = 4, 32 + 16, 32
        return 2 * heads * (width + value) * intent.model.seq_length
    return 0.0


@pytest.mark.parametrize("case", CASES)
def test_every_piece_executes_what_is_planned(case: str, counted: dict[str, Counted]) -> None:
    changes = dict(CASES[case])
    intent = intent_of({**changes, "model.sparse_attention.indexer_loss_coeff": 0.0})
    for piece in pieces(intent):
        planned = forward_flops(intent, piece, full_scores=True).total
        executed = of(counted[case], piece) + unseen(intent, piece)
        assert executed == pytest.approx(planned, rel=TOLERANCE), piece.name
    total = sum(forward_flops(intent, piece, full_scores=True).total for piece in pieces(intent))
    executed = counted[case]["all"] + sum(unseen(intent, piece) for piece in pieces(intent))
    assert executed == pytest.approx(total, rel=TOLERANCE)


def test_the_indexers_loss_adds_one_dense_attention(counted: dict[str, Counted]) -> None:
    intent = intent_of(CASES["sparse attention"])
    (layer,) = (piece for piece in pieces(intent) if piece.family)
    terms = forward_flops(intent, layer, full_scores=True).terms
    learns, alone = (
        of(counted[case], layer) for case in ("sparse attention learns", "sparse attention")
    )
    # Its gradients are made in the forward pass: scores again, and those by queries and keys.
    gradients = 3 * terms["indexer's scores"]
    assert learns - alone - gradients == pytest.approx(
        terms["attention for the indexer's loss"], rel=TOLERANCE
    )
    once = terms["attention for the indexer's loss"]
    total = sum(terms.values())
    assert training_flops(intent, layer, full_scores=True) == 3 * (total - once) + once


def test_prediction_depths_join_and_predict_for_themselves(counted: dict[str, Counted]) -> None:
    intent, counts = intent_of(DEPTHS), counted["prediction depths"]
    for depth in (1, 2):
        own = [piece for piece in pieces(intent) if piece.depth == depth]
        assert [piece.role.name for piece in own] == [
            "DEPTH_ENTRY", "DEPTH_LAYER", "DEPTH_LAYER", "DEPTH_NORM",
        ]  # fmt: skip
        planned = sum(
            forward_flops(intent, piece, full_scores=True).total
            for piece in own
            if piece.role is not Role.DEPTH_NORM
        )
        unseen_here = sum(unseen(intent, piece) for piece in own)
        executed = counts[f"mtp.layers.{depth - 1}"] + unseen_here
        assert executed == pytest.approx(planned, rel=TOLERANCE)
    logits = [
        forward_flops(intent, piece).total
        for piece in pieces(intent)
        if piece.role in (Role.HEAD, Role.DEPTH_NORM)
    ]
    assert len(logits) == 3
    assert counts["output_layer"] == pytest.approx(sum(logits), rel=TOLERANCE)


@pytest.mark.parametrize("case", BOTH_WAYS)
def test_a_backward_pass_is_two_forward_passes(case: str, counted: dict[str, Counted]) -> None:
    forward, both = (counted[f"{case}, {backward=}"]["all"] for backward in (False, True))
    assert both == pytest.approx(3 * forward, rel=TOLERANCE)
    intent = intent_of({**CASES[case], "pattern": "AE"})
    assert training_flops_per_token(intent, full_scores=True) == pytest.approx(both, rel=TOLERANCE)


@pytest.mark.parametrize("length", [128, 96, 40])
def test_gated_delta_net_is_counted_as_megatrons_reference_runs(
    length: int, counted: dict[str, Counted]
) -> None:
    shape = {"num_key_heads": 1, "num_value_heads": 1, "key_head_dim": 32, "value_head_dim": 16}
    changes = {f"model.gated_delta_net.{name}": size for name, size in shape.items()}
    intent = intent_of({"pattern": "G", "model.seq_length": length, **changes})
    (layer,) = (piece for piece in pieces(intent) if piece.family)
    terms = forward_flops(intent, layer, full_scores=True).terms
    rule = sum(value for name, value in terms.items() if name.startswith("delta rule"))
    # The inverse's rows are summed one after another, each by a square of the rows before it.
    chunks = -(-length // 64)
    inverse = chunks * sum(2 * row * row for row in range(64)) / length
    assert counted["delta rule"][str(length)] + inverse == pytest.approx(rule, rel=TOLERANCE)
    hidden, rows = 128, 2 * 32 + 2 * 16 + 2
    assert terms["input projection"] == 2 * hidden * rows
    assert terms["output projection"] == 2 * hidden * 16
    assert terms["convolution"] == 2 * 4 * (2 * 32 + 16)


@pytest.mark.parametrize(("length", "most"), [(1, None), (7, None), (7, 3), (7, 7), (7, 99)])
def test_a_token_sees_itself_and_what_comes_before(length: int, most: int | None) -> None:
    seen = [min(position + 1, most or length) for position in range(length)]
    assert flops.keys_seen(length, most) == sum(seen) / length


@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (7, 3), (8, 4), (9, 64)])
def test_a_token_sees_its_own_chunk(length: int, chunk: int) -> None:
    seen = [position % chunk + 1 for position in range(length)]
    assert flops_mixers.chunk_keys(length, chunk, False) == sum(seen) / length
    size = min(chunk, length)
    chunks = -(-length // size)
    executed = chunks * size * size / length
    assert flops_mixers.chunk_keys(length, chunk, True) == pytest.approx(executed)


def test_the_mask_leaves_half_of_the_scores_and_topk_fewer() -> None:
    intent = recipe("nam56r")
    by_family = {piece.family: piece for piece in pieces(intent) if piece.family}
    dense, sparse = (
        [
            forward_flops(intent, by_family[family], full_scores=full).terms["scores"]
            for full in (False, True)
        ]
        for family in (BlockFamily.ATTENTION, BlockFamily.SPARSE_ATTENTION)
    )
    assert dense[0] / dense[1] == 4097 / 2 / 4096
    assert sparse[0] / sparse[1] == (256 * 257 / 2 + (4096 - 256) * 256) / 4096 / 4096


def test_looking_up_is_free_and_projecting_is_not() -> None:
    changes = {"features.structure": "core"}
    intent = recipe("nam56r", changes=changes)
    embedding = pieces(intent)[0]
    assert dict(forward_flops(intent, embedding).terms) == {
        "token lookup": 0,
        "n-gram projection": 2 * 256 * 3584,
        "structure up-projection": 2 * 64 * 3584,
    }


def test_recomputing_layers_adds_their_forward_pass() -> None:
    intent = recipe("nam56r")
    layers = sum(
        forward_flops(intent, piece).total
        for piece in pieces(intent)
        if piece.role in (Role.LAYER, Role.DEPTH_LAYER)
    )
    added = training_flops_per_token(intent, recompute=True) - training_flops_per_token(intent)
    assert added == pytest.approx(layers)


def test_megatrons_own_formula_gives_the_utilization_that_was_published() -> None:
    terms = upstream_training_flops(recipe("nam56r"))
    # 211 000 tokens/s over 8 H200 were published as 50.1% of 989.4 TFLOP/s.
    assert 211_000 / 8 * sum(terms.values()) / 989.4e12 == pytest.approx(0.501, abs=0.001)
    # The width of Mamba is taken as 2 x 3584 instead of 56 x 64, and nothing is said of R.
    mamba = 13 * (2 * 3584 * (4 * 3584 + 1024 + 56) + (7 * 64 + 2 * 3584) * 2 * 3584)
    assert terms["Mamba"] == 3 * mamba
    more = upstream_training_flops(recipe("nam56r"), recurrent_as_mamba=True)
    assert more["Mamba"] / terms["Mamba"] == pytest.approx(17 / 13)


def test_an_unknown_block_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    intent = recipe("nam56r")
    monkeypatch.delitem(flops._FAMILIES, BlockFamily.RECURRENT)
    with pytest.raises(RecipeError, match="No rule says what this costs: recurrent"):
        training_flops_per_token(intent)
    copy = Piece(role=Role.EMBEDDING_COPY, name="copy", prefix="")
    with pytest.raises(RecipeError, match="No rule says what this costs: copy"):
        forward_flops(intent, copy)

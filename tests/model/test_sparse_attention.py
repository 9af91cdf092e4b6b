"""Sparse attention (DSA): its scores, its selection, its loss and what each of them trains."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from megatron.core import num_microbatches_calculator as calculator
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexer
from torch import Tensor, nn

from megacpp_nemo.contract.errors import RecipeError, RuntimeRefusal
from megacpp_nemo.model import sparse_corrections
from megacpp_nemo.model.attention import LatentAttention
from megacpp_nemo.model.gathered_attention import gathering_pays
from megacpp_nemo.model.indexer import (
    as_indices,
    hidden_keys,
    index_scores,
    index_scores_by_head,
    indexer_loss,
    indexer_loss_reference,
    select,
    walsh_hadamard,
)
from megacpp_nemo.model.sparse_attention import SparseLatentAttention
from tests.model.building import (
    assert_near,
    boundaries_of,
    build_layer,
    build_model,
    random_tokens,
    run_model,
    shaken,
    small_config,
)

pytestmark = pytest.mark.usefixtures("one_process")

SEQ, BATCH, HIDDEN = 16, 2, 32
INDEXER = "self_attention.core_attention.indexer."
SMALL = {"dsa_indexer_n_heads": 3, "dsa_indexer_head_dim": 16, "dsa_indexer_topk": 4}


def sparse_config(pattern: str = "AEMR", **changes: Any) -> Any:
    return small_config(pattern, **{"dsa_a_ranks": (0,), **SMALL, **changes})


def attention_of(kind: str = "sparse_attention", **changes: Any) -> Any:
    """Return the attention of one layer, shaken: the same for the same names."""
    return shaken(build_layer(sparse_config("A", **changes), kind)).self_attention


def states(seed: int = 0, seq: int = SEQ) -> Tensor:
    """Return `[seq, batch, hidden]`."""
    return torch.randn(seq, BATCH, HIDDEN, generator=torch.Generator().manual_seed(seed))


def drawn(heads: int = 3, width: int = 8, seq: int = SEQ) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and weights of an indexer, as leaves."""
    draw = torch.Generator().manual_seed(1)
    shapes = (seq, BATCH, heads, width), (seq, BATCH, width), (seq, BATCH, heads)
    queries, keys, weights = (torch.randn(s, generator=draw).requires_grad_() for s in shapes)
    return queries, keys, weights


def distribution(hidden: Tensor, seed: int = 2) -> Tensor:
    """Return `[batch, seq, seq]`, a random distribution over the keys that are not hidden."""
    draw = torch.randn(BATCH, SEQ, SEQ, generator=torch.Generator().manual_seed(seed))
    return draw.masked_fill(hidden, -math.inf).softmax(-1)


# Scores and selection


def test_a_score_is_the_weighted_sum_of_rectified_products():
    queries, keys, weights = (part.detach() for part in drawn())
    scores = index_scores(queries, keys, weights)
    for b, t, s in ((0, 3, 1), (1, 15, 15), (1, 0, 9)):
        by_hand = sum(
            weights[t, b, j] * max(0.0, float(queries[t, b, j] @ keys[s, b])) for j in range(3)
        )
        assert scores[b, t, s].item() == pytest.approx(float(by_hand), abs=1e-5)


def test_scores_by_head_are_the_scores():
    assert_near(index_scores_by_head(*drawn()), index_scores(*drawn()), 1e-6)


def test_a_query_gets_its_best_keys_and_none_that_is_hidden():
    scores = torch.tensor([[[9.0, 8.0, 7.0], [1.0, 3.0, 2.0], [5.0, 1.0, 4.0]]])
    hidden = hidden_keys(3, None, scores.device)
    chosen = select(scores.masked_fill(hidden, -math.inf), hidden, 2)
    assert chosen.int().tolist() == [[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]


def test_of_keys_that_tie_the_first_are_chosen():
    scores = torch.tensor([[[0.0, 2.0, 0.0, 0.0, 1.0, 0.0]]])
    shown = torch.zeros(1, 1, 6, dtype=torch.bool)
    assert select(scores, shown, 4).int().tolist() == [[[1, 1, 1, 0, 1, 0]]]
    assert select(scores[..., :4], shown[..., :4], 4).all()


@pytest.mark.parametrize("topk", [1, 4, SEQ])
def test_chosen_keys_are_listed_in_order(topk):
    hidden = hidden_keys(SEQ, None, torch.device("cpu"))
    scores = distribution(hidden).log()
    chosen = select(scores, hidden, topk)
    best, there = as_indices(chosen, topk)
    for b, t in itertools.product(range(BATCH), range(SEQ)):
        assert best[b, t][there[b, t]].tolist() == chosen[b, t].nonzero().flatten().tolist()


def test_the_hadamard_transform_changes_no_product():
    x, y = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).double()
    turned, other = walsh_hadamard(x), walsh_hadamard(y)
    assert (turned - x).abs().max() > 0.1
    torch.testing.assert_close((turned * other).sum(-1), (x * y).sum(-1))
    torch.testing.assert_close(walsh_hadamard(turned), x)  # its own inverse
    half = walsh_hadamard(torch.ones(4, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert half.tolist() == [2.0, 0.0, 0.0, 0.0]


# The loss


def test_the_loss_and_its_gradients_are_those_of_autograd():
    hidden = hidden_keys(SEQ, None, torch.device("cpu"))
    target = distribution(hidden)
    fast, plain = drawn(), drawn()
    scores = index_scores_by_head(*fast).detach().masked_fill(hidden, -math.inf)
    loss = indexer_loss(*fast, scores, target)
    expected = indexer_loss_reference(index_scores(*plain).masked_fill(hidden, -math.inf), target)
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()
    (3 * expected).backward()
    for ours, theirs in zip(fast, plain, strict=True):
        assert_near(ours.grad, theirs.grad)


def test_the_loss_is_the_divergence_by_hand():
    hidden = hidden_keys(SEQ, None, torch.device("cpu"))
    target, index = distribution(hidden), distribution(hidden, seed=3)
    by_hand = sum(
        float(target[b, t, s] * (target[b, t, s] / index[b, t, s]).log())
        for b in range(BATCH)
        for t in range(SEQ)
        for s in range(t + 1)
    ) / (BATCH * SEQ)
    # The logarithm of a distribution is a score that gives it.
    loss = indexer_loss(*drawn(), index.log(), target)
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_a_perfect_indexer_has_no_loss_and_no_gradient():
    hidden = hidden_keys(SEQ, None, torch.device("cpu"))
    leaves = drawn()
    scores = index_scores(*leaves).detach().masked_fill(hidden, -math.inf)
    loss = indexer_loss(*leaves, scores, scores.softmax(-1))
    assert abs(loss.item()) < 2e-8
    loss.backward()
    assert max(leaf.grad.abs().max() for leaf in leaves) < 1e-7


# The layer


def test_with_as_many_keys_as_tokens_it_is_dense_attention():
    for layernorm in (False, True):
        changes = {"qk_layernorm": layernorm, "dsa_indexer_topk": SEQ}
        sparse = attention_of(**changes)
        dense = attention_of("attention", **changes)
        assert type(dense) is LatentAttention
        missing = sparse.load_state_dict(dense.state_dict(), strict=False)
        assert missing.unexpected_keys == []
        assert all(".indexer." in key for key in missing.missing_keys)
        inputs = states().requires_grad_(), states().requires_grad_()
        outputs = [layer(x)[0] for layer, x in zip((sparse, dense), inputs, strict=True)]
        assert_near(*outputs, 1e-6)
        for output in outputs:
            output.square().sum().backward()
        assert_near(inputs[0].grad, inputs[1].grad, 1e-5)


def reference(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, topk: int, scale: float
) -> Tensor:
    """Return sparse attention query by query `[seq, batch, heads, value width]`."""
    out = torch.zeros(*query.shape[:3], value.size(3))
    for b, t in itertools.product(range(query.size(1)), range(query.size(0))):
        best = sorted((-float(scores[b, t, s]), s) for s in range(t + 1))[:topk]
        for h in range(query.size(2)):
            logits = torch.stack([query[t, b, h] @ key[s, b, h] * scale for _, s in best])
            for p, (_, s) in zip(logits.softmax(0), best, strict=True):
                out[t, b, h] += p * value[s, b, h]
    return out


@pytest.mark.parametrize("topk", [1, 4, 11])
def test_with_fewer_keys_it_is_attention_to_the_best_of_them(topk):
    attention = attention_of(dsa_indexer_topk=topk).eval()
    with torch.no_grad():
        query, key, value, latent, _ = attention.get_query_key_value_tensors(states())
        core = attention.core_attention
        scores = index_scores_by_head(*core.indexer.project(states(), latent))
        expected = reference(query, key, value, scores, topk, attention.softmax_scale)
        found = core(query, key, value, None).view_as(expected)
    assert_near(found, expected, 1e-6)


@pytest.mark.parametrize("layernorm", [False, True])
@pytest.mark.parametrize("topk", [2, 5, SEQ])
def test_gathered_keys_give_what_a_mask_does_with_every_gradient(topk, layernorm):
    found = []
    for gathers in (False, True):
        attention = attention_of(
            dsa_indexer_topk=topk, qk_layernorm=layernorm, reset_attention_mask=True
        )
        attention.core_attention.gathers = gathers
        x = states().requires_grad_()
        output = attention(x, packed_seq_params=boundaries_of([6, 10], [16]))[0]
        (output * states(1)).sum().backward()
        found.append({"output": output, "input": x.grad, **gradients(attention)})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert_near(found[1][name], tensor, 1e-5)


def test_keys_are_gathered_where_they_are_few_and_somebody_measured():
    assert gathering_pays(4096, 256, torch.device("cpu"))
    assert not gathering_pays(4095, 256, torch.device("cpu"))
    assert not gathering_pays(4096, 64, torch.device("cuda"))
    attention = attention_of(dsa_indexer_topk=1, attention_dropout=0.5)
    assert (attention(states())[0] != attention(states())[0]).any()  # masked: it drops


@pytest.mark.parametrize("gathers", [False, True])
def test_a_document_sees_what_it_does_alone(gathers):
    attention = attention_of(reset_attention_mask=True).eval()
    attention.core_attention.gathers = gathers
    x = states()
    packed = attention(x, packed_seq_params=boundaries_of([6, 10], [16]))[0]
    whole = attention(x)[0]
    assert_near(packed[:6, 0], attention(x[:6])[0][:, 0], 1e-5)
    # Rotation is relative, so that the second document's positions may start anywhere.
    assert_near(packed[6:, 0], attention(x[6:])[0][:, 0], 1e-5)
    assert_near(packed[:, 1], whole[:, 1], 1e-6)
    assert (packed[6:, 0] - whole[6:, 0]).abs().max() > 1e-2


def test_documents_are_left_alone_where_the_configuration_does_not_ask():
    attention = attention_of().eval()
    packed = attention(states(), packed_seq_params=boundaries_of([6, 10], [16]))[0]
    assert_near(packed, attention(states())[0], 1e-6)


def test_the_loss_of_a_packed_row_is_that_of_its_documents():
    attention = attention_of(reset_attention_mask=True)
    x = states()[:, :1]
    attention(x, packed_seq_params=boundaries_of([6, 10]))
    packed, _ = attention.core_attention.take_losses()
    parts = []
    for part in (x[:6], x[6:]):
        attention(part)
        parts.append(float(attention.core_attention.take_losses()[0]) * len(part))
    assert float(packed) == pytest.approx(sum(parts) / SEQ, rel=1e-4)


def test_a_token_changes_no_output_before_it():
    model = build_model(sparse_config("AD"))
    tokens = random_tokens(BATCH, SEQ)
    other = tokens.clone()
    other[:, 9] = (other[:, 9] + 1) % 64
    with torch.no_grad():
        change = (run_model(model, other) - run_model(model, tokens)).abs().amax(dim=(0, 2))
    assert change[:9].max() < 1e-6
    assert change[9] > 1e-3


def test_bf16_is_near_fp32():
    wide = attention_of()
    half = attention_of(params_dtype=torch.bfloat16, bf16=True, dsa_indexer_topk=SEQ)
    wide.core_attention.config.dsa_indexer_topk = SEQ
    found = half(states().bfloat16())[0]
    assert found.dtype == torch.bfloat16
    assert_near(found, wide(states())[0], 2e-2)
    found.float().sum().backward()
    for layer in (half, wide):
        assert torch.isfinite(layer.core_attention.take_losses()[0])


# What trains what


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def trained(coefficient: float, weight: float) -> dict[str, Tensor]:
    """Return every gradient, of the language model's loss times `weight` and the indexer's."""
    model = build_model(sparse_config("AEMR", dsa_indexer_loss_coeff=coefficient))
    labels = random_tokens(BATCH, SEQ, seed=1)
    (weight * run_model(model, random_tokens(BATCH, SEQ), labels=labels).mean()).backward()
    return gradients(model)


def test_the_indexer_learns_from_its_own_loss_only_and_nothing_else_does():
    both, without, alone = trained(0.5, 1.0), trained(0.0, 1.0), trained(0.5, 0.0)
    own = {name for name in both if ".indexer." in name}
    assert {name.rpartition(".indexer.")[2] for name in own} == {
        "linear_wq_b.weight",
        "linear_wk.weight",
        "k_norm.weight",
        "k_norm.bias",
        "linear_weights_proj.weight",
    }
    assert own <= without.keys()  # Megatron's overlapped reduction waits for all of them
    assert not any(without[name].any() for name in own)
    for name in both:
        if name in own:
            assert both[name].abs().max() > 0
            assert_near(both[name], alone[name], 1e-6)
        else:
            assert torch.equal(both[name], without[name])


def test_the_coefficient_scales_the_gradient():
    once, twice = trained(0.25, 1.0), trained(0.5, 1.0)
    for name in (name for name in once if ".indexer." in name):
        assert_near(twice[name], 2 * once[name], 1e-6)


def test_micro_batches_share_the_loss():
    attention = attention_of(dsa_indexer_loss_coeff=1.0)
    attention(states())[0].sum().backward()
    whole = gradients(attention.core_attention)
    attention.zero_grad()
    calculator.init_num_microbatches_calculator(0, None, 2, 1, 1)
    try:
        for half in states().split(1, dim=1):
            attention(half)[0].sum().backward()
    finally:
        calculator.destroy_num_microbatches_calculator()
    for name, gradient in gradients(attention.core_attention).items():
        assert_near(gradient, whole[name], 1e-5)


def test_a_scaled_loss_scales_the_indexers_too():
    config = sparse_config("A", dsa_indexer_loss_coeff=1.0)
    found = []
    for factor in (1.0, 8.0):
        config.grad_scale_func = lambda loss, factor=factor: loss * factor
        attention = shaken(build_layer(config, "sparse_attention")).self_attention
        attention(states())[0].sum().backward()
        found.append(gradients(attention.core_attention))
    for name, gradient in found[0].items():
        assert_near(found[1][name], 8 * gradient, 1e-6)


def test_losses_are_counted_in_training_only_and_taken_once():
    attention = attention_of(dsa_indexer_loss_coeff=1e-3)
    core = attention.core_attention
    attention(states())
    attention(states(1))
    total, count = core.take_losses()
    assert count == 2
    assert total > 1e-3  # in nats, whatever the coefficient
    attention.eval()(states())
    with torch.no_grad():
        attention.train()(states())
    assert core.take_losses() == (None, 0)


def test_training_teaches_the_indexer_where_the_heads_look():
    attention = attention_of(dsa_indexer_loss_coeff=1.0)
    optimizer = torch.optim.Adam(attention.core_attention.parameters(), lr=2e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        attention(states())[0].sum().backward()
        optimizer.step()
        losses.append(float(attention.core_attention.take_losses()[0]))
    assert losses[-1] < 0.25 * losses[0]


def test_the_sparse_loss_compares_chosen_keys_only():
    attention = attention_of(dsa_indexer_topk=1, dsa_indexer_use_sparse_loss=True)
    attention(states())
    # With one key both distributions are certain of it.
    assert abs(float(attention.core_attention.take_losses()[0])) < 1e-6


# Where it stands


def kinds(model: nn.Module) -> list[type]:
    return [type(layer.self_attention) for layer in model.decoder.layers]


def test_ranks_and_the_letter_d_choose_the_layers():
    model = build_model(sparse_config("ADAA", dsa_a_ranks=(1,)))
    assert kinds(model) == [
        LatentAttention,
        SparseLatentAttention,
        SparseLatentAttention,
        LatentAttention,
    ]
    assert [layer.layer_number for layer in model.decoder.layers] == [1, 2, 3, 4]
    letters = build_model(sparse_config("DDDA", dsa_a_ranks=()))
    assert kinds(letters) == [SparseLatentAttention] * 3 + [LatentAttention]


def test_megatrons_variant_does_not_touch_dense_layers():
    model = build_model(sparse_config("AA", experimental_attention_variant="dsa"))
    assert kinds(model) == [SparseLatentAttention, LatentAttention]
    run_model(model, random_tokens(BATCH, SEQ))


def test_a_dense_checkpoint_has_the_names_of_a_sparse_one():
    for layernorm in (False, True):
        dense, sparse = (
            {
                key: tuple(value.global_shape)
                for key, value in build_model(
                    sparse_config("AE", dsa_a_ranks=ranks, qk_layernorm=layernorm)
                )
                .sharded_state_dict()
                .items()
                if hasattr(value, "global_shape")
            }
            for ranks in ((), (0,))
        )
        assert dense.items() <= sparse.items()
        assert all(INDEXER in key for key in sparse.keys() - dense.keys())


# What Megatron's classes do otherwise


@pytest.mark.parametrize("correction", sparse_corrections.CORRECTIONS, ids=lambda c: c.name)
def test_every_correction_is_needed_on_this_release(correction):
    assert correction.needed()


def by_hand(attention: Any, x: Tensor, latent: Tensor) -> Tensor:
    """Return the scores `[batch, seq, seq]` from the parameters, rotated as in the paper's code."""
    own, seq = attention.core_attention.indexer, len(x)
    width, rotated, heads = own.index_head_dim, own.qk_pos_emb_head_dim, own.index_n_heads
    half = rotated // 2
    rate = 500_000.0 ** -(torch.arange(half) / half)
    angle = torch.arange(seq).unsqueeze(1) * rate  # [seq, half]

    def turned(part: Tensor) -> Tensor:  # [seq, batch, ..., width]
        view = (seq, *(1,) * (part.dim() - 2), half)
        cos, sin = angle.cos().view(view), angle.sin().view(view)
        a, b, rest = part.split([half, half, width - rotated], dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)

    q = turned((latent @ own.linear_wq_b.weight.T).view(seq, BATCH, heads, width))
    k = x @ own.linear_wk.weight.T
    k = (k - k.mean(-1, keepdim=True)) / (k.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    k = turned(k * own.k_norm.weight + own.k_norm.bias)
    w = x @ own.linear_weights_proj.weight.T / math.sqrt(heads * width)
    dots = torch.einsum("sbhd,tbd->bsht", q, k).relu()
    return (dots * w.transpose(0, 1).unsqueeze(-1)).sum(2)


def scores_of(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indexer's scores, and those by hand from the latent after its norm."""
    latent = attention.get_query_key_value_tensors(x)[3]
    raw = x @ attention.linear_q_down_proj.weight.T
    normal = raw * (raw.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    normal = normal * attention.q_layernorm.weight
    found = index_scores(*attention.core_attention.indexer.project(x, latent))
    return found, by_hand(attention, x, normal)


def test_the_indexers_scores_are_those_computed_by_hand():
    with torch.no_grad():
        assert_near(*scores_of(attention_of(qk_layernorm=True), states()), 1e-5)


def differs(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() > 1e-2 * expected.abs().max())


def test_rotating_as_upstream_does_gives_other_scores(monkeypatch):
    attention = attention_of(qk_layernorm=True)
    with torch.no_grad():
        right = scores_of(attention, states())[1]
        # Neighbouring channels as pairs.
        attention.core_attention.indexer._rotary_config.multi_latent_attention = True
        assert differs(scores_of(attention, states())[0], right)
        attention.core_attention.indexer._rotary_config.multi_latent_attention = False
        # The last channels instead of the first, in the right pairs.
        own = attention.core_attention.indexer
        monkeypatch.setattr(own, "_apply_rope", own_class_rope(own))
        assert differs(scores_of(attention, states())[0], right)


def own_class_rope(own: Any) -> Any:
    """Return upstream's rotation with the pairs that are right."""

    def rotate(*arguments: Any) -> Tensor:
        before, own.config = own.config, own._rotary_config
        try:
            return DSAIndexer._apply_rope(own, *arguments)
        finally:
            own.config = before

    return rotate


def test_a_latent_without_its_norm_gives_other_scores():
    attention = attention_of(qk_layernorm=True)
    with torch.no_grad():
        right = scores_of(attention, states())[1]
        raw = states() @ attention.linear_q_down_proj.weight.T
        wrong = index_scores(*attention.core_attention.indexer.project(states(), raw))
    assert differs(wrong, right)


# What is refused


def test_megatrons_packing_is_refused():
    packed = PackedSeqParams(qkv_format="thd")
    with pytest.raises(RuntimeRefusal, match=r"(?s)packed \(thd\).*document_ids"):
        attention_of()(states(), packed_seq_params=packed)


def test_another_inference_context_than_ours_is_refused():
    with pytest.raises(RuntimeRefusal, match=r"(?s)a context of their own.*GenerationState"):
        attention_of()(states(), inference_context=object())


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"apply_rope_fusion": True}, RuntimeRefusal, "apply_rope_fusion=False"),
        ({"dsa_indexer_head_dim": 24}, RuntimeRefusal, "dsa_indexer_head_dim=32"),
        ({"dsa_indexer_head_dim": 4}, RuntimeRefusal, "dsa_indexer_head_dim=8"),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
            RuntimeRefusal,
            "recompute_granularity=None",
        ),
        ({"calculate_per_token_loss": True}, RuntimeRefusal, "calculate_per_token_loss=False"),
        ({"context_parallel_size": 2}, RecipeError, "context_parallel_size=1"),
        ({"tensor_model_parallel_size": 2}, RuntimeRefusal, "sequence_parallel=True"),
        ({"dsa_a_ranks": (1,)}, RecipeError, "A-rank 1 has no attention layer"),
        ({"dsa_a_ranks": (-1,)}, RecipeError, "SparseAttentionShape.a_ranks"),
        ({"multi_latent_attention": False}, RecipeError, "multi-latent attention"),
        ({"dsa_indexer_topk": 0}, RecipeError, "indexer_topk"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(changes, error, said):
    # Without experts, with which tensor parallelism is refused for a reason of its own.
    with pytest.raises(error) as refusal:
        sparse_config("AM", **changes)
    assert said in str(refusal.value)


def test_the_letter_d_is_refused_like_a_rank():
    with pytest.raises(RuntimeRefusal, match="dsa_indexer_head_dim=32"):
        sparse_config("DM", dsa_a_ranks=(), dsa_indexer_head_dim=24)
    with pytest.raises(RecipeError, match="built on multi-latent attention"):
        sparse_config("DM", dsa_a_ranks=(), multi_latent_attention=False)


def test_several_wrong_settings_are_named_at_once():
    with pytest.raises(RuntimeRefusal) as refusal:
        sparse_config("AM", apply_rope_fusion=True, dsa_indexer_head_dim=24)
    assert len(refusal.value.what.splitlines()) == 3

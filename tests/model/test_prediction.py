"""Multi-token prediction of hybrid models: what each depth sees, predicts and trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.models.mamba import MambaModel
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from torch import Tensor, nn

from megacpp_nemo.callbacks.matrices import matrices_of
from megacpp_nemo.contract.errors import PatternError, RecipeError, RuntimeRefusal
from megacpp_nemo.contract.parameters import Selection
from tests.model.building import (
    VOCABULARY,
    assert_near,
    boundaries_of,
    build_model,
    random_tokens,
    run_model,
    small_config,
)

pytestmark = pytest.mark.usefixtures("one_process")
BATCH, SEQ = 2, 16


@pytest.fixture(autouse=True)
def fresh_globals() -> Iterator[None]:
    """Megatron keeps the layers of the last model, and the schedule's scale, in globals."""
    yield
    moe_utils.get_moe_layer_wise_logging_tracker().clear()
    MTPLossAutoScaler.set_loss_scale(torch.tensor(1.0))


def predicting_model(
    pattern: str = "AM", depths: int = 2, mtp_pattern: str = "A", **changes: Any
) -> Any:
    config = small_config(pattern, mtp_num_layers=depths, mtp_pattern=mtp_pattern, **changes)
    return build_model(config)


class Chain:
    """The depths' hidden states `[seq, batch, hidden]` of the last forward pass."""

    def __init__(self, model: Any) -> None:
        self.states: list[Tensor] = []
        model.mtp.register_forward_hook(self._keep)
        self._parts = 1 + model.config.mtp_num_layers

    def _keep(self, block: nn.Module, given: Any, output: Tensor) -> None:
        self.states = list(output.chunk(self._parts)[1:])


def plain_losses(model: Any, states: list[Tensor], labels: Tensor, mask: Tensor) -> list[Tensor]:
    """Return each depth's mean loss from its hidden states, without any rolling."""
    losses, head = [], model.output_layer.weight
    if head is None:
        head = model.embedding.word_embeddings.weight
    for depth, hidden in enumerate(states, 1):
        kept = hidden.transpose(0, 1)[:, : labels.size(1) - depth]
        logs = torch.log_softmax(kept @ head.T, -1)
        targets, counts = labels[:, depth:], mask[:, depth:]
        chosen = logs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        losses.append(-(chosen * counts).sum() / counts.sum())
    return losses


def orbit(batch: int, seq: int, step: int) -> Tensor:
    """Return rows `[batch, seq]` in which token x is followed by 5 x + 3, modulo 64.

    The map has one cycle of all 64 tokens, so no two shifts of a row agree anywhere.
    """
    rows = [torch.randint(0, VOCABULARY, (batch,), generator=torch.Generator().manual_seed(step))]
    for _ in range(seq - 1):
        rows.append((5 * rows[-1] + 3) % VOCABULARY)
    return torch.stack(rows, 1)


@pytest.mark.parametrize(("depths", "mtp_pattern"), [(1, "AE"), (2, "M")])
def test_every_depth_learns_the_token_it_is_named_for(depths, mtp_pattern):
    model = predicting_model("M", depths, mtp_pattern, mtp_loss_scaling_factor=1.0)
    chain = Chain(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first: Tensor | None = None
    for step in range(80):
        tokens = orbit(8, SEQ + 1, step)
        optimizer.zero_grad()
        run_model(model, tokens[:, :-1], labels=tokens[:, 1:]).mean().backward()
        optimizer.step()
        losses = model.depth_losses.take()
        first = losses if first is None else first
    assert first is not None
    assert first.min() > 3
    assert losses.max() < 0.05
    tokens = orbit(4, SEQ + 1, step=1000)
    run_model(model, tokens[:, :-1], labels=tokens[:, 1:])
    assert len(chain.states) == depths
    for depth, states in enumerate(chain.states, 1):
        said = (states @ model.output_layer.weight.T).argmax(-1).T
        assert torch.equal(said[:, : SEQ - depth], tokens[:, 1 + depth :])


def test_a_depth_sees_its_tokens_and_none_after_them():
    model = predicting_model("AM", 2, "AM")
    chain = Chain(model)
    tokens, labels = random_tokens(1, SEQ), random_tokens(1, SEQ, seed=1)
    run_model(model, tokens, labels=labels)
    before = [states.detach() for states in chain.states]
    for changed in (5, SEQ - 1):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % VOCABULARY
        run_model(model, other, labels=labels)
        for depth, (old, new) in enumerate(zip(before, chain.states, strict=True), 1):
            moved = (old != new).any(-1).flatten()
            # Token 5 reaches depth 1 from position 4 on, where it predicts token 6.
            assert not moved[: changed - depth].any()
            assert moved[changed - depth : SEQ - depth].all()


@pytest.mark.parametrize("tied", [False, True])
def test_losses_and_gradients_are_those_of_a_plain_computation(tied):
    tokens, labels = random_tokens(BATCH, SEQ), random_tokens(BATCH, SEQ, seed=1)
    mask = (torch.rand(BATCH, SEQ, generator=torch.Generator().manual_seed(2)) > 0.3).float()
    positions = torch.arange(SEQ).expand_as(tokens)
    factor, scale = 0.3, 0.25

    def gradients(plain: bool) -> tuple[dict[str, Tensor], Tensor]:
        model = predicting_model(
            "AEMR", 2, "AE", mtp_loss_scaling_factor=factor,
            share_embeddings_and_output_weights=tied,
        )  # fmt: skip
        chain = Chain(model)
        MTPLossAutoScaler.set_loss_scale(torch.tensor(0.0 if plain else scale))
        losses = model(tokens, positions, None, labels=labels, loss_mask=mask)
        own = plain_losses(model, chain.states, labels, mask)
        total = losses.mean()
        if plain:
            total = total + scale * factor / 2 * sum(own)
        total.backward()
        assert_near(model.depth_losses.take(), torch.stack(own).detach())
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
        return {name: weight.grad for name, weight in model.named_parameters()}, losses

    (expected, one), (actual, other) = gradients(plain=True), gradients(plain=False)
    assert torch.equal(one, other)
    for name, gradient in actual.items():
        assert_near(gradient, expected[name])


def test_masked_labels_count_for_nothing():
    model = predicting_model("M", 2, "M")
    tokens, labels = random_tokens(1, SEQ), random_tokens(1, SEQ, seed=1)
    positions, mask = torch.arange(SEQ).unsqueeze(0), torch.ones(1, SEQ)
    mask[0, 6:9] = 0
    found = []
    for shift in (0, 1):
        other = labels.clone()
        other[0, 6:9] = (other[0, 6:9] + shift) % VOCABULARY
        model(tokens, positions, None, labels=other, loss_mask=mask)
        found.append(model.depth_losses.take())
    assert torch.equal(*found)
    model(tokens, positions, None, labels=labels, loss_mask=torch.zeros(1, SEQ))
    assert model.depth_losses.take().tolist() == [0, 0]


def test_losses_per_token_weigh_a_depth_as_the_main_head():
    tokens, labels = random_tokens(BATCH, SEQ), random_tokens(BATCH, SEQ, seed=1)
    found = []
    for per_token in (False, True):
        model = predicting_model("M", 1, "M", calculate_per_token_loss=per_token)
        (run_model(model, tokens, labels=labels).sum() * 0).backward()
        found.append(model.mtp.layers[0].eh_proj.weight.grad)
    assert_near(found[1], BATCH * SEQ * found[0])


def test_the_depths_alone_train_every_part_they_use():
    model = predicting_model("AEMR", 2, "AEM")
    (run_model(model, *batch()).mean() * 0).backward()
    still = [n for n, w in model.named_parameters() if w.grad is None or not w.grad.any()]
    assert not still


def batch() -> tuple[Tensor, None, Tensor]:
    return random_tokens(BATCH, SEQ), None, random_tokens(BATCH, SEQ, seed=1)


def test_without_weight_the_rest_trains_as_if_there_were_no_depths():
    def trained(depths: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        model = predicting_model("AEMR", depths, "AE", mtp_loss_scaling_factor=0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = run_model(model, *batch()).mean()
            loss.backward()
            # Overlapped reduction waits for every gradient.
            assert all(weight.grad is not None for weight in model.parameters())
            optimizer.step()
            losses.append(loss.detach())
        if depths:
            assert model.depth_losses.take().min() > 3
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
        return dict(model.named_parameters()), losses

    (plain, expected), (measured, losses) = trained(0), trained(1)
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    for name, weight in plain.items():
        assert torch.equal(weight, measured[name]), name


def test_evaluation_and_inference_leave_the_depths_out():
    model = predicting_model()
    tokens, _, labels = batch()
    plain = build_model(small_config("AM"))
    assert type(plain) is MambaModel
    chain = Chain(model)
    assert torch.equal(run_model(model, tokens), run_model(plain, tokens))
    model.eval()
    losses = run_model(model, tokens, labels=labels)
    assert torch.equal(losses, run_model(plain, tokens, labels=labels))
    assert chain.states == []
    assert model.depth_losses.take() is None


def test_losses_are_means_over_micro_batches_and_start_anew():
    model = predicting_model("M", 2, "M")
    found = []
    for seed in (1, 2):
        run_model(model, random_tokens(1, SEQ, seed), labels=random_tokens(1, SEQ, seed + 9))
        found.append(model.depth_losses.take())
    for seed in (1, 2):
        run_model(model, random_tokens(1, SEQ, seed), labels=random_tokens(1, SEQ, seed + 9))
    assert_near(model.depth_losses.take(), sum(found) / 2)
    assert model.depth_losses.take() is None


def test_document_boundaries_reach_the_layers_of_a_depth():
    model = predicting_model("M", 1, "M")
    chain = Chain(model)
    tokens, labels = random_tokens(1, SEQ), random_tokens(1, SEQ, seed=1)
    other = tokens.clone()
    other[0, 3] = (other[0, 3] + 1) % VOCABULARY
    found = []
    for row in (tokens, other):
        run_model(model, row, boundaries_of([6, 10]), labels=labels)
        found.append(chain.states[0])
    moved = (found[0] != found[1]).any(-1).flatten()
    assert moved[2:6].all()
    assert not moved[6:].any()


def test_a_depth_without_experts_can_follow_a_pattern_that_has_them():
    model = predicting_model("AM", 1, "E", experts=False, num_moe_experts=None)
    run_model(model, *batch()).mean().backward()
    assert model.mtp.layers[0].mtp_model_layer.layers[0].mlp.linear_fc1.weight.grad.any()


def test_levers_find_the_matrices_of_a_depth():
    model = predicting_model("M", 1, "A")
    found = {matrix.name: matrix.shape for matrix in matrices_of([model], Selection())}
    assert found["mtp.layers.0.eh_proj.weight"] == (32, 64)
    latent = "mtp.layers.0.mtp_model_layer.layers.0.self_attention.linear_kv_down_proj.weight"
    assert found[f"{latent}[k_rotary]"] == (8, 32)


def test_layers_of_a_depth_have_its_number():
    # Megatron has one place for the load-balancing loss of each depth.
    model = predicting_model("AE", 2, "AEM")
    stacks = [depth.mtp_model_layer for depth in model.mtp.layers]
    assert [[layer.layer_number for layer in stack.layers] for stack in stacks] == [
        [3, 3, 3],
        [4, 4, 4],
    ]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mtp_num_layers": 16}, RecipeError, "(?s)deeper than the sequence.*from 0 to 15"),
        ({"mtp_num_layers": -1}, RecipeError, "num_layers"),
        ({"mtp_loss_scaling_factor": -1.0}, RecipeError, "loss_scaling_factor"),
        ({"mtp_loss_scaling_factor": None}, RecipeError, "loss_scaling_factor"),
        ({"mtp_pattern": "AR"}, PatternError, "few plain layers"),
        ({"mtp_pattern": "A|E"}, PatternError, "few plain layers"),
        ({"mtp_pattern": "AX"}, PatternError, "X"),
        ({"position_embedding_type": "learned_absolute"}, RuntimeRefusal, "learned positions"),
        ({"mtp_pattern": "E", "num_moe_experts": None}, RecipeError, "no experts"),
        (
            {"mtp_pattern": "A", "tensor_model_parallel_size": 2},
            RuntimeRefusal,
            "without sequence parallelism",
        ),
    ],
)
def test_bad_input_is_refused(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        small_config("MM", **{"mtp_num_layers": 1, "mtp_pattern": "M", **changes})
    assert caught.value.hint


def test_a_family_that_no_layer_is_built_for_is_refused():
    config = small_config("M", mtp_num_layers=1, mtp_pattern="G")
    with pytest.raises(RuntimeRefusal, match="mtp_pattern G"):
        build_model(config)

"""Recomputed activations: the same losses and gradients, less kept, more run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.moe import moe_utils
from torch import Tensor, nn

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.model.recompute import refuse_recompute, run_again
from tests.model.building import boundaries_of, build_model, random_tokens, run_model, small_config

pytestmark = pytest.mark.usefixtures("one_process")
SEQ = 16
SPARSE = {
    "dsa_a_ranks": (0,),
    "dsa_indexer_n_heads": 2,
    "dsa_indexer_head_dim": 8,
    "dsa_indexer_topk": 4,
}
DEPTH = {"mtp_num_layers": 1, "mtp_pattern": "AEM"}
DROPOUT = {"hidden_dropout": 0.3, "attention_dropout": 0.2}
FULL = {"recompute_granularity": "full"}


class Step(NamedTuple):
    """What a training step showed.

    Args:
        losses: `[batch, seq]`.
        gradients: By parameter; zeros where there is none.
        routed: Tokens that each router sent to its experts.
        runs: Forward passes of each module.
        kept_bytes: What autograd kept for the backward pass, each storage once.
        generators: Random state afterwards.
    """

    losses: Tensor
    gradients: dict[str, Tensor]
    routed: list[Tensor]
    runs: Counter[str]
    kept_bytes: int
    generators: list[Tensor]


@pytest.fixture(autouse=True)
def fresh_globals() -> Iterator[None]:
    """Megatron keeps the number of layers of the last model's prediction depths in globals."""
    moe_utils.get_moe_layer_wise_logging_tracker().clear()
    yield
    moe_utils.get_moe_layer_wise_logging_tracker().clear()


def take_step(
    pattern: str, *, trains_embedding: bool = True, wrapped: bool = False, **changes: Any
) -> Step:
    model = build_model(small_config(pattern, **changes))
    for layer in model.decoder.layers if wrapped else ():
        run_again(layer)
    model.embedding.requires_grad_(trains_embedding)
    runs: Counter[str] = Counter()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: runs.update([name]))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = run_model(
            model,
            random_tokens(2, SEQ),
            boundaries_of([5, 1, 10], [16]),
            labels=random_tokens(2, SEQ, seed=1),
        )
    losses.sum().backward()
    tracker = moe_utils.get_moe_layer_wise_logging_tracker()
    routed = [m.local_tokens_per_expert for m in model.modules() if hasattr(m, "expert_bias")]
    return Step(
        losses.detach(),
        {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in model.named_parameters()
        },
        [*routed, *(entry["values"] for entry in tracker.values()), *indexer_losses(model)],
        runs,
        sum(kept.values()),
        [torch.get_rng_state(), *get_cuda_rng_tracker().get_states().values()],
    )


def indexer_losses(model: nn.Module) -> list[Tensor]:
    """Return the sum of each indexer's losses and their number."""
    cores = [module for module in model.modules() if hasattr(module, "take_losses")]
    return [torch.tensor(core.take_losses()) for core in cores]


def assert_same(found: Step, expected: Step) -> None:
    """Assert that two steps computed the same, to the bit."""
    assert torch.equal(found.losses, expected.losses)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert torch.equal(found.gradients[name], gradient), name
    for ours, theirs in zip(found.routed, expected.routed, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(found.generators, expected.generators, strict=True):
        assert torch.equal(ours, theirs)


def again(found: Step, expected: Step) -> set[str]:
    """Return the modules that ran once more."""
    return {name for name, count in (found.runs - expected.runs).items() if count == 1}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"multi_latent_attention": False, "num_query_groups": 2},
        {"experts": False},
        SPARSE,
        DROPOUT,
        DEPTH,
        {"mamba_lane": "author", "author_mamba_num_heads": 4, "author_mamba_head_dim": 8},
    ],
    ids=["latent", "grouped", "dense", "sparse", "dropout", "depth", "author"],
)
def test_whole_layers_run_again_and_nothing_else_changes(changes):
    expected = take_step("AEMR", **changes)
    found = take_step("AEMR", **changes, **FULL)
    assert_same(found, expected)
    assert found.kept_bytes < 0.7 * expected.kept_bytes
    layers = {f"decoder.layers.{place}" for place in range(4)}
    layers |= {
        name for name in expected.runs if name.startswith("mtp.") and name[:-1].endswith("layers.")
    } - {"mtp.layers.0"}
    assert layers <= again(found, expected)
    # Embedding, final norm, head, and what joins the depths run once.
    others = {name for name in again(found, expected) if not name.startswith(tuple(layers))}
    assert not others


@pytest.mark.parametrize(
    ("method", "number", "places"),
    [("uniform", 3, "0123"), ("uniform", 9, "0123"), ("block", 2, "01"), ("block", 9, "0123")],
)
def test_the_method_and_the_number_of_layers_decide_which_run_again(method, number, places):
    expected = take_step("AEMR")
    found = take_step("AEMR", **FULL, recompute_method=method, recompute_num_layers=number)
    assert_same(found, expected)
    layers = {name for name in again(found, expected) if name[:-1] == "decoder.layers."}
    assert layers == {f"decoder.layers.{place}" for place in places}


def test_layers_recomputed_together_keep_less_than_each_by_itself():
    each = take_step("AEMR", **FULL)
    together = take_step("AEMR", **FULL, recompute_num_layers=4)
    assert together.kept_bytes < each.kept_bytes


def test_layers_under_a_frozen_embedding_still_learn():
    expected = take_step("AEMR", trains_embedding=False)
    found = take_step("AEMR", trains_embedding=False, **FULL)
    assert_same(found, expected)
    assert found.gradients["decoder.layers.0.input_layernorm.weight"].any()
    assert "decoder.layers.0" not in again(found, expected)
    assert "decoder.layers.1" in again(found, expected)


@pytest.mark.parametrize("changes", [{}, SPARSE, DROPOUT], ids=["latent", "sparse", "dropout"])
def test_a_layer_runs_again_in_a_stack_that_keeps_everything(changes):
    expected = take_step("AEMR", **changes)
    found = take_step("AEMR", wrapped=True, **changes)
    assert_same(found, expected)
    assert found.kept_bytes < 0.7 * expected.kept_bytes
    parts = {f"decoder.layers.{place}" for place in ("0.self_attention", "1.mlp", "2.mixer")}
    assert parts <= again(found, expected)
    frozen = take_step("AEMR", wrapped=True, trains_embedding=False, **changes)
    assert "decoder.layers.0.self_attention" not in again(frozen, expected)


def test_validation_recomputes_nothing():
    model = build_model(small_config("AEMR", **FULL)).eval()
    runs: list[nn.Module] = []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda layer, *_: runs.append(layer))
    run_model(model, random_tokens(1, SEQ)).sum().backward()
    assert len(runs) == 4


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_layer_runs_again_as_of_its_own_micro_batch(wrapped):
    model = build_model(small_config("AM", **({} if wrapped else FULL)))
    told: list[int] = []
    for layer in model.decoder.layers:
        if wrapped:
            run_again(layer)
        inside = getattr(layer, "mixer", getattr(layer, "self_attention", layer))
        inside.register_forward_hook(lambda *_, own=layer: told.append(own.current_microbatch))

    def forward(number: int) -> Tensor:
        for layer in model.decoder.layers:
            layer.current_microbatch = number
        return run_model(model, random_tokens(1, SEQ, seed=number)).sum()

    first, second = forward(0), forward(1)
    first.backward()
    assert told == [0, 0, 1, 1, 0, 0]
    assert [layer.current_microbatch for layer in model.decoder.layers] == [1, 1]
    second.backward()
    assert told[6:] == [1, 1]


@pytest.mark.parametrize(
    ("part", "module", "changes"),
    [
        ("core_attn", "decoder.layers.0.self_attention.core_attention", {}),
        ("core_attn", "decoder.layers.0.self_attention.core_attention", DROPOUT),
        (
            "core_attn",
            "decoder.layers.0.self_attention.core_attention",
            {"multi_latent_attention": False, "num_query_groups": 2},
        ),
        ("mla_up_proj", "decoder.layers.0.self_attention.linear_kv_up_proj", {}),
        ("mla_up_proj", "decoder.layers.0.self_attention.linear_kv_up_proj", SPARSE),
        ("mlp", "decoder.layers.1.mlp.linear_fc2", {"experts": False}),
        ("moe", "decoder.layers.1.mlp.router", {}),
        ("shared_experts", "decoder.layers.1.mlp.shared_experts", {}),
    ],
)
def test_a_part_runs_again_and_nothing_else_changes(part, module, changes):
    expected = take_step("AEMR", **changes)
    parts = {"recompute_granularity": "selective", "recompute_modules": [part]}
    found = take_step("AEMR", **changes, **parts)
    assert_same(found, expected)
    assert module in again(found, expected)


@pytest.mark.parametrize(
    ("pattern", "part", "changes"),
    [
        ("MR", "core_attn", {}),
        ("MR", "layernorm", {}),
        ("A", "moe", {}),
        ("A", "mlp", {}),
        ("AE", "mlp", {}),
        ("AE", "moe", {"experts": False}),
        ("AE", "moe_act", {}),
        ("AE", "shared_experts", {"moe_shared_expert_intermediate_size": None}),
        ("AE", "mla_up_proj", {"multi_latent_attention": False}),
    ],
)
def test_a_part_that_no_layer_recomputes_is_refused_by_name(pattern, part, changes):
    parts = {"recompute_granularity": "selective", "recompute_modules": [part]}
    with pytest.raises(RuntimeRefusal, match=f"No layer of the model recomputes {part}"):
        small_config(pattern, **changes, **parts)


def test_norms_are_recomputed_where_transformer_engine_is(monkeypatch):
    config = small_config("AEMR")
    config.recompute_granularity, config.recompute_modules = "selective", ["layernorm"]
    with pytest.raises(RuntimeRefusal, match=r"layernorm[\s\S]*no Transformer Engine"):
        refuse_recompute(config)
    monkeypatch.setattr("megacpp_nemo.model.recompute.transformer_engine_available", lambda: True)
    refuse_recompute(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recompute_granularity": "whole"}, "No recomputation is called 'whole'"),
        ({**FULL, "recompute_method": "even"}, "recompute_method='even'"),
        ({**FULL, "recompute_num_layers": 0}, "recompute_num_layers=0"),
        ({**FULL, "distribute_saved_activations": True}, "distribute_saved_activations=False"),
        (
            {
                "recompute_granularity": "selective",
                "recompute_modules": ["moe"],
                "recompute_num_layers": 1,
            },
            "recompute_num_layers=None",
        ),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["moe", "conv"]},
            r"recomputes conv[\s\S]*recompute_modules=\['moe'\]",
        ),
    ],
)
def test_what_cannot_be_recomputed_so_is_refused(changes, message):
    with pytest.raises(RuntimeRefusal, match=message):
        small_config("AEMR", **changes)


def test_only_fp8_scales_that_move_with_each_pass_are_refused():
    config = small_config("AEMR", **FULL)
    config.fp8, config.fp8_recipe = "hybrid", "tensorwise"
    refuse_recompute(config)
    config.fp8_recipe = "delayed"
    with pytest.raises(RuntimeRefusal, match="delayed scaling moves"):
        refuse_recompute(config)

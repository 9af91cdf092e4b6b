"""What stands at each depth of a hybrid stack, and which of it runs in FP8."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from megatron.core.ssm import mamba_block
from megatron.core.ssm.mamba_hybrid_layer_allocation import Symbols
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer

from megacpp_nemo.contract.errors import PatternError, RuntimeRefusal
from megacpp_nemo.host import compat
from megacpp_nemo.model import experts, stack
from megacpp_nemo.model.attention import GroupedAttention, LatentAttention
from megacpp_nemo.model.mamba import PortableMambaMixer
from megacpp_nemo.model.norms import LocalRMSNorm
from megacpp_nemo.model.recurrent import RecurrentMixer
from megacpp_nemo.model.specs import Backend, hybrid_stack_spec
from tests.model.building import build_model, groups, random_tokens, run_model, small_config

pytestmark = pytest.mark.usefixtures("one_process")


def build_stack(config: Any, pattern: str, pg_collection: Any = None) -> stack.HybridStack:
    """Build the stack alone, as Megatron's model does."""
    return build_module(
        hybrid_stack_spec(config),
        config,
        hybrid_override_pattern=pattern,
        pg_collection=pg_collection or groups(),
    )


class Stages:
    """Process groups of a pipeline, seen from one of its stages."""

    def __init__(self, size: int, rank: int) -> None:
        self._groups = groups()
        self.pp = self
        self.size, self.rank = (lambda: size), (lambda: rank)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._groups, name)


def test_each_family_is_built_from_its_own_classes():
    layers = build_stack(small_config(), "AEMR").layers
    attention, expert, mamba, recurrent = layers
    assert type(attention) is TransformerLayer
    assert type(attention.self_attention) is LatentAttention
    assert isinstance(attention.mlp, IdentityOp)
    assert type(expert) is experts.ExpertsLayer
    assert isinstance(expert, MoETransformerLayer)
    assert type(expert.mlp) is MoELayer
    assert isinstance(expert.self_attention, IdentityOp)
    assert type(mamba) is type(recurrent) is MambaLayer
    assert type(mamba.mixer) is PortableMambaMixer
    assert type(recurrent.mixer) is RecurrentMixer


def test_plain_attention_is_built_where_latent_attention_is_off():
    (layer,) = build_stack(small_config("A", multi_latent_attention=False), "A").layers
    assert type(layer.self_attention) is GroupedAttention


def test_e_layers_are_dense_mlps_where_experts_are_off():
    config = small_config("AEMR", experts=False)
    model = build_model(config)
    layer = model.decoder.layers[1]
    assert type(layer) is MLPLayer
    assert type(layer.mlp) is MLP
    assert layer.mlp.linear_fc1.weight.shape == (config.ffn_hidden_size, config.hidden_size)
    assert type(layer.pre_mlp_layernorm) is LocalRMSNorm
    assert model.decoder.layer_type_list[1] == Symbols.MLP
    run_model(model, random_tokens(1, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_every_layer_starts_with_a_norm_and_the_stack_ends_with_one():
    model = build_stack(small_config(qk_layernorm=True), "AEMR")
    attention, expert, mamba, recurrent = model.layers
    norms = [
        attention.input_layernorm,
        attention.self_attention.q_layernorm,
        attention.self_attention.kv_layernorm,
        expert.pre_mlp_layernorm,
        mamba.norm,
        recurrent.norm,
        model.final_norm,
    ]
    assert all(type(norm) is LocalRMSNorm for norm in norms)


def test_latents_have_no_norms_unless_asked_for_as_in_megatrons_hybrids():
    (layer,) = build_stack(small_config("A"), "A").layers
    assert isinstance(layer.self_attention.q_layernorm, IdentityOp)
    assert isinstance(layer.self_attention.kv_layernorm, IdentityOp)


def test_the_tiled_pattern_numbers_layers_from_one():
    model = build_stack(small_config("AEMR", num_layers=6), "AEMR")
    assert [layer.layer_number for layer in model.layers] == [1, 2, 3, 4, 5, 6]
    assert model.num_layers_per_pipeline_rank == 6


def test_the_bookkeeping_has_megatrons_symbols():
    model = build_stack(small_config("RAEM"), "RAEM")
    assert model.layer_type_list == ["R", Symbols.ATTENTION, Symbols.MOE, Symbols.MAMBA]
    # Read by Megatron's inference: the state of the first Mamba layer, passing over R.
    shapes = model.layers[3].mixer.mamba_state_shapes_per_request()
    assert model.mamba_state_shapes_per_request() == shapes


@pytest.mark.parametrize(
    ("pattern", "rank", "numbers"),
    [("AEMR", 0, [1, 2]), ("AEMR", 1, [3, 4]), ("A|EMR", 0, [1]), ("A|EMR", 1, [2, 3, 4])],
)
def test_layers_of_a_stage_have_their_global_numbers(pattern, rank, numbers):
    config = small_config(pattern, pipeline_model_parallel_size=2)
    model = build_stack(config, pattern, Stages(2, rank))
    assert [layer.layer_number for layer in model.layers] == numbers
    for layer in model.layers:
        inner = getattr(layer, "mixer", None) or layer.self_attention
        if not isinstance(inner, IdentityOp):
            assert inner.layer_number == layer.layer_number
        if isinstance(layer, experts.ExpertsLayer):
            assert layer.mlp.router.layer_number == layer.layer_number


@pytest.mark.parametrize(("letter", "name"), [("G", "gated_delta_net")])
def test_a_family_without_a_layer_is_refused_by_name(letter, name):
    with pytest.raises(RuntimeRefusal, match=f"family {name}[\\s\\S]*A \\(attention\\)"):
        build_stack(small_config("AM"), f"A{letter}")
    with pytest.raises(RuntimeRefusal, match=name):
        build_model(small_config(f"A{letter}"))


def test_experts_without_a_number_of_experts_are_refused_by_name():
    with pytest.raises(RuntimeRefusal, match="family experts"):
        build_stack(small_config("A", num_moe_experts=None), "E")


@pytest.mark.parametrize(
    ("pattern", "stages", "error", "message"),
    [
        ("AE|M|R", 2, PatternError, "multiple of the pipeline stages"),
        ("A|E|M|R", 2, RuntimeRefusal, "pipeline_model_parallel_size=4"),
        ("AE|MR", 1, RuntimeRefusal, "pipeline_model_parallel_size=2"),
        ("AEMRA", 2, PatternError, "do not divide evenly"),
        ("AE|M", 2, PatternError, "length must equal the depth"),
    ],
)
def test_a_wrong_number_of_segments_is_refused(pattern, stages, error, message):
    config = small_config("AEMR", num_layers=4 if "|" in pattern else len(pattern))
    with pytest.raises(error, match=message):
        build_stack(config, pattern, Stages(stages, 0))


@pytest.fixture
def fp8_contexts(monkeypatch) -> list[tuple[int, bool]]:
    """Record (layer index, whether it is for construction) of every FP8 context entered."""
    entered: list[tuple[int, bool]] = []

    def enter(config: Any, layer_no: int = -1, is_init: bool = False) -> Any:
        assert config.fp8
        entered.append((layer_no, is_init))
        return nullcontext()

    local = Backend(transformer_engine=False, mamba="portable")
    monkeypatch.setattr(compat, "transformer_engine_available", lambda: True)
    monkeypatch.setattr(Backend, "probe", lambda *args, **kwargs: local)
    monkeypatch.setattr(stack, "get_fp8_context", enter)
    monkeypatch.setattr(experts, "get_fp8_context", enter)
    monkeypatch.setattr(mamba_block, "get_fp8_context", enter)
    # An expert's padding for FP8 is Transformer Engine's.
    monkeypatch.setattr(
        MoETransformerLayer, "forward", lambda self, hidden_states, **kwargs: (hidden_states, None)
    )
    return entered


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_only_expert_layers_enter_fp8(fp8_contexts, recipe):
    # A shared expert asks for Transformer Engine's version.
    config = small_config("AEMREA", moe_shared_expert_intermediate_size=None)
    config.fp8, config.fp8_recipe = "hybrid", recipe
    model = build_model(config)
    assert fp8_contexts == [(1, True), (4, True)]
    fp8_contexts.clear()
    run_model(model, random_tokens(1, 16))
    assert fp8_contexts == [(1, False), (4, False)]


def test_every_other_layer_has_a_configuration_without_fp8(fp8_contexts):
    config = small_config("AEMR")
    config.fp8 = "hybrid"
    model = build_model(config).decoder
    attention, expert, mamba, recurrent = model.layers
    assert expert.config is config
    assert expert.mlp.config.fp8 == "hybrid"
    for module in (model, attention, attention.self_attention, mamba.mixer, recurrent.mixer):
        assert module.config.fp8 is None
    assert config.fp8 == "hybrid"


def test_without_fp8_all_layers_share_the_configuration_and_enter_no_context(monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an FP8 context was entered")

    monkeypatch.setattr(stack, "get_fp8_context", refuse)
    monkeypatch.setattr(experts, "get_fp8_context", refuse)
    config = small_config("AEMR")
    model = build_model(config)
    assert all(layer.config is config for layer in model.decoder.layers)
    assert torch.isfinite(run_model(model, random_tokens(1, 16))).all()

"""Which modules the specs choose on which machine."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from megatron.core.extensions import transformer_engine_spec_provider as engine_provider
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer

from megacpp_nemo.contract.errors import RecipeError, RuntimeRefusal
from megacpp_nemo.model.attention import GroupedAttention, LatentAttention, LatentDotProduct
from megacpp_nemo.model.experts import ExpertsLayer
from megacpp_nemo.model.mamba import FusedMambaMixer, PortableMambaMixer
from megacpp_nemo.model.norms import LocalRMSNorm
from megacpp_nemo.model.recurrent import RecurrentMixer
from megacpp_nemo.model.specs import Backend, hybrid_stack_spec
from megacpp_nemo.model.stack import HybridStack
from tests.model.building import small_config
from tests.model.conftest import KERNELS


@pytest.mark.parametrize("path", ["auto", "fused"])
def test_a_cuda_machine_with_the_kernels_runs_the_fused_mixer(machine, path):
    machine()
    assert Backend.probe(path) == Backend(transformer_engine=True, mamba="fused")


@pytest.mark.parametrize(
    "lacking",
    [
        {"kernels": ()},
        {"kernels": ("mamba_ssm",)},
        {"kernels": ("causal_conv1d",)},
        {"cuda": False},
    ],
)
def test_a_machine_that_lacks_anything_runs_the_portable_mixer(machine, lacking):
    machine(**lacking)
    assert Backend.probe().mamba != "fused"


@pytest.mark.parametrize(
    ("lacking", "named"),
    [
        ({"kernels": ()}, "without mamba-ssm, causal-conv1d"),
        ({"kernels": ("mamba_ssm",)}, "without causal-conv1d"),
        ({"cuda": False}, "without a CUDA device"),
        ({"kernels": ("causal_conv1d",), "cuda": False}, "without mamba-ssm, a CUDA device"),
    ],
)
def test_the_fused_mixer_demanded_in_vain_is_refused_by_what_is_missing(machine, lacking, named):
    machine(**lacking)
    with pytest.raises(RuntimeRefusal) as refusal:
        Backend.probe("fused")
    assert refusal.value.given.endswith(named)
    assert "mamba_path='auto'" in refusal.value.hint


def test_the_portable_mixer_can_be_demanded_where_kernels_are(machine):
    machine()
    assert Backend.probe("portable") == Backend(transformer_engine=True, mamba="portable")


@pytest.mark.parametrize("engine", [False, True])
def test_transformer_engine_is_probed_apart_from_the_kernels(machine, engine):
    machine(engine=engine, kernels=(), cuda=False)
    assert Backend.probe().transformer_engine is engine


def test_this_machine_is_probed_if_no_backend_is_given(machine):
    machine(kernels=(), engine=False)
    mamba = hybrid_stack_spec(small_config()).submodules.mamba_layer
    assert mamba.submodules.mixer.module is PortableMambaMixer


@pytest.mark.parametrize("path", ["fast", "", "Fused mixer"])
def test_an_unknown_path_is_refused_with_the_known_ones(path):
    with pytest.raises(RecipeError, match=r"allowed: auto, fused, split, portable"):
        small_config(mamba_path=path)


@pytest.mark.parametrize(
    ("engine", "fused", "words"),
    [
        (False, False, "local modules, portable Mamba mixer"),
        (True, True, "Transformer Engine modules, fused Mamba mixer"),
    ],
)
@pytest.mark.usefixtures("with_engine")
def test_the_choice_is_in_the_log(machine, caplog, engine, fused, words):
    machine(kernels=KERNELS if fused else (), engine=engine)
    with caplog.at_level(logging.INFO, logger="megacpp_nemo.model.specs"):
        hybrid_stack_spec(small_config(reset_state=False))
    assert words in caplog.text


# --- what is chosen -------------------------------------------------------------------------

LOCAL = Backend(transformer_engine=False, mamba="portable")
ENGINE = Backend(transformer_engine=True, mamba="fused")


@pytest.fixture
def with_engine(monkeypatch):
    """Let the spec of experts be written without Transformer Engine, whose version it asks."""
    monkeypatch.setattr(engine_provider, "is_te_min_version", lambda *args, **kwargs: True)


def layers(backend: Backend, **changes: Any) -> Any:
    spec = hybrid_stack_spec(small_config(**changes), backend)
    assert spec.module is HybridStack
    return spec.submodules


def test_the_local_spec_has_norms_of_its_own_under_the_fused_names():
    chosen, local = layers(LOCAL, qk_layernorm=True), LocalSpecProvider()
    attention = chosen.attention_layer.submodules
    inner = attention.self_attention.submodules
    assert attention.self_attention.module is LatentAttention
    assert inner.core_attention is LatentDotProduct
    assert inner.linear_q_up_proj is inner.linear_kv_down_proj is local.column_parallel_linear()
    assert attention.input_layernorm is inner.q_layernorm is inner.kv_layernorm is LocalRMSNorm
    assert attention.sharded_state_dict_keys_map == {
        "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
        "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
    }
    for layer in (chosen.mamba_layer, chosen.recurrent_layer):
        assert layer.submodules.norm is LocalRMSNorm
        assert layer.submodules.mixer.submodules.in_proj is local.column_parallel_linear()
        assert layer.submodules.sharded_state_dict_keys_map == {
            "norm.": "mixer.in_proj.layer_norm_"
        }
    assert chosen.final_norm is chosen.moe_layer.submodules.pre_mlp_layernorm is LocalRMSNorm


@pytest.mark.usefixtures("with_engine")
def test_the_engines_spec_has_fused_norms_and_needs_no_other_names():
    chosen, engine = layers(ENGINE, qk_layernorm=True), TESpecProvider()
    fused = engine.column_parallel_layer_norm_linear()
    attention = chosen.attention_layer.submodules
    inner = attention.self_attention.submodules
    assert attention.self_attention.module is LatentAttention
    assert inner.linear_q_up_proj is inner.linear_kv_up_proj is fused
    assert inner.linear_q_down_proj is inner.linear_kv_down_proj is engine.linear()
    assert inner.core_attention is engine.core_attention()
    assert inner.linear_proj is engine.row_parallel_linear()
    assert inner.q_layernorm is inner.kv_layernorm is IdentityOp
    assert attention.input_layernorm is engine.layer_norm()
    assert attention.sharded_state_dict_keys_map == {}
    for layer, mixer in (
        (chosen.mamba_layer, FusedMambaMixer),
        (chosen.recurrent_layer, RecurrentMixer),
    ):
        assert layer.submodules.norm is IdentityOp
        assert layer.submodules.mixer.module is mixer
        assert layer.submodules.mixer.submodules.in_proj is fused
        assert layer.submodules.mixer.submodules.out_proj is engine.row_parallel_linear()
        assert layer.submodules.sharded_state_dict_keys_map == {}
    assert chosen.final_norm is chosen.moe_layer.submodules.pre_mlp_layernorm is engine.layer_norm()


@pytest.mark.usefixtures("with_engine")
def test_without_latent_norms_the_projections_are_plain():
    for backend, provider in ((LOCAL, LocalSpecProvider()), (ENGINE, TESpecProvider())):
        inner = layers(backend).attention_layer.submodules.self_attention
        assert inner.submodules.linear_q_up_proj is provider.column_parallel_linear()
        assert inner.submodules.q_layernorm is inner.submodules.kv_layernorm is IdentityOp


@pytest.mark.usefixtures("with_engine")
def test_plain_attention_has_its_norm_in_the_projection_with_the_engine_only():
    plain = {"multi_latent_attention": False}
    local = layers(LOCAL, **plain).attention_layer
    engine = layers(ENGINE, **plain).attention_layer
    assert local.module is engine.module is TransformerLayer
    assert local.submodules.self_attention.module is GroupedAttention
    assert engine.submodules.self_attention.module is GroupedAttention
    assert local.submodules.input_layernorm is LocalRMSNorm
    assert local.submodules.sharded_state_dict_keys_map == {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_"
    }
    assert engine.submodules.input_layernorm is IdentityOp
    assert engine.submodules.sharded_state_dict_keys_map == {}
    fused = TESpecProvider().column_parallel_layer_norm_linear()
    assert engine.submodules.self_attention.submodules.linear_qkv is fused


def test_sizes_of_the_mamba_mixer_come_from_the_configuration():
    mixer = layers(LOCAL, mamba_chunk_size=32, mamba_conv_width=3).mamba_layer.submodules.mixer
    assert mixer.params == {"chunk_size": 32, "d_conv": 3}


@pytest.mark.usefixtures("with_engine")
def test_dense_mlps_have_their_norm_in_the_projection_with_the_engine_only():
    local = layers(LOCAL, experts=False).mlp_layer
    engine = layers(ENGINE, experts=False).mlp_layer
    assert local.module is engine.module is MLPLayer
    assert local.submodules.pre_mlp_layernorm is LocalRMSNorm
    assert local.submodules.sharded_state_dict_keys_map == {
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"
    }
    assert engine.submodules.pre_mlp_layernorm is IdentityOp
    assert engine.submodules.sharded_state_dict_keys_map == {}
    fused = TESpecProvider().column_parallel_layer_norm_linear()
    assert engine.submodules.mlp.submodules.linear_fc1 is fused


def test_a_model_has_dense_mlps_or_experts_but_not_both():
    assert layers(LOCAL).mlp_layer is IdentityOp
    assert layers(LOCAL, experts=False).moe_layer is IdentityOp


def test_a_model_without_experts_has_no_expert_layer():
    assert layers(LOCAL, pattern="AMR", num_moe_experts=None).moe_layer is IdentityOp
    assert layers(LOCAL).moe_layer.module is ExpertsLayer

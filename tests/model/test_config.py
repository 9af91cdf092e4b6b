"""The configuration: its defaults, its refusals, and that NeMo can copy, amend and store it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from megacpp_nemo.contract import recipe
from megacpp_nemo.contract.errors import MegaCppError, PatternError, RecipeError, RuntimeRefusal
from megacpp_nemo.contract.shapes import SparseAttentionShape
from megacpp_nemo.host.preflight import refuse_unbuilt
from megacpp_nemo.model import steps as steps_module
from megacpp_nemo.model.config import HybridConfig
from megacpp_nemo.model.module import HybridModel
from megacpp_nemo.model.shape import parallelism_of, shape_of
from megacpp_nemo.model.steps import hybrid_data_step
from tests.model.building import TOKENIZER, megatron, small_config
from tests.support.processes import in_process


def plain_values(config: HybridConfig) -> dict[str, Any]:
    """Return the fields that can be compared: a function made anew differs from the old one."""
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if not callable(value := getattr(config, field.name))
    }


def test_the_defaults_are_nam56r():
    config, nam56r = HybridConfig(), recipe("nam56r")
    model, features = shape_of(config)
    # No layer is sparse and nothing predicted until the recipe says so, and latent attention has
    # no groups.
    assert model == dataclasses.replace(
        nam56r.model,
        sparse_attention=SparseAttentionShape(a_ranks=()),
        mtp=dataclasses.replace(nam56r.model.mtp, num_layers=0),
        attention=dataclasses.replace(nam56r.model.attention, num_query_groups=56),
    )
    # A bare configuration requires no package; the recipe's requires its kernels'.
    assert features == dataclasses.replace(
        nam56r.features, sparse_attention=False, ngram_hash=False, kernels="available"
    )
    assert config.layers == nam56r.layers
    assert config.layernorm_epsilon == nam56r.model.norm_epsilon
    assert config.rotary_base == nam56r.model.rotary_base
    assert config.init_method_std == nam56r.model.init_std
    assert config.moe_aux_loss_coeff == nam56r.model.experts.aux_loss_coeff


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pattern": "AXE"}, PatternError, "Unknown block letter 'X'"),
        ({"pattern": ""}, PatternError, "at least one layer"),
        ({"pattern": "A||E", "num_layers": 2}, PatternError, "every pipeline segment"),
        ({"pattern": "AE|MR", "num_layers": 5}, PatternError, r"4 layers\) for depth 5"),
        ({"num_layers": 0}, PatternError, "depth of a pattern"),
        ({"num_moe_experts": None}, RecipeError, "num_moe_experts=None"),
        ({"num_moe_experts": 0}, RecipeError, "num_moe_experts=0"),
        ({"moe_router_topk": 5}, RecipeError, "more experts than there are"),
        ({"mamba_num_groups": 3}, RecipeError, "groups must divide the Mamba heads"),
        ({"mamba_num_heads": -4}, RecipeError, "num_heads cannot be -4"),
        ({"m2rnn_num_qk_heads": 3}, RecipeError, "must divide its value heads"),
        ({"m2rnn_value_dim": 2.5}, RecipeError, "value_dim cannot be 2.5"),
        ({"m2rnn_state_gradient_clip": 0.0}, RecipeError, "state_gradient_clip cannot be 0"),
        ({"hidden_size": 0}, RecipeError, "hidden_size cannot be 0"),
        ({"q_lora_rank": None}, RecipeError, "q_lora_rank cannot be None"),
        ({"mamba_lane": "mamba4"}, RecipeError, "mamba cannot be 'mamba4'"),
        ({"structure": "some"}, RecipeError, "structure cannot be 'some'"),
        ({"dsa_a_ranks": (1,)}, RecipeError, "A-rank 1 has no attention layer"),
        (
            {"multi_latent_attention": False, "num_query_groups": 3},
            RecipeError,
            "Query groups must divide the attention heads",
        ),
    ],
)
def test_a_wrong_setting_is_refused_with_what_is_allowed(changes, error, message):
    with pytest.raises(error, match=message) as refusal:
        small_config(**{"pattern": "AEMR", **changes})
    assert isinstance(refusal.value, MegaCppError)
    assert refusal.value.allowed
    assert refusal.value.hint


TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tensor_model_parallel_size": 2}, RecipeError, "needs sequence parallelism"),
        ({**TENSOR, "num_attention_heads": 3}, RecipeError, "attention.num_heads=3"),
        ({**TENSOR, "mamba_num_groups": 1}, RecipeError, "mamba.num_groups=1"),
        ({**TENSOR, "m2rnn_num_heads": 3}, RecipeError, "recurrent.num_heads=3"),
        ({**TENSOR, "m2rnn_key_dim": 5}, RecipeError, "key_dim=5"),
        ({**TENSOR, "seq_length": 15}, RecipeError, "seq_length=15"),
        ({"sequence_parallel": True}, RecipeError, "drops it at TP 1"),
        ({"expert_model_parallel_size": 3}, RecipeError, "experts.num_experts=4"),
        ({"pipeline_model_parallel_size": 3}, PatternError, "4 layers for 3 stages"),
        (
            {
                **TENSOR,
                "tensor_model_parallel_size": 4,
                "pattern": "R",
                "m2rnn_num_heads": 8,
                "m2rnn_num_qk_heads": 2,
            },
            RuntimeRefusal,
            "m2rnn_num_qk_heads=2, tensor_model_parallel_size=4",
        ),
        (
            {"tensor_model_parallel_size": 2, "pattern": "AM"},
            RuntimeRefusal,
            "wrong gradients under tensor parallelism without sequence parallelism",
        ),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1},
            RuntimeRefusal,
            "num_layers_in_first_pipeline_stage=1[\\s\\S]*'|' in the pattern",
        ),
        (
            {"account_for_loss_in_pipeline_split": True},
            RuntimeRefusal,
            "try: *account_for_loss_in_pipeline_split=False",
        ),
        ({"fp8": "hybrid"}, RuntimeRefusal, "FP8 needs Transformer Engine"),
    ],
)
def test_a_layout_the_layers_cannot_run_is_refused(changes, error, message):
    with pytest.raises(error, match=message) as refusal:
        small_config(**{"pattern": "AEMR", **changes})
    assert refusal.value.hint


@pytest.mark.parametrize(
    "changes",
    [
        TENSOR,
        {**TENSOR, "m2rnn_num_qk_heads": 2},
        {**TENSOR, "m2rnn_num_qk_heads": 4},
        {"pattern": "MR", "tensor_model_parallel_size": 2},
        {"pattern": "A|EMR", "pipeline_model_parallel_size": 2},
        {"pattern": "A|EMR"},  # NeMo sets the number of stages afterwards
        {"expert_model_parallel_size": 4},
    ],
)
def test_a_layout_the_layers_can_run_is_accepted(changes):
    small_config(**{"pattern": "AEMR", **changes})


def test_the_smallest_world_of_a_layout_is_its_number_of_processes():
    config = small_config("AE|MR", **TENSOR, pipeline_model_parallel_size=2)
    assert parallelism_of(config).world_size == 4
    assert parallelism_of(config, world_size=8).data_parallel_size == 2


def test_latent_attention_has_keys_for_every_head():
    assert small_config(num_query_groups=2).num_query_groups == 4
    plain = small_config(num_query_groups=2, multi_latent_attention=False)
    assert plain.num_query_groups == 2


def test_dense_mlps_need_no_experts_and_have_none():
    config = small_config("AEMR", experts=False)
    assert config.num_moe_experts is None
    assert config.moe_ffn_hidden_size is None
    _, features = shape_of(config)
    assert not features.experts


def test_fp8_without_experts_to_run_in_it_is_refused():
    config = small_config("AEMR", experts=False)
    config.fp8 = "hybrid"
    with pytest.raises(RuntimeRefusal, match="FP8 in expert layers"):
        refuse_unbuilt(config)


def test_a_model_without_experts_has_no_expert_width():
    config = small_config("AMR", num_moe_experts=None)
    assert config.moe_ffn_hidden_size is None


@pytest.mark.parametrize("latent", [True, False])
def test_checking_again_changes_nothing(latent):
    config = small_config(num_query_groups=2, multi_latent_attention=latent)
    before = plain_values(config)
    config.__post_init__()
    assert plain_values(config) == before


def test_nemo_may_set_the_layout_afterwards():
    config = small_config("AE|MR", pipeline_model_parallel_size=2)
    config.tensor_model_parallel_size, config.sequence_parallel = 2, True
    # Megatron has set it to the tensor size of before, and would train such experts wrongly.
    with pytest.raises(RecipeError, match="split otherwise than the other weights"):
        config.__post_init__()
    config.expert_tensor_parallel_size = 2
    config.__post_init__()
    config.sequence_parallel = False
    with pytest.raises(RecipeError, match="needs sequence parallelism"):
        config.__post_init__()


def test_a_pattern_with_stages_waits_for_the_number_of_stages():
    config = small_config("AE|MR")
    config.pipeline_model_parallel_size = 2
    config.__post_init__()
    config.pipeline_model_parallel_size = 4
    with pytest.raises(RecipeError, match="2 segments for 4 stages"):
        config.__post_init__()


def test_a_copy_is_equal_and_independent():
    config = small_config(dsa_a_ranks=[0])
    other = copy.deepcopy(config)
    assert plain_values(other) == plain_values(config)
    other.num_layers = 2
    other.__post_init__()
    assert config.num_layers == 4


def test_lists_of_a_stored_configuration_become_tuples():
    config = small_config(dsa_a_ranks=[0], required_packages=["torch"])
    assert config.dsa_a_ranks == (0,)
    assert config.required_packages == ("torch",)


def test_a_missing_required_package_is_refused_by_name():
    with pytest.raises(RuntimeRefusal, match="not installed: no-such-package"):
        HybridModel(small_config(required_packages=("torch", "no_such_package")))


def test_nemo_stores_and_loads_the_model(tmp_path):
    from nemo.lightning import io

    model = HybridModel(small_config("AE|MR", num_layers=4, pipeline_model_parallel_size=2))
    model.io_dump(tmp_path, yaml_attrs=[])
    loaded = io.load(tmp_path, HybridModel)
    assert type(loaded) is HybridModel
    assert type(loaded.config) is HybridConfig
    assert plain_values(loaded.config) == plain_values(model.config)
    for name in ("mamba_stack_spec", "forward_step_fn", "data_step_fn"):
        assert getattr(loaded.config, name) is getattr(model.config, name)


def test_stages_can_be_forced_to_have_or_lack_the_ends():
    def ends(**given: bool) -> tuple[bool, bool]:
        with megatron():
            model = small_config("M").configure_model(TOKENIZER, **given)
            return model.pre_process, model.post_process

    assert in_process(ends) == (True, True)
    assert in_process(lambda: ends(pre_process=False)) == (False, True)
    assert in_process(lambda: ends(post_process=False)) == (True, False)


def test_what_no_layer_carries_out_is_refused_when_the_model_is_built():
    config = small_config("AG")
    with pytest.raises(RuntimeRefusal, match="gated_delta_net"):
        config.configure_model(TOKENIZER)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "recurrent layers"),
        ({"ngram_hash": True}, "recurrent layers and an n-gram memory"),
        (
            {"ngram_hash": True, "structure": "core"},
            "recurrent layers, an n-gram memory and structure channels",
        ),
    ],
)
def test_context_parallelism_is_refused_by_what_reads_whole_rows(changes, named):
    config = small_config("AE", context_parallel_size=2, **changes)
    with pytest.raises(RuntimeRefusal, match=f" {named} under context parallelism"):
        config.configure_model(TOKENIZER)


@pytest.mark.parametrize("stage", ["first", "middle", "last"])
def test_document_ids_reach_every_pipeline_stage(monkeypatch, stage):
    def kept(iterator: Any, use_mtp: bool) -> dict[str, Any]:
        batch = next(iterator)[0]
        names = {"first": ["tokens"], "middle": [], "last": ["labels"]}[stage]
        return {name: batch[name] for name in names}

    monkeypatch.setattr(steps_module, "gpt_data_step", kept)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **kwargs: self)
    ids = torch.tensor([[0, 1]])
    batch = {"tokens": ids, "labels": ids, "document_ids": ids}
    assert hybrid_data_step(iter([(batch, 0, 0)]))["document_ids"] is ids
    del batch["document_ids"]
    assert "document_ids" not in hybrid_data_step(iter([(batch, 0, 0)]))

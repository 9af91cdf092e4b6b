"""Layouts: what is not in the pattern is not checked, and the profiles in use fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refusal
from refusals import settings as advice

from megacpp_nemo.contract import LayerPattern, Parallelism, RecipeError, recipe
from megacpp_nemo.contract.rules import check_batch, check_layout, check_model
from megacpp_nemo.contract.shapes import (
    ExpertsShape,
    MambaShape,
    ModelShape,
    MultiTokenPredictionShape,
    RecurrentShape,
)
from megacpp_nemo.contract.training import Batch, Features

NODES = "num_nodes"
PP, VPP = "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
CP, EP, ETP = "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"


class TestWhatThePatternDoesNotHaveIsNotChecked:
    """At TP 8 and EP 3 every shape below would be refused if its family were in the pattern."""

    ODD = ModelShape(
        experts=ExpertsShape(num_experts=7, ffn_hidden_size=13, shared_expert_size=11),
        mamba=MambaShape(num_heads=21, num_groups=7),
        recurrent=RecurrentShape(num_heads=5, num_qk_heads=5, key_dim=3),
        mtp=MultiTokenPredictionShape(num_layers=0),
    )
    PLAIN = Features(sparse_attention=False)

    def layout(self, **sizes) -> Parallelism:
        return Parallelism(tensor_model_parallel_size=8, sequence_parallel=True, **sizes)

    @pytest.mark.parametrize(
        ("pattern", "refused"), [("A", None), ("AE", "experts."), ("AM", "mamba."), ("AR", "recur")]
    )
    def test_only_the_families_that_are_there(self, pattern, refused):
        layers = LayerPattern.parse(pattern)
        if refused is None:
            check_layout(layers, self.ODD, self.PLAIN, self.layout())
        else:
            error = refusal(RecipeError, check_layout, layers, self.ODD, self.PLAIN, self.layout())
            assert error.what.startswith(refused)

    def test_attention_shapes_without_attention_layers(self):
        odd = recipe(
            "nam56r",
            changes={
                "pattern": "EM",
                "attention.num_heads": 57,
                "num_query_groups": 5,
                "q_lora_rank": 7,
                "sparse_attention": False,
                "latent_attention": False,
                "mtp.num_layers": 0,
            },
        )
        assert odd.sparse_layer_numbers == ()

    def test_query_groups_are_not_checked_under_latent_attention(self):
        check_model(
            LayerPattern.parse("A"), recipe("nam56r", changes={"num_query_groups": 6}).model,
            self.PLAIN,
        )  # fmt: skip

    def test_each_lane_checks_its_own_mamba(self):
        odd = {"author_mamba.num_heads": 111}
        assert recipe("nam56r", changes=odd)
        refusal(RecipeError, recipe, "nam56r", changes={**odd, "mamba": "author"})
        assert recipe("nam56r", changes={"num_groups": 7, "mamba": "author"})

    def test_experts_do_not_ask_a_dense_pattern_for_sequence_parallelism(self):
        dense = {"pattern": "AM", "mtp.num_layers": 0, "sequence_parallel": False}
        assert recipe("nam56r", changes=dense)

    def test_layers_of_a_prediction_depth_are_in_the_model_too(self):
        odd = {"pattern": "AM", "experts.ffn_hidden_size": 13}
        assert recipe("nam56r", changes={**odd, "mtp.num_layers": 0})
        error = refusal(RecipeError, recipe, "nam56r", changes={**odd, "mtp.num_layers": 1})
        assert error.what.startswith("experts.ffn_hidden_size")

    def test_dense_mlps_are_no_experts(self):
        dense = {"features.experts": False, "sequence_parallel": False}
        assert recipe("nam56r", changes={**dense, "num_experts": 7, "experts.ffn_hidden_size": 13})

    def test_gated_delta_net_shapes_without_its_layers(self):
        odd = {"num_key_heads": 3, "num_value_heads": 3}
        assert recipe("nam56r", changes=odd)
        refusal(RecipeError, recipe, "nam56r", changes={**odd, "pattern": "AG", "a_ranks": [1]})

    def test_dsa_that_is_off_allows_context_parallelism_and_any_ranks(self):
        off = {"sparse_attention": False, CP: 2, "a_ranks": [40]}
        assert recipe("nam56r", changes=off).sparse_layer_numbers == ()


class TestTheProfilesThatExist:
    def test_two_stages_of_two_chunks_of_thirteen_layers(self):
        made = recipe("nam56r", changes={PP: 2, VPP: 2})
        assert [len(part) for part in made.layers.split(4)] == [13] * 4

    @pytest.mark.parametrize("segments", [4, 2])
    def test_the_same_stages_written_with_pipes(self, segments):
        flat = str(recipe("nam56r").layers)
        size = 52 // segments
        text = "|".join(flat[i : i + size] for i in range(0, 52, size))
        chunks = segments // 2 if segments > 2 else None
        made = recipe("nam56r", changes={"pattern": text, PP: 2, VPP: chunks})
        assert made.sparse_layer_numbers == recipe("nam56r").sparse_layer_numbers

    @pytest.mark.parametrize(("expert", "micro", "batch"), [(4, 8, 64), (8, 10, 320)])
    def test_expert_parallel_over_the_node(self, expert, micro, batch):
        changes = {EP: expert, "micro_batch_size": micro, "global_batch_size": batch}
        made = recipe("nam56r", mode="author_dp", changes=changes)
        assert made.parallelism.data_parallel_size == 8

    def test_expert_tensor_size_follows_the_tensor_size_unless_given(self):
        assert recipe("nam56r").parallelism.expert_tensor_size == 2
        apart = recipe("nam56r", changes={EP: 8, ETP: 1})
        assert apart.parallelism.expert_tensor_size == 1

    def test_context_parallel_replicates_mamba_groups_where_it_must(self):
        changes = {"sparse_attention": False, CP: 4, "mamba.num_groups": 2, NODES: 2}
        assert recipe("nam56r", changes={**changes, "mamba.num_heads": 64})


@pytest.mark.parametrize(
    ("sizes", "copies"),
    [
        ({}, 8),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, 4),
        ({"pipeline_model_parallel_size": 4}, 2),
        ({"context_parallel_size": 8}, 1),
        ({"num_nodes": 4, "pipeline_model_parallel_size": 2, "context_parallel_size": 2}, 8),
        ({"num_nodes": 3, "devices_per_node": 2, "tensor_model_parallel_size": 3}, 2),
        ({"expert_model_parallel_size": 8}, 8),
    ],
)
def test_data_parallel_size_is_what_the_other_sizes_leave(sizes, copies):
    layout = Parallelism(**sizes)
    assert layout.data_parallel_size == copies
    assert layout.data_parallel_size * layout.model_size == layout.world_size


@given(st.integers(1, 100), st.integers(1, 8), st.integers(1, 8))
def test_the_batch_suggested_is_a_nearest_one_that_fits(rows, micro, copies):
    layout = Parallelism(devices_per_node=copies)
    batch = Batch(micro_batch_size=micro, global_batch_size=rows)
    if rows % (micro * copies) == 0:
        check_batch(batch, layout)
        return
    better = advice(refusal(RecipeError, check_batch, batch, layout))["global_batch_size"]
    check_batch(Batch(micro_batch_size=micro, global_batch_size=better), layout)
    assert better == micro * copies or abs(better - rows) <= micro * copies / 2

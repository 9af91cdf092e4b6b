"""What a rank is planned to hold is what it builds, in every layout."""

from __future__ import annotations

import itertools
import logging
import re
from typing import Any

import pytest

from megacpp_nemo.contract import (
    RECIPE_NAMES,
    HybridRecipe,
    MegaCppError,
    RecipeError,
    recipe,
)
from megacpp_nemo.planner.pieces import Role, pieces
from megacpp_nemo.planner.sharding import rank_parameters
from megacpp_nemo.planner.tensors import padded_vocabulary
from tests.support.processes import in_processes

# (tensor, pipeline, expert)
LAYOUTS = tuple(itertools.product((1, 2), (1, 2, 4), (1, 2, 4)))
INPUTS: dict[str, Any] = {"features.ngram_hash": True, "features.structure": "all"}
SMALL: dict[str, Any] = {"pattern": "AEMR", "depth": 8, "model.mtp.num_layers": 2}
LAYOUT_2_2_2 = (2, 2, 2)
OTHERS: dict[str, dict[str, Any]] = {
    "Mamba-3": {**SMALL, "features.mamba": "author"},
    "Mamba-3 of rank 1": {
        **SMALL,
        "features.mamba": "author",
        "model.author_mamba.mimo_rank": 1,
    },
    "grouped attention": {**SMALL, "features.latent_attention": False},
    "gated experts, each whole on a rank": {
        **SMALL,
        "model.experts.activation": "swiglu",
        "parallelism.expert_tensor_parallel_size": 1,
    },
    "sparse attention with norms": {
        **SMALL,
        "pattern": "AEMD",
        "features.sparse_attention": True,
        "model.latent.layernorm": True,
    },
    "stages of different lengths": {**SMALL, "pattern": "AEM|RAEMR"},
    "n-gram memory": {**SMALL, "features.ngram_hash": True},
    "n-gram memory on the host": {
        "features.ngram_hash": True,
        "model.embedding.ngram.placement": "host",
    },
    "structure channels": {**SMALL, "features.structure": "category+ast_depth"},
    "the whole input side": {**SMALL, **INPUTS},
}


def laid_out(name: str, layout: tuple[int, int, int], changes: Any = None) -> HybridRecipe:
    tensor, stages, experts = layout
    sizes = {
        "parallelism.tensor_model_parallel_size": tensor,
        "parallelism.sequence_parallel": tensor > 1,
        "parallelism.pipeline_model_parallel_size": stages,
        "parallelism.expert_model_parallel_size": experts,
        "parallelism.devices_per_node": tensor * stages * experts,
        "batch.global_batch_size": 64 * experts,
    }
    return recipe(name, changes={**sizes, **(changes or {})})


CASES = {
    **{(name, layout): laid_out(name, layout) for name in RECIPE_NAMES for layout in LAYOUTS},
    **{
        (name, layout): laid_out("nam56r_tiny", layout, changes)
        for name, changes in OTHERS.items()
        for layout in [(2, 1, 2) if "host" in name else LAYOUT_2_2_2]
    },
}
Built = dict[Any, list[dict[str, tuple[int, ...]]]]


@pytest.fixture(scope="module")
def built() -> Built:
    """Shapes by name on each stage of each case, all built in one process."""
    import tests.model.building
    import tests.planner.building  # noqa: F401  the process shares its imports

    return in_processes(_built, kill_after=600)[0]


def _built() -> Built:
    from tests.planner.building import build_stage, rank_of

    logging.disable()
    found: Built = {
        ("Gated DeltaNet", tensor): [_gated_delta_net(delta_net(tensor))] for tensor in (1, 2)
    }
    for case, intent in CASES.items():
        found[case] = stages = []
        first = 0
        for stage in range(intent.parallelism.pipeline_model_parallel_size):
            with rank_of(intent, stage):
                model: Any = build_stage(intent)
                stages.append(
                    {
                        _whole_name(name, first): tuple(parameter.shape)
                        for name, parameter in model.named_parameters()
                    }
                )
                first += len(model.decoder.layers)
    return found


def delta_net(tensor: int) -> HybridRecipe:
    return laid_out("nam56r_tiny", (tensor, 1, 1), {"pattern": "G", "depth": 1})


def _gated_delta_net(intent: HybridRecipe) -> dict[str, tuple[int, ...]]:
    """Return the shapes of Megatron's own layer, which no model of ours builds yet."""
    from megatron.core.ssm import gated_delta_net
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    from megacpp_nemo.model.norms import LocalRMSNorm
    from tests.model.building import groups
    from tests.planner.building import config_of, rank_of

    mixer = ModuleSpec(
        module=gated_delta_net.GatedDeltaNet,
        submodules=gated_delta_net.GatedDeltaNetSubmodules(
            in_proj=ColumnParallelLinear, out_norm=LocalRMSNorm, out_proj=RowParallelLinear
        ),
    )
    parts = TransformerLayerSubmodules(input_layernorm=LocalRMSNorm, self_attention=mixer)
    spec = ModuleSpec(module=TransformerLayer, submodules=parts)
    # Its constructor asks for kernels that only its forward pass needs.
    gated_delta_net.HAVE_FLA = True
    with rank_of(intent, 0):
        config: Any = config_of(intent)
        shape = intent.model.gated_delta_net
        config.linear_num_key_heads = shape.num_key_heads
        config.linear_num_value_heads = shape.num_value_heads
        config.linear_key_head_dim = shape.key_head_dim
        config.linear_value_head_dim = shape.value_head_dim
        config.linear_conv_kernel_dim = shape.conv_width
        layer = build_module(spec, config=config, layer_number=1, pg_collection=groups())
        return {
            f"decoder.layers.0.{name}": tuple(parameter.shape)
            for name, parameter in layer.named_parameters()
        }


@pytest.mark.parametrize("tensor", [1, 2])
def test_gated_delta_net_is_megatrons(tensor: int, built: Built) -> None:
    (shapes,) = built["Gated DeltaNet", tensor]
    planned = {
        item.name: item.shape
        for item in rank_parameters(delta_net(tensor), 0)
        if item.piece.role is Role.LAYER
    }
    assert planned == shapes


def _whole_name(name: str, first: int) -> str:
    """Return a parameter's name in the whole model, of a stage's first tensor and expert rank."""
    name = re.sub(
        r"^decoder\.layers\.(\d+)", lambda found: f"decoder.layers.{int(found[1]) + first}", name
    )
    return name.replace(".local_experts.", ".")


@pytest.mark.parametrize("name", [*RECIPE_NAMES, *OTHERS])
def test_every_rank_holds_what_it_builds(name: str, built: Built) -> None:
    cases = [case for case in CASES if case[0] == name]
    assert len(cases) == (1 if name in OTHERS else len(LAYOUTS))
    for case in cases:
        for stage, shapes in enumerate(built[case]):
            planned = rank_parameters(CASES[case], stage)
            assert {item.name: item.shape for item in planned} == shapes, (case, stage)
            assert len(planned) == len(shapes)


def test_the_ranks_of_a_layout_hold_the_whole_model_between_them() -> None:
    whole = {item.name: item for item in rank_parameters(CASES["nam56r", (1, 1, 1)], 0)}
    intent = CASES["nam56r", LAYOUT_2_2_2]
    last = intent.parallelism.pipeline_model_parallel_size - 1
    seen = 0
    for stage in range(last + 1):
        for item in rank_parameters(intent, stage):
            assert item.whole_shape == whole[item.name].shape
            # Split by two tensor ranks, or whole on both.
            assert item.whole_count in (item.count, 2 * item.count)
            seen += item.piece.role is not Role.EMBEDDING_COPY
    routed = [item for item in whole.values() if item.expert]
    assert all(".mlp.experts." in item.name for item in routed)
    assert seen == len(whole) - len(routed) // 2


def test_prediction_depths_keep_a_copy_of_the_embedding_on_the_last_of_several_stages() -> None:
    def copies(changes: dict[str, Any], layout: tuple[int, int, int]) -> list[tuple[int, int]]:
        intent = laid_out("nam56r_tiny", layout, changes)
        return [
            (stage, item.whole_count)
            for stage in range(layout[1])
            for item in rank_parameters(intent, stage)
            if item.piece.role is Role.EMBEDDING_COPY
        ]

    depths = {"model.mtp.num_layers": 1}
    rows = padded_vocabulary(CASES["nam56r_tiny", (1, 1, 1)])
    assert copies(depths, (1, 2, 1)) == [(1, rows * 128)]
    assert copies(depths, (1, 1, 1)) == []
    assert copies({}, (1, 2, 1)) == []
    whole = laid_out("nam56r_tiny", (1, 2, 1), {**depths, **INPUTS})
    kept = [item.whole_count for item in rank_parameters(whole, 0) if "embedding." in item.name]
    assert copies({**depths, **INPUTS}, (1, 2, 1)) == [(1, count) for count in kept]
    assert len(kept) == 6


def test_virtual_chunks_are_on_the_stage_that_runs_them() -> None:
    changes = {"parallelism.virtual_pipeline_model_parallel_size": 3, "depth": 12}
    intent = laid_out("nam56r_tiny", (1, 2, 1), changes)
    for stage in (0, 1):
        held = {item.piece.number for item in rank_parameters(intent, stage) if item.piece.family}
        chunks = (0, 1, 2)
        layers = {2 * (2 * chunk + stage) + i for chunk in chunks for i in (1, 2)}
        assert held == layers
    whole = sum(item.count for item in rank_parameters(laid_out("nam56r_tiny", (1, 1, 1)), 0))
    assert sum(item.count for stage in (0, 1) for item in rank_parameters(intent, stage)) == whole


def test_the_n_gram_tables_are_split_by_width_and_the_structure_channels_are_whole() -> None:
    intent = laid_out("nam56r", LAYOUT_2_2_2, INPUTS)
    held = {item.name: item for item in rank_parameters(intent, 0)}
    table = held["embedding.ngram_hash.table.weight"]
    assert (table.shape[0], table.shape[1]) == (table.whole_shape[0], 8)
    assert held["embedding.ngram_hash.out_proj.weight"].shape == (3584, 128)
    assert held["embedding.structure.table.weight"].shape == (9 + 16 + 64 + 64 + 256 + 5, 64)
    copied = [item for item in rank_parameters(intent, 1) if item.name in held]
    assert [(item.name, item.shape) for item in copied] == [
        (name, item.shape) for name, item in held.items() if name.startswith("embedding.")
    ]


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ((4, 1, 1), {}, "mamba.num_groups"),
        ((1, 5, 1), {}, "stages"),
        ((1, 1, 3), {}, "num_experts"),
        (
            (2, 1, 1),
            {"features.ngram_hash": True, "model.embedding.ngram.dim": 15},
            "embedding.ngram.dim",
        ),
    ],
)
def test_a_layout_that_a_recipe_does_not_divide_over_is_refused(
    layout: tuple[int, int, int], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(MegaCppError, match=message):
        laid_out("nam56r_tiny", layout, changes)


def test_a_rank_stands_on_one_of_the_stages() -> None:
    with pytest.raises(RecipeError, match=r"(?s)no such pipeline stage.*stage 2 of 2.*0 to 1"):
        rank_parameters(laid_out("nam56r_tiny", (1, 2, 1)), 2)


def test_every_piece_of_every_recipe_has_parameters() -> None:
    for name in RECIPE_NAMES:
        intent = CASES[name, (1, 1, 1)]
        assert {item.piece for item in rank_parameters(intent, 0)} == set(pieces(intent))

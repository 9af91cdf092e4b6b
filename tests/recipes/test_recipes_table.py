"""The correspondence table: complete, true of what is built, and the only thing that decides."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from megacpp_nemo.contract import (
    RECIPE_NAMES,
    HybridRecipe,
    MegaCppError,
    ParallelismMode,
    field_paths,
    recipe,
    with_paths,
)
from megacpp_nemo.contract.plasticity import LEVERS
from megacpp_nemo.lowering.accounting import HOST_LEAVES, places
from megacpp_nemo.lowering.rows_plasticity import SCHEDULE
from megacpp_nemo.lowering.table import FRAME, ROWS, TABLE, carried

ABSENT = object()
WORDS: dict[str, tuple[Any, ...]] = {
    "pattern": ("AEMR", "AEMM"),
    "precision": ("fp32", "bf16"),
    "model.experts.activation": ("swiglu", "gelu"),
    "model.sparse_attention.a_ranks": ((0, 1),),
    "model.embedding.ngram.orders": ((2, 4),),
    "model.embedding.ngram.placement": ("host",),
    "name": ("mine",),
    "corpus": ("sources", "indexed"),
    "features.kernels": ("available", "required"),
    "features.mamba": ("author", "native"),
    "features.structure": ("core",),
    "model.mtp.pattern": ("AEM",),
    "files.data_path": (("/data/a",),),
    "files.split": ("98,1,1",),
    "files.tokenizer_dir": ("/data/tokenizer",),
    "files.run_dir": ("/elsewhere",),
    "parallelism.virtual_pipeline_model_parallel_size": (2,),
    "parallelism.expert_tensor_parallel_size": (1,),
    "parallelism.recompute": ("selective", "full"),
    "features.mamba_path": ("portable",),
    **{f"plasticity.{name}.target": ("mlp",) for name in ("fire", "dash", "shrink")},
    **{f"plasticity.{name}.families": (("A",),) for name in ("fire", "dash", "shrink")},
    **{f"plasticity.{name}.layers": ((2,),) for name in LEVERS},
    **{f"plasticity.{name}.steps": ((1, 2),) for name in ("fire", "dash", "redo")},
    **{f"plasticity.{name}.boundaries": (("data",),) for name in ("fire", "dash")},
}
# What turns a lever on, without which its other fields are not carried.
ON = {
    "fire": {"plasticity.fire.steps": (3,)},
    "dash": {"plasticity.dash.steps": (3,)},
    "shrink": {"plasticity.shrink.interval": 3},
    "redo": {"plasticity.redo.report_interval": 3},
    "stp": {"plasticity.stp.weight": 0.02, "plasticity.stp.start_step": 1},
}
# A field that cannot change alone: what has to stand beside it.
ROOM = {"num_nodes": 4, "devices_per_node": 8, "global_batch_size": 2048, "sparse_attention": False}
NO_EXPERTS = {"pattern": "AMM", "model.mtp.num_layers": 0}
ALONG: dict[str, dict[str, Any]] = {
    "parallelism.tensor_model_parallel_size": {**ROOM, **NO_EXPERTS},
    "parallelism.expert_tensor_parallel_size": {**ROOM, "expert_model_parallel_size": 2},
    "parallelism.sequence_parallel": {
        **ROOM,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": False,
        **NO_EXPERTS,
    },
    "parallelism.virtual_pipeline_model_parallel_size": {
        **ROOM,
        "pipeline_model_parallel_size": 2,
        "depth": 48,
    },
    "parallelism.overlap_param_gather": {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
    },
    "parallelism.use_distributed_optimizer": {"overlap_param_gather": False},
    "parallelism.overlap_grad_reduce": {"overlap_param_gather": False},
    "features.latent_attention": {"sparse_attention": False},
    "features.experts": {"precision": "bf16"},
    "model.attention.num_query_groups": {"sparse_attention": False, "latent_attention": False},
    "model.mtp.pattern": {"model.mtp.num_layers": 1},
    "model.mtp.loss_scaling_factor": {"model.mtp.num_layers": 1},
    "files.data_path": {"corpus": "indexed"},
    "files.split": {"corpus": "indexed"},
    "model.embedding.vocab_size": {"corpus": "sources"},
    "model.embedding.structure.bottleneck": {"features.structure": "all"},
    **{
        path: {"pattern": "AEGM", "sparse_attention": False, **ROOM}
        for path in field_paths()
        if path.startswith("model.gated_delta_net.")
    },
    **{
        path: {"features.mamba": "author"}
        for path in field_paths()
        if path.startswith("model.author_mamba.")
    },
    **{
        path: {"features.ngram_hash": True}
        for path in field_paths()
        if path.startswith("model.embedding.ngram.")
    },
    **{
        path: {"features.sparse_attention": True, "a_ranks": (1,)}
        for path in field_paths()
        if path.startswith("model.sparse_attention.")
    },
}
ALONG |= {path: ON[path.split(".")[1]] for path in field_paths() if path.startswith("plasticity.")}
# A path that is spelled from another field too.
ALSO = {"name": {"log.explicit_log_dir"}}


def flat(config: Any, path: str = "") -> dict[str, Any]:
    """Return every value set in a configuration, by dotted path."""
    if isinstance(config, list) and any(hasattr(item, "__arguments__") for item in config):
        items: Any = [(item.__fn_or_cls__.__name__, item) for item in config]
    elif hasattr(config, "__arguments__"):
        items = config.__arguments__.items()
    else:
        return {path: config}
    return {
        k: v for name, item in items for k, v in flat(item, f"{path}.{name}".strip(".")).items()
    }


def differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    return {
        path
        for path in one.keys() | other.keys()
        if one.get(path, ABSENT) != other.get(path, ABSENT)
    }


def candidates(field: str, value: Any) -> Iterator[Any]:
    if field in WORDS:
        yield from WORDS[field]
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value * 2, value + 1, value - 1, value // 2)
    elif isinstance(value, float):
        yield from (value / 2, value * 2, 0.5)


def changes(start: HybridRecipe, field: str) -> tuple[HybridRecipe, HybridRecipe]:
    """Return two valid recipes that differ in this one field."""
    beside = ROOM if field.startswith("parallelism.") else {}
    base = with_paths(start, {**beside, **ALONG.get(field, {})})
    for value in candidates(field, field_paths(base)[field]):
        try:
            other = with_paths(base, {field: value})
        except MegaCppError:
            continue
        if field_paths(other)[field] != field_paths(base)[field]:
            return base, other
    raise AssertionError(f"no other valid value was found for {field}")


def test_every_field_of_a_recipe_has_a_row_and_no_row_is_of_another():
    assert {row.field for row in ROWS} == set(field_paths())


def test_a_row_has_a_place_or_says_why_not():
    assert all(row.nemo or row.built or row.note or row.flags for row in TABLE)
    assert all(row.nemo or row.note for row in ROWS)


def test_what_every_recipe_fixes_is_no_field_and_is_told_by_a_place_or_a_flag():
    for row in FRAME:
        assert row.field == ""
        assert row.nemo or row.flags
        assert row.owner in ("megatron", "host")
        assert bool(row.flags) == (row.owner == "megatron")


def test_a_place_carries_one_setting():
    claims: dict[str, set[str]] = {}
    for row in TABLE:
        for path in row.nemo:
            claims.setdefault(path, set()).add(row.field)
    shared = {path for path, fields in claims.items() if len(fields) > 1}
    assert shared <= set(HOST_LEAVES)


@pytest.mark.parametrize("mode", [mode.value for mode in ParallelismMode])
@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_every_leaf_of_a_built_recipe_is_a_place_and_every_place_is_a_leaf(name, mode):
    from megacpp_nemo.recipes import to_nemo

    intent = recipe(name, mode=mode)
    assert set(flat(to_nemo(intent))) == {
        *places(intent), "model.config.activation_func", *HOST_LEAVES
    }  # fmt: skip


@pytest.mark.parametrize("mode", [mode.value for mode in ParallelismMode])
@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_every_path_is_a_parameter_and_carries_the_recipes_value(name, mode):
    from megacpp_nemo.recipes import to_nemo
    from megacpp_nemo.recipes.explain import value_at

    intent = recipe(name, mode=mode, changes={k: v for on in ON.values() for k, v in on.items()})
    built = to_nemo(intent)
    (place,) = [
        place
        for place, callback in enumerate(built.trainer.callbacks)
        if callback.__fn_or_cls__.__name__ == "PlasticitySchedule"
    ]
    entry = f"trainer.callbacks[{place}]"
    for row in TABLE:
        paths = [path.replace(SCHEDULE, entry) for path in row.nemo]
        for path in paths if row.when(intent) else ():
            assert value_at(built, path) == row.spell(row.value(intent), intent), path
        for path in (*paths, *row.built):
            if not row.when(intent):
                continue
            parent, _, last = path.rpartition(".")
            owner = (value_at(built, parent) if parent else built).__fn_or_cls__
            assert last in inspect.signature(owner).parameters, path


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_changed_field_changes_exactly_its_own_paths(name):
    for field in field_paths():
        base, other = changes(recipe(name), field)
        check_exactly_its_own_paths(field, base, other)


def check_exactly_its_own_paths(field: str, base: HybridRecipe, other: HybridRecipe) -> None:
    from megacpp_nemo.recipes import to_nemo

    found = differing(flat(to_nemo(base)), flat(to_nemo(other)))
    rows = [row for row in ROWS if row.field == field]
    objects = tuple(path for row in rows for path in row.built)
    changed = differing(carried(base), carried(other))
    said = {path for path in changed if not path.startswith(objects)}
    assert {path for path in found if not path.startswith(objects)} == said, field
    assert any(path.startswith(objects) for path in found) == bool(objects), field
    own = {path for row in rows if row.when(base) or row.when(other) for path in row.nemo}
    assert own or not any(row.nemo for row in rows), field
    switched = {path for row in ROWS if row.when(base) != row.when(other) for path in row.nemo}
    assert own <= said <= own | switched | ALSO.get(field, set()), field

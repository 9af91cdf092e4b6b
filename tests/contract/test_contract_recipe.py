from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refusal

from megacpp_nemo.contract import (
    HybridRecipe,
    LayerPattern,
    MegaCppError,
    RecipeError,
    field_paths,
    recipe,
    with_fields,
    with_paths,
)
from megacpp_nemo.contract.recipe import resolve_field
from megacpp_nemo.contract.training import Parallelism

LEAVES = field_paths()
AMBIGUOUS = {
    "num_heads": 4,
    "head_dim": 3,
    "state_dim": 2,
    "conv_width": 3,
    "chunk_size": 2,
    "ffn_hidden_size": 2,
}


def value_at(owner: object, path: str) -> object:
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


class TestFieldPaths:
    def test_paths_lead_to_the_values(self):
        for name in ("nam52_tiny", "nam56r", "nam56r_4096"):
            made = recipe(name)
            assert field_paths(made) == {path: value_at(made, path) for path in LEAVES}

    def test_no_leaf_is_a_part(self):
        parts = [path for path, value in LEAVES.items() if dataclasses.is_dataclass(value)]
        assert parts == ["pattern", "model.mtp.pattern"]

    def test_a_part_has_paths_of_its_own(self):
        paths = field_paths(Parallelism)
        assert {f"parallelism.{path}" for path in paths} <= set(LEAVES)


class TestResolvingNames:
    @pytest.mark.parametrize("path", LEAVES)
    def test_every_ending_that_one_field_has_is_a_name_of_it(self, path):
        words = path.split(".")
        for start in range(len(words)):
            ending = ".".join(words[start:])
            owners = [p for p in LEAVES if f".{p}".endswith(f".{ending}")]
            if ending in LEAVES:  # a whole path, even if others end in it
                assert resolve_field(ending) == ending
            elif len(owners) == 1:
                assert resolve_field(ending) == path
            else:
                error = refusal(RecipeError, resolve_field, ending)
                assert str(error.allowed).split(", ") == owners
                assert error.hint == repr(owners[0])

    @pytest.mark.parametrize(("name", "count"), AMBIGUOUS.items())
    def test_a_name_that_several_fields_have_is_refused_with_all_of_them(self, name, count):
        error = refusal(RecipeError, resolve_field, name)
        assert f"Several recipe fields are called {name!r}" in error.what
        assert len(str(error.allowed).split(", ")) == count

    @pytest.mark.parametrize(
        ("name", "path"),
        [
            ("hiden_size", "model.hidden_size"),
            ("Hidden_Size", "model.hidden_size"),
            ("tensor_parallel_size", "parallelism.tensor_model_parallel_size"),
            ("sequence_paralel", "parallelism.sequence_parallel"),
            ("model.mamba.num_group", "model.mamba.num_groups"),
            ("model.mamba.num_head", "model.mamba.num_heads"),
            ("features.hidden_size", "model.hidden_size"),
            ("learning_rate.min_lr", "schedule.min_lr"),
            ("warmup", "schedule.warmup_steps"),
            ("patern", "pattern"),
        ],
    )
    def test_a_misspelt_name_suggests_the_closest_field(self, name, path):
        error = refusal(RecipeError, resolve_field, name)
        assert error.what == f"No recipe field is called {name!r}"
        assert error.hint == repr(path)

    @pytest.mark.parametrize("name", ["quux", "", 3, None])
    def test_a_name_that_is_close_to_none(self, name):
        assert refusal(RecipeError, resolve_field, name).hint == "one of the fields above"

    @pytest.mark.parametrize("part", ["batch", "model.mamba", "parallelism", "mtp"])
    def test_a_part_lists_and_suggests_its_own_fields_first(self, part):
        below = [path for path in LEAVES if f".{part}." in f".{path}"]
        error = refusal(RecipeError, resolve_field, part)
        shown = str(error.allowed).split(", ")[: min(12, len(below))]
        assert set(shown) <= set(below)
        assert error.hint == repr(shown[0])

    @given(st.text(max_size=30))
    def test_at_most_a_dozen_are_shown_and_the_way_to_list_all(self, name):
        if f".{name}" in [f".{path}"[-len(name) - 1 :] for path in LEAVES]:
            return
        *shown, rest = str(refusal(RecipeError, resolve_field, name).allowed).split(", ")
        assert len(shown) == 12
        assert set(shown) <= set(LEAVES)
        assert rest == f"... ({len(LEAVES)} in all: megacpp_nemo.contract.field_paths())"


class TestChanging:
    def test_paths_and_endings_mean_the_same(self):
        base = recipe("nam56r")
        by_path = with_paths(base, {"model.hidden_size": 2048, "schedule.lr": 1e-4})
        assert by_path == with_paths(base, {"hidden_size": 2048, "lr": 1e-4})
        assert by_path == with_fields(base, hidden_size=2048, lr=1e-4)
        assert by_path == with_fields(base, model__hidden_size=2048, schedule__lr=1e-4)
        assert (by_path.model.hidden_size, by_path.schedule.lr) == (2048, 1e-4)

    def test_only_the_named_fields_change_and_the_base_does_not(self):
        base = recipe("nam56r")
        before = field_paths(base)
        after = field_paths(with_fields(base, model__mamba__num_heads=64, depth=26, a_ranks=[1]))
        assert field_paths(base) == before
        assert {path for path in after if after[path] != before[path]} == {
            "model.mamba.num_heads",
            "depth",
            "model.sparse_attention.a_ranks",
        }

    def test_nothing_to_change_gives_an_equal_recipe(self):
        assert with_paths(recipe("nam56r"), {}) == with_fields(recipe("nam56r")) == recipe("nam56r")

    @pytest.mark.parametrize(
        "changes",
        [
            {"tensor_model_parallel_size": 1, "sequence_parallel": False},
            {"num_nodes": 3, "global_batch_size": 96},
            {"mamba.num_heads": 60, "mamba.num_groups": 10},
            {"num_experts": 2, "topk": 2},
            {"lr": 1e-6, "min_lr": 1e-7},
            {"pattern": "AE|MR", "depth": 4, "pipeline_model_parallel_size": 2, "a_ranks": [0]},
            {"use_distributed_optimizer": False, "overlap_param_gather": False},
            {"latent_attention": False, "sparse_attention": False},
            {"depth": 4, "a_ranks": [0]},
        ],
    )
    def test_settings_that_only_fit_together_are_changed_together(self, changes):
        changed = with_paths(recipe("nam56r"), changes)
        for name, value in changes.items():
            found = value_at(changed, resolve_field(name))
            assert str(found) == str(tuple(value) if isinstance(value, list) else value)
        # The first alone does not fit: that is why they travel together.
        name = next(iter(changes))
        refusal(MegaCppError, with_paths, recipe("nam56r"), {name: changes[name]})

    def test_a_field_named_twice_is_refused(self):
        changes = {"hidden_size": 1, "model.hidden_size": 2}
        error = refusal(RecipeError, with_paths, recipe("nam56r"), changes)
        assert error.what == "model.hidden_size is changed twice"
        assert error.given == "hidden_size=1, model.hidden_size=2"

    def test_the_pattern_may_be_given_as_text_or_as_a_pattern(self):
        text = with_fields(recipe("nam56r"), pattern="AEMM")
        assert text == with_fields(recipe("nam56r"), pattern=LayerPattern.parse("aemm"))

    def test_an_unknown_field_is_refused_before_anything_is_built(self):
        changes = {"depth": -1, "dept": 2}
        error = refusal(RecipeError, with_paths, recipe("nam56r"), changes)
        assert error.hint == "'depth'"


class TestTheRecipe:
    def test_the_default_is_nam56r_on_one_node(self):
        default = HybridRecipe()
        assert default.name == "nam56r"
        assert default == recipe("nam56r", mode="author_dp", changes={"mamba": "native"})

    def test_recipes_are_values(self):
        assert len({recipe("nam56r"), recipe("nam56r"), recipe("nam52")}) == 2

    def test_a_recipe_cannot_be_changed_in_place(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            recipe("nam56r").depth = 3

    def test_layers_are_the_pattern_at_depth(self):
        made = recipe("nam56r", changes={"pattern": "AEM", "depth": 7, "a_ranks": [1]})
        assert str(made.layers) == "AEMAEMA"
        assert made.sparse_layer_numbers == (4,)

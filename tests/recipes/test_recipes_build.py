"""Every recipe as NeMo's configuration: whole, serializable, and refused where it cannot run."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from megacpp_nemo.contract import (
    RECIPE_NAMES,
    DataError,
    MegaCppError,
    ParallelismMode,
    PatternError,
    RecipeError,
    RuntimeRefusal,
    describe,
    recipe,
    with_fields,
)

MODES = [mode.value for mode in ParallelismMode]
FULL = [name for name in RECIPE_NAMES if not name.endswith(("_tiny", "_smoke"))]
SMALL = [name for name in RECIPE_NAMES if name not in FULL]
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(("name", "mode"), itertools.product(RECIPE_NAMES, MODES))
def test_a_recipe_builds_survives_serialization_and_dry_runs(name, mode, capsys):
    import nemo_run as run
    from nemo.collections import llm
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    from megacpp_nemo.recipes import FACTORIES, to_nemo

    partial = FACTORIES[name](mode=mode)
    assert isinstance(partial, run.Partial)
    assert partial.__fn_or_cls__ is llm.pretrain
    assert partial == to_nemo(recipe(name, mode=mode))
    serializer = ZlibJSONSerializer()
    assert serializer.deserialize(serializer.serialize(partial)) == partial
    run.dryrun_fn(partial)
    assert f"runs/{name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_names_are_functions_with_a_description(name):
    import megacpp_nemo.recipes as recipes

    for full in (name, f"{name}_finetune", f"{name}_model", f"{name}_data", f"{name}_optim"):
        assert full in recipes.__all__
        function = getattr(recipes, full)
        assert function is recipes.FACTORIES[full]
        assert function.__name__ == full
    assert " ".join(getattr(recipes, name).__doc__.split()).startswith(describe(name))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_megatrons_configuration_reads_back_as_the_recipes_shapes(name, mode, build):
    """`model.shape` reads Megatron's names without the table that wrote them."""
    from megacpp_nemo.model.shape import shape_of
    from megacpp_nemo.recipes import model_config

    intent = recipe(name, mode=mode)
    model, features = shape_of(build(model_config(intent).config))
    for part in ("hidden_size", "ffn_hidden_size", "seq_length", "latent", "mamba", "recurrent"):
        assert getattr(model, part) == getattr(intent.model, part), part
    for part in ("num_heads", "head_dim"):
        assert getattr(model.attention, part) == getattr(intent.model.attention, part), part
    for part in ("num_experts", "topk", "ffn_hidden_size", "shared_expert_size"):
        assert getattr(model.experts, part) == getattr(intent.model.experts, part), part
    assert features == intent.features


def test_an_unknown_recipe_is_an_error_with_the_known_ones():
    with pytest.raises(RecipeError, match=r"nam56r_4096_tiny(.|\n)*'nam56r'"):
        recipe("nam56x")


@pytest.mark.parametrize("name", FULL)
def test_a_full_size_model_says_which_packages_it_lacks(name, build):
    from importlib.util import find_spec

    from megacpp_nemo.lowering.table import GPU_PACKAGES
    from megacpp_nemo.recipes import FACTORIES

    missing = [package.replace("_", "-") for package in GPU_PACKAGES if find_spec(package) is None]
    if not missing:
        pytest.skip("this machine has all of them")
    with pytest.raises(RuntimeRefusal) as refusal:
        build(FACTORIES[name]().model)
    assert ", ".join(missing) in refusal.value.what


@pytest.mark.parametrize("name", FULL)
def test_full_size_data_has_no_default_and_says_how_to_set_it(name, build):
    from megacpp_nemo.recipes import FACTORIES

    data = FACTORIES[name]().data
    assert "paths" not in data.__arguments__
    with pytest.raises(DataError, match=r"data\.paths="):
        build(data)


@pytest.mark.parametrize(
    ("start", "overrides", "error", "said"),
    [
        ({}, {"num_moe_experts": None}, RecipeError, "no experts"),
        ({}, {"num_moe_experts": 1}, RecipeError, "more experts than there are"),
        ({}, {"hybrid_override_pattern": "AEMX"}, PatternError, "Unknown block letter 'X'"),
        ({}, {"num_layers": 0}, PatternError, "whole number"),
        (
            {"pattern": "AEMEAE|MEAEMR", "pipeline_model_parallel_size": 2, "devices_per_node": 2},
            {"num_layers": 13},
            PatternError,
            "must equal the depth",
        ),
    ],
)
def test_an_override_that_contradicts_the_pattern_is_an_error(build, start, overrides, error, said):
    from megacpp_nemo.recipes import nam56r_tiny

    model = nam56r_tiny(**start).model
    build(model)
    for name, value in overrides.items():
        setattr(model.config, name, value)
    with pytest.raises(error, match=said) as caught:
        build(model)
    assert str(caught.value).count("\n") == 3  # four parts, and not Fiddle's list of arguments


def test_an_error_of_others_keeps_what_fiddle_says_of_it(build):
    from megacpp_nemo.recipes import nam56r_tiny

    trainer = nam56r_tiny().trainer
    trainer.max_steps = "many"
    with pytest.raises(Exception, match="Fiddle context") as caught:
        build(trainer)
    assert not isinstance(caught.value, MegaCppError)


def test_small_recipes_need_no_package_and_build_their_own_corpus(build):
    from megacpp_nemo.data.module import CppDataModule
    from megacpp_nemo.recipes import FACTORIES

    for name in SMALL:
        partial = FACTORIES[name]()
        assert partial.data.__fn_or_cls__ is CppDataModule
        assert build(partial.model).config.required_packages == ()


def test_the_run_folder_is_the_name_or_what_is_given():
    from megacpp_nemo.recipes import nam52_tiny, to_nemo

    assert nam52_tiny().log.explicit_log_dir == "runs/nam52_tiny"
    assert nam52_tiny(log_dir="elsewhere").log.explicit_log_dir == "elsewhere"
    renamed = with_fields(recipe("nam52_tiny"), name="mine_tiny")
    assert to_nemo(renamed).log.explicit_log_dir == "runs/mine_tiny"


def test_importing_the_recipes_starts_no_cuda():
    import torch

    import megacpp_nemo.recipes  # noqa: F401

    assert not torch.cuda.is_initialized()


def shared_share(lines: list[str], others: list[str]) -> float:
    """Return the share of a module's lines that stand in another as well."""
    return sum(line in others for line in lines) / len(lines)


def substance(path: Path) -> list[str]:
    """Return a module's lines that are more than a bracket or a blank."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if any(char.isalnum() for char in line)]


def test_no_recipe_module_repeats_a_fifth_of_another():
    modules = {path.name: substance(path) for path in RECIPES.glob("*.py")}
    assert len(modules) >= 5
    for one, other in itertools.permutations(modules, 2):
        share = shared_share(modules[one], modules[other])
        assert share < 0.2, f"{share:.0%} of {one} stands in {other}"
    for name, lines in modules.items():
        rest = [line for other, found in modules.items() if other != name for line in found]
        assert shared_share(lines, rest) < 0.35, name

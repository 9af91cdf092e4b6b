"""Every field of every recipe is carried once on every release, or by nothing that reads it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megacpp_nemo.contract import HybridRecipe, LoweringError, PatternError, field_paths
from megacpp_nemo.lowering.arguments import dead_flags, parse
from megacpp_nemo.lowering.lower import Lowering, lower
from megacpp_nemo.lowering.plan import Plan, make_plan
from megacpp_nemo.lowering.releases import RELEASE_NAMES, load_release
from megacpp_nemo.lowering.roles import layer_roles, prediction_roles
from megacpp_nemo.lowering.row import Row
from megacpp_nemo.lowering.settings import Owner
from megacpp_nemo.lowering.spec_name import SPEC_MODULE, SpecName
from megacpp_nemo.lowering.table import FRAME, ROWS
from tests.support.recipes import changed, recipes

PROFILE = settings.get_profile("lowering")
releases = st.sampled_from(RELEASE_NAMES)
# The layout of the pattern and of its stages, which no field's row spells.
STRUCTURE = {"--spec", "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"}
# One flag turns it on everywhere, and the spec keeps it to the expert layers.
CARRIED_TWICE = {"precision"}
# What the flags and the name of the spec cannot say: they say it by what stands in the pattern.
SAID_BY_LAYERS = {
    "pattern", "depth", "features.latent_attention", "features.sparse_attention",
    "features.experts", "features.mamba", "model.sparse_attention.a_ranks",
    "model.mtp.num_layers", "model.mtp.pattern",
    "parallelism.virtual_pipeline_model_parallel_size",
}  # fmt: skip
SAID_BY_LAUNCH = {"parallelism.num_nodes", "parallelism.devices_per_node"}
# What decides a NeMo run alone, or is refused where it is on.
SAYS_NOTHING = {
    "corpus", "features.kernels", "features.reset_attention_mask", "model.embedding.vocab_size",
}  # fmt: skip


def lowered(recipe: HybridRecipe, release: str) -> Lowering:
    """Return the lowering; the example is passed over where the release cannot have it."""
    try:
        return lower(recipe, release=release)
    except (LoweringError, PatternError):
        assume(False)
        raise


@settings(PROFILE, max_examples=100)
@given(recipes(), releases)
def test_a_refusal_has_its_four_parts(recipe, release):
    refusal = None
    try:
        lower(recipe, release=release)
    except (LoweringError, PatternError) as error:
        refusal = error
    assume(refusal is not None)
    assert None not in (refusal.given, refusal.allowed, refusal.hint)
    assert not refusal.what.endswith(".")
    # The table says which flags are read: no recipe may meet a flag that is dead after all.
    assert "no layer would read" not in refusal.what


def spec_of(lowering: Lowering) -> SpecName | None:
    words = list(lowering.argv)
    module, name = words[words.index("--spec") + 1 :][:2]
    return SpecName.parse(name) if module == SPEC_MODULE else None


def flags_of(plan: Plan, row: Row) -> list[str]:
    """Return the flags that a row writes in a model, read off the table."""
    value = row.value(plan.recipe)
    spelled = [(s.flag, s.value(value, plan.recipe)) for s in row.flags if s.holds(plan)]
    return [flag for flag, said in spelled if said is not None]


@settings(PROFILE, max_examples=150)
@given(recipes(), releases)
def test_a_recipe_is_refused_or_becomes_a_vector_that_the_release_takes_and_reads(recipe, name):
    lowering, release = lowered(recipe, name), load_release(name)
    arguments = parse(lowering.argv, release)
    assert dead_flags(arguments, release) == ()
    assert arguments.argv == lowering.argv
    assert parse(lowering.command, release)


@settings(PROFILE, max_examples=150)
@given(recipes(), releases)
def test_every_flag_and_every_key_of_the_spec_says_one_field(recipe, name):
    lowering, release = lowered(recipe, name), load_release(name)
    plan = make_plan(recipe, release)
    written = Counter(parse(lowering.argv, release))
    said = Counter(flag for row in (*ROWS, *FRAME) for flag in flags_of(plan, row))
    assert set(said.values()) <= {1}
    assert written.keys() - said.keys() <= {release.pattern_flag, *STRUCTURE}
    assert said.keys() <= written.keys()
    spec = spec_of(lowering)
    keys = {row.field for row in ROWS if row.spec and row.spec.holds(plan)}
    assert (set(spec.settings) if spec else set()) == keys
    for path, value in spec.settings.items() if spec else ():
        assert value == field_paths(recipe)[path]


@settings(PROFILE, max_examples=150)
@given(recipes(), releases)
def test_every_field_is_accounted_for_once(recipe, name):
    lowering = lowered(recipe, name)
    plan = make_plan(recipe, load_release(name))
    told = [setting for setting in lowering.settings if setting.field]
    assert [setting.field for setting in told] == list(dict.fromkeys(row.field for row in ROWS))
    assert {setting.field for setting in told} == set(field_paths())
    for setting in told:
        rows = [row for row in ROWS if row.field == setting.field]
        native = any(flags_of(plan, row) for row in rows)
        named = any(row.spec and row.spec.holds(plan) for row in rows)
        if native and named:
            assert setting.field in CARRIED_TWICE
        assert bool(setting.carried) == (native or named)
        assert (setting.owner is Owner.BOTH) == (native and named)
        if setting.owner is Owner.UNREAD:
            assert not any(s.holds(plan) for row in rows for s in row.flags)
        elif setting.owner in (Owner.PATTERN, Owner.POLICY, Owner.RECIPE):
            assert setting.field in (SAID_BY_LAYERS | SAID_BY_LAUNCH | SAYS_NOTHING | {"name"})
        assert setting.evidence


@settings(PROFILE, max_examples=100)
@given(recipes(), releases)
def test_a_layer_is_native_or_a_seam_and_never_both(recipe, name):
    lowering, release = lowered(recipe, name), load_release(name)
    spec = spec_of(lowering)
    assert (spec is None) == (not lowering.seams)
    covered = Counter(
        number for seam in lowering.seams if seam.kind.value == "layer" for number in seam.layers
    )
    owners = {seam.id for seam in lowering.seams}
    for layer in lowering.layers:
        assert (layer.owner == "native") == (layer.number not in covered)
        assert layer.owner == "native" or layer.owner in owners
        assert covered[layer.number] <= 1
    if spec:
        assert [named.custom for named in spec.layers] == [
            layer.owner != "native" for layer in lowering.layers
        ]
        assert [named.role for named in spec.layers] == [layer.role for layer in lowering.layers]
    symbols = "".join(layer.symbol for layer in lowering.layers)
    arguments = parse(lowering.argv, release)
    pattern = str(arguments[release.pattern_flag])
    assert pattern.partition("/")[0].replace("|", "") == symbols
    assert set(symbols) <= set(release.symbols.values())


def said(recipe: HybridRecipe, name: str) -> tuple[Any, ...]:
    lowering = lowered(recipe, name)
    return lowering.argv, lowering.policy


@settings(PROFILE, max_examples=500)
@given(recipes(), st.sampled_from(sorted(field_paths())), releases)
def test_a_changed_field_changes_the_command_unless_no_layer_reads_it(recipe, field, name):
    other = changed(recipe, field)
    assume(other is not None)
    if said(recipe, name) != said(other, name):
        return
    plans = [make_plan(each, load_release(name)) for each in (recipe, other)]
    rows = [row for row in ROWS if row.field == field]
    if field in SAID_BY_LAYERS:
        assert layer_roles(recipe) == layer_roles(other)
        assert prediction_roles(recipe) == prediction_roles(other) or not plans[0].native_mtp
        return
    assert field not in SAID_BY_LAUNCH
    if field == "name":
        assert recipe.files.run_dir
    if field in {*SAYS_NOTHING, "name"}:
        return
    assert any(row.flags or row.spec for row in rows)
    for plan in plans:
        assert not any(row.spec and row.spec.holds(plan) for row in rows)
        assert not any(flags_of(plan, row) for row in rows)
        # A flag that holds and is not written says the value that Megatron takes without it.
        assert not any(s.holds(plan) for row in rows for s in row.flags)


@settings(PROFILE, max_examples=40)
@given(recipes(), releases)
def test_lowering_again_gives_the_same_bytes(recipe, name):
    first, second = lowered(recipe, name), lowered(recipe, name)
    assert first == second
    assert repr(first.to_dict()) == repr(second.to_dict())


@pytest.mark.parametrize("name", RELEASE_NAMES)
def test_every_flag_of_the_table_is_one_of_the_release_where_it_holds(name):
    release = load_release(name)
    version = tuple(map(int, release.package_version.split(".")[:2]))
    for row in (*ROWS, *FRAME):
        for spelling in row.flags:
            if spelling.in_version(version):
                assert release.canonical(spelling.flag) == spelling.flag, spelling.flag

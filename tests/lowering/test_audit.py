"""What moving a recipe to another release changes."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megacpp_nemo.contract import LoweringError, recipe
from megacpp_nemo.lowering.audit import audit
from megacpp_nemo.lowering.difference import PolicyChange, difference
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.lowering.releases import RELEASE_NAMES, load_release
from tests.support.recipes import changed, recipes

PROFILE = settings.get_profile("lowering")
releases = st.sampled_from(RELEASE_NAMES)


def test_nam56r_gains_mla_dsa_and_prediction_depths_from_0_16_1_to_0_19_0():
    found = audit(recipe("nam56r"), "0.16.1", "0.19.0")
    assert found.graduated == ("mla", "dsa", "mtp")
    assert found.remaining == ("m2rnn", "ngram-hash")
    assert found.returned == ()
    assert found.renamed == (("--hybrid-override-pattern", "--hybrid-layer-pattern"),)
    assert "--mtp-num-layers" in found.alive
    assert "--experimental-attention-variant" in found.alive
    assert not set(found.alive) & set(found.removed)
    assert found.difference.policy == (
        PolicyChange(name="entry_script", before="pretrain_mamba.py", after="pretrain_hybrid.py"),
    )
    assert found.after == lower(recipe("nam56r"), release="0.19.0")


def test_recomputation_graduates_with_the_stack_that_has_it():
    made = recipe("nam56r", changes={"recompute": "full", "mtp.num_layers": 0})
    found = audit(made, "0.17.1", "0.18.2")
    assert "recompute" in found.graduated
    assert {"--recompute-granularity", "--recompute-method"} <= set(found.alive)


def test_the_way_back_returns_what_the_way_there_gained():
    there, back = (audit(recipe("nam56r"), *way) for way in (("0.16.1", "0.19.0"),
                                                             ("0.19.0", "0.16.1")))  # fmt: skip
    assert there.graduated == back.returned
    assert there.remaining == back.remaining
    assert there.alive == back.dead


@settings(PROFILE, max_examples=60)
@given(recipes(), releases, releases)
def test_every_change_is_between_the_two_command_lines(made, old, new):
    try:
        found = audit(made, old, new)
    except LoweringError:
        assume(False)
    before, after = lower(made, release=old), lower(made, release=new)
    known = load_release(new).flags
    changes = {change.flag: change for change in found.difference.flags}
    given = {word.partition("=")[0] for word in after.argv}
    assert all((change.before is None) <= (flag in given) for flag, change in changes.items())
    for flag in found.removed:
        assert flag not in known
        assert changes[flag].after is None
    for flag in (*found.alive, *found.dead):
        assert flag in changes
    ids = {seam.id for seam in before.seams}
    assert set(found.graduated) | set(found.remaining) == ids
    assert set(found.returned) | set(found.remaining) == {seam.id for seam in after.seams}
    json.dumps(found.to_dict())


@settings(PROFILE, max_examples=30)
@given(recipes(), releases)
def test_a_release_against_itself_changes_nothing(made, name):
    try:
        found = audit(made, name, name)
    except LoweringError:
        assume(False)
    assert found.difference == difference(found.after, found.after)
    assert found.difference.to_dict() == {
        "flags": [], "layers": [], "policy": [], "seams_gone": [], "seams_new": []
    }  # fmt: skip
    assert (found.graduated, found.renamed, found.removed, found.alive, found.dead) == ((),) * 5


@settings(PROFILE, max_examples=80)
@given(recipes(), st.sampled_from(("schedule.lr", "model.hidden_size", "model.experts.topk",
                                   "features.ngram_hash", "features.mamba", "parallelism.num_nodes",
                                   "parallelism.context_parallel_size")))  # fmt: skip
def test_two_recipes_differ_where_their_command_lines_do(made, field):
    other = changed(made, field)
    assume(other is not None)
    try:
        one, two = lower(made, release="0.19.0"), lower(other, release="0.19.0")
    except LoweringError:
        assume(False)
    found = difference(one, two)
    assert bool(found.flags) == (one.argv != two.argv)
    assert bool(found.layers) == (one.layers != two.layers)
    assert bool(found.policy) == (one.policy != two.policy)
    back = difference(two, one)
    assert [(c.flag, c.after, c.before) for c in found.flags] == [
        (c.flag, c.before, c.after) for c in back.flags
    ]
    assert (found.seams_gone, found.seams_new) == (back.seams_new, back.seams_gone)


@pytest.mark.parametrize(
    ("way", "side"), [(("0.15.3", "0.19.0"), "from"), (("0.19.0", "0.15.3"), "to")]
)
def test_a_side_that_cannot_be_lowered_is_named(way, side):
    with pytest.raises(LoweringError) as caught:
        audit(recipe("nam56r"), *way)
    assert caught.value.what.startswith(f"The audit's {side} side cannot be lowered: ")
    assert None not in (caught.value.given, caught.value.allowed, caught.value.hint)


def test_an_unknown_release_is_refused():
    with pytest.raises(LoweringError, match="No Megatron-LM release"):
        audit(recipe("nam56r"), "0.16.1", "0.99")

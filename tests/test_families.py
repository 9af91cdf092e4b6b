"""Every block family is known everywhere: whoever adds one is led from here to what it needs.

One test a place. `docs/cookbook/block_family.md` goes through them in this order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re

import pytest

from megacpp_nemo.contract import BlockFamily, HybridRecipe, LayerPattern, recipe, with_paths
from megacpp_nemo.contract.errors import LoweringError, RuntimeRefusal
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.lowering.release_data import RELEASE_NAMES
from megacpp_nemo.lowering.roles import Role, role_of
from megacpp_nemo.planner.activations import saved_bytes
from megacpp_nemo.planner.communication import volumes
from megacpp_nemo.planner.flops import forward_flops
from megacpp_nemo.planner.parameters import parameters
from megacpp_nemo.planner.pieces import pieces
from megacpp_nemo.report.colors import paint_of

FAMILIES = pytest.mark.parametrize("family", BlockFamily, ids=lambda family: family.name)


def only(family: BlockFamily, **changes: object) -> HybridRecipe:
    """Return a recipe of two layers of one family."""
    return with_paths(
        recipe("nam56r"),
        {
            "pattern": family.letter,
            "depth": 2,
            "model.sparse_attention.a_ranks": (),
            "model.mtp.num_layers": 0,
            "features.sparse_attention": False,
            "features.ngram_hash": False,
            "parallelism.tensor_model_parallel_size": 2,
            "parallelism.sequence_parallel": True,
            **changes,
        },
    )


@FAMILIES
def test_a_pattern_of_it_is_read_and_printed(family):
    for name in (family.letter.lower(), *family.aliases):
        assert BlockFamily.from_name(name) is family
    assert str(LayerPattern.parse(family.letter)) == family.letter


@FAMILIES
def test_its_layers_have_a_role_with_a_word_for_it(family):
    role = role_of(family, recipe("nam56r"))
    assert role.words
    assert role in Role


@FAMILIES
def test_every_release_lowers_it_or_says_that_it_has_no_layer_for_it(family):
    lowered = []
    for release in RELEASE_NAMES:
        with contextlib.suppress(LoweringError):
            lowered.append(lower(only(family), release=release).layers[0].owner)
            continue
        with pytest.raises(LoweringError, match=re.escape(role_of(family, only(family)).words)):
            lower(only(family), release=release)
    assert lowered, "no release at all has it, and no seam gives it one"


@FAMILIES
def test_its_parameters_are_known_and_each_has_a_kind(family):
    found = [item for item in parameters(only(family)) if item.layer == 1]
    assert any(item.kind.is_matrix for item in found)
    assert {item.family for item in found} == {family}


@FAMILIES
def test_the_planner_says_what_it_costs(family):
    given = only(family)
    layer = next(piece for piece in pieces(given) if piece.family is family)
    assert forward_flops(given, layer).total > 2 * given.model.hidden_size
    assert sum(saved_bytes(given, layer).values()) > 0
    assert any(volume.group == "tensor" for volume in volumes(given, 0))


@FAMILIES
def test_it_has_a_colour_of_its_own(family):
    others = [paint_of(other) for other in BlockFamily if other is not family]
    assert paint_of(family) not in others


@FAMILIES
def test_the_runtime_builds_it_or_refuses_it_by_name(family):
    from megacpp_nemo.host.preflight import BUILT
    from megacpp_nemo.model.stack import HybridStackSubmodules, _spec_of

    names = [item.name for item in dataclasses.fields(HybridStackSubmodules)]
    everything = HybridStackSubmodules(**dict.fromkeys(names, object))
    if family in BUILT:
        assert _spec_of(everything, family) is object
    else:
        with pytest.raises(RuntimeRefusal, match=family.name.lower()):
            _spec_of(everything, family)

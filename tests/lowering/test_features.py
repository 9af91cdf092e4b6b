"""The placement receipt: every feature, on or off, where it attaches and whose it is."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megacpp_nemo.contract import LoweringError, recipe
from megacpp_nemo.lowering.features import Status, ranges
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.lowering.releases import RELEASE_NAMES
from megacpp_nemo.lowering.seams import SEAMS
from tests.support.recipes import recipes

PROFILE = settings.get_profile("lowering")
NAMES = ["MLA", "DSA", "MoE", "Mamba path", "M2RNN", "MTP", "n-gram hash", "structure",
         "FIRE", "DASH", "periodic shrink", "ReDo", "STP"]  # fmt: skip
LEVERS = dict(zip(NAMES[-5:], ("fire", "dash", "shrink", "redo", "stp"), strict=True))


@settings(PROFILE, max_examples=80)
@given(recipes(), st.sampled_from(RELEASE_NAMES))
def test_every_feature_is_told_once_and_its_seam_is_one_of_the_lowerings(made, release):
    try:
        lowering = lower(made, release=release)
    except LoweringError:
        assume(False)
    assert [feature.name for feature in lowering.features] == NAMES
    ids = {seam.id for seam in lowering.seams}
    for feature in lowering.features:
        on = feature.status is not Status.OFF
        assert bool(feature.place) == on
        custom = feature.status in (Status.SEAM, Status.EXPERIMENTAL)
        assert bool(feature.seam) == custom
        if custom:
            assert feature.seam in ids
            assert SEAMS[feature.seam].built == (feature.status is Status.SEAM)
    told = {feature.name: feature for feature in lowering.features}
    assert (told["n-gram hash"].status is not Status.OFF) == made.features.ngram_hash
    assert (told["structure"].status is not Status.OFF) == bool(made.features.structure)
    assert (told["MTP"].status is not Status.OFF) == bool(made.model.mtp.num_layers)
    for name, lever in LEVERS.items():
        on = lever in made.plasticity.on
        assert told[name].status is (Status.EXPERIMENTAL if on else Status.OFF)
        assert told[name].seam == (lever if on else "")


@pytest.mark.parametrize(
    ("release", "mla", "dsa", "mtp"),
    [
        ("0.16.1", Status.SEAM, Status.SEAM, Status.EXPERIMENTAL),
        ("0.17.1", Status.SEAM, Status.SEAM, Status.NATIVE),
        ("0.18.2", Status.SEAM, Status.NATIVE, Status.NATIVE),
        ("0.19.0", Status.NATIVE, Status.NATIVE, Status.NATIVE),
    ],
)
def test_nam56r_by_release(release, mla, dsa, mtp):
    told = {f.name: f for f in lower(recipe("nam56r"), release=release).features}
    assert (told["MLA"].status, told["DSA"].status, told["MTP"].status) == (mla, dsa, mtp)
    assert told["DSA"].place.endswith("A-ranks 1-3, 5-7, 9-11")
    assert told["M2RNN"].place == "layers 12, 24, 36, 48"
    assert told["n-gram hash"].place == "embedding, first stage, 2 tensor ranks"
    assert told["FIRE"].status is Status.OFF


@pytest.mark.parametrize(
    ("changes", "name", "place"),
    [
        ({"fire.steps": (100, 200)}, "FIRE", "layers 1-12; steps 100, 200"),
        ({"fire.boundaries": ("data",), "fire.target": "mlp"}, "FIRE",
         "layers 2, 4, 6, 8, 10; data boundaries"),
        ({"dash.steps": (5,), "dash.layers": (3, 1)}, "DASH", "layers 1, 3; step 5"),
        ({"shrink.interval": 7, "shrink.families": ("R",)}, "periodic shrink",
         "layers 12; every 7 steps"),
        ({"redo.report_interval": 10, "redo.steps": (20,)}, "ReDo",
         "layers 2, 4, 6, 8, 10; step 20, reports every 10 steps"),
        ({"stp.weight": 0.02}, "STP", "layers 12; after step 24"),
        ({"stp.measure": True, "stp.layers": (3, 6)}, "STP", "layers 3, 6; measured only"),
    ],
)  # fmt: skip
def test_a_lever_is_told_by_its_layers_and_when_it_acts(changes, name, place):
    told = {f.name: f for f in lower(recipe("nam56r_tiny", changes=changes)).features}
    assert (told[name].status, told[name].place) == (Status.EXPERIMENTAL, place)
    others = [told[other].status for other in LEVERS if other != name]
    assert set(others) == {Status.OFF}


@given(st.sets(st.integers(1, 60)))
def test_ranges_are_the_numbers(numbers):
    found: list[int] = []
    for run in filter(None, ranges(sorted(numbers)).split(", ")):
        first, _, last = run.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    assert found == sorted(numbers)

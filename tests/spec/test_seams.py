"""The seam list is true: what it calls built is there, and what it does not is refused."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from megacpp_nemo.contract import RuntimeRefusal, recipe
from megacpp_nemo.contract.plasticity import LEVERS
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.lowering.releases import load_release
from megacpp_nemo.lowering.seams import SEAMS, Kind
from megacpp_nemo.lowering.spec_name import SpecName
from megacpp_nemo.spec.build import stack_spec

ROOT = Path(__file__).parents[2]
NATIVE = {
    "latent_attention": False,
    "sparse_attention": False,
    "ngram_hash": False,
    "mtp.num_layers": 0,
    "pattern": "AEMEAEMEAEMM",
}
# What brings one seam alone into a recipe that has none.
ALONE: dict[str, dict[str, Any]] = {
    "mla": {"latent_attention": True},
    "mamba-kernel-shape": {"mamba.conv_width": 3},
    "mamba-path": {"mamba_path": "portable"},
    "author-mamba": {"features.mamba": "author"},
    "m2rnn": {"pattern": "AEMEAEMEAEMR"},
    "fp8-experts": {"precision": "fp8"},
    "recompute": {"recompute": "full"},
    "mtp": {"mtp.num_layers": 1},
    "ngram-hash": {"ngram_hash": True},
    "structure": {"structure": "core"},
    "documents": {"reset_state": True},
    "dsa": {"latent_attention": True, "sparse_attention": True},
    "fire": {"fire.steps": (100,), "fire.boundaries": ("data",)},
    "dash": {"dash.steps": (100,), "dash.boundaries": ("context",)},
    "shrink": {"shrink.interval": 100},
    "redo": {"redo.steps": (100,), "redo.report_interval": 10},
    "stp": {"stp.weight": 0.02, "stp.measure": True},
}
WITH = {"dsa": {"mla", "dsa"}}


def lowered(seam: str) -> Any:
    return lower(recipe("nam52", changes={**NATIVE, **ALONE[seam]}))


def test_every_seam_can_be_asked_for():
    assert ALONE.keys() == SEAMS.keys()


@pytest.mark.parametrize("seam", SEAMS)
def test_a_recipe_gets_the_seam_it_asks_for_and_no_other(seam):
    assert {found.id for found in lowered(seam).seams} == WITH.get(seam, {seam})


@pytest.mark.parametrize(
    "seam", [seam for seam in SEAMS.values() if seam.built], ids=lambda s: s.id
)
def test_what_is_built_has_an_owner_and_its_spec_is_made(seam):
    module, _, name = seam.owner.rpartition(".")
    owner = importlib.import_module(module)
    assert hasattr(owner, name) or importlib.import_module(seam.owner)
    argv = lowered(seam.id).argv
    assert stack_spec(SpecName.parse(argv[argv.index("--spec") + 2])).module


@pytest.mark.parametrize("seam", [s for s in SEAMS.values() if not s.built], ids=lambda s: s.id)
def test_what_is_not_built_is_refused_with_what_turns_it_off(seam):
    argv = lowered(seam.id).argv
    with pytest.raises(RuntimeRefusal) as error:
        stack_spec(SpecName.parse(argv[argv.index("--spec") + 2]))
    assert seam.off in (error.value.hint or "")


@pytest.mark.parametrize("seam", SEAMS.values(), ids=lambda s: s.id)
def test_what_the_command_line_does_not_get_has_its_owner_in_a_nemo_run(seam):
    assert bool(seam.nemo_owner) is not seam.built
    if seam.kind is Kind.CALLBACK:
        assert importlib.import_module(seam.nemo_owner)
        assert seam.id in LEVERS
    elif seam.nemo_owner:
        module, _, name = seam.nemo_owner.rpartition(".")
        assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("seam", SEAMS.values(), ids=lambda s: s.id)
def test_turning_a_seam_off_takes_it_away(seam):
    changes = {**NATIVE, **ALONE[seam.id]}
    for word in seam.off.split(", "):
        field, _, value = word.partition("=")
        changes = {key: old for key, old in changes.items() if not field.endswith(key)}
        changes[field] = {"false": False, "null": None, "[]": ()}.get(value, value)
        if isinstance(changes[field], str) and changes[field].isdigit():
            changes[field] = int(value)
    left = {found.id for found in lower(recipe("nam52", changes=changes)).seams}
    assert seam.id not in left


@pytest.mark.parametrize("seam", SEAMS.values(), ids=lambda s: s.id)
def test_the_evidence_of_a_seam_exists(seam):
    for place in re.findall(r"tests/[\w/.]+", seam.evidence):
        assert (ROOT / place).exists()
    assert re.findall(r"tests/[\w/.]+", seam.evidence)


def test_native_since_is_the_first_release_with_the_symbol():
    # The versions that the seams name are those of the releases' own symbols.
    for meaning, seam in (("MLA", "mla"), ("DS_ATTENTION", "dsa")):
        before, since = {"mla": ("0.18.2", "0.19.0"), "dsa": ("0.17.1", "0.18.2")}[seam]
        assert meaning not in load_release(before).symbols
        assert meaning in load_release(since).symbols
        assert since.startswith(SEAMS[seam].native_since or "never")
    assert load_release("0.16.1").mtp_separator is None
    assert load_release("0.17.1").mtp_separator == "/"

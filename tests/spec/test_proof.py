"""Proof of what a lowered command line builds."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from megacpp_nemo.contract import (
    RECIPE_NAMES,
    LoweringError,
    RuntimeRefusal,
    recipe,
    with_fields,
)
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.lowering.roles import Role
from tests.spec.release_model import RECURRENT
from tests.support.processes import in_process

# What no layer on Megatron's command line carries out yet.
OFF = {
    "model.mtp.num_layers": 0,
    "features.reset_state": False,
    "features.ngram_hash": False,
    "features.sparse_attention": False,
}
ALL_NATIVE = {
    **OFF,
    "pattern": "AEM",
    "features.latent_attention": False,
    "model.mamba.chunk_size": 128,
}


def tiny(**changes: Any) -> Any:
    return recipe("nam56r_tiny", changes={**OFF, **changes})


def proven(subject: Any, meta: bool | None = None) -> Any:
    from megacpp_nemo.model.proof import prove

    return prove(subject, meta=meta)


def test_every_layer_of_the_tiny_recipe_is_what_the_lowering_says():
    proof = in_process(proven, tiny())
    lowered = lower(tiny()).layers
    assert [layer.slot for layer in proof.layers] == [layer.symbol for layer in lowered]
    first, second, third, last = (*proof.layers[:3], proof.layers[-1])
    assert first.built == ("TransformerLayer", "LatentAttention")
    assert second.built == ("MoETransformerLayer", "MoELayer")
    assert second.owner == "native"
    assert third.built == ("MambaLayer", "PortableMambaMixer")
    assert last.built == ("MambaLayer", "RecurrentMixer")
    assert last.owner == "megacpp_nemo.model.recurrent.RecurrentMixer"
    assert len(str(proof).splitlines()) == 12


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_every_recipe_is_proven_in_every_size(name):
    subject = recipe(name, changes=OFF)
    proof = in_process(proven, subject)
    assert len(proof.layers) == subject.depth


def test_a_full_size_model_is_proven_without_memory_for_its_weights():
    proof = in_process(proven, recipe("nam56r", changes=OFF))
    assert len(proof.layers) == 52
    assert sum(layer.owner == "native" for layer in proof.layers) == 35
    # A vocabulary of 256 stands for the tokenizer's.
    assert sum(torch.Size(shape).numel() for shape in proof.parameters.values()) == 3_197_789_336


@pytest.mark.parametrize(
    "changes",
    [
        ALL_NATIVE,
        {**ALL_NATIVE, "features.experts": False},
        {"pattern": "AEMR", "model.latent.layernorm": True},
        {"pattern": "EMR", "model.experts.activation": "squared_relu"},
        {"pattern": "AEMR", "features.mamba": "author"},
        {"pattern": "AEMR", "features.sparse_attention": True},
        {"pattern": "DEMR", "model.latent.layernorm": True},
    ],
    ids=["all native", "dense", "latent norms", "squared relu", "Mamba-3", "DSA", "written DSA"],
)
def test_other_models_are_proven_too(changes):
    subject = tiny(**changes)
    assert len(in_process(proven, subject).layers) == 12


def test_what_the_spec_refuses_cannot_be_proven():
    def attempt() -> str:
        with pytest.raises(RuntimeRefusal) as refusal:
            proven(recipe("nam56r_tiny", changes={**OFF, "model.mtp.num_layers": 1}))
        return str(refusal.value)

    assert "multi-token prediction" in in_process(attempt)


def test_another_release_than_the_installed_one_is_refused():
    from megacpp_nemo.model.proof import prove

    with pytest.raises(LoweringError, match="another one is installed"):
        prove(tiny(), release="0.17.1")


def compared(changes: dict[int, dict[str, Any]], pattern: str, name: str, **config: Any) -> str:
    """Return the error of comparing a built stack with changed claims."""
    from megacpp_nemo.model.proof import Claim, compare
    from tests.spec import release_model

    roles = (Role.LATENT_ATTENTION, Role.EXPERTS, Role.MAMBA, Role.RECURRENT)
    owners = {
        Role.LATENT_ATTENTION: "megacpp_nemo.model.attention.LatentAttention",
        Role.RECURRENT: "megacpp_nemo.model.recurrent.RecurrentMixer",
    }
    claims = [
        Claim(number=i, role=role, custom=role in owners, owner=owners.get(role, "native"))
        for i, role in enumerate(roles, start=1)
    ]
    claims = [replace(claim, **changes.get(claim.number, {})) for claim in claims]
    release_model.start()
    stack = release_model.build(pattern, name, **config).decoder
    try:
        compare(claims, stack)
    except LoweringError as error:
        return str(error)
    return ""


RIGHT = f"layers=LemR,{RECURRENT}"


def test_right_claims_hold():
    assert in_process(compared, {}, "*EMM", RIGHT) == ""


@pytest.mark.parametrize(
    ("pattern", "name", "said"),
    [
        ("*EMM", "layers=Lemm", "layer 4 (M2RNN, megacpp_nemo.model.recurrent.RecurrentMixer)"),
        ("*EMM", RIGHT.replace("Lem", "aem"), "layer 1 (multi-latent attention"),
        ("*EMMM", RIGHT.replace("LemR", "LemRm"), "4 layers are claimed and 5 were built"),
    ],
)
def test_a_stack_that_was_built_otherwise_fails(pattern, name, said):
    config = {"multi_latent_attention": False} if "aem" in name else {}
    assert said in in_process(_compared_with, pattern, name, config)


def _compared_with(pattern: str, name: str, config: dict[str, Any]) -> str:
    return compared({}, pattern, name, **config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({1: {"custom": False, "owner": "native"}}, "LatentAttention was built"),
        ({4: {"role": Role.MAMBA, "custom": False}}, "RecurrentMixer was built"),
        ({3: {"role": Role.MLP}}, "no layer of dense MLP"),
        ({2: {"number": 3}}, "has the number 2"),
        ({3: {"sizes": {"chunk_size": 64}}}, "chunk_size is 128, not 64"),
        ({4: {"owner": "megacpp_nemo.spec"}}, "RecurrentMixer was built"),
    ],
)
def test_a_claim_that_is_wrong_fails(changes, said):
    assert said in in_process(compared, changes, "*EMM", RIGHT)


def test_a_flag_without_a_place_in_the_configuration_is_an_error(monkeypatch):
    from megacpp_nemo.lowering.arguments import parse
    from megacpp_nemo.lowering.releases import load_release
    from megacpp_nemo.model import flags

    release = load_release("0.16.1")
    arguments = parse(lower(tiny()).argv, release)
    monkeypatch.setattr(flags, "RUN_FLAGS", flags.RUN_FLAGS - {"--clip-grad"})
    with pytest.raises(LoweringError, match="--clip-grad"):
        flags.configuration(arguments, release, 12)


def both_lanes(subject: Any) -> dict[str, Any]:
    """Return the model of both lanes: parameters, checkpoint names, and logits of equal weights."""
    from types import SimpleNamespace

    import fiddle

    from megacpp_nemo.host.groups import one_process
    from megacpp_nemo.model.lowered import LoweredModel
    from megacpp_nemo.recipes.build import to_nemo

    described = LoweredModel.of(lower(subject), "0.16.1")
    config = fiddle.build(to_nemo(subject).model.config)
    with one_process(), described.built() as megatron:
        # NeMo's and Megatron's defaults choose other attention kernels, where there are any.
        for name in [name for name in os.environ if name.startswith("NVTE_")]:
            del os.environ[name]
        nemo = config.configure_model(SimpleNamespace(vocab_size=256))
        nemo.load_state_dict(megatron.state_dict())
        tokens = torch.randint(0, 256, (2, 64))
        positions = torch.arange(64).expand_as(tokens)
        mask = torch.ones(64, 64, dtype=torch.bool).triu(1)[None, None]
        with torch.no_grad():
            logits = [model(tokens, positions, mask) for model in (nemo, megatron)]
        return {
            "parameters": [
                {name: tuple(p.shape) for name, p in model.named_parameters()}
                for model in (nemo, megatron)
            ],
            "checkpoint": [
                sorted(_names(model.sharded_state_dict())) for model in (nemo, megatron)
            ],
            "difference": (logits[0] - logits[1]).abs().max().item(),
        }


def _names(state: dict[str, Any]) -> list[str]:
    return [getattr(item, "key", name) for name, item in state.items()]


@pytest.mark.parametrize("changes", [{}, {"model.latent.layernorm": True}], ids=str)
def test_both_lanes_build_the_same_model(changes):
    found = in_process(both_lanes, with_fields(tiny(), **_words(changes)))
    assert found["parameters"][0] == found["parameters"][1]
    assert found["checkpoint"][0] == found["checkpoint"][1]
    assert found["difference"] == 0.0


def _words(changes: dict[str, Any]) -> dict[str, Any]:
    return {path.replace(".", "__"): value for path, value in changes.items()}


@pytest.mark.megatron_source
@pytest.mark.parametrize("release", ["0.17.1", "0.18.2", "0.19.0", "main-2026-08"])
def test_lowerings_to_other_releases_are_proven_by_those(on_release, release):
    output = on_release(release, "tests.spec.proof_script", release)
    rows = [line.split() for line in output.splitlines() if line.split()[:1] and line[:4].strip()]
    layers = [row for row in rows if row[0].isdigit()]
    # Twelve layers, then the expert and the attention layer of one prediction depth.
    assert [int(row[0]) for row in layers] == [*range(1, 13), 1, 2]
    owners = {row[-1] for row in layers}
    native_latent = release in ("0.19.0", "main-2026-08")
    assert ("megacpp_nemo.model.attention.LatentAttention" in owners) is not native_latent

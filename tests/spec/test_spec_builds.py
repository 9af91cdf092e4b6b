"""What a named spec builds in Megatron's own hybrid model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from megatron.core.transformer.spec_utils import import_module

from megacpp_nemo.lowering.spec_name import SPEC_MODULE
from tests.spec import release_model
from tests.spec.release_model import AUTHOR_MAMBA, RECURRENT, SPARSE
from tests.support.processes import RankError, in_process

LATENT = ("TransformerLayer", "LatentAttention")
SPARSE_LATENT = ("TransformerLayer", "SparseLatentAttention")
MLA = ("TransformerLayer", "MLASelfAttention")
PLAIN = ("TransformerLayer", "SelfAttention")
EXPERTS = ("MoETransformerLayer", "MoELayer")
DENSE = ("MLPLayer", "MLP")
MAMBA = ("MambaLayer", "PortableMambaMixer")
MAMBA_3 = ("MambaLayer", "AuthorMambaMixer")
M2RNN = ("MambaLayer", "RecurrentMixer")
DSA = {"0.18.2": MLA}
ABSORBED = ("TransformerLayer", "AbsorbedMLASelfAttention")
INDEXER = {
    "experimental_attention_variant": "dsa",
    "dsa_indexer_n_heads": 2,
    "dsa_indexer_head_dim": 8,
    "dsa_indexer_topk": 4,
    # The indexer rotates with a CUDA kernel, so DSA is built here and not run.
    "forward": False,
}
WITH_MTP = ("0.17.1", "0.18.2", "0.19.0", "main-2026-08")
RELEASES = ("0.16.1", *WITH_MTP)


def report(arguments: dict[str, Any]) -> dict[str, Any]:
    return release_model.report(**arguments)


def built(**arguments: Any) -> dict[str, Any]:
    """Return what the installed Megatron-Core builds."""
    return in_process(report, arguments)


def kinds(layers: list[dict[str, Any]]) -> list[tuple[str, str]]:
    assert [layer["number"] for layer in layers] == list(range(1, len(layers) + 1))
    return [(layer["layer"], *layer["inside"]) for layer in layers]


def check_run(found: dict[str, Any]) -> None:
    assert found["missed"] == []
    # Untrained, a model is near the uniform guess over 64 tokens.
    assert found["loss"] == pytest.approx(4.16, abs=0.2)


def test_custom_layers_ride_on_the_slots_of_the_pattern():
    found = built(pattern="*EMM", name=f"layers=LemR,{RECURRENT}")
    assert kinds(found["layers"]) == [LATENT, EXPERTS, MAMBA, M2RNN]
    check_run(found)


def test_dense_and_sparse_attention_ride_on_one_slot():
    found = built(pattern="*M*M", name=f"layers=LmDR,{RECURRENT},{SPARSE}")
    assert kinds(found["layers"]) == [LATENT, MAMBA, SPARSE_LATENT, M2RNN]
    check_run(found)


def test_a_slot_holds_native_and_custom_layers_at_once():
    found = built(
        pattern="*-MMM",
        name=f"layers=afmMR,mamba.conv_width=3,mamba.chunk_size=8,{RECURRENT}",
        multi_latent_attention=False,
        num_moe_experts=None,
        moe_ffn_hidden_size=None,
    )
    assert kinds(found["layers"]) == [PLAIN, DENSE, MAMBA, MAMBA, M2RNN]
    check_run(found)


def test_the_authored_mamba_stands_beside_the_native_one():
    found = built(pattern="*MMM", name=f"layers=LNmN,{AUTHOR_MAMBA}")
    assert kinds(found["layers"]) == [LATENT, MAMBA_3, MAMBA, MAMBA_3]
    check_run(found)


@pytest.mark.parametrize("stage", [0, 1])
def test_layers_of_a_later_stage_are_found_by_their_number_in_the_whole_model(stage):
    """Up to 0.16 attention and expert slots are told the number within the stage only."""
    found = built(
        pattern="*EMM*EMM",
        name=f"layers=LemRLemR,{RECURRENT}",
        stage=stage,
        stages=2,
    )
    assert [layer["number"] for layer in found["layers"]] == [4 * stage + i for i in range(1, 5)]
    assert [tuple(layer["inside"]) for layer in found["layers"]] == [
        ("LatentAttention",),
        ("MoELayer",),
        ("PortableMambaMixer",),
        ("RecurrentMixer",),
    ]


@pytest.mark.parametrize(
    ("pattern", "layers", "said"),
    [
        ("*EMM", "Lem", "layer 4 of the main pattern; the name has 3"),
        ("*EMM", "Lemm", None),
        ("*MEM", "Lemm", "disagree on layer 2"),
        ("*EMM", "lemm", "slot attention_layer for 'l'"),
    ],
)
def test_a_pattern_that_is_not_the_names_is_refused(pattern, layers, said):
    if said is None:
        assert len(built(pattern=pattern, name=f"layers={layers}")["layers"]) == 4
        return
    with pytest.raises(RankError, match=said):
        built(pattern=pattern, name=f"layers={layers}")


def test_another_norm_is_refused_where_the_local_one_stands_in():
    with pytest.raises(RankError, match="built with RMSNorm"):
        built(pattern="M", name="layers=m", normalization="LayerNorm")


def test_predictions_are_refused_where_the_release_builds_none():
    with pytest.raises(Exception, match="no multi-token prediction in a hybrid model"):
        import_module((SPEC_MODULE, "layers=Lem,mtp=Le"))


def on(on_release: Any, release: str, **arguments: Any) -> dict[str, Any]:
    return release_model.read(
        on_release(release, "tests.spec.release_model", json.dumps(arguments))
    )


@pytest.mark.megatron_source
@pytest.mark.parametrize("release", RELEASES)
def test_every_release_builds_and_runs_the_four_families(on_release, release):
    found = on(on_release, release, pattern="*EMM", name=f"layers=LemR,{RECURRENT}")
    assert kinds(found["layers"]) == [LATENT, EXPERTS, MAMBA, M2RNN]
    check_run(found)


@pytest.mark.megatron_source
@pytest.mark.parametrize(("release", "slot"), [("0.16.1", "*"), ("0.17.1", "*"), ("0.18.2", "D")])
def test_sparse_attention_runs_on_releases_that_lack_it_or_its_norms(on_release, release, slot):
    name = f"layers=DemR,{RECURRENT},{SPARSE}"
    found = on(on_release, release, pattern=f"{slot}EMM", name=name, qk_layernorm=True)
    assert kinds(found["layers"]) == [SPARSE_LATENT, EXPERTS, MAMBA, M2RNN]
    check_run(found)


@pytest.mark.megatron_source
@pytest.mark.parametrize("release", WITH_MTP)
def test_prediction_depths_have_roles_of_their_own(on_release, release):
    found = on(
        on_release,
        release,
        # Layers 1 and 2 are Mamba in the main pattern, and attention and experts in a depth.
        pattern="MME*/*E/*E",
        name=f"layers=mReL,mtp=Le,{RECURRENT}",
        mtp_num_layers=2,
    )
    assert kinds(found["layers"]) == [MAMBA, M2RNN, EXPERTS, LATENT]
    assert [kinds(depth) for depth in found["mtp"]] == [[LATENT, EXPERTS]] * 2
    check_run(found)


@pytest.mark.megatron_source
@pytest.mark.parametrize("release", ["0.18.2", "0.19.0", "main-2026-08"])
def test_latent_attention_rides_on_the_sparse_slot_beside_native_sparse_layers(on_release, release):
    found = on(on_release, release, pattern="DDEM", name=f"layers=dLeR,{RECURRENT}", **INDEXER)
    assert kinds(found["layers"]) == [DSA.get(release, ABSORBED), LATENT, EXPERTS, M2RNN]


@pytest.mark.megatron_source
@pytest.mark.parametrize("release", ["0.19.0", "main-2026-08"])
def test_later_releases_build_latent_attention_themselves(on_release, release):
    found = on(on_release, release, pattern="+EM-", name=f"layers=leRf,{RECURRENT}")
    assert kinds(found["layers"]) == [MLA, EXPERTS, M2RNN, DENSE]
    check_run(found)
    found = on(on_release, release, pattern="+DM-", name=f"layers=ldRf,{RECURRENT}", **INDEXER)
    assert kinds(found["layers"]) == [MLA, ABSORBED, M2RNN, DENSE]


@pytest.mark.megatron_source
@pytest.mark.parametrize("release", WITH_MTP)
def test_a_stage_of_a_later_release_has_the_layers_of_its_segment(on_release, release):
    found = on(
        on_release,
        release,
        pattern="*E|MM*EM",
        name=f"layers=LemRLem,{RECURRENT}",
        stage=1,
        stages=2,
    )
    assert [(layer["number"], *layer["inside"]) for layer in found["layers"]] == [
        (3, "PortableMambaMixer"),
        (4, "RecurrentMixer"),
        (5, "LatentAttention"),
        (6, "MoELayer"),
        (7, "PortableMambaMixer"),
    ]

"""What each parameter is, and which of them a selection chooses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpp_nemo.contract import LayerPattern, PatternError, RecipeError
from megacpp_nemo.contract.parameters import TARGETS, Parameter, ParameterKind, Selection, classify
from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.contract.shapes import (
    AttentionShape,
    AuthorMambaShape,
    ExpertsShape,
    LatentShape,
    MambaShape,
    ModelShape,
    RecurrentShape,
)

LAYERS = LayerPattern.parse("AEMR")
MODEL = ModelShape(
    hidden_size=32,
    attention=AttentionShape(num_heads=4, num_query_groups=2, head_dim=8),
    latent=LatentShape(
        q_lora_rank=6, kv_lora_rank=10, qk_head_dim=8, qk_pos_emb_head_dim=4, v_head_dim=12
    ),
    experts=ExpertsShape(num_experts=4, ffn_hidden_size=16, activation="swiglu"),
    mamba=MambaShape(num_heads=4, head_dim=8, state_dim=6, num_groups=2),
    author_mamba=AuthorMambaShape(num_heads=8, head_dim=8, state_dim=16, mimo_rank=2),
    recurrent=RecurrentShape(num_heads=4, num_qk_heads=1, key_dim=8, value_dim=4),
)


def of(name: str, *shape: int, **ranks: int) -> Parameter:
    return classify(name, shape, layers=LAYERS, model=MODEL, **ranks)


def rows(parameter: Parameter) -> dict[str, tuple[tuple[int, int], ...]]:
    return {part.name: part.rows for part in parameter.parts}


# The depths of `ModelShape` are AE unless said otherwise.
INNER = "mtp.layers.1.mtp_model_layer.layers"


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("embedding.word_embeddings.weight", (64, 32), ParameterKind.EMBEDDING),
        ("output_layer.weight", (64, 32), ParameterKind.HEAD),
        ("decoder.final_norm.weight", (32,), ParameterKind.NORM),
        ("decoder.layers.0.input_layernorm.weight", (32,), ParameterKind.NORM),
        ("decoder.layers.0.self_attention.q_layernorm.weight", (6,), ParameterKind.NORM),
        ("decoder.layers.2.mixer.in_proj.layer_norm_weight", (32,), ParameterKind.NORM),
        ("decoder.layers.2.norm.weight", (32,), ParameterKind.NORM),
        ("decoder.layers.2.mixer.norm.weight", (32,), ParameterKind.NORM),
        ("decoder.layers.1.mlp.router.weight", (4, 32), ParameterKind.ROUTER),
        ("decoder.layers.1.mlp.router.expert_bias", (4,), ParameterKind.ROUTER),
        ("decoder.layers.1.mlp.shared_experts.linear_fc1.bias", (32,), ParameterKind.BIAS),
        ("decoder.layers.2.mixer.conv1d.weight", (56, 1, 4), ParameterKind.CONVOLUTION),
        ("decoder.layers.2.mixer.A_log", (4,), ParameterKind.STATE),
        ("decoder.layers.2.mixer.B_bias", (8, 2, 16), ParameterKind.STATE),
        ("decoder.layers.2.mixer.mimo_x", (8, 2, 8), ParameterKind.STATE),
        ("decoder.layers.2.mixer.C_norm.weight", (16,), ParameterKind.NORM),
        ("decoder.layers.3.mixer.transition", (4, 4, 4), ParameterKind.TRANSITION),
        ("decoder.layers.0.self_attention.linear_proj.weight", (32, 48), ParameterKind.PROJECTION),
        ("mtp.layers.0.enorm.weight", (32,), ParameterKind.NORM),
        ("mtp.layers.0.hnorm.weight", (32,), ParameterKind.NORM),
        ("mtp.layers.0.final_layernorm.weight", (32,), ParameterKind.NORM),
        ("mtp.layers.0.eh_proj.weight", (32, 64), ParameterKind.PROJECTION),
        (f"{INNER}.1.mlp.router.weight", (4, 32), ParameterKind.ROUTER),
    ],
)
def test_every_parameter_has_a_kind(name: str, shape: tuple[int, ...], kind: ParameterKind) -> None:
    found = of(name, *shape)
    assert found.kind is kind
    assert (Selection().refusal(found) is None) is kind.is_matrix


def test_queries_keys_and_values_lie_group_by_group() -> None:
    found = of("decoder.layers.0.self_attention.linear_qkv.weight", 64, 32)
    assert found.kind is ParameterKind.FUSED_PROJECTION
    # Two groups of two query heads, one key head and one value head, each 8 rows high.
    assert rows(found) == {
        "q": ((0, 16), (32, 48)),
        "k": ((16, 24), (48, 56)),
        "v": ((24, 32), (56, 64)),
    }


def test_latent_keys_and_values_lie_head_by_head() -> None:
    found = of("decoder.layers.0.self_attention.linear_kv_up_proj.weight", 80, 10)
    assert rows(found)["k"] == ((0, 8), (20, 28), (40, 48), (60, 68))
    assert rows(found)["v"] == ((8, 20), (28, 40), (48, 60), (68, 80))


@pytest.mark.parametrize(
    ("rank", "latent", "rotary"), [(0, ((0, 7),), ()), (1, ((0, 3),), ((3, 7),))]
)
def test_a_latent_projection_split_as_one_keeps_what_each_rank_has(
    rank: int, latent: tuple[tuple[int, int], ...], rotary: tuple[tuple[int, int], ...]
) -> None:
    # 10 latent rows and 4 rotary ones, cut in the middle of the latent ones.
    name = "decoder.layers.0.self_attention.linear_kv_down_proj.weight"
    found = of(name, 7, 32, tensor_ranks=2, tensor_rank=rank)
    assert rows(found) == {"latent": latent, "k_rotary": rotary}


def test_mixers_are_told_apart_by_their_layers_family() -> None:
    mamba = of("decoder.layers.2.mixer.in_proj.weight", 92, 32)
    assert {part.name: part.height for part in mamba.parts} == {
        "z": 32, "x": 32, "B": 12, "C": 12, "dt": 4
    }  # fmt: skip
    recurrent = of("decoder.layers.3.mixer.in_proj.weight", 52, 32)
    assert {part.name: part.height for part in recurrent.parts} == {
        "q": 8, "k": 8, "v": 16, "g": 16, "f": 4
    }  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_authored_mamba_has_parts_of_its_own(ranks: int) -> None:
    height = (2 * 64 + 2 * 32 + 3 * 8 + 4) // ranks
    found = classify(
        "decoder.layers.2.mixer.in_proj.weight",
        (height, 32),
        layers=LAYERS,
        model=MODEL,
        mamba="author",
        tensor_ranks=ranks,
    )
    assert {part.name: part.height * ranks for part in found.parts} == {
        "z": 64, "x": 64, "B": 32, "C": 32, "dt": 8, "A": 8, "trap": 8, "angle": 4
    }  # fmt: skip
    assert found.parts[-1].rows == ((height - 4 // ranks, height),)


@pytest.mark.parametrize(
    "ending", ["local_experts.1.linear_fc1.weight", "linear_fc1.weight1"], ids=["list", "grouped"]
)
def test_an_expert_has_one_name_however_its_bank_is_held(ending: str) -> None:
    found = of(f"decoder.layers.1.mlp.experts.{ending}", 32, 32, first_expert=2)
    assert found.name == "decoder.layers.1.mlp.experts.3.linear_fc1.weight"
    assert (found.kind, found.expert) == (ParameterKind.EXPERT_BANK, 3)
    assert rows(found) == {"gate": ((0, 16),), "up": ((16, 32),)}
    assert [found.part_name(part)[-6:] for part in found.parts] == ["[gate]", "ht[up]"]


def test_layers_of_a_prediction_depth_are_of_its_families_and_have_no_number() -> None:
    # Depths stand on the last stage, whatever is before it.
    found = of(f"{INNER}.1.mlp.experts.local_experts.0.linear_fc1.weight", 32, 32, first_layer=3)
    assert found.name == f"{INNER}.1.mlp.experts.0.linear_fc1.weight"
    assert (found.layer, found.family, found.expert) == (None, BlockFamily.EXPERTS, 0)
    assert rows(found) == {"gate": ((0, 16),), "up": ((16, 32),)}
    latent = of(f"{INNER}.0.self_attention.linear_kv_down_proj.weight", 14, 32)
    assert latent.family is BlockFamily.ATTENTION
    assert rows(latent) == {"latent": ((0, 10),), "k_rotary": ((10, 14),)}
    joined = of("mtp.layers.1.eh_proj.weight", 32, 64, first_layer=3)
    assert (joined.name, joined.family) == ("mtp.layers.1.eh_proj.weight", None)
    assert rows(joined) == {"": ((0, 32),)}


def test_layers_are_numbered_through_the_pipeline_stages() -> None:
    found = of("decoder.layers.1.mixer.out_proj.weight", 32, 16, first_layer=2)
    assert (found.name, found.layer) == ("decoder.layers.3.mixer.out_proj.weight", 4)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("decoder.layers.0.self_attention.linear_new.weight", (4, 4)),
        ("decoder.layers.1.mlp.experts.weight1", (4, 4)),
        ("ngram.table", (4, 4)),
        ("mtp.layers.0.e_proj.weight", (32, 32)),
        (f"{INNER}.2.mlp.router.weight", (4, 32)),
        ("decoder.layers.2.mixer.in_proj.scale", (4,)),
    ],
)
def test_a_parameter_that_no_rule_knows_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(RecipeError, match="No rule says what this parameter is"):
        of(name, *shape)


def test_parts_that_do_not_fill_their_matrix_are_refused() -> None:
    with pytest.raises(RecipeError, match="do not fill it"):
        of("decoder.layers.2.mixer.in_proj.weight", 90, 32)


@given(
    st.sampled_from(("q", "kv_down", "kv_up", "mamba", "recurrent", "fc1")), st.sampled_from((1, 2))
)
def test_the_parts_of_a_matrix_are_its_rows_each_once(which: str, ranks: int) -> None:
    names = {
        "q": ("decoder.layers.0.self_attention.linear_qkv.weight", 64),
        "kv_down": ("decoder.layers.0.self_attention.linear_kv_down_proj.weight", 14),
        "kv_up": ("decoder.layers.0.self_attention.linear_kv_up_proj.weight", 80),
        "mamba": ("decoder.layers.2.mixer.in_proj.weight", 92),
        "recurrent": ("decoder.layers.3.mixer.in_proj.weight", 52),
        "fc1": ("decoder.layers.1.mlp.shared_experts.linear_fc1.weight", 32),
    }
    name, height = names[which]
    total: dict[str, int] = {}
    for rank in range(ranks):
        found = of(name, height // ranks, 32, tensor_ranks=ranks, tensor_rank=rank)
        covered = sorted(i for part in found.parts for a, b in part.rows for i in range(a, b))
        assert covered == list(range(height // ranks))
        for part in found.parts:
            total[part.name] = total.get(part.name, 0) + part.height
    whole = of(name, height, 32)
    assert total == {part.name: part.height for part in whole.parts}


def test_queries_and_keys_of_attention_alone_are_its_target() -> None:
    chosen = Selection(target="attention_qk")
    qkv = of("decoder.layers.0.self_attention.linear_qkv.weight", 64, 32)
    down = of("decoder.layers.0.self_attention.linear_kv_down_proj.weight", 14, 32)
    recurrent = of("decoder.layers.3.mixer.in_proj.weight", 52, 32)
    assert [part.name for part in chosen.parts(qkv)] == ["q", "k"]
    assert [part.name for part in chosen.parts(down)] == ["k_rotary"]
    assert list(chosen.parts(recurrent)) == []
    assert chosen.refusal(qkv) is None
    assert chosen.refusal(recurrent) == "not in target attention_qk"


def test_families_and_layers_narrow_a_target() -> None:
    proj = of("decoder.layers.0.self_attention.linear_proj.weight", 32, 48)
    assert Selection(families=("a",), layers=(1,)).refusal(proj) is None
    assert Selection(families=("M", "R")).refusal(proj) == "not of families M, R"
    assert Selection(layers=(2, 3)).refusal(proj) == "layer 1 is not among layers 2, 3"


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_chooses_something_in_a_model_of_all_families(target: str) -> None:
    parameters = [
        of("decoder.layers.0.self_attention.linear_qkv.weight", 64, 32),
        of("decoder.layers.1.mlp.experts.local_experts.0.linear_fc2.weight", 32, 16),
        of("decoder.layers.2.mixer.out_proj.weight", 32, 32),
        of("decoder.layers.3.mixer.out_proj.weight", 32, 16),
    ]
    assert any(list(Selection(target=target).parts(each)) for each in parameters)


def test_a_selection_that_cannot_be_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"(?s)No target.*try: +target='attention'"):
        Selection(target="atention")
    with pytest.raises(PatternError, match="No block family"):
        Selection(families=("Q",))
    with pytest.raises(RecipeError, match="not on this model"):
        Selection(layers=(5,)).check(LAYERS, 1)
    with pytest.raises(RecipeError, match="Nothing in this model is selected"):
        Selection(target="experts", families=("A",)).check(LAYERS, 0)

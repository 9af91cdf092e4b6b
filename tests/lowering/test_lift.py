"""Lifting is the inverse of lowering, and refuses what no recipe can say."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megacpp_nemo.contract import (
    RECIPE_NAMES,
    HybridRecipe,
    LoweringError,
    MegaCppError,
    ParallelismMode,
    field_paths,
    recipe,
    with_paths,
)
from megacpp_nemo.lowering.arguments import parse
from megacpp_nemo.lowering.lift import lift
from megacpp_nemo.lowering.lower import Lowering, lower
from megacpp_nemo.lowering.releases import RELEASE_NAMES, load_release
from megacpp_nemo.lowering.roles import layer_roles
from megacpp_nemo.lowering.settings import Owner
from tests.support.recipes import recipes

PROFILE = settings.get_profile("lowering")
releases = st.sampled_from(RELEASE_NAMES)


def lowered(made: HybridRecipe, release: str) -> Lowering:
    try:
        return lower(made, release=release)
    except LoweringError:
        assume(False)
        raise


def lifted(lowering: Lowering, argv: list[str] | tuple[str, ...] | None = None) -> HybridRecipe:
    policy = lowering.policy
    return lift(
        lowering.argv if argv is None else argv,
        lowering.release,
        num_nodes=policy.num_nodes,
        devices_per_node=policy.devices_per_node,
    )


def groups(lowering: Lowering) -> list[list[str]]:
    """Return each flag of a command line with its values."""
    known = load_release(lowering.release).flags
    found: list[list[str]] = []
    for word in lowering.argv:
        if word.partition("=")[0] in known:  # joined where a value begins with a dash
            found.append([])
        found[-1].append(word)
    return found


@settings(PROFILE, max_examples=120)
@given(recipes(), releases)
def test_lifting_a_lowered_recipe_gives_the_fields_that_the_command_carries(made, release):
    lowering = lowered(made, release)
    back = lifted(lowering)
    ours, theirs = field_paths(made), field_paths(back)
    carried = {Owner.MEGATRON, Owner.SPEC, Owner.BOTH, Owner.POLICY}
    for setting in lowering.settings:
        if setting.field == "files.run_dir":
            assert back.run_dir == made.run_dir
        elif setting.owner in carried and setting.field not in ("", "features.sparse_attention"):
            assert theirs[setting.field] == ours[setting.field], setting
    # A `D` comes back as an `A` of a sparse rank.
    assert layer_roles(back) == layer_roles(made)
    assert lower(back, release=release).layers == lowering.layers
    if any(layer.role.value in "ef" for layer in (*lowering.layers, *lowering.prediction)):
        assert back.features.experts == made.features.experts


@settings(PROFILE, max_examples=120)
@given(recipes(), releases, st.randoms(use_true_random=False))
def test_lowering_a_lifted_command_gives_it_back_in_whatever_order_it_was(made, release, chance):
    lowering = lowered(made, release)
    shuffled = groups(lowering)
    chance.shuffle(shuffled)
    again = lower(lifted(lowering, [word for group in shuffled for word in group]), release=release)
    assert again.argv == lowering.argv
    assert again.seams == lowering.seams


@settings(PROFILE, max_examples=60)
@given(recipes(), releases, st.data())
def test_a_flag_too_many_or_too_few_is_refused_or_said_again_by_the_recipe(made, release, data):
    lowering = lowered(made, release)
    kept = groups(lowering)
    gone = data.draw(st.sampled_from(kept))
    rest = [word for group in kept if group is not gone for word in group]
    refusal, back = None, made
    try:
        back = lifted(lowering, rest)
    except MegaCppError as error:
        refusal = error
    if refusal:
        assert None not in (refusal.given, refusal.allowed, refusal.hint)
        return
    # What is left is a whole recipe: without the flag it says what Megatron takes.
    known = load_release(release)
    left, again = parse(rest, known), parse(lower(back, release=release).argv, known)
    assert {flag: again.get(flag) for flag in left} == dict(left)
    assert again.keys() - left.keys() <= {gone[0].partition("=")[0]}


@settings(PROFILE, max_examples=60)
@given(recipes(), releases, st.data())
def test_a_flag_that_only_repeats_megatrons_default_may_be_left_out(made, release, data):
    lowering, known = lowered(made, release), load_release(release)
    values = parse(lowering.argv, known)
    repeated = [
        flag for flag, value in values.items() if told(value) == told(known.flags[flag].default)
    ]
    assume(repeated)
    gone = data.draw(st.sampled_from(repeated))
    rest = [word for group in groups(lowering) if group[0] != gone for word in group]
    assert lower(lifted(lowering, rest), release=release).argv == lowering.argv


def told(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


@pytest.mark.parametrize("mode", [mode.value for mode in ParallelismMode])
@pytest.mark.parametrize("name", RECIPE_NAMES)
@pytest.mark.parametrize("plain", [False, True])
def test_every_recipe_is_lifted_from_every_release(name, mode, plain):
    off = {"latent_attention": False, "sparse_attention": False, "ngram_hash": False,
           "mtp.num_layers": 0, "reset_state": False}  # fmt: skip
    made = recipe(name, mode=mode, changes=off if plain else {})
    lowerings = []
    for release in RELEASE_NAMES:
        with contextlib.suppress(LoweringError):  # not every release has every recipe
            lowerings.append(lower(made, release=release))
    assert lowerings
    for lowering in lowerings:
        assert lower(lifted(lowering), release=lowering.release).argv == lowering.argv


OWN = (
    *("--num-attention-heads", "--num-query-groups", "--group-query-attention", "--kv-channels"),
    *("--num-experts", "--moe-router-topk", "--lr-warmup-iters", "--lr-decay-iters"),
)


@pytest.mark.parametrize(
    ("more", "fields"),
    [
        ({"--num-attention-heads": "12"}, {"model.attention.num_query_groups": 12}),
        (
            {"--num-attention-heads": "12", "--group-query-attention": None},
            {"model.attention.num_query_groups": 1},
        ),
        (
            {"--num-attention-heads": "8", "--num-experts": "2"},
            {"model.experts.topk": 2, "schedule.warmup_steps": 0},
        ),
        (
            {"--num-attention-heads": "8", "--lr-decay-iters": "100"},
            {"schedule.warmup_steps": 0, "schedule.decay_steps": 100},
        ),
    ],
)
def test_what_a_command_leaves_out_is_megatrons_and_not_nam56rs(more, fields):
    off = {"latent_attention": False, "sparse_attention": False, "ngram_hash": False,
           "mtp.num_layers": 0, "pattern": "AEM", "hidden_size": 96, "devices_per_node": 1,
           "tensor_model_parallel_size": 1, "sequence_parallel": False}  # fmt: skip
    lowering = lower(recipe("nam52", changes=off), release="0.19.0")
    kept = [word for group in groups(lowering) if group[0] not in OWN for word in group]
    asked = {"--num-experts": "16", "--lr-decay-iters": "100000", "--kv-channels": "8", **more}
    said = [word for pair in asked.items() for word in pair if word is not None]
    back = field_paths(lift([*kept, *said], "0.19.0"))
    assert {path: back[path] for path in fields} == fields


UNKNOWN = ("--unheard-of", "--m2rnn-num-heads", "--multi-token-prediction", "--lr-schedule")


@settings(PROFILE, max_examples=40)
@given(recipes(), releases, st.sampled_from(UNKNOWN), st.integers(0, 10))
def test_an_unknown_flag_is_refused_by_name_wherever_it_stands(made, release, flag, place):
    lowering = lowered(made, release)
    parts = groups(lowering)
    parts.insert(place, [flag])
    with pytest.raises(LoweringError, match=flag):
        lifted(lowering, [word for group in parts for word in group])


def native() -> Lowering:
    off = {"sparse_attention": False, "ngram_hash": False, "latent_attention": False,
           "mtp.num_layers": 0, "pattern": "AEM"}  # fmt: skip
    return lower(recipe("nam52", changes=off))


def refused(*more: str, without: str = "") -> LoweringError:
    lowering = native()
    kept = [word for group in groups(lowering) if group[0] != without for word in group]
    with pytest.raises(LoweringError) as caught:
        lifted(lowering, [*kept, *more])
    assert None not in (caught.value.given, caught.value.allowed, caught.value.hint)
    return caught.value


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--recompute-granularity", "full"), "--recompute-granularity is dead"),
        (("--fim-rate", "0.5"), "--fim-rate is dead"),
        (("--mtp-num-layers", "1"), "--mtp-num-layers is dead"),
        (("--q-lora-rank", "64"), "--q-lora-rank is dead"),
        (("--dsa-indexer-topk", "64"), "--dsa-indexer-topk is dead"),
    ],
)
def test_a_flag_that_no_recipe_writes_is_refused_with_the_reason(more, said):
    assert said in str(refused(*more))


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--hybrid-override-pattern", "no hybrid layer pattern"),
        ("--normalization", "--normalization is not given: Megatron takes 'LayerNorm'"),
        ("--disable-bias-linear", "--disable-bias-linear is not given: add --disable-bias-linear"),
        ("--disable-bias-linear", "  try:     add --disable-bias-linear"),
        ("--normalization", "  try:     add --normalization RMSNorm"),
        ("--untie-embeddings-and-output-weights", "--untie-embeddings-and-output-weights"),
        ("--lr", "no --lr"),
        ("--spec", "Only the stock spec and this package's can be lifted"),
        ("--num-layers", "--num-layers"),
    ],
)
def test_a_flag_that_every_recipe_writes_is_missed(flag, said):
    assert said in str(refused(without=flag))


@pytest.mark.parametrize(
    "pattern", ["M*||E", "|M", "M|", "M/", "M//E", "/M", "M*/M/E", "MX", "M*/", "é", "M D"]
)
def test_a_pattern_that_upstream_lets_through_or_does_not_know_is_refused(pattern):
    lowering = lower(recipe("nam56r_tiny"), release="0.19.0")
    parts = [g for g in groups(lowering) if g[0] not in ("--hybrid-layer-pattern", "--spec")]
    stock = ["--spec", *load_release("0.19.0").stock_spec]
    words = [word for group in parts for word in group]
    with pytest.raises(MegaCppError):
        lifted(lowering, ["--hybrid-layer-pattern", pattern, *stock, *words])


@pytest.mark.parametrize("sizes", [("0", "1"), ("-1", "1"), ("1", "0"), ("1", "1000000007")])
def test_parallel_sizes_that_cannot_be_are_refused_at_once(sizes):
    lowering = lower(recipe("nam52_tiny"))
    words = {"--pipeline-model-parallel-size": sizes[0]}
    argv = [
        word
        for group in groups(lowering)
        for word in ([group[0], words[group[0]]] if group[0] in words else group)
    ]
    with pytest.raises(MegaCppError):
        lift([*argv, "--expert-model-parallel-size", sizes[1]], "0.16.1", num_nodes=2)


@pytest.mark.parametrize("nodes", [0, -1, "two", None, 1.5])
def test_a_number_of_machines_that_is_none_is_refused(nodes):
    with pytest.raises(MegaCppError, match="num_nodes"):
        lift(lower(recipe("nam52_tiny")).argv, "0.16.1", num_nodes=nodes)


@pytest.mark.parametrize("devices", [0, -1, "two", 1.5])
def test_a_number_of_devices_that_is_none_is_refused(devices):
    with pytest.raises(MegaCppError, match="devices_per_node"):
        lift(lower(recipe("nam52_tiny")).argv, "0.16.1", devices_per_node=devices)


@pytest.mark.parametrize("argv", [None, "--lr 1", b"--lr", 3, {"--lr": 1}])
def test_what_is_no_list_of_words_is_refused(argv):
    with pytest.raises(LoweringError, match="An argument vector is a list of words"):
        lift(argv, "0.16.1")


@pytest.mark.parametrize("release", RELEASE_NAMES)
def test_the_fewest_devices_that_the_sizes_allow_are_taken(release):
    changes = {
        "pattern": "AM", "depth": 2, "features.latent_attention": False, "reset_state": False,
        "model.mamba.chunk_size": 128, "devices_per_node": 8, "global_batch_size": 64,
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
    }  # fmt: skip
    argv = lower(recipe("nam52_tiny", changes=changes), release=release).argv
    assert lift(argv, release).parallelism.devices_per_node == 4
    assert lift(argv, release, num_nodes=2).parallelism.devices_per_node == 2
    assert lift(argv, release, devices_per_node=8) == with_paths(
        lift(argv, release), {"devices_per_node": 8}
    )

"""What the recipes become on each release, and what is refused."""

from __future__ import annotations

import argparse
import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megacpp_nemo.contract import HybridRecipe, LoweringError, RecipeError, recipe, with_paths
from megacpp_nemo.lowering.arguments import parse
from megacpp_nemo.lowering.lift import lift
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.lowering.plan import make_plan
from megacpp_nemo.lowering.policy import LaunchOptions
from megacpp_nemo.lowering.releases import RELEASE_NAMES, load_release
from megacpp_nemo.lowering.seams import SEAMS
from megacpp_nemo.lowering.settings import Owner
from tests.support.recipes import recipes

PROFILE = settings.get_profile("lowering")
NEWER = [name for name in RELEASE_NAMES if name != "0.15.3"]
# NAM56R's own prediction depth cannot be trained on the tip of the main branch.
NAM56R_ON = [name for name in NEWER if not load_release(name).bounded_mtp_experts]
PLAIN = {
    "latent_attention": False, "sparse_attention": False, "mtp.num_layers": 0, "ngram_hash": False
}  # fmt: skip
FILES = {"data_path": ("/data/cpp",), "tokenizer_dir": "/data/tokenizer"}


def seams_of(name: str, release: str, mode: str = "nemo_native", **changes: object) -> list[str]:
    return [seam.id for seam in lower(recipe(name, mode=mode, changes=changes),
                                      release=release).seams]  # fmt: skip


class TestNam52InTheNativeLane:
    @pytest.mark.parametrize("release", NEWER)
    def test_without_our_features_it_is_megatrons_own(self, release):
        lowering = lower(
            recipe("nam52", changes={**PLAIN, **FILES}), release=release, seams="native-only"
        )
        assert lowering.seams == ()
        assert lowering.open == ()
        assert {layer.owner for layer in lowering.layers} == {"native"}
        words = lowering.argv
        assert words[words.index("--spec") + 1 :][:2] == load_release(release).stock_spec
        assert len(lowering.layers) == 52

    def test_its_pattern_is_written_in_the_releases_symbols(self):
        argv = lower(recipe("nam52", changes=PLAIN), release="0.16.1").argv
        assert argv[:2] == (
            "--hybrid-override-pattern", "*EME*EME*EMM*EME*EME*EMM*EME*EME*EMM*EME*EME*EMM*EME"
        )  # fmt: skip

    def test_all_that_it_says_on_0_16_1_is_this(self):
        """Read against the flags that a stock run of the release takes, one by one."""
        given = dict(parse(lower(recipe("nam52", changes=PLAIN)).argv, load_release("0.16.1")))
        known = {
            "--hidden-size": 3584, "--num-layers": 52, "--num-attention-heads": 56,
            "--num-query-groups": 8, "--kv-channels": 64, "--num-experts": 16,
            "--moe-router-topk": 4, "--moe-ffn-hidden-size": 896,
            "--moe-shared-expert-intermediate-size": 1024, "--mamba-num-heads": 56,
            "--mamba-head-dim": 64, "--mamba-state-dim": 64, "--mamba-num-groups": 8,
            "--seq-length": 4096, "--tensor-model-parallel-size": 2, "--bf16": True,
            "--micro-batch-size": 4, "--global-batch-size": 64, "--lr": 3e-4, "--min-lr": 3e-5,
            "--normalization": "RMSNorm", "--position-embedding-type": "none",
        }  # fmt: skip
        assert given.items() >= known.items()
        latent = {flag for flag in given if "lora" in flag or "rope" in flag or "rotary" in flag}
        assert latent == set()


class TestNam56r:
    R_LAYERS = (12, 24, 36, 48)

    @pytest.mark.parametrize(
        ("release", "expected"),
        [
            ("0.16.1", ["mla", "dsa", "m2rnn", "mtp", "ngram-hash"]),
            ("0.17.1", ["mla", "dsa", "m2rnn", "ngram-hash"]),
            ("0.18.2", ["mla", "m2rnn", "ngram-hash"]),
            ("0.19.0", ["m2rnn", "ngram-hash"]),
        ],
    )
    def test_its_seams_are_what_the_release_does_not_own(self, release, expected):
        assert seams_of("nam56r", release) == expected

    @pytest.mark.parametrize("release", NAM56R_ON)
    def test_the_recurrent_seam_covers_its_r_layers_and_no_other(self, release):
        lowering = lower(recipe("nam56r"), release=release)
        seam = next(seam for seam in lowering.seams if seam.id == "m2rnn")
        assert seam.layers == self.R_LAYERS
        assert seam.slot == "M"
        assert [x.number for x in lowering.layers if x.owner == "m2rnn"] == list(self.R_LAYERS)

    @pytest.mark.parametrize("release", NAM56R_ON)
    def test_the_authored_mamba_is_a_seam_where_it_is_asked_for(self, release):
        lowering = lower(recipe("nam56r", mode="author_dp"), release=release)
        seam = next(seam for seam in lowering.seams if seam.id == "author-mamba")
        letters = str(recipe("nam56r").layers)
        assert seam.layers == tuple(n for n, x in enumerate(letters, start=1) if x == "M")
        assert "author-mamba" not in seams_of("nam56r", release)

    @pytest.mark.parametrize(
        ("change", "seam"),
        [
            ({"structure": "core"}, "structure"),
            ({"reset_state": True}, "documents"),
            ({"mamba.conv_width": 2}, "mamba-kernel-shape"),
            ({"mamba.chunk_size": 64}, "mamba-kernel-shape"),
            ({"mamba_path": "split"}, "mamba-path"),
            ({"precision": "fp8"}, "fp8-experts"),
        ],
    )
    def test_what_no_release_owns_is_one_seam_more(self, change, seam):
        for release in NAM56R_ON:
            assert {seam} == set(seams_of("nam56r", release, **change)) - set(
                seams_of("nam56r", release)
            )

    @pytest.mark.parametrize(
        ("release", "depths", "seam"),
        [
            ("0.16.1", 0, True),
            ("0.17.1", 0, True),
            ("0.17.1", 1, True),
            ("0.18.2", 0, False),
            # Its prediction depths fail under its own recomputation.
            ("0.18.2", 1, True),
            ("0.19.0", 0, False),
            ("0.19.0", 1, False),
        ],
    )
    def test_whole_layers_run_again_by_the_release_or_by_the_spec(self, release, depths, seam):
        made = recipe("nam56r", changes={"recompute": "full", "mtp.num_layers": depths})
        lowering = lower(made, release=release)
        flags = ("--recompute-granularity", "--recompute-method", "--recompute-num-layers")
        values = ["full", "uniform", "1"]
        argv = list(lowering.argv)
        assert ("recompute" in {found.id for found in lowering.seams}) == seam
        assert ("parallelism.recompute=full" in argv[argv.index("--spec") + 2]) == seam
        assert [argv[argv.index(x) + 1] for x in flags if x in argv] == ([] if seam else values)
        assert lift(argv, release).parallelism.recompute == "full"

    @pytest.mark.parametrize("release", NAM56R_ON)
    def test_cores_of_attention_run_again_on_every_release(self, release):
        made = recipe("nam56r", changes={"recompute": "selective", "sparse_attention": False})
        lowering = lower(made, release=release)
        argv = list(lowering.argv)
        assert argv[argv.index("--recompute-granularity") + 1] == "selective"
        assert argv[argv.index("--recompute-modules") + 1] == "core_attn"
        assert "--recompute-num-layers" not in argv
        assert "recompute" not in {found.id for found in lowering.seams}
        assert lift(argv, release).parallelism.recompute == "selective"

    def test_norms_on_the_latents_keep_sparse_attention_ours_until_the_release_has_them(self):
        normed = {"latent.layernorm": True}
        assert "dsa" in seams_of("nam56r", "0.18.2", **normed)
        assert "dsa" not in seams_of("nam56r", "0.18.2")
        assert seams_of("nam56r", "0.19.0", **normed) == seams_of("nam56r", "0.19.0")

    def test_0_15_has_no_layers_for_it_and_says_which(self):
        with pytest.raises(LoweringError) as caught:
            lower(recipe("nam56r"), release="0.15.3")
        for words in ("multi-latent attention", "sparse attention", "experts", "M2RNN"):
            assert words in caught.value.what

    def test_a_prediction_depth_that_a_release_cannot_train_is_refused_with_one_that_it_can(self):
        tip = next(name for name in NEWER if name not in NAM56R_ON)
        with pytest.raises(LoweringError, match="cannot train") as caught:
            lower(recipe("nam56r"), release=tip)
        assert str(caught.value.hint).startswith("model.mtp.pattern='EA'")
        assert seams_of("nam56r", tip, **{"mtp.pattern": "EA"}) == ["m2rnn", "ngram-hash"]


def turned_off(made: HybridRecipe, off: str) -> HybridRecipe:
    """Return a recipe with what a seam's report says turns it off."""
    words = {"false": False, "null": None}
    pairs = [part.split("=") for part in off.partition(", or ")[0].split(", ")]
    changes = {path: words.get(text, int(text) if text.isdigit() else text) for path, text in pairs}
    if changes.get("features.latent_attention") is False:
        changes["features.sparse_attention"] = False  # which is built on it
    return with_paths(made, changes)


@pytest.mark.parametrize("release", NAM56R_ON)
def test_turning_every_seam_off_as_it_says_leaves_a_native_recipe(release):
    every = {"structure": "all", "reset_state": True, "precision": "fp8", "mamba.chunk_size": 64}
    made = recipe("nam56r", changes=every)
    for seam in lower(made, release=release).seams:
        before = {seam.id for seam in lower(made, release=release).seams}
        made = turned_off(made, seam.off)
        assert {left.id for left in lower(made, release=release).seams} <= before - {seam.id}
    assert lower(made, release=release, seams="native-only").seams == ()


@settings(PROFILE, max_examples=60)
@given(recipes(), st.sampled_from(RELEASE_NAMES))
def test_native_only_is_the_same_lowering_or_a_refusal_that_names_every_seam(made, release):
    try:
        whole = lower(made, release=release)
    except LoweringError:
        assume(False)
    if not whole.seams:
        assert lower(made, release=release, seams="native-only") == whole
        return
    with pytest.raises(LoweringError) as caught:
        lower(made, release=release, seams="native-only")
    assert all(seam.id in caught.value.what for seam in whole.seams)
    assert all(seam.off in str(caught.value.hint) for seam in whole.seams)


@settings(PROFILE, max_examples=60)
@given(recipes(), st.sampled_from(RELEASE_NAMES))
def test_the_lowering_as_data_is_json_and_names_known_things(made, release):
    try:
        lowering = lower(made, release=release)
    except LoweringError:
        assume(False)
    told = json.loads(json.dumps(lowering.to_dict()))
    assert told["argv"] == list(lowering.argv)
    assert [seam["id"] for seam in told["seams"]] == [seam.id for seam in lowering.seams]
    assert {seam["id"] for seam in told["seams"]} <= set(SEAMS)
    assert len(told["layers"]) == made.depth
    assert told["policy"]["environment"] == lowering.policy.environment


@settings(PROFILE, max_examples=100)
@given(recipes(), st.sampled_from(RELEASE_NAMES))
def test_the_stages_are_the_recipes(made, release):
    try:
        plan = make_plan(made, load_release(release))
    except LoweringError:
        assume(False)
    parallelism = made.parallelism
    stages = parallelism.pipeline_model_parallel_size * (
        parallelism.virtual_pipeline_model_parallel_size or 1
    )
    sizes = [len(stage) for stage in made.layers.split(stages)]
    assert [sum(x.stage == n for x in plan.layers) for n in range(stages)] == sizes
    main = plan.pattern.partition("/")[0]
    if plan.release.stage_separator:
        assert [len(part) for part in main.split("|")] == sizes
    else:
        first, last = plan.uneven_stages
        assert (first, last) in ((None, None), (sizes[0], sizes[-1]))
        assert (first is None) == (len(set(sizes)) == 1)
    if plan.native_mtp:
        assert plan.pattern.count("/") == made.model.mtp.num_layers


class TestRefusals:
    def refused(self, made: object, **options: object) -> LoweringError:
        with pytest.raises(LoweringError) as caught:
            lower(made, **options)
        assert None not in (caught.value.given, caught.value.allowed, caught.value.hint)
        return caught.value

    def test_attention_within_documents(self):
        error = self.refused(recipe("nam56r", changes={"reset_attention_mask": True}))
        assert error.hint == "features.reset_attention_mask=false"

    def test_virtual_stages_before_the_separator(self):
        changes = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
        error = self.refused(recipe("nam56r", changes=changes), release="0.16.1")
        assert "virtual pipeline" in error.what
        assert lower(recipe("nam56r", changes=changes), release="0.17.1").argv[1].count("|") == 3

    def test_stages_that_only_a_separator_can_say(self):
        changes = {"pattern": "A|MM|MMM|A", "depth": 7, "pipeline_model_parallel_size": 4,
                   "sparse_attention": False}  # fmt: skip
        error = self.refused(recipe("nam56r", changes=changes), release="0.16.1")
        assert "[1, 2, 3, 1]" in str(error.given)

    @pytest.mark.parametrize("release", ["0.14", "latest", "", "nam56r", 3, None])
    def test_a_release_that_is_none(self, release):
        assert "No Megatron-LM release" in self.refused(recipe("nam56r"), release=release).what

    @pytest.mark.parametrize("seams", ["native", "", None, True])
    def test_a_way_of_seams_that_is_none(self, seams):
        assert "Unknown way" in self.refused(recipe("nam56r"), seams=seams).what

    @pytest.mark.parametrize("made", ["nam56r", None, 3, {"pattern": "A"}, HybridRecipe, object()])
    def test_what_is_no_recipe(self, made):
        assert self.refused(made).what == "Only recipes can be lowered"

    def test_a_field_that_is_none(self):
        with pytest.raises(RecipeError, match="No recipe field"):
            with_paths(recipe("nam56r"), {"m2rnn_heads": 3})


def test_what_is_missing_for_a_start_is_open_and_not_refused():
    full = {"latent_attention": False, "sparse_attention": False}
    bare = lower(recipe("nam56r", changes=full))
    settles = [item.settle.partition(", or ")[0] for item in bare.open]
    assert settles[:2] == ["model.mtp.num_layers=0", "features.ngram_hash=false"]
    assert [text.partition("=")[0] for text in settles[2:]] == [
        "files.data_path",
        "files.tokenizer_dir",
    ]
    given_files = lower(recipe("nam56r", changes={**full, **FILES, **PLAIN}))
    assert given_files.open == ()
    sources = lower(recipe("nam56r_tiny", changes={"reset_state": False}))
    assert "corpus=indexed" in sources.open[0].settle


def megatrons_parser(release: str) -> argparse.ArgumentParser:
    """Return argparse's own reading of a release's flags, as Megatron-LM makes its parser."""
    made = argparse.ArgumentParser(allow_abbrev=False)
    for flag in load_release(release).canonical_flags().values():
        if flag.action == "store":
            made.add_argument(flag.name, *flag.aliases, nargs=flag.nargs, dest=flag.dest)
        elif flag.action in ("store_true", "store_false"):
            made.add_argument(flag.name, *flag.aliases, action=flag.action, dest=flag.dest)
    return made


DASHED = ("-x", "--save", "-h", "-h x", "-help me", "-1", "--x y", "-", "-x=1", "a-b", "a b")


@pytest.mark.parametrize("value", DASHED)
@pytest.mark.parametrize("release", ["0.16.1", "0.19.0"])
def test_argparse_takes_a_value_that_begins_with_a_dash_for_a_value(value, release):
    changes = {**PLAIN, "run_dir": value, "data_path": (value,), "tokenizer_dir": value}
    lowering = lower(
        recipe("nam52", changes=changes),
        release=release,
        launch=LaunchOptions(cache_dir=value, data_workers=2),
    )
    read = megatrons_parser(release).parse_args(lowering.command)
    assert (read.save, read.load, read.tensorboard_dir) == (value,) * 3
    assert (read.data_path, read.tokenizer_model) == ([value], value)
    assert read.data_cache_path == f"{value}/data"
    known = load_release(release)
    assert parse(parse(lowering.command, known).argv, known) == parse(lowering.command, known)


def test_a_value_with_a_dash_among_several_is_refused_by_the_recipes_field():
    with pytest.raises(LoweringError, match="--data-path") as caught:
        lower(recipe("nam52", changes={**PLAIN, "data_path": ("30", "/a", "70", "-b")}))
    assert caught.value.given == "files.data_path=30,/a,70,-b"
    assert caught.value.hint == "./-b in files.data_path"


@pytest.mark.parametrize(
    ("pattern", "changes", "unread"),
    [
        ("AEM", {}, {"model.sparse_attention.a_ranks", "model.mtp.pattern"}),
        ("AEM", {"mtp.num_layers": 1}, {"model.sparse_attention.a_ranks"}),
        ("AEM", {"latent_attention": True, "sparse_attention": True, "a_ranks": (0,)},
         {"model.mtp.pattern"}),
        ("AM", {}, {"model.sparse_attention.a_ranks", "model.mtp.pattern", "features.experts"}),
        ("AM", {"mtp.num_layers": 1}, {"model.sparse_attention.a_ranks"}),
        ("AE", {}, {"model.sparse_attention.a_ranks", "model.mtp.pattern", "features.mamba"}),
        ("M", {}, {"features.latent_attention", "features.sparse_attention", "features.experts",
                   "model.sparse_attention.a_ranks", "model.mtp.pattern"}),
    ],
)  # fmt: skip
def test_what_decides_no_layer_of_this_model_is_unread(pattern, changes, unread):
    made = recipe("nam52", changes={**PLAIN, "pattern": pattern, **changes})
    for release in ("0.16.1", "0.19.0"):
        told = lower(made, release=release).settings
        found = {each.field for each in told if each.evidence.startswith("would decide")}
        assert found == unread
        assert {each.owner for each in told if each.field in unread} <= {Owner.UNREAD}

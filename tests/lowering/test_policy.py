"""The launch policy: what stays outside of the command line, spelled for the release."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megacpp_nemo.contract import LoweringError, recipe
from megacpp_nemo.lowering.arguments import parse
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.lowering.policy import GRAPHS, LaunchOptions
from megacpp_nemo.lowering.releases import FOLDER, RELEASE_NAMES, load_release
from tests.support.recipes import recipes

PROFILE = settings.get_profile("lowering")
# Both layers of a hybrid model and no seam that an older release lacks.
PLAIN = {
    "latent_attention": False, "sparse_attention": False, "mtp.num_layers": 0, "ngram_hash": False
}  # fmt: skip


def policy(release="0.16.1", changes=None, **options):
    made = recipe("nam52", changes={**PLAIN, **(changes or {})})
    return lower(made, release=release, launch=LaunchOptions(**options)).policy


@settings(PROFILE, max_examples=60)
@given(recipes(), st.sampled_from(RELEASE_NAMES), st.booleans(), st.integers(0, 4))
def test_options_change_the_policy_and_never_what_is_trained(made, release, blackwell, workers):
    options = LaunchOptions(
        blackwell=blackwell, cache_dir="/cache", data_workers=workers, environment={"A": "1"}
    )
    try:
        bare, full = (lower(made, release=release, launch=o) for o in (None, options))
    except LoweringError:
        assume(False)
    assert dataclasses.replace(full, policy=bare.policy) == bare
    assert list(full.policy.environment) == sorted(full.policy.environment)
    assert full.policy.environment["A"] == "1"
    assert full.policy.num_nodes == made.parallelism.num_nodes
    assert full.policy.devices_per_node == made.parallelism.devices_per_node
    given_flags = parse(full.command, load_release(release))
    assert given_flags["--num-workers"] == workers
    assert given_flags["--data-cache-path"] == "/cache/data"
    single_queue = full.policy.environment.get("CUDA_DEVICE_MAX_CONNECTIONS")
    shared = made.parallelism.tensor_model_parallel_size * made.parallelism.context_parallel_size
    assert (single_queue == "1") == (shared > 1 and not blackwell)


@pytest.mark.parametrize("release", [name for name in RELEASE_NAMES if name != "0.15.3"])
def test_graphs_are_spelled_as_the_release_does(release):
    made = recipe("nam52", changes=PLAIN)
    parts = ("attn", "mamba", "moe_router")
    lowering = lower(made, release=release, launch=LaunchOptions(cuda_graphs=parts))
    arguments = parse(lowering.command, load_release(release))
    flag = "--cuda-graph-modules" if release >= "0.18" else "--cuda-graph-scope"
    assert list(arguments[flag]) == list(parts)
    assert arguments["--cuda-graph-impl"] == "transformer_engine"


@pytest.mark.parametrize("launch", ["x", {}, 3, {"cache_dir": "/c"}])
def test_a_launch_that_is_no_options_is_refused(launch):
    with pytest.raises(LoweringError, match="The launch is told by LaunchOptions"):
        lower(recipe("nam52"), launch=launch)


@pytest.mark.parametrize("folder", ["-x", "--save", "-h x", "-1", "a b"])
def test_a_cache_below_any_folder_is_read_as_one(folder):
    lowering = lower(recipe("nam52"), launch=LaunchOptions(cache_dir=folder))
    given_flags = parse(lowering.command, load_release("0.16.1"))
    assert given_flags["--data-cache-path"] == f"{folder}/data"


def test_the_flags_of_the_launch_are_held_against_the_release(tmp_path):
    data = json.loads((FOLDER / "0.16.1.json").read_text())
    del data["flags"]["--num-workers"]
    data["dead"] = []
    (tmp_path / "mine.json").write_text(json.dumps(data))
    with pytest.raises(LoweringError, match="--num-workers is not a flag"):
        policy(str(tmp_path / "mine.json"), data_workers=2)


def test_the_environment_of_the_user_wins():
    variables = policy(environment={"NCCL_NVLS_ENABLE": "1"}).environment
    assert variables["NCCL_NVLS_ENABLE"] == "1"


@pytest.mark.parametrize(
    ("parts", "changes", "said"),
    [
        (("att",), {}, "No part to capture is called 'att'"),
        (("mlp",), {}, "no layers with mlp"),
        (("moe_router",), {"features.experts": False}, "no layers with moe_router"),
        (("mamba",), {"pattern": "AE"}, "no layers with mamba"),
        (("moe_preprocess",), {}, "captured with moe_router"),
        (("attn",), {"recompute": "full"}, "computed again whole"),
    ],
)
def test_what_cannot_be_captured_is_refused(parts, changes, said):
    with pytest.raises(LoweringError, match=said) as caught:
        policy(changes=changes, cuda_graphs=parts)
    assert all(part in str(caught.value.allowed) for part in GRAPHS)
    assert "cuda_graphs" in str(caught.value.hint)


def test_the_oldest_release_captures_what_it_offers():
    made = recipe("nam52", changes={**PLAIN, "features.experts": False})
    with pytest.raises(LoweringError, match=r"0\.15\.3"):
        lower(made, release="0.15.3", launch=LaunchOptions(cuda_graphs=("attn", "mamba")))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("cuda_graphs", "attn"),
        ("cuda_graphs", (3,)),
        ("cuda_graphs", None),
        ("cuda_graphs", 3),
        ("cuda_graphs", ("attn", "attn")),
        ("blackwell", "no"),
        ("blackwell", 1),
        ("data_workers", "2"),
        ("data_workers", True),
        ("data_workers", -1),
        ("data_workers", 1.0),
        ("cache_dir", ""),
        ("cache_dir", 3),
        ("cache_dir", "two\nlines"),
        ("cache_dir", "a\0b"),
        ("environment", None),
        ("environment", ["A=1"]),
        ("environment", {"A": "a\0b"}),
        ("environment", {"A B": "1"}),
        ("environment", {"": "1"}),
        ("environment", {3: "1"}),
        ("environment", {"A": 1}),
        ("environment", {"A": "two\nlines"}),
    ],
)
def test_an_option_of_the_wrong_kind_is_refused_by_name(option, value):
    with pytest.raises(LoweringError) as caught:
        LaunchOptions(**{option: value})
    assert caught.value.what.startswith(f"LaunchOptions.{option} cannot be ")
    assert None not in (caught.value.given, caught.value.allowed, caught.value.hint)

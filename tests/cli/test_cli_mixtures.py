"""Whatever is asked of the planner's commands: figures that add up, or a refusal in four parts."""

from __future__ import annotations

import json
import random
from xml.etree import ElementTree

import pytest

from megacpp_nemo.contract import RECIPE_NAMES

CHANGES = (
    ("precision=fp8",),
    ("precision=fp32",),
    ("tensor_model_parallel_size=4",),
    ("pipeline_model_parallel_size=2",),
    ("pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=13"),
    ("expert_model_parallel_size=8", "num_nodes=8"),
    ("context_parallel_size=2",),
    ("num_nodes=nan",),
    ("global_batch_size=7",),
    ("mtp.num_layers=3",),
    ("mtp.num_layers=0",),
    ("seq_length=1",),
    ("vocab_size=50001",),
    ("features.mamba=author",),
    ("sparse_attention=false",),
    ("sparse_attention=false", "latent_attention=false"),
    ("features.experts=false",),
    ("structure=core",),
    ("ngram_hash=false",),
    ("a_ranks=[]",),
    ("pattern=GEDM", "a_ranks=[]"),
    ("pattern=R", "features.sparse_attention=false"),
    ("pattern=A||R",),
    ("pattern=A|EMRAEMR", "depth=8", "pipeline_model_parallel_size=2", "a_ranks=0"),
    ("name=<b>\N{PARTY POPPER}&",),
    ("depth=99999999999999999999",),
)
OPTIONS = {
    "plan": (("--gpu", "b200"), ("--recompute", "full"), ("--tokens-per-second", "1e308"), ()),
    "fit": (("--count", "7"), ("--count", "16", "--as", "megatron"), ("--reserve", "1e9"), ()),
    "balance": (("--pp", "3"), ("--pp", "2", "--vpp", "3"), ("--pp", "99")),
    "strip": (("--release", "0.19.0"), ()),
    "report": (("--against", "nam52 <b>"), ("--against", "nam56r name=<b>"), ()),
}
FIGURES = (
    "parameters",
    "active_parameters",
    "forward_flops_per_token",
    "training_flops_per_token",
)
FORM = {"strip": "svg", "report": "html"}


def mixture(seed: int) -> list[str]:
    chosen = random.Random(seed)
    command = chosen.choice(list(OPTIONS))
    words = [command, chosen.choice(RECIPE_NAMES)]
    for change in chosen.sample(CHANGES, chosen.randint(0, 3)):
        words += change
    out = ("--out", "-") if command == "report" else ("--format", FORM.get(command, "json"))
    return [*words, *chosen.choice(OPTIONS[command]), *out]


@pytest.mark.parametrize("seed", range(80))
def test_a_mixture_is_answered_or_refused(megacpp, seed):
    words = mixture(seed)
    result = megacpp(*words)
    if result.code:
        assert result.code in (2, 3)
        assert result.out == ""
        assert all(part in result.err for part in ("given:", "allowed:", "try:"))
    elif words[0] == "strip":
        ElementTree.fromstring(result.out)
    elif words[0] == "report":
        assert "<b>\N{PARTY POPPER}" not in result.out
    else:
        data = json.loads(result.out, parse_constant=pytest.fail)
        if words[0] == "plan":
            check_sums(data)


def check_sums(plan: dict) -> None:
    for key in FIGURES:
        whole = plan["model"][key]
        for parts in (plan["families"].values(), plan["pieces"]):
            assert sum(part[key] for part in parts) == pytest.approx(whole, rel=1e-12)
    assert sum(plan["pipeline"]["stage_loads_flops_per_token"]) == pytest.approx(
        plan["model"]["training_flops_per_token"]
    )
    seconds = plan["prediction"]["seconds"]
    total = seconds.pop("total")
    assert sum(seconds.values()) == pytest.approx(total)


def test_both_outcomes_occur_with_every_command(megacpp):
    found = {(words[0], megacpp(*words).code == 0) for words in map(mixture, range(80))}
    assert found == {(command, fine) for command in OPTIONS for fine in (True, False)}

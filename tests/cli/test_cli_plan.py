"""`megacpp plan`, `balance` and `fit`: figures for people and for programs, and wrong words."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megacpp_nemo.contract import recipe
from megacpp_nemo.planner.balance import balance
from megacpp_nemo.planner.plan import plan


def test_a_plan_says_what_a_recipe_costs(megacpp):
    out = megacpp("plan", "nam56r", "pipeline_model_parallel_size=2").out
    found = plan(recipe("nam56r", changes={"pipeline_model_parallel_size": 2}))
    for part in (
        f"{found.whole.count.total / 1e9:.2f} B parameters",
        f"{found.whole.training_flops / 1e9:.1f} GFLOP per token in training",
        "Fits: a rank of the fullest stage, 1, holds",
        "E experts",
        "Memory of a rank, by pipeline stage",
        "the bubble is 11.1% of a step",
        "Predicted step (not measured)",
    ):
        assert part in out
    assert "MFU" not in out


def test_a_plan_as_json_is_the_plan(megacpp):
    words = ("plan", "nam52", "--gpu", "h100", "--recompute", "full", "--format", "json")
    data = json.loads(megacpp(*words).out)
    own = plan(recipe("nam52"), gpu="h100", recompute="full").to_dict()
    assert data == {**json.loads(json.dumps(own)), "release": None}
    words = ("plan", "nam52", "recompute=full", "--gpu", "h100", "--format", "json")
    assert json.loads(megacpp(*words).out) == data


def test_a_plan_in_markdown_has_tables(megacpp):
    out = megacpp("plan", "nam56r", "--format", "md").out
    assert out.startswith("# nam56r on 8 x NVIDIA H200")
    assert "| family | pieces | parameters |" in out


def test_a_layout_that_does_not_fit_says_by_how_many_gib(megacpp):
    words = ("plan", "nam56r", "--mode", "author_dp", "micro_batch_size=8", "--gpu", "h100")
    out = megacpp(*words).out
    found = plan(recipe("nam56r", mode="author_dp", changes={"micro_batch_size": 8}), gpu="h100")
    assert "DOES NOT FIT" in out
    assert f"{found.missing_bytes / 2**30:.0f} GiB are missing" in out


def test_a_measured_rate_gives_mfu_and_its_formula(megacpp):
    rate = megacpp("plan", "nam56r", "--tokens-per-second", "74898.29").out
    step = megacpp("plan", "nam56r", "--step-seconds", "3.5").out
    formula = re.compile(r"MFU = tokens/s x training FLOPs per token.*= (\d+\.\d%)", re.DOTALL)
    assert formula.search(rate)[1] == formula.search(step)[1] == "12.9%"


def test_a_plan_lists_layers_and_what_a_release_owns(megacpp):
    out = megacpp("plan", "nam56r", "--layers", "--release", "0.19.0").out
    assert re.search(r"^layer 12 +R +1 +", out, re.MULTILINE)
    assert "On Megatron-LM 0.19.0" in out
    assert "48 of 52 layers are Megatron's own" in out


@pytest.mark.parametrize("words", [(), ("structure=all",), ("ngram_hash=false",)])
def test_a_released_model_plans(megacpp, words):
    assert megacpp("plan", "nam56r_4096", *words).code == 0


def test_balance_proposes_a_pattern_and_the_command_that_takes_it(megacpp):
    found = balance(recipe("nam56r", changes={"mtp.num_layers": 0}), 2, 2)
    out = megacpp("balance", "nam56r", "mtp.num_layers=0", "--pp", "2", "--vpp", "2").out
    assert found.pattern in out
    assert f"{found.factor:.2f} times as much" in " ".join(out.split())
    command = out.partition("Take it\n")[2].strip()
    taken = megacpp(*shlex.split(command)[1:], "--format", "json")
    assert taken.code == 0, taken.err
    data = json.loads(taken.out)
    assert data["pattern"] == found.pattern
    assert data["sizes"]["vpp"] == 2
    assert max(data["pipeline"]["stage_loads_flops_per_token"]) == pytest.approx(
        max(found.stage_loads)
    )


def test_balance_as_json(megacpp):
    data = json.loads(megacpp("balance", "nam56r", "--pp", "4", "--format", "json").out)
    assert data["recipe"] == "nam56r"
    assert data["factor"] == balance(recipe("nam56r"), 4).factor


def test_fit_lists_the_best_and_groups_the_rest(megacpp, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    out = megacpp("fit", "nam56r", "--gpu", "h100", "--count", "8").out
    assert re.search(r"[\d,]+ of [\d,]+ layouts fit: a rank holds at most 73.1 GiB", out)
    assert "Best predicted first (not measured)" in out
    assert "context parallelism" in out
    assert len(out.splitlines()) < 60
    command = out.partition("Plan the first\n")[2].partition("\n")[0].strip()
    taken = megacpp(*shlex.split(command)[1:], "--format", "json")
    assert json.loads(taken.out)["fits"] is True
    assert "--recompute" not in command


def test_the_recomputation_of_the_best_is_a_field_of_its_command(megacpp, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    words = ("fit", "nam56r", "--gpu", "h100", "--recompute", "full")
    command = megacpp(*words).out.partition("Plan the first\n")[2].partition("\n")[0].strip()
    assert " recompute=full " in command
    taken = megacpp(*shlex.split(command)[1:], "--format", "json")
    assert json.loads(taken.out)["recompute"] == "full"


def test_fit_lists_all_of_it(megacpp):
    words = ("fit", "nam56r_tiny", "global_batch_size=16", "--count", "4", "--all")
    every = json.loads(megacpp(*words, "--format", "json").out)
    text = megacpp(*words).out
    listed = text.partition("Each that is out")[2]
    assert len(re.findall(r"^[A-Zo]\w", listed, re.MULTILINE)) == len(every["out_each"])
    assert every["fits"][0]["predicted_tokens_per_second"] > 0


def test_fit_where_nothing_does(megacpp, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    out = megacpp("fit", "nam56r", "--count", "1", "--gpu", "a100", "--reserve", "70").out
    assert "0 of" in out
    assert "More memory than 9.2 GiB" in out
    assert "Plan the first" not in out


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        ("plan", 2, "megacpp plan nam56r"),
        ("plan nam56r --gpu h20O", 3, "--gpu h200"),
        ("plan nam56r --recompute fll", 3, "--recompute full"),
        ("plan nam56r --tokens-per-second fast", 2, "--tokens-per-second 74000"),
        ("plan nam56r --tokens-per-second 5 --step-seconds 1", 2, "alone"),
        ("plan nam56r --tokens-per-second 1e308", 3, "that was measured"),
        ("plan nam56r --step-seconds 1e-320", 3, "--tokens-per-second 74000"),
        ("plan nam56r --efficiency 40", 2, "--efficiency 0.3"),
        ("plan nam56r --release 0.1", 3, "0.1"),
        ("plan nam56r precision=fp8 --gpu a100", 3, "precision='bf16'"),
        ("plan nam56r pipeline_model_parallel_size=64", 3, "num_nodes"),
        ("balance", 2, "megacpp balance --help"),
        ("balance --pp 2", 2, "megacpp balance nam56r --pp 2"),
        ("balance nam56r --pp 53", 3, "--pp 52"),
        ("balance nam56r --pp 1 --vpp 2", 3, "--pp 2"),
        ("balance nam56r --pp 10 --vpp 6", 3, "--vpp 5"),
        ("balance nam56r --pp 0", 2, "--pp 8"),
        ("fit", 2, "megacpp fit nam56r"),
        ("fit nam56r --count 12", 3, "--count 16"),
        ("fit nam56r --count 0", 2, "--count 8"),
        ("fit nam56r --count 10000000", 3, "--count 65536"),
        ("fit nam56r --gpu b20", 3, "--gpu b200"),
        ("fit nam56r --reserve 500", 3, "--reserve 6"),
        ("fit nam56r --reserve -1", 2, "--reserve"),
        ("fit nam56r --format yaml", 2, "--format"),
    ],
)
def test_wrong_words_are_refused_with_a_way_out(megacpp, words, code, hint):
    result = megacpp(*words.split())
    assert (result.code, result.out) == (code, "")
    assert "Traceback" not in result.err
    assert all(part in result.err for part in ("given:", "allowed:", "try:"))
    assert hint in result.err.partition("try:")[2]


@pytest.mark.parametrize(
    ("words", "peak"),
    [
        (("nam56r",), "(989.4 TFLOP/s in bf16)"),
        (("nam56r_tiny",), "(66.9 TFLOP/s in fp32)"),
        (("nam56r", "precision=fp8"), "(989.4 TFLOP/s in bf16, 1,978.9 in FP8 for experts)"),
    ],
)
def test_a_prediction_names_the_peak_that_it_takes(megacpp, words, peak):
    assert peak in " ".join(megacpp("plan", *words).out.split())


@pytest.mark.parametrize("width", [40, 60, 80, 100])
@pytest.mark.parametrize("command", ["plan", "fit", "balance --pp 2"])
def test_tables_fit_the_screen_and_cut_no_short_word(megacpp, monkeypatch, command, width):
    name, *options = command.split()

    def drawn(columns: int) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        return megacpp(name, "nam56r", *options).out

    narrow, wide = drawn(width), drawn(400)
    # What is to be copied stays whole.
    lines = [line for line in narrow.splitlines() if not re.match("  megacpp|  [A-Z|]+$", line)]
    assert max(map(len, lines)) <= width
    for word in ("GFLOP", "MFLOP", "GiB", "none", "DP8"):
        assert len(re.findall(rf"\b{word}\b", narrow)) >= len(re.findall(rf"\b{word}\b", wide))


def test_planning_imports_only_the_standard_library():
    script = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from megacpp_nemo.cli import main
for words in (["plan", "nam56r"], ["balance", "nam56r", "--pp", "2"], ["fit", "nam56r_tiny"]):
    assert main(words) == 0
names = {{name.partition(".")[0] for name in sys.modules}}
print("\\n" + json.dumps(sorted(names - sys.stdlib_module_names)))
"""
    said = subprocess.check_output([sys.executable, "-S", "-E", "-c", script], text=True)
    assert json.loads(said.splitlines()[-1]) == ["__main__", "megacpp_nemo"]

"""Releases are data: complete, quick to load, and refused when damaged."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import pytest

from megacpp_nemo.contract import LoweringError, recipe
from megacpp_nemo.lowering.conditions import checked
from megacpp_nemo.lowering.lift import lift
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.lowering.releases import (
    DEFAULT_RELEASE,
    FOLDER,
    LAYERS,
    RELEASE_NAMES,
    load_release,
    read_release,
)

EVERY_RELEASE = pytest.mark.parametrize("name", RELEASE_NAMES)


@EVERY_RELEASE
def test_a_release_knows_what_a_hybrid_launch_needs(name):
    release = load_release(name)
    assert release.name == name
    for flag in (release.pattern_flag, *release.deprecated_pattern_flags, "--spec", "--num-layers"):
        assert flag in release.flags
    assert set(release.symbols) <= set(LAYERS)
    assert len(set(release.symbols.values())) == len(release.symbols)
    assert release.entry_script.endswith(".py")
    assert all(part.isidentifier() for part in ".".join(release.stock_spec).split("."))


@EVERY_RELEASE
def test_every_spelling_leads_to_its_flag(name):
    release = load_release(name)
    for spelling, flag in release.flags.items():
        assert spelling in flag.spellings
        assert release.canonical(spelling) == flag.name
    once = release.canonical_flags()
    assert {s for flag in once.values() for s in flag.spellings} == set(release.flags)


@EVERY_RELEASE
def test_a_release_file_is_written_in_order_with_one_flag_a_line(name):
    lines = (FOLDER / f"{name}.json").read_text().splitlines()
    flags = [line.split('"')[1] for line in lines if line.startswith('  "--') and '": {' in line]
    assert flags == sorted(load_release(name).canonical_flags())


@EVERY_RELEASE
def test_every_rule_says_why_with_a_file(name):
    assert all(".py" in rule.why or "core/" in rule.why for rule in load_release(name).dead)


@pytest.mark.parametrize(
    ("name", "symbols", "script", "separators"),
    [
        ("0.15.3", "M*-", "pretrain_mamba.py", (None, None)),
        ("0.16.1", "M*-E", "pretrain_mamba.py", (None, None)),
        ("0.17.1", "M*-EG", "pretrain_mamba.py", ("|", "/")),
        ("0.18.2", "M*-EGD", "pretrain_hybrid.py", ("|", "/")),
        ("0.19.0", "M*-EGD+", "pretrain_hybrid.py", ("|", "/")),
        ("main-2026-08", "M*-EGD+", "pretrain_hybrid.py", ("|", "/")),
    ],
)
def test_the_releases_differ_as_their_sources_do(name, symbols, script, separators):
    release = load_release(name)
    assert set(release.symbols.values()) == set(symbols)
    assert release.entry_script == script
    assert (release.stage_separator, release.mtp_separator) == separators


@EVERY_RELEASE
@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        ("--persistent-save-interval", "--save-interval"),
        ("--no-rope-fusion", "--no-rope-fusion"),
        ("--disable-bias-linear", "--disable-bias-linear"),
    ],
)
def test_a_flag_has_one_canonical_spelling(name, spelling, canonical):
    release = load_release(name)
    assert release.flags.get(spelling, release.flags[canonical]).name == canonical


def test_only_our_spec_package_is_not_for_the_oldest_release():
    assert [load_release(name).carries_spec for name in RELEASE_NAMES] == [False] + [True] * 5


@pytest.mark.parametrize("spelled", ["0.16.1", "v0.16.1", "core_v0.16.1", "core_v0.16.1/"])
def test_a_release_is_loaded_by_any_form_of_its_name(spelled):
    assert load_release(spelled) is load_release(DEFAULT_RELEASE)


def test_a_release_is_loaded_by_the_path_of_its_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes((FOLDER / "0.17.1.json").read_bytes())
    assert load_release(str(path)) == load_release("0.17.1")


@pytest.mark.parametrize(("name", "suggested"), [("0.16", "0.16.1"), ("main", "main-2026-08")])
def test_an_unknown_name_gets_the_nearest_one(name, suggested):
    with pytest.raises(LoweringError) as error:
        load_release(name)
    assert error.value.hint == repr(suggested)
    assert "0.15.3" in str(error.value)


WHOLE = (FOLDER / "0.15.3.json").read_text()


def edited(**changes: object) -> str:
    return json.dumps({**json.loads(WHOLE), **changes})


LR = {"--lr": {"action": "store", "type": "float"}}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (WHOLE[: len(WHOLE) // 2], "is not whole JSON"),
        ("", "is not whole JSON"),
        ("[]", "schema None"),
        (edited(schema=2), "schema 2"),
        (edited(flags=[]), "is damaged"),
        (edited(commit=5), "commit is 5"),
        ("[" * 100_000, "is not whole JSON"),
        (edited(package_version="x.y"), "package_version is 'x.y'"),
        (edited(package_version="1"), "package_version is '1'"),
        (edited(stage_separator=5), "stage_separator is 5"),
        (edited(mtp_separator="//"), "mtp_separator is '//'"),
        (edited(symbols={"MAMBA": "MM"}), "MAMBA is 'MM'"),
        (edited(stock_spec=[1, 2]), "stock_spec is [1, 2]"),
        (edited(notes="none"), "notes is 'none'"),
        (edited(replaced={"--lr": 3}), "--lr is 3"),
        (edited(flags={"--lr": {"nargs": "x"}}, dead=[]), "--lr takes 'x' values"),
        (edited(flags={"--lr": {"aliases": [3]}}, dead=[]), "--lr is"),
        (edited(symbols={"WHALE": "W"}), "unknown layers"),
        (edited(dead=[{"flags": ["--nope"], "needs": {"never": True}, "why": ""}]), "--nope"),
        (edited(dead=[{"flags": ["--lr"], "needs": {"odd": 1}, "why": ""}]), "not a condition"),
        (edited(dead=[{"flags": ["--lr"], "why": ""}]), "lacks 'needs'"),
        (edited(flags={**LR, "--x": {"aliases": ["--lr"]}}, dead=[]), "two flags are spelled --lr"),
        (json.dumps({"schema": 1}), "lacks 'flags'"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, text, what):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(LoweringError) as error:
        load_release(path)
    assert str(path) in str(error.value)
    assert what in str(error.value)


@pytest.mark.parametrize("key", [key for key in json.loads(WHOLE) if key != "schema"])
@pytest.mark.parametrize("value", [None, 5, "x.y", "", [], [5], {}, {"x": 5}, [[]], True])
def test_a_wrong_value_of_any_key_is_refused_or_lowered_to(tmp_path, key, value):
    path = tmp_path / "mine.json"
    path.write_text(edited(**{key: value}))
    plain = {"latent_attention": False, "sparse_attention": False, "ngram_hash": False}
    with contextlib.suppress(LoweringError):
        lower(recipe("nam52", changes=plain), release=str(path))
        lift(["--lr", "1"], str(path))


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(LoweringError, match=r"gone\.json: No such file"):
        load_release(tmp_path / "gone.json")


@pytest.mark.parametrize(
    "condition",
    [
        *({}, [], {"any": [{}]}, {"all": ["--lr"]}, {"flag": "--lr", "below": 1}, {"flag": "--no"}),
        *({"not": {"flag": "--no"}}, {"never": True, "flag": "--lr"}, {"indivisible": ["--no"]}),
    ],
)
def test_an_ill_formed_condition_is_refused(condition):
    with pytest.raises(ValueError, match=r"condition"):
        checked(condition, {"--lr"})


def test_loading_a_release_needs_the_standard_library_and_a_few_milliseconds():
    probe = """
import sys, time
from megacpp_nemo.lowering.releases import FOLDER, read_release
seconds = []
for _ in range(3):
    start = time.process_time()
    read_release(FOLDER / "main-2026-08.json")
    seconds.append(time.process_time() - start)
foreign = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names
print(min(seconds), *sorted(foreign - {"__main__", "megacpp_nemo"}))
"""
    root = str(FOLDER.parents[2])
    command = [sys.executable, "-S", "-E", "-c", f"import sys; sys.path[:0] = [{root!r}]\n{probe}"]
    seconds, *foreign = subprocess.check_output(command, text=True).split()
    assert foreign == []
    assert float(seconds) < 0.05


def test_reading_a_file_gives_the_same_release_as_loading_it():
    assert read_release(FOLDER / "0.19.0.json") == load_release("0.19.0")

"""`megacpp lower` and `megacpp seams`: the reports, the exact formats, the strip."""

from __future__ import annotations

import json
import shlex
import subprocess

import pytest

from megacpp_nemo.cli.layer_strip import layer_strip
from megacpp_nemo.cli.screen import Screen
from megacpp_nemo.contract import recipe
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.lowering.policy import LaunchOptions
from megacpp_nemo.lowering.releases import RELEASE_NAMES

STAGED = ("nam56r", "pattern=AEME|AEMR", "depth=8", "a_ranks=1", "pipeline_model_parallel_size=2")


def test_json_is_the_lowering(megacpp):
    result = megacpp("lower", "nam56r", "precision=fp8", "--release", "0.19.0", "--format", "json")
    lowering = lower(recipe("nam56r", changes={"precision": "fp8"}), release="0.19.0")
    assert result.out.endswith("}\n")
    assert json.loads(result.out) == json.loads(json.dumps(lowering.to_dict()))


def test_argv_is_one_argument_a_line_and_nothing_else(megacpp):
    result = megacpp("lower", "nam56r", "run_dir=runs/é x", "--format", "argv")
    expected = lower(recipe("nam56r", changes={"run_dir": "runs/é x"})).command
    assert result == (0, "".join(f"{word}\n" for word in expected), "")


def test_argv_refuses_an_argument_with_a_line_break(megacpp):
    result = megacpp("lower", "nam56r", "run_dir=a\nb", "--format", "argv")
    assert result.code == 2
    assert "--format shell" in result.err


def test_launch_options_reach_the_command(megacpp):
    words = "--cuda-graphs mamba --cache-dir /c --data-workers 4 --blackwell --env A=b=c".split()  # noqa: SIM905
    result = megacpp("lower", "nam56r", "--format", "json", *words)
    options = LaunchOptions(
        cuda_graphs=("mamba",),
        cache_dir="/c",
        data_workers=4,
        blackwell=True,
        environment={"A": "b=c"},
    )
    assert (
        json.loads(result.out)["policy"] == lower(recipe("nam56r"), launch=options).policy.to_dict()
    )


def test_a_shell_runs_the_script_with_the_same_arguments(megacpp, tmp_path):
    script = megacpp(
        *("lower", "nam56r", "run_dir=it's $HOME", "--env", "A=b c", "--format", "shell")
    ).out
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$A" "$@"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MEGATRON": "/m"}
    said = subprocess.run(
        ["sh", "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    expected = lower(recipe("nam56r", changes={"run_dir": "it's $HOME"}))
    launch = ["--nnodes", "1", "--nproc-per-node", "8", "/m/pretrain_mamba.py"]
    assert said == ["b c", *launch, *expected.command]


def test_a_script_for_several_machines_asks_for_their_meeting_point(megacpp):
    script = megacpp("lower", "nam56r", "num_nodes=2", "--format", "shell").out
    assert "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint" in script
    assert "RENDEZVOUS:?" in script


def test_a_name_of_several_lines_stays_in_its_comment(megacpp):
    script = megacpp("lower", "nam56r", "name=x\ntouch y", "run_dir=r", "--format", "shell").out
    assert script.splitlines()[1].startswith("# x touch y on Megatron-LM")
    assert "\ntouch y" not in script


@pytest.mark.parametrize("color", ["always", "never"])
def test_control_characters_are_shown_in_text(megacpp, color):
    changes = ("name=a\x1b[2Jb\x9bc", "run_dir=d\u202ee\rf\x07")
    for words in (
        ("lower", "nam56r", *changes),
        ("seams", "nam56r", *changes),
        ("diff", "nam56r", "nam56r:name=a\x1b[2Jb", "files.run_dir=d\re"),
        ("audit", "nam56r", *changes, "--from", "0.16.1", "--to", "0.19.0"),
    ):
        out = megacpp(*words, "--color", color).out
        assert out
        assert "\\x1b[2J" in out
        assert not set(out) & set("\r\x07\x9b\u202e")
        assert "\x1b[2J" not in out


def test_text_tells_native_from_custom_without_colour(megacpp):
    result = megacpp("lower", "nam56r", "--color", "never")
    assert "\x1b[" not in result.out
    assert "*EME*EME*EMM" in result.out
    assert "1···2···2··3" in result.out
    assert "52 layers: 35 native, 17 custom." in result.out


def test_text_shows_seams_features_what_is_open_and_the_command(megacpp):
    out = megacpp("lower", "nam56r").out
    for part in ("Seams\n", "Features\n", "Still open\n", "Command\n", "torchrun --nnodes 1"):
        assert part in out
    assert max(map(len, out.partition("Command")[0].splitlines())) <= 100


def test_colour_is_only_paint(megacpp):
    import re

    plain = megacpp("lower", "nam56r", "--color", "never").out
    painted = megacpp("lower", "nam56r", "--color", "always").out
    assert painted != plain
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == plain


def test_the_strip_has_one_cell_a_layer_and_shows_stages():
    changes = {"depth": 8, "a_ranks": (1,), "pipeline_model_parallel_size": 2}
    staged = recipe("nam56r", changes={"pattern": "AEME|AEMR", **changes})
    lowering = lower(staged, release="0.19.0")
    assert layer_strip(lowering, Screen())[:2] == ["  1  +EME|DEMM", "     .... ...1"]


@pytest.mark.parametrize("width", [40, 50, 60, 80])
def test_the_strip_wraps_on_a_narrow_screen(width):
    lowering = lower(recipe("nam56r"))
    lines = layer_strip(lowering, Screen(width=width))
    assert max(map(len, lines)) <= width
    cells = "".join(line[5:] for line in lines[::2])
    assert cells == "".join(layer.symbol for layer in lowering.layers)
    labels = [int(line[:5]) for line in lines[::2]]
    assert all(label % 10 == 1 for label in labels)


def test_a_narrow_terminal_gets_narrow_tables(megacpp, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    out = megacpp("seams", "nam56r").out
    assert max(map(len, out.splitlines())) <= 70


def test_an_all_native_recipe_says_so(megacpp):
    words = ("nam52", "ngram_hash=false", "--release", "0.19.0", "--seams", "native-only")
    out = megacpp("lower", *words).out
    assert "No seams: the release owns it whole." in out


@pytest.mark.parametrize("command", ["lower", "seams"])
@pytest.mark.parametrize("release", RELEASE_NAMES[1:])
def test_markdown_is_ascii_with_whole_tables(megacpp, command, release):
    out = megacpp(command, "nam56r", "mtp.pattern=EA", "--release", release, "--format", "md").out
    assert out.isascii()
    bars = {}
    for line in out.splitlines():
        if line.startswith("|"):
            bars.setdefault(line.startswith("| ---"), set()).add(line.count("|"))
    assert bars[True] <= bars[False]


def test_the_seam_report_is_a_part_of_the_lowering(megacpp):
    whole = json.loads(megacpp("lower", *STAGED, "--release", "0.19.0", "--format", "json").out)
    part = json.loads(megacpp("seams", *STAGED, "--release", "0.19.0", "--format", "json").out)
    assert part.items() <= whole.items()
    assert part["seams"]


def test_the_seam_report_says_why(megacpp):
    out = megacpp("seams", "nam56r").out
    for seam in lower(recipe("nam56r")).seams:
        assert f"{seam.id}: {seam.what}" in out
        assert seam.reason.split(";")[0] in " ".join(out.split())


def test_changes_stand_before_and_after_options(megacpp):
    one = megacpp("lower", "--format", "argv", "nam56r", "--release", "0.19.0", "lr=0.001")
    other = megacpp("lower", "nam56r:lr=0.001", "--release=0.19.0", "--format=argv")
    assert one == other
    assert shlex.split(one.out)[shlex.split(one.out).index("--lr") + 1] == "0.001"

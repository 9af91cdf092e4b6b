"""`megacpp strip`: the layers of a recipe in a terminal, as SVG and as PNG."""

from __future__ import annotations

import re
import sys

import pytest

from megacpp_nemo.cli.given import read_recipe
from megacpp_nemo.cli.screen import Screen
from megacpp_nemo.cli.strip_text import strip_text
from megacpp_nemo.contract import BlockFamily
from megacpp_nemo.report.subject import subject

WHO = "who builds it"


def test_the_strip_shows_letters_owners_and_costs(megacpp):
    result = megacpp("strip", "nam56r")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == "nam56r on Megatron-LM 0.16.1"
    letters, owners, weights, flops = lines[3:7]
    assert letters == "  1  AEMEDEMEDEMRDEMEAEMEDEMRDEMEDEMEAEMRDEMEDEMEDEMRAEME"
    assert owners.split() == ["1···2···2··32···1···2··32···2···1··32···2···2··31···", *WHO.split()]
    assert weights.endswith("weights")
    assert flops.endswith("FLOPs")
    assert weights[5 + 1] == "█"
    assert "3 seam m2rnn: M2RNN, the recurrent matrix-state block" in result.out
    assert "the hashed n-gram memory, in a NeMo run only" in result.out
    assert "D: A layers that DSA takes, A-ranks 1-3, 5-7, 9-11" in result.out


@pytest.mark.parametrize("width", [40, 50, 80, 200])
def test_it_is_drawn_in_ascii_and_fits_the_screen(width):
    recipe = read_recipe("nam56r", ["pipeline_model_parallel_size=4"])
    text = strip_text(subject("nam56r", recipe, "0.19.0").picture, Screen(width=width))
    lines = text.splitlines()
    assert text.isascii()
    assert max(map(len, lines)) <= width
    main = text.partition("\nMulti-token")[0]
    drawn = "".join(re.findall(r"^ +\d+  ([AEMDR|]+)$", main, re.MULTILINE))
    assert drawn.count("|") == 3
    assert drawn.replace("|", "").replace("D", "A") == str(recipe.layers)


def test_a_refused_recipe_has_a_strip_that_says_why(megacpp):
    result = megacpp("strip", "nam56r", "--release", "0.15.3")
    assert result.code == 0, result.err
    assert "Megatron 0.15.3 has no layer for multi-latent attention" in result.out.replace(
        "\n", " "
    )
    assert "who builds it" not in result.out


def test_the_ending_of_the_file_says_the_format(megacpp, tmp_path):
    for name, start in (("a.svg", b"<svg "), ("a.PNG", b"\x89PNG"), ("a.txt", b"nam56r")):
        result = megacpp("strip", "nam56r", "--out", str(tmp_path / name))
        assert result.code == 0, result.err
        assert (tmp_path / name).read_bytes().startswith(start)
    megacpp("strip", "nam56r", "--format", "text", "--out", str(tmp_path / "b.svg"))
    assert (tmp_path / "b.svg").read_text().startswith("nam56r")


def test_a_png_goes_through_a_pipe_as_it_is_and_not_to_a_terminal(
    megacpp, tmp_path, monkeypatch, capfdbinary
):
    from megacpp_nemo.cli import main

    megacpp("strip", "nam52_tiny", "--out", str(tmp_path / "a.png"))
    assert main(["strip", "nam52_tiny", "--format", "png"]) == 0
    assert capfdbinary.readouterr().out == (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr("megacpp_nemo.cli.strip.on_terminal", lambda out: out is None)
    refused = megacpp("strip", "nam52_tiny", "--format", "png")
    assert (refused.code, refused.out) == (2, "")
    assert "--out strip.png" in refused.err


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        ((), 2, "megacpp strip nam56r"),
        (("nam57r",), 3, "nam56r"),
        (("nam56r", "--format", "pdf"), 2, "--format"),
        (("nam56r", "--release", "0.99"), 3, "0.19.0"),
        (("nam56r", "--out", "/nowhere/a.svg"), 3, "--out FILE"),
        (("nam56r", "--out", "a.pdf"), 2, "--out a.svg"),
    ],
)
def test_bad_input_says_what_to_try(megacpp, words, code, hint):
    result = megacpp("strip", *words)
    assert (result.code, result.out) == (code, "")
    assert hint in result.err.partition("try:")[2]


def test_a_missing_drawing_package_is_named(megacpp, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    result = megacpp("strip", "nam52_tiny", "--out", str(tmp_path / "a.png"))
    assert result.code == 3
    assert "pip install resvg-py, or --format svg" in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", BlockFamily, ids=lambda family: family.name)
def test_every_family_can_be_drawn(megacpp, family):
    result = megacpp(
        "strip",
        "nam56r",
        f"pattern=E{family.letter}",
        "depth=2",
        "a_ranks=[]",
        "--release",
        "0.19.0",
    )
    assert result.code == 0, result.err
    assert f"E{family.letter}" in result.out

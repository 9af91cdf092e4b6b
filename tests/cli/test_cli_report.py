"""`megacpp report`: where the page goes, what is told of it, and what is refused."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_page_is_called_after_the_recipe_and_the_figures_are_told(megacpp, tmp_path):
    result = megacpp("report", "nam56r")
    assert (result.code, result.err) == (0, "Wrote nam56r.html\n")
    lines = result.out.splitlines()
    assert lines[0] == "nam56r on Megatron-LM 0.16.1"
    assert lines[1].split() == ["Layers", "52,", "35", "native,", "17", "custom"]
    page = (tmp_path / "nam56r.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.endswith("</html>\n")


def test_changes_and_a_comparison_are_in_the_page(megacpp, tmp_path):
    words = ("nam56r", "pipeline_model_parallel_size=2", "--release", "0.19.0")
    result = megacpp("report", *words, "--against", "nam52 lr=1e-3", "--out", "a.html")
    assert result.code == 0, result.err
    page = (tmp_path / "a.html").read_text()
    assert "<h1>nam56r pipeline_model_parallel_size=2</h1>" in page
    assert "there is nam52 lr=1e-3" in page


def test_the_mode_and_the_gpu_are_those_asked_for(megacpp, tmp_path):
    result = megacpp("report", "nam56r", "--mode", "author_dp", "--gpu", "H100", "--out", "a.html")
    assert result.code == 0, result.err
    page = (tmp_path / "a.html").read_text()
    assert "Mamba-3" in page
    assert "NVIDIA H100 SXM 80 GB" in page


def test_a_dash_prints_the_page_and_writes_nothing(megacpp, tmp_path):
    result = megacpp("report", "nam52_tiny", "--out", "-")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("<!doctype html>")
    assert not list(tmp_path.iterdir())


def test_a_refused_recipe_has_a_page_and_the_reason_is_told(megacpp, tmp_path):
    result = megacpp("report", "nam56r", "--release", "0.15.3")
    assert result.code == 0, result.err
    assert "Refused: Megatron 0.15.3 has no layer for" in result.out
    assert "does not get this recipe" in (tmp_path / "nam56r.html").read_text()


def test_a_name_that_no_file_has_still_gives_one(megacpp, tmp_path):
    result = megacpp("report", "nam52_tiny", "name=../a b")
    assert result.code == 0, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["_a_b.html"]


def test_open_shows_the_file_in_a_browser(megacpp, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
    result = megacpp("report", "nam52_tiny", "--open")
    assert result.code == 0, result.err
    assert opened == [(tmp_path / "nam52_tiny.html").as_uri()]


@pytest.mark.parametrize("how", ["false", "error"])
def test_open_without_a_browser_keeps_the_page_and_says_where_it_is(
    megacpp, tmp_path, monkeypatch, how
):
    def show(url):
        if how == "error":
            raise webbrowser.Error("no browser")
        return False

    monkeypatch.setattr(webbrowser, "open", show)
    result = megacpp("report", "nam52_tiny", "--open")
    assert (result.code, result.out) == (3, "")
    assert "no browser opens here" in result.err
    assert str(tmp_path / "nam52_tiny.html") in result.err
    assert Path("nam52_tiny.html").is_file()


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        ((), 2, ("report needs a recipe", "megacpp report nam56r")),
        (("nam57r",), 3, ("No recipe is called 'nam57r'", "try:     nam56r")),
        (("nam56r", "depht=3"), 3, ("depth",)),
        (("nam56r", "--against", ""), 2, ("--against takes a recipe", "--against ''")),
        (("nam56r", "--against", "'nam56r"), 2, ("--against takes a recipe",)),
        (("nam56r", "--against", "nam51"), 3, ("No recipe is called 'nam51'", "nam52")),
        (("nam56r", "--against", "nam52 x"), 2, ("A change to a recipe is field=value",)),
        (("nam56r", "--against"), 2, ("--against needs a value",)),
        (("nam56r", "--gpu", "h20"), 3, ("No GPU is called 'h20'", "--gpu h200")),
        (("nam56r", "--release", "0.99"), 3, ("No Megatron-LM release",)),
        (("nam56r", "--format", "pdf"), 2, ("html",)),
        (("nam56r", "--out", "none/a.html"), 3, ("cannot be written", "no such file")),
        (("nam56r", "--out", "."), 3, ("is a folder",)),
        (("nam56r", "--open", "--out", "-"), 2, ("--open needs a file", "--out FILE")),
    ],
)
def test_bad_input_has_four_parts_and_leaves_no_file(megacpp, tmp_path, words, code, parts):
    result = megacpp("report", *words)
    assert (result.code, result.out) == (code, "")
    for part in (*parts, "  given:", "  allowed:", "  try:"):
        assert part in result.err
    assert not list(tmp_path.iterdir())

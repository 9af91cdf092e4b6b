"""A file is written whole or not at all, and standard output may end early."""

from __future__ import annotations

import os
import stat

import pytest

WORDS = ("lower", "nam56r", "--format")


@pytest.mark.parametrize("form", ["json", "md"])
def test_the_ending_of_a_file_says_the_format_where_nothing_else_does(megacpp, tmp_path, form):
    out = tmp_path / f"plan.{form}"
    assert megacpp("plan", "nam56r", "--out", str(out)).code == 0
    assert out.read_text("utf-8") == megacpp("plan", "nam56r", "--format", form).out
    assert megacpp("plan", "nam56r", "--out", str(out), "--format", "text").code == 0
    assert out.read_text("utf-8").startswith("nam56r on 8")


def test_a_file_holds_what_standard_output_would(megacpp, tmp_path):
    out = tmp_path / "lowering.json"
    expected = megacpp(*WORDS, "json").out
    assert megacpp(*WORDS, "json", "--out", str(out)) == (0, "", f"Wrote {out}\n")
    assert out.read_text() == expected
    assert os.listdir(tmp_path) == [out.name]


def test_a_script_may_be_run_and_other_files_not(megacpp, tmp_path):
    for name in ("shell", "argv"):
        megacpp(*WORDS, name, "--out", str(tmp_path / name))
    assert (tmp_path / "shell").stat().st_mode & stat.S_IXUSR
    assert not (tmp_path / "argv").stat().st_mode & stat.S_IXUSR


def test_an_existing_file_is_replaced_and_a_link_kept(megacpp, tmp_path):
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to("old")
    assert megacpp(*WORDS, "argv", "--out", str(tmp_path / "link")).code == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "old").read_text().startswith("--hybrid-override-pattern\n")


@pytest.mark.parametrize(
    ("name", "why", "hint"),
    [
        ("", "is a folder", "/NAME"),
        ("none/file", "no such file or directory", "--out FILE"),
        ("pipe", "is not an ordinary file", "no --out"),
        ("file/below", "not a directory", "--out FILE"),
        ("none/", "names a folder, and there is none", "/none"),
        ("file/", "names a folder, and there is none", "/file"),
    ],
)
def test_what_is_no_place_for_a_file_is_refused(megacpp, tmp_path, name, why, hint):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("kept")
    result = megacpp(*WORDS, "json", "--out", f"{tmp_path}/{name}")
    assert (result.code, result.out) == (3, "")
    assert why in result.err
    assert hint in result.err
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_dash_stands_for_standard_output(megacpp, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert megacpp(*WORDS, "json", "--out", "-") == megacpp(*WORDS, "json")
    assert os.listdir(tmp_path) == []


def test_a_refused_recipe_leaves_the_file_as_it_was(megacpp, tmp_path):
    out = tmp_path / "kept"
    out.write_text("kept")
    assert megacpp("lower", "nam56r", "depth=x", "--out", str(out)).code == 3
    assert out.read_text() == "kept"


def test_a_write_that_fails_leaves_nothing_behind(megacpp, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    result = megacpp(*WORDS, "json", "--out", str(tmp_path / "out"))
    assert result.code == 3
    assert "no space left on device" in result.err
    assert os.listdir(tmp_path) == []


def test_text_in_a_file_is_plain_unless_colour_is_asked_for(megacpp, tmp_path):
    out = tmp_path / "report"
    megacpp("lower", "nam56r", "--out", str(out))
    assert "\x1b[" not in out.read_text()
    megacpp("lower", "nam56r", "--out", str(out), "--color", "always")
    assert "\x1b[" in out.read_text()

"""`megacpp runs` and `megacpp show`."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megacpp_nemo.cli.sparks import spark
from tests.runs.writing import SECONDS, steps, write_card, write_events, write_run

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write_run(tmp_path / "runs" / "whole")
    write_run(tmp_path / "runs" / "half", last=5)
    return tmp_path / "runs"


def test_runs_are_listed_with_their_figures(megacpp, runs):
    result = megacpp("runs", str(runs))
    assert result.code == 0
    half, whole = (line.split() for line in result.out.splitlines()[2:4])
    assert half[:7] == ["half", "nam56r_tiny", "5", "of", "10", "7.3750", "6.5000"]
    assert whole[:8] == ["whole", "nam56r_tiny", "10", "of", "10", "6.7500", "6.5000", "64"]
    assert (half[-1], whole[-1]) == ("stopped", "finished")


def test_the_folder_is_runs_by_default(megacpp, runs, monkeypatch):
    monkeypatch.chdir(runs.parent)
    assert megacpp("runs").out == megacpp("runs", "runs").out


def test_runs_as_json_have_stable_keys(megacpp, runs):
    found = json.loads(megacpp("runs", str(runs), "--format", "json").out)
    assert found["schema"] == 1
    run = found["runs"][1]
    assert (run["name"], run["end"], run["step"], run["loss"]) == ("whole", "finished", 10, 6.75)
    assert run["tokens_per_second"] == 64.0
    assert set(run) == {
        "path",
        "name",
        "recipe",
        "end",
        "step",
        "max_steps",
        "loss",
        "validation_loss",
        "learning_rate",
        "tokens_per_second",
        "written",
        "checkpoint",
        "notes",
    }


def test_a_run_is_drawn_into_its_folder(megacpp, runs):
    run = runs / "whole"
    result = megacpp("show", str(run))
    assert result.code == 0, result.err
    assert "nam56r_tiny, step 10 of 10, finished, written" in result.out
    assert re.search(r"Loss: training +█.*▁ +7.875 +6.75$", result.out, re.MULTILINE)
    picture = (run / "curves.png").read_bytes()
    assert picture.startswith(PNG)
    width, height = struct.unpack(">II", picture[16:24])
    assert (width, height) > (1200, 900)
    assert f"Wrote {run / 'curves.html'} and {run / 'curves.png'}" in result.out


def test_a_name_beyond_the_font_is_drawn_without_a_word(megacpp, tmp_path):
    write_run(tmp_path / "\N{CJK UNIFIED IDEOGRAPH-4E2D}")
    result = megacpp("show", str(tmp_path / "\N{CJK UNIFIED IDEOGRAPH-4E2D}"))
    assert (result.code, result.err) == (0, "")


def test_the_page_needs_nothing_else_and_suits_dark_and_narrow_screens(megacpp, runs, tmp_path):
    out = tmp_path / "page.html"
    assert megacpp("show", str(runs / "whole"), "--out", str(out)).code == 0
    assert [path.name for path in runs.glob("*/curves.*")] == []
    page = out.read_text()
    for word in ("http://", "https://", "<script", "src=", "@import"):
        assert word not in page.replace("http://www.w3.org/", "")
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    titles = ["Loss", "Learning rate", "Throughput", "Expert load"]
    assert re.findall(r"<h2>(.*?)</h2>", page) == titles
    assert page.count("<svg ") == len(titles)
    # Every colour is a variable of the page, every axis has its words.
    drawings = page.partition('<div class="panels">')[2]
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawings)) == set()
    for words in ("nats per token", "tokens per second", "optimizer step"):
        assert words in drawings
    ids = re.findall(r'<(?:clipPath|path|g|defs) id="([^"]+)"', drawings)
    assert len({i for i in ids if i.startswith(("p", "m"))}) >= len(titles)


def test_the_page_is_the_same_whenever_it_is_drawn(megacpp, runs, tmp_path):
    for name in ("a.html", "b.html"):
        megacpp("show", str(runs / "whole"), "--out", str(tmp_path / name))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_picture_alone(megacpp, runs, tmp_path):
    out = tmp_path / "run.png"
    assert megacpp("show", str(runs / "half"), "--out", str(out)).code == 0
    assert out.read_bytes().startswith(PNG)


def test_the_numbers_alone(megacpp, runs):
    data = json.loads(megacpp("show", str(runs / "whole"), "--format", "json").out)
    assert data["run"]["step"] == 10
    loss = data["panels"]["loss"]
    assert loss["unit"] == "nats per token"
    assert loss["curves"]["training"][:2] == [
        {"step": 1, "value": 7.875},
        {"step": 2, "value": 7.75},
    ]
    assert not list(runs.glob("*/curves.*"))


def test_a_diverged_run_is_drawn_and_its_numbers_are_json(megacpp, tmp_path):
    write_card(tmp_path)
    values = [*steps(1, 4), ("reduced_train_loss", 4, math.nan)]
    write_events(tmp_path / "tensorboard", values, began=1.0)
    result = megacpp("show", str(tmp_path), "--format", "json")
    curve = json.loads(result.out)["panels"]["loss"]["curves"]["training"]
    assert curve[-1] == {"step": 5, "value": None}
    assert "?" in megacpp("show", str(tmp_path)).out
    assert megacpp("runs", str(tmp_path)).code == 0


def test_a_resumed_and_killed_run_says_so(megacpp, tmp_path):
    write_card(tmp_path, max_steps=20, start_step=4)
    write_events(tmp_path / "tensorboard", steps(1, 6), began=1.0, name="a")
    last = write_events(tmp_path / "tensorboard", steps(5, 9), began=100.0, name="b")
    last.write_bytes(last.read_bytes()[:-5])
    out = megacpp("show", str(tmp_path)).out
    assert "Resumed at step 4." in out
    assert "cut short" in out
    page = (tmp_path / "curves.html").read_text()
    assert "Dashed: the run was resumed." in page


def test_a_run_before_its_first_checkpoint_has_a_rate_by_its_card(megacpp, tmp_path):
    write_run(tmp_path, last=3, started=time.time())
    found = json.loads(megacpp("runs", str(tmp_path), "--format", "json").out)["runs"][0]
    assert (found["checkpoint"], found["tokens_per_second"]) == (None, 4 * 32 / SECONDS)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("show",), 2, "show takes one run"),
        (("show", "a", "b"), 2, "show takes one run"),
        (("show", "nowhere"), 3, "There is no such run"),
        (("show", "whole", "--out", "run.pdf"), 2, "drawn as a page or a picture"),
        (("show", "whole", "--out", "nowhere/run.png"), 3, "cannot be written"),
        (("show", "whole", "--format", "json", "--open"), 2, "--open opens a page"),
        (("show", "."), 3, "This folder holds runs"),
        (("runs", "a", "b"), 2, "runs takes one folder"),
        (("runs", "nowhere"), 3, "cannot be read"),
        (("runs", "whole/tensorboard/none"), 3, "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused(megacpp, runs, monkeypatch, words, code, message):
    monkeypatch.chdir(runs)
    result = megacpp(*words)
    assert (result.code, result.out) == (code, "")
    assert message in result.err


def test_a_run_that_logged_nothing_yet_is_refused(megacpp, tmp_path):
    write_events(tmp_path / "tensorboard", [], began=1.0)
    result = megacpp("show", str(tmp_path))
    assert (result.code, "has logged nothing yet" in result.err) == (3, True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_an_error(megacpp, runs):
    (runs / "whole").chmod(0o500)
    result = megacpp("show", str(runs / "whole"))
    (runs / "whole").chmod(0o700)
    assert (result.code, "cannot be written" in result.err) == (3, True)


def test_a_file_in_the_way_of_the_page_is_an_error(megacpp, runs):
    (runs / "whole" / "curves.html").mkdir()
    result = megacpp("show", str(runs / "whole"))
    assert result.code == 3
    assert "curves.html: is a folder" in result.err


def test_a_page_is_opened(megacpp, runs, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: bool(opened.append(url)) or len(opened) < 2)
    assert megacpp("show", str(runs / "whole"), "--open").err == ""
    assert opened == [(runs / "whole" / "curves.html").as_uri()]
    assert "No browser could be started" in megacpp("show", str(runs / "whole"), "--open").err


def test_a_listing_starts_fast_and_imports_nothing_heavy(runs):
    script = f"""
import sys, time
start = time.perf_counter()
from megacpp_nemo.cli import main
assert main(["runs", {str(runs)!r}]) == 0
print([name for name in ("torch", "nemo", "matplotlib", "tensorflow") if name in sys.modules])
print(time.perf_counter() - start)
"""
    own = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    seconds = []
    for _ in range(3):
        said = subprocess.check_output([sys.executable, "-c", script], text=True, env=own)
        *_, heavy, taken = said.splitlines()
        assert heavy == "[]"
        seconds.append(float(taken))
    assert min(seconds) < 2


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([1, 1, 1], 8, "▅▅▅"),
        ([0, 0, 7, 7], 2, "▁█"),
        ([], 8, ""),
        ([math.nan], 8, "?"),
        ([0, math.inf, 7], 8, "▁?█"),
    ],
)
def test_a_spark_is_a_curve(values, width, expected):
    assert spark(values, width) == expected
    assert spark(values, width, unicode=False).isascii()

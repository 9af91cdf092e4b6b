"""`megacpp plasticity`: what a lever touches, and the report of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megacpp_nemo.callbacks.journal import Action, Journal
from megacpp_nemo.cli import main

PNG = b"\x89PNG\r\n\x1a\n"


def run(capsys: Any, *words: str) -> tuple[int, str, str]:
    status = main(["plasticity", *words])
    out, err = capsys.readouterr()
    return status, out, err


def test_every_matrix_is_listed_with_its_verdict(capsys: Any) -> None:
    status, out, _ = run(capsys, "nam56r", "--target", "attention_qk", "--format", "json")
    data = json.loads(out)
    assert (status, data["schema"], data["recipe"]) == (0, 1, "nam56r")
    touched = [item for item in data["matrices"] if item["touched"]]
    # Four of each of 13 attention layers, and of the one of the prediction depth.
    assert len(touched) == 56
    assert all(item["why"] is None for item in touched)
    others = [item for item in data["matrices"] if not item["touched"]]
    assert all(item["why"] for item in others)
    why = {item["name"]: item["why"] for item in others}
    assert why["embedding.ngram_hash.table.weight"] == "an embedding, not a projection"


def test_the_table_says_what_is_touched_and_why_the_rest_is_not(capsys: Any) -> None:
    status, out, _ = run(capsys, "nam56r_tiny", "--target", "experts")
    assert status == 0
    touched, _, alone = out.partition("Left alone")
    assert "mlp.experts.*.linear_fc1.weight" in touched
    assert "not in target experts" in alone
    assert "a router, not a projection" in alone
    assert "TFLOP" in alone


def test_a_recipes_fields_change_what_is_listed(capsys: Any) -> None:
    words = ("nam56r_tiny", "pattern=AM", "depth=2", "mtp.num_layers=0", "--format", "json")
    data = json.loads(run(capsys, *words)[1])
    assert {item["layer"] for item in data["matrices"]} == {None, 1, 2}


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ((), 2, "needs a recipe"),
        (("nam56r", "--target", "atention"), 3, "--target attention"),
        (("nam56r", "--layers", "one"), 2, "by their numbers"),
        (("nam56r_tiny", "--layers", "99"), 3, "not on this model"),
        (("nam56r_tiny", "--families", "Q"), 3, "No block family"),
        (("nam56r_tiny", "--families", "A", "--target", "experts"), 3, "Nothing in this model"),
        (("report",), 2, "takes one run"),
        (("report", "no/such/run"), 3, "no journal of levers here"),
    ],
)
def test_what_cannot_be_is_refused(
    words: tuple[str, ...], status: int, message: str, capsys: Any
) -> None:
    ended, out, err = run(capsys, *words)
    assert (ended, out) == (status, "")
    assert message in err


@pytest.fixture
def journalled(tmp_path: Path) -> Path:
    journal = Journal(tmp_path)
    journal.start(0, {})
    for step in range(1, 9):
        journal.curves(step, {"loss": 5.0 / step, "stp_loss": 1.0})
    matrices = {"decoder.layers.0.<w>": {"dfi_before": 0.9, "dfi_after": 1e-7, "sfe": 3.0}}
    totals = matrices["decoder.layers.0.<w>"]
    journal.action(Action(lever="fire", step=4, matrices=matrices, totals=totals, seconds=0.5))
    units = {"units": 16.0, "dormant": 4.0}
    journal.action(Action(lever="redo", step=6, cause="report", totals=units))
    return tmp_path


def test_a_runs_report_is_a_picture_and_a_page_that_needs_nothing_else(
    journalled: Path, capsys: Any
) -> None:
    status, out, _ = run(capsys, "report", str(journalled))
    assert status == 0
    assert "loss: 5.0000 at step 1, 0.6250 at step 8" in out
    assert (journalled / "plasticity" / "report.png").read_bytes().startswith(PNG)
    page = (journalled / "plasticity" / "report.html").read_text()
    assert "fire at step 4 (step)" in page
    assert "decoder.layers.0.&lt;w&gt;" in page
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page


def test_a_report_goes_to_the_folder_that_is_named(
    journalled: Path, tmp_path: Path, capsys: Any
) -> None:
    status, _, _ = run(capsys, "report", str(journalled), "--folder", str(tmp_path / "new"))
    assert status == 0
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"report.png", "report.html"}


def test_a_journal_that_tells_nothing_is_refused(tmp_path: Path, capsys: Any) -> None:
    Journal(tmp_path).start(0, {})
    status, _, err = run(capsys, "report", str(tmp_path))
    assert (status, "tells of nothing yet" in err) == (3, True)

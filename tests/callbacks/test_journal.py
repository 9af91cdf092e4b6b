"""The journal: what is written is read, what no longer counts is left out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpp_nemo.callbacks.journal import Action, Journal, merged
from megacpp_nemo.callbacks.phases import Ledger, Phase
from megacpp_nemo.contract import DataError, RuntimeRefusal
from megacpp_nemo.contract.journal import FILE_NAME, read_journal
from megacpp_nemo.contract.plasticity import FireLever, Plasticity


def test_what_is_written_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.start(0, {"fire": {"steps": (3,)}})
    journal.curves(1, {"loss": 2.5})
    journal.action(Action(lever="fire", step=3, matrices={"w": {"sfe": 1.0}}, bytes=4))
    journal.action(Action(lever="redo", step=4, cause="report"))
    start, curves, action, report = read_journal(tmp_path)
    assert (start["event"], start["levers"]) == ("start", {"fire": {"steps": [3]}})
    assert curves["values"] == {"loss": 2.5}
    assert (action["event"], action["matrices"], action["bytes"]) == (
        "action", {"w": {"sfe": 1.0}}, 4
    )  # fmt: skip
    assert report["event"] == "report"


def test_a_rank_without_a_folder_writes_nothing(tmp_path: Path) -> None:
    Journal(None).start(0, {})
    assert list(tmp_path.iterdir()) == []


def test_every_line_is_json_even_where_a_value_is_not(tmp_path: Path) -> None:
    Journal(tmp_path).curves(1, {"loss": math.nan, "stp_loss": math.inf})
    (line,) = (tmp_path / FILE_NAME).read_text().splitlines()
    values = json.loads(line, parse_constant=lambda word: pytest.fail(word))["values"]
    assert math.isnan(float(values["loss"]))
    assert math.isinf(float(values["stp_loss"]))


@given(moves=st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=12))
def test_what_was_written_beyond_the_step_of_a_resumption_does_not_count(
    moves: list[tuple[bool, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    journal, step, kept = Journal(folder), 0, []
    journal.start(0, {})
    for trains, count in moves:
        if trains:
            for _ in range(count):
                step += 1
                journal.curves(step, {"loss": float(step)})
                kept.append(step)
        else:
            step = max(0, step - count)
            journal.start(step, {})
            kept = [s for s in kept if s <= step]
    assert [e["step"] for e in read_journal(folder) if e["event"] == "curves"] == kept


def test_a_last_line_cut_short_is_left_out_and_an_earlier_one_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.curves(1, {"loss": 1.0})
    path = tmp_path / FILE_NAME
    path.write_text(path.read_text() + '{"event": "curves", "st')
    assert len(read_journal(tmp_path)) == 1
    path.write_text("not json\n" + path.read_text())
    with pytest.raises(DataError, match="Line 1 of a journal cannot be read"):
        read_journal(path)


def test_a_run_without_a_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no journal of levers here"):
        read_journal(tmp_path)


def test_totals_add_counts_and_average_everything_else() -> None:
    action = Action(
        lever="redo",
        step=1,
        matrices={"a": {"units": 8, "dormant": 2, "mean": 1.0}, "b": {"units": 4, "mean": 2.0}},
        bytes=6,
    )
    whole = merged(action, seconds=0.5)
    assert whole.totals == {"matrices": 2, "units": 12, "dormant": 2, "mean": 1.5}
    assert (whole.seconds, whole.bytes) == (0.5, 6)


def test_other_data_and_longer_rows_are_phase_boundaries() -> None:
    before = Phase(data="a", seq_length=64)
    assert before.boundaries(before) == ()
    assert Phase(data="b", seq_length=64).boundaries(before) == ("data",)
    assert Phase(data="b", seq_length=128).boundaries(before) == ("data", "context")
    assert Phase(data="a", seq_length=32).boundaries(before) == ()


def test_a_ledger_survives_a_checkpoint_and_knows_what_was_done() -> None:
    ledger = Ledger(phase=Phase(data="a", seq_length=64))
    ledger.did("fire", 3)
    again = Ledger.of(json.loads(json.dumps(ledger.state_dict())))
    assert again == ledger
    levers = Plasticity(fire=FireLever(steps=(3, 9)))
    again.refuse_past(levers, 5)
    with pytest.raises(RuntimeRefusal, match=r"(?s)already past.*try: +plasticity.fire.steps=\(10"):
        again.refuse_past(levers, 9)

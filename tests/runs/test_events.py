"""TensorBoard's files as curves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.runs.curves import mean_throughput, panels, throughput
from megacpp_nemo.runs.events import read_history
from tests.runs.writing import BATCH, LENGTH, SECONDS, steps, write_events

LOSS = "reduced_train_loss"


def losses(history) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in history.curves[LOSS]]


def test_values_stand_at_the_steps_done(tmp_path):
    history = read_history([write_events(tmp_path, steps(1, 3), began=100.0)])
    # Lightning numbers from 0, the layers from 1: both mean the same step.
    assert losses(history) == [(1, 7.875), (2, 7.75), (3, 7.625)]
    assert [point.step for point in history.curves["experts/most"]] == [1, 2, 3]
    assert (history.last_step, history.last_time) == (3, 100.0 + 3 * SECONDS)
    assert (history.resumed, history.notes) == ([], [])


def test_a_resumed_run_is_one_curve_without_what_was_lost(tmp_path):
    killed = write_events(tmp_path, steps(1, 8), began=100.0, name="a")
    again = write_events(tmp_path, steps(6, 10, loss=9.0), began=200.0, name="b")
    # However the files are named or listed.
    for files in ((killed, again), (again, killed)):
        history = read_history(files)
        assert [step for step, _ in losses(history)] == list(range(1, 11))
        assert losses(history)[4:6] == [(5, 7.375), (6, 8.25)]
        assert history.resumed == [5]


def test_where_a_process_went_on_is_what_its_card_says_if_it_logs_seldom(tmp_path):
    first = write_events(tmp_path, steps(1, 7), began=100.0, name="a")
    second = write_events(tmp_path, steps(10, 12), began=200.0, name="b")
    history = read_history([first, second], start_step=6)
    assert history.resumed == [6]
    assert [step for step, _ in losses(history)] == [*range(1, 7), *range(10, 13)]


def test_three_processes_and_a_validation_that_was_lost(tmp_path):
    first = write_events(tmp_path, [*steps(1, 4), ("val_loss", 3, 9.0)], began=100.0, name="a")
    second = write_events(tmp_path, steps(3, 6), began=200.0, name="b")
    third = write_events(tmp_path, steps(7, 8), began=300.0, name="c")
    empty = write_events(tmp_path, [], began=250.0, name="d")
    history = read_history([first, second, third, empty])
    assert history.resumed == [2, 6]
    assert "val_loss" not in history.curves


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_a_file_that_a_kill_cut_short_gives_what_is_whole(tmp_path, cut):
    path = write_events(tmp_path, steps(1, 5), began=100.0)
    path.write_bytes(path.read_bytes()[:-cut])
    history = read_history([path])
    assert [step for step, _ in losses(history)] == [1, 2, 3, 4, 5]
    assert len(history.curves["experts/layer_2/most"]) == 4
    assert len(history.notes) == 1
    assert "cut short" in history.notes[0]


def test_a_file_damaged_in_the_middle_gives_what_is_before_it(tmp_path):
    path = write_events(tmp_path, steps(1, 20), began=100.0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    history = read_history([path])
    assert 5 < history.last_step < 15
    assert "cut short" in history.notes[0]


@pytest.mark.parametrize("data", [b"", b"hello, this is no TensorBoard file", bytes(200)])
def test_a_file_without_one_whole_record_is_refused(tmp_path, data):
    path = tmp_path / "events.out.tfevents.1.x"
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged from its beginning") as caught:
        read_history([path])
    assert str(path) in str(caught.value)


def test_a_damaged_file_beside_a_whole_one_is_a_note(tmp_path):
    whole = write_events(tmp_path, steps(1, 2), began=100.0)
    (tmp_path / "events.out.tfevents.2.x").write_bytes(b"no record at all")
    history = read_history([whole, tmp_path / "events.out.tfevents.2.x"])
    assert history.last_step == 2
    assert "events.out.tfevents.2.x" in history.notes[0]


def test_the_throughput_is_tokens_over_seconds_of_each_process(tmp_path):
    first = write_events(tmp_path, steps(1, 4), began=100.0, name="a")
    second = write_events(tmp_path, steps(5, 6), began=900.0, name="b")
    history = read_history([first, second])
    rate = BATCH * LENGTH / SECONDS
    # The time between the two processes counts for nobody.
    assert throughput(history, LENGTH) == [(2, rate), (3, rate), (4, rate), (6, rate)]
    assert mean_throughput(history, LENGTH) == rate
    assert (throughput(history, None), mean_throughput(history, None)) == ([], None)


def test_every_kind_of_curve_has_its_picture(tmp_path):
    more = [
        ("val_loss", 1, 6.0),
        ("grad_norm", 1, 1.0),
        ("mtp_1_loss", 1, 8.0),
        ("mtp_2_loss", 1, 8.5),
        ("dsa_indexer_kl/layer_5", 2, 0.1),
        ("dsa_indexer_loss", 2, 0.001),
        ("stp_loss", 2, 1.5),
        ("experts/dropped", 2, 0.1),
        ("experts/layer_2/least", 2, 0.5),
    ]
    history = read_history([write_events(tmp_path, [*steps(1, 2), *more], began=1.0)])
    found = {panel.key: list(panel.curves) for panel in panels(history, LENGTH)}
    assert found == {
        "loss": ["training", "validation"],
        "learning_rate": ["learning rate"],
        "throughput": ["tokens per second"],
        "expert_load": ["busiest", "idlest"],
        "dropped": ["worst layer"],
        "gradient": ["gradient norm"],
        "prediction": ["depth 1", "depth 2"],
        "indexer": ["layer 5"],
        "stp": ["STP loss"],
    }
    load = panels(history, LENGTH)[3]
    assert list(load.faint) == ["layer 2, most", "layer 2, least"]


def test_reading_imports_no_tensorflow_and_no_torch(tmp_path):
    path = write_events(tmp_path / "run", steps(1, 2), began=1.0)
    stub = tmp_path / "stub" / "tensorflow"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise SystemExit('TensorFlow was imported')")
    script = f"""
import sys
sys.path.insert(0, {str(stub.parent)!r})
from pathlib import Path
from megacpp_nemo.runs.events import read_history
assert read_history([Path({str(path)!r})]).last_step == 2
print([name for name in ("torch", "tensorflow", "nemo", "pandas") if name in sys.modules])
"""
    root = Path(__file__).parents[2]
    said = subprocess.check_output([sys.executable, "-c", script], text=True, cwd=root)
    assert said == "[]\n"

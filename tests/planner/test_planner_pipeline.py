"""The bubble and the imbalance are those of a schedule that is played step by step."""

from __future__ import annotations

import pytest

from megacpp_nemo.contract import recipe
from megacpp_nemo.planner.flops import training_flops_per_token
from megacpp_nemo.planner.pipeline import Pipeline, even_lengths, pipeline


def order(stage: int, stages: int, chunks: int, batches: int) -> list[tuple[str, int, int]]:
    """Return what a stage does in 1F1B, plain or interleaved: pass, chunk and micro-batch."""

    def item(number: int, forward: bool) -> tuple[str, int, int]:
        block, place = divmod(number, stages * chunks)
        chunk = place // stages
        if not forward:
            chunk = chunks - 1 - chunk
        return "F" if forward else "B", chunk, block * stages + place % stages

    total = batches * chunks
    if chunks == 1:
        warm = min(stages - stage - 1, total)
        number = [("F", 0, i) for i in range(total)], [("B", 0, i) for i in range(total)]
    else:
        warm = min((stages - stage - 1) * 2 + (chunks - 1) * stages, total)
        number = (
            [item(i, True) for i in range(total)],
            [item(i, False) for i in range(total)],
        )
    forwards, backwards = number
    done = forwards[:warm]
    for index in range(total - warm):
        done += [forwards[warm + index], backwards[index]]
    return done + backwards[total - warm :]


def played(loads: list[list[float]], batches: int) -> float:
    """Return when the last pass ends: a forward takes a third of a load, a backward the rest."""
    stages, chunks = len(loads), len(loads[0])
    queues = [order(stage, stages, chunks, batches) for stage in range(stages)]
    ended: dict[tuple[str, int, int, int], float] = {}
    clocks = [0.0] * stages
    while any(queues):
        moved = False
        for stage, queue in enumerate(queues):
            while queue:
                kind, chunk, batch = queue[0]
                place = chunk * stages + stage
                last = stages * chunks - 1
                if kind == "F":
                    need = None if place == 0 else ("F", place - 1, batch)
                else:
                    need = ("F", last, batch) if place == last else ("B", place + 1, batch)
                if need is not None and need not in ended:
                    break
                start = max(clocks[stage], ended[need] if need else 0.0)
                share = 1 / 3 if kind == "F" else 2 / 3
                clocks[stage] = ended[kind, place, batch] = start + share * loads[stage][chunk]
                queue.pop(0)
                moved = True
        assert moved
    return max(clocks)


@pytest.mark.parametrize(
    ("stages", "chunks", "batches"), [(1, 1, 4), (2, 1, 8), (4, 1, 16), (2, 2, 8), (4, 3, 8)]
)
def test_the_bubble_is_what_a_played_schedule_waits(stages: int, chunks: int, batches: int) -> None:
    loads = [[3.0] * chunks for _ in range(stages)]
    planned = Pipeline(chunk_loads=tuple(map(tuple, loads)), micro_batches=batches)
    took, work = played(loads, batches), batches * chunks * 3.0
    assert took == pytest.approx(work * (1 + planned.bubble))
    assert 1 - work / took == pytest.approx(planned.bubble_share)
    assert planned.efficiency == pytest.approx(work / took)


def test_uneven_stages_take_no_longer_than_planned() -> None:
    loads = [[3.0], [6.0], [4.5], [3.0]]
    planned = Pipeline(chunk_loads=tuple(map(tuple, loads)), micro_batches=16)
    took, mean = played(loads, 16), 16 * sum(map(sum, loads)) / 4
    assert planned.imbalance == pytest.approx(6.0 / (16.5 / 4))
    assert planned.most_loaded == 1
    assert 16 * 6.0 < took <= mean / planned.efficiency + 1e-9
    # The planned time is within the bubble of the played one.
    assert mean / planned.efficiency / took < 1 + planned.bubble


def test_a_recipes_stages_hold_all_of_its_work() -> None:
    laid = recipe("nam56r", changes={"pipeline_model_parallel_size": 4})
    found = pipeline(laid)
    assert sum(found.stage_loads) == pytest.approx(training_flops_per_token(laid))
    assert found.most_loaded == 3
    assert found.micro_batches == laid.batch.global_batch_size // 4
    one = pipeline(recipe("nam56r"))
    assert (one.stages, one.bubble, one.imbalance, one.efficiency) == (1, 0.0, 1.0, 1.0)


def test_lengths_are_even() -> None:
    assert even_lengths(52, 8) == (6, 7, 6, 7, 6, 7, 6, 7)
    assert even_lengths(5, 5) == (1, 1, 1, 1, 1)

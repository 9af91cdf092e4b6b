"""How fast rows are served, and how long training waits for them.

    python benchmarks/data.py [--steps N] [--rows N]

Rows: one process reads rows of the default corpus in the order of training, as tensors, without
and with the five structure channels and with half of the documents permuted for
fill-in-the-middle; processor time, the least of several rounds. Waiting: `nam56r_tiny` with
structure channels trains on the same rows; the wall time spent in asking for the next micro-batch
is told against that of whole steps, with rows loaded in the training process and by two workers.
Writes `benchmarks/results/data.json` and `data.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from scans import machine

RESULTS = Path(__file__).parent / "results" / "data.json"
KINDS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "tokens, FIM": {"fim_rate": 0.5},
    "channels": {"structure": "all"},
    "channels, FIM": {"structure": "all", "fim_rate": 0.5},
}
LENGTHS = (256, 4096)
WORKERS = (0, 2)
ROUNDS, WARM_UP = 5, 5
# The most of a step that may be spent waiting, in percent.
LIMIT = 3.0


def row_seconds(kind: str, length: int, rows: int) -> float:
    """Return the processor seconds that one row of `length` tokens takes."""
    from megacpp_nemo.data.module import CppDataModule

    data = CppDataModule(seq_length=length, micro_batch_size=1, global_batch_size=1, **KINDS[kind])
    data.build(rows, 1, 1, 0)
    dataset = data._train_ds
    spent = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        for index in range(rows):
            dataset[index]
        spent.append((time.process_time() - begin) / rows)
    return min(spent)


def waiting(workers: int, steps: int) -> dict[str, Any]:
    """Return how long steps of `nam56r_tiny` take, and how much of that is waiting for rows."""
    import fiddle
    import lightning.pytorch as pl
    import torch

    from megacpp_nemo.contract import recipe
    from megacpp_nemo.recipes import to_nemo

    class Clock(pl.Callback):
        def __init__(self) -> None:
            self.waited, self.steps, self.channels = 0.0, [], 0

        def on_train_start(self, trainer: Any, module: Any) -> None:
            step = module.config.data_step_fn
            module.config.data_step_fn = lambda rows: step(self.timed(rows))

        def timed(self, rows: Iterator[Any]) -> Iterator[Any]:
            begin = time.perf_counter()
            given = next(rows)
            self.waited += time.perf_counter() - begin
            batch = given[0] if isinstance(given, tuple) else given
            self.channels = len(batch["structure"])
            yield given

        def on_train_batch_start(self, *_: Any) -> None:
            self.begin, self.before = time.perf_counter(), self.waited

        def on_train_batch_end(self, *_: Any) -> None:
            self.steps.append((time.perf_counter() - self.begin, self.waited - self.before))

    torch.set_num_threads(1)
    changes = {"train_steps": steps, "decay_steps": steps, "features.structure": "all"}
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        partial = to_nemo(recipe("nam56r_tiny", changes=changes), log_dir=folder)
        partial.data.fim_rate, partial.data.num_workers = 0.5, workers
        partial.trainer.callbacks = []
        partial.trainer.num_sanity_val_steps = partial.trainer.limit_val_batches = 0
        partial.log.tensorboard = partial.log.ckpt = None
        partial.trainer.enable_checkpointing = partial.trainer.enable_progress_bar = False
        built = fiddle.build(partial)
        built.keywords["trainer"].callbacks.append(clock)
        built()
    times = clock.steps[WARM_UP:]
    whole, waited = (sum(column) for column in zip(*times, strict=True))
    return {
        "workers": workers,
        "steps": len(times),
        "channels": clock.channels,
        "step_ms_median": round(statistics.median(step for step, _ in times) * 1000, 1),
        "waiting_ms_median": round(statistics.median(wait for _, wait in times) * 1000, 3),
        "waiting_percent": round(100 * waited / whole, 3),
    }


def table(found: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    where = found["machine"]
    lines = [
        "# Rows of packed documents: how fast they are served, and what training waits",
        "",
        f"{where['device']}, {where['threads']} thread, torch {where['torch']}. Written by "
        "`python benchmarks/data.py`, which says what each is.",
        "",
        "| rows | length | us a row | rows/s | million tokens/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['kind']} | {row['length']} | {row['microseconds']} | {row['rows_per_second']:,} "
        f"| {row['tokens_per_second'] / 1e6:.2f} |"
        for row in found["rows"]
    ]
    lines += [
        "",
        "`nam56r_tiny` with five channels and FIM:",
        "",
        "| workers | a step, ms | of it waiting, ms | waiting, % of all steps |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {run['workers']} | {run['step_ms_median']} | {run['waiting_ms_median']} "
        f"| {run['waiting_percent']} |"
        for run in found["waiting"]
    ]
    return "\n".join(lines) + "\n"


def apart(function: Any, *arguments: Any) -> Any:
    """Return what a function returns in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def rows_served(rows: int) -> list[dict[str, Any]]:
    """Return the figures of every kind of row at every length."""
    import torch

    from megacpp_nemo.host import compat

    compat.install()
    torch.set_num_threads(1)
    found = []
    for length in LENGTHS:
        for kind in KINDS:
            seconds = row_seconds(kind, length, rows)
            found.append(
                {
                    "kind": kind,
                    "length": length,
                    "microseconds": round(seconds * 1e6, 1),
                    "rows_per_second": round(1 / seconds),
                    "tokens_per_second": round(length / seconds),
                }
            )
    return found


def main() -> None:
    """Measure, write the results and say whether training waits too long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=1000)
    given = parser.parse_args()
    found: dict[str, Any] = {"machine": machine() | {"threads": 1}, "fim_rate": 0.5}
    found["rows"] = apart(rows_served, given.rows)
    found["waiting"] = [apart(waiting, workers, given.steps) for workers in WORKERS]
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    RESULTS.with_suffix(".md").write_text(table(found))
    print(table(found))
    most = max(run["waiting_percent"] for run in found["waiting"])
    print(f"waiting takes at most {most} % of the time of steps; {LIMIT} % is allowed")
    if most > LIMIT:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

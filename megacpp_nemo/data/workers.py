"""Processes that make the shards of a corpus.

Workers are spawned, never forked: a training process holds threads that a fork would lose. A
worker lives no longer than the process that started it, however that one ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.synchronize import Event

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data.shards import Shard, ShardJob, make_shard

# Of a worker: what it was started with.
_job: ShardJob
_stop: Event


def default_workers() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_workers(workers: int) -> None:
    """Raise DataError unless `workers` is a number of processes."""
    if workers < 1:
        raise DataError(
            "The number of workers is out of range",
            given=workers,
            allowed="a whole number, 1 or more",
            hint="leave it unset for one worker on each core",
        )


def make_shards(
    job: ShardJob, shards: Sequence[Shard], workers: int, done: Callable[[Shard], None]
) -> None:
    """Make the shards, in any order, and call `done` after each.

    One worker, or one shard, needs no other process. After an error or an interrupt the shards
    in work are finished and no other is begun.

    Raises:
        DataError: A file changed since the scan, or a worker died.
        OSError: A shard cannot be written.
    """
    workers = min(workers, len(shards))
    if workers <= 1:
        for shard in shards:
            make_shard(job, shard)
            done(shard)
        return
    with _pool(job, workers) as pool:
        futures = {pool.submit(_make, shard): shard for shard in shards}
        try:
            for future in as_completed(futures):
                future.result()
                done(futures[future])
        except BrokenProcessPool as error:
            raise _died(error, workers) from error


@contextmanager
def _pool(job: ShardJob, workers: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(job, stop))
    try:
        yield pool
    finally:
        # The pool hands out a few more shards than it has workers, which it cannot take back.
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _start(job: ShardJob, stop: Event) -> None:
    """Prepare a worker: one core, no interrupt of its own, no life after its parent's."""
    global _job, _stop
    _job, _stop = job, stop
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # The terminal sends an interrupt to the whole group; the parent sees to it that work ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(shard: Shard) -> None:
    if not _stop.is_set():
        make_shard(_job, shard)


def _died(error: Exception, workers: int) -> DataError:
    return DataError(
        "A worker that was building the corpus died",
        given=f"{error} ({workers} workers)",
        allowed="workers that fit into memory together, started by a program that can be "
        "imported (`if __name__ == '__main__':` around what it does)",
        hint="run again with fewer workers; 1 starts no other process",
    )

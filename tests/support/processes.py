"""Functions run in fresh processes that share this one's imports.

Importing NeMo takes ten seconds and more, and a process keeps the state of the last run in
many modules. Forking gives each run a clean process at no cost, and as many ranks as asked.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT_S = 240


def in_processes(
    function: Callable[..., Any], *args: Any, ranks: int = 1, kill_after: float | None = None
) -> list[Any]:
    """Return what `function(*args)` returns on each of `ranks` forked processes.

    The processes find each other as torchrun's would. An exception on any rank is raised here
    with its text; `kill_after` seconds, or `TIMEOUT_S`, end all of them.
    """
    context = multiprocessing.get_context("fork")
    workers, pipes = [], []
    with _own_port() as port:
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            worker = context.Process(
                target=_work, args=(theirs, rank, ranks, port, function, args), daemon=False
            )
            worker.start()
            theirs.close()
            workers.append(worker)
            pipes.append(ours)
        try:
            return _collect(pipes, kill_after or TIMEOUT_S)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Return what `function(*args)` returns in one forked process."""
    return in_processes(function, *args)[0]


class RankError(Exception):
    """An exception on a rank; the text holds its type, message and traceback."""


def _collect(pipes: list[Connection], seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        pending = [pipe for i, pipe in enumerate(pipes) if i not in results]
        ready = wait(pending, timeout=seconds)
        if not ready:
            raise TimeoutError(f"ranks did not answer within {seconds} s")
        for pipe in ready:
            ok, value = pipe.recv()  # type: ignore[union-attr]
            if not ok:
                raise RankError(value)
            results[pipes.index(pipe)] = value  # type: ignore[arg-type]
    return [results[i] for i in range(len(pipes))]


def _work(
    pipe: Connection, rank: int, ranks: int, port: int, function: Callable[..., Any], args: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="tests",
        TORCHELASTIC_USE_AGENT_STORE="False",
    )
    try:
        import torch

        # A collection would visit, and so copy, every object that this process shares.
        gc.freeze()
        torch.set_num_threads(1)
        pipe.send((True, function(*args)))
    except BaseException as error:
        text = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        pipe.send((False, f"rank {rank}: {text}"))
    finally:
        pipe.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextlib.contextmanager
def _own_port() -> Iterator[int]:
    """Yield a free port that no other test of this machine takes meanwhile.

    It is below those that the system hands out: one of them may be handed out twice before a
    rank listens on it, and tests run side by side.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket(socket.AF_UNIX) as claim:
            try:
                claim.bind(f"\0megacpp-tests-{port}")
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            yield port
            return

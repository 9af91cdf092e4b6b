"""Why a run failed: which rank ended first, and its last lines.

torchrun's own "root cause" is the lowest rank among those it found ended at one look; a rank that
died a moment later because its peer was gone is as good to it. Here the order is that in which
the ranks stopped writing, and those that say they lost a peer come last.
"""

from __future__ import annotations

import contextlib
import io
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megacpp_nemo.launch.errors import RunFailed

SHOWN = 30
# In torchrun's account of the ranks that failed, whichever node's log it is in.
_ENDED = re.compile(
    r"rank\s+: (\d+) \(local_rank: (\d+)\)\n(?:\d+: |\[pod/\S+\])?\s*exitcode\s+: (-?\d+)"
)
# Node (of srun --label, or a pod) and local rank before a line that torchrun passes on.
_OF_RANK = re.compile(r"^(\d+: |\[pod/\S+\] )?\[\w*?(\d+)\]:(.*)$", re.MULTILINE)
_LOST_PEER = re.compile(
    r"closed by peer|reset by peer|Broken pipe|DistBackendError|DistNetworkError|NCCL error"
    r"|remote process exited|recvValue|Socket Timeout|Timed out waiting"
)
_LOGS = ("**/combined.log", "log_*.out", "log-*.out", "*.out")


class Ended(NamedTuple):
    """A rank that failed.

    Args:
        rank: Its number; None for a process that is the only one.
        code: Its exit code; the signal's number below 0 if one ended it.
        lines: Its last lines.
        log: The file they are from.
    """

    rank: int | None
    code: int
    lines: tuple[str, ...]
    log: Path | None


def run_failed(experiment: Any, job: Any) -> RunFailed:
    """Return the error of a task of an experiment that failed."""
    ended = first_failure(Path(job.executor.job_dir))
    if ended is None:  # its log is on another machine
        ended = Ended(None, 1, _fetched(experiment, job), None)
    who = "the run" if ended.rank is None else f"rank {ended.rank}"
    how = f"exit code {ended.code}"
    if ended.code < 0:
        how = f"signal {-ended.code} ({_signal(-ended.code)})"
    return RunFailed(
        f"The run failed: {who} ended first, with {how}" if ended.rank is not None
        else f"The run failed with {how}",
        lines=ended.lines,
        exit_status=ended.code if ended.code > 0 else 128 - ended.code,
        given=str(ended.log) if ended.log else str(job.executor.job_dir),
        allowed="a run that ends with 0 on every rank",
        hint=f"nemo experiment logs {experiment._id} 0",
    )  # fmt: skip


def first_failure(folder: Path) -> Ended | None:
    """Return the rank that failed first, from the logs of a task; None without any.

    Args:
        folder: The task's, as NeMo-Run made it.
    """
    logs = [path for pattern in _LOGS for path in sorted(folder.glob(pattern))]
    if not logs:
        return None
    text = "\n".join(_read(path) for path in dict.fromkeys(logs))
    codes = {(int(rank), int(local)): int(code) for rank, local, code in _ENDED.findall(text)}
    # The others are stopped by torchrun when one has failed.
    failed = {key: code for key, code in codes.items() if code != -signal.SIGTERM} or codes
    if not failed:
        return Ended(None, 1, _last(text), logs[0])
    found = [_from_file(folder, key, code) for key, code in sorted(failed.items())]
    if all(ended is not None for ended in found):
        return min(
            (ended for ended in found if ended is not None),
            key=lambda ended: (_lost_peer(ended), _written(ended)),
        )
    return _from_text(text, failed, logs[0])


def _from_file(folder: Path, key: tuple[int, int], code: int) -> Ended | None:
    """Return how a rank ended, from the files torchrun keeps on this machine."""
    rank, local = key
    for name in ("stderr.log", "stdout.log"):
        logs = sorted(folder.glob(f"**/torchelastic/*/*/attempt_*/{local}/{name}"), key=_attempt)
        if logs and (text := _read(logs[-1])).strip():
            return Ended(rank, code, _last(text), logs[-1])
    return None


def _from_text(text: str, failed: dict[tuple[int, int], int], log: Path) -> Ended:
    """Return how the first rank ended, from a log that all ranks are in."""
    said: dict[tuple[str, int], list[str]] = {}
    order: list[tuple[str, int]] = []
    for node, local, line in _OF_RANK.findall(text):
        key = (node, int(local))
        said.setdefault(key, []).append(line)
        if line.startswith("Traceback (") and key not in order:
            order.append(key)
    locals_failed = {local: (rank, code) for (rank, local), code in reversed(failed.items())}
    candidates = [key for key in order if key[1] in locals_failed] or [
        key for key in said if key[1] in locals_failed
    ]
    if not candidates:
        (rank, _), code = next(iter(failed.items()))
        return Ended(rank, code, _last(text), log)

    def lost(key: tuple[str, int]) -> bool:
        return bool(_LOST_PEER.search("\n".join(said[key][-SHOWN:])))

    first = min(candidates, key=lambda key: (lost(key), candidates.index(key)))
    rank, code = locals_failed[first[1]]
    return Ended(rank, code, tuple(said[first][-SHOWN:]), log)


def _fetched(experiment: Any, job: Any) -> tuple[str, ...]:
    """Return the last lines of a log that NeMo-Run fetches."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        experiment.logs(job.id)
    return _last(said.getvalue())


def _lost_peer(ended: Ended) -> bool:
    return bool(_LOST_PEER.search("\n".join(ended.lines)))


def _written(ended: Ended) -> int:
    return ended.log.stat().st_mtime_ns if ended.log else 0


def _attempt(path: Path) -> int:
    return int(path.parts[-3].rpartition("_")[2])


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _last(text: str) -> tuple[str, ...]:
    lines: Sequence[str] = text.rstrip().splitlines()
    return tuple(lines[-SHOWN:])


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"

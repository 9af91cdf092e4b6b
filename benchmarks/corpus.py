"""How long a corpus with structure channels takes to build, and where the time goes.

    python benchmarks/corpus.py [--root FOLDER] [--workers 1 2]

The sources are torch's headers, the generated ones included. Each build runs in a process of its
own and begins with nothing; the source files are in the page cache. Seconds are the clock's, which
other work on the machine makes longer; processor seconds are of all processes of a build. With
one worker the phases inside the making of shards are told too. Writes
`benchmarks/results/corpus.json` and `corpus.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megacpp_nemo import __version__
from megacpp_nemo.data import cache, corpus_build, corpus_folder, merge, positions, shards
from megacpp_nemo.data.corpus import CorpusSpec, build_folder
from megacpp_nemo.data.verify import verify_folder
from megacpp_nemo.syntax import paint

RESULTS = Path(__file__).parent / "results" / "corpus.json"
# Where functions are called from, and what their time is called.
PHASES: dict[str, list[tuple[Any, str]]] = {
    "scan": [(corpus_folder, "scan_sources")],
    "train the tokenizer": [(corpus_build, "train_tokenizer")],
    "save it (imports transformers)": [(corpus_build, "save_tokenizer")],
    "shards": [(corpus_build, "make_shards")],
    "  read": [(shards, "read_content")],
    "  tokenize": [
        (positions.DocumentEncoder, "ids_and_places"),
        (positions.DocumentEncoder, "ids"),
    ],
    "  parse, paint, find types, sample": [(shards, "sampled")],
    "    of it parse and walk the trees": [(paint, "read_forest")],
    "  write": [(shards, "write_shard")],
    "merge": [(corpus_build, "merge_shards")],
    "  dependency levels": [(merge, "_levels")],
    "hash": [(cache, "write_manifest")],
}
seconds: dict[str, float] = {}
running: set[str] = set()


def timed(owner: Any, name: str, phase: str) -> None:
    """Add the time of every call to a phase; calls of a phase inside of itself count once."""
    function: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if phase in running:
            return function(*args, **kwargs)
        running.add(phase)
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            running.discard(phase)
            seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began

    setattr(owner, name, run)


def peak_megabytes(pid: int) -> int:
    """Return the most memory that a process has held, as Linux counts it for the process alone."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def watch(peaks: dict[int, int]) -> None:
    """Keep the peak of each worker up to date, five times a second."""
    while True:
        for worker in multiprocessing.active_children():
            with contextlib.suppress(OSError, IndexError):
                peaks[worker.pid or 0] = peak_megabytes(worker.pid or 0)
        time.sleep(0.2)


def build_once(root: str, structure: str, workers: int, out: str) -> dict[str, Any]:
    """Build in this process and return what it took."""
    for phase, places in PHASES.items():
        for owner, name in places:
            timed(owner, name, phase)
    spec = CorpusSpec(root=root, structure=None if structure == "none" else structure)
    peaks: dict[int, int] = {}
    threading.Thread(target=watch, args=(peaks,), daemon=True).start()
    began = time.perf_counter()
    corpus = build_folder(spec, out, progress=False, workers=workers)
    clock = time.perf_counter() - began
    own, others = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    splits = corpus.manifest["splits"].values()
    size = sum(split["source_bytes"] for split in splits)
    files = sum(split["files"] for split in splits)
    began = time.perf_counter()
    verified = verify_folder(out)
    return {
        "structure": structure,
        "workers": workers,
        "seconds": round(clock, 1),
        "files": files,
        "source_bytes": size,
        "tokens": sum(split["tokens"] for split in splits),
        "files_per_second": round(files / clock),
        "megabytes_per_second": round(size / clock / 1e6, 2),
        "processor_seconds": round(
            own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime, 1
        ),
        "peak_megabytes": peak_megabytes(os.getpid()),
        "peak_megabytes_of_a_worker": max(peaks.values(), default=None),
        "corpus_bytes": verified.checked_bytes,
        "verify_seconds": round(time.perf_counter() - began, 2),
        "findings": list(verified.findings),
        "files_parsed": (corpus.manifest.get("structure") or {}).get("files_parsed"),
        "absent_tokens": (corpus.manifest.get("structure") or {}).get("absent_tokens"),
        "checksum": cache.file_sha256(Path(out) / cache.MANIFEST),
        "phases": {phase: round(seconds[phase], 2) for phase in PHASES if phase in seconds},
    }


def in_own_process(root: str, structure: str, workers: int) -> dict[str, Any]:
    """Return what `build_once` says in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        given = json.dumps([root, structure, workers, f"{folder}/corpus"])
        done = subprocess.run(
            [sys.executable, __file__, "--one", given], stdout=subprocess.PIPE, check=True
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{structure} {workers}: {result['seconds']} s", file=sys.stderr)
    return result


def table(results: dict[str, Any]) -> str:
    """Return the results as a page."""
    machine, builds = results["machine"], results["builds"]
    lines = [
        "# Building a corpus\n",
        f"{machine['system']}, {machine['processors']} processors, Python {machine['python']}, "
        f"load average {machine['load']}; {builds[0]['files']:,} files, "
        f"{builds[0]['source_bytes'] / 1e6:.1f} MB, {builds[0]['tokens']:,} tokens. Written by "
        "`python benchmarks/corpus.py`.\n",
        "| channels | workers | seconds | processor seconds | files/s | MB/s | peak MB "
        "| of a worker | verify, s |",
        "| --- " * 9 + "|",
    ]
    lines += [
        f"| {b['structure']} | {b['workers']} | {b['seconds']} | {b['processor_seconds']} "
        f"| {b['files_per_second']:,} | {b['megabytes_per_second']} | {b['peak_megabytes']} "
        f"| {b['peak_megabytes_of_a_worker'] or ''} | {b['verify_seconds']} |"
        for b in builds
    ]
    heads = [f"{b['structure']}, {b['workers']}" for b in builds]
    lines += ["", "Seconds of the clock, by phase:\n", f"| phase | {' | '.join(heads)} |"]
    lines += ["| --- " * (1 + len(builds)) + "|"]
    lines += [
        f"| {phase.replace('  ', '&nbsp;&nbsp;')} | "
        + " | ".join(str(b["phases"].get(phase, "")) for b in builds)
        + " |"
        for phase in PHASES
    ]
    same = {b["structure"]: set[str]() for b in builds}
    for b in builds:
        same[b["structure"]].add(b["checksum"])
    lines += [
        "",
        *(
            f"- {s}: {'the same bytes' if len(c) == 1 else 'DIFFERENT BYTES'} whatever the "
            "number of workers"
            for s, c in same.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    """Build as often as asked and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default=None)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.one:
        print(json.dumps(build_once(*json.loads(given.one))))
        return
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    root = given.root or str(Path(str(torch.origin)).parent / "include")
    load = os.getloadavg()[0]
    builds = [
        in_own_process(root, structure, workers)
        for structure in ("all", "none")
        for workers in given.workers
    ]
    results = {
        "package": __version__,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processors": os.cpu_count(),
            "python": platform.python_version(),
            "load": round(load, 1),
        },
        "builds": builds,
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()

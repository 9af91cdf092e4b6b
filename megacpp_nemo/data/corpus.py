"""A folder of C++ sources as a corpus that Megatron can train on.

- `build_corpus`: build it once in the cache, then load it; safe to call from many processes
- `CorpusSpec`, `Corpus`: what to build, and what there is then (from `corpus_spec`)
- `build_folder`, `open_folder`: a corpus in a folder of its own (from `corpus_folder`)

A corpus folder holds `train.bin/.idx` and `validation.bin/.idx` (Megatron indexed files, one
document for each source file, ending in the end-of-document token), the same again for each
structure channel (`train.category.bin/.idx`, ...), `tokenizer/`, `documents.json` (the source of
each document) and `manifest.json`.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data import cache
from megacpp_nemo.data.corpus_build import estimated_bytes, write_corpus
from megacpp_nemo.data.corpus_folder import build_folder, open_folder
from megacpp_nemo.data.corpus_spec import (
    FORMAT_VERSION,
    Corpus,
    CorpusSpec,
    Split,
    corpus_key,
    manifest_head,
)
from megacpp_nemo.data.sources import SourceScan, scan_sources
from megacpp_nemo.data.workers import check_workers

__all__ = [
    "FORMAT_VERSION",
    "Corpus",
    "CorpusSpec",
    "Split",
    "build_corpus",
    "build_folder",
    "open_folder",
]

logger = logging.getLogger(__name__)


def build_corpus(
    spec: CorpusSpec,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    workers: int = 1,
) -> Corpus:
    """Return the corpus of `spec`, built on the first call and loaded from the cache after.

    The cache key covers the settings and the content of every source file and of a given
    tokenizer, so an edited file makes a new corpus. A cached corpus is verified on every call,
    and rebuilt with a warning if a file in it is damaged.

    Args:
        spec: What to build.
        cache_dir: Cache folder; None is `megacpp_nemo` in the user's cache.
        progress: Show a progress bar on stderr while building. Never shown by a launched
            process other than rank 0.
        workers: Processes that encode and parse; 1 works in this one. More of them import the
            program that calls this (see `multiprocessing`), and the result is the same.

    Raises:
        DataError: The sources or the tokenizer are missing or unusable, the sources are too few,
            a setting is out of range, or the cache cannot be written.
    """
    spec.check()
    check_workers(workers)
    scan = scan_sources(spec.source_set())
    key = corpus_key(spec, scan)
    root = cache.cache_root(cache_dir)
    folder = root / "corpora" / key
    corpus = _load(folder)
    if corpus is not None:
        return corpus
    with cache.locked(root, "corpora"):
        # Another process may have built it while this one waited.
        corpus = _load(folder, warn=True)
        if corpus is None:
            _build(spec, scan, folder, workers, progress=progress and _is_first_rank())
            corpus = _load(folder, warn=True)
    if corpus is None:
        raise _vanished(folder)
    return corpus


def _vanished(folder: Path) -> DataError:
    return DataError(
        "A corpus vanished from the cache as it was built",
        given=str(folder),
        hint="set cache_dir to a folder that nothing else cleans",
    )


def _load(folder: Path, warn: bool = False) -> Corpus | None:
    if not folder.exists():
        return None
    try:
        return Corpus(folder=folder, manifest=cache.read_manifest(folder))
    except cache.DamagedError as damage:
        if warn:
            logger.warning("rebuilding the damaged corpus %s: %s", folder, damage)
        return None


def _build(spec: CorpusSpec, scan: SourceScan, folder: Path, workers: int, progress: bool) -> None:
    facts = manifest_head(spec, scan, key=folder.name)
    logger.info("building a corpus of %d files in %s", len(scan.files), folder)
    with (
        cache.disk_errors(folder.parent, needed_bytes=estimated_bytes(spec, scan)),
        cache.staged_folder(folder) as staging,
    ):
        work = staging / "work"
        facts |= write_corpus(
            spec, scan, staging, work, key=folder.name, workers=workers, progress=progress
        )
        shutil.rmtree(work)
        cache.write_manifest(staging, facts)


def _is_first_rank() -> bool:
    # As launchers number processes; torch.distributed is not up yet when data is prepared.
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"

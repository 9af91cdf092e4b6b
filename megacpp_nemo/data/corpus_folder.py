"""A corpus in a folder of the user's own: built there at once or not at all, and resumed.

- `build_folder`: build, or go on with a build that was stopped
- `open_folder`: the corpus of a folder

The work goes on in `.NAME.building` beside the folder `NAME`. It holds a lock, what is done so
far, and, at last, the corpus, which is then renamed. What it holds is named by all that decides
the output; a build of other sources or settings begins anew.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data import cache
from megacpp_nemo.data.corpus_build import estimated_bytes, is_begun, write_corpus
from megacpp_nemo.data.corpus_spec import (
    FORMAT_VERSION,
    Corpus,
    CorpusSpec,
    corpus_key,
    manifest_head,
    structure_versions,
)
from megacpp_nemo.data.shard_file import ShardError
from megacpp_nemo.data.sources import SourceScan, scan_sources
from megacpp_nemo.data.workers import check_workers, default_workers

logger = logging.getLogger(__name__)

_SETTING = "the output folder (--out)"


def build_folder(
    spec: CorpusSpec,
    out: str | os.PathLike[str],
    progress: bool = True,
    workers: int | None = None,
) -> Corpus:
    """Build the corpus of `spec` in the folder `out` and return it.

    A build that was stopped, by whatever means, goes on where it was when it is called again
    with the same sources and settings. A complete corpus of them is verified and kept. The
    bytes of the result do not depend on either, nor on the number of workers.

    Args:
        spec: What to build.
        out: Folder of the result; absent, empty, or a corpus of the same sources and settings.
        progress: Show a progress bar on stderr while building.
        workers: Processes that encode and parse; None is one for each core this process may
            use, 1 works in this process. More than one import the program that calls this.

    Raises:
        DataError: The sources or the tokenizer are missing or unusable, a setting is out of
            range, something else is in `out`, a worker died, or the disk is full or cannot be
            written.
    """
    workers = default_workers() if workers is None else workers
    check_workers(workers)
    spec.check()
    folder = Path(os.path.realpath(Path(out).expanduser()))
    scan = scan_sources(spec.source_set())
    key = corpus_key(spec, scan)
    corpus = _kept(folder, key)
    if corpus is not None:
        return corpus
    building = folder.with_name(f".{folder.name}.building")
    needed = estimated_bytes(spec, scan)
    with (
        cache.disk_errors(folder.parent, needed_bytes=needed, setting=_SETTING),
        cache.locked(building, "build", setting=_SETTING),
    ):
        # Another process may have built it while this one waited.
        corpus = _kept(folder, key)
        if corpus is None:
            with _resumable(building, building / key):
                _build(spec, scan, key, building, folder, workers, progress)
            corpus = _kept(folder, key)
        shutil.rmtree(building, ignore_errors=True)
    if corpus is None:
        raise _vanished(folder)
    return corpus


def open_folder(folder: str | os.PathLike[str]) -> Corpus:
    """Return the corpus in a folder, its manifest and its small files checked.

    Sizes of all files are compared, and the hashes of all but the `.bin` files, which can be
    large: `verify_folder` reads those too.

    Raises:
        DataError: There is no corpus, it is damaged or incomplete, or it is of another format
            or another version of the mapping from syntax to channels.
    """
    path = Path(folder).expanduser()
    if not (path / cache.MANIFEST).is_file():
        raise DataError(
            "The folder holds no corpus",
            given=str(path),
            allowed=f"a folder with {cache.MANIFEST}, as `megacpp data build` writes it",
            hint="megacpp data build SOURCES --out " + str(path),
        )
    try:
        manifest = cache.read_manifest(path, hashed=lambda name: not name.endswith(".bin"))
    except cache.DamagedError as damage:
        raise DataError(
            "The corpus is damaged",
            given=f"{path}: {damage}",
            allowed="the files as `megacpp data build` wrote them",
            hint="copy it again, or remove it and build it again",
        ) from damage
    corpus = Corpus(folder=path, manifest=manifest)
    wrong = other_versions(corpus)
    if wrong:
        raise DataError(
            "The corpus is of another version",
            given=f"{path}: {wrong[0]}",
            hint="build it again, or use the package that built it",
        )
    return corpus


def other_versions(corpus: Corpus) -> list[str]:
    """Return, in sentences, how a corpus is of another version than this package would build."""
    manifest = corpus.manifest
    if manifest.get("schema_version") != FORMAT_VERSION:
        return [
            f"its format is version {manifest.get('schema_version')!r}, "
            f"this package reads version {FORMAT_VERSION}"
        ]
    wrong = []
    if manifest["tokenizer"]["sha256"] != manifest["files"]["tokenizer/tokenizer.json"]["sha256"]:
        wrong.append("it was encoded with another tokenizer than the one in its folder")
    if corpus.channels:
        built, own = manifest["structure"]["mapping_version"], structure_versions()
        if built != own["mapping_version"]:
            wrong.append(
                f"its structure channels have mapping version {built}, "
                f"this package's mapping is version {own['mapping_version']}"
            )
    return wrong


def _kept(folder: Path, key: str) -> Corpus | None:
    """Return the corpus that is already in `folder`, or None if there is nothing.

    Raises:
        DataError: There is something else.
    """
    if not folder.is_dir():
        if folder.exists():
            raise _occupied(folder, "it is a file")
        return None
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return None
    if cache.MANIFEST not in names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise _occupied(folder, f"it holds {', '.join(names[:3])}{more}")
    try:
        corpus = Corpus(folder=folder, manifest=cache.read_manifest(folder))
    except cache.DamagedError as damage:
        raise _occupied(folder, f"it holds a damaged corpus: {damage}") from damage
    if corpus.manifest.get("key") != key:
        raise _occupied(folder, "it holds a corpus of other sources or settings")
    return corpus


def _occupied(folder: Path, why: str) -> DataError:
    return DataError(
        "The output folder is not free",
        given=f"{folder}: {why}",
        allowed="a folder that is absent, empty, or a whole corpus of the same sources and "
        "settings",
        hint="choose another folder, or remove this one",
    )


def _build(
    spec: CorpusSpec,
    scan: SourceScan,
    key: str,
    building: Path,
    folder: Path,
    workers: int,
    progress: bool,
) -> None:
    work, staging = building / key, building / "corpus"
    for stale in building.iterdir():
        if stale.is_dir() and stale != work:
            shutil.rmtree(stale)
    staging.mkdir()
    logger.info("building a corpus of %d files in %s", len(scan.files), building)
    facts = manifest_head(spec, scan, key)
    try:
        facts |= write_corpus(
            spec, scan, staging, work, key=key, workers=workers, progress=progress
        )
    except ShardError as damage:
        raise DataError(
            "A part of the corpus was damaged while it was being built",
            given=f"{work}: {damage}",
            hint="run again; the part is then made again",
        ) from damage
    cache.write_manifest(staging, facts)
    os.replace(staging, folder)


@contextmanager
def _resumable(building: Path, work: Path) -> Iterator[None]:
    """Keep what a stopped build can go on from, and say so; if there is nothing, leave nothing."""
    try:
        yield
    except BaseException as error:
        if not is_begun(work):
            shutil.rmtree(building, ignore_errors=True)
        elif isinstance(error, KeyboardInterrupt):
            logger.warning("stopped; the same command goes on from what is kept in %s", building)
        raise


def _vanished(folder: Path) -> DataError:
    return DataError("A corpus vanished as it was built", given=str(folder))

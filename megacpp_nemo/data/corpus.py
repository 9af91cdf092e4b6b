"""A folder of C++ sources as a cached corpus that Megatron can train on.

- `CorpusSpec`: what to build
- `build_corpus`: build it once, then load it; safe to call from many processes at once
- `Corpus`: where the files are, and what is in them

A corpus folder holds `train.bin/.idx` and `validation.bin/.idx` (Megatron indexed files, one
document for each source file, ending in the end-of-document token), `tokenizer/`, and
`manifest.json`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data import cache
from megacpp_nemo.data.corpus_build import estimated_bytes, write_corpus
from megacpp_nemo.data.sources import (
    CPP_SUFFIXES,
    SourceScan,
    SourceSet,
    default_source_set,
    scan_sources,
)
from megacpp_nemo.data.split import check_validation_fraction
from megacpp_nemo.data.tokenizer import check_vocab_size, load_trained, tokenizer_hashes

logger = logging.getLogger(__name__)

# Raise when the same sources would make other files: cached corpora of older code are then left
# alone and not used.
FORMAT_VERSION = 1

Split = Literal["train", "validation"]


@dataclass(frozen=True, kw_only=True)
class CorpusSpec:
    """What to build a corpus from, and how.

    Args:
        root: Folder of C++ sources; None is the headers that ship with torch.
        suffixes: File name endings that count as C++.
        exclude: Globs of paths to leave out, as in `SourceSet`; for the default root they add to
            the generated files that are left out anyway.
        vocab_size: Tokens of the tokenizer trained on the training files.
        tokenizer_dir: Folder of a tokenizer to encode with; none is then trained, and
            `vocab_size` is not used.
        validation_fraction: Expected share of files held back for validation.
        seed: Chooses the files held back.
    """

    root: str | os.PathLike[str] | None = None
    suffixes: tuple[str, ...] = CPP_SUFFIXES
    exclude: tuple[str, ...] = ()
    vocab_size: int = 4096
    tokenizer_dir: str | os.PathLike[str] | None = None
    validation_fraction: float = 0.05
    seed: int = 1234

    def source_set(self) -> SourceSet:
        """Return the source files this spec speaks of."""
        if self.root is not None:
            return SourceSet(root=Path(self.root), suffixes=self.suffixes, exclude=self.exclude)
        base = default_source_set()
        return SourceSet(
            root=base.root, suffixes=self.suffixes, exclude=(*base.exclude, *self.exclude)
        )


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A complete, verified corpus on disk.

    Args:
        folder: Where its files are.
        manifest: What `manifest.json` says: `spec`, `splits` (files, documents, source bytes and
            tokens of each), `skipped`, `tokenizer`, `files` (size and sha256 of each).
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def train_prefix(self) -> Path:
        """Path of the training `.bin` and `.idx` without their suffix."""
        return self.folder / "train"

    @property
    def validation_prefix(self) -> Path:
        """Path of the validation `.bin` and `.idx` without their suffix."""
        return self.folder / "validation"

    @property
    def tokenizer_dir(self) -> Path:
        """Tokenizer folder that `AutoTokenizer.from_pretrained` loads."""
        return self.folder / "tokenizer"

    def tokens(self, split: Split) -> int:
        """Return the tokens in a split, one end-of-document token for each file included."""
        return int(self.manifest["splits"][split]["tokens"])

    def bytes_per_token(self, split: Split) -> float:
        """Return bytes of source text per token, end-of-document tokens included.

        Dividing a loss in nats per token by this and by ln 2 gives bits per byte, which can be
        compared between vocabularies.
        """
        return float(self.manifest["splits"][split]["source_bytes"]) / self.tokens(split)


def build_corpus(
    spec: CorpusSpec,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
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

    Raises:
        DataError: The sources or the tokenizer are missing or unusable, the sources are too few,
            a setting is out of range, or the cache cannot be written.
    """
    if spec.tokenizer_dir is None:
        check_vocab_size(spec.vocab_size)
    else:
        load_trained(spec.tokenizer_dir)
    check_validation_fraction(spec.validation_fraction)
    scan = scan_sources(spec.source_set())
    key = _cache_key(spec, scan)
    root = cache.cache_root(cache_dir)
    folder = root / "corpora" / key
    corpus = _load(folder)
    if corpus is not None:
        return corpus
    with cache.locked(root, "corpora"):
        # Another process may have built it while this one waited.
        corpus = _load(folder, warn=True)
        if corpus is None:
            _build(spec, scan, folder, progress=progress and _is_first_rank())
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


def _build(spec: CorpusSpec, scan: SourceScan, folder: Path, progress: bool) -> None:
    facts = {
        "schema_version": FORMAT_VERSION,
        "spec": {"root": str(scan.root), **_settings(spec)},
        "skipped": dict(scan.skipped),
    }
    logger.info("building a corpus of %d files in %s", len(scan.files), folder)
    with (
        cache.disk_errors(folder.parent, needed_bytes=estimated_bytes(scan)),
        cache.staged_folder(folder) as staging,
    ):
        facts |= write_corpus(
            scan,
            staging,
            vocab_size=spec.vocab_size,
            tokenizer_dir=_tokenizer_path(spec),
            validation_fraction=spec.validation_fraction,
            seed=spec.seed,
            progress=progress,
        )
        cache.write_manifest(staging, facts)


def _is_first_rank() -> bool:
    # As launchers number processes; torch.distributed is not up yet when data is prepared.
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _settings(spec: CorpusSpec) -> dict[str, Any]:
    folder = _tokenizer_path(spec)
    tokenizer: dict[str, Any] = {"vocab_size": spec.vocab_size}
    if folder is not None:
        tokenizer = {"tokenizer": tokenizer_hashes(folder)}
    return {
        "suffixes": list(spec.suffixes),
        "exclude": list(spec.exclude),
        **tokenizer,
        "validation_fraction": spec.validation_fraction,
        "seed": spec.seed,
    }


def _tokenizer_path(spec: CorpusSpec) -> Path | None:
    return None if spec.tokenizer_dir is None else Path(spec.tokenizer_dir).expanduser()


def _cache_key(spec: CorpusSpec, scan: SourceScan) -> str:
    """Hash all that decides the output; where the sources lie is not part of it."""
    parts = {
        "format_version": FORMAT_VERSION,
        "tokenizers_version": metadata.version("tokenizers"),
        "settings": _settings(spec),
        "skipped": dict(scan.skipped),
        "files": [(file.path, file.sha256) for file in scan.files],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

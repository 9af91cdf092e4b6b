"""What a corpus is built from, and what a built one says of itself.

- `CorpusSpec`: what to build
- `corpus_key`: a name for all that decides the bytes of the result
- `Corpus`: where the files are, and what is in them
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.contract.structure import STRUCTURE_CHOICE, structure_channels
from megacpp_nemo.data.sources import CPP_SUFFIXES, SourceScan, SourceSet, default_source_set
from megacpp_nemo.data.split import check_validation_fraction
from megacpp_nemo.data.tokenizer import check_vocab_size, load_trained, tokenizer_hashes

# Raise when the same sources would make other files: cached corpora of older code are then left
# alone and not used.
FORMAT_VERSION = 2
DOCUMENTS = "documents.json"

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


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
        structure: Code-structure channels beside the tokens: `core`, `all`, or channels joined
            by `+`; None for none, and no source is then parsed.
    """

    root: str | os.PathLike[str] | None = None
    suffixes: tuple[str, ...] = CPP_SUFFIXES
    exclude: tuple[str, ...] = ()
    vocab_size: int = 4096
    tokenizer_dir: str | os.PathLike[str] | None = None
    validation_fraction: float = 0.05
    seed: int = 1234
    structure: str | None = None

    def source_set(self) -> SourceSet:
        """Return the source files this spec speaks of."""
        if self.root is not None:
            return SourceSet(root=Path(self.root), suffixes=self.suffixes, exclude=self.exclude)
        base = default_source_set()
        return SourceSet(
            root=base.root, suffixes=self.suffixes, exclude=(*base.exclude, *self.exclude)
        )

    @property
    def tokenizer_path(self) -> Path | None:
        """The folder of the given tokenizer."""
        return None if self.tokenizer_dir is None else Path(self.tokenizer_dir).expanduser()

    @property
    def channels(self) -> tuple[str, ...]:
        """The structure channels to build."""
        return structure_channels(self.structure)

    def check(self) -> None:
        """Raise DataError if a setting is out of range or the given tokenizer is not usable."""
        if self.tokenizer_dir is None:
            check_vocab_size(self.vocab_size)
        else:
            load_trained(self.tokenizer_dir)
        check_validation_fraction(self.validation_fraction)
        if self.structure is not None and not STRUCTURE_CHOICE.accepts(self.structure):
            raise DataError(
                "The structure channels cannot be read",
                given=repr(self.structure),
                allowed=STRUCTURE_CHOICE.text,
                hint="structure='core'",
            )


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A complete corpus on disk.

    Args:
        folder: Where its files are.
        manifest: What `manifest.json` says: `spec`, `key`, `splits` (files, documents, source
            bytes and tokens of each), `skipped`, `tokenizer`, `structure`, `files` (size and
            sha256 of each).
    """

    folder: Path
    manifest: Mapping[str, Any]

    def prefix(self, split: Split, channel: str | None = None) -> Path:
        """Return the path of a split's `.bin` and `.idx` without their suffix.

        Args:
            split: `train` or `validation`.
            channel: A structure channel; None for the tokens.
        """
        return self.folder / (split if channel is None else f"{split}.{channel}")

    @property
    def train_prefix(self) -> Path:
        """Path of the training `.bin` and `.idx` without their suffix."""
        return self.prefix("train")

    @property
    def validation_prefix(self) -> Path:
        """Path of the validation `.bin` and `.idx` without their suffix."""
        return self.prefix("validation")

    @property
    def tokenizer_dir(self) -> Path:
        """Tokenizer folder that `AutoTokenizer.from_pretrained` loads."""
        return self.folder / "tokenizer"

    @property
    def channels(self) -> tuple[str, ...]:
        """Structure channels that it holds."""
        structure = self.manifest.get("structure")
        return tuple(structure["channels"]) if structure else ()

    def tokens(self, split: Split) -> int:
        """Return the tokens in a split, one end-of-document token for each file included."""
        return int(self.manifest["splits"][split]["tokens"])

    def bytes_per_token(self, split: Split) -> float:
        """Return bytes of source text per token, end-of-document tokens included.

        Dividing a loss in nats per token by this and by ln 2 gives bits per byte, which can be
        compared between vocabularies.
        """
        return float(self.manifest["splits"][split]["source_bytes"]) / self.tokens(split)

    def documents(self, split: Split) -> list[str]:
        """Return the path of each document's source, relative to the root, in document order."""
        return [path for path, _ in self.listing[split]]

    @cached_property
    def listing(self) -> dict[str, list[tuple[str, str]]]:
        """Path and sha256 of each document's source, by split, in document order."""
        listing: dict[str, list[tuple[str, str]]] = json.loads(
            (self.folder / DOCUMENTS).read_text(encoding="utf-8")
        )
        return listing


def spec_settings(spec: CorpusSpec) -> dict[str, Any]:
    """Return the settings that decide a corpus, its sources left out, as plain data."""
    folder = spec.tokenizer_path
    tokenizer: dict[str, Any] = {"vocab_size": spec.vocab_size}
    if folder is not None:
        tokenizer = {"tokenizer": tokenizer_hashes(folder)}
    settings = {
        "suffixes": list(spec.suffixes),
        "exclude": list(spec.exclude),
        **tokenizer,
        "validation_fraction": spec.validation_fraction,
        "seed": spec.seed,
    }
    return settings | ({"structure": list(spec.channels)} if spec.channels else {})


def structure_versions() -> dict[str, Any]:
    """Return the versions that decide what the structure channels say."""
    from megacpp_nemo.syntax.table import MAPPING_VERSION

    return {
        "mapping_version": MAPPING_VERSION,
        "tree_sitter": metadata.version("tree-sitter"),
        "tree_sitter_cpp": metadata.version("tree-sitter-cpp"),
    }


def corpus_key(spec: CorpusSpec, scan: SourceScan) -> str:
    """Hash all that decides the output; where the sources lie is not part of it."""
    parts = {
        "format_version": FORMAT_VERSION,
        "tokenizers_version": metadata.version("tokenizers"),
        "settings": spec_settings(spec),
        "skipped": dict(scan.skipped),
        "files": [(file.path, file.sha256) for file in scan.files],
    }
    if spec.channels:
        parts["structure"] = structure_versions()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def manifest_head(spec: CorpusSpec, scan: SourceScan, key: str) -> dict[str, Any]:
    """Return what a manifest says of the order, before the work."""
    return {
        "schema_version": FORMAT_VERSION,
        "key": key,
        "spec": {"root": os.path.abspath(scan.root), **spec_settings(spec)},
        "skipped": dict(scan.skipped),
    }

"""Whether a corpus folder is what its manifest says, down to every element.

- `verify_folder`: all checks; what is wrong comes back as sentences
- `Verification`: what was looked at, and the findings
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
from megacpp_nemo.data import cache
from megacpp_nemo.data.corpus_folder import other_versions
from megacpp_nemo.data.corpus_spec import DOCUMENTS, SPLITS, Corpus, Split
from megacpp_nemo.data.indexed import open_indexed, read_elements
from megacpp_nemo.data.verify_sources import reparse_documents

# Findings of one kind that are told one by one; of more there is a count.
_TOLD = 5


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a verification found.

    Args:
        folder: The corpus.
        findings: What is wrong, a sentence each; empty if nothing is.
        documents: Documents of both splits, as far as they could be read.
        tokens: Tokens of both splits.
        channels: Structure channels of the corpus.
        checked_bytes: Bytes of all files whose content was read.
        reparsed: Documents that were made again from their sources and compared.
        not_reparsed: Documents drawn for that whose source is gone or has changed.
    """

    folder: Path
    findings: tuple[str, ...]
    documents: int = 0
    tokens: int = 0
    channels: tuple[str, ...] = ()
    checked_bytes: int = 0
    reparsed: int = 0
    not_reparsed: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings


def verify_folder(folder: str | os.PathLike[str], *, reparse: int = 0) -> Verification:
    """Check a corpus: checksums, versions, counts, the alignment of channels and the ids.

    Whatever is wrong with the files is a finding; later checks go on as far as they can.

    Args:
        folder: A folder that `build_folder` wrote.
        reparse: Documents to tokenize and parse again from their sources and to compare, spread
            evenly over the corpus; sources that are gone or have changed are counted.

    Raises:
        DataError: There is no such folder.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise DataError(
            "There is no corpus folder",
            given=str(path),
            hint="give the folder of `data build --out`",
        )
    manifest, findings = _manifest(path)
    if manifest is None:
        return Verification(folder=path, findings=tuple(findings))
    corpus = Corpus(folder=path, manifest=manifest)
    try:
        return _verify(corpus, findings, reparse)
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        # A manifest that matches its checksum and has other parts than one of ours.
        findings.append(f"{cache.MANIFEST} cannot be understood ({type(error).__name__}: {error})")
        return Verification(folder=path, findings=tuple(findings))


def _manifest(folder: Path) -> tuple[Mapping[str, Any] | None, list[str]]:
    try:
        return cache.read_manifest_alone(folder), []
    except cache.DamagedError as damage:
        findings = [f"{damage}."]
    try:
        manifest = json.loads((folder / cache.MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None, findings
    return (manifest if isinstance(manifest, dict) else None), findings


def _verify(corpus: Corpus, findings: list[str], reparse: int) -> Verification:
    versions = other_versions(corpus)
    findings += [f"The corpus is of another version: {text}." for text in versions]
    checked_bytes = 0
    for name, expected in corpus.manifest["files"].items():
        try:
            cache.check_size(corpus.folder / name, name, expected)
            cache.check_hash(corpus.folder / name, name, expected)
            checked_bytes += int(expected["size_bytes"])
        except cache.DamagedError as damage:
            findings.append(f"{damage}.")
    for split in SPLITS:
        findings += _check_split(corpus, split)
    reparsed = not_reparsed = 0
    if reparse and not findings:
        reparsed, not_reparsed, different = reparse_documents(corpus, reparse)
        findings += _some(different)
    counts = corpus.manifest["splits"].values()
    return Verification(
        folder=corpus.folder,
        findings=tuple(findings),
        documents=sum(split["documents"] for split in counts),
        tokens=sum(split["tokens"] for split in counts),
        channels=corpus.channels,
        checked_bytes=checked_bytes,
        reparsed=reparsed,
        not_reparsed=not_reparsed,
    )


def _check_split(corpus: Corpus, split: Split) -> list[str]:
    try:
        lengths = open_indexed(corpus.prefix(split)).sequence_lengths
    except DataError as error:
        return [f"The tokens of {split} cannot be read: {error.given}."]
    findings = list(_count_findings(corpus, split, lengths))
    findings += _id_findings(corpus, split, None, corpus.manifest["tokenizer"]["vocab_size"])
    for channel in corpus.channels:
        try:
            found = open_indexed(corpus.prefix(split, channel)).sequence_lengths
        except DataError as error:
            findings.append(f"The channel {channel} of {split} cannot be read: {error.given}.")
            continue
        findings += _alignment_findings(corpus, split, channel, lengths, found)
        findings += _id_findings(corpus, split, channel, 1 + STRUCTURE_CHANNELS[channel])
    return findings


def _count_findings(corpus: Corpus, split: Split, lengths: Any) -> Iterator[str]:
    told = corpus.manifest["splits"][split]
    tokens = int(lengths.sum(dtype=np.int64))
    if len(lengths) != told["documents"] or tokens != told["tokens"]:
        yield (
            f"The tokens of {split} are {tokens:,} in {len(lengths):,} documents; the manifest "
            f"says {told['tokens']:,} in {told['documents']:,}."
        )
    try:
        listed = len(corpus.documents(split))
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{DOCUMENTS} cannot be read ({error})."
        return
    if listed != len(lengths):
        yield f"{DOCUMENTS} lists {listed:,} documents of {split}; there are {len(lengths):,}."


def _alignment_findings(
    corpus: Corpus, split: Split, channel: str, lengths: Any, found: Any
) -> Iterator[str]:
    what = f"The channel {channel} of {split}"
    if len(found) != len(lengths):
        yield f"{what} has {len(found):,} documents; the tokens have {len(lengths):,}."
        return
    different = np.flatnonzero(found != lengths).tolist()
    texts = [
        f"{what} has {int(found[i]):,} elements for the {int(lengths[i]):,} tokens of "
        f"{_name(corpus, split, i)}."
        for i in different[:_TOLD]
    ]
    yield from texts
    if len(different) > _TOLD:
        yield f"{what} differs in {len(different) - _TOLD:,} more documents."


def _id_findings(corpus: Corpus, split: Split, channel: str | None, count: int) -> Iterator[str]:
    """Yield what is wrong with the ids of a file: below 0, or `count` and more."""
    elements = read_elements(corpus.prefix(split, channel))
    wrong = 0
    first = None
    for start in range(0, len(elements), 1 << 22):
        piece = elements[start : start + (1 << 22)]
        places = np.flatnonzero((piece >= count) | (piece < 0))
        if len(places) and first is None:
            first = start + int(places[0])
        wrong += len(places)
    if first is not None:
        lengths = open_indexed(corpus.prefix(split, channel)).sequence_lengths
        document = int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), first, side="right"))
        what = "The tokens" if channel is None else f"The channel {channel}"
        ids = "1 id is" if wrong == 1 else f"{wrong:,} ids are"
        yield (
            f"{what} of {split}: {ids} out of range (0 to {count - 1}), the first, "
            f"{int(elements[first])}, in {_name(corpus, split, document)}."
        )


def _name(corpus: Corpus, split: Split, document: int) -> str:
    try:
        return f"document {document} ({corpus.documents(split)[document]})"
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return f"document {document}"


def _some(texts: list[str]) -> list[str]:
    more = [f"{len(texts) - _TOLD:,} more documents differ."] if len(texts) > _TOLD else []
    return texts[:_TOLD] + more

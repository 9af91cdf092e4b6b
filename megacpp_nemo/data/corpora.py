"""Several folders of `megacpp data build` as one body of data: what must agree between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data.blend import SPLITS, blend_entry, prefixes
from megacpp_nemo.data.cache import file_sha256
from megacpp_nemo.data.corpus import Corpus, open_folder
from megacpp_nemo.data.tokenizer import tokenizer_folder


def open_corpora(
    folders: Any, channels: Sequence[str], tokenizer_dir: str | None = None
) -> tuple[list[str], list[Corpus]]:
    """Open corpus folders and check that they can be trained on together.

    Args:
        folders: One folder, a list, or weights and folders in turn.
        channels: Structure channels that each must hold.
        tokenizer_dir: Folder of the tokenizer that made them; None is the first corpus' own.

    Returns:
        The folders as texts, weights included, and the corpora in the same order.

    Raises:
        DataError: No folder was given; one holds no corpus, a damaged one or one of another
            version; two were encoded with different tokenizers; or one lacks a channel.
    """
    if not folders:
        raise DataError(
            "No corpus was given to train on",
            allowed="folders that `megacpp data build` wrote; there is no default",
            hint="data.folders=/data/corpus, after megacpp data build SOURCES --out /data/corpus",
        )
    entry = blend_entry(folders)
    corpora = [open_folder(folder) for folder in prefixes(entry)]
    tokenizer = corpora[0].tokenizer_dir
    if tokenizer_dir is not None:
        tokenizer = tokenizer_folder(tokenizer_dir, ("tokenizer.json",))
    for corpus in corpora:
        _check_tokenizer(tokenizer, corpus)
        _check_channels(corpus, channels)
    return entry, corpora


def corpus_paths(entry: Sequence[str], corpora: Sequence[Corpus]) -> dict[str, list[str]]:
    """Return the path prefixes by split, weights included; validation data serves as test data.

    Args:
        entry: As `open_corpora` returns it.
        corpora: Likewise.
    """
    weighted = len(entry) > len(corpora)
    paths = {}
    for split in SPLITS:
        files = [str(c.train_prefix if split == "train" else c.validation_prefix) for c in corpora]
        if weighted:
            files = [text for pair in zip(entry[::2], files, strict=True) for text in pair]
        paths[split] = files
    return paths


def _check_tokenizer(tokenizer: Path, corpus: Corpus) -> None:
    wanted, own = file_sha256(tokenizer / "tokenizer.json"), corpus.manifest["tokenizer"]["sha256"]
    if wanted != own:
        raise DataError(
            "A corpus was encoded with another tokenizer",
            given=f"{corpus.folder}: {own[:12]}..., {tokenizer}: {wanted[:12]}...",
            allowed="corpora of one and the same tokenizer, the model's",
            hint=f"build it again: megacpp data build SOURCES --out DIR --tokenizer {tokenizer}",
        )


def _check_channels(corpus: Corpus, channels: Sequence[str]) -> None:
    if missing := [name for name in channels if name not in corpus.channels]:
        raise DataError(
            f"The corpus lacks structure channels: {', '.join(missing)}",
            given=f"{corpus.folder} with {', '.join(corpus.channels) or 'no channels'}",
            allowed=f"a corpus with {', '.join(channels)}",
            hint="build it again with all channels, megacpp data build SOURCES --out DIR, "
            "or data.structure=None",
        )

"""Write the files of a corpus: tokenizer first, then both splits as Megatron indexed files.

The tokenizer is trained on the training files, or one that is already there is taken over.

Neither the texts nor the tokens of a corpus are ever all in memory: files are read again, a
batch at a time, for training the tokenizer and for encoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megacpp_nemo.data.cache import file_sha256
from megacpp_nemo.data.sources import SourceFile, SourceScan, read_source
from megacpp_nemo.data.split import split_files
from megacpp_nemo.data.tokenizer import (
    EOD_ID,
    copy_tokenizer,
    encode_documents,
    load_trained,
    save_tokenizer,
    train_tokenizer,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tqdm import tqdm

# Source text encoded at a time: enough to keep every core busy, little beside the process.
_BATCH_BYTES = 4 << 20


def write_corpus(
    scan: SourceScan,
    folder: Path,
    *,
    vocab_size: int,
    tokenizer_dir: Path | None,
    validation_fraction: float,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """Write all files but the manifest into `folder` and return the facts about them.

    The same scan and settings give the same bytes. Cleaning up after an error is the caller's.

    Raises:
        DataError: Fewer than two files, a file changed since the scan, or the tokenizer of
            `tokenizer_dir` is not usable.
    """
    from tqdm import tqdm

    training, validation = split_files(scan.files, validation_fraction, seed)
    trained_bytes = sum(file.size_bytes for file in training) if tokenizer_dir is None else 0
    with tqdm(
        total=trained_bytes + scan.total_bytes,
        desc="building the corpus: the tokenizer",
        unit="B",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        if tokenizer_dir is None:
            tokenizer, end_id = train_tokenizer(_texts(scan, training, bar), vocab_size), EOD_ID
            save_tokenizer(tokenizer, folder / "tokenizer")
        else:
            tokenizer, end_id = load_trained(tokenizer_dir)
            copy_tokenizer(tokenizer_dir, folder / "tokenizer")
        splits = {}
        for name, files in (("train", training), ("validation", validation)):
            bar.set_description(f"building the corpus: encoding {name}")
            splits[name] = _write_split(scan, files, tokenizer, end_id, folder / name, bar)
    return {
        "splits": splits,
        "tokenizer": {
            "vocab_size": tokenizer.get_vocab_size(),
            "sha256": file_sha256(folder / "tokenizer" / "tokenizer.json"),
            "library_version": metadata.version("tokenizers"),
        },
    }


def estimated_bytes(scan: SourceScan) -> int:
    """Return about how many bytes a corpus of this scan takes, erring on the large side.

    Source code has more than two bytes per token and a token takes two (four in a vocabulary
    beyond 16 bits), so the text's own size covers the tokens; 20 bytes index a document.
    """
    return scan.total_bytes + 20 * len(scan.files) + (2 << 20)


def _write_split(
    scan: SourceScan,
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    end_id: int,
    prefix: Path,
    bar: tqdm,
) -> dict[str, int]:
    """Write one split and return its counts."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    # The dtype Megatron's own tools choose: uint16 while the vocabulary fits.
    dtype = DType.optimal_dtype(tokenizer.get_vocab_size())
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    tokens = 0
    try:
        for batch in _batches(files):
            for ids in encode_documents(tokenizer, list(_texts(scan, batch, bar)), end_id):
                builder.add_document(np.asarray(ids, dtype=dtype), [len(ids)])
                tokens += len(ids)
        builder.finalize(f"{prefix}.idx")
    except BaseException:
        # Closing flushes, which fails again on a full disk; the first error is the one to tell.
        with suppress(OSError):
            builder.data_file.close()
        raise
    return {
        "files": len(files),
        "documents": len(files),
        "source_bytes": sum(file.size_bytes for file in files),
        "tokens": tokens,
    }


def _texts(scan: SourceScan, files: Sequence[SourceFile], bar: tqdm) -> Iterator[str]:
    for file in files:
        yield read_source(scan, file)
        bar.update(file.size_bytes)


def _batches(files: Sequence[SourceFile]) -> Iterator[list[SourceFile]]:
    batch: list[SourceFile] = []
    size_bytes = 0
    for file in files:
        batch.append(file)
        size_bytes += file.size_bytes
        if size_bytes >= _BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch

"""The facts of Megatron indexed files (`PREFIX.bin`, `PREFIX.idx`), checked before training.

- `open_indexed`: the facts of one file
- `read_elements`: what one file holds
- `fingerprint`: a name for the present content of files

Megatron meets a damaged or missing file with an assertion, and an empty split with an endless
loop; reading the header first turns both into errors a user can act on.

Layout of the index, as `megatron.core.datasets.indexed_dataset._IndexWriter` writes it: magic
(9 bytes), version (8), token dtype code (1), sequence count (8), document count (8), then the
int32 sequence lengths, the int64 byte offsets and the int64 document ends.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megacpp_nemo.contract.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# By the code that stands for them in an index; Megatron's two floating-point types hold no ids.
TOKEN_TYPES = {
    code: np.dtype(dtype)
    for code, dtype in {
        1: np.uint8,
        2: np.int8,
        3: np.int16,
        4: np.int32,
        5: np.int64,
        8: np.uint16,
    }.items()
}


@dataclass(frozen=True, kw_only=True)
class IndexedFile:
    """One indexed file.

    Args:
        prefix: Path without `.bin` or `.idx`.
        sequence_lengths: Tokens of each sequence (a document, for Megatron's GPT data), int32
            [sequences], mapped from the file.
    """

    prefix: str
    sequence_lengths: npt.NDArray[np.int32]

    def tokens(self, first: float = 0.0, last: float = 1.0) -> int:
        """Return the tokens of the sequences from share `first` to share `last` of the file.

        The borders are rounded as Megatron's dataset builder rounds them.
        """
        count = len(self.sequence_lengths)
        share = self.sequence_lengths[round(first * count) : round(last * count)]
        return int(share.sum(dtype=np.int64))


def open_indexed(prefix: str | os.PathLike[str]) -> IndexedFile:
    """Check both files of `prefix` and return what they hold; tokens are not read.

    Raises:
        DataError: A file is missing (each missing name is given), is not a Megatron indexed
            file, or has another size than its header says.
    """
    prefix = os.fspath(prefix)
    bin_path, idx_path = Path(prefix + ".bin"), Path(prefix + ".idx")
    missing = [str(path) for path in (bin_path, idx_path) if not path.is_file()]
    if missing:
        raise DataError(
            "Indexed data files are missing",
            given=", ".join(missing),
            allowed="a path prefix with both PREFIX.bin and PREFIX.idx",
            hint="give the prefix without .bin or .idx, or make the files with Megatron's "
            "tools/preprocess_data.py",
        )
    try:
        return _read(prefix, bin_path, idx_path)
    except OSError as error:
        raise DataError("An indexed data file cannot be read", given=str(error)) from error


def read_elements(prefix: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """Return all elements of a file laid end to end, mapped from it, [sum of lengths].

    Raises:
        DataError: As `open_indexed` says.
    """
    open_indexed(prefix)
    with open(f"{os.fspath(prefix)}.idx", "rb") as stream:
        code = HEADER.unpack(stream.read(HEADER.size))[2]
    path = Path(f"{os.fspath(prefix)}.bin")
    if not path.stat().st_size:
        return np.empty(0, TOKEN_TYPES[code])
    return np.memmap(path, dtype=TOKEN_TYPES[code], mode="r")


def fingerprint(prefixes: list[str]) -> str:
    """Return a short name for the present content of these files, from sizes and times.

    Megatron names cached sample orders by path alone; a folder named by this keeps a rewritten
    file from being read through the order of the old one.
    """
    digest = hashlib.sha256()
    for prefix in prefixes:
        for suffix in (".bin", ".idx"):
            path = Path(prefix + suffix).absolute()
            stat = path.stat()
            digest.update(os.fsencode(path) + struct.pack("<2q", stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()[:32]


def _read(prefix: str, bin_path: Path, idx_path: Path) -> IndexedFile:
    with idx_path.open("rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size or header[:9] != MAGIC:
        raise _damaged(idx_path, "it does not start as a Megatron index does")
    _, version, code, sequences, documents = HEADER.unpack(header)
    if version != 1 or code not in TOKEN_TYPES:
        raise _damaged(idx_path, f"unknown version {version} or token type code {code}")
    arrays_bytes = 12 * sequences + 8 * documents
    # One more byte for each sequence holds the modality in multimodal files.
    allowed = (HEADER.size + arrays_bytes, HEADER.size + arrays_bytes + sequences)
    if idx_path.stat().st_size not in allowed:
        raise _damaged(idx_path, f"{idx_path.stat().st_size:,} bytes instead of {allowed[0]:,}")
    lengths: npt.NDArray[np.int32] = np.empty(0, dtype=np.int32)
    if sequences:
        lengths = np.memmap(
            idx_path, dtype=np.int32, mode="r", offset=HEADER.size, shape=(sequences,)
        )
    needed = int(lengths.sum(dtype=np.int64)) * TOKEN_TYPES[code].itemsize
    if bin_path.stat().st_size != needed:
        raise _damaged(bin_path, f"{bin_path.stat().st_size:,} bytes instead of {needed:,}")
    return IndexedFile(prefix=prefix, sequence_lengths=lengths)


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        "An indexed data file is damaged or incomplete",
        given=f"{path}: {why}",
        allowed="a .bin and .idx pair as Megatron's IndexedDatasetBuilder writes it",
        hint="make or copy the pair again",
    )

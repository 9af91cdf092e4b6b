"""The facts of a Megatron indexed file (`PREFIX.bin`, `PREFIX.idx`), checked before training.

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

import numpy as np
import numpy.typing as npt

from megacpp_nemo.contract.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}


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
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or header[:9] != _MAGIC:
        raise _damaged(idx_path, "it does not start as a Megatron index does")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != 1 or code not in _TOKEN_BYTES:
        raise _damaged(idx_path, f"unknown version {version} or token type code {code}")
    arrays_bytes = 12 * sequences + 8 * documents
    # One more byte for each sequence holds the modality in multimodal files.
    allowed = (_HEADER.size + arrays_bytes, _HEADER.size + arrays_bytes + sequences)
    if idx_path.stat().st_size not in allowed:
        raise _damaged(idx_path, f"{idx_path.stat().st_size:,} bytes instead of {allowed[0]:,}")
    lengths: npt.NDArray[np.int32] = np.empty(0, dtype=np.int32)
    if sequences:
        lengths = np.memmap(
            idx_path, dtype=np.int32, mode="r", offset=_HEADER.size, shape=(sequences,)
        )
    needed = int(lengths.sum(dtype=np.int64)) * _TOKEN_BYTES[code]
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

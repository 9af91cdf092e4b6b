"""Structure channels beside the tokens: `PREFIX.CHANNEL.bin` and `.idx` for `PREFIX.bin`.

Each is a Megatron indexed file with one id for each token of `PREFIX`: 0 to n - 1 are values and
n is "absent", n being the channel's size in `contract.structure`. All are memory-mapped.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
from megacpp_nemo.data.indexed import open_indexed
from megacpp_nemo.data.pieces import Indices, Span, read_spans


class Channel:
    """One channel's file, open for reading.

    Args:
        name: Key of `STRUCTURE_CHANNELS`.
        prefix: Path prefix of the tokens it belongs to.
    """

    def __init__(self, name: str, prefix: str) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.name, self.absent = name, STRUCTURE_CHANNELS[name]
        self.prefix = channel_prefix(prefix, name)
        self.indexed: Any = IndexedDataset(self.prefix)

    def read(self, spans: Sequence[Span], length: int) -> Indices:
        """Return the ids of a row [length]: absent where nothing of a document stands.

        Raises:
            DataError: An id is not one of the channel's.
        """
        ids = np.full(length, self.absent, dtype=np.int64)
        read_spans(self.indexed, spans, (self.absent,) * 3, ids)
        if ids.min() < 0 or ids.max() > self.absent:
            wrong = ids[(ids < 0) | (ids > self.absent)]
            raise DataError(
                f"The structure channel {self.name} holds an id that it does not have",
                given=f"{self.prefix}.bin: {int(wrong[0])}",
                allowed=f"0 to {self.absent - 1}, and {self.absent} for absent",
                hint="build the channel files again: megacpp data build",
            )
        return ids


def channel_prefix(prefix: str | os.PathLike[str], name: str) -> str:
    """Return the path prefix of a channel's files, given that of the tokens."""
    return f"{os.fspath(prefix)}.{name}"


def open_channels(prefix: str, names: Iterable[str]) -> tuple[Channel, ...]:
    """Open channels of the tokens at `prefix`, checked as by `check_channels`."""
    names = tuple(names)
    check_channels(prefix, names)
    return tuple(Channel(name, prefix) for name in names)


def check_channels(prefix: str, names: Sequence[str]) -> None:
    """Check that channels are beside the tokens and fit them; only the indices are read.

    Raises:
        DataError: Channels are missing (all are named), one is damaged, or it has another number
            of sequences than the tokens, or one of another length.
    """
    missing = [name for name in names if not _is_there(channel_prefix(prefix, name))]
    if missing:
        raise DataError(
            f"Structure channels are missing beside the tokens: {', '.join(missing)}",
            given=f"the channels {', '.join(names)} of {prefix}",
            allowed=f"{channel_prefix(prefix, missing[0])}.bin and .idx, and so for each channel",
            hint="data.structure=None, or build tokens and channels together with "
            "`megacpp data build FOLDER --out DIR`",
        )
    tokens = open_indexed(prefix).sequence_lengths
    for name in names:
        path = channel_prefix(prefix, name)
        wrong = misaligned(tokens, open_indexed(path).sequence_lengths)
        if wrong:
            raise DataError(
                f"The structure channel {name} does not fit its tokens",
                given=f"{path}: {wrong}",
                allowed="one id for each token, in the same sequences",
                hint="build or copy the whole corpus again, or leave the channel out",
            )


def misaligned(tokens: npt.NDArray[np.int32], channel: npt.NDArray[np.int32]) -> str | None:
    """Return how the lengths of a channel's sequences differ from the tokens', or None."""
    if len(channel) != len(tokens):
        return f"{len(channel):,} sequences, the tokens have {len(tokens):,}"
    different = np.flatnonzero(channel != tokens)
    if not different.size:
        return None
    first = int(different[0])
    return (
        f"sequence {first:,} has {channel[first]:,} ids for {tokens[first]:,} tokens"
        f" ({different.size:,} of {len(tokens):,} sequences differ)"
    )


def _is_there(prefix: str) -> bool:
    return all(Path(prefix + suffix).is_file() for suffix in (".bin", ".idx"))

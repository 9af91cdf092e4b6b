"""Write Megatron indexed files without importing Megatron.

The bytes are those of `megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder`, whose
import takes seconds and hundreds of megabytes of a process that only writes integers. Reading is
`megacpp_nemo.data.indexed`, where the layout is described.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megacpp_nemo.data.indexed import HEADER, MAGIC, TOKEN_TYPES


def token_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """Return the type that Megatron's own tools choose: 16 bits while the vocabulary fits."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


class IndexedWriter:
    """One `.bin` and `.idx` pair, each sequence a document. A context: closing it ends the pair.

    Args:
        prefix: Path without `.bin` or `.idx`; both are overwritten.
        dtype: Type of an element on disk, one that Megatron knows.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike) -> None:
        self._prefix, self._dtype = prefix, np.dtype(dtype)
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._data = open(f"{prefix}.bin", "wb")  # noqa: SIM115 - closed by the context

    def add(self, elements: npt.NDArray[np.generic], lengths: npt.NDArray[np.generic]) -> None:
        """Append documents laid end to end.

        Args:
            elements: All elements, [sum of lengths].
            lengths: Elements of each document, [documents].
        """
        self._data.write(np.ascontiguousarray(elements, dtype=self._dtype).data)
        self._lengths.append(np.asarray(lengths, dtype=np.int32))

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            # Closing flushes, which fails again on a full disk; the first error is the one to
            # tell.
            with suppress(OSError):
                self._data.close()
            return
        self._data.close()
        self._write_index()

    def _write_index(self) -> None:
        lengths = np.concatenate([np.empty(0, np.int32), *self._lengths])
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        documents = np.arange(len(lengths) + 1, dtype=np.int64)
        code = next(code for code, dtype in TOKEN_TYPES.items() if dtype == self._dtype)
        with open(f"{self._prefix}.idx", "wb") as stream:
            stream.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(documents)))
            for array in (lengths, np.concatenate([[0], ends])[: len(lengths)], documents):
                stream.write(np.ascontiguousarray(array).data)

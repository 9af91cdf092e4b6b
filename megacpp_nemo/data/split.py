"""Divide files between training and validation so that the division holds as files come and go."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data.sources import SourceFile


def split_files(
    files: Sequence[SourceFile], validation_fraction: float, seed: int
) -> tuple[list[SourceFile], list[SourceFile]]:
    """Return (training, validation) files, each in the given order.

    A file's side depends on its relative path and the seed alone, so adding or removing files
    moves no other. The one exception keeps both sides non-empty: when all files fall on one
    side, the file nearest to the border changes over.

    Args:
        files: At least two usable files.
        validation_fraction: Expected share of files, strictly between 0 and 1.
        seed: Chooses the division.

    Raises:
        DataError: The fraction is out of range, or there are fewer than two files.
    """
    check_validation_fraction(validation_fraction)
    if len(files) < 2:
        raise DataError(
            "One source file cannot be divided into training and validation",
            given=[file.path for file in files],
            allowed="at least two usable files",
            hint="split the file, or add one",
        )
    position = {file.path: _position(file.path, seed) for file in files}
    validation = {path for path, where in position.items() if where < validation_fraction}
    if not validation:
        validation.add(min(position, key=position.__getitem__))
    elif len(validation) == len(files):
        validation.discard(max(position, key=position.__getitem__))
    return (
        [file for file in files if file.path not in validation],
        [file for file in files if file.path in validation],
    )


def check_validation_fraction(validation_fraction: float) -> None:
    """Raise DataError unless the fraction lies strictly between 0 and 1."""
    if not 0.0 < validation_fraction < 1.0:
        raise DataError(
            "The validation share is out of range",
            given=validation_fraction,
            allowed="a number strictly between 0 and 1",
            hint="validation_fraction=0.05 holds back one file in twenty",
        )


def _position(path: str, seed: int) -> float:
    """Return the fixed place of a path in [0, 1)."""
    digest = hashlib.sha256(f"{seed}\0{path}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64

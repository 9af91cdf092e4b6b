"""Paths of indexed files in the forms NeMo takes, checked and in one shape.

NeMo accepts a prefix, a list of prefixes, a list of weights and prefixes in turn, and a
dictionary of these for each split, and meets a slip in any of them with an assertion.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import Any

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data.indexed import IndexedFile, open_indexed

SPLITS = ("train", "validation", "test")
Blend = list[str] | dict[str, list[str]]


def normalized_paths(paths: Any) -> Blend:
    """Return `paths` as a list of texts, or as a dictionary of such lists for all three splits.

    Raises:
        DataError: Nothing was given, a split is missing or unknown, or weights and paths do not
            alternate.
    """
    if not paths:
        raise DataError(
            "No data was given to train on",
            allowed="the path prefix of Megatron indexed files; there is no default",
            hint="data.paths=/data/cpp_text_document for /data/cpp_text_document.bin and .idx",
        )
    if not isinstance(paths, dict):
        return blend_entry(paths)
    unknown = sorted(set(map(str, paths)) - set(SPLITS))
    missing = [name for name in SPLITS[:2] if not paths.get(name)]
    if unknown or missing:
        raise DataError(
            "Data paths by split need the names of the splits",
            given=sorted(map(str, paths)),
            allowed="train and validation, and optionally test",
        )
    return {name: blend_entry(paths.get(name) or paths["validation"]) for name in SPLITS}


def blend_tokens(blend: Blend, split: str, seq_length: int) -> tuple[dict[str, int], list[str]]:
    """Open every file and return the tokens of each split, and all path prefixes.

    Raises:
        DataError: A file is missing or damaged, `split` cannot be read, or one file's part of a
            split is shorter than one row (Megatron would then repeat it without end).
    """
    if isinstance(blend, dict):
        parts = {name: [(prefix, 0.0, 1.0) for prefix in prefixes(blend[name])] for name in SPLITS}
    else:
        shares = _shares(split)
        parts = {
            name: [(prefix, *share) for prefix in prefixes(blend)] if share else []
            for name, share in zip(SPLITS, shares, strict=True)
        }
    opened: dict[str, IndexedFile] = {}
    totals = dict.fromkeys(SPLITS, 0)
    for name, entries in parts.items():
        for prefix, first, last in entries:
            file = opened.setdefault(prefix, open_indexed(prefix))
            tokens = file.tokens(first, last)
            if tokens <= seq_length:
                raise _too_short(name, prefix, tokens, seq_length)
            totals[name] += tokens
    return totals, sorted(opened)


def blend_entry(paths: Any) -> list[str]:
    """Return one split's paths as texts, weights included.

    Raises:
        DataError: Weights and paths do not alternate, or a weight is not above 0.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    if not isinstance(paths, list | tuple):
        raise DataError("Data paths have a form that is not known", given=paths, allowed=_FORMS)
    entry = [str(path).strip() for path in paths]
    numbers = [_is_number(text) for text in entry]
    if any(numbers) and numbers != [True, False] * (len(entry) // 2):
        raise DataError(
            "Weights and data paths do not alternate",
            given=entry,
            allowed=_FORMS,
            hint="write a path that looks like a number as ./30",
        )
    if any(numbers) and not all(0 < float(weight) < math.inf for weight in entry[::2]):
        raise DataError("A data weight is out of range", given=entry, allowed="numbers above 0")
    return entry


_FORMS = "PREFIX, [PREFIX, PREFIX, ...] or [WEIGHT, PREFIX, WEIGHT, PREFIX, ...]"


def prefixes(entry: Sequence[str]) -> list[str]:
    """Return the paths of what `blend_entry` returns, without the weights."""
    return list(entry[1::2] if _is_number(entry[0]) else entry)


def _shares(split: str) -> list[tuple[float, float] | None]:
    """Return the borders of each split as Megatron computes them; None for an empty split."""
    number = r"\d+(?:\.\d*)?|\.\d+"
    if not re.fullmatch(rf"\s*(?:{number})(?:\s*,\s*(?:{number})){{1,2}}\s*", str(split)):
        raise _bad_split(split)
    if min(float(share) for share in str(split).split(",")[:2]) <= 0:
        raise _bad_split(split)
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    shares: list[tuple[float, float] | None] = convert_split_vector_to_split_matrix(
        parse_and_normalize_split(str(split))
    )
    return shares


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _bad_split(split: object) -> DataError:
    return DataError(
        "The split cannot be read",
        given=split,
        allowed="two or three shares, training and validation above 0",
        hint="split='95,5,0', or give paths by split: {'train': ..., 'validation': ...}",
    )


def _too_short(name: str, prefix: str, tokens: int, seq_length: int) -> DataError:
    return DataError(
        f"The {name} data is shorter than one row",
        given=f"{prefix}: {tokens:,} tokens",
        allowed=f"at least {seq_length + 1:,} tokens (seq_length and one more)",
        hint="lower seq_length, change the split, or give paths by split",
    )

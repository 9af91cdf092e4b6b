"""What the commands of `megacpp data` share: places they read, and errors in a shell's words."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from megacpp_nemo.cli.output import native_path
from megacpp_nemo.cli.usage import UsageError
from megacpp_nemo.contract.errors import DataError

# What Python calls `CorpusSpec(vocab_size=4096)` is `--vocab-size 4096` here.
_NAMES = "vocab_size|validation_fraction|seed|exclude|workers|structure"
_KEYWORD = re.compile(rf"(?<![\w.-])({_NAMES})=('?)([^\s,']*)\2")
_WORDS = {
    "set data.tokenizer_dir to": "--tokenizer with",
    "set cache_dir to": "--out in",
    "set the output folder (--out) to": "--out in",
}
MANIFEST = "manifest.json"


def source_folder(text: str) -> Path:
    """Return the folder of sources that a word names.

    Raises:
        DataError: If it is no folder that can be listed.
    """
    return _folder(text, "The folder of sources", "a folder with C++ sources")


def corpus_folder(text: str) -> Path:
    """Return the folder of a corpus that a word names.

    Raises:
        DataError: If it is no folder, or not one of a corpus.
    """
    folder = _folder(text, "The folder of a corpus", "a folder that `megacpp data build` made")
    if not (folder / MANIFEST).is_file():
        raise DataError(
            "This folder holds no corpus",
            given=f"{folder}: no {MANIFEST}",
            allowed="a folder that `megacpp data build` made, whole",
            hint=f"megacpp data build FOLDER --out {folder}",
        )
    return folder


def source_file(text: str) -> tuple[Path, bytes]:
    """Return the source file that a word names, and what is in it.

    Raises:
        DataError: If it cannot be read, is empty, or is no UTF-8 text.
    """
    path = Path(native_path(text)).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unusable(path, _reason(error)) from None
    if not content:
        raise _unusable(path, "it is empty")
    if b"\0" in content:
        raise _unusable(path, f"byte {content.index(0):,} is 0, as in no text")
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = f"iconv -f LATIN1 -t UTF-8 {path.name}, if that is its encoding"
        given = f"byte {error.start:,} is {content[error.start]:#04x}, which is not UTF-8 there"
        raise _unusable(path, given, hint) from None
    return path, content


@contextlib.contextmanager
def in_options() -> Iterator[None]:
    """Say what is refused with options where Python has keywords.

    Raises:
        DataError: What was refused.
    """
    try:
        yield
    except DataError as error:
        parts = (error.given, error.allowed, error.hint)
        given, allowed, hint = (None if part is None else _as_options(part) for part in parts)
        raise type(error)(error.what, given=given, allowed=allowed, hint=hint) from None


def share(option: str, text: str) -> float:
    """Return the share that an option was given.

    Raises:
        UsageError: If it is no number between 0 and 1.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if 0 < value < 1:
        return value
    allowed = "a number above 0 and below 1"
    raise UsageError(
        f"{option} takes {allowed}",
        given=f"{option} {text!r}",
        allowed=allowed,
        hint=f"{option} 0.05",
    )


def _as_options(part: object) -> str:
    text = part if isinstance(part, str) else repr(part)
    for code, word in _WORDS.items():
        text = text.replace(code, word)
    return _KEYWORD.sub(lambda found: f"--{found[1].replace('_', '-')} {found[3]}", text)


def _folder(text: str, what: str, allowed: str) -> Path:
    path = Path(native_path(text)).expanduser()
    try:
        next(os.scandir(path), None)
    except OSError as error:
        raise DataError(
            f"{what} cannot be read",
            given=f"{path}: {_reason(error)}",
            allowed=allowed,
            hint="another folder",
        ) from None
    return path


def _unusable(path: Path, why: str, hint: str = "another file") -> DataError:
    return DataError(
        "The source file cannot be read as text",
        given=f"{path}: {why}",
        allowed="a file of UTF-8 text",
        hint=hint,
    )


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()

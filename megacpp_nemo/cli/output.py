"""Text on its way out: to standard output, or into a file, whole or not at all.

Inside, text is what UTF-8 makes of the bytes a user typed, in every locale; bytes that are no
UTF-8 are kept. So what is written does not depend on the locale either.
"""

from __future__ import annotations

import os
import stat
import sys
from typing import Any

from megacpp_nemo.cli.screen import Screen, visible
from megacpp_nemo.contract.errors import MegaCppError


class OutputError(MegaCppError):
    """A place that the output cannot be written to."""


class OutputLost(Exception):  # noqa: N818 - nothing is wrong: the reader has seen enough
    """Whoever read the output has closed it, as `| head` does."""


def received(word: str) -> str:
    """Return an argument of the process as UTF-8 reads its bytes, whatever the locale."""
    return os.fsencode(word).decode("utf-8", "surrogateescape")


def native_path(text: str) -> str:
    """Return text of `received` as the path that the system's own calls take."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def write(
    text: str | bytes,
    *,
    screen: Screen,
    out: str | None = None,
    exact: bool = False,
    executable: bool = False,
) -> None:
    """Write text to the file `out`, or to standard output.

    Args:
        text: What to write; bytes, of a picture, are written as they are.
        screen: How standard output draws.
        out: File; None for standard output.
        exact: Whether the bytes must be the same everywhere; other text shows its control
            characters, and is drawn in ASCII where standard output takes no more.
        executable: Whether a file may be run.

    Raises:
        OutputError: If the file, or standard output, cannot be written.
        OutputLost: If nobody reads standard output any more.
    """
    if isinstance(text, bytes):
        data = printed = text
    else:
        text = text if exact else visible(text, painted=screen.color)
        data = printed = text.encode("utf-8", "surrogateescape")
        if not exact and not screen.unicode:
            printed = text.encode("ascii", "backslashreplace")
    if out is not None:
        _replace(out, data, 0o777 if executable else 0o666)
    else:
        _print(printed)


def say(line: str) -> None:
    """Write a line to standard error; nothing happens if there is none."""
    if sys.stderr is not None:
        try:
            print(line, file=sys.stderr, flush=True)
        except (OSError, ValueError):
            _give_up(sys.stderr)


def _print(data: bytes) -> None:
    stream = sys.stdout
    if stream is None:
        raise OutputError(
            "There is no standard output to write to",
            given="a closed standard output",
            allowed="an open one, or a file",
            hint="--out FILE",
        )
    try:
        if hasattr(stream, "buffer"):
            stream.flush()
            stream.buffer.write(data)
        else:
            stream.write(data.decode("utf-8", "replace"))
        stream.flush()
    except BrokenPipeError:
        _give_up(stream)
        raise OutputLost from None
    except OSError as error:
        _give_up(stream)
        raise OutputError(
            "Standard output cannot be written",
            given=error.strerror,
            allowed="a terminal, a pipe or a file with room",
            hint="--out FILE in another folder",
        ) from None


def _give_up(stream: Any) -> None:
    """Let what is still in a stream's buffer go nowhere, so that Python ends without a word."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):
        return


def _replace(out: str, data: bytes, mode: int) -> None:
    """Write a file beside `out` and put it in its place."""
    # A link stays a link: the file it leads to is replaced.
    target = os.path.realpath(native_path(out))
    part = f"{target}.{os.getpid()}.part"
    try:
        _refuse_unlike_files(out, target)
        made = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with open(made, "wb") as file:
                file.write(data)
            os.replace(part, target)
        except BaseException:
            os.unlink(part)
            raise
    except OSError as error:
        raise _unwritable(out, (error.strerror or str(error)).lower()) from None


def _refuse_unlike_files(out: str, target: str) -> None:
    if out.endswith("/") and not os.path.isdir(target):
        raise _unwritable(out, "names a folder, and there is none", f"--out {out.rstrip('/')}")
    if not os.path.exists(target):
        return
    if os.path.isdir(target):
        raise _unwritable(out, "is a folder", hint=f"--out {out.rstrip('/')}/NAME")
    if not stat.S_ISREG(os.stat(target).st_mode):
        raise _unwritable(out, "is not an ordinary file", hint="no --out, and a redirection")


def _unwritable(out: str, why: str, hint: str = "--out FILE in such a folder") -> OutputError:
    return OutputError(
        "The output file cannot be written",
        given=f"{native_path(out)}: {why}",
        allowed="a file, new or to be replaced, in a folder that exists and can be written",
        hint=hint,
    )

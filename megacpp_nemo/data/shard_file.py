"""One shard of a corpus on disk: arrays and plain data in one file that is whole or not taken.

Layout: the hex sha256 of all that follows and a line end; a line of JSON with the identity of the
build, the facts, and name, type and length of each array; the arrays' bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

_DIGEST_BYTES = 64


class ShardError(Exception):
    """A shard that is not there, not whole or not of this build; the message says which."""


@dataclass(frozen=True, kw_only=True)
class ShardContent:
    """What a shard holds: `facts`, plain data, and one-dimensional `arrays` by name."""

    facts: Any
    arrays: Mapping[str, npt.NDArray[Any]]


def write_shard(path: Path, identity: str, content: ShardContent) -> None:
    """Write a shard so that `path` holds the whole of it or nothing, at any moment.

    Args:
        path: Where to; its folder must be there.
        identity: Names all that decides the content; `read_shard` asks for it again.
        content: Facts that JSON can hold, and arrays of one dimension.
    """
    listing = [(name, array.dtype.str, len(array)) for name, array in content.arrays.items()]
    header = {"identity": identity, "facts": content.facts, "arrays": listing}
    pieces = [
        (json.dumps(header, separators=(",", ":")) + "\n").encode(),
        *(np.ascontiguousarray(array).tobytes() for array in content.arrays.values()),
    ]
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    write_whole(path, [digest.hexdigest().encode() + b"\n", *pieces])


def read_shard(path: Path, identity: str) -> ShardContent:
    """Return what `write_shard` wrote, every byte checked.

    Raises:
        ShardError: There is no such shard, it is damaged, or it is of another build.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path.name} cannot be read ({error})") from error
    body = memoryview(content)[_DIGEST_BYTES + 1 :]
    if content[:_DIGEST_BYTES] != hashlib.sha256(body).hexdigest().encode():
        raise ShardError(f"{path.name} does not match its checksum")
    end = content.index(b"\n", _DIGEST_BYTES + 1)
    header = _header(content[_DIGEST_BYTES + 1 : end], identity, path)
    arrays, start = {}, end + 1
    for name, dtype, count in header["arrays"]:
        arrays[name] = np.frombuffer(content, dtype, count, start)
        start += arrays[name].nbytes
    return ShardContent(facts=header["facts"], arrays=arrays)


def read_facts(path: Path, identity: str) -> Any:
    """Return the facts alone, without reading the arrays; their checksum is not checked.

    Raises:
        ShardError: There is no such shard, or it is of another build.
    """
    try:
        with path.open("rb") as stream:
            stream.seek(_DIGEST_BYTES + 1)
            return _header(stream.readline(), identity, path)["facts"]
    except OSError as error:
        raise ShardError(f"{path.name} cannot be read ({error})") from error


def write_whole(path: Path, pieces: list[bytes]) -> None:
    """Write a file under a temporary name and give it its own once it is complete.

    The temporary name is the process's own, so two writers of one file never mix.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as stream:
            stream.writelines(pieces)
            _flush(stream)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _flush(stream: IO[bytes]) -> None:
    # A name that reaches the disk before its content would survive a power cut, empty.
    stream.flush()
    os.fsync(stream.fileno())


def _header(line: bytes, identity: str, path: Path) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(line)
        found = header["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path.name} cannot be read ({error})") from error
    if found != identity:
        raise ShardError(f"{path.name} is of another build")
    return header

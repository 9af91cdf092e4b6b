"""Folders in a cache that are either complete and verified, or not there.

- `cache_root`: where the cache lives
- `locked`: one process at a time, across processes
- `staged_folder`: build in a temporary sibling, then appear at once under the final name
- `write_manifest`, `read_manifest`: what was built, with the size and hash of every file

A build that dies by any means leaves at most a temporary folder, which no reader looks at and
which the next build removes. Readers take no lock: they verify.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megacpp_nemo.contract.errors import DataError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_STAGING = ".building-"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class DamagedError(Exception):
    """A cached folder that is there but is not what was built; the message says why."""


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return `cache_dir`, or `megacpp_nemo` in the user's cache (`$XDG_CACHE_HOME`, `~/.cache`)."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "megacpp_nemo"


@contextmanager
def locked(root: Path, name: str, setting: str = "cache_dir") -> Iterator[None]:
    """Hold the lock `name` of the folder `root`, waiting for another holder without limit.

    The operating system frees the lock of a process that dies. `root` is made if it is not
    there, and again if the holder that was waited for removed it.

    Raises:
        DataError: `root` cannot be written; the hint names `setting`.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(root / f"{name}.lock")
    timeout = 0
    with disk_errors(root, needed_bytes=None, setting=setting):
        while not lock.is_locked:
            root.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=timeout)
            except Timeout:
                logger.warning("waiting for another process that is building in %s", root)
                timeout = -1
            except FileNotFoundError:
                continue
    try:
        yield
    finally:
        lock.release()


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `final` if the body succeeds.

    To be used under `locked`: temporary folders found beside `final` then belong to builds that
    died, and are removed. A folder already at `final` is replaced.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for stale in final.parent.glob(f"{_STAGING}*"):
        shutil.rmtree(stale, ignore_errors=True)
    staging = final.parent / f"{_STAGING}{secrets.token_hex(8)}"
    staging.mkdir()
    try:
        yield staging
        if final.exists():
            os.replace(final, final.parent / f"{_STAGING}{secrets.token_hex(8)}-old")
        os.replace(staging, final)
    finally:
        for leftover in final.parent.glob(f"{_STAGING}*"):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def disk_errors(root: Path, needed_bytes: int | None, setting: str = "cache_dir") -> Iterator[None]:
    """Turn a full disk or an unwritable folder under `root` into a DataError.

    Args:
        root: The folder to name.
        needed_bytes: About how much the work needs, where that is known.
        setting: What the user sets to go elsewhere.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        code = _system_error_code(error)
        if code is None:
            raise
        if code in _NO_SPACE:
            raise DataError(
                "No space left for the corpus",
                given=str(root),
                allowed=None if needed_bytes is None else f"about {needed_bytes:,} bytes free",
                hint=f"free some space and run again, or set {setting} to another disk",
            ) from error
        raise DataError(
            "The corpus cannot be written",
            given=f"{root}: {error}",
            allowed="a folder this user may write to, on a file system with locks",
            hint=f"set {setting} to another folder",
        ) from error


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `facts` with the size and sha256 of every file in `folder`, sealed by a checksum."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {
            "size_bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in paths
    }
    manifest = {**facts, "files": files}
    manifest["checksum"] = _checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def read_manifest(
    folder: Path, hashed: Callable[[str], bool] = lambda name: True
) -> dict[str, Any]:
    """Return the manifest of `folder` after checking it and every file in it.

    Sizes are compared first and hashes after: the whole check reads the folder once, well under
    a second for a corpus of tens of MB.

    Args:
        folder: A folder with a manifest.
        hashed: Whether the content of a file is checked, by its name; sizes always are.

    Raises:
        DamagedError: The manifest or a file it names is not as it was written.
    """
    manifest = read_manifest_alone(folder)
    files = manifest["files"]
    for name, expected in files.items():
        check_size(folder / name, name, expected)
    for name, expected in files.items():
        if hashed(name):
            check_hash(folder / name, name, expected)
    return manifest


def read_manifest_alone(folder: Path) -> dict[str, Any]:
    """Return the manifest of `folder`; of the files in it nothing is looked at.

    Raises:
        DamagedError: The manifest is not as it was written.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        checksum = manifest.pop("checksum")
        manifest["files"] = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({error})") from error
    if checksum != _checksum(manifest):
        raise DamagedError(f"{MANIFEST} does not match its checksum")
    return manifest


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def check_size(path: Path, name: str, expected: Mapping[str, Any]) -> None:
    """Raise DamagedError unless the file has the size that the manifest gives it."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DamagedError(f"{name} is missing") from error
    if size != expected["size_bytes"]:
        raise DamagedError(f"{name} has {size:,} bytes instead of {expected['size_bytes']:,}")


def check_hash(path: Path, name: str, expected: Mapping[str, Any]) -> None:
    """Raise DamagedError unless the file has the content that the manifest gives it."""
    try:
        if file_sha256(path) == expected["sha256"]:
            return
    except OSError as error:
        raise DamagedError(f"{name} cannot be read ({error})") from error
    raise DamagedError(f"{name} does not match its hash")


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _system_error_code(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # Megatron wraps a failed write in a bare Exception.
    if isinstance(error.__cause__, OSError):
        return error.__cause__.errno
    # The tokenizers library reports a failed write as a bare Exception with the system's text.
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None

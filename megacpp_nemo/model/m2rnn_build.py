"""M2RNN's C code as a library of this machine: compiled at first use, then read from a cache.

A library is named by its source, the compiler with its target's macros and the head's width, so
that a cache shared by machines of different kinds serves each its own. It appears under its name
only when it is complete; processes that build it at once build the same.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("m2rnn_cpu.c")
HEADER = Path(__file__).with_name("m2rnn_lanes.h")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-shared",
    "-fPIC",
)
TIMEOUT_S = 120


class BuildError(Exception):
    """Why the library cannot be had on this machine."""


@functools.cache
def library(width: int) -> ctypes.CDLL | BuildError:
    """Return the library for heads of `width` values, or why there is none.

    The first call in a process reads the cache, in a few milliseconds; the first on a machine
    compiles, in about a second.
    """
    try:
        return _load(_compiler(), width)
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        lines = reason.strip().splitlines() or [type(error).__name__]
        return BuildError(next((line for line in lines if "error" in line), lines[-1]))


def _compiler() -> str:
    for name in COMPILERS:
        if found := shutil.which(name):
            return found
    raise BuildError(f"no C compiler ({', '.join(COMPILERS)}) on PATH")


def _load(compiler: str, width: int) -> ctypes.CDLL:
    macros = _run(compiler, *FLAGS, "-dM", "-E", "-x", "c", os.devnull)
    code = [path.read_text("utf-8") for path in (HEADER, SOURCE)]
    told = "\n".join([compiler, *FLAGS, str(width), macros, *code])
    name = f"m2rnn-{width}-{hashlib.sha256(told.encode()).hexdigest()[:20]}.so"
    path = _folder() / name
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            logger.warning("Building %s anew, which cannot be loaded: %s", path, error)
    staged = path.with_name(f".{name}.{secrets.token_hex(4)}")
    try:
        _run(compiler, *FLAGS, f"-DVALUES={width}", "-o", str(staged), str(SOURCE))
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    return ctypes.CDLL(str(path))


def _folder() -> Path:
    """Return the user's cache, or a folder of this process where that cannot be written."""
    from megacpp_nemo.data.cache import cache_root

    folder = cache_root() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="megacpp_nemo-"))


def _run(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S, errors="replace"
    )
    return done.stdout

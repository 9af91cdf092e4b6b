"""A Megatron-LM source tree read into a release.

    add_release("src/Megatron-LM", name="mine", out="mine.json")   # then release="mine.json"

The flags are those of the tree's own parser, built in a process of its own (`_dump_parser.py`),
so reading a tree runs its code. Symbols, separators, scripts and the stock spec are read off the
text of its files. What cannot be read is said in the `notes` of the release.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.lowering.release_data import inherited_rules, release_data, text_of
from megacpp_nemo.lowering.releases import RELEASE_NAMES, Release, from_data

DUMP = Path(__file__).with_name("_dump_parser.py")
PARSER = Path("megatron", "training", "arguments.py")
VERSION = Path("megatron", "core", "package_info.py")
SECONDS = 300
LAST_LINES = 8


def read_tree(path: str | Path, *, name: str | None = None, timeout_s: float = SECONDS) -> Release:
    """Return the release that a Megatron-LM source tree is.

    Args:
        path: Root of the tree, the folder of `pretrain_*.py` and `megatron/`.
        name: Name of the release; its package version by default.
        timeout_s: Most seconds that building the tree's parser may take.

    Raises:
        LoweringError: If it is no such tree, or its parser cannot be built or read.
    """
    return from_data(_data(_checked(Path(path)), name, timeout_s))


def add_release(
    path: str | Path,
    *,
    name: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the release file of a source tree and return its path.

    Args:
        path: Root of the tree.
        name: Name of the release; its package version by default.
        out: File to write; `<name>.json` in the current folder by default.
        overwrite: Whether an existing file, or the name of a known release, may be taken.

    Raises:
        LoweringError: As `read_tree`, or if the name is taken or the file cannot be written.
    """
    tree = _checked(Path(path))
    name = name or _version(tree)
    target = Path(f"{name}.json") if out is None else Path(out)
    if not overwrite and (name in RELEASE_NAMES or target.exists()):
        raise LoweringError(
            "A release would be overwritten",
            given=str(target) if target.exists() else f"the known release {name}",
            allowed="a new name and a new file",
            hint="name='mine', out='mine.json', or overwrite=True",
        )
    _write(target, text_of(_data(tree, name, SECONDS)))
    return target


def tree_version(path: str | Path) -> str:
    """Return the megatron-core version that a source tree says it is; nothing is run.

    Raises:
        LoweringError: If it is no Megatron-LM tree, or says no version.
    """
    return _version(_checked(Path(path)))


def _checked(tree: Path) -> Path:
    missing = [str(part) for part in (PARSER, VERSION) if not (tree / part).is_file()]
    if missing:
        raise LoweringError(
            "This is not a Megatron-LM source tree",
            given=f"{tree}, which lacks {' and '.join(missing)}",
            allowed="the root of a checkout, the folder of pretrain_*.py and megatron/",
            hint="clone Megatron-LM and give its root",
        )
    return tree


def _data(tree: Path, name: str | None, timeout_s: float) -> dict[str, Any]:
    """Return the content of the tree's release file."""
    version = _version(tree)
    dumped = _dumped(tree, timeout_s)
    data = release_data(
        tree, dumped["options"], name=name or version, version=version, commit=_commit(tree)
    )
    stubs = [f"stubbed to build the parser: {stub}" for stub in dumped["stubs"]]
    data["notes"] = [*stubs, *data["notes"]]
    return inherited_rules(data)


def _dumped(tree: Path, timeout_s: float) -> Mapping[str, Any]:
    """Return what the tree's parser says in a process that leaves nothing behind."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "parser.json")
        root = str(tree.resolve())
        environment = {
            **os.environ,
            "PYTHONPATH": root,
            "PYTHONDONTWRITEBYTECODE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **dict.fromkeys(("TMPDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"), scratch),
        }
        command = [sys.executable, "-B", str(DUMP), root, str(out)]
        said = _run(command, scratch, environment, timeout_s)
        try:
            dumped: Mapping[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _no_parser(tree, said) from error
    return dumped


def _run(
    command: Sequence[str], folder: str, environment: Mapping[str, str], timeout_s: float
) -> str:
    """Run a command in a session of its own, and return the last lines of what it said."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        said = f"no parser after {timeout_s:g} seconds"
    finally:
        # Also what it may have started: its session ends with it.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return "\n".join(said.strip().splitlines()[-LAST_LINES:])


def _no_parser(tree: Path, said: str) -> LoweringError:
    hint = "run it with the Python whose packages this tree needs"
    if "No module named 'torch'" in said:
        hint = "install torch: a tree's parser imports it (the CPU build is enough)"
    return LoweringError(
        "The parser of a Megatron-LM source tree could not be built",
        given=f"{tree}\n{said}",
        allowed=f"a tree whose {PARSER} has add_megatron_arguments and can be imported",
        hint=hint,
    )


def _version(tree: Path) -> str:
    text = (tree / VERSION).read_text(encoding="utf-8")
    found = [re.search(rf"^{part} = (\d+)", text, re.M) for part in ("MAJOR", "MINOR", "PATCH")]
    if not all(found):
        raise LoweringError(
            "The version of a Megatron-LM source tree cannot be read",
            given=str(tree / VERSION),
            allowed="MAJOR, MINOR and PATCH as whole numbers",
            hint="check that the tree is whole",
        )
    return ".".join(match[1] for match in found if match)


def _commit(tree: Path) -> str:
    if not (tree / ".git").exists():
        return ""
    command = ["git", "-C", str(tree), "rev-parse", "HEAD"]
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _write(target: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = ""
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}.", delete=False
        ) as file:
            part = file.name
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(part, 0o666 & ~umask)
        os.replace(part, target)
    except OSError as error:
        if part:
            Path(part).unlink(missing_ok=True)
        raise LoweringError(
            "A release file cannot be written",
            given=f"{target}: {error.strerror}",
            allowed="a file in a folder that exists and can be written",
            hint="out='mine.json'",
        ) from error

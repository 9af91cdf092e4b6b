"""Find and read C++ source files under a folder.

- `SourceSet`: a folder, the suffixes that count as C++, and the globs left out
- `default_source_set`: the C++ headers that ship with torch
- `scan_sources`: every usable file with its content hash, and why the others were skipped
- `read_source`, `read_content`: the text of one scanned file, and its bytes
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megacpp_nemo.contract.errors import DataError

CPP_SUFFIXES = (
    *(".h", ".hh", ".hpp", ".hxx", ".h++", ".cuh"),
    *(".cc", ".cpp", ".cxx", ".c++", ".cu"),
    *(".inl", ".ipp", ".tpp"),
)

TORCH_GENERATED = (
    # One generated file for each operator: three files in four, nearly identical.
    "ATen/ops",
    # Dispatch tables printed from the operator list; the two largest are 2.2 MB and 1.7 MB.
    "ATen/*Functions.h",
    "ATen/*Functions_inl.h",
    "ATen/VmapGeneratedPlumbing.h",
    "ATen/RegistrationDeclarations.h",
    "ATen/MethodOperators.h",
    "ATen/Operators.h",
    # The Tensor class and the symbol table, printed from the same list.
    "ATen/core/TensorBody.h",
    "ATen/core/aten_interned_strings.h",
    # Autograd and lazy-tensor nodes, AOTInductor shims, serialization tables, flatbuffers output.
    "torch/csrc/**/*generated*",
    # Instantiations printed by generate_kernels.py.
    "ATen/native/transformers/cuda/mem_eff_attention/kernels",
    # Output of the protobuf compiler.
    "*.pb.h",
    # 270 kB of declarations printed by SLEEF's build.
    "/sleef.h",
)


@dataclass(frozen=True, kw_only=True)
class SourceSet:
    """Which files are the sources.

    Args:
        root: Folder to search. Symbolic links to folders inside it are not followed.
        suffixes: File name endings that count as C++, each with its dot; letter case is ignored.
        exclude: Globs over paths relative to `root`. `*` stays inside one folder, `**` crosses
            folders; a pattern without a slash matches a name at any depth, a leading slash ties
            it to `root`; a folder that matches is left out with everything in it.
    """

    root: Path
    suffixes: tuple[str, ...] = CPP_SUFFIXES
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One usable file: posix `path` relative to the root, its size and the hash of its bytes."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SourceScan:
    """What a search found.

    Args:
        root: The folder searched.
        files: Usable files, sorted by relative path.
        skipped: How many files were left out, by reason: `unreadable`, `empty`, `not_text`
            (a NUL byte, or not UTF-8), `duplicate` (the same bytes as an earlier path), and
            `unreadable_folder` for folders that could not be listed.
    """

    root: Path
    files: tuple[SourceFile, ...]
    skipped: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """Bytes of all usable files together."""
        return sum(file.size_bytes for file in self.files)


def default_source_set() -> SourceSet:
    """Return torch's own C++ headers without the generated ones; torch is not imported.

    Raises:
        DataError: torch is not installed, or came without its headers.
    """
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        root = Path(folder) / "include"
        if root.is_dir():
            return SourceSet(root=root, exclude=TORCH_GENERATED)
    raise DataError(
        "The default corpus is torch's C++ headers, and they are not installed here",
        hint="point the corpus at a folder of C++ sources (root=..., or data.root=... for NeMo)",
    )


def scan_sources(source_set: SourceSet) -> SourceScan:
    """Read every source file once and return what is usable, in a fixed order.

    A file that cannot be used is counted, never fatal. Copies of the same bytes are kept once,
    so that one text cannot land in both training and validation.

    Raises:
        DataError: `root` is missing or not a folder, a suffix has no dot, or no file is usable.
    """
    root = _checked_root(source_set)
    skipped: Counter[str] = Counter()
    files: list[SourceFile] = []
    seen: set[str] = set()
    for path in sorted(_walk(source_set, skipped)):
        content = _read_bytes(root / path)
        reason = _why_unusable(content)
        digest = hashlib.sha256(content or b"").hexdigest()
        if reason is None and digest in seen:
            reason = "duplicate"
        if content is None or reason is not None:
            skipped[reason or "unreadable"] += 1
            continue
        seen.add(digest)
        files.append(SourceFile(path=path, size_bytes=len(content), sha256=digest))
    if not files:
        raise DataError(
            "No usable C++ source file",
            given=f"{root}, where {_counts(skipped)}",
            allowed=f"non-empty UTF-8 text files ending in {' '.join(source_set.suffixes)}",
            hint="check the folder and the exclude patterns",
        )
    return SourceScan(root=root, files=tuple(files), skipped=dict(sorted(skipped.items())))


def read_source(scan: SourceScan, file: SourceFile) -> str:
    """Return the text of a scanned file, line ends untouched.

    Raises:
        DataError: The file is no longer what it was when it was scanned.
    """
    return read_content(scan.root, file).decode("utf-8")


def read_content(root: Path, file: SourceFile) -> bytes:
    """Return the bytes of a file found under `root`, as they were when it was scanned.

    Raises:
        DataError: The file is no longer what it was when it was scanned.
    """
    content = _read_bytes(root / file.path)
    if content is None or hashlib.sha256(content).hexdigest() != file.sha256:
        raise DataError(
            "A source file changed while the corpus was being built",
            given=str(root / file.path),
            hint="run again once the files are at rest",
        )
    return content


def _checked_root(source_set: SourceSet) -> Path:
    root = Path(source_set.root).expanduser()
    bad = [suffix for suffix in source_set.suffixes if not suffix.startswith(".")]
    if bad or not source_set.suffixes:
        raise DataError(
            "A source suffix needs its dot", given=bad or "no suffix", allowed=CPP_SUFFIXES
        )
    if not root.is_dir():
        is_there = os.path.lexists(root)
        raise DataError(
            "The source root is not a folder" if is_there else "the source root does not exist",
            given=str(root),
            allowed="a folder with C++ sources",
            hint="leave the root unset for torch's headers",
        )
    return root


def _walk(source_set: SourceSet, skipped: Counter[str]) -> Iterator[str]:
    """Yield relative posix paths of candidate files; `os.walk` follows no folder links."""
    root = Path(source_set.root).expanduser()
    suffixes = tuple(suffix.lower() for suffix in source_set.suffixes)
    excluded = _glob_regex(source_set.exclude)

    def count_unreadable(_: OSError) -> None:
        skipped["unreadable_folder"] += 1

    for folder, subfolders, names in os.walk(root, onerror=count_unreadable):
        prefix = Path(folder).relative_to(root).as_posix()
        prefix = "" if prefix == "." else prefix + "/"
        subfolders[:] = [name for name in subfolders if not excluded.fullmatch(prefix + name)]
        for name in names:
            if name.lower().endswith(suffixes) and not excluded.fullmatch(prefix + name):
                yield prefix + name


def _glob_regex(patterns: tuple[str, ...]) -> re.Pattern[str]:
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    alternatives = []
    for pattern in patterns:
        body = pattern.strip("/")
        if "/" not in pattern.rstrip("/"):
            body = "**/" + body
        parts = re.split(r"(\*\*/|\*\*|\*|\?)", body)
        alternatives.append("".join(tokens.get(part) or re.escape(part) for part in parts))
    return re.compile("|".join(alternatives) or r"(?!)")


def _read_bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError:
        return None


def _why_unusable(content: bytes | None) -> str | None:
    if content is None:
        return "unreadable"
    if not content:
        return "empty"
    if b"\0" in content:
        return "not_text"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "not_text"
    return None


def _counts(skipped: Counter[str]) -> str:
    if not skipped:
        return "no file has such a suffix"
    return "all were skipped: " + ", ".join(f"{n} {why}" for why, n in sorted(skipped.items()))

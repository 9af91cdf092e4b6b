"""What structure channels cost beside the parse: torch's headers, the generated ones included.

    python benchmarks/syntax.py [--repeats N] [--files N]

Processor time of one thread, the least of some repeats, for

- `parse`: tree-sitter alone, each tree thrown away, of the files as they are;
- `walk`: the same after macros are blanked, with every node's kind and place as arrays;
- `channels`: all of `read_syntaxes`, the channels and the facts included;
- `levels`: dependency levels of all files from their facts.

`left_ratio` is what `channels` takes beyond `parse`, for each second of `parse`; `painting_ratio`
is the same for what comes after `walk`. Beside the times stands how the bytes are shared among
categories and dependency levels, and how many of them are absent.

Writes `benchmarks/results/syntax.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tree_sitter

from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
from megacpp_nemo.data.sources import SourceSet, default_source_set, scan_sources
from megacpp_nemo.syntax.dependencies import dependency_levels
from megacpp_nemo.syntax.paint import FileSyntax, read_syntaxes
from megacpp_nemo.syntax.table import CATEGORIES, MAPPING_VERSION
from megacpp_nemo.syntax.tree import grammar, read_forest

RESULTS = Path(__file__).parent / "results" / "syntax.json"
TOGETHER = 4  # files given to one call


def timed(work: Callable[[], object], repeats: int) -> float:
    """Return the least processor time of some repeats, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def parse(contents: list[bytes]) -> None:
    """Parse all files."""
    parser = tree_sitter.Parser(grammar())
    for content in contents:
        parser.parse(content)


def in_groups(
    contents: list[bytes], work: Callable[[list[bytes]], object], kept: list[Any] | None = None
) -> None:
    """Do some work on a few files at a time, and keep what it returns if there is a list."""
    for first in range(0, len(contents), TOGETHER):
        found = work(contents[first : first + TOGETHER])
        if kept is not None:
            kept.append(found)


def shares(contents: list[bytes], paths: list[str]) -> dict[str, Any]:
    """Return how bytes are shared among categories and levels, and the time of the levels."""
    category = np.zeros(len(CATEGORIES) + 1, np.int64)
    facts, units, unplaced = [], [], 0

    def note(found: FileSyntax) -> None:
        nonlocal category, unplaced
        category = category + np.bincount(found.channels["category"], minlength=category.size)
        unplaced += not found.parsed
        facts.append(found.facts)
        units.append(np.bincount(found.units + 1, minlength=len(found.facts.definitions) + 1))

    in_groups(contents, lambda group: [note(found) for found in read_syntaxes(group)])
    files = list(zip(paths, facts, strict=True))
    levels_s = timed(lambda: dependency_levels(files), 1)
    level = np.zeros(STRUCTURE_CHANNELS["dependency_level"], np.int64)
    for found, size in zip(dependency_levels(files), units, strict=True):
        np.add.at(level, [found.file, *found.units], size)
    total = int(category.sum())
    return {
        "levels_s": round(levels_s, 2),
        "files_with_absent_bytes": unplaced,
        "absent_bytes": int(category[-1]),
        "category_share": {
            name: round(int(count) / total, 4)
            for name, count in zip([*CATEGORIES, "absent"], category, strict=True)
        },
        "dependency_level_share": [round(int(count) / total, 4) for count in level],
    }


def main() -> None:
    """Measure, print the times and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--files", type=int, default=None, help="the first so many only")
    given = parser.parse_args()
    scan = scan_sources(SourceSet(root=default_source_set().root))
    paths = [file.path for file in scan.files][: given.files]
    contents = [(scan.root / path).read_bytes() for path in paths]
    size_mb = sum(map(len, contents)) / 1e6
    parse_s = timed(lambda: parse(contents), given.repeats)
    walk_s = timed(lambda: in_groups(contents, read_forest), given.repeats)
    channels_s = timed(lambda: in_groups(contents, read_syntaxes), given.repeats)
    results = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "tree_sitter": metadata.version("tree-sitter"),
        "tree_sitter_cpp": metadata.version("tree-sitter-cpp"),
        "torch": metadata.version("torch"),
        "mapping_version": MAPPING_VERSION,
        "files": len(contents),
        "size_mb": round(size_mb, 2),
        "parse_s": round(parse_s, 2),
        "walk_s": round(walk_s, 2),
        "channels_s": round(channels_s, 2),
        "parse_mb_per_s": round(size_mb / parse_s, 2),
        "channels_mb_per_s": round(size_mb / channels_s, 2),
        "left_ratio": round((channels_s - parse_s) / parse_s, 2),
        "painting_ratio": round((channels_s - walk_s) / parse_s, 2),
        **shares(contents, paths),
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

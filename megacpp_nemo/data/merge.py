"""Finished shards put together: both splits as Megatron indexed files, one pair per channel.

Shards are read one at a time, in order; of the whole corpus only what the dependency graph needs
is ever in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
from megacpp_nemo.data.indexed_writer import IndexedWriter
from megacpp_nemo.data.shard_file import ShardContent, read_facts, read_shard
from megacpp_nemo.data.shards import Shard, ShardJob, channel_dtype

LEVEL = "dependency_level"


def merge_shards(
    job: ShardJob, shards: Sequence[Shard], folder: Path, done: Callable[[Shard], None]
) -> dict[str, Any]:
    """Write `SPLIT.bin/.idx` and `SPLIT.CHANNEL.bin/.idx` of every split into `folder`.

    Returns:
        Facts for the manifest: `splits`, and `structure` (counts of files and, per channel, of
        absent tokens) where there are channels.

    Raises:
        ShardError: A shard is not as it was written.
    """
    levels = _levels(job, shards) if LEVEL in job.channels else {}
    absent = Counter(dict.fromkeys(job.channels, 0))
    parsed = Counter(dict.fromkeys(("whole", "partly", "not"), 0))
    splits: dict[str, Counter[str]] = {}
    with ExitStack() as open_files:
        for shard in shards:
            if shard.split not in splits:
                splits[shard.split] = Counter(files=0, documents=0, source_bytes=0, tokens=0)
                open_files.close()
                writers = _writers(job, shard.split, folder, open_files)
            content = read_shard(job.path(shard), job.identity)
            arrays = dict(content.arrays)
            if LEVEL in job.channels:
                arrays[LEVEL] = _level_channel(content, levels[shard.number])
            for name, writer in writers.items():
                writer.add(arrays[name], arrays["lengths"])
            for name in job.channels:
                absent[name] += int((arrays[name] == STRUCTURE_CHANNELS[name]).sum())
            splits[shard.split].update(_counts(shard, arrays))
            parsed.update(_how_parsed(shard, content))
            done(shard)
    facts: dict[str, Any] = {"splits": {name: dict(counts) for name, counts in splits.items()}}
    if job.channels:
        facts["structure"] = {
            "channels": list(job.channels),
            "files_parsed": dict(parsed),
            "absent_tokens": dict(absent),
        }
    return facts


def _writers(
    job: ShardJob, split: str, folder: Path, open_files: ExitStack
) -> dict[str, IndexedWriter]:
    """Open the files of a split, by the name of what goes into them."""
    files = {"tokens": (split, np.dtype(job.token_dtype))}
    for name in job.channels:
        files[name] = (f"{split}.{name}", channel_dtype(name))
    return {
        name: open_files.enter_context(IndexedWriter(folder / file, dtype))
        for name, (file, dtype) in files.items()
    }


def _levels(job: ShardJob, shards: Sequence[Shard]) -> dict[int, list[Any]]:
    """Return the dependency levels of the files of each shard, by the shard's number."""
    from megacpp_nemo.syntax.dependencies import dependency_levels
    from megacpp_nemo.syntax.paint import FileFacts

    files = [
        (file.path, FileFacts.from_json(facts["graph"]))
        for shard in shards
        for file, facts in zip(shard.files, read_facts(job.path(shard), job.identity), strict=True)
    ]
    found = iter(dependency_levels(files))
    return {shard.number: [next(found) for _ in shard.files] for shard in shards}


def _level_channel(content: ShardContent, levels: Sequence[Any]) -> npt.NDArray[np.uint8]:
    """Return the level of each token: of its unit, or of its file outside of any."""
    absent = STRUCTURE_CHANNELS[LEVEL]
    pieces, start = [], 0
    for length, level in zip(content.arrays["lengths"].tolist(), levels, strict=True):
        # Units count from 0; from the end count NO_UNIT, the file itself, and UNPARSED.
        table = np.array([*level.units, absent, level.file], np.uint8)
        pieces.append(table[content.arrays["units"][start : start + length]])
        start += length
    return np.concatenate(pieces)


def _counts(shard: Shard, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, int]:
    return {
        "files": len(shard.files),
        "documents": len(arrays["lengths"]),
        "source_bytes": shard.size_bytes,
        "tokens": len(arrays["tokens"]),
    }


def _how_parsed(shard: Shard, content: ShardContent) -> Counter[str]:
    found: Counter[str] = Counter()
    for file, facts in zip(shard.files, content.facts or [], strict=bool(content.facts)):
        unparsed = facts["unparsed_bytes"]
        found["whole" if not unparsed else "not" if unparsed >= file.size_bytes else "partly"] += 1
    return found

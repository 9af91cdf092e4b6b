"""What `megacpp data build` says of the corpus that it built."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacpp_nemo.cli.screen import Screen
from megacpp_nemo.contract.structure import STRUCTURE_SETS

if TYPE_CHECKING:
    from megacpp_nemo.data.corpus_spec import Corpus

LABEL = 12
PLAIN = re.compile(r"[\w./-]+")


def facts_of(
    corpus: Corpus, out: Path, seconds: float | None, *, resumed: bool = False
) -> dict[str, Any]:
    """Return what is in a corpus, and how long it took.

    Args:
        corpus: The corpus.
        out: Its folder, as it was given.
        seconds: How long it took; None where it was there before.
        resumed: Whether a part of it had been built before, so that there is no rate to tell.
    """
    manifest = corpus.manifest
    splits, structure = manifest["splits"], manifest.get("structure")
    total = {key: sum(split[key] for split in splits.values()) for key in splits["train"]}
    rates = None
    if seconds is not None:
        rates = {
            "seconds": seconds,
            "resumed": resumed,
            "files_per_second": None if resumed else total["files"] / seconds,
            "mb_per_second": None if resumed else total["source_bytes"] / 1e6 / seconds,
        }
    return {
        "schema": 1,
        "folder": str(out),
        "sources": manifest["spec"]["root"],
        "total": total,
        "splits": splits,
        "skipped": manifest["skipped"],
        "structure": structure,
        "tokenizer": manifest["tokenizer"],
        "built": rates,
        "next": [f"megacpp data verify {shlex.quote(str(out))}", _training(corpus, out)],
    }


def _training(corpus: Corpus, out: Path) -> str:
    """Return the command that trains on the corpus."""
    channels = corpus.channels
    core = set(STRUCTURE_SETS["core"]) <= set(channels)
    choice = "core" if core else "+".join(channels)
    recipe = f"nam56r_tiny(structure='{choice}')" if channels else "nam56r_tiny"
    place = str(out.absolute())
    # NeMo-Run reads plain paths without quotes, as in the other commands that are shown.
    folders = place if PLAIN.fullmatch(place) else repr(place)
    data = f"corpus_folders(folders={folders})"
    return f"nemo llm pretrain --factory {_quoted(recipe)} data={_quoted(data)} --yes"


def _quoted(word: str) -> str:
    """Return a word for a shell, in double quotes where nothing in it means more there."""
    return shlex.quote(word) if set(word) & set('"$`\\!') else f'"{word}"'


def _bytes(count: float) -> str:
    """Return so many bytes in their unit, which is decimal."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.3g} {unit}"
    return f"{count:,.0f} bytes"


def summary(facts: Mapping[str, Any], screen: Screen) -> str:
    """Return the facts as lines, and the commands that go on from there."""
    rows = [(name, screen.wrapped(value, " " * LABEL)) for name, value in _rows(facts)]
    lines = [screen.heading(f"{facts['folder']}: a corpus of {facts['sources']}")]
    lines += [f"{name:<{LABEL}}{value}" for name, value in rows]
    return "\n".join([*lines, "", screen.heading("Next"), *facts["next"]]) + "\n"


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    total, splits = facts["total"], facts["splits"]
    share_of = " and ".join(f"{split['files']:,} in {name}" for name, split in splits.items())
    rows = [
        ("files", f"{total['files']:,}: {share_of}"),
        ("source", _bytes(total["source_bytes"])),
        (
            "tokens",
            f"{total['tokens']:,}, {total['source_bytes'] / total['tokens']:.2f} bytes each",
        ),
        ("vocabulary", f"{facts['tokenizer']['vocab_size']:,}"),
    ]
    if facts["skipped"]:
        reasons = ", ".join(
            f"{count:,} {why.replace('_', ' ')}" for why, count in facts["skipped"].items()
        )
        rows.append(("skipped", f"{sum(facts['skipped'].values()):,} files: {reasons}"))
    if structure := facts["structure"]:
        parsed = structure["files_parsed"]
        counts = f"{parsed['whole']:,} files wholly, {parsed['partly']:,} in part, "
        # The end of a document is a token that nothing is known of.
        absent = max(structure["absent_tokens"].values()) - total["documents"]
        most = absent / (total["tokens"] - total["documents"])
        rows += [
            ("parsed", f"{counts}{parsed['not']:,} not at all; {most:.1%} of tokens are absent"),
            ("channels", ", ".join(structure["channels"])),
        ]
    built = facts["built"]
    if built is None:
        return [*rows, ("built", "before, and kept: it is whole, and of these sources and options")]
    if built["resumed"]:
        return [*rows, ("built", f"in {built['seconds']:,.1f} s, going on with a stopped build")]
    rate = f"{built['files_per_second']:,.3g} files/s, {_bytes(1e6 * built['mb_per_second'])}/s"
    return [*rows, ("built", f"in {built['seconds']:,.1f} s: {rate}")]

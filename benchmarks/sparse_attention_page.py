"""The page of `sparse_attention.py`'s figures.

    python benchmarks/sparse_attention_page.py

Writes `benchmarks/results/sparse_attention.md` from `sparse_attention.json`, with no measuring.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "sparse_attention.json"


def page(results: dict[str, Any]) -> str:
    """Return the results as a page."""
    machine, sizes = results["machine"], results["sizes"]
    attention, indexer = results["attention"], results["indexer"]
    lines = [
        "# Sparse attention: what the core and the indexer cost, forward and backward",
        "",
        f"{machine['processor']}, {machine['device']}, {machine['threads']} thread, torch "
        f"{machine['torch']}, fp32; {sizes['heads']} heads, keys of {sizes['key_width']}, values "
        f"of {sizes['value_width']}, latents of {sizes['latent_width']}; "
        f"{sizes['indexer_heads']} indexer heads of {sizes['indexer_width']}. Medians in ms, and "
        "MiB kept for the backward pass. Written by `python benchmarks/sparse_attention.py`, "
        "which says what each is.",
        *_table("Attention core", attention, ("length", "topk")),
        *_table("Indexer's loss", indexer, ("length",)),
    ]
    return "\n".join(lines) + "\n"


def _table(title: str, rows: list[dict[str, Any]], keys: Sequence[str]) -> list[str]:
    """Return a section: a row for each value of the keys, two columns for each way."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    columns = [*keys, *(f"{way}, {unit}" for way in ways for unit in ("ms", "MiB"))]
    lines = ["", f"## {title}", "", f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        own = {row["way"]: row for row in rows if tuple(row[name] for name in keys) == key}
        cells = [f"{own[way]['ms']:.1f} | {own[way]['kept_mib']:.1f}" for way in ways]
        lines.append(f"| {' | '.join([*map(str, key), *cells])} |")
    return lines


def write(results: dict[str, Any]) -> str:
    """Write the page beside the results, and return it."""
    text = page(results)
    RESULTS.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    print(write(json.loads(RESULTS.read_text(encoding="utf-8"))))

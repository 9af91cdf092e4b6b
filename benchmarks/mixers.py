"""The scans of the mixers over length: time and memory, forward and backward.

    python benchmarks/mixers.py [--repetitions N] [--lengths 512 1024 ...]

- `mamba2`: `sequential`, the recurrence a token at a time, and `portable`, the chunked scan
- `mamba3`, `mamba3_mimo`: the same of Mamba-3, in its SISO form and at rank 4
- `m2rnn`: `sequential`, and the `torch` and `compiled` paths of `m2rnn_scan`

One row, eight heads, fp32, one thread. The sequential forms keep a graph of every token and run
up to 2048 tokens. What M2RNN takes at full size, and on a GPU, is in `benchmarks/m2rnn.py`.

Writes `benchmarks/results/mixers.json` and `mixers.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scans import Way, compared, machine
from torch import Tensor

from megacpp_nemo import __version__
from megacpp_nemo.model.m2rnn import m2rnn_scan, m2rnn_sequential
from megacpp_nemo.model.mamba3 import mamba3_sequential
from megacpp_nemo.model.mamba3_chunked import mamba3_chunked
from megacpp_nemo.model.ssd import ssd_chunked, ssd_sequential

RESULTS = Path(__file__).parent / "results" / "mixers.json"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LONGEST_SEQUENTIAL = 2048
HEADS, WIDTH, STATE, RANK = 8, 64, 64, 4
REFERENCE = "sequential"

Inputs = dict[str, Tensor]


def normal(*sizes: int) -> Tensor:
    """Return the same numbers for the same sizes."""
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def mamba2(seq: int) -> Inputs:
    """Return inputs of the Mamba-2 scan, one group."""
    return {
        "x": normal(1, seq, HEADS, WIDTH),
        "dt": torch.nn.functional.softplus(normal(1, seq, HEADS) - 3),
        "A": -torch.exp(normal(HEADS)),
        "B": normal(1, seq, 1, STATE),
        "C": normal(1, seq, 1, STATE),
    }


def mamba3(seq: int, rank: int) -> Inputs:
    """Return inputs of the Mamba-3 scan, one group."""
    given = {
        "x": normal(1, seq, HEADS, WIDTH),
        "dt": torch.nn.functional.softplus(normal(1, seq, HEADS) - 3),
        "A": -torch.nn.functional.softplus(normal(1, seq, HEADS)),
        "trap": normal(1, seq, HEADS),
        "B": normal(1, seq, rank, 1, STATE),
        "C": normal(1, seq, rank, 1, STATE),
        "angles": normal(1, seq, STATE // 4),
        "B_bias": torch.ones(HEADS, rank, STATE),
        "C_bias": torch.ones(HEADS, rank, STATE),
    }
    if rank > 1:
        scales = torch.full((HEADS, rank, WIDTH), 1 / rank)
        given |= {"mimo_x": scales, "mimo_o": scales.clone()}
    return given


def m2rnn(seq: int) -> Inputs:
    """Return inputs of M2RNN at full size's state, one query/key head."""
    return {
        "q": normal(1, seq, 1, 64),
        "k": normal(1, seq, 1, 64),
        "v": normal(1, seq, HEADS, 16),
        "f": normal(1, seq, HEADS).sigmoid(),
        "W": torch.eye(16).repeat(HEADS, 1, 1),
    }


# Family -> its inputs at a length, and its ways; the first is sequential.
FAMILIES: dict[str, tuple[Callable[[int], Inputs], dict[str, Way]]] = {
    "mamba2": (
        mamba2,
        {REFERENCE: ssd_sequential, "portable": partial(ssd_chunked, chunk_size=128)},
    ),
    "mamba3": (
        partial(mamba3, rank=1),
        {REFERENCE: mamba3_sequential, "portable": partial(mamba3_chunked, chunk_size=64)},
    ),
    "mamba3_mimo": (
        partial(mamba3, rank=RANK),
        {REFERENCE: mamba3_sequential, "portable": partial(mamba3_chunked, chunk_size=16)},
    ),
    "m2rnn": (
        m2rnn,
        {
            REFERENCE: m2rnn_sequential,
            "torch": partial(m2rnn_scan, path="torch"),
            "compiled": partial(m2rnn_scan, path="compiled"),
        },
    ),
}


def over_lengths(family: str, lengths: list[int], repetitions: int) -> list[dict[str, Any]]:
    """Return figures of a family's ways at each length."""
    make, ways = FAMILIES[family]
    found = []
    for length in lengths:
        given = {name: t.requires_grad_() for name, t in make(length).items()}
        chosen = {
            name: way
            for name, way in ways.items()
            if name != REFERENCE or length <= LONGEST_SEQUENTIAL
        }
        figures = compared(chosen, given, repetitions, reference=REFERENCE)
        print(f"  {family} {length}: {figures}", flush=True)
        found.append({"length": length, "ways": figures})
    return found


def page(results: dict[str, Any]) -> str:
    """Return the results as a page."""
    lines = [
        "# The scans of the mixers over length, forward and backward",
        "",
        f"{results['device']}, {results['threads']} thread, torch {results['torch']}. Medians of "
        f"{results['repetitions']}. Written by `python benchmarks/mixers.py`, which says what each "
        "is.",
    ]
    for family, rows in results["families"].items():
        names = list(rows[0]["ways"])
        columns = [f"{name}, {what}" for name in names for what in ("us a token", "MiB")]
        lines += ["", f"## {family}", ""]
        lines += [f"| length | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
        for row in rows:
            cells = [_cells(row["ways"].get(name), row["length"]) for name in names]
            lines.append(f"| {row['length']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(figures: dict[str, float] | None, length: int) -> str:
    if figures is None:
        return "- | -"
    return f"{figures['seconds'] / length * 1e6:.3g} | {figures['peak_bytes'] / 2**20:.1f}"


def main() -> None:
    """Measure, print the page and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        **machine(),
        "version": __version__,
        "repetitions": asked.repetitions,
        "families": {
            family: over_lengths(family, asked.lengths, asked.repetitions) for family in FAMILIES
        },
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(page(results), encoding="utf-8")
    print(page(results))


if __name__ == "__main__":
    main()

"""M2RNN's scan: time and memory of every path, forward and backward, against the plain loops.

    python benchmarks/m2rnn.py [--repetitions N]

- `sequential`: the equations, one token at a time in Python under autograd, heads and sequences
  together; times are also given as ratios to this in the same run
- `cells`: the same for one sequence and one head at a time, a loop over (batch, head, token); at
  the small shape only, for it would take minutes at the other
- `torch`, `compiled`, `triton`: the paths of `m2rnn_scan`

On CPU at the shape of `nam56r_tiny` and at full heads, on one thread. Where there is CUDA, at the
full shape there, besides against two floors: the bytes that any form must read and write, at the
speed of a large copy in the same run, and the same scan of a single head, whose chain of tokens
no form can shorten. The C code's working memory is a tensor too. What length does to time and
memory is in `benchmarks/mixers.py`.

Writes `benchmarks/results/m2rnn.json` and `m2rnn.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scans import CUDA, Way, compared, machine, seconds, wait
from torch import Tensor

from megacpp_nemo import __version__
from megacpp_nemo.contract.families import recipe
from megacpp_nemo.model.m2rnn import m2rnn_scan, m2rnn_sequential

RESULTS = Path(__file__).parent / "results" / "m2rnn.json"


class Shape(NamedTuple):
    """Sizes of one scan, with one q/k head."""

    batch: int
    seq: int
    heads: int
    key_dim: int
    value_dim: int

    def __str__(self) -> str:
        return f"batch {self.batch}, length {self.seq}, {self.heads} heads of {self.key_dim} x " + (
            f"{self.value_dim}"
        )


FULL = Shape(4, 1024, 44, 64, 16)
ON_GPU = Shape(4, 4096, 44, 64, 16)


def tiny() -> Shape:
    """Return the shape of the R block of `nam56r_tiny`."""
    settings = recipe("nam56r_tiny")
    heads = settings.model.recurrent
    return Shape(
        settings.batch.micro_batch_size,
        settings.model.seq_length,
        heads.num_heads,
        heads.key_dim,
        heads.value_dim,
    )


def inputs(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return differentiable inputs by name, as a block would make them at its start."""
    draw = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=draw).to(device, dtype)

    batch, seq, heads, K, V = shape
    made = {
        "q": normal(batch, seq, 1, K),
        "k": normal(batch, seq, 1, K),
        "v": normal(batch, seq, heads, V),
        "f": normal(batch, seq, heads).float().sigmoid(),
        "W": torch.eye(V, device=device).to(dtype).repeat(heads, 1, 1),
    }
    return {name: t.requires_grad_() for name, t in made.items()}


def cells(q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Run the plain loop for one sequence and one head at a time."""
    outcomes = [
        m2rnn_sequential(
            q[b : b + 1], k[b : b + 1], v[b : b + 1, :, h : h + 1], f[b : b + 1, :, h : h + 1],
            W[h : h + 1],
        )
        for b in range(v.shape[0])
        for h in range(v.shape[2])
    ]  # fmt: skip
    y, final = (torch.cat(parts) for parts in zip(*outcomes, strict=True))
    return y, final


def measured(
    ways: dict[str, Way], shape: Shape, repetitions: int, *, device: str = "cpu"
) -> dict[str, Any]:
    """Return figures of ways at a shape, in fp32 on a CPU and in bf16 on CUDA."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    found = compared(ways, inputs(shape, device, dtype), repetitions, reference="sequential")
    for name, figures in found.items():
        print(f"  {shape}: {name:10} {figures}", flush=True)
    return {"shape": shape._asdict(), "dtype": str(dtype), "ways": found}


def paths(*names: str) -> dict[str, Way]:
    """Return `sequential` and paths of the scan by name."""
    return {
        "sequential": m2rnn_sequential,
        **{name: partial(m2rnn_scan, path=name) for name in names},
    }


def on_gpu(shape: Shape, repetitions: int, device: str = "cuda") -> dict[str, Any]:
    """Return figures at full size on a GPU, beside the floors."""
    names = ("torch", "triton") if device == "cuda" else ("torch", "compiled")
    found = measured(paths(*names), shape, repetitions, device=device)
    best = partial(m2rnn_scan, path=names[1])
    one = inputs(Shape(1, shape.seq, 1, shape.key_dim, shape.value_dim), device, torch.bfloat16)
    seconds(best, one)
    chain = statistics.median(seconds(best, one) for _ in range(repetitions))
    moved = bytes_at_least(inputs(shape, device, torch.bfloat16))
    rate = copy_bytes_per_second(device)
    taken = found["ways"][names[1]]["seconds"]
    found["floors"] = {
        "bytes": moved,
        "copy_bytes_per_second": float(f"{rate:.3g}"),
        "byte_floor_seconds": float(f"{moved / rate:.3g}"),
        "over_byte_floor": float(f"{taken * rate / moved:.3g}"),
        "sequential_floor_seconds": float(f"{chain:.3g}"),
        "over_sequential_floor": float(f"{taken / chain:.3g}"),
    }
    print(f"  {shape}: {found['floors']}", flush=True)
    return found


def bytes_at_least(given: dict[str, Tensor]) -> int:
    """Return what forward and backward must move: inputs twice, y, its and all gradients once."""
    size = {name: t.numel() * t.element_size() for name, t in given.items()}
    return 3 * sum(size.values()) + 2 * size["v"]


def copy_bytes_per_second(device: str) -> float:
    """Return the bytes read and written in a second by copies of a large tensor."""
    size = 1 << (30 if device == "cuda" else 26)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    spent = []
    for _ in range(5):
        wait()
        start = time.perf_counter()
        target.copy_(source)
        wait()
        spent.append(time.perf_counter() - start)
    return 2 * size / min(spent)


def page(results: dict[str, Any]) -> str:
    """Return the results as a page."""
    lines = [
        "# M2RNN's scan, forward and backward",
        "",
        f"{results['device']}, {results['threads']} thread, torch {results['torch']}. Medians of "
        f"{results['repetitions']}. Written by `python benchmarks/m2rnn.py`, which says what each "
        "way is.",
    ]
    for found in results["shapes"]:
        lines += ["", f"## {Shape(**found['shape'])}, {found['dtype'].removeprefix('torch.')}", ""]
        lines += ["| way | seconds | times faster than `sequential` | memory, MiB |"]
        lines += ["| --- | --- | --- | --- |"]
        for name, way in found["ways"].items():
            faster = way["times_faster_than_sequential"]
            memory = way["peak_bytes"] / 2**20
            lines.append(f"| {name} | {way['seconds']:g} | {faster:g} | {memory:.1f} |")
        for name, value in found.get("floors", {}).items():
            lines += ["", f"{name.replace('_', ' ')}: {value:g}"]
    if not CUDA:
        lines += ["", "There was no GPU: the kernels' times and the floors were not measured."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the page and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    small = tiny()
    on_cpu = paths("torch", "compiled")
    with_cells = {"cells": cells, **on_cpu}
    shapes = [measured(with_cells, small, asked.repetitions)]
    shapes.append(measured(on_cpu, FULL, asked.repetitions))
    if CUDA:
        shapes.append(on_gpu(ON_GPU, asked.repetitions))
    results = {
        **machine(),
        "version": __version__,
        "repetitions": asked.repetitions,
        "shapes": shapes,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(page(results), encoding="utf-8")
    print(page(results))


if __name__ == "__main__":
    main()

"""What sparse attention costs: dense with a mask, or only the keys that were chosen.

    python benchmarks/sparse_attention.py [--repeats N] [--device cuda]

Forward and backward of the attention core in fp32, on one thread of a CPU, with sizes like those
of `nam56r_tiny`'s layers (4 heads of 32, values of 32, latents of 32 and 16 rotated channels), for
the keys that random scores choose. Five ways, which are first checked to agree:

- `dense`: no selection, torch's fused causal attention: the floor of a layer that is not sparse;
- `masked`: torch's fused attention with a mask of the chosen keys, one of the layer's two ways;
- `softmax`: a softmax over all keys and a mask, as Megatron's core does it;
- `per_head`: keys and values of every head, gathered for each query;
- `gathered`: latents gathered once for all heads, the layer's other way, with the listing of the
  chosen keys.

And of the indexer: scores, loss and gradients by autograd over all heads at once (`at_once`), and
one head at a time (`by_head`). Times are medians of processor time, which other work on the
machine disturbs least; beside them stands the memory that is kept for the backward pass.

Writes `benchmarks/results/sparse_attention.json` and `sparse_attention.md`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from sparse_attention_page import RESULTS, write
from torch import Tensor
from torch.nn import functional

from megacpp_nemo.model.gathered_attention import attend_gathered, attend_masked
from megacpp_nemo.model.indexer import (
    as_indices,
    hidden_keys,
    index_scores,
    index_scores_by_head,
    indexer_loss,
    indexer_loss_reference,
    select,
)

LENGTHS, TOPKS = (512, 1024, 2048, 4096), (64, 256)
HEADS, CONTENT, ROTATED, VALUES, LATENT = 4, 32, 16, 32, 32
INDEX_HEADS, INDEX_WIDTH = 2, 16
BLOCK = 256  # queries gathered at once
SCALE = (CONTENT + ROTATED) ** -0.5


def inputs(length: int, device: str) -> dict[str, Tensor]:
    """Return queries `[heads, seq, width]`, latents, rotary keys and up-projections, as leaves."""
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "query": (HEADS, length, CONTENT + ROTATED),
        "latent": (length, LATENT),
        "rotary": (length, ROTATED),
        "to_keys": (HEADS, CONTENT, LATENT),
        "to_values": (HEADS, VALUES, LATENT),
    }
    drawn = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return {name: tensor.to(device).requires_grad_() for name, tensor in drawn.items()}


def expanded(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return keys `[heads, seq, width]` and values `[heads, seq, width]` of every head."""
    content = torch.einsum("sr,hcr->hsc", given["latent"], given["to_keys"])
    rotary = given["rotary"].expand(HEADS, -1, -1)
    values = torch.einsum("sr,hvr->hsv", given["latent"], given["to_values"])
    return torch.cat((content, rotary), -1), values


def dense(given: dict[str, Tensor], chosen: Tensor) -> Tensor:
    """Attend to every key in front of a query."""
    keys, values = expanded(given)
    values = functional.pad(values, (0, ROTATED))
    mixed = functional.scaled_dot_product_attention(
        given["query"][None], keys[None], values[None], is_causal=True, scale=SCALE
    )
    return mixed[0, ..., :VALUES]


def masked(given: dict[str, Tensor], chosen: Tensor) -> Tensor:
    """Attend with a mask."""
    parts = (part.transpose(0, 1).unsqueeze(1) for part in (given["query"], *expanded(given)))
    return attend_masked(*parts, chosen[None], SCALE).squeeze(1).transpose(0, 1)


def softmax(given: dict[str, Tensor], chosen: Tensor) -> Tensor:
    """Attend with a mask, keeping what every head makes of every pair."""
    keys, values = expanded(given)
    logits = given["query"] @ keys.transpose(1, 2) * SCALE
    return logits.masked_fill(~chosen, float("-inf")).softmax(-1) @ values


def per_head(given: dict[str, Tensor], chosen: Tensor) -> Tensor:
    """Attend to keys and values gathered for each query, a block of queries at a time."""
    best, there = (part[0] for part in as_indices(chosen[None], int(chosen.sum(-1).max())))
    keys, values = (part.transpose(0, 1) for part in expanded(given))  # [seq, heads, width]
    blocks = []
    for begin in range(0, best.size(0), BLOCK):
        rows = slice(begin, begin + BLOCK)
        own = given["query"][:, rows].transpose(0, 1)
        logits = torch.einsum("shc,skhc->shk", own, keys[best[rows]]) * SCALE
        weights = logits.masked_fill(~there[rows].unsqueeze(1), float("-inf")).softmax(-1)
        blocks.append(torch.einsum("shk,skhv->hsv", weights, values[best[rows]]))
    return torch.cat(blocks, 1)


def gathered(given: dict[str, Tensor], chosen: Tensor) -> Tensor:
    """Attend to latents gathered for each query, for all heads."""
    best, there = as_indices(chosen[None], int(chosen.sum(-1).max()))
    query = given["query"].transpose(0, 1).unsqueeze(1)
    up = torch.cat((given["to_keys"], given["to_values"]), 1).flatten(0, 1)
    latent, rotary = given["latent"].unsqueeze(1), given["rotary"].unsqueeze(1)
    mixed = attend_gathered(query, latent, rotary, up, best, there, SCALE)
    return mixed.squeeze(1).transpose(0, 1)


WAYS = {way.__name__: way for way in (dense, masked, softmax, per_head, gathered)}


def at_once(leaves: list[Tensor], hidden: Tensor, target: Tensor) -> Tensor:
    """Return the indexer's loss with autograd over all heads."""
    scores = index_scores(*leaves).masked_fill(hidden, float("-inf"))
    return indexer_loss_reference(scores, target)


def by_head(leaves: list[Tensor], hidden: Tensor, target: Tensor) -> Tensor:
    """Return the indexer's loss a head at a time."""
    with torch.no_grad():
        scores = index_scores_by_head(*leaves).masked_fill_(hidden, float("-inf"))
    return indexer_loss(leaves[0], leaves[1], leaves[2], scores, target)


def milliseconds(step: Callable[[], Tensor], repeats: int) -> float:
    """Return the median time of a step and its backward pass, after one that is not counted."""
    times = []
    on_device = torch.cuda.is_available()
    wait = torch.cuda.synchronize if on_device else lambda: None
    clock = time.perf_counter if on_device else time.process_time
    for _ in range(repeats + 1):
        wait()
        began = clock()
        step().sum().backward()
        wait()
        times.append(1e3 * (clock() - began))
    return statistics.median(times[1:])


def kept_bytes(step: Callable[[], Tensor]) -> int:
    """Return the memory that a step keeps for its backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = step()
    del output
    return sum(kept.values())


def selection(length: int, topk: int, device: str) -> Tensor:
    """Return which keys are chosen `[seq, seq]`."""
    hidden = hidden_keys(length, None, torch.device("cpu"))
    scores = torch.randn(1, length, length, generator=torch.Generator().manual_seed(1))
    return select(scores.masked_fill_(hidden, float("-inf")), hidden, topk)[0].to(device)


def check(device: str) -> None:
    """Check that the ways agree, with their gradients."""
    chosen = selection(512, 64, device)
    found = {}
    for name, way in WAYS.items():
        given = inputs(512, device)
        output = way(given, chosen)
        output.square().sum().backward()
        found[name] = [output, *(leaf.grad for leaf in given.values())]
    for name in ("softmax", "per_head", "gathered"):
        for ours, theirs in zip(found[name], found["masked"], strict=True):
            worst = (ours - theirs).abs().max() / theirs.abs().max()
            if worst > 1e-5:
                raise SystemExit(f"{name} differs from masked by {worst:.1e}")


def attention_rows(repeats: int, device: str) -> list[dict[str, Any]]:
    """Return time and kept memory of each way, by length and keys."""
    rows = []
    for length in LENGTHS:
        for topk in TOPKS:
            chosen = selection(length, topk, device)
            for name, way in WAYS.items():
                given = inputs(length, device)

                def step(way: Any = way, given: Any = (given, chosen)) -> Tensor:
                    return way(*given)

                row = {"length": length, "topk": topk, "way": name}
                row["ms"] = round(milliseconds(step, repeats), 2)
                row["kept_mib"] = round(kept_bytes(step) / 2**20, 2)
                rows.append(row)
                print(row, flush=True)
    return rows


def indexer_rows(repeats: int, device: str) -> list[dict[str, Any]]:
    """Return time and kept memory of the indexer's loss, by length."""
    rows = []
    for length in LENGTHS:
        hidden = hidden_keys(length, None, torch.device(device))
        draw = torch.Generator().manual_seed(0)
        shapes = (
            (length, 1, INDEX_HEADS, INDEX_WIDTH),
            (length, 1, INDEX_WIDTH),
            (length, 1, INDEX_HEADS),
        )
        leaves = [torch.randn(s, generator=draw).to(device).requires_grad_() for s in shapes]
        target = torch.randn(1, length, length, generator=draw).to(device)
        target = target.masked_fill(hidden, float("-inf")).softmax(-1)
        for way in (at_once, by_head):

            def step(way: Any = way, given: Any = (leaves, hidden, target)) -> Tensor:
                return way(*given)

            row = {"length": length, "way": way.__name__}
            row["ms"] = round(milliseconds(step, repeats), 2)
            row["kept_mib"] = round(kept_bytes(step) / 2**20, 2)
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    repeats, device = arguments.repeats, arguments.device
    torch.set_num_threads(1)
    check(device)
    results = {
        "machine": {
            "processor": platform.machine(),
            "device": device,
            "torch": torch.__version__,
            "threads": 1,
        },
        "sizes": {
            "heads": HEADS,
            "key_width": CONTENT + ROTATED,
            "value_width": VALUES,
            "latent_width": LATENT,
            "indexer_heads": INDEX_HEADS,
            "indexer_width": INDEX_WIDTH,
        },
        "attention": attention_rows(repeats, device),
        "indexer": indexer_rows(repeats, device),
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(write(results))


if __name__ == "__main__":
    main()

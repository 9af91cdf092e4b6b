"""The page of NAM56R's figures, `nam56r.md`; `generate.py` writes it."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

from megacpp_nemo.contract import BlockFamily, HybridRecipe, recipe
from megacpp_nemo.planner.counts import TABLES, Count, counts
from megacpp_nemo.planner.flops import forward_flops, training_flops, training_flops_per_token
from megacpp_nemo.planner.gpus import gpu_called
from megacpp_nemo.planner.pieces import GROUPS, Piece, Role, pieces
from megacpp_nemo.planner.tensors import piece_tensors
from megacpp_nemo.planner.upstream import upstream_training_flops

SHAPES = {"nam56r": 3584, "nam56r_4096": 4096}
LANES = {"nemo_native": "Mamba-2", "author_dp": "Mamba-3"}
PEAK = gpu_called("h200").bf16_flops
RATE, NATIVE_RATE = 9_250, 211_000
WIDE = {"model.embedding.vocab_size": 131_072}
NEAREST = {**WIDE, "features.ngram_hash": False, "model.mtp.pattern": "A"}
# Megatron-LM's formula: what is said of it, changes of the recipe, and whether R counts as M.
UPSTREAM: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("", {}, False),
    (", R as Mamba", {}, True),
    (", R as Mamba, vocabulary 131,072", WIDE, True),
)
TABLE_NAMES = dict(zip(TABLES, ("token embedding", "n-gram tables"), strict=False))

INTRO = """# NAM56R in figures

Written by `make docs` from the planner, which counts what is built: parameters equal those of the
model on the meta device, operations are within 1% of what torch counts as the blocks run.

- **Operations.** A multiply-add is 2. Matrix products, convolutions and the products of scans are
  counted, at the shapes that are built; norms, activations, softmax and other elementwise work are
  not, and looking a row up is 0. Of attention's scores the causal mask leaves (S + 1) / 2 keys for
  a token, S being 4,096: the columns "forward" and "training". "Dense kernels" counts all of them,
  as such kernels execute. Training is 3 forward passes; the target of the sparse attention's
  indexer has no backward pass and is counted once.
- **Active.** All parameters but those of routed experts, of which a token visits 4 of 16.
  Embeddings (token and n-gram tables, and the output head) are counted in, and given apart.
"""


def page() -> str:
    """Return the page."""
    parts = [INTRO]
    for name, hidden in SHAPES.items():
        parts += [f"## Hidden size {hidden}: `{name}`\n", *_shape(name)]
    parts += ["## Where a token's operations go\n", *_terms("nam56r"), *_published()]
    return "\n".join(parts).rstrip() + "\n"


def _shape(name: str) -> Iterable[str]:
    native, author = (recipe(name, mode=lane) for lane in LANES)
    head = ("", "layers", "parameters", "active", "forward, MFLOP", "training, GFLOP",
            "dense kernels, GFLOP")  # fmt: skip
    rows = [_family(native, group, own) for group, own in _groups(native)]
    rows.append(_total(native, f"**in all, with {LANES['nemo_native']}**"))
    mamba = dict(_groups(author))["M Mamba"]
    rows += [
        _family(author, "M Mamba, the authored lane's instead", mamba),
        _total(author, f"**in all, with {LANES['author_dp']}**"),
    ]
    yield table(head, rows)
    for lane, mixer in LANES.items():
        whole = counts(recipe(name, mode=lane)).whole
        yield (
            f"With {mixer}, {billions(whole.embeddings)} of the parameters are embeddings: without "
            f"them {billions(whole.total_without_embeddings)}, and "
            f"{billions(whole.active_without_embeddings)} active.\n"
        )
    tables = {
        TABLE_NAMES[tensor.name]: prod(tensor.shape)
        for tensor in piece_tensors(native, pieces(native)[0])
        if tensor.name in TABLE_NAMES
    }
    listed = ", ".join(f"{label} {size / 1e6:,.1f}M" for label, size in tables.items())
    yield f"Of the embedding: {listed}; the rest projects n-grams.\n"


def _groups(intent: HybridRecipe) -> list[tuple[str, list[Piece]]]:
    """Return the pieces of each group: the embedding, the families, and what follows them."""
    found: dict[str, list[Piece]] = {}
    for piece in pieces(intent):
        found.setdefault(piece.group, []).append(piece)
    families = [name for name in GROUPS.values() if name in found]
    order = ["embedding", *families]
    order += [name for name in found if name not in order]
    return [(name, found[name]) for name in order]


def _family(intent: HybridRecipe, label: str, own: list[Piece]) -> tuple[str, ...]:
    costs = dict(counts(intent).pieces)
    layers = sum(piece.family is not None for piece in own)
    count = sum((costs[piece] for piece in own), Count())
    return _row(intent, label, str(layers or ""), count, own)


def _total(intent: HybridRecipe, label: str) -> tuple[str, ...]:
    return _row(intent, label, "", counts(intent).whole, pieces(intent))


def _row(
    intent: HybridRecipe, label: str, layers: str, count: Count, own: Iterable[Piece]
) -> tuple[str, ...]:
    own = list(own)
    forward = sum(forward_flops(intent, piece).total for piece in own)
    masked, dense = (
        sum(training_flops(intent, piece, full_scores=full) for piece in own)
        for full in (False, True)
    )
    return (
        label,
        layers,
        f"{count.total:,}",
        f"{count.active:,}",
        f"{forward / 1e6:,.1f}",
        f"{masked / 1e9:,.3f}",
        f"{dense / 1e9:,.3f}",
    )


def _terms(name: str) -> Iterable[str]:
    yield "MFLOP of a forward pass per token and layer, at hidden size 3584:\n"
    rows, seen = [], set()
    for lane in LANES:
        intent = recipe(name, mode=lane)
        for piece in pieces(intent):
            if piece.role in (Role.FINAL_NORM, Role.DEPTH_LAYER):
                continue
            label = f"M {LANES[lane]}" if piece.group == "M Mamba" else piece.group
            label = piece.name if piece.depth else label
            if label not in seen:
                seen.add(label)
                rows += [
                    (label, term, f"{value / 1e6:,.3f}")
                    for term, value in forward_flops(intent, piece).terms.items()
                ]
    yield table(("", "term", "MFLOP"), rows)


def _published() -> Iterable[str]:
    """Compare with what others published, which nobody has reproduced here."""
    yield "## What was published\n"
    yield (
        "For the full model on 8 x H200 in bf16: 4.73B parameters, 3.03B active, 289 TFLOP/s at "
        f"about {RATE:,} tokens/s for each GPU. For its native Mamba lane alone, in FP8: "
        f"{NATIVE_RATE:,} tokens/s over the 8 GPUs, 50.1% MFU.\n"
    )
    yield "### Parameters\n"
    cases: list[tuple[str, str, str, dict[str, Any]]] = [
        (f"{hidden}, {mixer}", name, lane, {})
        for name, hidden in SHAPES.items()
        for lane, mixer in LANES.items()
    ]
    label = "3584, Mamba-3, vocabulary 131,072, no n-gram memory, a depth of attention alone"
    cases.append((label, "nam56r", "author_dp", NEAREST))
    rows = []
    for label, name, lane, changes in cases:
        whole = counts(recipe(name, mode=lane, changes=changes)).whole
        against = (whole.total / 4.73e9 - 1, whole.active / 3.03e9 - 1)
        sizes = (billions(whole.total), billions(whole.active))
        rows.append((label, sizes[0], f"{against[0]:+.1%}", sizes[1], f"{against[1]:+.1%}"))
    yield table(("shape", "parameters", "against 4.73B", "active", "against 3.03B"), rows)
    layers = recipe("nam56r").layers.counts()[BlockFamily.EXPERTS]
    size = 2 * 3584 * 896
    yield (
        f"The two figures are 1.70B apart. {layers} expert layers x 12 experts that a token does "
        f"not visit x {size / 1e6:.2f}M are {layers * 12 * size / 1e9:.3f}B: experts without gates "
        "at hidden size 3584, and none in a prediction depth. The last line is such a setting, and "
        "within 1% of both; how they were counted is not published.\n"
    )
    yield "### Rates\n"
    yield from _rates()


def _rates() -> Iterable[str]:
    published = 289e12
    yield (
        f"289 TFLOP/s at {RATE:,} tokens/s are {published / RATE / 1e9:.2f} GFLOP a token. This "
        "is what that rate comes to by our count, and by Megatron-LM's formula for hybrids, which "
        "takes Mamba's inner width as twice the hidden size and latent attention as attention "
        "with full projections, and counts an R layer only where a Mamba symbol stands for it.\n"
    )
    rows = []
    for name, hidden in SHAPES.items():
        for lane, mixer in LANES.items():
            for how, full in (("training", False), ("dense kernels", True)):
                cost = training_flops_per_token(recipe(name, mode=lane), full_scores=full)
                rows.append((f"{hidden}, {mixer}", f"ours, {how}", *_rate(cost)))
        for label, changes, symbols in UPSTREAM:
            cost = _upstream(name, symbols, changes)
            rows.append((f"{hidden}", f"Megatron-LM's{label}", *_rate(cost)))
    head = ("shape", "formula", "GFLOP/token", f"TFLOP/s at {RATE:,}", "of an H200's peak")
    yield table(head, rows)
    nearest = _upstream("nam56r_4096", True, WIDE) * RATE
    full_model = training_flops_per_token(recipe("nam56r", mode="author_dp")) * RATE
    yield (
        "Nearest to 289 is Megatron-LM's formula at hidden size 4096 with two prediction depths "
        f"and a vocabulary of 131,072: {nearest / 1e12:.0f} TFLOP/s, "
        f"{nearest / published - 1:+.1%}. At 3584, whose parameters were published, no formula "
        "here reaches it. By our count the "
        f"3584 model with Mamba-3 does {full_model / 1e12:.0f} TFLOP/s at that rate, "
        f"{full_model / PEAK:.1%} of the peak ({PEAK / 1e12} TFLOP/s, dense bf16).\n"
    )
    each = NATIVE_RATE / 8
    theirs, ours = _upstream("nam56r", False, {}), training_flops_per_token(recipe("nam56r"))
    yield (
        f"The other rate agrees with that formula: {NATIVE_RATE:,} tokens/s are {each:,.0f} on "
        f"each GPU, with {theirs / 1e9:.2f} GFLOP a token {each * theirs / 1e12:.0f} TFLOP/s, "
        f"{each * theirs / PEAK:.1%} of the bf16 peak, where 50.1% is published. By our count it "
        f"is {each * ours / 1e12:.0f} TFLOP/s, or {each * ours / PEAK:.1%}.\n"
    )


def _upstream(name: str, symbols: bool, changes: dict[str, Any]) -> float:
    intent = recipe(name, changes=changes)
    return sum(upstream_training_flops(intent, recurrent_as_mamba=symbols).values())


def _rate(flops: float) -> tuple[str, str, str]:
    speed = flops * RATE
    return f"{flops / 1e9:.2f}", f"{speed / 1e12:.0f}", f"{speed / PEAK:.1%}"


def billions(count: int) -> str:
    """Return a count as `4.730B`."""
    return f"{count / 1e9:.3f}B"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; columns of numbers are on the right."""
    columns = list(zip(*rows, strict=True))
    rule = [
        "---:" if all(cell[:1] in "+-0123456789" for cell in column) else "---"
        for column in columns
    ]
    lines = (head, rule, *zip(*columns, strict=True))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

"""A plan as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megacpp_nemo.cli.parts import Part
from megacpp_nemo.cli.screen import Cell
from megacpp_nemo.contract import Precision
from megacpp_nemo.planner.collectives import Volume
from megacpp_nemo.planner.costs import Cost
from megacpp_nemo.planner.gpus import GIB, TFLOPS
from megacpp_nemo.planner.plan import Plan
from megacpp_nemo.planner.sizes import sizes_of
from megacpp_nemo.report.numbers import count, share, size, work

MEMORY = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
)


def title(plan: Plan) -> str:
    """Return what is planned, in a line."""
    ranks = plan.recipe.parallelism.world_size
    return f"{plan.recipe.name} on {ranks} x {plan.gpu.title}"


def parts(plan: Plan, *, layers: bool, owned: Mapping[str, Any] | None) -> list[Part]:
    """Return the parts of the report.

    Args:
        plan: The plan.
        layers: Whether to list every layer.
        owned: What a release of Megatron-LM owns, if that is asked.
    """
    found = [_head(plan), _families(plan)]
    if layers:
        found.append(_layers(plan))
    found += [_memory(plan), _traffic(plan), _pipeline(plan), _prediction(plan)]
    if plan.utilization:
        found.append(Part(title="Measured", notes=(plan.utilization.formula,)))
    if owned:
        native, custom = owned["native_layers"], owned["custom_layers"]
        seams = f"; seams: {', '.join(owned['seams'])}" if owned["seams"] else ""
        text = f"{len(native)} of {len(native) + len(custom)} layers are Megatron's own{seams}."
        found.append(Part(title=f"On Megatron-LM {owned['name']}", notes=(text,)))
    return found


def _head(plan: Plan) -> Part:
    recipe, whole = plan.recipe, plan.whole
    batch, model = recipe.batch, recipe.model
    layout = " ".join(f"{n.upper()} {s}" for n, s in sizes_of(recipe)._asdict().items())
    return Part(
        notes=(
            f"{count(whole.count.total)} parameters, {count(whole.count.active)} of them active "
            f"for a token; {count(whole.count.total_without_embeddings)} and "
            f"{count(whole.count.active_without_embeddings)} without embeddings.",
            f"{work(whole.training_flops)} per token in training, {work(whole.forward_flops)} "
            "in a forward pass.",
            f"{len(recipe.layers)} layers, {layout}; {batch.global_batch_size} rows of "
            f"{model.seq_length} tokens a step, {batch.micro_batch_size} in a micro-batch.",
            _verdict(plan),
        )
    )


def _verdict(plan: Plan) -> str:
    fullest, missing = plan.fullest, plan.missing_bytes
    holds = f"a rank of the fullest stage, {fullest.stage + 1}, holds {size(fullest.total_bytes)} "
    have = f"{plan.gpu.memory_gib} GiB"
    if missing > 0:
        return f"DOES NOT FIT: {holds}of {have}: {size(missing)} are missing."
    left = f"{-missing / GIB:.1f} GiB"
    return f"Fits: {holds}of {have}; {left} are left for what is not counted."


def _families(plan: Plan) -> Part:
    whole = plan.whole

    def row(name: str, cost: Cost, style: str = "") -> list[str | Cell]:
        return [
            Cell(name, style),
            str(cost.pieces) if name != "whole model" else "",
            count(cost.count.total),
            share(cost.count.total, whole.count.total),
            count(cost.count.active),
            work(cost.forward_flops),
            work(cost.training_flops),
            share(cost.training_flops, whole.training_flops),
        ]

    head = (
        "family", "pieces", "parameters", "share", "active", "forward/token", "training/token",
        "share",
    )  # fmt: skip
    rows = [row(name, cost) for name, cost in plan.families.items()]
    return Part(
        title="Parameters and operations",
        head=head,
        rows=[*rows, row("whole model", whole, "bold")],
        notes=(
            "A multiply-add is 2 operations; attention is counted as the causal mask leaves it, a "
            "token's mean over a row; training is 3 forward passes, but one of what has no "
            "backward pass. A token is active in every "
            "parameter but those of experts it is not sent to.",
        ),
    )


def _layers(plan: Plan) -> Part:
    rows = [
        (
            piece.name,
            piece.family.letter if piece.family else "",
            str(piece.stage + 1),
            count(cost.count.total),
            count(cost.count.active),
            work(cost.training_flops),
        )
        for piece, cost in plan.pieces
    ]
    head = ("piece", "family", "stage", "parameters", "active", "training/token")
    return Part(title="Every layer", head=head, rows=rows)


def _memory(plan: Plan) -> Part:
    rows: list[list[str | Cell]] = []
    for memory, held in zip(plan.memory, plan.rank_parameters, strict=True):
        figures = memory.to_dict()
        fits = memory.total_bytes <= plan.gpu.memory_bytes
        rows.append(
            [
                str(memory.stage + 1),
                count(held),
                *(size(figures[f"{name}_bytes"]) for name in MEMORY),
                Cell(size(memory.total_bytes), "" if fits else "red"),
            ]
        )
    tables = max(memory.tables_bytes for memory in plan.memory)
    ngrams = f" N-gram tables are {size(tables)} of the weights." if tables else ""
    if host := max(memory.host_bytes for memory in plan.memory):
        ngrams = f" N-gram tables are trained in host memory: {size(host)} a process."
    return Part(
        title="Memory of a rank, by pipeline stage",
        head=("stage", "parameters", *MEMORY, "total"),
        rows=rows,
        notes=(
            f"Recomputation: {plan.recompute}. Masters and moments are the optimizer's; logits are "
            "the loss's part of the activations. Not counted: the CUDA context, buffers of "
            f"collectives, fragmentation.{ngrams}",
        ),
    )


def _traffic(plan: Plan) -> Part:
    busiest = max(plan.traffic, key=lambda found: sum(v.bytes_per_rank for v in found))
    stage = plan.traffic.index(busiest)
    rows = [
        (group, operation, str(ranks), f"{number:,}", size(sent))
        for (group, operation, ranks), (number, sent) in _summed(busiest)
    ]
    if not rows:
        return Part(title="Traffic", notes=("A single rank sends nothing.",))
    return Part(
        title=f"Sent by a rank in a step, busiest stage ({stage + 1})",
        head=("group", "operation", "ranks", "calls", "bytes sent"),
        rows=rows,
        notes=("Bytes that one rank sends when a collective goes round a ring.",),
    )


def _summed(volumes: tuple[Volume, ...]) -> Iterator[tuple[tuple[str, str, int], list[int]]]:
    found: dict[tuple[str, str, int], list[int]] = {}
    for volume in volumes:
        total = found.setdefault((volume.group, volume.operation, volume.ranks), [0, 0])
        total[0] += volume.count
        total[1] += volume.bytes_per_rank
    yield from found.items()


def _pipeline(plan: Plan) -> Part:
    loads = plan.pipeline
    if loads.stages == 1:
        return Part(title="Pipeline", notes=("One stage: no bubble, nothing to balance.",))
    mean = sum(loads.stage_loads) / loads.stages
    columns = 4 if loads.chunks > 1 else 3
    rows = [
        (str(stage + 1), work(load), share(load, mean), " + ".join(map(work, chunks)))[:columns]
        for stage, (load, chunks) in enumerate(
            zip(loads.stage_loads, loads.chunk_loads, strict=True)
        )
    ]
    vpp = f" --vpp {loads.chunks}" if loads.chunks > 1 else ""
    return Part(
        title="Pipeline",
        head=("stage", "training/token", "of the mean", "chunks")[:columns],
        rows=rows,
        notes=(
            f"Stage {loads.most_loaded + 1} has most to do, {loads.imbalance:.2f} times the mean. "
            f"With {loads.micro_batches} micro-batches the bubble is {loads.bubble_share:.1%} of a "
            f"step, (p - 1) / (m v) of the work. Together they leave {loads.efficiency:.1%} of the "
            f"GPUs. `megacpp balance {plan.recipe.name} --pp {loads.stages}{vpp}` proposes "
            "boundaries.",
        ),
    )


def _prediction(plan: Plan) -> Part:
    step, gpus = plan.step, plan.recipe.parallelism.world_size
    rows = [
        (name, f"{seconds:.3f} s", share(seconds, step.seconds))
        for name, seconds in step.to_dict().items()
    ]
    return Part(
        title="Predicted step (not measured)",
        head=("part", "seconds", "share"),
        rows=rows,
        notes=(
            f"{plan.tokens_per_second:,.0f} tokens/s, {plan.tokens_per_second / gpus:,.0f} a GPU, "
            f"if arithmetic reaches {plan.efficiency:.0%} of its dense peak ({_peak(plan)}). "
            "Exchange is tensor, expert, context and pipeline traffic over the published "
            "bandwidth of the links; data is what work does not hide of data parallelism's.",
        ),
    )


def _peak(plan: Plan) -> str:
    """Return the peak that the prediction takes a share of."""
    gpu, precision = plan.gpu, plan.recipe.precision
    if precision is Precision.FP32:
        return f"{gpu.fp32_flops / TFLOPS:,.1f} TFLOP/s in fp32"
    peak = f"{gpu.bf16_flops / TFLOPS:,.1f} TFLOP/s in bf16"
    if precision is Precision.FP8_EXPERTS and gpu.fp8_flops:
        peak += f", {gpu.fp8_flops / TFLOPS:,.1f} in FP8 for experts"
    return peak

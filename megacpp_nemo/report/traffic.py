"""The section of the pipeline and of what ranks send each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megacpp_nemo.planner.collectives import Volume
from megacpp_nemo.planner.pipeline import Pipeline
from megacpp_nemo.planner.plan import Plan
from megacpp_nemo.report.numbers import share, size, work
from megacpp_nemo.report.tables import Table


def traffic(plan: Plan) -> dict[str, Any]:
    """Return what `templates/plan.html` draws."""
    sent = [_bytes(stage) for stage in plan.traffic]
    busiest = sent.index(max(sent))
    tables = [_stages(plan.pipeline, sent)]
    if plan.traffic[busiest]:
        tables.append(_volumes(plan.traffic[busiest], busiest, len(sent)))
    return {"tables": [*tables, _step(plan)]}


def most_sent(plan: Plan) -> int:
    """Return the bytes that the rank which sends most sends in an optimizer step."""
    return max(map(_bytes, plan.traffic))


def _bytes(sent: Sequence[Volume]) -> int:
    return sum(volume.bytes_per_rank for volume in sent)


def _stages(found: Pipeline, sent: Sequence[int]) -> Table:
    loads = found.stage_loads
    rows = [
        (f"stage {stage + 1}", work(load), f"{load / max(loads):.1%}", size(own))
        for stage, (load, own) in enumerate(zip(loads, sent, strict=True))
    ]
    return Table(
        caption="Work of the pipeline's stages",
        head=("stage", "training, a token", "of the most loaded", "sent by a rank, a step"),
        rows=rows,
        note=_bubble(found),
    )


def _bubble(found: Pipeline) -> str:
    if found.stages == 1:
        return "One stage: no bubble, and nothing to balance."
    return (
        f"The most loaded stage has {found.imbalance:.3f} times the mean, and paces the others. "
        f"With {found.micro_batches} micro-batches a step, the bubble is {found.bubble_share:.1%} "
        f"of it; both together leave {found.efficiency:.1%} of a step for work."
    )


def _volumes(sent: Sequence[Volume], stage: int, stages: int) -> Table:
    groups: dict[tuple[str, str], list[Volume]] = {}
    for volume in sent:
        groups.setdefault((volume.group, volume.operation), []).append(volume)
    rows = [
        (
            group,
            operation,
            str(own[0].ranks),
            f"{sum(volume.count for volume in own):,}",
            size(_bytes(own)),
        )
        for (group, operation), own in sorted(groups.items(), key=lambda item: -_bytes(item[1]))
    ]
    rows.append(("all", "", "", "", size(_bytes(sent))))
    where = f", of stage {stage + 1}" if stages > 1 else ""
    return Table(
        caption=f"What a rank sends in a step{where}",
        head=("group", "operation", "ranks", "count", "sent"),
        rows=rows,
        note="Bytes that one rank sends when a collective goes round a ring.",
        words=(1,),
        last_is_sum=True,
    )


def _step(plan: Plan) -> Table:
    parts = {
        "arithmetic": plan.step.compute,
        "exchange between ranks": plan.step.exchange,
        "pipeline bubble": plan.step.bubble,
        "data parallelism": plan.step.data,
    }
    whole = plan.step.seconds
    rows = [(name, f"{own:.3f} s", share(own, whole)) for name, own in parts.items()]
    rows.append(("step", f"{whole:.3f} s", "100.0%"))
    gpus = plan.recipe.parallelism.world_size
    return Table(
        caption="Predicted step: a simple model, no measurement",
        head=("part", "time", "share"),
        rows=rows,
        note=f"{plan.tokens_per_second:,.0f} tokens a second, {plan.tokens_per_second / gpus:,.0f} "
        f"a GPU, if arithmetic reaches {plan.efficiency:.0%} of the {plan.gpu.title}'s dense peak "
        "and traffic the published bandwidth of its links.",
        last_is_sum=True,
    )

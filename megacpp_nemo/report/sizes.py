"""The tables of parameters and operations."""

from __future__ import annotations

from megacpp_nemo.planner.plan import Plan
from megacpp_nemo.report.numbers import share, work
from megacpp_nemo.report.tables import Table


def parameters_table(plan: Plan) -> Table:
    """Return parameters by family: all, and those that are active for a token."""
    whole = plan.whole.count
    rows = [
        (name, f"{own.count.total:,}", share(own.count.total, whole.total), f"{own.count.active:,}")
        for name, own in plan.families.items()
    ]
    rows.append(("all", f"{whole.total:,}", "100.0%", f"{whole.active:,}"))
    return Table(
        caption="Parameters by family",
        head=("family", "parameters", "share", "active for a token"),
        rows=rows,
        note=(
            f"{whole.total_without_embeddings:,} of them, {whole.active_without_embeddings:,} "
            "active, are neither looked up in a table nor in the output head. A token is active "
            "in every parameter but those of the routed experts that it does not visit."
        ),
        last_is_sum=True,
    )


def flops_table(plan: Plan) -> Table:
    """Return operations by family, of a forward pass and of a training step, per token."""
    whole = plan.whole
    rows = [
        (
            name,
            work(own.forward_flops),
            work(own.training_flops),
            share(own.training_flops, whole.training_flops),
        )
        for name, own in plan.families.items()
        if own.forward_flops
    ]
    rows.append(("all", work(whole.forward_flops), work(whole.training_flops), "100.0%"))
    return Table(
        caption="Operations a token, by family",
        head=("family", "forward", "training", "share"),
        rows=rows,
        note="A multiply-add is two operations; training is three forward passes, but one of what "
        "has no backward pass. Attention counts what the causal mask leaves; norms and other "
        "elementwise work are not counted.",
        last_is_sum=True,
    )

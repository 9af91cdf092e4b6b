"""`megacpp fit`: the layouts of a recipe that fit some GPUs, best predicted first."""

from __future__ import annotations

import argparse

from megacpp_nemo.cli.given import read_recipe
from megacpp_nemo.cli.lower import to_json
from megacpp_nemo.cli.parts import Part, drawn
from megacpp_nemo.cli.planning import (
    add_efficiency,
    add_gpu,
    in_options,
    number,
    plan_command,
)
from megacpp_nemo.cli.usage import Parser, UsageError, add_recipe_options, whole_number
from megacpp_nemo.contract.errors import lookup
from megacpp_nemo.contract.parallelism import RECOMPUTE
from megacpp_nemo.planner.fit import RESERVE_GIB, Fit, fit
from megacpp_nemo.planner.gpus import GIB
from megacpp_nemo.planner.layouts import NEMO
from megacpp_nemo.planner.prediction import EFFICIENCY
from megacpp_nemo.planner.reasons import Candidate, Reason
from megacpp_nemo.planner.sizes import Sizes

SHOWN = 10
LANES = (NEMO, "megatron")
HEAD = ("layout", "rows")


def parser(name: str) -> Parser:
    """Return what `megacpp fit` takes."""
    made = Parser(
        name,
        "RECIPE [FIELD=VALUE ...] [--gpu G] [--count N] [--as LANE] [--all] ...",
        "Print which layouts of a recipe fit in the memory of N GPUs, best predicted first, and\n"
        "why the others are out: the contract's refusal, or the GiB that are missing. The global\n"
        "batch is the recipe's; stages are cut as `megacpp balance` does, unless the pattern\n"
        "has '|'.",
        (
            "megacpp fit nam56r --gpu h200 --count 64",
            "megacpp fit nam56r precision=fp8 --gpu b200 --recompute full",
            "megacpp fit nam56r_tiny global_batch_size=16 --count 4 --all --format json",
        ),
        ("text", "json", "md"),
    )
    add_recipe_options(made)
    add_gpu(made)
    made.add("--count", metavar="N", type=whole_number(1), default=8, help="GPUs; 8 by default")
    made.add(
        "--as",
        metavar="LANE",
        dest="lane",
        default=LANES[0],
        help="nemo (default), or megatron, whose script has virtual stages and context ranks too",
    )
    made.add(
        "--recompute", metavar="R", help=f"{', '.join(RECOMPUTE)}; the least that fits by default"
    )
    made.add(
        "--reserve",
        metavar="GIB",
        help=f"memory of a GPU to keep free; {RESERVE_GIB:g} GiB by default",
    )
    add_efficiency(made)
    made.add("--all", action="store_true", help="list every layout, also each that is out")
    return made


def run(given: argparse.Namespace) -> str:
    """Return the layouts in the format asked for.

    Raises:
        MegaCppError: If the words mean no recipe, GPU, or number of GPUs.
    """
    if not given.words:
        parser(given.command).refuse("fit needs a recipe", "none", hint="megacpp fit nam56r")
    recipe = read_recipe(given.words[0], given.words[1:], given.mode)
    lanes = {lane: lane for lane in LANES}
    what = f"fit knows no --as {given.lane!r}"
    lane = lookup(lanes, given.lane, what=what, field="--as", error=UsageError)
    share = number("--efficiency", given.efficiency, "0.3", most=1)
    reserve = number("--reserve", given.reserve, "6", zero=True)
    with in_options():
        found = fit(
            recipe,
            given.gpu,
            given.count,
            lane=NEMO if lane == NEMO else None,
            recompute=given.recompute,
            efficiency=share or EFFICIENCY,
            reserve_gib=RESERVE_GIB if reserve is None else reserve,
        )
    if given.format == "json":
        return to_json(found.to_dict(every=given.all))
    nodes = f"{found.nodes} node{'s' * (found.nodes > 1)} of {found.devices}"
    title = f"{recipe.name} on {found.count} x {found.gpu.title}, {nodes}"
    return drawn(title, _parts(found, given), given.format, given.screen)


def _parts(found: Fit, given: argparse.Namespace) -> list[Part]:
    batch, room = found.recipe.batch, found.room_bytes / GIB
    every = len(found.candidates) + len(found.too_large) + len(found.refused)
    top = Part(
        notes=(
            f"{len(found.candidates):,} of {every:,} layouts fit: a rank holds at most {room:.1f} "
            f"GiB, {found.gpu.memory_gib} less {found.reserve_gib:g} for what is not counted. A "
            "layout is its parallel sizes, of which those that are 1 are not written, and the rows "
            f"of a micro-batch, of {batch.global_batch_size} rows a step.",
        )
    )
    parts = [top]
    if found.candidates:
        parts += [_best(found, None if given.all else SHOWN), _taken(found, given)]
    parts.append(_out(found))
    if given.all and (found.too_large or found.refused):
        parts.append(_out_each(found))
    return parts


def _best(found: Fit, most: int | None) -> Part:
    rows = [_row(found, candidate) for candidate in found.candidates[:most]]
    head = (*HEAD, "recompute", "GiB", "tokens/s", "seconds", "work", "exchange", "bubble", "data")
    left = len(found.candidates) - len(rows)
    more = f" {left:,} more: --all." if left else ""
    return Part(
        title="Best predicted first (not measured)",
        head=head,
        rows=rows,
        notes=(
            f"Predicted with arithmetic at {found.efficiency:.0%} of its dense peak and traffic at "
            "the links' published bandwidth; the last four columns are the parts of a step in "
            f"seconds. `megacpp plan` says more of one.{more}",
        ),
    )


def _row(found: Fit, candidate: Candidate) -> tuple[str, ...]:
    time, layout = candidate.time, candidate.layout
    return (
        _written(layout.sizes),
        str(layout.micro_batch_size),
        candidate.recompute,
        f"{candidate.memory_bytes / GIB:.1f}",
        f"{found.tokens_per_second(candidate):,.0f}",
        f"{time.seconds:.3f}",
        *(f"{part:.3f}" for part in (time.compute, time.exchange, time.bubble, time.data)),
    )


def _written(sizes: Sizes) -> str:
    """Return the sizes above 1, as in `TP2 DP4`."""
    parts = [f"{name.upper()}{size}" for name, size in sizes._asdict().items() if size > 1]
    return " ".join(parts) or "one GPU"


def _taken(found: Fit, given: argparse.Namespace) -> Part:
    """Return the command that plans the first layout, with the fields that it changes."""
    first = found.candidates[0]
    command = plan_command(given, found.recipe, found.changes(first))
    return Part(title="Plan the first", code=(f"{command} --gpu {found.gpu.name}",))


def _out(found: Fit) -> Part:
    reasons = found.reasons()
    if not reasons:
        return Part(title="Out", notes=("Nothing: every layout fits.",))
    return Part(
        title="Out, and why",
        head=("layouts", "why", "which", "an example", "try"),
        rows=[
            (f"{reason.count:,}", reason.what, _which(reason), reason.given, reason.hint)
            for reason in reasons
        ],
    )


def _which(reason: Reason) -> str:
    """Return the sizes that layouts have which are out for a reason."""
    parts = []
    for name, values in reason.values.items():
        listed = ", ".join(map(str, values))
        if len(values) > 4:
            listed = f"{values[0]} to {values[-1]}"
        parts.append(f"{name.upper()} {listed}")
    return "; ".join(parts)


def _out_each(found: Fit) -> Part:
    rows: list[tuple[str, ...]] = [
        (
            _written(item.layout.sizes),
            str(item.layout.micro_batch_size),
            f"{item.missing_bytes / GIB:.1f} GiB missing",
        )
        for item in found.too_large
    ]
    rows += [
        (
            _written(refused.sizes),
            "-" if refused.micro_batch_size is None else str(refused.micro_batch_size),
            refused.error.what,
        )
        for refused in found.refused
    ]
    return Part(title="Each that is out", head=(*HEAD, "why"), rows=rows)

"""ReDo, recycling dormant neurons (arXiv 2302.12902), on the MLPs of expert layers.

    s_i = E|h_i| / (mean_k E|h_k| + 1e-9),    unit i is dormant iff s_i <= threshold

- `scores`, `dormant`: the measure of each unit, and the verdict
- `report`: how many units of each MLP are dormant
- `recycle`: dormant units made new

A recycled unit's incoming weights are drawn anew and its outgoing ones are zero, so a unit that
was silent stays without effect until it learns one. The output layer has no units of its own and
is never touched.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from megacpp_nemo.callbacks.activity import ActivityMeter
from megacpp_nemo.callbacks.journal import Action
from megacpp_nemo.callbacks.matrices import hybrid_models
from megacpp_nemo.callbacks.mlps import Mlp, Share, shares_of
from megacpp_nemo.callbacks.optimizers import OptimizerStates
from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.plasticity import RedoLever

EPSILON = 1e-9


def scores(meter: ActivityMeter) -> dict[str, Tensor]:
    """Return the score of each unit, by MLP, `[units]` in fp64 on the CPU; they average 1.

    MLPs that have seen no tokens have no scores and are left out. A unit that no token has met
    since it was recycled has score 1, as if it were like the others.
    """
    found = {}
    for mlp, steps, means, ages in _measured(meter):
        if steps:
            known = ages > 0
            mean = means[known].mean() if bool(known.any()) else means.new_ones(())
            found[mlp.name] = torch.where(known, means / (mean + EPSILON), 1.0)
    return found


def dormant(meter: ActivityMeter, lever: RedoLever) -> dict[str, Tensor]:
    """Return which units are dormant, by MLP, truths `[units]` on the CPU.

    MLPs that have seen no tokens are left out. Recycled units that are `waiting` are not dormant.
    """
    late = waiting(meter)
    return {name: (score <= lever.threshold) & ~late[name] for name, score in scores(meter).items()}


def waiting(meter: ActivityMeter) -> dict[str, Tensor]:
    """Return which recycled units cannot be judged yet, by MLP, truths `[units]` on the CPU.

    A recycled unit is judged again when it was measured for as many steps as the running mean
    remembers, `1 / (1 - decay)`, or as the rest of its MLP: never by a single batch.
    """
    memory = round(1 / (1 - meter.decay))
    return {mlp.name: ages < min(steps, memory) for mlp, steps, _, ages in _measured(meter)}


def _measured(meter: ActivityMeter) -> Iterable[tuple[Mlp, int, Tensor, Tensor]]:
    """Yield each MLP, the steps it had tokens on, its units' means and ages, on the CPU."""
    means, ages, steps = meter.means.cpu(), meter.ages.cpu(), meter.steps.tolist()
    for mlp, count in zip(meter.mlps, steps, strict=True):
        yield mlp, count, means[mlp.span], ages[mlp.span]


def report(meter: ActivityMeter, lever: RedoLever, *, step: int) -> Action:
    """Return how many units are dormant, in each MLP and overall: the same on every rank.

    An MLP's `steps` are those on which it had tokens; with none it is `unseen` and nothing of it
    is dormant. The overall `ratio` is over the units of MLPs that were seen.
    """
    began = time.perf_counter()
    matrices, totals = _tally(meter, dormant(meter, lever))
    return Action(
        lever="redo",
        step=step,
        cause="report",
        matrices=matrices,
        totals=totals,
        seconds=time.perf_counter() - began,
    )


def _tally(
    meter: ActivityMeter, masks: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return what is said of each MLP, and of all."""
    found: dict[str, dict[str, float]] = {}
    for mlp, steps in zip(meter.mlps, meter.steps.tolist(), strict=True):
        count = float(masks[mlp.name].sum()) if mlp.name in masks else 0.0
        found[mlp.name] = {
            "units": float(mlp.units),
            "dormant": count,
            "ratio": count / mlp.units,
            "steps": float(steps),
        }
    seen = sum(each["units"] for each in found.values() if each["steps"])
    count = sum(each["dormant"] for each in found.values())
    return found, {
        "mlps": float(len(found)),
        "unseen": float(sum(not each["steps"] for each in found.values())),
        "units": sum(each["units"] for each in found.values()),
        "dormant": count,
        "ratio": count / seen if seen else 0.0,
        "waiting": float(sum(int(late.sum()) for late in waiting(meter).values())),
    }


@torch.no_grad()
def recycle(
    models: Any,
    meter: ActivityMeter,
    lever: RedoLever,
    optimizers: Iterable[Any],
    *,
    step: int,
    seed: int,
    cause: str = "step",
) -> Action:
    """Make the dormant units new: weights, masters and Adam's moments, and nothing else.

    Incoming weights are drawn as they first were, a function of the seed, the step, the MLP and
    the unit alone; biases, outgoing weights and the moments of all of them become zero. Step
    counts stay. The meter forgets the units. Each rank writes what it holds, with no collective.

    Args:
        models: The model in training: NeMo's `MegatronParallel`, wrapped or bare models.
        meter: What measured it, right after its `step`.
        lever: Which units are dormant.
        optimizers: The run's optimizers, as `OptimizerStates` takes them.
        step: Optimizer steps taken.
        seed: Seed of the new weights.
        cause: Why, for the journal.

    Returns:
        What was done to the whole model, the same on every rank; `bytes` are those of the rows,
        columns and biases that were written.

    Raises:
        RuntimeRefusal: If the weights of a dormant unit are frozen.
    """
    began = time.perf_counter()
    bare, states = hybrid_models(models), OptimizerStates(optimizers)
    config: Any = bare[0].config
    masks = {name: mask for name, mask in dormant(meter, lever).items() if bool(mask.any())}
    shares = [share for share in shares_of(bare, meter.mlps) if share.mlp.name in masks]
    _refuse_frozen(shares)
    for share in shares:
        mask = masks[share.mlp.name][share.begin : share.begin + share.units]
        if bool(mask.any()):
            _renew(share, mask, _drawn(share, config, seed=seed, step=step), states)
    matrices, totals = _tally(meter, masks)
    units = torch.zeros(meter.means.numel(), dtype=torch.bool)
    for mlp in meter.mlps:
        units[mlp.span] = masks.get(mlp.name, units.new_zeros(()))
    meter.forget(units)
    return Action(
        lever="redo",
        step=step,
        cause=cause,
        matrices={name: matrices[name] for name in masks},
        totals=totals,
        seconds=time.perf_counter() - began,
        bytes=_written(config, meter.mlps, masks),
    )


def _renew(share: Share, mask: Tensor, drawn: Tensor, states: OptimizerStates) -> None:
    """Make this rank's dormant units of one MLP new.

    Args:
        share: This rank's share.
        mask: Truths `[units]` of the share.
        drawn: New incoming weights `[gate and up, units, width]` of the share.
        states: The optimizers' states.
    """
    into, bias, out = share.tensors()
    mask = mask.to(into.device)
    # Assigned to by index: `into[mask].fill_()` would write to a copy.
    into.data.view(drawn.shape)[:, mask] = drawn.to(into)[:, mask]
    rows = mask.repeat(drawn.size(0))
    states.follow(into, rows[:, None], reset=True)
    if bias is not None:
        bias.data[rows] = 0
        states.follow(bias, rows, reset=True)
    out.data[:, mask] = 0
    states.follow(out, mask, reset=True)


def _drawn(share: Share, config: Any, *, seed: int, step: int) -> Tensor:
    """Return new incoming weights of this rank's share of an MLP, `[gate and up, units, width]`.

    The whole MLP's are drawn, in fp32 on the CPU, and the share is cut out of them: the initial
    distribution may depend on the whole shape, and every layout gives a unit the same numbers.
    """
    mlp = share.mlp
    parts = share.tensors()[0].size(0) // share.units
    text = f"ReDo {seed} {step} {mlp.name}".encode()
    own = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(own)  # the CPU's alone; the devices' go on
        whole = torch.empty(parts * mlp.units, mlp.width, dtype=torch.float32)
        config.init_method(whole)
    return whole.view(parts, mlp.units, mlp.width)[:, share.begin : share.begin + share.units]


def _refuse_frozen(shares: Iterable[Share]) -> None:
    frozen = sorted(
        {
            share.mlp.name
            for share in shares
            for weight in share.tensors()
            if weight is not None and not weight.requires_grad
        }
    )
    if frozen:
        raise RuntimeRefusal(
            "Dormant units are in layers that are frozen",
            given=", ".join(frozen[:4]) + (", ..." if frozen[4:] else ""),
            allowed="layers that are trained",
            hint="redo.layers without them",
        )


def _written(config: Any, mlps: Iterable[Mlp], masks: Mapping[str, Tensor]) -> int:
    """Return the bytes of rows, columns and biases of the units that are masked."""
    rows = 2 if config.gated_linear_unit else 1
    elements = sum(
        int(masks[mlp.name].sum()) * ((rows + 1) * mlp.width + rows * bool(config.add_bias_linear))
        for mlp in mlps
        if mlp.name in masks
    )
    return elements * int(config.params_dtype.itemsize)

"""How active each unit of the expert layers' MLPs is: a running mean of |h| per token.

h is what an MLP's second linear layer takes in: for a gated MLP the gated activation, for a
routed expert weighted by the router, as that is what reaches the output. Training passes count,
validation does not; where activations are recomputed, the pass with gradients counts. Every rank
ends each step with the same numbers, however the model is laid over them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megacpp_nemo.callbacks.matrices import hybrid_models
from megacpp_nemo.callbacks.mlps import Share, mlps_of, shares_of
from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.plasticity import RedoLever


class ActivityMeter:
    """Measures the units of a model's MLPs while it trains.

    Each step on which tokens arrive at an MLP adds its mean |h| over those tokens to a mean over
    steps that forgets: the latest weighs 1, the one before `decay`, then `decay**2`. It is
    divided by what these sum to, so the first value stands for itself and none is drawn to zero.

    Args:
        models: The model in training: NeMo's `MegatronParallel`, wrapped or bare models.
        lever: Which layers, and how fast the mean forgets.

    Attributes:
        mlps: The MLPs of the whole model, in order.
        means: Mean |h| of every unit `[units]` in fp64; 0 where never measured.
        ages: Steps `[units]` that measured each unit, since it was recycled if it was.
        steps: Steps `[MLPs]` on which each MLP had tokens.

    Raises:
        RecipeError: If a layer of the lever has no MLP.
        RuntimeRefusal: If an MLP is built in a way that is not known here.
    """

    def __init__(self, models: Any, lever: RedoLever) -> None:
        bare = hybrid_models(models)
        self.mlps = mlps_of(bare[0].config, lever.layers)
        self.decay = lever.decay
        device = next(bare[0].parameters()).device
        sizes = torch.tensor([mlp.units for mlp in self.mlps], device=device)
        total = int(sizes.sum())
        # The MLP of each unit.
        self._owners = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
        self._places = {mlp.name: place for place, mlp in enumerate(self.mlps)}
        self.means = torch.zeros(total, dtype=torch.float64, device=device)
        self.ages = torch.zeros(total, dtype=torch.int32, device=device)
        self.steps = torch.zeros(len(sizes), dtype=torch.int32, device=device)
        # Of the step that is under way, on this rank.
        self._sums = torch.zeros(total, device=device)
        self._tokens = [0] * len(sizes)
        self._paused = False
        self._hooks = [
            fc2.register_forward_pre_hook(self._hook(list(shares)))
            for fc2, shares in groupby(shares_of(bare, self.mlps), key=lambda share: share.fc2)
        ]

    def close(self) -> None:
        """Measure no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out passes that are not steps of training, such as DASH's."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _hook(self, shares: list[Share]) -> Callable[[nn.Module, Any], None]:
        """Return what a second linear layer calls before each pass."""

        def count(module: nn.Module, inputs: Any) -> None:
            # Recomputed activations pass first without gradients, and again with them.
            if self._paused or not (module.training and torch.is_grad_enabled()):
                return
            tokens = inputs[0].detach().flatten(0, -2)
            # Grouped linear layers are told how many tokens each expert has.
            parts = (tokens,) if shares[0].grouped is None else tokens.split(list(inputs[1]))
            for share, part in zip(shares, parts, strict=True):
                self._add(share, part)

        return count

    def _add(self, share: Share, tokens: Tensor) -> None:
        """Add the tokens `[tokens, units]` that arrived at this rank's share of an MLP."""
        if not tokens.size(0):
            return
        self._sums[share.span] += tokens.abs().sum(0, dtype=torch.float32)
        if _counts_tokens(share):
            self._tokens[self._places[share.mlp.name]] += tokens.size(0)

    @torch.no_grad()
    def step(self) -> None:
        """End an optimizer step: take what arrived since the last one into the means.

        Collective over all ranks: one sum of one buffer of fp32.

        Raises:
            RuntimeRefusal: On every rank, if an activation is not finite, or no token arrived.
        """
        tokens = torch.tensor(self._tokens, dtype=torch.float32, device=self._sums.device)
        arrived = torch.cat([self._sums, tokens])
        self._sums.zero_()
        self._tokens = [0] * len(self._tokens)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(arrived)
        sums, tokens = arrived.split([self._sums.numel(), tokens.numel()])
        self._check(sums, tokens)
        self.steps += tokens > 0
        tokens = tokens[self._owners]
        seen = tokens > 0
        self.ages += seen
        ages = self.ages.clamp(min=1)
        share = (1 - self.decay) / (1 - self.decay ** ages.double())
        newest = sums.double() / tokens.clamp(min=1)
        self.means = torch.where(seen, torch.lerp(self.means, newest, share), self.means)

    def _check(self, sums: Tensor, tokens: Tensor) -> None:
        finite = torch.isfinite(sums)
        if bool(finite.all() & (tokens.sum() > 0)):
            return
        if not bool(tokens.sum() > 0):
            raise RuntimeRefusal(
                "No token reached the MLPs whose activity is measured",
                given=f"0 tokens at {len(self.mlps)} MLPs in a step",
                allowed="passes through their second linear layers, in training mode",
                hint="no CUDA graphs over expert layers, or no ReDo",
            )
        worst = [mlp.name for mlp in self.mlps if not bool(finite[mlp.span].all())]
        raise RuntimeRefusal(
            "The activations of an MLP are not finite",
            given=", ".join(worst[:4]) + (f" and {len(worst) - 4} more" if worst[4:] else ""),
            allowed="finite activations, and sums of them in fp32",
            hint="the last good checkpoint, with a lower learning rate",
        )

    def forget(self, units: Tensor) -> None:
        """Measure some units as if they were new.

        Args:
            units: Truths `[units]`, true for those whose activity says nothing any more.
        """
        units = units.to(self.means.device)
        self.means.masked_fill_(units, 0)
        self.ages.masked_fill_(units, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured, on the CPU: the same on every rank and in every layout."""
        return {
            "units": {mlp.name: mlp.units for mlp in self.mlps},
            "means": self.means.cpu().clone(),
            "ages": self.ages.cpu().clone(),
            "steps": self.steps.cpu().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what another meter measured, of those MLPs that both have.

        Raises:
            RuntimeRefusal: If one of them had another number of units.
        """
        sizes: dict[str, int] = state["units"]
        wrong = [m for m in self.mlps if sizes.get(m.name, m.units) != m.units]
        if wrong:
            raise RuntimeRefusal(
                "The activity of units was measured in a model of other widths",
                given=f"{sizes[wrong[0].name]} units of {wrong[0].name}",
                allowed=f"{wrong[0].units} units, as in this model",
                hint="a run of this model, or a run without the activity of another",
            )
        begins = dict(zip(sizes, _starts(sizes.values()), strict=True))
        places = {name: place for place, name in enumerate(sizes)}
        for place, mlp in enumerate(self.mlps):
            if mlp.name in sizes:
                then = slice(begins[mlp.name], begins[mlp.name] + mlp.units)
                self.means[mlp.span] = state["means"][then].to(self.means)
                self.ages[mlp.span] = state["ages"][then].to(self.ages)
                self.steps[place] = state["steps"][places[mlp.name]]


def _starts(sizes: Iterable[int]) -> Iterator[int]:
    at = 0
    for size in sizes:
        yield at
        at += size


def _counts_tokens(share: Share) -> bool:
    """Whether this rank counts an MLP's tokens: its first tensor rank does, for all of them.

    Tensor ranks that split an MLP's units see the same tokens, with sequence parallelism too:
    they are gathered before the first linear layer. All other ranks see tokens of their own.
    """
    if share.mlp.expert is not None:
        return bool(parallel_state.get_expert_tensor_parallel_rank() == 0)
    return bool(parallel_state.get_tensor_model_parallel_rank() == 0)

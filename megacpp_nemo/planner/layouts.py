"""Every way to lay a recipe over a number of GPUs, and the contract's word on each.

Tensor x pipeline x context ranks and expert x expert-tensor x pipeline ranks divide the GPUs, and
the tensor ranks of a layer, or of an expert, are in one node. A recipe without `|` is cut where
`balance` would, so that any number of stages up to its layers is possible.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from megacpp_nemo.contract.errors import MegaCppError
from megacpp_nemo.contract.pattern import LayerPattern
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.contract.rules import check_batch, check_layout
from megacpp_nemo.contract.training import Parallelism
from megacpp_nemo.planner.balance import balanced_lengths, check_segments, segmented
from megacpp_nemo.planner.gpus import PlanError
from megacpp_nemo.planner.pipeline import layer_loads
from megacpp_nemo.planner.sizes import Sizes, every_size

NEMO = "nemo"
SET = (
    "num_nodes",
    "devices_per_node",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
)


class Refused(NamedTuple):
    """A layout that the contract refuses.

    Args:
        sizes: Its parallel sizes.
        micro_batch_size: Rows of its micro-batch; None where no size would do.
        error: The refusal.
    """

    sizes: Sizes
    micro_batch_size: int | None
    error: MegaCppError


class Allowed(NamedTuple):
    """A layout that the contract allows.

    Args:
        sizes: Its parallel sizes.
        micro_batch_size: Rows of its micro-batch.
    """

    sizes: Sizes
    micro_batch_size: int


@dataclass(frozen=True)
class Layouts:
    """The layouts of a recipe over `nodes` x `devices` GPUs.

    The recipe's global batch, optimizer and overlaps are kept; sequence parallelism goes with
    tensor parallelism.

    Args:
        recipe: The recipe.
        nodes: Nodes.
        devices: GPUs of each.
        lane: `nemo` for what a NeMo run here builds; None for all that the contract allows.
    """

    recipe: HybridRecipe
    nodes: int
    devices: int
    lane: str | None = None

    def __iter__(self) -> Iterator[Allowed | Refused]:
        """Yield every layout with every size of its micro-batch, or why it is refused."""
        for sizes in every_size(len(self.recipe.layers), self.nodes * self.devices, self.devices):
            tp, pp, vpp, cp, ep, etp, dp = sizes
            error = self._refusal_of_cut(pp, vpp) or self._refusal_of_split(tp, cp, ep, etp)
            if error:
                yield Refused(sizes, None, error)
                continue
            for rows in self._micro_batches(dp):
                error = self._refusal_of_batch(rows, dp, pp if vpp > 1 else 1)
                yield Refused(sizes, rows, error) if error else Allowed(sizes, rows)

    def parallelism(self, sizes: Sizes) -> Parallelism:
        """Return parallel sizes as a recipe holds them."""
        return replace(
            self.recipe.parallelism,
            num_nodes=self.nodes,
            devices_per_node=self.devices,
            tensor_model_parallel_size=sizes.tp,
            pipeline_model_parallel_size=sizes.pp,
            virtual_pipeline_model_parallel_size=sizes.vpp if sizes.vpp > 1 else None,
            context_parallel_size=sizes.cp,
            expert_model_parallel_size=sizes.ep,
            expert_tensor_parallel_size=None if sizes.etp == sizes.tp else sizes.etp,
            sequence_parallel=sizes.tp > 1,
        )

    def recipe_in(self, layout: Allowed) -> HybridRecipe:
        """Return the recipe in a layout."""
        sizes = layout.sizes
        pattern = self.pattern(sizes.pp, sizes.vpp)
        return replace(
            self.recipe,
            pattern=pattern,
            depth=len(pattern),
            parallelism=self.parallelism(sizes),
            batch=replace(self.recipe.batch, micro_batch_size=layout.micro_batch_size),
        )

    def changes(self, layout: Allowed) -> dict[str, Any]:
        """Return the fields of the recipe that a layout sets, by path."""
        sizes = layout.sizes
        held = self.parallelism(sizes)
        changes = {f"parallelism.{name}": getattr(held, name) for name in SET}
        changes["batch.micro_batch_size"] = layout.micro_batch_size
        pattern = self.pattern(sizes.pp, sizes.vpp)
        if pattern.is_segmented and not self.recipe.pattern.is_segmented:
            changes["pattern"] = str(pattern)
        return changes

    def pattern(self, pp: int, vpp: int) -> LayerPattern:
        """Return the layers as a layout cuts them; the recipe's own boundaries stay."""
        layers = self.recipe.layers
        if layers.is_segmented or pp == 1:
            return layers
        return self._balanced(pp, vpp)

    @functools.cached_property
    def _balanced(self) -> Callable[[int, int], LayerPattern]:
        loads = layer_loads(self.recipe)
        return functools.cache(
            lambda pp, vpp: segmented(self.recipe, balanced_lengths(loads, pp, vpp))
        )

    @functools.cached_property
    def _refusal_of_cut(self) -> Callable[[int, int], MegaCppError | None]:
        return functools.cache(self._check_cut)

    @functools.cached_property
    def _refusal_of_split(self) -> Callable[[int, int, int, int], MegaCppError | None]:
        return functools.cache(self._check_split)

    @functools.cached_property
    def _refusal_of_batch(self) -> Callable[[int, int, int], MegaCppError | None]:
        return functools.cache(self._check_batch)

    def _check_cut(self, pp: int, vpp: int) -> MegaCppError | None:
        """Return what the contract says of pipeline sizes alone."""
        recipe = self.recipe
        if self.lane == NEMO and vpp > 1:
            return _unbuilt("virtual pipeline stages", f"VPP {vpp}", "VPP 1")
        try:
            check_segments(len(recipe.layers), pp, vpp)
            held = self.parallelism(Sizes(1, pp, vpp, 1, 1, 1, 1))
            check_layout(self.pattern(pp, vpp), recipe.model, recipe.features, held)
        except MegaCppError as error:
            return error
        return None

    def _check_split(self, tp: int, cp: int, ep: int, etp: int) -> MegaCppError | None:
        """Return what the contract says of all other sizes, which no cut changes."""
        recipe, whole = self.recipe, LayerPattern.of(self.recipe.layers)
        if self.lane == NEMO and cp > 1:
            return _unbuilt("context parallelism", f"CP {cp}", "CP 1")
        try:
            held = self.parallelism(Sizes(tp, 1, 1, cp, ep, etp, 1))
            check_layout(whole, recipe.model, recipe.features, held)
        except MegaCppError as error:
            return error
        return None

    def _check_batch(self, rows: int, dp: int, group: int) -> MegaCppError | None:
        """Return what the contract says of a batch over data ranks."""
        ranks = self.nodes * self.devices
        sizes = Sizes(1, group, 2 if group > 1 else 1, ranks // (dp * group), 1, 1, dp)
        try:
            batch = replace(self.recipe.batch, micro_batch_size=rows)
            check_batch(batch, self.parallelism(sizes))
        except MegaCppError as error:
            return error
        return None

    def _micro_batches(self, ranks: int) -> list[int]:
        """Return the sizes of micro-batches to try: powers of two, and the recipe's own."""
        most = max(self.recipe.batch.global_batch_size // ranks, 1)
        own = self.recipe.batch.micro_batch_size
        powers = {1 << power for power in range(most.bit_length())}
        return sorted(powers | ({own} if own <= most else set()))


def _unbuilt(what: str, given: str, allowed: str) -> PlanError:
    return PlanError(
        f"A NeMo run of this package has no {what}",
        given=given,
        allowed=allowed,
        hint="Megatron-LM's own script, --as megatron",
    )

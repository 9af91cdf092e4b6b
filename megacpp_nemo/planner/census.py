"""Memory of many layouts of one recipe, from sums over kinds of pieces.

`memory` says the same of one recipe exactly, piece by piece; here what layouts share is counted
once, so that thousands take a second. The padding of gradient buffers is left out: less than a
thousandth.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from megacpp_nemo.contract.parallelism import RECOMPUTE
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.activations import LOGITS, held_over_time, saved_bytes
from megacpp_nemo.planner.buffers import piece_sizes
from megacpp_nemo.planner.layouts import Allowed, Layouts
from megacpp_nemo.planner.memory import GRADIENT_BYTES, MASTER_BYTES, MOMENTS_BYTES
from megacpp_nemo.planner.pieces import Piece, Role, pieces
from megacpp_nemo.planner.saved import element_bytes
from megacpp_nemo.planner.sharding import embedding_copy
from megacpp_nemo.planner.tensors import padded_vocabulary

Made = TypeVar("Made")
# Kinds of pieces by their place in `Census.kinds`, and how often each occurs.
Tally = tuple[tuple[int, int], ...]


class Stage(NamedTuple):
    """The kinds of pieces of a pipeline stage.

    Args:
        own: How many of each kind.
        held: The same, each as often as micro-batches are held of it at once, at every moment
            of the schedule that may be the fullest.
    """

    own: Tally
    held: tuple[Tally, ...]


class Kept(NamedTuple):
    """What kinds of pieces keep for backward of one micro-batch on a rank, in bytes.

    Args:
        layers: Of each kind, everything but the loss.
        loss: Of each kind, the loss's part.
        working: Of each kind, what recomputation makes again at once.
        logits: Of one head, the logits in the model's precision.
    """

    layers: tuple[int, ...]
    loss: tuple[int, ...]
    working: tuple[int, ...]
    logits: int


class Census:
    """What the layouts of a recipe share, each counted once.

    Args:
        layouts: The layouts.
    """

    def __init__(self, layouts: Layouts) -> None:
        self.layouts, self.recipe = layouts, layouts.recipe
        copy = Piece(role=Role.EMBEDDING_COPY, name="", prefix="embedding.")
        every = [*pieces(self.recipe), copy]
        self.kinds = tuple({(piece.role, piece.family): piece for piece in every}.values())
        self._known: dict[tuple[Any, ...], Any] = {}

    def stages(self, layout: Allowed) -> tuple[Stage, ...]:
        """Return the pieces of each stage."""
        pp, vpp = layout.sizes.pp, layout.sizes.vpp
        # With more micro-batches the schedule only repeats itself.
        key = ("stages", pp, vpp, min(self.micro_batches(layout), 4 * pp))
        return self.once(key, layout, self._stages)

    def elements(self, layout: Allowed) -> tuple[tuple[int, int], ...]:
        """Return the elements of a rank of each stage: dense, and routed experts'."""
        tp, pp, vpp, _, ep, etp, _ = layout.sizes
        key = ("elements", pp, vpp, tp, ep, etp)
        if key not in self._known:
            sizes = self.once(("sizes", tp, ep, etp), layout, self._sizes)
            self._known[key] = tuple(
                (
                    sum(count * sizes[kind][0] for kind, count in stage.own),
                    sum(count * sizes[kind][1] for kind, count in stage.own),
                )
                for stage in self.stages(layout)
            )
        found: tuple[tuple[int, int], ...] = self._known[key]
        return found

    def kept(self, layout: Allowed) -> Mapping[str, Kept]:
        """Return what each kind keeps of a micro-batch on a rank, by policy of recomputation."""
        return self.once(("kept", *of_micro_batch(layout)), layout, self._kept)

    def micro_batches(self, layout: Allowed) -> int:
        """Return the micro-batches of a step on each data-parallel rank."""
        rows = self.recipe.batch.global_batch_size
        return rows // (layout.micro_batch_size * layout.sizes.dp)

    def once(
        self, key: tuple[Any, ...], layout: Allowed, make: Callable[[HybridRecipe], Made]
    ) -> Made:
        """Return what is made of the recipe in a layout, the first time that its key occurs."""
        if key not in self._known:
            self._known[key] = make(self.layouts.recipe_in(layout))
        found: Made = self._known[key]
        return found

    def _stages(self, recipe: HybridRecipe) -> tuple[Stage, ...]:
        chunks = range(recipe.parallelism.virtual_pipeline_model_parallel_size or 1)
        stages = range(recipe.parallelism.pipeline_model_parallel_size)
        counted: list[list[Counter[int]]] = [[Counter() for _ in chunks] for _ in stages]
        places = {(piece.role, piece.family): place for place, piece in enumerate(self.kinds)}
        copy = embedding_copy(recipe)
        for piece in (*((copy,) if copy else ()), *pieces(recipe)):
            counted[piece.stage][piece.chunk][places[piece.role, piece.family]] += 1
        return tuple(_stage(recipe, stage, counted[stage]) for stage in stages)

    def _sizes(self, recipe: HybridRecipe) -> list[tuple[int, int]]:
        found = [piece_sizes(recipe, piece) for piece in self.kinds]
        return [(sum(sizes.dense), sum(sizes.experts)) for sizes in found]

    def _kept(self, recipe: HybridRecipe) -> dict[str, Kept]:
        found: dict[str, Kept] = {}
        for policy in RECOMPUTE:
            parts = [saved_bytes(recipe, piece, recompute=policy) for piece in self.kinds]
            loss = [sum(part.get(name, 0) for name in LOGITS) for part in parts]
            layers = [sum(part.values()) - own for part, own in zip(parts, loss, strict=True)]
            working = [0] * len(parts)
            if policy == "full":
                again = zip(self.kinds, found["none"].layers, strict=True)
                working = [size if piece.family else 0 for piece, size in again]
            found[policy] = Kept(tuple(layers), tuple(loss), tuple(working), _logits_bytes(recipe))
        return found


def _stage(recipe: HybridRecipe, stage: int, chunks: list[Counter[int]]) -> Stage:
    own = sum(chunks, Counter[int]())
    # A moment that the next one adds to is not the fullest.
    moments = list(held_over_time(recipe, stage))
    fullest = [
        now
        for now, then in zip(moments, [*moments[1:], None], strict=True)
        if then is None or any(map(operator.lt, then, now))
    ]
    kinds = tuple(own)
    columns = [[chunk[kind] for chunk in chunks] for kind in kinds]
    held = {tuple(sum(map(operator.mul, now, c)) for c in columns) for now in set(fullest)}
    most = [one for one in held if not any(_covers(other, one) for other in held)]
    return Stage(
        own=tuple(own.items()),
        held=tuple(tuple(zip(kinds, one, strict=True)) for one in sorted(most)),
    )


def _covers(other: tuple[int, ...], one: tuple[int, ...]) -> bool:
    """Whether one moment is nowhere fuller than another."""
    return other != one and all(map(operator.ge, other, one))


def of_micro_batch(layout: Allowed) -> tuple[int, ...]:
    """Return what a rank's share of one micro-batch depends on."""
    tp, _, _, cp, ep, etp, _ = layout.sizes
    return tp, cp, ep, etp, layout.micro_batch_size


def memory_bytes(census: Census, layout: Allowed, recompute: str) -> list[int]:
    """Return the bytes that a rank of each stage holds, as `memory` counts them."""
    layers, losses, working, logits = census.kept(layout)[recompute]
    found = []
    for static, stage in zip(_static_bytes(census, layout), census.stages(layout), strict=True):
        loss = sum([count * losses[kind] for kind, count in stage.own])
        kept = max([sum([n * layers[kind] for kind, n in tally]) for tally in stage.held])
        again = max([working[kind] for kind, _ in stage.own])
        found.append(static + kept + again + loss + (logits if loss else 0))
    return found


def data_shards(layout: Allowed) -> tuple[int, int]:
    """Return the ranks that share a dense gradient, and a routed expert's."""
    tp, _, _, cp, ep, etp, dp = layout.sizes
    return cp * dp, tp * cp * dp // (ep * etp)


def _static_bytes(census: Census, layout: Allowed) -> Iterator[int]:
    """Yield the bytes of weights, gradients and optimizer of a rank of each stage."""
    width = element_bytes(census.recipe)
    state = MOMENTS_BYTES + (0 if width == MASTER_BYTES else MASTER_BYTES)
    distributed = census.recipe.parallelism.use_distributed_optimizer
    ranks = data_shards(layout) if distributed else (1, 1)
    for dense, experts in census.elements(layout):
        shard = dense // ranks[0] + experts // ranks[1]
        yield (dense + experts) * (width + GRADIENT_BYTES) + shard * state


def _logits_bytes(recipe: HybridRecipe) -> int:
    """Return the bytes of one head's logits of a micro-batch in the model's precision."""
    parallelism = recipe.parallelism
    tokens = recipe.batch.micro_batch_size * recipe.model.seq_length
    rows = padded_vocabulary(recipe) // parallelism.tensor_model_parallel_size
    return tokens // parallelism.context_parallel_size * rows * element_bytes(recipe)

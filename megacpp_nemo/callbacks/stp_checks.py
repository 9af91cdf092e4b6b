"""What semantic tube prediction refuses: a run in which its loss would silently not be trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.plasticity import StpLever
from megacpp_nemo.model.documents import DocumentBoundaries

# What is counted of a layer in a step: its forward passes, triples drawn, the sum of their
# distances, and triples whose gradient reached the hidden states.
SEEN, DRAWN, DISTANCE, REACHED = range(4)
COUNTS = 4


def refuse_configuration(config: Any, lever: StpLever) -> None:
    """Stop a run whose sequences or gradient scale the loss does not fit.

    Raises:
        RuntimeRefusal: Under context parallelism, or if gradients are divided by tokens.
    """
    if config.context_parallel_size > 1:
        raise RuntimeRefusal(
            "STP needs the whole of a sequence, which context parallelism splits",
            given=f"context_parallel_size={config.context_parallel_size}",
            allowed="context_parallel_size=1",
            hint="context_parallel_size=1, or the lever's weight=0.0 and measure=False",
        )
    if config.calculate_per_token_loss and lever.weight:
        raise RuntimeRefusal(
            "STP is a mean over rows; this schedule divides gradients by the number of tokens",
            given="calculate_per_token_loss=True",
            allowed="gradients averaged over micro-batches",
            hint="calculate_per_token_loss=False",
        )


def refuse_missing(
    listed: Sequence[int], here: Collection[int], depth: int, device: torch.device
) -> None:
    """Stop if a listed layer is on no pipeline stage. Collective over all ranks.

    Args:
        listed: Layer numbers, the same on every rank.
        here: Layer numbers on this rank.
        depth: Layers of the model.
        device: Of the collective.

    Raises:
        RuntimeRefusal: If there is such a layer, on every rank.
    """
    holders = torch.tensor([int(number in here) for number in listed], device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(holders)
    missing = [number for number, ranks in zip(listed, holders.tolist(), strict=True) if not ranks]
    if missing:
        raise RuntimeRefusal(
            "STP is to straighten layers that no pipeline stage has",
            given=f"layers {', '.join(map(str, missing))}",
            allowed=f"1 to {depth}",
            hint=f"layers=({depth},)",
        )


def refuse_unreached(counts: Mapping[int, Sequence[float]]) -> None:
    """Stop after a step in which the loss did not reach a listed layer.

    Args:
        counts: What was counted of each layer, over all ranks.

    Raises:
        RuntimeRefusal: If a layer has fewer triples with gradients than drawn, or none.
    """
    bad = {n: layer for n, layer in counts.items() if not 0 < layer[DRAWN] <= layer[REACHED]}
    if not bad:
        return
    if any(not layer[SEEN] for layer in bad.values()):
        reason = "layers called as modules, so that hooks run: no graphs, no forward of another"
    elif any(not layer[DRAWN] for layer in bad.values()):
        reason = "rows in which some document has three tokens or more"
    else:
        reason = "layers with something to train in or before them, on which the main loss depends"
    raise RuntimeRefusal(
        "STP is on, but in this step its loss did not reach the hidden states of a listed layer",
        given="; ".join(
            f"layer {number}: {layer[SEEN]:.0f} forward passes, {layer[DRAWN]:.0f} triples, "
            f"{layer[REACHED]:.0f} with gradients"
            for number, layer in bad.items()
        ),
        allowed=reason,
        hint="other layers, or weight=0.0",
    )


def document_ids_of_rows(boundaries: Any) -> Tensor | None:
    """Return the document ids `[batch, seq]` that a layer was given; None if rows are whole.

    Raises:
        RuntimeRefusal: For Megatron's `thd` packing.
    """
    if boundaries is None:
        return None
    if isinstance(boundaries, DocumentBoundaries):
        return boundaries.document_ids
    raise RuntimeRefusal(
        "STP does not read Megatron's packed (thd) sequences",
        given=f"packed_seq_params with qkv_format={boundaries.qkv_format!r}",
        allowed="rows of shape [batch, seq] with document_ids",
        hint="a data module of this package, or one document per row",
    )

"""Collectives: who, what, how much.

A payload is the whole tensor of a collective: what is reduced, what is gathered in the end, what is
scattered in the beginning, what a rank sends of an all-to-all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

PIPELINE, DATA, EXPERT_DATA, EMBEDDING = "pipeline", "data", "expert data", "embedding"
TENSOR, EXPERT, EXPERT_TENSOR = "tensor", "expert", "expert tensor"
TENSOR_EXPERT, TENSOR_CONTEXT, CONTEXT = "tensor and expert", "tensor and context", "context"
REDUCE, GATHER, SCATTER = "all-reduce", "all-gather", "reduce-scatter"
EXCHANGE, SEND = "all-to-all", "send"


@dataclass(frozen=True, slots=True)
class Exchange:
    """One kind of collective of a layer and micro-batch.

    Args:
        group: Who takes part.
        operation: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all` or `send`.
        backward: Whether it belongs to the backward pass.
        payload: Bytes.
        count: How many times.
    """

    group: str
    operation: str
    backward: bool
    payload: int
    count: int = 1


Exchanges = Iterator[Exchange]


@dataclass(frozen=True, slots=True)
class Volume:
    """Collectives of one kind that a rank takes part in during an optimizer step.

    Args:
        group: `tensor`, `expert`, `expert tensor`, `tensor and expert`, `tensor and context`,
            `context`, `pipeline`, `data`, `expert data` or `embedding`.
        operation: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all` or `send`.
        what: What for, in words.
        count: How many of them.
        payload_bytes: Bytes of their tensors together.
        ranks: Size of the group.
    """

    group: str
    operation: str
    what: str
    count: int
    payload_bytes: int
    ranks: int

    @property
    def bytes_per_rank(self) -> int:
        """Bytes that a rank sends, going round a ring."""
        return ring_bytes(self.operation, self.payload_bytes, self.ranks)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {**asdict(self), "bytes_per_rank": self.bytes_per_rank}


def ring_bytes(operation: str, payload: int, ranks: int) -> int:
    """Return the bytes that a rank sends for a collective of `payload` bytes over `ranks`."""
    if operation == SEND:
        return payload
    share = payload * (ranks - 1) // ranks
    return 2 * share if operation == REDUCE else share

"""Collectives of tensor, expert and context parallelism: who, what, how much.

A payload is the whole tensor of a collective: what is reduced, what is gathered in the end, what is
scattered in the beginning, what a rank sends of an all-to-all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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

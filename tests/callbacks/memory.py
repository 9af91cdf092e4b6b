"""The memory that a call allocates on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the most bytes of tensors that a call has at once, beside those there before."""
    held = most = 0
    for size in _sizes(function):
        held += size
        most = max(most, held)
    return most


def largest_bytes(function: Callable[[], Any]) -> int:
    """Return the size of the largest tensor that a call allocates.

    Gloo's threads may be the last to hold a tensor, and what they free is not seen: where ranks
    send each other tensors, `peak_bytes` may be too high.
    """
    return max(_sizes(function))


def _sizes(function: Callable[[], Any]) -> list[int]:
    """Return the bytes of each allocation, negative where they are freed, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = profiled.profiler.kineto_results.events()
    taken = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    assert taken
    return [size for _, size in taken]

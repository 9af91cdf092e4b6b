"""Time and memory of scans, forward and backward, side by side; shared by the benchmarks here.

Seconds are wall-clock time on CUDA and else processor time, to which other work on the machine
adds little. Memory is the most that tensors take at once beside the inputs.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

CUDA = torch.cuda.is_available()
# Where one call takes this long, its first is no slower than the next.
LONG_S = 20

Way = Callable[..., tuple[Tensor, Any]]


def forward_and_backward(way: Way, given: dict[str, Tensor]) -> None:
    """Run a way and differentiate the sum of its outputs by every input."""
    y, _ = way(**given)
    torch.autograd.grad(y.sum(), list(given.values()))


def seconds(way: Way, given: dict[str, Tensor]) -> float:
    """Return how long a way takes, forward and backward."""
    clock = time.perf_counter if CUDA else time.process_time
    wait()
    start = clock()
    forward_and_backward(way, given)
    wait()
    return clock() - start


def peak_bytes(way: Way, given: dict[str, Tensor]) -> int:
    """Return the most memory for tensors that a way takes at once, beside the inputs."""
    if next(iter(given.values())).is_cuda:
        wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_and_backward(way, given)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        forward_and_backward(way, given)
    profiler: Any = profiled.profiler
    events = profiler.kineto_results.events()
    held = most = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += size
        most = max(most, held)
    return most


def compared(
    ways: dict[str, Way], given: dict[str, Tensor], repetitions: int, *, reference: str
) -> dict[str, Any]:
    """Return figures of ways that run in turn, by name.

    Args:
        ways: What to run; all take `given`.
        given: Differentiable inputs by name.
        repetitions: Rounds; figures are medians, and ratios medians of those in one round.
        reference: The way that the others are told against; left out where it does not run.
    """
    first = {name: seconds(way, given) for name, way in ways.items()}
    long = {name for name, spent in first.items() if spent > LONG_S}
    runs: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, way in ways.items():
            runs[name].append(first[name] if name in long else seconds(way, given))
    found: dict[str, Any] = {}
    for name, spent in runs.items():
        found[name] = {"seconds": float(f"{statistics.median(spent):.3g}")}
        if reference in runs:
            ratios = [plain / own for plain, own in zip(runs[reference], spent, strict=True)]
            found[name][f"times_faster_than_{reference}"] = float(
                f"{statistics.median(ratios):.3g}"
            )
        found[name]["peak_bytes"] = peak_bytes(ways[name], given)
    return found


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name() if CUDA else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    """Return the processor's kind, with its widest vectors."""
    return f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def wait() -> None:
    """Wait until the device has done what it was given."""
    if CUDA:
        torch.cuda.synchronize()

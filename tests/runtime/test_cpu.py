"""CUDA's names mean the CPU while the runtime is installed, and only then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megacpp_nemo.host.cpu import CpuRuntime
from megacpp_nemo.host.patching import Patches
from tests.support.processes import in_processes

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the CPU runtime is for machines without CUDA"
)


@pytest.fixture
def runtime() -> Iterator[CpuRuntime]:
    installed = CpuRuntime()
    assert installed.install()
    yield installed
    installed.uninstall()


def test_tensors_for_cuda_are_made_on_the_cpu(runtime: CpuRuntime) -> None:
    device = torch.cuda.current_device()
    made = [
        torch.zeros(2, device="cuda"),
        torch.ones(2, device="cuda:0"),
        torch.tensor([1.0], pin_memory=True).to("cuda", non_blocking=True),
        torch.empty(2, device=device),
        torch.zeros(2).cuda(),
        torch.zeros(2).to(torch.device("cuda", 0)),
        torch.zeros(2).pin_memory(),
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"


def test_streams_and_events_finish_at_once(runtime: CpuRuntime) -> None:
    event = torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        event.record()
    torch.cuda.current_stream().wait_event(event)
    torch.cuda.synchronize()
    assert event.query()
    assert event.elapsed_time(torch.cuda.Event()) == 0.0


def test_cudas_random_state_is_the_cpus(runtime: CpuRuntime) -> None:
    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(3))


def test_megatrons_tracker_keeps_regions_apart(runtime: CpuRuntime) -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    outside = torch.get_rng_state()
    with tracker.fork("a"):
        first = torch.rand(2)
    with tracker.fork("b"):
        other = torch.rand(2)
    with tracker.fork("a"):
        second = torch.rand(2)
    assert torch.equal(outside, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(torch.cat([first, second]), torch.rand(4))
    assert not torch.equal(first, other)


def test_only_megatrons_optimizer_sees_cuda_type_names(runtime: CpuRuntime) -> None:
    tensor = torch.zeros(1)
    assert tensor.type() == "torch.FloatTensor"
    asker: dict[str, Any] = {"__name__": "megatron.core.optimizer.optimizer"}
    exec("def kind(t): return t.type()", asker)
    assert asker["kind"](tensor) == "torch.cuda.FloatTensor"
    assert tensor.type("torch.cuda.DoubleTensor").dtype is torch.float64


def test_the_dispatcher_gets_arrays_where_it_asks_for_them(runtime: CpuRuntime) -> None:
    import numpy as np
    from megatron.core.transformer.moe import token_dispatcher

    tensor = torch.arange(3)
    assert token_dispatcher.maybe_move_tensor_to_cpu(tensor) is tensor
    assert isinstance(token_dispatcher.maybe_move_tensor_to_cpu(tensor, as_numpy=True), np.ndarray)
    assert token_dispatcher.maybe_move_tensor_to_cpu(None, as_numpy=True) is None


def gathered() -> tuple[list[float], int]:
    """Return what a coalesced gather holds before it is waited for, and what is not finished."""
    import torch.distributed as dist
    from megatron.core.distributed import param_and_grad_buffer as buffers

    dist.init_process_group("gloo")
    runtime = CpuRuntime()
    runtime.install()
    try:
        whole = torch.zeros(4)
        own = torch.full((2,), 1.0 + dist.get_rank())
        with buffers._coalescing_manager(dist.group.WORLD, async_ops=True) as manager:
            buffers.dist_all_gather_func(whole, own, group=dist.group.WORLD, async_op=True)
        return whole.tolist(), len(manager.works)
    finally:
        runtime.uninstall()
        dist.destroy_process_group()


@pytest.mark.two_process
def test_coalesced_gathers_are_finished_at_once() -> None:
    assert in_processes(gathered, ranks=2) == [([1.0, 1.0, 2.0, 2.0], 0)] * 2


def test_uninstalling_puts_every_name_back() -> None:
    names = ("Stream", "current_device", "get_rng_state", "manual_seed", "stream")
    before = [getattr(torch.cuda, name) for name in names] + [torch.Tensor.cuda]
    runtime = CpuRuntime()
    runtime.install()
    runtime.install()
    assert torch.cuda.Stream is not before[0]
    runtime.uninstall()
    after = [getattr(torch.cuda, name) for name in names] + [torch.Tensor.cuda]
    assert before == after
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_nothing_is_installed_where_cuda_is_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    runtime, stream = CpuRuntime(), torch.cuda.Stream
    assert not runtime.install()
    assert torch.cuda.Stream is stream


def test_patches_remove_what_was_not_there() -> None:
    class Owner:
        here = 1

    patches = Patches()
    patches.set(Owner, "here", 2)
    patches.set(Owner, "new", 3)
    patches.set(Owner, "here", 4)
    assert (Owner.here, Owner.new) == (4, 3)  # type: ignore[attr-defined]
    patches.undo()
    assert Owner.here == 1
    assert not hasattr(Owner, "new")
    assert not patches

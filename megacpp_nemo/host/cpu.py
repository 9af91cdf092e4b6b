"""CUDA calls of Megatron-Core and NeMo, carried out on the CPU.

Megatron's training path names CUDA in a few places: streams and events, the current device,
random number state, `.cuda()`, and `device="cuda"` arguments. Where no CUDA device exists,
`CpuRuntime.install()` gives those names a CPU meaning; `uninstall()` puts the originals
back. Only `HybridStrategy` installs it, and never where CUDA is present.
"""

from __future__ import annotations

import contextlib
import queue
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megacpp_nemo.host.patching import Patches

# Fusions whose kernels are CUDA's; on a CPU their torch forms compile for longer than they save.
CUDA_FUSIONS = (
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "cross_entropy_loss_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "moe_permute_fusion",
)


class _Event:
    """A CUDA event of a device that finishes everything at once."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record(self, *args: object) -> None:
        """Do nothing: there is no queue to mark."""

    wait = synchronize = record

    def query(self) -> bool:
        """Return that the event has happened."""
        return True

    def elapsed_time(self, other: object) -> float:
        """Return 0 ms: nothing ran asynchronously."""
        return 0.0


class _Stream:
    """A CUDA stream of a device that finishes everything at once."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: object) -> None:
        return None

    def wait_stream(self, *args: object) -> None:
        """Do nothing: all work is done when it is called."""

    wait_event = synchronize = wait_stream

    def record_event(self, *args: object) -> _Event:
        """Return an event that has happened."""
        return _Event()


class _CudaMeansCpu(TorchFunctionMode):
    """Maps `device="cuda"` arguments to the CPU and drops pinned memory."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs:
            if "device" in kwargs:
                kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1:
            args = (args[0], _on_cpu(args[1]), *args[2:])
        if func is torch.Tensor.type:
            return _type_with_cuda_names(func, args, kwargs)
        return func(*args, **kwargs)


def _on_cpu(device: Any) -> Any:
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    if isinstance(device, str) and device.startswith("cuda"):
        return "cpu"
    return device


def _type_with_cuda_names(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer Megatron's optimizer, which knows parameters by names like torch.cuda.FloatTensor."""
    if len(args) > 1 and isinstance(args[1], str):
        args = (args[0], args[1].replace("torch.cuda.", "torch."), *args[2:])
    answer = func(*args, **kwargs)
    caller = sys._getframe(2).f_globals.get("__name__", "")
    if len(args) == 1 and not kwargs and caller.startswith("megatron.core.optimizer"):
        return answer.replace("torch.", "torch.cuda.", 1)
    return answer


class CpuRuntime:
    """The set of substitutions, installed at most once at a time."""

    def __init__(self) -> None:
        self._patches = Patches()
        self._mode: _CudaMeansCpu | None = None

    @property
    def installed(self) -> bool:
        """Whether the substitutions are in force."""
        return self._mode is not None

    def install(self, *, threads: int = 1) -> bool:
        """Install the substitutions if there is no CUDA device; return whether they are in force.

        Args:
            threads: Threads torch may use for one operation. Several processes on one machine
                starve each other with more than one.
        """
        if self.installed or torch.cuda.is_available():
            return self.installed
        torch.set_num_threads(threads)
        self._patch_torch()
        self._patch_megatron()
        self._patch_nemo()
        # Megatron compiles a few small functions; on a CPU that costs more than it saves.
        torch.compiler.set_stance("force_eager")
        self._mode = _CudaMeansCpu()
        self._mode.__enter__()
        return True

    def uninstall(self) -> None:
        """Put the originals back."""
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None
            torch.compiler.set_stance("default")
        self._patches.undo()

    def _patch_torch(self) -> None:
        cuda, put = torch.cuda, self._patches.set
        put(cuda, "Stream", _Stream)
        put(cuda, "Event", _Event)
        put(cuda, "stream", lambda stream: contextlib.nullcontext())
        put(cuda, "current_stream", lambda *args, **kwargs: _Stream())
        put(cuda, "default_stream", lambda *args, **kwargs: _Stream())
        put(cuda, "current_device", lambda: torch.device("cpu"))
        put(cuda, "set_device", lambda device: None)
        put(cuda, "synchronize", lambda *args, **kwargs: None)
        put(cuda, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state())
        put(cuda, "set_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
        put(cuda, "manual_seed", torch.manual_seed)
        put(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
        put(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)

    def _patch_megatron(self) -> None:
        from megatron.core.dist_checkpointing.strategies import filesystem_async
        from megatron.core.distributed import param_and_grad_buffer
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer.moe import token_dispatcher

        def get_state(*args: object, **kwargs: object) -> torch.Tensor:
            return torch.get_rng_state()

        def set_state(new_state: torch.Tensor, *args: object, **kwargs: object) -> None:
            torch.set_rng_state(new_state)

        def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
            # Upstream returns the tensor itself when it is already on the host, but the
            # dispatcher that asked for an array then fails on it.
            return tensor.detach().numpy() if as_numpy and torch.is_tensor(tensor) else tensor

        results: queue.Queue[Any] = queue.Queue()
        # Checkpoints are saved in this process, so results need no server process to cross to
        # another; starting one imports everything again.
        self._patches.set(filesystem_async, "_get_write_results_queue", lambda: results)
        # The tracker keeps one random state per parallel region; on the CPU they are states of
        # the one CPU generator.
        self._patches.set(random, "_get_cuda_rng_state", get_state)
        self._patches.set(random, "_set_cuda_rng_state", set_state)
        recompute = random.CheckpointFunction.backward

        def recompute_here(ctx: Any, *gradients: Any) -> Any:
            # Autograd leaves the substitutions behind when it calls a backward pass.
            with _CudaMeansCpu():
                return recompute(ctx, *gradients)

        self._patches.set(random.CheckpointFunction, "backward", staticmethod(recompute_here))
        self._patches.set(token_dispatcher, "maybe_move_tensor_to_cpu", to_host)
        together = param_and_grad_buffer._coalescing_manager

        def finished(*args: Any, async_ops: bool = False, **kwargs: Any) -> Any:
            """Finish coalesced gathers and reductions at once.

            Gloo has crashed with several of them under way, and on a CPU nothing overlaps.
            """
            return together(*args, async_ops=False, **kwargs)

        self._patches.set(param_and_grad_buffer, "_coalescing_manager", finished)

    def _patch_nemo(self) -> None:
        # NeMo is optional here: the model alone runs on Megatron-Core.
        if "nemo.lightning" not in sys.modules:
            return
        from megatron.core import tensor_parallel
        from nemo.lightning import megatron_init
        from nemo.lightning.io import pl as nemo_io

        seed_everything = megatron_init._set_random_seed

        def seed_with_tracker(seed: int) -> None:
            # NeMo seeds Megatron's tracker only where it counts a CUDA device.
            seed_everything(seed)
            stage = megatron_init.get_pipeline_model_parallel_rank()
            tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * stage)

        self._patches.set(megatron_init, "_set_random_seed", seed_with_tracker)
        self._patches.set(nemo_io, "_fix_tensors_device", lambda checkpoint: checkpoint)


RUNTIME = CpuRuntime()

"""Megatron's parallel groups on a process that stands alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core import parallel_state, tensor_parallel

from megacpp_nemo.host.cpu import RUNTIME


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Have Megatron's groups of size 1: those that are there, or new ones for the context."""
    if parallel_state.model_parallel_is_initialized():
        yield
        return
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    threads, ours = torch.get_num_threads(), not RUNTIME.installed
    RUNTIME.install()
    try:
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        if ours:
            RUNTIME.uninstall()
            torch.set_num_threads(threads)

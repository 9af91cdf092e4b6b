"""Passes over training data that leave no trace but their gradient.

A rehearsal takes the run's own path, micro-batches, pipeline and reduction included, and stops
short of the optimizer. Random numbers, the routers' counts and biases, the trackers of auxiliary
losses, the order of the data, the logs and the step count are afterwards what they were before.

- `undisturbed`: the context that puts back what a pass changes
- `upcoming`: the batches that the run will train on next
- `backward`: one global batch, forward and backward
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.moe import moe_utils
from nemo.lightning.megatron_parallel import CallbackConnector
from torch import nn

from megacpp_nemo.contract.errors import RuntimeRefusal


@contextlib.contextmanager
def undisturbed(trainer: Any) -> Iterator[None]:
    """Put back, at the end, all that a pass changes in a run between two of its steps.

    Gradients are zero at the end, as the next step would make them.
    """
    parallel = trainer.strategy.megatron_parallel
    listeners, parallel.callbacks = parallel.callbacks, CallbackConnector()
    try:
        with isolate_rng(), _tracked_rng(), _auxiliary_losses():
            yield
    finally:
        parallel.callbacks = listeners
        _zero_gradients(trainer)


def upcoming(trainer: Any, batches: int) -> Iterator[Any]:
    """Yield micro-batches of the global batches that the run trains on next, for this rank.

    Where fewer remain, they are the last ones of the data. The run's own iterator stays put.

    Raises:
        RuntimeRefusal: If all the data is less than that.
    """
    sampler = trainer.strategy.data_sampler
    begun = sampler.compute_consumed_samples(trainer.global_step - sampler.init_global_step)
    loader = trainer.train_dataloader
    indices = copy.copy(loader.batch_sampler)
    last = indices.total_samples - batches * sampler.global_batch_size
    if last < 0:
        raise RuntimeRefusal(
            "There is less training data than batches of gradients to average",
            given=f"batches={batches} of {sampler.global_batch_size} samples, and "
            f"{indices.total_samples} samples",
            allowed=f"up to {indices.total_samples // sampler.global_batch_size} batches",
            hint=f"batches={max(1, indices.total_samples // sampler.global_batch_size)}",
        )
    indices.consumed_samples = min(begun, last)
    return _collated(loader, indices)


def _collated(loader: Any, indices: Iterable[list[int]]) -> Iterator[Any]:
    for number, samples in enumerate(indices):
        # As Lightning's iterator gives it, with the number of the batch and of its loader.
        yield loader.collate_fn([loader.dataset[sample] for sample in samples]), number, 0


def backward(trainer: Any, data: Iterator[Any]) -> None:
    """Run one global batch forward and backward, and leave its gradient in `main_grad`.

    Call it within `undisturbed`. The routers' buffers are put back at once, so that every batch
    meets the same model.
    """
    strategy = trainer.strategy
    sampler = strategy.data_sampler
    _zero_gradients(trainer)
    with (
        torch.enable_grad(),
        strategy.precision_plugin.train_step_context(),
        _buffers(strategy.megatron_parallel),
    ):
        strategy.megatron_parallel.training_step(
            data,
            seq_length=sampler.seq_len,
            micro_batch_size=sampler.micro_batch_size,
            num_microbatches=get_num_microbatches(),
        )


def _zero_gradients(trainer: Any) -> None:
    for chunk in trainer.strategy.megatron_parallel:
        chunk.zero_grad_buffer()
    for optimizer in trainer.optimizers:
        optimizer.zero_grad()


@contextlib.contextmanager
def _tracked_rng() -> Iterator[None]:
    """Put back Megatron's random states of tensor- and expert-parallel regions."""
    tracker = get_cuda_rng_tracker()
    saved = {name: state.clone() for name, state in tracker.get_states().items()}
    try:
        yield
    finally:
        tracker.set_states(saved)


@contextlib.contextmanager
def _auxiliary_losses() -> Iterator[None]:
    """Put back what was gathered of the routers' auxiliary losses for the logs."""
    tracker = moe_utils.get_moe_layer_wise_logging_tracker()
    saved = {name: {**each, "values": each["values"].clone()} for name, each in tracker.items()}
    try:
        yield
    finally:
        tracker.clear()
        tracker.update(saved)


@contextlib.contextmanager
def _buffers(module: nn.Module) -> Iterator[None]:
    """Put back a module's buffers: counts of tokens per expert, and biases made of them."""
    saved = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in saved:
                    buffer.copy_(saved[name])

"""Semantic tube prediction during training: an auxiliary loss on the output of some layers.

`SemanticTube` hooks the listed decoder layers, on whichever pipeline stage they are, and joins
the loss to the backward pass there, at the scale at which Megatron's schedule runs the main loss.
Positions are drawn by step and by place in the global batch: a resumed run draws the same, and so
does another layout. In force, a step in which the loss did not reach every listed layer is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from megacpp_nemo.callbacks.stp_checks import (
    COUNTS,
    DISTANCE,
    DRAWN,
    REACHED,
    SEEN,
    document_ids_of_rows,
    refuse_configuration,
    refuse_missing,
    refuse_unreached,
)
from megacpp_nemo.callbacks.tube import Triples, draw_triples, row_uniforms, tube_loss
from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.plasticity import StpLever


class SemanticTube:
    """The auxiliary loss of a run. Construction and `end_step` are collective over all ranks.

    States are what layers return: those of the last are taken before the model's final norm.

    Args:
        models: Megatron's models on this rank.
        lever: Weight, layers, spans and first step.
        seed: Seed of the positions.

    Attributes:
        value: Mean of `1 - cos` over the triples of the last step, on every rank; None if it was
            not computed, or no document had three tokens.

    Raises:
        RuntimeRefusal: If a listed layer is on no pipeline stage, or the loss cannot be computed
            or scaled under the configuration.
    """

    def __init__(self, models: Sequence[nn.Module], lever: StpLever, seed: int) -> None:
        self.lever, self.seed = lever, seed
        self.value: float | None = None
        parts: list[Any] = list(models)
        self._config = config = parts[0].config
        refuse_configuration(config, lever)
        self._device = next(parts[0].parameters()).device
        self.layers = tuple(sorted(set(lever.layers))) or (config.num_layers,)
        here = {layer.layer_number: layer for model in parts for layer in model.decoder.layers}
        refuse_missing(self.layers, here, config.num_layers, self._device)
        self._hooks = [
            here[number].register_forward_hook(partial(self._hook, index), with_kwargs=True)
            for index, number in enumerate(self.layers)
            if number in here
        ]
        self._step: int | None = None
        self._in_force = False
        self._counts = self._zeros()
        self._seen: set[tuple[int, int]] = set()
        self._drawn: dict[int, Triples] = {}

    @property
    def straightness(self) -> float | None:
        """Mean cosine of the last step's triples: 1 - `value`."""
        return None if self.value is None else 1 - self.value

    def begin_step(self, step: int) -> None:
        """Get ready for a training step.

        Args:
            step: Optimizer steps taken before it.
        """
        self._in_force = self.lever.weight > 0 and step >= self.lever.start_step
        self._step = step if self._in_force or self.lever.measure else None
        self.value = None
        self._counts = self._zeros()
        self._seen.clear()
        self._drawn.clear()

    def end_step(self) -> None:
        """Add up the step that ends, and set `value`.

        Raises:
            RuntimeRefusal: If the loss is in force and did not reach a listed layer.
        """
        if self._step is None:
            return
        self._step = None
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._counts)
        counts = self._counts.tolist()
        drawn = sum(layer[DRAWN] for layer in counts)
        self.value = sum(layer[DISTANCE] for layer in counts) / drawn if drawn else None
        if self._in_force:
            refuse_unreached(dict(zip(self.layers, counts, strict=True)))

    def close(self) -> None:
        """Take the hooks off the layers."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, index: int, layer: Any, _: Any, arguments: Any, output: Any) -> Any:
        """Return a layer's output with the loss joined; None leaves it as it is."""
        if self._step is None or not torch.is_grad_enabled():
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        # Megatron's schedule numbers every layer's micro-batch before it runs the model.
        micro_batch = getattr(layer, "current_microbatch", 0)
        self._refuse_again(index, micro_batch)
        triples = self._triples(micro_batch, hidden, arguments.get("packed_seq_params"))
        with torch.set_grad_enabled(self._in_force):
            loss = self._loss(index, hidden, triples)
        if not loss.requires_grad:  # only measured; or frozen, and refused at the end of the step
            return None
        joined = _Join.apply(hidden, loss * self._scale())
        # The pipeline frees what a stage sends on, which must not be a view.
        joined = make_viewless_tensor(joined, requires_grad=True, keep_graph=True)
        return (joined, *output[1:]) if isinstance(output, tuple) else joined

    def _triples(self, micro_batch: int, hidden: Tensor, boundaries: Any) -> Triples:
        """Return the positions of a micro-batch, the same on every rank that shares its rows."""
        if micro_batch not in self._drawn:
            ids = document_ids_of_rows(boundaries)
            rows = hidden.size(1)
            # Megatron's sampler deals each micro-batch out to data-parallel ranks in turn.
            ranks = parallel_state.get_data_parallel_world_size()
            turn = micro_batch * ranks + parallel_state.get_data_parallel_rank()
            uniforms = torch.stack(
                [
                    row_uniforms(self.seed, self._step or 0, row, self.lever.spans)
                    for row in range(turn * rows, (turn + 1) * rows)
                ]
            )
            length = hidden.size(0) * self._sequence_ranks()
            on_device = uniforms.to(hidden.device, non_blocking=True)
            self._drawn[micro_batch] = draw_triples(ids, length, on_device)
        return self._drawn[micro_batch]

    def _loss(self, index: int, hidden: Tensor, triples: Triples) -> Tensor:
        """Return the mean distance of a layer's states in a micro-batch, and count it.

        Every row has the same weight: one without a long enough document adds nothing, so that
        the loss does not depend on how rows are laid out in micro-batches.
        """
        states = self._states(hidden, triples.positions)
        drawn = triples.valid.sum() * self.lever.spans
        if states.requires_grad:
            states.register_hook(partial(self._reached, index, drawn))
        s, r, t = self._summed(states).unbind(2)
        loss = tube_loss(s, r, t, triples.valid.unsqueeze(1))
        counts = self._counts[index]
        counts[SEEN] += 1
        counts[DRAWN] += drawn
        counts[DISTANCE] += loss.detach() * triples.positions[..., 0].numel()
        return loss

    def _states(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Return the states at some positions, `[batch, spans, 3, hidden]`.

        Under sequence parallelism those of other ranks are 0.
        """
        batch = torch.arange(hidden.size(1), device=hidden.device)[:, None, None]
        if self._sequence_ranks() == 1:
            return hidden[positions, batch]
        local = positions - parallel_state.get_tensor_model_parallel_rank() * hidden.size(0)
        own = (local >= 0) & (local < hidden.size(0))
        return hidden[local.clamp(0, hidden.size(0) - 1), batch].where(own.unsqueeze(-1), 0)

    def _summed(self, states: Tensor) -> Tensor:
        """Return every rank's states; each rank's loss is whole, so gradients are not summed."""
        if self._sequence_ranks() == 1:
            return states
        group = parallel_state.get_tensor_model_parallel_group()
        summed: Tensor = reduce_from_tensor_model_parallel_region(states, group)
        return summed

    def _sequence_ranks(self) -> int:
        """Return how many tensor ranks a sequence is split over."""
        if not self._config.sequence_parallel:
            return 1
        return int(parallel_state.get_tensor_model_parallel_world_size())

    def _scale(self) -> Tensor | float:
        """Return the factor of a micro-batch's loss: the schedule's own, the weight, the layers."""
        scale = self.lever.weight / (get_num_microbatches() * len(self.layers))
        if self._config.grad_scale_func is None:
            return scale
        factor: Tensor = self._config.grad_scale_func(torch.ones((), device=self._device))
        return factor.squeeze() * scale

    def _reached(self, index: int, drawn: Tensor, _: Tensor) -> None:
        self._counts[index, REACHED] += drawn

    def _zeros(self) -> Tensor:
        # fp64: counts are exact.
        return torch.zeros(len(self.layers), COUNTS, dtype=torch.float64, device=self._device)

    def _refuse_again(self, index: int, micro_batch: int) -> None:
        """Refuse to count a micro-batch of a layer twice."""
        if (index, micro_batch) in self._seen:
            raise RuntimeRefusal(
                "A layer ran twice in one micro-batch, and STP would count both",
                given=f"layer {self.layers[index]}, micro-batch {micro_batch}",
                allowed="one forward pass with gradients for each micro-batch of a step",
                hint="Megatron's schedule for every pass",
            )
        self._seen.add((index, micro_batch))


class _Join(torch.autograd.Function):
    """Hidden states as they are; their backward pass is a loss's, too.

    As `MoEAuxLossAutoScaler` of Megatron, whose scale is only set where there are experts.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return hidden

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (loss,) = ctx.saved_tensors
        return gradient, torch.ones_like(loss)

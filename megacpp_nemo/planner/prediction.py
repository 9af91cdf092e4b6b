"""How long a step of a layout would take, from a simple model: a prediction, no measurement.

- A stage works its training operations per micro-batch, recomputation included, at a stated share
  of the GPU's dense peak; in FP8 runs expert layers at that of FP8.
- What its layers send over tensor, expert and context groups, and it to its neighbours, is added,
  at the bandwidth of NVLink where the group is in one node, else of the network.
- A step takes its slowest stage's micro-batches, and the bubble, `(p - 1) / v` more of them.
- Gradients and parameters of data parallelism are added; where the recipe overlaps them with
  work, only as far as they outlast one micro-batch.

Left out: launches, memory traffic, uneven experts, and that small matrices run slower.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megacpp_nemo.contract.parallelism import RECOMPUTE
from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.contract.training import Precision
from megacpp_nemo.planner.census import Census, data_shards, of_micro_batch
from megacpp_nemo.planner.collectives import (
    CONTEXT,
    EXPERT,
    EXPERT_TENSOR,
    TENSOR,
    TENSOR_CONTEXT,
    TENSOR_EXPERT,
    ring_bytes,
)
from megacpp_nemo.planner.communication import group_ranks
from megacpp_nemo.planner.exchanges import of_layer, outside_layers
from megacpp_nemo.planner.flops import forward_flops, training_flops
from megacpp_nemo.planner.gpus import Gpu, PlanError
from megacpp_nemo.planner.layouts import Allowed
from megacpp_nemo.planner.memory import GRADIENT_BYTES
from megacpp_nemo.planner.pieces import Piece, Role
from megacpp_nemo.planner.saved import Room, element_bytes
from megacpp_nemo.planner.sizes import Sizes

# Of the order of the best rate published for this family: 161 800 tokens/s of the native lane on 8
# H200, which is 28% by these counts.
EFFICIENCY = 0.3
DISPATCHER = "alltoall"
BACKWARD = 2 / 3
# What selective recomputation runs again of attention layers other than DSA's.
CORES = ("scores", "mixed values")


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The predicted seconds of an optimizer step, by what they go to on the slowest stage.

    Args:
        compute: Arithmetic of its micro-batches.
        exchange: Tensor, expert, context and pipeline traffic.
        bubble: Waiting for the pipeline to fill and to drain.
        data: Traffic of data parallelism that is not hidden.
    """

    compute: float
    exchange: float
    bubble: float
    data: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute + self.exchange + self.bubble + self.data

    def to_dict(self) -> dict[str, float]:
        """Return the figures as plain data."""
        return {**asdict(self), "total": self.seconds}


class Prediction:
    """Predicts steps of a recipe's layouts on one kind of GPU.

    Args:
        census: What the layouts share.
        gpu: The GPU.
        efficiency: Share of its peak that arithmetic reaches.

    Raises:
        PlanError: If the recipe is in FP8 and the GPU has none.
    """

    def __init__(self, census: Census, gpu: Gpu, efficiency: float = EFFICIENCY) -> None:
        self.census, self.recipe, self.gpu = census, census.recipe, gpu
        rates = [efficiency * _peak(self.recipe, gpu, piece) for piece in census.kinds]
        self.seconds_per_token = {
            policy: [
                _work(self.recipe, piece, policy) / rate
                for piece, rate in zip(census.kinds, rates, strict=True)
            ]
            for policy in RECOMPUTE
        }

    def step(self, layout: Allowed, recompute: str) -> StepTime:
        """Return how long a step takes in a layout."""
        sizes, census = layout.sizes, self.census
        tokens = layout.micro_batch_size * self.recipe.model.seq_length / (sizes.tp * sizes.cp)
        work = self.seconds_per_token[recompute]
        sending = self._exchanges(layout)[recompute == "full"]
        worst = (0.0, 0.0)
        for place, stage in enumerate(census.stages(layout)):
            compute = tokens * sum([count * work[kind] for kind, count in stage.own])
            sent = sum([count * sending[kind] for kind, count in stage.own])
            sent += self._sent_on(layout, place)
            worst = max(worst, (compute, sent), key=sum)
        number = census.micro_batches(layout)
        compute, sent = worst
        return StepTime(
            compute=number * compute,
            exchange=number * sent,
            bubble=(sizes.pp - 1) / sizes.vpp * (compute + sent),
            data=self._data(layout, compute + sent),
        )

    def _exchanges(self, layout: Allowed) -> tuple[list[float], list[float]]:
        """Return the seconds of each kind's collectives in a micro-batch.

        Without recomputation, and with layers run forward twice.
        """
        key = ("exchanges", *of_micro_batch(layout))
        return self.census.once(key, layout, lambda recipe: self._exchanged(recipe, layout.sizes))

    def _exchanged(self, recipe: HybridRecipe, sizes: Sizes) -> tuple[list[float], list[float]]:
        room = Room.of(recipe, "fused")
        once, twice = [], []
        for piece in self.census.kinds:
            layer = piece.family is not None
            forward = backward = 0.0
            for exchange in (
                of_layer(room, piece.family, DISPATCHER)
                if piece.family
                else outside_layers(room, piece.role)
            ):
                payload, ranks = exchange.payload, group_ranks(recipe, exchange.group)
                sent = exchange.count * ring_bytes(exchange.operation, payload, ranks)
                seconds = sent / self._bandwidth(_span(exchange.group, sizes))
                forward += 0.0 if exchange.backward else seconds
                backward += seconds if exchange.backward else 0.0
            once.append(forward + backward)
            twice.append(2 * forward + backward if layer else forward + backward)
        return once, twice

    def _sent_on(self, layout: Allowed, stage: int) -> float:
        """Return the seconds of a micro-batch's way to the next stages, and its gradient's back."""
        tp, pp, vpp, cp, *_ = layout.sizes
        if pp == 1:
            return 0.0
        times = 2 * vpp - (stage == 0) - (stage == pp - 1)
        tokens = layout.micro_batch_size * self.recipe.model.seq_length // (cp * tp)
        sent = times * tokens * self.recipe.model.hidden_size * element_bytes(self.recipe)
        return sent / self._bandwidth(self.census.layouts.nodes * self.census.layouts.devices)

    def _data(self, layout: Allowed, micro_batch: float) -> float:
        """Return the seconds of gradients and parameters that no work hides."""
        parallelism, width = self.recipe.parallelism, element_bytes(self.recipe)
        bandwidth = self._bandwidth(layout.sizes.tp * layout.sizes.cp * layout.sizes.dp)
        found = 0.0
        for held in self.census.elements(layout):
            pairs = zip(held, data_shards(layout), strict=True)
            share = sum(elements * (ranks - 1) / ranks for elements, ranks in pairs) / bandwidth
            gradients, parameters = share * GRADIENT_BYTES, share * width
            if not parallelism.use_distributed_optimizer:
                gradients, parameters = 2 * gradients, 0.0
            if parallelism.overlap_grad_reduce:
                gradients = max(0.0, gradients - BACKWARD * micro_batch)
            if parallelism.overlap_param_gather:
                parameters = max(0.0, parameters - (1 - BACKWARD) * micro_batch)
            found = max(found, gradients + parameters)
        return found

    def _bandwidth(self, span: int) -> float:
        """Return the bandwidth among ranks that lie within `span` places of each other."""
        near = span <= self.census.layouts.devices
        return self.gpu.nvlink_bytes_per_second if near else self.gpu.network_bytes_per_second


def _span(group: str, sizes: Sizes) -> int:
    """Return how many places a group reaches over, in Megatron's order of ranks."""
    return {
        TENSOR: sizes.tp,
        TENSOR_CONTEXT: sizes.tp * sizes.cp,
        CONTEXT: sizes.tp * sizes.cp,
        EXPERT_TENSOR: sizes.etp,
        EXPERT: sizes.etp * sizes.ep,
        TENSOR_EXPERT: sizes.etp * sizes.ep,
    }[group]


def _peak(recipe: HybridRecipe, gpu: Gpu, piece: Piece) -> float:
    """Return the dense peak of a piece's arithmetic."""
    if recipe.precision is Precision.FP32:
        return gpu.fp32_flops
    if recipe.precision is not Precision.FP8_EXPERTS or piece.family is not BlockFamily.EXPERTS:
        return gpu.bf16_flops
    if gpu.fp8_flops is None:
        raise PlanError(
            f"{gpu.title} has no FP8",
            given=f"precision={recipe.precision.value!r} on gpu={gpu.name!r}",
            allowed="bf16, or a GPU with FP8",
            hint="precision='bf16'",
        )
    return gpu.fp8_flops


def _work(recipe: HybridRecipe, piece: Piece, recompute: str) -> float:
    """Return the operations of a piece in a training step, per token, recomputation included."""
    if piece.role is Role.EMBEDDING_COPY:
        return 0.0
    work = training_flops(recipe, piece, recompute=recompute == "full")
    if recompute == "selective" and piece.family is BlockFamily.ATTENTION:
        terms = forward_flops(recipe, piece).terms
        work += sum(terms[name] for name in CORES)
    return work

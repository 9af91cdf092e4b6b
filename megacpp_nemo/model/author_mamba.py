"""The authored M block: Mamba-3 (arXiv 2603.15569) as a mixer of Megatron's `MambaLayer`.

in_proj -> norm of B and C -> scan, with skip and gate -> out_proj. There is no convolution, and
no norm at the end: mamba-ssm's default has none. Parameter names are mamba-ssm's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megacpp_nemo.contract.mixers import AuthorMambaShape
from megacpp_nemo.model.documents import document_ids_of
from megacpp_nemo.model.generation_state import enter, keep
from megacpp_nemo.model.initial import (
    inverse_softplus_steps,
    parameter_device,
    split_over_tensor_ranks,
)
from megacpp_nemo.model.mamba3_chunked import mamba3_chunked
from megacpp_nemo.model.mamba3_kernels import (
    SEVERAL_DOCUMENTS,
    call_obstacle,
    machine_obstacle,
    mamba3_kernels,
    no_kernels,
    state_once,
)
from megacpp_nemo.model.mamba3_parts import Mamba3State
from megacpp_nemo.model.norms import LocalRMSNorm
from megacpp_nemo.model.projections import in_projection, out_projection
from megacpp_nemo.model.sharded_mixer import sharded_mixer_state

DECAY_FLOOR = 1e-4
PARTS = ("z", "x", "B", "C", "dt", "A", "trap", "angle")


@dataclass
class AuthorMambaMixerSubmodules:
    """Projections of a Mamba-3 mixer."""

    in_proj: ModuleSpec | type | None = None
    out_proj: ModuleSpec | type | None = None


class AuthorMambaMixer(MegatronModule):
    """Mamba-3 as a mixer of Megatron's `MambaLayer`, tensor-parallel over heads.

    The fused input projection holds, in order and each split over the ranks, z and x
    (`num_heads * head_dim` each), B and C (`mimo_rank * state_dim` each), the inputs of dt, A and
    lambda (`num_heads` each) and the angles (`state_dim / 4`). B, C and the angles serve all
    heads: they are split by width and gathered.

    Args:
        config: Megatron configuration.
        submodules: Input and output projections.
        d_model: Width of the residual stream.
        shape: Heads, widths, rank and chunk.
        path: `fused` demands the kernels, `portable` plain torch; `auto` takes what can run.
        layer_number: 1-based layer number.
        pg_collection: Megatron's process groups.
        pp_layer_offset: Layers on earlier pipeline stages; unused here.
        name: Taken for later releases' call.

    Raises:
        RuntimeRefusal: If the kernels are demanded where they cannot run.
    """

    def __init__(
        self,
        config: Any,
        submodules: AuthorMambaMixerSubmodules,
        d_model: int,
        shape: AuthorMambaShape,
        path: str = "auto",
        layer_number: int = 1,
        pg_collection: Any = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        self.shape, self.path = shape, path
        self.layer_number, self.tp_group = layer_number, pg_collection.tp
        self._set_path()
        ranks, inner = self.tp_group.size(), shape.num_heads * shape.head_dim
        self._set_sizes(ranks)
        width = sum(self.part_sizes) * ranks
        self.in_proj = in_projection(submodules.in_proj, config, d_model, width, self.tp_group)
        self._make_state_parameters()
        self.B_norm, self.C_norm = (LocalRMSNorm(config, shape.state_dim) for _ in range(2))
        for norm in (self.B_norm, self.C_norm):
            # Every rank normalizes every token, so its gradient is whole already.
            norm.weight.sequence_parallel = False  # type: ignore[attr-defined]
        self.out_proj = out_projection(submodules.out_proj, config, inner, d_model, self.tp_group)

    def _set_path(self) -> None:
        """Decide between the kernels and plain torch, as far as the layer alone decides."""
        self.obstacle = machine_obstacle(self.shape)
        if self.path == "portable":
            self.obstacle = "mamba_path='portable'"
        elif self.path == "fused":
            documents = getattr(self.config, "reset_state", False)
            obstacle = self.obstacle or (SEVERAL_DOCUMENTS if documents else None)
            if obstacle:
                raise no_kernels(obstacle)

    def _set_sizes(self, ranks: int) -> None:
        shape = self.shape
        self.num_heads = shape.num_heads // ranks
        inner = self.num_heads * shape.head_dim
        shared = shape.mimo_rank * shape.state_dim // ranks
        angles = shape.num_angles // ranks
        heads = self.num_heads
        self.part_sizes = [inner, inner, shared, shared, heads, heads, heads, angles]

    def _make_state_parameters(self) -> None:
        """Step bias, skip, biases of B and C, and scales by rank, each rank making its own."""
        shape, heads, dtype = self.shape, self.num_heads, self.config.params_dtype
        rank = shape.mimo_rank

        def filled(value: float, *sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.full(sizes, value, dtype=dtype, device=parameter_device()))

        with get_cuda_rng_tracker().fork():
            self.dt_bias = nn.Parameter(inverse_softplus_steps(heads, dtype))
        self.D = filled(1.0, heads)
        self.B_bias = filled(1.0, heads, rank, shape.state_dim)
        self.C_bias = filled(1.0, heads, rank, shape.state_dim)
        if rank > 1:
            self.mimo_x = filled(1 / rank, heads, rank, shape.head_dim)
            self.mimo_z = filled(1.0, heads, rank, shape.head_dim)
            self.mimo_o = filled(1 / rank, heads, rank, shape.head_dim)
        split_over_tensor_ranks(*self.parameters(recurse=False))

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: Any = None,
        *,
        inference_params: Any = None,
        packed_seq_params: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix `hidden_states` `[seq, batch, hidden]` along the sequence; return it and a bias."""
        context = inference_context or inference_params
        carried = enter(context, self.layer_number)
        documents = document_ids_of(self.config, packed_seq_params)
        projected = self.in_proj(hidden_states)[0].transpose(0, 1)
        y, state = self.mix(
            projected,
            documents,
            None if carried is None else Mamba3State(**carried),
            carries_state=context is not None,
        )
        if state is not None:
            keep(context, self.layer_number, **vars(state))
        return self.out_proj(y.transpose(0, 1).contiguous())

    def mix(
        self,
        projected: Tensor,
        documents: Tensor | None = None,
        entering: Mamba3State | None = None,
        *,
        carries_state: bool = True,
    ) -> tuple[Tensor, Mamba3State | None]:
        """Run the mixer between its projections.

        Args:
            projected: What in_proj makes `[batch, seq, width]`.
            documents: Document ids `[batch, seq]`, or None for whole rows.
            entering: What an earlier part of the rows left; default nothing.
            carries_state: Whether the state after the last token is wanted.

        Returns:
            What out_proj takes `[batch, seq, heads * head_dim]`, and the state, if it is wanted.

        Raises:
            RuntimeRefusal: If the kernels are demanded and cannot run this.
        """
        arguments = self._arguments(projected)
        rank, chunk_size = self.shape.mimo_rank, self.shape.chunk_size
        obstacle = self.obstacle or call_obstacle(
            arguments["x"],
            rank=rank,
            chunk_size=chunk_size,
            documents=documents is not None,
            carries_state=carries_state or entering is not None,
        )
        state_once(obstacle)
        if obstacle is None:
            return mamba3_kernels(**arguments, chunk_size=chunk_size).flatten(-2), None
        if self.path == "fused":
            raise no_kernels(obstacle)
        y, state = mamba3_chunked(
            **arguments, document_ids=documents, initial_state=entering, chunk_size=chunk_size
        )
        return y.flatten(-2), state if carries_state else None

    def _arguments(self, projected: Tensor) -> dict[str, Any]:
        """Return the arguments of the scan by name."""
        z, x, B, C, dt, A, trap, angles = projected.split(self.part_sizes, dim=-1)
        by_rank = (self.shape.mimo_rank, 1, self.shape.state_dim)
        scales = {name: getattr(self, name, None) for name in ("mimo_x", "mimo_z", "mimo_o")}
        return {
            "x": x.unflatten(-1, (self.num_heads, -1)),
            "dt": F.softplus(dt.float() + self.dt_bias.float()),
            "A": (-F.softplus(A.float())).clamp(max=-DECAY_FLOOR),
            "trap": trap,
            "B": self._to_heads(self.B_norm(self._gathered(B).unflatten(-1, by_rank))),
            "C": self._to_heads(self.C_norm(self._gathered(C).unflatten(-1, by_rank))),
            "angles": self._to_heads(self._gathered(angles)),
            "B_bias": self.B_bias,
            "C_bias": self.C_bias,
            "D": self.D,
            "z": z.unflatten(-1, (self.num_heads, -1)),
            **scales,
        }

    def _gathered(self, part: Tensor) -> Tensor:
        """Gather over the ranks a part that all heads read."""
        if self.tp_group.size() == 1:
            return part
        return gather_from_tensor_model_parallel_region(part, group=self.tp_group)

    def _to_heads(self, part: Tensor) -> Tensor:
        """Hand a shared part to this rank's heads; its gradients sum over the ranks."""
        return copy_to_tensor_model_parallel_region(part, group=self.tp_group)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the parameters as sharded tensors, in_proj by its logical parts."""
        fused = {"in_proj.weight": (PARTS, self.part_sizes)}
        return sharded_mixer_state(self, prefix, sharded_offsets, metadata, fused=fused)

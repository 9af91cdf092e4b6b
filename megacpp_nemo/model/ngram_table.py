"""The tables of the n-gram memory: on the device, or in host memory.

- `NgramTable`: a parameter like any other.
- `HostNgramTable`: rows are looked up in host memory, and those of a micro-batch alone are moved
  to the device; their gradients come back, and `host_optimizer` applies them in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor, nn
from torch.nn import functional

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.shapes import PLACEMENTS
from megacpp_nemo.model.initial import normal_rows, parameter_device

NO_ROW = -1
DEVICE, HOST = PLACEMENTS


class NgramTable(MegatronModule):
    """The stack of tables `[rows, width]`, of which this tensor rank holds a part of the width.

    Args:
        config: Hybrid model configuration.
        rows: Rows of all tables.
        width: Width of a row, all ranks together.
        tp_group: Tensor-parallel group.
    """

    weight: Tensor

    def __init__(self, config: Any, rows: int, width: int, tp_group: Any) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        part = width // get_pg_size(tp_group)
        first = part * get_pg_rank(tp_group)
        self._allocate(rows, part)
        for name, value in (
            ("tensor_model_parallel", True),
            ("partition_dim", 1),
            ("partition_stride", 1),
        ):
            setattr(self.weight, name, value)
        if config.perform_initialization:
            # As the tokens are: most rows are read seldom, and what was drawn for them is noise.
            std = config.init_method_std
            normal_rows(self.weight, width, first, std=std, seed=config.seed, name="ngram_hash")

    def _allocate(self, rows: int, part: int) -> None:
        kind = {"device": parameter_device(), "dtype": self.config.params_dtype}
        self.weight = nn.Parameter(torch.empty(rows, part, **kind))

    def forward(self, rows: Tensor) -> Tensor:
        """Return `[..., part of the width]` of rows `[...]`; zeros for -1."""
        return self._read(rows.clamp(min=0)) * (rows != NO_ROW).unsqueeze(-1)

    def _read(self, rows: Tensor) -> Tensor:
        return functional.embedding(rows, self.weight)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the table as Megatron saves it, split over tensor ranks by its width."""
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 1},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        return sharded


class HostNgramTable(NgramTable):
    """The same tables in host memory, fp32, pinned where there is a CUDA device.

    The weight is a buffer, not a parameter: Megatron gives every parameter a gradient on the
    device, and moves it there. Every data-parallel rank has the whole table.

    Attributes:
        trained: Whether an optimizer takes the gradients.
    """

    def _allocate(self, rows: int, part: int) -> None:
        pinned = torch.cuda.is_available()
        self.register_buffer(
            "weight", torch.empty(rows, part, dtype=torch.float32, pin_memory=pinned)
        )
        self.trained = False
        self._gradients: list[tuple[Tensor, Tensor]] = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HostNgramTable:
        """Stay in host memory, and fp32, whatever is done to the model around it."""
        return self

    def _read(self, rows: Tensor) -> Tensor:
        wanted, places = rows.unique(return_inverse=True)
        wanted = wanted.to(self.weight.device)
        read = self.weight.index_select(0, wanted).to(self.config.params_dtype)
        if self.weight.is_pinned():
            read = read.pin_memory()
        moved = read.to(rows.device, non_blocking=True).detach()
        if torch.is_grad_enabled() and self.training:
            moved.requires_grad_()
            moved.register_post_accumulate_grad_hook(lambda leaf: self._keep(wanted, leaf))
        return functional.embedding(places, moved)

    def _keep(self, rows: Tensor, leaf: Tensor) -> None:
        if not self.trained:
            raise RuntimeRefusal(
                "Nothing would apply the gradients of the n-gram tables in host memory",
                given="ngram_placement='host', and an optimizer that was built without them",
                allowed="megacpp_nemo.model.host_optimizer.with_host_tables(optimizer, ...)",
                hint="NeMo's MegatronOptimizerModule, or ngram_placement='device'",
            )
        assert leaf.grad is not None
        self._gradients.append((rows, leaf.grad))
        leaf.grad = None

    def take_gradients(self) -> tuple[Tensor, Tensor]:
        """Return what came back since this was last asked: rows `[n]`, gradients `[n, part]`.

        Rows are in host memory and may repeat; gradients are fp32, where the model runs.
        """
        taken, self._gradients = self._gradients, []
        if not taken:
            none = torch.empty(0, dtype=torch.long, device=self.weight.device)
            return none, torch.empty(0, self.weight.size(1), device=parameter_device())
        rows, gradients = zip(*taken, strict=True)
        return torch.cat(rows), torch.cat([gradient.float() for gradient in gradients])

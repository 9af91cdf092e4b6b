"""The code-structure embedding: what each token is told of the syntax tree it lies in."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor, nn
from torch.nn import functional

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
from megacpp_nemo.model.initial import parameter_device, unit_rows


class StructureEmbedding(MegatronModule):
    """Rows of one stacked table, weighted by channel and summed, then projected up.

    The up-projection is zero at first and the table is not: with both at zero, the gradient of
    each would be zero for ever. It is whole on every tensor rank; under sequence parallelism
    each rank embeds its part of the sequence, and Megatron sums the gradients.

    Args:
        config: Hybrid model configuration.
        channels: Names of the channels, in the contract's order.
        bottleneck: Width of the table.
        tp_group: Tensor-parallel group.
    """

    def __init__(
        self, config: Any, channels: tuple[str, ...], bottleneck: int, tp_group: Any
    ) -> None:
        super().__init__(config=config)
        self.channels, self.tp_group = channels, tp_group
        # The last row of each channel is for a token that has no such value.
        self.sizes = [STRUCTURE_CHANNELS[name] + 1 for name in channels]
        self.offsets = [0, *accumulate(self.sizes)][:-1]
        kind = {"device": parameter_device(), "dtype": config.params_dtype}
        self.scale = nn.Parameter(torch.full((len(channels),), 1 / len(channels), **kind))
        self.table, self.up_proj = nn.Module(), nn.Module()
        self.table.weight = nn.Parameter(torch.empty(sum(self.sizes), bottleneck, **kind))
        self.up_proj.weight = nn.Parameter(torch.zeros(config.hidden_size, bottleneck, **kind))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if config.perform_initialization:
            unit_rows(self.table.weight, bottleneck, 0, seed=config.seed, name="structure")

    def rows(self, structure: Mapping[str, Tensor] | None, tokens: Tensor) -> Tensor:
        """Return rows of the table `[batch, seq, channels]`, int64.

        Values beyond a channel's range fall on its last one; the absent id on its own row.

        Args:
            structure: Ids `[batch, seq]` by channel; channels that the model has not are not
                read. None: every channel is absent.
            tokens: `[batch, seq]`.

        Raises:
            RuntimeRefusal: If a channel is missing, or not as long as the tokens.
        """
        if structure is None:
            last = [
                offset + size - 1 for offset, size in zip(self.offsets, self.sizes, strict=True)
            ]
            return torch.tensor(last, device=tokens.device).expand(*tokens.shape, -1)
        missing = [name for name in self.channels if name not in structure]
        if missing:
            raise RuntimeRefusal(
                f"The batch lacks the structure channel {missing[0]}",
                given=f"channels {', '.join(structure) or 'none'}",
                allowed=f"at least {', '.join(self.channels)}",
                hint="data built and served with these channels: data.structure",
            )
        rows = []
        for name, size, offset in zip(self.channels, self.sizes, self.offsets, strict=True):
            ids = structure[name]
            if ids.shape != tokens.shape:
                raise RuntimeRefusal(
                    f"The structure channel {name} is not aligned with the tokens",
                    given=f"{name} {list(ids.shape)} for tokens {list(tokens.shape)}",
                    allowed="one id for each token, [batch, seq]",
                    hint="the ids of the same rows, cut and padded as the tokens are",
                )
            rows.append(ids.long().clamp(0, size - 1) + offset)
        return torch.stack(rows, -1)

    def forward(self, rows: Tensor) -> Tensor:
        """Return what joins the token embedding: `[seq, batch, hidden]`.

        Under sequence parallelism it is this rank's part of the sequence.

        Args:
            rows: `[batch, seq, channels]`, as `rows` has them.
        """
        rows = rows.transpose(0, 1)
        if self.config.sequence_parallel:
            rows = rows.chunk(get_pg_size(self.tp_group))[get_pg_rank(self.tp_group)]
        read = functional.embedding(rows, self.table.weight)
        return functional.linear((read * self.scale.unsqueeze(-1)).sum(-2), self.up_proj.weight)

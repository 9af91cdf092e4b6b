"""The code-structure embedding: what each token is told of the syntax tree it lies in."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor, nn

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
from megacpp_nemo.model.initial import normal_rows, parameter_device

WHOLE_NUMBERS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64)


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
        self.table = _Table(sum(self.sizes), bottleneck, **kind)
        self.up_proj = _UpProjection(bottleneck, config.hidden_size, bias=False, **kind)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if config.perform_initialization:
            normal_rows(
                self.table.weight,
                bottleneck,
                0,
                std=bottleneck**-0.5,  # rows of length 1: each is read in every batch
                seed=config.seed,
                name="structure",
            )

    def rows(self, structure: Mapping[str, Tensor] | None, tokens: Tensor) -> Tensor:
        """Return rows of the table `[batch, seq, channels]`, int64.

        Of a channel of n values, ids 0 to n - 1 are values, and n is absent; so is every
        negative id. Ids above n fall on the last value.

        Args:
            structure: Whole numbers `[batch, seq]` by channel, on the tokens' device; channels
                that the model has not are not read. None: every channel is absent.
            tokens: `[batch, seq]`.

        Raises:
            RuntimeRefusal: If a channel is missing, or its ids are no whole numbers, of another
                shape than the tokens or on another device.
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
            ids = _checked(name, structure[name], tokens).long()
            values, absent = ids.clamp(max=size - 2), (ids < 0) | (ids == size - 1)
            rows.append(values.where(~absent, size - 1) + offset)
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
        weighted = self.table(rows) * self.scale.unsqueeze(-1)
        joined: Tensor = self.up_proj(weighted.sum(-2))
        return joined


# Both are called as modules: before that, Megatron's distributed optimizer may still be gathering
# the weights of the last step. Neither draws anything when it is built.
class _Table(nn.Embedding):
    def reset_parameters(self) -> None:
        pass


class _UpProjection(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def _checked(name: str, ids: Tensor, tokens: Tensor) -> Tensor:
    """Return a channel's ids if they are those of the tokens `[batch, seq]`."""
    kind = str(getattr(ids, "dtype", type(ids).__name__)).removeprefix("torch.")
    if not isinstance(ids, Tensor) or ids.dtype not in WHOLE_NUMBERS:
        raise RuntimeRefusal(
            f"The structure channel {name} does not hold ids",
            given=f"{name} of type {kind}",
            allowed="a tensor of whole numbers",
            hint="the ids as the data was built with: int64, or uint8 and uint16",
        )
    if ids.shape != tokens.shape or ids.device != tokens.device:
        raise RuntimeRefusal(
            f"The structure channel {name} is not aligned with the tokens",
            given=f"{name} {list(ids.shape)} on {ids.device} for tokens {list(tokens.shape)} on "
            f"{tokens.device}",
            allowed="one id for each token, [batch, seq], on the same device",
            hint="the ids of the same rows, cut, padded and moved as the tokens are",
        )
    return ids

"""A matrix that ranks share, turned so that each of them has whole rows of a tall one.

The Gram matrix over the short side of a matrix is the sum of what the ranks' runs of its long
side give: one sum over ranks, and none of them holds more than its run. A matrix split along its
short side is first split anew along its long side.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megacpp_nemo.contract.errors import RuntimeRefusal


@dataclass(frozen=True, kw_only=True)
class TallShare:
    """How this rank's share of a matrix becomes rows of a tall one, and comes back.

    The tall matrix, `[long, short]`, is the matrix, or its transpose if it is wider than high.

    Args:
        shape: `[out, in]` of the whole matrix.
        split: Dimension that is split over `group`, in runs of any lengths, in the order of its
            ranks; None if this rank has all of it.
        group: Ranks that share it.
    """

    shape: tuple[int, int]
    split: int | None = None
    group: Any = None

    @property
    def long(self) -> int:
        """Length of the long side."""
        return max(self.shape)

    @property
    def short(self) -> int:
        """Length of the short side."""
        return min(self.shape)

    def check(self, share: Tensor) -> None:
        """Refuse what cannot be a share of such a matrix.

        Raises:
            RuntimeRefusal: If it is no fp32 matrix, or does not fit the whole one's shape.
        """
        kept = [side for side in range(2) if side != self.split]
        fits = share.dim() == 2 == len(self.shape) and all(
            share.size(side) == self.shape[side] for side in kept
        )
        if not fits or share.dtype is not torch.float32:
            raise RuntimeRefusal(
                "Only a matrix has a polar factor",
                given=f"{str(share.dtype).removeprefix('torch.')} of shape {tuple(share.shape)}, "
                f"for a whole of {tuple(self.shape)} split along {self.split}",
                allowed="float32 [out, in], or rows or columns of it",
                hint="one matrix at a time, as the parts of a fused parameter or one expert",
            )

    def take(self, share: Tensor) -> Tensor:
        """Return this rank's rows `[rows, short]` of the tall matrix: a view where one will do.

        Collective over the ranks that share the matrix.
        """
        tall = self._turned(share)
        if not self._crosswise:
            return tall
        rows, columns = self._runs(), self._columns(share)
        own = rows[self._rank]
        received = tall.new_empty(own * self.short)
        self._exchange(
            tall.contiguous().view(-1),
            received,
            [count * tall.size(1) for count in rows],
            [own * count for count in columns],
        )
        pieces = received.split([own * count for count in columns])
        return torch.cat([p.view(own, c) for p, c in zip(pieces, columns, strict=True)], 1)

    def give(self, tall: Tensor, share: Tensor) -> None:
        """Put back into the share what `take` returned, changed meanwhile.

        Collective over the ranks that share the matrix.
        """
        back = self._turned(share)
        if not self._crosswise:
            if back.data_ptr() != tall.data_ptr():
                back.copy_(tall)
            return
        rows, columns = self._runs(), self._columns(share)
        sizes = [tall.size(0) * count for count in columns]
        sent = share.new_empty(sum(sizes))
        for slot, piece in zip(sent.split(sizes), tall.split(columns, 1), strict=True):
            slot.view(piece.shape).copy_(piece)
        received = share.new_empty(back.numel())
        self._exchange(sent, received, sizes, [count * back.size(1) for count in rows])
        back.copy_(received.view(back.shape))

    def reduce(self, values: Tensor) -> Tensor:
        """Sum `values` over the ranks that share the matrix, in place, and return them."""
        if self.split is not None:
            torch.distributed.all_reduce(values, group=self.group)
        return values

    @property
    def ranks(self) -> int:
        """Number of ranks that share the matrix."""
        return 1 if self.split is None else torch.distributed.get_world_size(self.group)

    @property
    def _rank(self) -> int:
        return torch.distributed.get_rank(self.group)

    @property
    def _wide(self) -> bool:
        return self.shape[0] < self.shape[1]

    @property
    def _crosswise(self) -> bool:
        """Whether the short side is split. The rows of a square matrix count as its long one."""
        return self.split is not None and self.split == (0 if self._wide else 1)

    def _turned(self, share: Tensor) -> Tensor:
        return share.t() if self._wide else share

    def _runs(self) -> list[int]:
        """Return how many rows of the tall matrix each rank takes."""
        edges = [self.long * rank // self.ranks for rank in range(self.ranks + 1)]
        return [high - low for low, high in pairwise(edges)]

    def _columns(self, share: Tensor) -> list[int]:
        """Return how many columns of the tall matrix each rank has."""
        counts = torch.zeros(self.ranks, dtype=torch.int64, device=share.device)
        counts[self._rank] = self._turned(share).size(1)
        return [int(count) for count in self.reduce(counts)]

    def _exchange(
        self, sent: Tensor, received: Tensor, sizes: list[int], own_sizes: list[int]
    ) -> None:
        torch.distributed.all_to_all_single(received, sent, own_sizes, sizes, group=self.group)

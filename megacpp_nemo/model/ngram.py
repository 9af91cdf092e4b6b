"""The hashed n-gram memory: what the last few tokens were, looked up in tables of prime size.

- `NgramHash`: the rows that the n-grams ending at each token fall on.
- `NgramMemory`: the tables (`ngram_table`), and the projection that joins the token embedding.
- `check_vocabulary`: how many tokens can be hashed.

Hashed n-gram embeddings stand beside byte embeddings in BLT (arXiv 2412.09871); here they stand
beside tokens, with several hashes of each order, so that n-grams that meet in one table part in
another.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn import functional

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.shapes import NgramHashShape
from megacpp_nemo.model.arguments import document_index
from megacpp_nemo.model.ngram_table import HOST, NO_ROW, HostNgramTable, NgramTable

# Of the multipliers: part of what a trained table means, so it never changes.
HASH_SEED = 52
# A token below it times a multiplier below 2^31 lies in int64, and so does what XOR makes of them.
MOST_TOKENS = 2**31


class NgramHash:
    """Rows of a stack of tables for the n-grams that end at each token.

    For each table: the XOR over the n-gram of token times an odd multiplier below 2^31, XOR a
    bias, modulo the table's rows. Multipliers and biases come from a fixed seed, so that every
    rank and every run has the same.

    Args:
        orders: Lengths of the n-grams.
        table_sizes: Rows of each table, one order after another, as many for each.
    """

    def __init__(self, orders: Sequence[int], table_sizes: Sequence[int]) -> None:
        draw = random.Random(HASH_SEED)
        heads = len(table_sizes) // len(orders)
        self.orders = tuple(orders)
        self.multipliers = [
            [[draw.getrandbits(31) | 1 for _ in range(order)] for _ in range(heads)]
            for order in self.orders
        ]
        self.biases = [draw.getrandbits(31) for _ in table_sizes]
        self.table_sizes = list(table_sizes)
        self.offsets = [0, *accumulate(table_sizes)][:-1]

    @property
    def reach(self) -> int:
        """Tokens that the longest n-gram looks back at."""
        return max(self.orders) - 1

    def rows(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Return rows of the stack `[batch, seq, tables]`, int64; -1 where there is no n-gram.

        An n-gram lies within one document and within its row.

        Args:
            tokens: `[batch, seq]` int64, from 0 to `MOST_TOKENS - 1`.
            document_ids: `[batch, seq]`, changing where a document begins; None if each row is
                one document.
        """
        documents = None if document_ids is None else document_index(document_ids)
        hashes = []
        for order, multipliers in zip(self.orders, self.multipliers, strict=True):
            factors = torch.tensor(multipliers, device=tokens.device)
            mixed = tokens.unsqueeze(-1) * factors[:, 0]
            for back in range(1, order):
                mixed = mixed ^ (_delayed(tokens, back).unsqueeze(-1) * factors[:, back])
            hashes.append(mixed)
        biases, sizes, offsets = (
            torch.tensor(numbers, device=tokens.device)
            for numbers in (self.biases, self.table_sizes, self.offsets)
        )
        rows = (torch.cat(hashes, -1) ^ biases) % sizes + offsets
        heads = len(self.table_sizes) // len(self.orders)
        whole = [_whole(tokens, documents, order) for order in self.orders]
        return rows.where(torch.stack(whole, -1).repeat_interleave(heads, -1), NO_ROW)


class NgramMemory(MegatronModule):
    """Tables of n-grams and their projection to the hidden size, which is zero at first.

    The tables are one stack, split over tensor ranks by its width: every rank holds a part of
    every row, whatever the primes are, and what is read from it is the projection's input,
    split as Megatron's row-parallel layers have it. Split by its rows, the primes would not
    divide, each rank would mask what it does not hold, and the tables' outputs, `tables x dim`
    to a token, would have to be summed over the ranks besides the projection's.

    Args:
        config: Hybrid model configuration.
        shape: Orders, tables and their width, which the tensor-parallel size divides.
        tp_group: Tensor-parallel group.
    """

    def __init__(self, config: Any, shape: NgramHashShape, tp_group: Any) -> None:
        super().__init__(config=config)
        self.hash = NgramHash(shape.orders, shape.table_sizes)
        table = HostNgramTable if config.ngram_placement == HOST else NgramTable
        self.table = table(config, sum(shape.table_sizes), shape.dim, tp_group)
        self.out_proj = RowParallelLinear(
            len(shape.table_sizes) * shape.dim,
            config.hidden_size,
            config=config,
            init_method=nn.init.zeros_,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=tp_group,
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Return what joins the token embedding: `[seq, batch, hidden]`.

        Under sequence parallelism it is this rank's part of the sequence.

        Args:
            rows: `[batch, seq, tables]`, as `NgramHash.rows` has them.
        """
        read = self.table(rows.transpose(0, 1))
        # Width before table: each rank then holds a run of the projection's columns.
        joined: Tensor = self.out_proj(read.mT.flatten(-2))[0]
        return joined


def check_vocabulary(size: int) -> None:
    """Refuse a vocabulary whose hashes would not fit into 64 bits.

    Raises:
        RuntimeRefusal: If it has more than `MOST_TOKENS` tokens.
    """
    if size > MOST_TOKENS:
        raise RuntimeRefusal(
            "The vocabulary is too large for the n-gram hash",
            given=f"{size:,} tokens",
            allowed=f"at most {MOST_TOKENS:,}, whose hashes fit into 64 bits",
            hint="ngram_hash=False, or a smaller tokenizer",
        )


def _delayed(tokens: Tensor, by: int) -> Tensor:
    """Return tokens `[batch, seq]` moved `by` places on; zeros come first."""
    return functional.pad(tokens, (by, 0))[:, : tokens.size(1)]


def _whole(tokens: Tensor, documents: Tensor | None, order: int) -> Tensor:
    """Return `[batch, seq]`, true where the n-gram of an order lies within row and document.

    Documents are counted from 0 within each row.
    """
    places = torch.arange(tokens.size(1), device=tokens.device)
    inside = (places >= order - 1).expand_as(tokens)
    if documents is None:
        return inside
    return inside & (documents == _delayed(documents, order - 1))

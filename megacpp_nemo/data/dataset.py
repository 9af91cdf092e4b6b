"""Megatron's GPT rows with the document of each position.

Documents are packed one after another into rows of fixed length, so one row can hold the end of
one document and the start of the next. `document_ids` says which is which, for mixers and
structure embeddings that must not carry state across a document's end.
"""

from __future__ import annotations

from functools import cached_property

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset


class DocumentDataset(GPTDataset):
    """`GPTDataset` whose rows also have `document_ids`; all else is as upstream makes it."""

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """Return upstream's row and `document_ids` [seq], int64.

        The first position has id 0, and the id grows by one at the position after each
        end-of-document token. Padding at the end of a row belongs to the last document, or is
        one of its own after an end-of-document token.
        """
        row: dict[str, torch.Tensor] = super().__getitem__(idx)
        tokens = row["tokens"]
        if row["loss_mask"][-1] == 0:
            # Upstream writes padding as token 0, which can be the end-of-document id; only the
            # text itself tells them apart. Padding is at the end, and its loss is masked.
            text, _ = self._query_document_sample_shuffle_indices(0 if idx is None else idx)
            tokens = torch.from_numpy(text[: tokens.numel()])
        row["document_ids"] = document_ids(tokens, self._eod_id)
        return row

    @cached_property
    def _eod_id(self) -> int:
        # NeMo's tokenizer converts the token's text at every access.
        return int(self.config.tokenizer.eod)


def document_ids(tokens: torch.Tensor, eod_id: int) -> torch.Tensor:
    """Return the 0-based document of each position of a packed row.

    Args:
        tokens: Token ids, [seq].
        eod_id: The token that ends a document, itself part of the document it ends.

    Returns:
        Document ids, [seq], int64.
    """
    starts = torch.zeros_like(tokens, dtype=torch.int64)
    starts[1:] = tokens[:-1] == eod_id
    return starts.cumsum(0)

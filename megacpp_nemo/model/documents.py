"""Document boundaries of packed rows, carried to every layer by Megatron's own argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.model.arguments import document_index


@dataclass
class DocumentBoundaries(PackedSeqParams):
    """Which document each token of a batch of packed rows belongs to.

    Megatron hands one `packed_seq_params` object to every layer of a stack; this is that
    object for rows of shape `[batch, seq]`, so that boundaries need no argument of their own.
    Its format is `sbhd`: activations keep their shape, unlike Megatron's `thd` packing.

    Args:
        document_ids: `[batch, seq]` integers that change where a document begins.
    """

    document_ids: Tensor | None = None

    @classmethod
    def from_ids(cls, document_ids: Tensor) -> DocumentBoundaries:
        """Return the boundaries of `document_ids` `[batch, seq]`."""
        length = document_ids.size(1)
        return cls(
            qkv_format="sbhd",
            max_seqlen_q=length,
            max_seqlen_kv=length,
            document_ids=document_ids,
        )

    def sequence_index(self) -> Tensor:
        """Return `[batch, seq]` int32 counting documents from 0 within each row.

        The form that the Mamba kernels take as `seq_idx`.
        """
        ids = self.document_ids
        assert ids is not None
        return document_index(ids).int()

    def attention_mask(self) -> Tensor:
        """Return `[batch, 1, seq, seq]`, true where a query must not see a key.

        A key is hidden if it comes later or lies in another document.
        """
        index = self.sequence_index()
        hidden = torch.ones(
            index.size(1), index.size(1), dtype=torch.bool, device=index.device
        ).triu(1)
        other = index.unsqueeze(2) != index.unsqueeze(1)
        return (hidden | other).unsqueeze(1)


def document_ids_of(config: Any, packed_seq_params: PackedSeqParams | None) -> Tensor | None:
    """Return the document ids `[batch, seq]` at which a recurrent layer starts anew.

    None if rows are whole or the configuration keeps the state across documents.

    Raises:
        RuntimeRefusal: For Megatron's `thd` packing, which these mixers do not read.
    """
    if isinstance(packed_seq_params, DocumentBoundaries):
        return packed_seq_params.document_ids if config.reset_state else None
    if packed_seq_params is None:
        return None
    raise RuntimeRefusal(
        "This mixer does not read Megatron's packed (thd) sequences",
        given=f"packed_seq_params with qkv_format={packed_seq_params.qkv_format!r}",
        allowed="rows of shape [batch, seq] with document_ids",
        hint="a data module of this package, or one document per row",
    )


def attention_within_documents(
    config: Any, attention_mask: Tensor | None, arguments: dict[str, Any]
) -> Tensor | None:
    """Return the mask of an attention layer, taking document boundaries out of its arguments.

    Attention cores take boundaries as a mask only; Megatron's own packing passes unchanged.
    """
    boundaries = arguments.get("packed_seq_params")
    if not isinstance(boundaries, DocumentBoundaries):
        return attention_mask
    arguments["packed_seq_params"] = None
    return boundaries.attention_mask() if config.reset_attention_mask else attention_mask

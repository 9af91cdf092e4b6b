"""How a batch of packed rows reaches the model: document boundaries on their way to the layers."""

from __future__ import annotations

from typing import Any

from nemo.collections.llm.gpt.model.base import gpt_data_step
from torch import Tensor

from megacpp_nemo.model.documents import DocumentBoundaries


def hybrid_data_step(dataloader_iter: Any) -> dict[str, Any]:
    """Return the next batch for this pipeline stage, with tokens and document ids on every one.

    NeMo's own step keeps tokens on the first stage and labels on the last; recurrent layers
    need document ids `[batch, seq]` wherever they stand, and multi-token prediction needs
    tokens on the last stage.
    """
    batch = next(dataloader_iter)
    tensors = batch[0] if isinstance(batch, tuple) else batch
    kept = gpt_data_step(iter([batch]), use_mtp=True)
    if "document_ids" in tensors:
        kept["document_ids"] = tensors["document_ids"].cuda(non_blocking=True)
    return kept


def hybrid_forward_step(model: Any, batch: dict[str, Any]) -> Tensor:
    """Run the model on a batch of packed rows.

    Rows without `document_ids` are each one document.
    """
    ids = batch.get("document_ids")
    return model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        labels=batch["labels"],
        loss_mask=batch.get("loss_mask"),
        packed_seq_params=None if ids is None else DocumentBoundaries.from_ids(ids),
    )

"""How a batch of packed rows reaches the model: boundaries and code structure on their way."""

from __future__ import annotations

from typing import Any

from nemo.collections.llm.gpt.model.base import gpt_data_step
from torch import Tensor

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.model.documents import DocumentBoundaries


def hybrid_data_step(dataloader_iter: Any) -> dict[str, Any]:
    """Return the next batch for this pipeline stage, with what every stage may need.

    NeMo's own step keeps tokens on the first stage and labels on the last. Recurrent layers
    need document ids `[batch, seq]` wherever they stand; the last stage, with multi-token
    prediction, embeds tokens and their structure channels `[batch, seq]` too.
    """
    batch = next(dataloader_iter)
    tensors = batch[0] if isinstance(batch, tuple) else batch
    kept = gpt_data_step(iter([batch]), use_mtp=True)
    if "document_ids" in tensors:
        kept["document_ids"] = tensors["document_ids"].cuda(non_blocking=True)
    if "structure" in tensors:
        channels = tensors["structure"].items()
        kept["structure"] = {name: ids.cuda(non_blocking=True) for name, ids in channels}
    return kept


def hybrid_forward_step(model: Any, batch: dict[str, Any]) -> Tensor:
    """Run the model on a batch of packed rows.

    Rows without `document_ids` are each one document. Outside of training, rows without
    structure are read as if every channel were absent.

    Raises:
        RuntimeRefusal: If a model with structure channels would be trained without them.
    """
    ids = batch.get("document_ids")
    further: dict[str, Any] = {}
    if model.config.structure:
        further["structure"] = _structure(model, batch)
    return model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        labels=batch["labels"],
        loss_mask=batch.get("loss_mask"),
        packed_seq_params=None if ids is None else DocumentBoundaries.from_ids(ids),
        **further,
    )


def _structure(model: Any, batch: dict[str, Any]) -> dict[str, Tensor] | None:
    structure: dict[str, Tensor] | None = batch.get("structure")
    if structure is None and model.training:
        wanted = model.config.structure
        raise RuntimeRefusal(
            "The model has structure channels, and the data serves none",
            given=f"model.config.structure={wanted!r} and a batch without structure",
            allowed="a data module of this package with the same channels",
            hint=f"data.structure={wanted}",
        )
    return structure

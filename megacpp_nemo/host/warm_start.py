"""Starting sparse attention (DSA) from a checkpoint of dense attention.

Its layers have every weight of a dense one under the same names, and an indexer besides. DSA is
trained from dense weights (DeepSeek-V3.2): the indexers alone start as they are drawn.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core import dist_checkpointing
from nemo import lightning as nl
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from torch import Tensor

logger = logging.getLogger(__name__)

INDEXER = ".core_attention.indexer."


@dataclass(kw_only=True)
class FreshIndexers(nl.RestoreConfig):
    """NeMo's choice of what to restore, less the indexers that the checkpoint does not have."""


@contextlib.contextmanager
def without_fresh_indexers(model: Any, checkpoint: Any) -> Iterator[dict[str, Tensor]]:
    """Keep `model` from asking a checkpoint for indexers that it does not have.

    Anything else that is missing is still asked for, and refused by who loads.

    Args:
        model: NeMo's `MegatronParallel`.
        checkpoint: Folder of the checkpoint.

    Yields:
        The weights that were not asked for, by their names in the model's state; filled as the
        model is asked for its sharded state, and named in the log.
    """
    folder = str(ckpt_to_weights_subdir(checkpoint, is_saving=False))
    saved, ask = dist_checkpointing.load_tensors_metadata(folder), model.sharded_state_dict
    fresh: dict[str, Tensor] = {}

    def asked(*args: Any, **kwargs: Any) -> dict[str, Any]:
        state: dict[str, Any] = ask(*args, **kwargs)
        lacking = [name for name, part in state.items() if INDEXER in name and _lacks(saved, part)]
        fresh.update((name, state.pop(name).data) for name in lacking)
        return state

    model.sharded_state_dict = asked
    try:
        yield fresh
    finally:
        del model.sharded_state_dict
    logger.info("drawn anew, not in the checkpoint: %s", ", ".join(sorted(fresh)) or "nothing")


def _lacks(saved: dict[str, Any], part: Any) -> bool:
    return getattr(part, "key", None) not in saved

"""What the layers of a model report of themselves while it trains.

Expert layers report how evenly they are loaded (`expert_load`), sparse attention how far its
indexers are from what the heads look at (`indexer_loss`). `HybridModel` writes the values to the
run's loggers, as often as the trainer logs.
"""

from __future__ import annotations

from typing import Any

from megacpp_nemo.callbacks.expert_load import ExpertLoad
from megacpp_nemo.callbacks.indexer_loss import reduced_losses
from megacpp_nemo.callbacks.matrices import hybrid_models
from megacpp_nemo.contract.pattern import BlockFamily


class LayerCurves:
    """Everything that the layers of a model report.

    Args:
        models: The model in training: NeMo's `MegatronParallel`, wrapped or bare models.
    """

    def __init__(self, models: Any) -> None:
        self._models = hybrid_models(models)
        config: Any = self._models[0].config
        # Every rank counts or none, also one whose stage has no such layer.
        self._load = ExpertLoad(self._models) if config.num_moe_experts else None
        sparse = BlockFamily.SPARSE_ATTENTION in config.families
        self._sparse = sparse or bool(config.dsa_a_ranks)
        # What was counted before training, as in validation, is forgotten.
        self.values()

    def values(self) -> dict[str, float]:
        """Return what was reported on all ranks since the last call, and begin anew.

        Collective over all ranks.
        """
        loads = self._load.values() if self._load else {}
        return {**loads, **(reduced_losses(self._models) if self._sparse else {})}

    def close(self) -> None:
        """Count no more."""
        if self._load:
            self._load.close()

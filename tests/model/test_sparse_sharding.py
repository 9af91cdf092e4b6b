"""Sparse attention over tensor ranks and pipeline stages: one state, the same losses."""

from __future__ import annotations

from typing import Any

import pytest

from tests.model.test_sharding import ONE, PIPELINE, TENSOR, compare

pytestmark = pytest.mark.two_process

# Gradients of the indexer are compared too, so its loss has weight.
SPARSE: dict[str, Any] = {
    "dsa_a_ranks": (0, 1),
    "dsa_indexer_n_heads": 3,
    "dsa_indexer_head_dim": 16,
    "dsa_indexer_topk": 6,
    "dsa_indexer_loss_coeff": 1.0,
    "qk_layernorm": True,
}


@pytest.mark.parametrize("topk", [6, 1], ids=["masked", "gathered"])
def test_two_tensor_ranks_compute_what_one_process_does(tmp_path, topk):
    changes = {**SPARSE, "dsa_indexer_topk": topk, "reset_attention_mask": True}
    compare(tmp_path, ("AMA", ONE), ("AMA", TENSOR), **changes)


def test_two_pipeline_stages_compute_what_one_process_does(tmp_path):
    ranks = {**SPARSE, "dsa_a_ranks": (1,)}
    compare(tmp_path, ("AEAMD", ONE), ("AE|AMD", PIPELINE), **ranks)


@pytest.mark.parametrize("granularity", [None, "full"], ids=["kept", "recomputed"])
def test_a_checkpoint_with_depths_moves_from_tensor_ranks_to_stages(tmp_path, granularity):
    depths = {"mtp_num_layers": 1, "mtp_pattern": "AE", "recompute_granularity": granularity}
    changes = {**SPARSE, "dsa_a_ranks": (1,), **depths}
    compare(tmp_path, ("AEARM", TENSOR), ("AE|ARM", PIPELINE), **changes)

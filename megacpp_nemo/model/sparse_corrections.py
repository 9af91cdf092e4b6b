"""What is wrong in Megatron's sparse attention (DSA), release by release, and what puts it right.

Each correction has a probe of the installed release: where none is needed any more, the code it
names can go. The code itself does not ask, for it is right on every release.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.experimental_attention_variant import dsa
from megatron.core.transformer.identity_op import IdentityOp


@dataclass(frozen=True, kw_only=True)
class Correction:
    """One defect of Megatron's.

    Args:
        name: Short name.
        defect: What Megatron does.
        effect: What comes of it.
        here: Code of this package that puts it right.
        needed: Whether the installed release has the defect.
    """

    name: str
    defect: str
    effect: str
    here: str
    needed: Callable[[], bool]


def _rotated(*, order: bool) -> bool:
    """Whether upstream's indexer rotates other channels, or in other pairs, than it should."""
    angles = torch.full((1, 1, 1, 4), torch.pi / 2)
    stub: Any = SimpleNamespace(
        index_head_dim=6,
        qk_pos_emb_head_dim=4,
        pg_collection=SimpleNamespace(cp=SimpleNamespace(size=lambda: 1, rank=lambda: 0)),
        config=SimpleNamespace(
            multi_latent_attention=True,
            rotary_interleaved=False,
            apply_rope_fusion=False,
            dsa_indexer_rope_interleaved=False,
        ),
    )
    given = torch.arange(1.0, 7.0).view(1, 1, 1, 6)
    found = dsa.DSAIndexer._apply_rope(stub, given, angles, 1.0).flatten()
    first = torch.equal(found[4:], given.flatten()[4:])
    if order:
        return not first
    # A quarter turn of pairs half the width apart: (1, 3), (2, 4) -> (-3, 1), (-4, 2).
    part, begin = (found[:4], 1.0) if first else (found[2:], 3.0)
    right = torch.tensor([-2.0, -3.0, 0.0, 1.0]) + torch.tensor([-begin, -begin, begin, begin])
    return not torch.allclose(part, right, atol=1e-6)


def _rotates_only_with_the_package() -> bool:
    try:
        dsa.rotate_activation(torch.ones(1, 2))
    except (AssertionError, TypeError):
        return True
    return False


def _query_norm_is_fused() -> bool:
    def module(*_: Any, **__: Any) -> type:
        return torch.nn.Module

    names = ("linear", "column_parallel_linear", "column_parallel_layer_norm_linear")
    backend = SimpleNamespace(
        **dict.fromkeys((*names, "row_parallel_linear", "layer_norm"), module)
    )
    config = SimpleNamespace(
        multi_latent_attention=True, qk_l2_norm=False, qk_layernorm=True, normalization="RMSNorm"
    )
    spec = specs.get_dsa_module_spec_for_backend(config, backend)  # type: ignore[arg-type]
    return spec.submodules.q_layernorm is IdentityOp


def _ignores_the_mask() -> bool:
    """Whether upstream's core shows its indexer a key that the attention mask hides."""
    seen: list[torch.Tensor] = []

    def scores(x: Any, qr: Any, mask: torch.Tensor, **_: Any) -> Any:
        seen.append(mask)
        return mask.expand(1, 2, 2), torch.zeros(1, 2, 1, dtype=torch.long)

    stub: Any = SimpleNamespace(
        indexer=SimpleNamespace(forward_with_scores=scores), softmax_scale=1.0, training=False
    )
    heads, x = torch.ones(2, 1, 1, 2), torch.ones(2, 1, 2)
    hidden = (
        torch.ones(1, 1, 2, 2, dtype=torch.bool).triu(1) | torch.tensor([[0, 0], [1, 0]]).bool()
    )
    try:
        dsa.DSAttention.forward(
            stub, heads, heads, heads, hidden, x, x, attn_mask_type=AttnMaskType.causal
        )
    except Exception:  # another release's core, which this probe cannot drive
        return True
    return bool(seen[0].expand(1, 2, 2)[0, 1, 0] == 0)


def _lacks(function: Any, word: str) -> bool:
    return word not in inspect.getsource(function)


CORRECTIONS: tuple[Correction, ...] = (
    Correction(
        name="query-norm",
        defect="the query latent's norm is folded into the projection behind it, and the indexer "
        "is given the latent in front of it",
        effect="scores grow with the latent, and a checkpoint of another release reads wrongly",
        here="attention_blocks.sparse_attention_layer: norms that stand alone",
        needed=_query_norm_is_fused,
    ),
    Correction(
        name="rope-order",
        defect="the indexer rotates the last channels of a head; the paper's code the first",
        effect="weights of DeepSeek's indexer, and of later releases, give other scores",
        here="indexer.LightningIndexer._apply_rope",
        needed=lambda: _rotated(order=True),
    ),
    Correction(
        name="rope-pairs",
        defect="the indexer rotates neighbouring channels, as latent attention does; the paper's "
        "code those half a width apart",
        effect="as with the order",
        here="indexer.LightningIndexer._apply_rope",
        needed=lambda: _rotated(order=False),
    ),
    Correction(
        name="hadamard",
        defect="the Hadamard transform takes bf16 only, and only with fast_hadamard_transform",
        effect="nothing runs in fp32, or on a CPU",
        here="indexer.walsh_hadamard",
        needed=_rotates_only_with_the_package,
    ),
    Correction(
        name="tensor-gradients",
        defect="gradients of the indexer's weights, whole on every tensor rank, are summed",
        effect="they are too large by the number of ranks",
        here="indexer.LightningIndexer: averaged; projections.WholeLinear",
        needed=lambda: _lacks(dsa.DSAIndexer, "average_gradients_across_tp_domain"),
    ),
    Correction(
        name="loss-scale",
        defect="the schedule does not scale the indexer's loss over micro-batches",
        effect="it is too large by their number",
        here="sparse_attention.SparseDotProduct._loss_scale",
        needed=lambda: _lacks(schedules, "DSAIndexerLossAutoScaler"),
    ),
    Correction(
        name="documents",
        defect="a layer with a causal mask ignores the attention mask it is given",
        effect="attention and the indexer's loss cross document boundaries",
        here="indexer.hidden_keys",
        needed=_ignores_the_mask,
    ),
    Correction(
        name="memory",
        defect="scores, attention and loss keep a square matrix for every head",
        effect="at 32 indexer heads and 4096 tokens, 2 GiB of each for every sample and layer",
        here="indexer.index_scores_by_head, indexer.indexer_loss",
        needed=lambda: not hasattr(dsa, "FusedDSAIndexerLoss"),
    ),
)

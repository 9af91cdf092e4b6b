"""Attention over the tokens so far, from what a layer carries of them.

- `attend_latents`: latent attention (MLA, arXiv 2405.04434) from the compressed latents and the
  rotary keys, `kv_lora_rank + qk_pos_emb_head_dim` values a token for all heads together.
- `attend_heads`: grouped-query attention from keys and values.

Keys and values are never expanded from the latents: with q = W_q x and k = W_k c, the score
q . k is (W_k^T q) . c, and the mixed value is W_v applied to the mixed latents.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from torch import Tensor, nn
from torch.nn import functional

from megacpp_nemo.model.generation_state import GenerationState, append, visible


def attend_latents(
    attention: Any, hidden_states: Tensor, state: GenerationState
) -> tuple[Tensor, Tensor | None]:
    """Return what a latent attention layer gives for the next tokens, and its bias.

    Args:
        attention: `LatentAttention`, whole on this rank, with latent queries.
        hidden_states: `[seq, batch, hidden]`, the tokens behind `state.position`.
        state: Carries the latents `[tokens, batch, kv_lora_rank]` and the rotary keys
            `[tokens, batch, qk_pos_emb_head_dim]`.
    """
    config, number = attention.config, attention.layer_number
    query_latents = attention.q_layernorm(attention.linear_q_down_proj(hidden_states)[0])
    queries = attention.linear_q_up_proj(query_latents)[0].unflatten(-1, (-1, attention.q_head_dim))
    content, rotary = queries.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
    latents, rotary_keys = attention.linear_kv_down_proj(hidden_states)[0].split(
        [config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1
    )
    latents = _as_up_projection_reads(attention, latents)
    rotary, rotary_keys = _rotated(attention, state, rotary, rotary_keys.unsqueeze(-2))
    latents = append(state, number, "latents", latents)
    rotary_keys = append(state, number, "rotary_keys", rotary_keys.squeeze(-2))
    per_head = attention.linear_kv_up_proj.weight.unflatten(0, (content.size(2), -1))
    to_keys, to_values = per_head.split([config.qk_head_dim, config.v_head_dim], dim=1)
    mixed = _attend(
        torch.cat((torch.einsum("sbhd,hdr->sbhr", content, to_keys), rotary), dim=-1),
        torch.cat((latents, rotary_keys), dim=-1).unsqueeze(2),
        latents.unsqueeze(2),
        attention.keys_in_sight(hidden_states, query_latents, state),
        attention.softmax_scale,
    )
    values = torch.einsum("sbhr,hdr->sbhd", mixed, to_values)
    return attention.linear_proj(values.flatten(2))


def attend_heads(
    attention: Any, hidden_states: Tensor, state: GenerationState, rotary: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return what a grouped-query attention layer gives for the next tokens, and its bias.

    Args:
        attention: Megatron's self-attention, whole on this rank.
        hidden_states: `[seq, batch, hidden]`, the tokens behind `state.position`.
        state: Carries rotated keys and values, `[tokens, batch, groups, head_dim]` each.
        rotary: Angles `[max tokens, 1, 1, rotary_dim]`; None without position embeddings.
    """
    number = attention.layer_number
    query, key, value = attention.get_query_key_value_tensors(hidden_states, None)
    if rotary is not None:
        angles = rotary[state.position : state.position + len(query)]
        query, key = (_rotate(attention, part, angles) for part in (query, key))
    keys = append(state, number, "keys", key)
    values = append(state, number, "values", value)
    mask = visible(state, new=len(query), device=query.device)
    mixed = _attend(query, keys, values, mask, attention.config.softmax_scale)
    return attention.linear_proj(mixed.flatten(2))


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Return mixed values `[seq, batch, heads, width]` of queries of that shape.

    Keys and values are `[tokens, batch, groups, width]`, each group shared by as many heads;
    the mask is true where a query may look.
    """
    shared = queries.size(2) // keys.size(2)
    keys, values = (t.permute(1, 2, 0, 3).repeat_interleave(shared, dim=1) for t in (keys, values))
    mixed = functional.scaled_dot_product_attention(
        queries.permute(1, 2, 0, 3), keys, values, attn_mask=mask, scale=scale
    )
    return mixed.permute(2, 0, 1, 3)


def _as_up_projection_reads(attention: Any, latents: Tensor) -> Tensor:
    """Return the latents behind their norm, which Transformer Engine keeps in the projection."""
    latents = attention.kv_layernorm(latents)
    weight: nn.Parameter | None = getattr(attention.linear_kv_up_proj, "layer_norm_weight", None)
    if weight is None:
        return latents
    config = attention.config
    gain = weight + 1 if config.layernorm_zero_centered_gamma else weight
    return functional.rms_norm(latents, gain.shape, gain, config.layernorm_epsilon)


def _rotated(attention: Any, state: GenerationState, *parts: Tensor) -> list[Tensor]:
    """Rotate `[seq, batch, heads, width]` by the positions behind `state.position`."""
    angles, scale = attention.rotary_pos_emb(state.max_sequence_length), 1.0
    if isinstance(angles, tuple):
        angles, scale = angles
    angles = angles[state.position : state.position + len(parts[0])]
    return [_rotate(attention, part, angles, scale) for part in parts]


def _rotate(attention: Any, part: Tensor, angles: Tensor, scale: float = 1.0) -> Tensor:
    rotated: Tensor = apply_rotary_pos_emb(
        part,
        angles,
        config=attention.config,
        mscale=scale,
        cp_group=attention.pg_collection.cp,
    )
    return rotated

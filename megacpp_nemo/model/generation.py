"""Text from a hybrid model, greedy or sampled: the prompt once, and then one token a step.

- `generate`: tokens behind a prompt, with their log-probabilities.
- `forward`: logits of the next tokens of a row, whatever came before them.
- `check_length`, `refuse_generation`: what cannot be generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.ssm.mamba_mixer import MambaMixer
from torch import Tensor, nn

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.model.generation_state import GenerationState
from megacpp_nemo.model.mamba import PortableMambaMixer
from megacpp_nemo.model.sampling import Sampling, choose

# Tokens of a prompt that go through the model at once. Attention over a long prompt as a whole
# would take its length squared in memory, and spend half of its time on what is hidden.
PREFILL_TOKENS = 512
# Settings of Megatron's attention that ours over carried tokens does not know, when on.
UNKNOWN_ATTENTION = {
    "window_size": None,
    "softmax_type": "vanilla",
    "attention_output_gate": False,
    "no_rope_freq": None,
}
PARALLEL_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "context_parallel_size",
)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What a model said behind a prompt.

    Args:
        tokens: For each row of the batch, the new tokens; the end-of-document token, if one
            was drawn, is the last.
        log_probabilities: Of each new token, natural logarithm, in the model's own
            distribution: before temperature, top-k and top-p.
    """

    tokens: list[list[int]]
    log_probabilities: list[list[float]]


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_ids: Tensor | Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    end_id: int | None = None,
    vocab_size: int | None = None,
) -> Generated:
    """Return what the model says behind a prompt.

    Args:
        model: A hybrid model, whole on this process. It is put into evaluation mode.
        prompt_ids: Tokens `[seq]`, or `[batch, seq]` of one length.
        max_new_tokens: Tokens to say at most, for each row.
        sampling: How tokens are chosen; greedy by default.
        end_id: Token that ends a row; rows without one go on to `max_new_tokens`. In the
            prompt it ends a document, which n-grams do not cross.
        vocab_size: Tokens that mean something; those that only pad the model's vocabulary are
            never chosen. By default all.

    Raises:
        RuntimeRefusal: If the prompt is empty or has unknown tokens, the row would become
            longer than the model's context, or the model cannot generate.
    """
    refuse_generation(model)
    sampling = sampling or Sampling()
    prompt = _checked(model, prompt_ids, max_new_tokens, vocab_size)
    model.eval()
    batch, room = prompt.size(0), prompt.size(1) + max_new_tokens
    state = GenerationState(batch_size=batch, max_tokens=room, end_id=end_id)
    for piece in prompt.split(PREFILL_TOKENS, dim=1):
        logits = forward(model, piece, state)
    draw = torch.Generator(device=prompt.device).manual_seed(sampling.seed)
    said: list[Tensor] = []
    logs: list[Tensor] = []
    ended = torch.zeros(prompt.size(0), dtype=torch.bool, device=prompt.device)
    for _ in range(max_new_tokens):
        if said:
            logits = forward(model, said[-1].unsqueeze(1), state)
        last = logits[:, -1, :vocab_size].float()
        said.append(choose(last, sampling, draw))
        logs.append(last.log_softmax(-1).gather(1, said[-1].unsqueeze(1)).squeeze(1))
        if end_id is not None:
            ended |= said[-1] == end_id
            if ended.all():
                break
    return _cut(torch.stack(said, 1).tolist(), torch.stack(logs, 1).tolist(), end_id)


def forward(model: nn.Module, tokens: Tensor, state: GenerationState) -> Tensor:
    """Return logits of the tokens behind `state.position`, and carry the state over them.

    Args:
        model: A hybrid model in evaluation mode, whole on this process.
        tokens: `[batch, seq]`, one token or several.
        state: What the layers carry. Made with `all_logits`, it gives logits of every token.

    Returns:
        `[batch, 1 or seq, vocabulary]`.
    """
    positions = torch.arange(
        state.position, state.position + tokens.size(1), device=tokens.device
    ).expand_as(tokens)
    logits: Tensor = model(
        tokens, positions, None, inference_context=state, runtime_gather_output=True
    )
    state.advance(tokens.size(1))
    return logits


def refuse_generation(model: nn.Module) -> None:
    """Refuse a model whose layers cannot carry their state from token to token.

    Raises:
        RuntimeRefusal: If the model is split over processes, or a setting stands in the way.
    """
    config: Any = model.config
    sizes = {name: getattr(config, name, 1) for name in PARALLEL_SIZES}
    if any(size != 1 for size in sizes.values()):
        raise RuntimeRefusal(
            "A model that is split over processes does not generate",
            given=", ".join(f"{name}={size}" for name, size in sizes.items() if size != 1),
            allowed="parallel sizes of 1",
            hint="megacpp generate, which builds a checkpoint of any layout on one process",
        )
    for name, off in UNKNOWN_ATTENTION.items():
        if getattr(config, name, off) != off:
            raise RuntimeRefusal(
                "Generation does not know this setting of Megatron's attention",
                given=f"{name}={getattr(config, name)!r}",
                allowed=f"{name}={off!r}",
                hint=f"{name}={off!r}, in training too",
            )
    fused = [m for m in model.modules() if isinstance(m, MambaMixer)]
    if not all(isinstance(mixer, PortableMambaMixer) for mixer in fused):
        raise RuntimeRefusal(
            "Megatron's fused Mamba mixer does not carry its state as the other layers do",
            given="a model built with the fused Mamba kernels",
            allowed="mamba_path='portable', which has the same weights",
            hint="mamba_path='portable'",
        )


def _cut(
    tokens: list[list[int]], log_probabilities: list[list[float]], end_id: int | None
) -> Generated:
    """Return each row up to its end-of-document token."""
    lengths = [row.index(end_id) + 1 if end_id in row else len(row) for row in tokens]
    return Generated(
        tokens=[row[:n] for row, n in zip(tokens, lengths, strict=True)],
        log_probabilities=[row[:n] for row, n in zip(log_probabilities, lengths, strict=True)],
    )


def _checked(
    model: nn.Module,
    prompt_ids: Tensor | Sequence[int],
    max_new_tokens: int,
    vocab_size: int | None,
) -> Tensor:
    """Return the prompt as `[batch, seq]` on the model's device."""
    device = next(model.parameters()).device
    prompt = torch.as_tensor(prompt_ids, dtype=torch.long, device=device)
    prompt = prompt.unsqueeze(0) if prompt.dim() == 1 else prompt
    if prompt.numel() == 0:
        raise RuntimeRefusal(
            "The prompt has no tokens",
            given="an empty prompt",
            allowed="one token or more",
            hint="the end-of-document token, behind which a new document begins",
        )
    known = vocab_size or int(model.vocab_size)  # type: ignore[arg-type]
    if prompt.min() < 0 or prompt.max() >= known:
        unknown = prompt[(prompt < 0) | (prompt >= known)].unique().tolist()
        raise RuntimeRefusal(
            "The prompt has tokens that the model does not know",
            given=", ".join(map(str, unknown)),
            allowed=f"0 to {known - 1}",
            hint="the tokenizer that the model was trained with",
        )
    check_length(prompt.size(1), max_new_tokens, int(model.max_sequence_length))  # type: ignore[arg-type]
    return prompt


def check_length(prompt_tokens: int, max_new_tokens: int, context: int) -> None:
    """Refuse what does not fit into a context of so many tokens.

    Raises:
        RuntimeRefusal: If the prompt leaves no room, or not enough.
    """
    if prompt_tokens >= context:
        raise RuntimeRefusal(
            "The prompt leaves no room in the model's context",
            given=f"a prompt of {prompt_tokens:,} tokens",
            allowed=f"fewer than seq_length={context:,}, which the model was trained with",
            hint=f"the last {context // 2:,} tokens of the prompt",
        )
    if not 1 <= max_new_tokens <= context - prompt_tokens:
        raise RuntimeRefusal(
            "These new tokens do not fit into the model's context",
            given=f"max_new_tokens={max_new_tokens} behind a prompt of {prompt_tokens:,}",
            allowed=f"1 to {context - prompt_tokens}: seq_length={context:,} holds both",
            hint=f"max_new_tokens={context - prompt_tokens}",
        )

"""How the next token is chosen: the likeliest one, or one drawn from the likeliest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megacpp_nemo.contract.errors import RuntimeRefusal


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn.

    Args:
        temperature: What logits are divided by; 0 takes the likeliest token.
        top_k: Draw from this many of the likeliest tokens; None from all.
        top_p: Draw from the likeliest tokens that together have this probability (nucleus
            sampling, arXiv 1904.09751), the one that reaches it included; None from all.
        seed: Seed of the draws.

    Raises:
        RuntimeRefusal: If a value is outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature, "0 or more", 0 <= self.temperature < float("inf")),
            ("top_k", self.top_k, "1 or more", self.top_k is None or self.top_k >= 1),
            ("top_p", self.top_p, "above 0, up to 1", self.top_p is None or 0 < self.top_p <= 1),
        )
        for name, value, allowed, holds in checks:
            if not holds:
                raise RuntimeRefusal(
                    f"No token can be drawn with this {name}",
                    given=f"{name}={value}",
                    allowed=allowed,
                    hint=f"{name}={1 if name == 'top_k' else 0.9}",
                )
        narrowed = [name for name in ("top_k", "top_p") if getattr(self, name) is not None]
        if narrowed and not self.temperature:
            raise RuntimeRefusal(
                "Without a temperature the likeliest token is taken, and none is drawn",
                given=f"temperature=0 with {', '.join(narrowed)}",
                allowed="top_k and top_p with a temperature above 0",
                hint="temperature=0.8",
            )


def choose(logits: Tensor, sampling: Sampling, draw: torch.Generator) -> Tensor:
    """Return one token `[batch]` of logits `[batch, vocabulary]`, by the chance of `draw`."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = next_token_probabilities(logits, sampling)
    return torch.multinomial(probabilities, 1, generator=draw).squeeze(1)


def next_token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities `[batch, vocabulary]` that the next token is drawn with.

    Logits are divided by the temperature, then all but the `top_k` largest dropped, and then
    those behind the first that bring the rest to `top_p`. Temperature must be above 0.
    """
    scaled = logits.double()
    # From the largest down, however small the temperature, nothing overflows.
    scaled = (scaled - scaled.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.size(-1):
        # By rank, so that equal logits do not make it more than k.
        ranks = scaled.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        scaled = scaled.masked_fill(ranks >= sampling.top_k, -torch.inf)
    probabilities = scaled.softmax(-1)
    if sampling.top_p is not None:
        largest, order = probabilities.sort(dim=-1, descending=True, stable=True)
        reached = largest.cumsum(-1) - largest >= sampling.top_p
        dropped = torch.empty_like(reached).scatter_(-1, order, reached)
        probabilities = probabilities.masked_fill(dropped, 0.0)
    return probabilities / probabilities.sum(-1, keepdim=True)

"""What a hybrid model carries from token to token while it generates.

One `GenerationState` travels through the model as Megatron's `inference_context`. A layer finds
its own part by its layer number, and writes the same lines for a prompt, for a later piece of a
row and for one token; without a context (in training) they do nothing:

    carried = enter(context, number)                  # None where a row begins
    channels = with_tail(context, number, channels, taps - 1)
    mixed = convolve(conv, channels)[:, -seq:]        # the tail's own outputs dropped
    y, state = scan(mixed, initial_state=None if carried is None else carried["state"])
    keep(context, number, state=state)

A layer that looks back at every token appends to a cache, which is `[seq, batch, ...]`, and
hides what is not visible yet:

    keys = append(context, number, "keys", keys)      # all tokens so far
    mask = visible(context, new=len(queries), device=keys.device)

Every row of a batch has the same length. Layers carry their state over a row's documents; only
the n-gram memory of the input side begins anew behind `end_id`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor
from torch.nn import functional

from megacpp_nemo.contract.errors import RuntimeRefusal

TAIL = "tail"


class GenerationState(StaticInferenceContext):
    """The state of every layer, and how many tokens they have seen.

    Megatron's own layers read its static inference context; ours read what stands here.

    Args:
        batch_size: Rows that are generated together, of one length.
        max_tokens: Tokens that a row may come to, which the caches are made for.
        all_logits: Whether the model returns logits of every token given to it; only those of
            the last one by default.
        end_id: Token that ends a document, which no n-gram crosses; None if there is none.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        max_tokens: int,
        all_logits: bool = False,
        end_id: int | None = None,
    ) -> None:
        super().__init__(batch_size, max_tokens)
        self.end_id = end_id
        self.materialize_only_last_token_logits = not all_logits
        self._kept: dict[int | None, dict[str, Tensor]] = {}
        self._caches: dict[int | None, dict[str, Tensor]] = {}

    @property
    def position(self) -> int:
        """Tokens that every layer has seen."""
        return int(self.sequence_len_offset)

    @property
    def room(self) -> int:
        """Tokens that a row may still take."""
        return int(self.max_sequence_length) - self.position

    def advance(self, tokens: int) -> None:
        """Count `tokens` as seen, after a forward pass over them."""
        self.increment_sequence_len_offset(tokens)

    def carried_elements(self) -> dict[int | None, int]:
        """Return how many values each layer carries now, by layer number."""
        sizes: dict[int | None, int] = {}
        for number, tensors in self._kept.items():
            sizes[number] = sum(tensor.numel() for tensor in tensors.values())
        for number, caches in self._caches.items():
            filled = sum(cache[: self.position].numel() for cache in caches.values())
            sizes[number] = sizes.get(number, 0) + filled
        return sizes

    def kept(self, layer_number: int | None) -> dict[str, Tensor] | None:
        """Return what a layer has kept, by name, or None where a row begins."""
        return self._kept.get(layer_number) if self.position else None

    def keep(self, layer_number: int | None, state: dict[str, Tensor]) -> None:
        """Replace what a layer keeps under these names."""
        self._kept.setdefault(layer_number, {}).update(state)

    def append(self, layer_number: int | None, name: str, fresh: Tensor) -> Tensor:
        """Write `fresh` `[seq, batch, ...]` at the end of a cache, and return all of it.

        Raises:
            RuntimeRefusal: If the cache has no room for it.
        """
        if len(fresh) > self.room:
            raise RuntimeRefusal(
                "A row would become longer than its caches are made for",
                given=f"{len(fresh)} tokens after {self.position}",
                allowed=f"{self.max_sequence_length} tokens in all",
                hint=f"GenerationState(max_tokens={self.position + len(fresh)})",
            )
        caches = self._caches.setdefault(layer_number, {})
        if name not in caches:
            caches[name] = fresh.new_empty(self.max_sequence_length, *fresh.shape[1:])
        end = self.position + len(fresh)
        caches[name][self.position : end] = fresh
        return caches[name][:end]


def state_of(context: Any) -> GenerationState | None:
    """Return the state behind an inference context; None if there is none.

    Raises:
        RuntimeRefusal: For another context, such as those of Megatron's engines.
    """
    if context is None or isinstance(context, GenerationState):
        return context
    raise RuntimeRefusal(
        "The layers of a hybrid model carry their state in a context of their own",
        given=f"an inference context of the kind {type(context).__name__}",
        allowed="GenerationState, or no context for a forward pass over whole rows",
        hint="megacpp_nemo.model.generation.generate(model, prompt_ids)",
    )


def enter(context: Any, layer_number: int | None) -> dict[str, Tensor] | None:
    """Return what a layer kept when it last ran, by name.

    None where a row begins and where there is no context.

    Raises:
        RuntimeRefusal: For a context of another kind.
    """
    state = state_of(context)
    return None if state is None else state.kept(layer_number)


def keep(context: Any, layer_number: int | None, **tensors: Tensor) -> None:
    """Keep tensors for the next tokens of a layer; nothing happens without a context."""
    state = state_of(context)
    if state is not None:
        state.keep(layer_number, {name: tensor.detach() for name, tensor in tensors.items()})


def append(context: Any, layer_number: int | None, name: str, fresh: Tensor) -> Tensor:
    """Return a layer's cache `[seq, batch, ...]` with `fresh` at its end.

    Without a context that is `fresh` itself.

    Raises:
        RuntimeRefusal: If the cache has no room, or for a context of another kind.
    """
    state = state_of(context)
    return fresh if state is None else state.append(layer_number, name, fresh)


def with_tail(context: Any, layer_number: int | None, inputs: Tensor, length: int) -> Tensor:
    """Return `inputs` `[batch, seq, channels]` behind the `length` inputs before them.

    A row begins behind zeros, as a causal convolution pads it. The last `length` inputs are
    kept for the next tokens. Without a context, `inputs` are returned as they are.
    """
    if state_of(context) is None:
        return inputs
    carried = enter(context, layer_number)
    if carried is None:
        longer = functional.pad(inputs, (0, 0, length, 0))
    else:
        longer = torch.cat((carried[TAIL], inputs), dim=1)
    # A copy: a view would keep the whole prompt alive.
    keep(context, layer_number, **{TAIL: longer[:, longer.size(1) - length :].clone()})
    return longer


def visible(context: Any, *, new: int, device: torch.device) -> Tensor | None:
    """Return `[new, all tokens]`, true where one of the `new` last tokens may look.

    None where a single token may look at all.
    """
    state = state_of(context)
    total = new + (state.position if state is not None else 0)
    if new == 1:
        return None
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)

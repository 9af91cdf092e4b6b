"""A text that a trained model goes on with, from its checkpoint.

complete(find_checkpoint("runs/nam56r_tiny"), "int main(").text
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacpp_nemo.contract.errors import DataError, RuntimeRefusal
from megacpp_nemo.model.generation import check_length, generate
from megacpp_nemo.model.restored import Restored, restored
from megacpp_nemo.model.sampling import Sampling

# New tokens where no number is asked for; fewer if the context has no room for them.
DEFAULT_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model said behind a prompt.

    Args:
        prompt_tokens: Tokens of the prompt.
        tokens: New tokens, the end-of-document token among them if the model said it.
        log_probabilities: Of each new token, natural logarithm, before temperature, top-k and
            top-p.
        text: What the new tokens say, without the end of the document.
        ended: Whether the model ended the document.
        load_seconds: Taken to build the model and read its weights.
        seconds: Taken to read the prompt and say the new tokens.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    log_probabilities: list[float]
    text: str
    ended: bool
    load_seconds: float
    seconds: float


def complete(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
) -> Completion:
    """Return how a checkpoint's model goes on with a text.

    Args:
        folder: Checkpoint `step=N`, complete.
        prompt: What the document begins with; reserved tokens in it keep their meaning.
        max_new_tokens: Tokens to say at most; `DEFAULT_TOKENS` if not given, or what the
            context has room for.
        sampling: How tokens are chosen; greedy by default.

    Raises:
        RuntimeRefusal: If the prompt is empty, or it and the new tokens do not fit into the
            model's context, or the checkpoint is of another kind of model.
        DataError: If the tokenizer is unusable, or cannot read the prompt.
    """
    begun = time.perf_counter()
    with restored(folder) as trained:
        loaded = time.perf_counter()
        ids = _encode(trained, prompt)
        context = trained.config.seq_length
        room = max(1, context - len(ids))
        wanted = min(DEFAULT_TOKENS, room) if max_new_tokens is None else max_new_tokens
        check_length(len(ids), wanted, context)
        end = trained.tokenizer.eos_id
        said = generate(
            trained.model,
            ids,
            max_new_tokens=wanted,
            sampling=sampling,
            end_id=end,
            vocab_size=trained.tokenizer.vocab_size,
        )
        tokens = said.tokens[0]
        ended = tokens[-1] == end
        return Completion(
            prompt_tokens=ids,
            tokens=tokens,
            log_probabilities=said.log_probabilities[0],
            text=_decode(trained.tokenizer, ids, tokens[:-1] if ended else tokens),
            ended=ended,
            load_seconds=loaded - begun,
            seconds=time.perf_counter() - loaded,
        )


def _encode(trained: Restored, prompt: str) -> list[int]:
    """Return the tokens of a prompt, which is one document."""
    if not prompt:
        raise RuntimeRefusal(
            "The prompt is empty",
            given="''",
            allowed="one character or more",
            hint=f"{trained.tokenizer.eos_token}, behind which a new document begins",
        )
    try:
        prompt.encode()
        ids: list[int] = trained.tokenizer.text_to_ids(prompt)
    except Exception as error:
        raise DataError(
            "The tokenizer cannot read this prompt",
            given=f"{prompt[:40]!r}: {type(error).__name__}",
            allowed="UTF-8 text",
            hint="the prompt in UTF-8",
        ) from error
    config, end = trained.config, trained.tokenizer.eos_id
    if (config.reset_state or config.reset_attention_mask) and end in ids[:-1]:
        # In training nothing crosses that token, and here the layers would carry it all on.
        raise RuntimeRefusal(
            "The prompt holds more than one document, and the model was trained within each",
            given=f"{trained.tokenizer.eos_token} with text behind it",
            allowed="one document, and the end-of-document token as its last",
            hint=f"only what stands behind the last {trained.tokenizer.eos_token}",
        )
    return ids


def _decode(tokenizer: Any, before: list[int], tokens: list[int]) -> str:
    """Return what tokens say behind others: alone, some tokenizers would drop a leading space."""
    first = str(tokenizer.ids_to_text(before, remove_special_tokens=False))
    whole = str(tokenizer.ids_to_text([*before, *tokens], remove_special_tokens=False))
    if whole.startswith(first):
        return whole[len(first) :]
    return str(tokenizer.ids_to_text(tokens, remove_special_tokens=False))

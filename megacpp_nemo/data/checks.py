"""What a data module checks before it lets Megatron see its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.contract.structure import (
    STRUCTURE_CHOICE,
    is_structure_choice,
    structure_channels,
)
from megacpp_nemo.data.tokenizer import no_end_token, tokenizer_folder

if TYPE_CHECKING:
    from nemo.collections.common.tokenizers import AutoTokenizer


def check_batch_sizes(
    seq_length: int, micro_batch_size: int, global_batch_size: int, num_workers: int
) -> None:
    """Raise DataError unless the sizes are ones that Megatron can batch."""
    given = f"{seq_length=}, {micro_batch_size=}, {global_batch_size=}, {num_workers=}"
    if seq_length < 2 or micro_batch_size < 1 or global_batch_size < 1 or num_workers < 0:
        raise DataError(
            "A batch size is out of range",
            given=given,
            allowed="seq_length >= 2, batch sizes >= 1, num_workers >= 0",
        )
    if global_batch_size % micro_batch_size:
        raise DataError(
            "The global batch is not a whole number of micro-batches",
            given=given,
            allowed="global_batch_size a multiple of micro_batch_size",
        )


def check_enough_tokens(
    tokens: Mapping[str, int], seq_length: int, micro_batch_size: int, global_batch_size: int
) -> None:
    """Raise DataError unless one pass gives a training batch and a validation micro-batch.

    Each row takes `seq_length` tokens and shares one, the label of its last position, with the
    next row.
    """
    for split, rows in (("train", global_batch_size), ("validation", micro_batch_size)):
        needed = rows * seq_length + 1
        if tokens[split] < needed:
            raise DataError(
                f"The {split} data is too small for one batch",
                given=f"{tokens[split]:,} tokens",
                allowed=f"at least {needed:,}: {rows} rows of {seq_length} tokens, and one more",
                hint="add source files, or lower seq_length or the batch size",
            )


def load_tokenizer(folder: str | Path | None) -> AutoTokenizer:
    """Load a transformers tokenizer folder as NeMo's tokenizer; nothing is ever downloaded.

    Raises:
        DataError: The folder is not set, not there or not a tokenizer, or the tokenizer has no
            end-of-document token.
    """
    if folder is None:
        raise DataError(
            "No tokenizer was given",
            allowed="the folder of the tokenizer that made the data",
            hint="data.tokenizer_dir=/data/tokenizer",
        )
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    folder = tokenizer_folder(folder, files)
    from nemo.collections.common.tokenizers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer(str(folder))
    except Exception as error:
        raise DataError("The tokenizer cannot be loaded", given=f"{folder}: {error}") from error
    if tokenizer.eos_token is None:
        raise no_end_token(folder)
    return tokenizer


def check_structure(structure: str | None) -> tuple[str, ...]:
    """Return the channels that `structure` names.

    Raises:
        DataError: It is not a choice of channels.
    """
    if structure is not None and not is_structure_choice(structure):
        raise DataError(
            "The structure channels cannot be read",
            given=f"structure={structure!r}",
            allowed=STRUCTURE_CHOICE.text,
            hint="data.structure=core",
        )
    return structure_channels(structure)


def check_fim(fim_rate: float, fim_spm_rate: float) -> None:
    """Raise DataError unless both are shares."""
    if not (0 <= fim_rate <= 1 and 0 <= fim_spm_rate <= 1):
        raise DataError(
            "A rate of fill-in-the-middle is out of range",
            given=f"{fim_rate=}, {fim_spm_rate=}",
            allowed="0 to 1",
            hint="data.fim_rate=0.5 permutes every other document",
        )

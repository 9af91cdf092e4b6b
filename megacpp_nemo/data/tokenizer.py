"""A byte-level BPE tokenizer for source code, trained here and saved as an ordinary folder.

- `train_tokenizer`: train on an iterator of texts; any text round-trips exactly
- `load_trained`: a tokenizer folder that is already there, with its end-of-document token
- `encode_documents`: texts to token ids, literal special tokens staying ordinary text
- `save_tokenizer`: the folder that transformers' and NeMo's `AutoTokenizer` load

The reserved tokens are the fill-in-the-middle set of Bavarian et al. (arXiv:2207.14255) and one
end-of-document token; they always have the ids 0 to 4.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data.cache import file_sha256

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOD_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|fim_pad|>"
SPECIAL_TOKENS = (EOD_TOKEN, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", PAD_TOKEN)
EOD_ID = 0
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; the same texts in the same order give the same tokenizer.

    Args:
        texts: Training texts, read once.
        vocab_size: Tokens in all, reserved and single-byte ones included. A text too small to
            offer that many merges gives a smaller vocabulary.

    Raises:
        DataError: `vocab_size` leaves no room for the 256 bytes and the reserved tokens.
    """
    check_vocab_size(vocab_size)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # No prefix space and no normalizer: decoding must give back the very bytes.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def check_vocab_size(vocab_size: int) -> None:
    """Raise DataError when a byte-level vocabulary cannot have `vocab_size` tokens."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            "The vocabulary is too small for a byte-level tokenizer",
            given=vocab_size,
            allowed=f"at least {MIN_VOCAB_SIZE}: 256 bytes and {len(SPECIAL_TOKENS)} reserved",
            hint="vocab_size=4096 suits the default corpus",
        )


def load_trained(folder: str | os.PathLike[str]) -> tuple[Tokenizer, int]:
    """Return the tokenizer of a folder and the id of its end-of-document token.

    Raises:
        DataError: The folder has no `tokenizer.json`, it cannot be read, or it names no
            `eos_token`.
    """
    path = tokenizer_folder(folder, ("tokenizer.json",))
    from transformers import PreTrainedTokenizerFast

    try:
        loaded = PreTrainedTokenizerFast.from_pretrained(path)
    except Exception as error:
        raise DataError("The tokenizer cannot be loaded", given=f"{path}: {error}") from error
    if loaded.eos_token_id is None:
        raise no_end_token(path)
    return loaded.backend_tokenizer, int(loaded.eos_token_id)


def encode_documents(
    tokenizer: Tokenizer, texts: Sequence[str], end_id: int = EOD_ID
) -> list[list[int]]:
    """Return the token ids of each text, in parallel, with `end_id` as the last of each.

    The spelling of a reserved token inside a text is encoded as ordinary characters: a source
    file that mentions `<|endoftext|>` does not end there.
    """
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    finally:
        tokenizer.encode_special_tokens = before
    return [[*encoding.ids, end_id] for encoding in encodings]


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and the two small files that make it a transformers tokenizer.

    In a prompt, unlike in `encode_documents`, reserved tokens keep their meaning, as
    transformers does by default.
    """
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOD_TOKEN,
        eos_token=EOD_TOKEN,
        # A pad token of its own: Megatron drops the loss of every position that equals it.
        pad_token=PAD_TOKEN,
        additional_special_tokens=list(SPECIAL_TOKENS[1:-1]),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def tokenizer_folder(folder: str | os.PathLike[str], names: Sequence[str]) -> Path:
    """Return a folder that holds at least one of the files `names`.

    Raises:
        DataError: It holds none of them.
    """
    path = Path(folder).expanduser()
    if not any((path / name).is_file() for name in names):
        raise DataError(
            "The tokenizer folder holds no tokenizer",
            given=str(path),
            allowed=f"a folder with {' or '.join(names)}",
            hint="set data.tokenizer_dir to a folder written by save_pretrained",
        )
    return path


def tokenizer_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every tokenizer file in a folder, by name."""
    return {path.name: file_sha256(path) for path in _tokenizer_files(folder)}


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files of a folder, and nothing else that may lie beside them."""
    target.mkdir()
    for path in _tokenizer_files(source):
        shutil.copyfile(path, target / path.name)


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def no_end_token(folder: Path) -> DataError:
    """Return the error of a tokenizer that cannot end a document."""
    return DataError(
        "The tokenizer has no end-of-document token",
        given=str(folder),
        allowed="a tokenizer whose eos_token ends every document of the data",
        hint="add eos_token to its tokenizer_config.json",
    )

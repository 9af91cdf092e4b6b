from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data.tokenizer import (
    EOD_ID,
    MIN_VOCAB_SIZE,
    SPECIAL_TOKENS,
    encode_documents,
    save_tokenizer,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer(cpp_texts):
    return train_tokenizer(cpp_texts, 400)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tok")
    save_tokenizer(tokenizer, path)
    return path


def test_reserved_tokens_have_the_first_ids_and_every_byte_is_known(tokenizer):
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert tokenizer.get_vocab_size() == 400
    assert train_tokenizer(["x"], 5000).get_vocab_size() == MIN_VOCAB_SIZE


@settings(max_examples=200, deadline=None)
@given(st.text())
@example(" x  \t\n y , . 's")
@example("\ufeff\r\n\r\u2028caf\u00e9 \U0001f600")
@example("a<|endoftext|>b<|fim_pad|>")
def test_any_text_comes_back_exactly(tokenizer, text):
    (ids,) = encode_documents(tokenizer, [text])
    assert ids[-1] == EOD_ID
    assert tokenizer.decode(ids[:-1], skip_special_tokens=False) == text


def test_the_spelling_of_a_reserved_token_stays_text(tokenizer):
    ids = encode_documents(tokenizer, ["x <|endoftext|> " + " ".join(SPECIAL_TOKENS)])[0]
    assert min(ids[:-1]) >= len(SPECIAL_TOKENS)
    assert tokenizer.encode("<|endoftext|>").ids == [EOD_ID]


def test_training_twice_gives_the_same_tokenizer(tokenizer, cpp_texts):
    assert train_tokenizer(iter(cpp_texts), 400).to_str() == tokenizer.to_str()


def test_transformers_loads_the_folder_and_round_trips(folder):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    text = "if (a [ 0 ] != b) { x ( ) ; } // it 's  ,  ."
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.eos_token_id, loaded.bos_token_id, loaded.pad_token_id) == (0, 0, 4)
    assert loaded.encode("<|fim_prefix|>a<|fim_suffix|>")[0] == 1
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["clean_up_tokenization_spaces"] is False


def test_nemo_loads_the_folder(folder):
    from nemo.collections.common.tokenizers import AutoTokenizer

    loaded = AutoTokenizer(str(folder))
    assert (loaded.eod, loaded.eos_id, loaded.bos_id, loaded.pad) == (0, 0, 0, 4)
    assert loaded.vocab_size == 400
    text = "int  main ( ) { return 0 ; }\n"
    assert loaded.ids_to_text(loaded.text_to_ids(text)) == text


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(DataError, match="at least 261"):
        train_tokenizer(["x"], 260)

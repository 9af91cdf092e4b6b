"""Where the tokens of a file start, for byte-level and for other tokenizers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from megacpp_nemo.data.positions import DocumentEncoder, document_tokenizer, spelled_bytes
from megacpp_nemo.data.tokenizer import train_tokenizer

TEXTS = ['int main() { return 0; }  // größe 数 🙂\n\tconst char* s = "é";\n' * 3, "a  b\r\n\n c"]


@pytest.fixture(scope="module")
def byte_level() -> str:
    return train_tokenizer(TEXTS, 300).to_str()


def naive_places(tokens: list[str], content: bytes) -> list[int]:
    """Add up the bytes of byte-level tokens, and step back to the start of a character."""
    places, at = [], 0
    for token in tokens:
        start = at
        while content[start] & 0xC0 == 0x80:
            start -= 1
        places.append(start)
        at += len(token)
    assert at == len(content)
    return places


@given(more=st.text(st.characters(codec="utf-8")))
@pytest.mark.parametrize("text", TEXTS[:1])
def test_sums_offsets_and_a_walk_over_the_bytes_agree(byte_level, text, more):
    content = (text + more).encode()
    tokenizer = Tokenizer.from_str(byte_level)
    tokenizer.encode_special_tokens = True
    expected = tokenizer.encode(content.decode(), add_special_tokens=False)
    for by_sums in (True, False):
        (ids,), (places,) = DocumentEncoder(byte_level, by_sums).ids_and_places([content])
        assert ids == expected.ids
        assert places.tolist() == naive_places(expected.tokens, content)


def test_a_token_that_ends_a_character_starts_where_the_character_does(byte_level):
    content = "// 数".encode()
    _, (places,) = DocumentEncoder(byte_level).ids_and_places([content])
    assert places.tolist()[-2:] != [3, 5]
    assert set(places.tolist()) <= {0, 1, 2, 3}


def trained(**parts) -> Tokenizer:
    tokenizer = Tokenizer(parts.pop("model", models.BPE(unk_token="?")))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["?"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def test_spaces_that_a_post_processor_trims_belong_to_their_token(byte_level):
    tokenizer = Tokenizer.from_str(byte_level)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    content = b"int  x ;   \n\n\n"
    trimmed = [start for start, _ in tokenizer.encode(content.decode()).offsets]
    for by_sums in (True, False):
        ids, (places,) = DocumentEncoder(tokenizer.to_str(), by_sums).ids_and_places([content])
        assert places.tolist() == naive_places([tokenizer.id_to_token(i) for i in ids[0]], content)
        assert places.tolist() != trimmed


def test_a_tokenizer_that_drops_and_changes_characters_still_says_where_it_was():
    tokenizer = trained(
        normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]),
        pre_tokenizer=pre_tokenizers.Whitespace(),
    )
    # The accent is a character of its own, of two bytes, that NFC joins with the letter.
    content = "  Größe  e\u0301E int 数".encode()
    encoder = DocumentEncoder(tokenizer.to_str())
    (ids,), (places,) = encoder.ids_and_places([content])
    tokens = [tokenizer.id_to_token(i) for i in ids]
    assert len(ids) == len(places)
    for token, place in zip(tokens, places.tolist(), strict=True):
        assert content[place] & 0xC0 != 0x80
        if token.isascii() and token != "?":
            assert content[place:].decode().lower().startswith(token[:1])
    assert places[0] == 2
    assert spelled_bytes(document_tokenizer(tokenizer.to_str())) is None


def test_a_mark_put_before_the_text_stands_at_its_first_byte():
    tokenizer = trained(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always"))
    _, (places,) = DocumentEncoder(tokenizer.to_str()).ids_and_places([b"int x;"])
    assert places[0] == 0
    assert places.max() < 6


def test_a_text_of_no_tokens_has_no_places():
    tokenizer = trained(pre_tokenizer=pre_tokenizers.Whitespace())
    ids, (places,) = DocumentEncoder(tokenizer.to_str()).ids_and_places([b" \n "])
    assert ids == [[]]
    assert places.tolist() == []


def test_documents_are_neither_cut_nor_padded(byte_level):
    tokenizer = Tokenizer.from_str(byte_level)
    whole = tokenizer.encode(TEXTS[0]).ids
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=500)
    assert DocumentEncoder(tokenizer.to_str()).ids([TEXTS[0].encode()]) == [whole]


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "NFC"}),
        ("pre_tokenizer", None),
        ("pre_tokenizer", {"type": "Whitespace"}),
        (
            "pre_tokenizer",
            {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            },
        ),
    ],
)
def test_tokens_spell_bytes_only_where_the_text_is_left_as_it_is(byte_level, part, value):
    parts = json.loads(byte_level)
    assert spelled_bytes(Tokenizer.from_str(byte_level)) is not None
    parts[part] = value
    assert spelled_bytes(Tokenizer.from_str(json.dumps(parts))) is None


def test_reserved_spellings_are_ordinary_text(byte_level):
    content = b"x <|endoftext|> y"
    for by_sums in (True, False):
        (ids,), (places,) = DocumentEncoder(byte_level, by_sums).ids_and_places([content])
        assert min(ids) > 4
        assert places[-1] >= len(content) - 2

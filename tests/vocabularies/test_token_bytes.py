"""Tokenizers as bytes: trained ones of every family and real ones, over random Unicode and plain text."""

import functools
import pickle

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from conftest import text_of_stdlib
from distill.errors import UserError
from distill.vocabularies.token_bytes import TokenBytes
from helpers.tokenizers import REAL, TRAINED, byte_bpe, random_texts, real, sentencepiece_bpe, trained, wrapped

ALL = [*TRAINED, *REAL]


@functools.cache
def bytes_of(name: str) -> tuple:
    tokenizer = trained(name, 700) if name in TRAINED else real(name)
    return tokenizer, TokenBytes(tokenizer, "model.teacher")


@pytest.mark.parametrize("name", ALL)
def test_tokens_cover_every_byte_once(name):
    tokenizer, side = bytes_of(name)
    texts = [text_of_stdlib(5_000), *random_texts(150), " leading", "\nline", "", "a"]
    kept = 0
    for text in texts:
        for special in side.specials:
            text = text.replace(special, "")
        ids, raw = tokenizer(text)["input_ids"], text.encode()
        ends_T = side.ends(ids, raw)
        if ends_T is None:  # only where decoding shows the same: a normaliser changed it
            assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) != text
            continue
        kept += 1
        starts_T = ends_T - np.diff(ends_T, prepend=0)
        assert (starts_T <= ends_T).all()
        assert (ends_T[-1] if len(ids) else 0) == len(raw)
        for number, start, end in zip(ids, starts_T, ends_T, strict=True):
            token = side.tokens[number] or b""
            assert token.endswith(raw[start:end])
            assert len(token) == end - start or (side.dummy_prefix and start == 0 and len(token) == end + 1)
    assert kept > 0.7 * len(texts)  # SmolLM2 has no token for some bytes


@pytest.mark.parametrize("name", ALL)
def test_bytes_in_the_middle_of_a_text_are_encoded_exactly_or_not_at_all(name):
    _, side = bytes_of(name)
    texts = [text.encode() for text in random_texts(100, seed=1)]
    texts += [text[:cut] for cut, text in enumerate(texts, start=1)] + [b"Hello", b" Hello", b" ", b"\n", b"<eos>"]
    for text, ids in zip(texts, side.encode_all(texts), strict=True):
        assert ids is None or side.text(ids) == text
        first = side.first_all([text])[0]
        assert first is None or text.startswith(side.tokens[first])
    assert side.encode(b"a") is not None
    assert side.encode("é".encode()[:1]) is None
    assert [side.text(side.encode(text)) for text in (b"Hello", b" Hello")] == [b"Hello", b" Hello"]


@pytest.mark.parametrize("name", ["sentencepiece_bpe", pytest.param("llama2", marks=pytest.mark.slow)])
def test_a_dummy_prefix_is_no_byte_of_the_text(name):
    tokenizer, side = bytes_of(name)
    assert side.dummy_prefix
    ids = tokenizer("hello there", add_special_tokens=False)["input_ids"]
    assert side.text(ids) == b" hello there"
    assert side.ends(ids, b"hello there")[-1] == 11
    assert side.ends(tokenizer(" a", add_special_tokens=False)["input_ids"], b" a")[-1] == 2
    assert side.text(side.encode(b"hello")) == b"hello"


@pytest.mark.parametrize("name", ["unigram", "sentencepiece_bpe", *REAL[-2:]])
def test_byte_fallback_does_not_hide_a_real_token(name):
    tokenizer, side = bytes_of(name)
    for letter in "aeT.":
        assert tokenizer.convert_ids_to_tokens(side.ids[letter.encode()]) == letter
    assert side.tokens[tokenizer.convert_tokens_to_ids("<0x0A>")] == b"\n"


def test_special_tokens_have_no_bytes_and_other_added_ones_are_text():
    tokenizer = byte_bpe(300)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("<turn>", special=True)])
    side = TokenBytes(tokenizer, "model.teacher")
    think, turn = tokenizer.convert_tokens_to_ids(["<think>", "<turn>"])
    assert (side.tokens[think], side.tokens[turn], side.tokens[side.eos]) == (b"<think>", None, None)
    assert side.specials == {"<eos>": 0, "<bos>": 1, "<turn>": turn}
    assert side.encode(b"a<think>")[-1] == think
    assert side.text(side.encode(b"<turn>")) == b"<turn>"  # in the middle of a text it is spelled
    assert side.ends([turn, *side.encode(b"ab"), side.eos], b"ab")[[0, -1]].tolist() == [0, 2]


def test_what_a_normaliser_changes_is_seen():
    tokenizer = byte_bpe(300)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    side = TokenBytes(tokenizer, "model.teacher")
    text = "e\u0301"
    assert side.ends(tokenizer(text)["input_ids"], text.encode()) is None
    assert side.encode(text.encode()) is None
    assert side.first_all([text.encode()]) == [side.ids[b"e"]]


def test_a_pickled_one_is_the_same():
    _, side = bytes_of("unigram")
    again = pickle.loads(pickle.dumps(side))
    assert again.tokens == side.tokens
    assert again.encode(b" hello") == side.encode(b" hello")


def test_a_slow_tokenizer_is_refused_in_one_line():
    with pytest.raises(
        UserError, match=r"^model.teacher: object is a slow tokenizer.*; give one with a tokenizer.json$"
    ):
        TokenBytes(object(), "model.teacher")  # type: ignore[arg-type]


def test_tokens_without_a_byte_form_are_refused_in_one_line():
    words = Tokenizer(models.WordPiece({"<unk>": 0, "a": 1, "##b": 2, "<eos>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(
        UserError, match=r"^data.tokenizer: .*\(WordPiece\) has no byte form; give a tokenizer of [^\n]*$"
    ):
        TokenBytes(wrapped(words), "data.tokenizer")


def test_a_prefix_on_every_piece_is_left_out_in_the_middle():
    side = TokenBytes(sentencepiece_bpe(500, prefix="always"), "model.teacher")
    assert side.dummy_prefix
    assert side.text(side.encode(b"be")) == b"be"

"""A tokenizer as bytes: what each of its tokens adds to a text, and the ids of bytes in the middle of one.

Three families are known: byte-level BPE (GPT-2, Llama 3, Qwen), BPE of SentencePiece with byte fallback (Llama 2,
Gemma) and Unigram. What a normaliser changes is not seen here; who compares the bytes of a document's tokens with its
text sees it.

Letters: T tokens of one text.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from distill.errors import UserError

_BLANK = "\u2581"  # what SentencePiece writes for a blank
_MEMORY = 1 << 15  # texts whose ids are kept, at most twice as many


def _byte_of() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte, inverted: what cannot be printed is moved above 255."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(moved)}


class TokenBytes:
    """A fast tokenizer as bytes.

    Args:
        tokenizer: of transformers, fast.
        key: YAML key that error messages name.

    Raises:
        UserError: a slow tokenizer, or one whose tokens have no bytes of their own.

    Attributes:
        tokens: bytes of each id; None for special tokens and for ids that stand for nothing.
        ids: the inverse; where two tokens have the same bytes, byte fallback gives way, then the higher id.
        specials: ids of the special tokens by their text.
        eos: id behind a document.
        dummy_prefix: whether a blank is put before a text (Llama 2).
        lengths: bytes of each id, int64; 0 where it has none.
        longest: of them all.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UserError(
                f"{key}: {type(tokenizer).__name__} is a slow tokenizer, whose tokens are not known as bytes; give one "
                "with a tokenizer.json"
            )
        parts = json.loads(backend.to_str())
        self._mid_text = _without_prefix(parts)
        self._memory: dict[bytes, list[int] | None] = {}
        self.size: int = len(tokenizer)
        self.eos: int | None = tokenizer.eos_token_id
        added = backend.get_added_tokens_decoder()
        self.specials = {token.content: number for number, token in added.items() if token.special}
        self.tokens: list[bytes | None] = [None] * self.size
        nothing = {parts["model"].get("unk_token"), _unknown(parts["model"])}
        read = _reader(parts, f"{key}: {type(tokenizer).__name__}")
        fallback = set()
        for text, number in backend.get_vocab().items():
            if number >= self.size or text in self.specials or text in nothing:
                continue
            self.tokens[number], from_fallback = (read.plain(text), False) if number in added else read(text)
            if from_fallback:
                fallback.add(number)
        order = sorted(range(self.size), key=lambda number: (number not in fallback, -number))
        self.ids = {token: number for number in order if (token := self.tokens[number])}
        self.lengths = np.array([len(token or b"") for token in self.tokens], dtype=np.int64)
        self.longest = int(self.lengths.max(initial=0))
        self.dummy_prefix = self.text(backend.encode("a", add_special_tokens=False).ids) == b" a"

    def text(self, ids: Iterable[int]) -> bytes:
        """The bytes that tokens add, special ones none; a dummy prefix is still there."""
        tokens = self.tokens
        return b"".join([tokens[number] or b"" for number in ids])

    def ends(self, ids: Sequence[int] | np.ndarray, text: bytes) -> np.ndarray | None:
        """Byte offset behind each token of a whole text, int64 [T]; special tokens add nothing.

        A dummy prefix is no byte of the text, so the first token that has bytes gives one up.

        Args:
            ids: as the tokenizer gives them, T.
            text: what they were made of.

        Returns:
            None where the bytes of the tokens are not the text, as behind a normaliser.
        """
        spelled = self.text(ids)
        prefixed = spelled != text
        if prefixed and not (self.dummy_prefix and spelled == b" " + text):
            return None
        lengths_T = self.lengths[np.asarray(ids, dtype=np.int64)]
        if prefixed:
            lengths_T[np.argmax(lengths_T > 0)] -= 1
        return np.cumsum(lengths_T)

    def encode(self, text: bytes) -> list[int] | None:
        """Ids of bytes in the middle of a text: no prefix, no special tokens.

        Returns:
            Ids whose bytes are exactly those; None where there are none, as for a part of a character.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[bytes]) -> list[list[int] | None]:
        """The same for many at once; those of a few are remembered."""
        found = {text: self._memory[text] for text in texts if text in self._memory}
        whole = []
        for text in dict.fromkeys(texts):
            if text not in found:
                found[text] = None
                try:
                    whole.append((text, text.decode()))
                except UnicodeDecodeError:
                    continue
        if whole:
            encoded = self._mid_text.encode_batch_fast([written for _, written in whole], add_special_tokens=False)
            for (text, _), encoding in zip(whole, encoded, strict=True):
                ids = encoding.ids
                found[text] = ids if ids and self.text(ids) == text else None
        if len(found) <= _MEMORY:
            if len(self._memory) + len(found) > 2 * _MEMORY:
                self._memory.clear()
            self._memory.update(found)
        return [found[text] for text in texts]

    def longest_start(self, text: bytes) -> int | None:
        """Id of the longest token that the bytes begin with."""
        for length in range(min(len(text), self.longest), 0, -1):
            if (number := self.ids.get(text[:length])) is not None:
                return number
        return None

    def first_all(self, texts: Sequence[bytes]) -> list[int | None]:
        """First id of the tokenizer's own encoding of each text; of what is no whole characters, `longest_start`."""
        encoded = self.encode_all(texts)
        return [ids[0] if ids else self.longest_start(text) for text, ids in zip(texts, encoded, strict=True)]


class _Pieces:
    """Reads a token of SentencePiece: (bytes, whether it is one of byte fallback)."""

    def __call__(self, text: str) -> tuple[bytes | None, bool]:
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes([int(text[3:5], 16)]), True
        return self.plain(text), False

    def plain(self, text: str) -> bytes:
        return text.replace(_BLANK, " ").encode()


class _ByteLevel:
    """Reads a token of byte-level BPE."""

    def __init__(self) -> None:
        self.byte_of = _byte_of()

    def __call__(self, text: str) -> tuple[bytes | None, bool]:
        if not all(letter in self.byte_of for letter in text):
            return None, False
        return bytes(self.byte_of[letter] for letter in text), False

    def plain(self, text: str) -> bytes:
        return text.encode()


def _reader(parts: dict[str, Any], who: str) -> _Pieces | _ByteLevel:
    """What reads this tokenizer's tokens."""
    kinds = {part["type"] for side in ("decoder", "pre_tokenizer") for part in _flat(parts.get(side))}
    model = parts["model"]
    if "ByteLevel" in kinds:
        return _ByteLevel()
    if model["type"] == "Unigram" or model.get("byte_fallback") or "Metaspace" in kinds:
        return _Pieces()
    raise UserError(
        f"{who} ({model['type']}) has no byte form; give a tokenizer of byte-level BPE, SentencePiece or Unigram"
    )


def _unknown(model: dict[str, Any]) -> str | None:
    """The token of Unigram that stands for what it cannot spell."""
    number = model.get("unk_id")
    return None if number is None else model["vocab"][number][0]


def _flat(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A component, and those within a sequence of them."""
    if part is None:
        return
    yield part
    for name in ("normalizers", "pretokenizers", "decoders"):
        for inner in part.get(name, ()):
            yield from _flat(inner)


def _without_prefix(parts: dict[str, Any]) -> Tokenizer:
    """The same tokenizer for the middle of a text: it puts nothing before or around it and knows no special token."""
    parts = {**parts, "post_processor": None, "truncation": None, "padding": None}
    normalizer = parts["normalizer"]
    if normalizer and normalizer["type"] == "Prepend":
        parts["normalizer"] = None
    elif normalizer and normalizer["type"] == "Sequence":
        kept = [part for part in normalizer["normalizers"] if part["type"] != "Prepend"]
        parts["normalizer"] = {**normalizer, "normalizers": kept}
    parts["pre_tokenizer"] = json.loads(json.dumps(parts["pre_tokenizer"]))
    for part in _flat(parts["pre_tokenizer"]):
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    tokenizer.encode_special_tokens = True
    return tokenizer

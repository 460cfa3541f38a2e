"""Answers to the character: what was rendered is learnt, whatever a tokenizer's offsets leave out."""

import copy
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from distill.data.documents.chat import Chat
from distill.data.documents.encode import Encoder
from distill.data.documents.offsets import covered
from distill.errors import UserError
from helpers.chat_templates import MARKED, PLAIN
from helpers.shown import decoded

# Marks the content alone, as some templates do.
CONTENT = MARKED.replace("+ '<|im_end|>' }}{% endgeneration %}{{ '", "}}{% endgeneration %}{{ '<|im_end|>")
ANSWERS = ["yes", " yes", "yes ", "   ", "a    b", "  a\n\n    b  ", "\t\tx \t", "naïve  東京 😀 "]


@pytest.fixture(scope="module")
def trimming(chat_tokenizer):
    """The tiny tokenizer with blanks as tokens and the trimmed offsets of GPT-2, Llama 3 and Qwen."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    encoded = tokenizer("a    b", return_offsets_mapping=True)
    assert tokenizer.backend_tokenizer.post_processor.trim_offsets
    assert any(start == stop for start, stop in encoded["offset_mapping"]), "a token of blanks has no width"
    return tokenizer


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer in SentencePiece's manner: blanks are marked, unknown characters are bytes."""
    alphabet = ["▁", *map(chr, range(33, 127)), "\n", "\t"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in ["<s>", "</s>", *alphabet, "▁▁", "▁▁▁▁", "▁a", "es"]:
        vocabulary.setdefault(piece, len(vocabulary))
    model = models.BPE(
        vocabulary, [("▁", "▁"), ("▁▁", "▁▁"), ("▁", "a"), ("e", "s")], byte_fallback=True, unk_token=None
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return fast


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("template", [PLAIN, MARKED, CONTENT], ids=["prefixes", "marks", "content"])
@pytest.mark.parametrize("name", ["chat_tokenizer", "trimming"])
def test_every_character_of_an_answer_is_a_target(request, name, template, answer):
    tokenizer = request.getfixturevalue(name)
    turns = [{"role": "user", "content": " q  "}, {"role": "assistant", "content": answer}] * 2
    [(text, learnt)] = decoded(tokenizer, Encoder(tokenizer, Chat(template))({"messages": [turns]}))
    end = "" if template == CONTENT else "<|im_end|>"
    if answer == "   ":  # one token holds them and the line break before them
        learnt = learnt.replace("\n", "")
    assert learnt == (answer + end) * 2
    assert text.count(answer + "<|im_end|>") >= 2


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "marks"])
def test_answers_in_pieces(pieces, template, answer):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}] * 2
    [(_, labels, _)] = Encoder(pieces, Chat(template))({"messages": [turns]})
    runs = np.flatnonzero(np.diff((labels != -100).astype(int), prepend=0) == 1)
    assert len(runs) == 2
    learnt = pieces.decode(labels[labels != -100])
    assert learnt.count("<|im_end|>") == 2
    assert learnt.split("<|im_end|>")[0].strip(" ") == answer.strip(" ")
    assert len(learnt.split("<|im_end|>")[0]) >= len(answer)


@pytest.mark.parametrize("completion", ["   ", "  yes ", "yes\n  "])
def test_every_character_of_a_completion_is_a_target(trimming, completion):
    batch = {"prompt": ["q:"], "completion": [completion]}
    assert decoded(trimming, Encoder(trimming, Chat())(batch)) == [(f"q:{completion}<eos>", f"{completion}<eos>")]


def test_the_end_is_learnt_although_it_is_what_pads(chat_tokenizer, tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    template = PLAIN.replace("<|im_end|>", "<eos>")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    batches = [
        {"messages": [turns]},
        {"prompt": ["q"], "completion": ["a"]},
        {"text": ["a"]},
        {"input_ids": [tokenizer("qa")["input_ids"] + [tokenizer.eos_token_id]], "attention_mask": [[1, 1, 1]]},
    ]
    for batch in batches:
        [(_, labels, _)] = Encoder(chat_tokenizer, Chat(template))(batch)
        ends = np.flatnonzero(labels == tokenizer.eos_token_id)
        assert len(ends) == 1, batch


def test_tokens_without_a_width_have_what_lies_before_them():
    offsets = np.array([[0, 0], [0, 3], [5, 5], [5, 6], [5, 6], [8, 9], [0, 0]])
    starts, ends = covered(offsets)
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == [
        (0, 0),
        (0, 3),
        (3, 5),
        (5, 6),
        (5, 6),
        (8, 9),
        (0, 0),
    ]
    assert [each.tolist() for each in covered(np.zeros((0, 2), dtype=np.int64))] == [[], []]


def test_marks_are_those_of_transformers_where_offsets_have_a_width(chat_tokenizer):
    turns = json.loads(json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "so it is"}] * 3))
    expected = chat_tokenizer.apply_chat_template(
        turns, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    [(ids, labels, _)] = Encoder(chat_tokenizer, Chat(MARKED))({"messages": [turns]})
    assert ids.tolist() == expected["input_ids"]
    assert (labels != -100).astype(int).tolist() == expected["assistant_masks"]


def test_what_a_tokenizer_drops_makes_nothing_else_a_target():
    """BERT's tokenizers know no line breaks, so nothing stands between an answer's end and the next turn's mark."""
    words = {word: i for i, word in enumerate(["[UNK]", "[SEP]", "user", "assistant", "q", "yes"])}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}] * 2
    for template in (PLAIN, MARKED):
        [(_, labels, _)] = Encoder(fast, Chat(template))({"messages": [turns]})
        assert fast.convert_ids_to_tokens(labels[labels != -100]) == ["yes", "<|im_end|>"] * 2


def test_half_a_character_is_refused_with_its_row(chat_tokenizer):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a \ud83d"}]
    with pytest.raises(UserError, match=r"document 1: it holds half a character, a lone surrogate; repair or remove"):
        Encoder(chat_tokenizer, Chat(PLAIN))({"messages": [turns]})

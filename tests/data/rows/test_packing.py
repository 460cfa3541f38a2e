"""Rows against a plain loop over tokens; byte counts against Python's own encoder; packed against unpacked logits."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from distill.data.documents.encode import byte_counts, tokenize, tokenizer_hash
from distill.data.rows.packing import pack
from distill.data.rows.table import collate
from distill.errors import UserError
from helpers import tiny

TEXTS = [
    "plain text, over and over: plain text",
    "naïve café — 東京 😀😀",
    "e\u0301 combining",
    "x",
    "tab\tand\nline  ",
]


def plain_rows(documents: list[tuple[list[int], list[int]]], length: int, packing: bool) -> list[dict]:
    """What `pack` should give, token by token."""
    rows, current = [], None
    for ids, counts in documents:
        if len(ids) < 2:
            continue
        if not packing:
            current = None
        for place, (token, size) in enumerate(zip(ids, counts, strict=True)):
            if current is None or len(current["input_ids"]) == length:
                current = {"input_ids": [], "labels": [], "document_lengths": [], "bytes": 0, "tokens": 0, "queries": 0}
                current |= {"documents": 0, "cut_documents": 0, "cut_tokens": 0}
                rows.append(current)
            current["documents"] += place == 0
            first = place == 0 or not current["input_ids"]
            if first:
                current["document_lengths"].append(0)
            else:
                current["tokens"] += 1
                current["queries"] += current["document_lengths"][-1] > 1
                current["bytes"] += size
            current["document_lengths"][-1] += 1
            current["input_ids"].append(token)
            current["labels"].append(-100 if first else token)
    return [row for row in rows if row["tokens"]]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_counts_of_a_document_sum_to_its_utf8_length(tokenizer, text):
    [(ids, counts)] = tokenize(tokenizer, [text])
    assert counts.sum() == len(text.encode())
    assert (counts >= 0).all()
    assert ids[-1] == tokenizer.eos_token_id
    assert counts[-1] == 0


def test_byte_counts_of_each_token_are_those_of_its_characters(tokenizer):
    text = "only ASCII here, so each token is so many bytes"
    [(ids, counts)] = tokenize(tokenizer, [text])
    assert counts.tolist() == [len(tokenizer.decode([token])) for token in ids[:-1]] + [0]


def test_byte_counts_give_uncovered_text_to_the_last_token():
    assert byte_counts("aé東😀  ", np.array([0, 1, 2, 4])).tolist() == [0, 1, 2, 9]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("length", [2, 7, 64])
def test_rows_equal_a_plain_loop(tokenizer, packing, length):
    rng = np.random.default_rng(0)
    words = " ".join(TEXTS).split(" ")
    texts = [" ".join(rng.choice(words, size=rng.integers(0, 30))) for _ in range(300)]  # more than a batch of the map
    documents = [(ids.tolist(), counts.tolist()) for ids, counts in tokenize(tokenizer, texts)]
    table = pack(Dataset.from_dict({"text": texts}), tokenizer, length, packing)
    assert table.to_list() == plain_rows(documents, length, packing)


def test_no_document_is_lost_and_only_the_last_row_is_short(tokenizer):
    texts = [f"document number {n}" for n in range(300)]
    table = pack(Dataset.from_dict({"text": texts}), tokenizer, 16, packing=True)
    ids = [token for row in table["input_ids"] for token in row]
    assert tokenizer.decode(ids) == "<eos>".join(texts) + "<eos>"
    assert {len(row) for row in table["input_ids"][:-1]} == {16}


def test_missing_and_empty_texts_yield_nothing(tokenizer):
    table = pack(Dataset.from_dict({"text": [None, "", "words that count", ""]}), tokenizer, 64, packing=True)
    assert table["document_lengths"][:] == [[len(tokenizer("words that count")["input_ids"]) + 1]]


def test_text_without_a_single_label_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"data.dataset: all labels of 2 documents are masked"):
        pack(Dataset.from_dict({"text": ["", ""]}), tokenizer, 64, packing=True)


def test_slow_tokenizer_is_refused():
    class Slow:
        is_fast, name_or_path = False, "slow/one"

    with pytest.raises(UserError, match=r"data.tokenizer: 'slow/one' is a slow tokenizer"):
        pack(Dataset.from_dict({"text": ["x"]}), Slow(), 64, packing=True)


def test_cache_key_follows_content_and_options(tokenizer, assets):
    from distill.models.load import load_tokenizer

    texts = Dataset.from_dict({"text": ["some words", "more words"]})
    same = load_tokenizer(str(assets / "qwen3_moe"))  # saved elsewhere, the same tokenizer
    assert tokenizer_hash(tokenizer) == tokenizer_hash(same)
    key = pack(texts, tokenizer, 8, packing=True)._fingerprint
    assert key == pack(texts, same, 8, packing=True)._fingerprint
    same.add_tokens(["words"])
    others = [pack(texts, tokenizer, 9, True), pack(texts, tokenizer, 8, False), pack(texts, same, 8, True)]
    assert len({key, *(table._fingerprint for table in others)}) == 4


def row(documents: list[list[int]]) -> dict:
    ids = [token for document in documents for token in document]
    labels = [token if place else -100 for document in documents for place, token in enumerate(document)]
    return {"input_ids": ids, "labels": labels, "document_lengths": [len(d) for d in documents], "bytes": len(ids)}


def test_batch_by_hand():
    rows = [row([[5, 6, 7], [8, 9]]), row([[3, 4]])]
    batch = collate(rows, 6, 0, {"tokens": 4, "queries": 1, "micro_batches": 1})
    assert batch.student.input_ids.tolist() == [[5, 6, 7, 8, 9, 0], [3, 4, 0, 0, 0, 0]]
    assert batch.student.labels.tolist() == [[-100, 6, 7, -100, 9, -100], [-100, 4, -100, -100, -100, -100]]
    assert batch.student.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    assert batch.student.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]
    assert batch.student.positions.tolist() == [0, 1, 3, 6]
    assert batch.student.packed is True
    assert batch.bytes == 7
    dtypes = {name: tensor.dtype for name, tensor in batch.student.tensors().items()}
    assert dtypes.pop("starts") == torch.int32  # as attention kernels take it
    assert set(dtypes.values()) == {torch.int64}
    assert batch.student.starts.tolist() == [0, 3, 5, 6, 8, 12]


def test_one_document_per_row_is_not_packed():
    assert collate([row([[5, 6, 7]]), row([[3, 4]])], 6, 0, {}).student.packed is False


def test_dummy_batch_has_one_row_and_no_targets():
    batch = collate([], 4, 9, {"tokens": 0})
    assert batch.student.input_ids.tolist() == [[9, 9, 9, 9]]
    assert batch.student.labels.tolist() == [[-100] * 4]
    assert batch.student.attention_mask.sum() == 0
    assert batch.student.positions.shape == (0,)
    assert (batch.student.packed, batch.bytes) == (False, 0)


FAMILIES = {
    "llama": tiny.tiny_llama,
    "qwen3_moe": tiny.tiny_qwen3_moe,
    "gemma": lambda: tiny.tiny_gemma(sliding_window=4),
    "gpt2": tiny.tiny_gpt2,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_of_a_packed_row_do_not_see_each_other(family):
    model = FAMILIES[family]()
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, tiny.VOCAB, size=size).tolist() for size in (7, 1, 9, 5)]
    batch = collate([row(documents), row([documents[2]])], 24, 0, {})
    with torch.no_grad():
        packed = model(batch.student.input_ids, position_ids=batch.student.position_ids, use_cache=False).logits
        alone = torch.cat([model(torch.tensor([document]), use_cache=False).logits[0] for document in documents])
    torch.testing.assert_close(packed[0, : len(alone)], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed[1, :9], alone[8:17], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_unpacked_rows_need_neither_mask_nor_positions(family):
    model = FAMILIES[family]()
    batch = collate([row([[5, 6, 7, 8]]), row([[3, 4, 9, 10, 11, 12]])], 8, 0, {})
    with torch.no_grad():
        bare = model(batch.student.input_ids, use_cache=False).logits
        masked = model(batch.student.input_ids, attention_mask=batch.student.attention_mask, use_cache=False).logits
    real = batch.student.attention_mask.bool()
    torch.testing.assert_close(bare[real], masked[real], rtol=1e-4, atol=1e-4)

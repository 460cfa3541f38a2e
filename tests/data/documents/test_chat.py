"""Rows of conversations: whole, cut with notice, the same losses packed and not, cached by all that they depend on."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from distill.curriculum import WEIGHT_KEYS, CurriculumState
from distill.data.documents.chat import Chat
from distill.data.documents.encode import Encoder
from distill.data.documents.files import load_documents
from distill.data.rows.packing import best_fit, pack
from distill.data.rows.statistics import describe_table
from distill.data.rows.table import collate
from distill.errors import UserError
from distill.losses.engine.divergence import KDLoss
from distill.models.load import load_tokenizer
from distill.teachers.online import OnlineTeacher
from distill.training.objective import objective
from helpers import tiny
from helpers.chat_templates import MARKED

ROOM = 224


def conversations(count: int, longest: int = 12) -> list[dict]:
    """Random words; one in five has no answer."""
    rng = np.random.default_rng(0)
    words = ["some", "words", "of", "which", "a", "conversation", "here", "is", "made", "up"]

    def say(role: str) -> dict:
        return {"role": role, "content": " ".join(rng.choice(words, size=rng.integers(1, longest)))}

    short, long = ["user"], ["user", "assistant", "user", "assistant"]
    return [{"messages": [say(role) for role in (long if i % 5 else short)]} for i in range(count)]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"  # a file: tables in memory are not cached
    path.write_text("".join(json.dumps(row) + "\n" for row in conversations(40)))
    return load_documents(str(path), config=None, split="train", text_column="text")


@pytest.fixture(scope="module")
def encoded(chat_tokenizer, documents):
    """Ids and labels of each conversation that has a target within a row."""
    every = Encoder(chat_tokenizer, Chat())({"messages": documents["messages"][:]})
    kept = [(ids[:ROOM].tolist(), labels[:ROOM].tolist()) for ids, labels, _ in every]
    return [(ids, labels) for ids, labels in kept if set(labels) != {-100}]


def documents_of(rows) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of the documents in a table of rows."""
    found = []
    for row in rows:
        stops = np.cumsum(row["document_lengths"])
        for stop, length in zip(stops, row["document_lengths"], strict=True):
            found.append((row["input_ids"][stop - length : stop], row["labels"][stop - length : stop]))
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_every_conversation_is_in_one_row_once_and_from_its_beginning(chat_tokenizer, documents, encoded, packing):
    rows = pack(documents, chat_tokenizer, ROOM, packing)
    assert sorted(documents_of(rows)) == sorted(encoded)
    assert max(len(row["input_ids"]) for row in rows) <= ROOM
    for row in rows:
        assert row["tokens"] == sum(label != -100 for label in row["labels"])
        assert row["documents"] == len(row["document_lengths"])
        starts = set(np.cumsum([0, *row["document_lengths"]]))
        assert row["queries"] == sum(
            row["labels"][t + 1] != -100 and t not in starts for t in range(len(row["labels"]) - 1)
        )
    if packing:
        filled = sum(len(row["input_ids"]) for row in rows) / (rows.num_rows * ROOM)
        assert filled > 0.85
        assert rows.num_rows < len(encoded) / 1.5
    else:
        assert rows.num_rows == len(encoded)


def test_what_is_cut_and_left_out_is_counted_and_told(chat_tokenizer, documents, encoded):
    every = Encoder(chat_tokenizer, Chat())({"messages": documents["messages"][:]})
    room = 96
    kept = [ids for ids, labels, _ in every if (labels[:room] != -100).any()]
    over = [len(ids) - room for ids in kept if len(ids) > room]
    rows = pack(documents, chat_tokenizer, room, packing=True)
    assert (sum(rows["cut_documents"]), sum(rows["cut_tokens"]), sum(rows["documents"])) == (
        len(over),
        sum(over),
        len(kept),
    )
    assert 0 < len(over) < len(kept) < len(every)
    line = describe_table("", documents, rows, "messages", room)
    assert f"{len(over)} cut at the end of a row, which lost {sum(over):,} tokens" in line
    assert f"{len(every) - len(kept)} without a target left out" in line
    assert f"{sum(len(ids[:room]) for ids in kept):,} tokens in {rows.num_rows} rows" in line


def test_conversations_without_an_answer_are_refused(chat_tokenizer):
    silent = Dataset.from_list([{"messages": [{"role": "user", "content": "hello?"}]}] * 3)
    with pytest.raises(UserError, match=r"data.dataset: all labels of 3 documents are masked \(no completion"):
        pack(silent, chat_tokenizer, ROOM, packing=True)


def test_best_fit_wastes_little_and_repeats_itself():
    lengths = np.random.default_rng(1).integers(1, 100, size=1000).tolist()
    bins = best_fit(lengths, 128)
    assert bins == best_fit(lengths, 128)
    assert sorted(item for items in bins for item in items) == list(range(1000))
    assert max(sum(lengths[item] for item in items) for items in bins) <= 128
    assert len(bins) <= 1.02 * sum(lengths) / 128
    assert best_fit([5, 5, 5], 5) == [[0], [1], [2]]


def batches(table, length: int = ROOM) -> list[dict]:
    """Batches of at most four rows, each with its own counts."""
    rows, found = table.to_list(), []
    for at in range(0, len(rows), 4):
        some = rows[at : at + 4]
        units = {name: sum(row[name] for row in some) for name in ("tokens", "queries")}
        found.append(collate(some, length, 0, units | {"micro_batches": 1}))
    return found


@pytest.mark.parametrize("family", [tiny.tiny_llama, tiny.tiny_qwen3_moe, tiny.tiny_gemma])
@pytest.mark.parametrize("template", [None, MARKED], ids=["prefixes", "marks"])
def test_packed_and_unpacked_losses_of_each_conversation_are_equal(chat_tokenizer, documents, family, template):
    model = family(vocab_size=len(chat_tokenizer), max_position_embeddings=ROOM).double()
    if family is tiny.tiny_qwen3_moe:
        model.set_experts_implementation("eager")  # the grouped products know no float64

    def losses(packing: bool) -> dict[tuple, list[float]]:
        found: dict[tuple, list[float]] = {}
        for batch in batches(pack(documents, chat_tokenizer, ROOM, packing, Chat(template))):
            positions = {"position_ids": batch.student.position_ids} if batch.student.packed else {}
            with torch.no_grad():
                logits_BLV = model(batch.student.input_ids, use_cache=False, **positions).logits
            nll_BL = F.cross_entropy(logits_BLV[:, :-1].transpose(1, 2), batch.student.labels[:, 1:], reduction="none")
            for b, starts in enumerate(batch.student.position_ids == 0):
                edges = [*starts.nonzero().flatten().tolist(), ROOM]
                for first, stop in pairwise(edges):
                    if batch.student.attention_mask[b, first]:
                        here = batch.student.attention_mask[b, first:stop].bool()
                        ids = tuple(batch.student.input_ids[b, first:stop][here].tolist())
                        found.setdefault(ids, []).append(nll_BL[b, first : stop - 1].sum().item())
        return found

    packed, alone = losses(True), losses(False)
    assert packed.keys() == alone.keys()
    for ids, values in alone.items():
        assert min(values) > 0
        assert packed[ids] == pytest.approx(values, rel=1e-6)


def test_packing_changes_no_component(chat_tokenizer, documents):
    sizes = {"vocab_size": len(chat_tokenizer), "max_position_embeddings": ROOM}
    teacher = OnlineTeacher(tiny.tiny_llama(**sizes, num_hidden_layers=3).double())
    student = tiny.tiny_llama(**sizes).double()
    state = CurriculumState(0, 0.0, dict.fromkeys(WEIGHT_KEYS, 1.0), 2.0, None)
    sums = {}
    for packing in (True, False):
        totals = {"kd_loss": 0.0, "lm_loss": 0.0, "tokens": 0}
        for batch in batches(pack(documents, chat_tokenizer, ROOM, packing)):
            result = objective(batch, student, teacher, ["kd_loss", "lm_loss"], state, 1.0, kd=KDLoss())
            tokens = batch.units["tokens"]
            totals["tokens"] += tokens
            for name in ("kd_loss", "lm_loss"):
                totals[name] += result.breakdown.raw[name].item() * tokens
        sums[packing] = totals
    assert sums[True] == pytest.approx(sums[False], rel=1e-6)
    assert sums[True]["kd_loss"] > 0


def test_the_cache_follows_all_that_rows_depend_on(chat_tokenizer, chat_folder, documents, monkeypatch):
    def key(tokenizer=chat_tokenizer, length=ROOM, packing=True, **chat) -> str:
        return pack(documents, tokenizer, length, packing, Chat(**chat))._fingerprint

    first = key()
    other = load_tokenizer(str(chat_folder))
    other.add_tokens(["conversation"])
    changed = [
        key(template=MARKED),
        key(template_options={"greeting": "Hello"}),
        key(completion_only_loss=False),
        key(length=ROOM + 1),
        key(packing=False),
        key(other),
    ]
    assert len({first, *changed}) == 7
    monkeypatch.setattr(Encoder, "__call__", lambda *_: pytest.fail("encoded again"))
    assert key() == first
    assert key(load_tokenizer(str(chat_folder))) == first
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        key(length=ROOM + 2)

"""Rows of two tokenizers: both sides hold the same text, and meet where a search through its bytes finds them."""

import itertools

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import processors

from conftest import text_of_stdlib
from distill.batch import IGNORE
from distill.data.documents.chat import Chat
from distill.data.order.sampler import EveryRowOnce
from distill.data.rows.digests import row_digests
from distill.data.rows.packing import pack_with
from distill.data.rows.table import PackedRows
from distill.data.tokenizers import Tokenizers, tokenizers_of
from distill.errors import UserError
from helpers.chat_templates import PLAIN
from helpers.tokenizers import byte_bpe, trained

SIZES = {"byte_bpe": 700, "unigram": 600, "sentencepiece_bpe": 620}
TEXTS = ["naïve café — 東京 😀😀 " * 3, "x", "", "words that count, and others\n\n  that do not", None]


def documents(count: int = 12) -> list[str | None]:
    text = text_of_stdlib(9000)
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.integers(0, len(text), count))
    return [text[a:b] for a, b in itertools.pairwise(cuts)] + TEXTS


def sides(teacher: str, student: str) -> Tokenizers:
    if teacher == "with_bos":
        theirs = byte_bpe(500)
        ends = [("<bos>", theirs.convert_tokens_to_ids("<bos>"))]
        theirs.backend_tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=ends)
    else:
        theirs = trained(teacher, SIZES[teacher])
    found = tokenizers_of(theirs, trained(student, SIZES[student] // 2 + 100))
    assert found.vocabularies is not None
    return found


def rows_of(found: Tokenizers, texts, length=48, packing=True, chat=None, column="text"):
    table = Dataset.from_dict({column: texts})
    return pack_with(found.packer(chat or Chat(), length, packing), table).with_format("numpy")


def parts(row, side: str = ""):
    """The ids of each document of a row."""
    edges = np.cumsum(row[f"{side}document_lengths"])[:-1]
    return np.split(row[f"{side}input_ids"], edges)


def behind(side, ids):
    """Bytes up to the text's end behind each token, negative."""
    ends = np.cumsum([len(side.tokens[i] or b"") for i in ids])
    return ends - ends[-1]


PAIRS = [
    ("byte_bpe", "byte_bpe"),
    ("unigram", "byte_bpe"),
    ("byte_bpe", "sentencepiece_bpe"),
    ("sentencepiece_bpe", "unigram"),
    ("with_bos", "byte_bpe"),
]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_both_sides_of_a_row_hold_the_same_text_and_none_is_lost(teacher, student, packing):
    found = sides(teacher, student)
    table = rows_of(found, documents(), packing=packing)
    whole = {"student": [], "teacher": []}
    for row in table:
        assert max(len(row["input_ids"]), len(row["teacher_input_ids"])) <= 48
        for ours, theirs in zip(parts(row), parts(row, "teacher_"), strict=True):
            spelt = {found.vocabularies.student.text(ours), found.vocabularies.teacher.text(theirs)}
            assert len({text.removeprefix(b" ") for text in spelt}) == 1  # some put a blank before a text
        for name, side in (("student", ""), ("teacher", "teacher_")):
            whole[name] += row[f"{side}input_ids"].tolist()
    if packing:
        text = "".join(filter(None, documents())).encode()
        for name, ids in whole.items():
            assert getattr(found.vocabularies, name).text(ids).replace(b" ", b"") == text.replace(b" ", b"")


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_places_are_those_that_a_search_by_bytes_finds(teacher, student):
    found = sides(teacher, student)
    table = rows_of(found, documents())
    rows = PackedRows(table, np.arange(len(table)), 48, found.pad_id, pairing=found.pairing)
    inside = 0
    for request in EveryRowOnce(rows.units_R, 3):
        batch = rows.__getitems__(request)
        length, their_length = batch.student.input_ids.shape[1], batch.teacher.input_ids.shape[1]
        expected = {}
        for b, index in enumerate(request.indices):
            row, at, there = table[index], 0, 0
            for ids, theirs in zip(parts(row), parts(row, "teacher_"), strict=True):
                ours_ends = behind(found.vocabularies.student, ids)
                their_ends = behind(found.vocabularies.teacher, theirs)
                for place in range(len(ids) - 1):
                    before = [k for k in range(len(theirs) - 1) if their_ends[k] <= ours_ends[place]]
                    if before:
                        expected[b * length + at + place] = (
                            b * their_length + there + before[-1],
                            int(ours_ends[place] - their_ends[before[-1]]),
                        )
                at, there = at + len(ids), there + len(theirs)
        assert batch.pairs is not None
        has_N = batch.pairs.group_N >= 0
        positions = batch.student.positions[has_N].tolist()
        assert positions == sorted(expected)
        assert batch.pairs.teacher_N[has_N].tolist() == [expected[p][0] for p in positions]
        assert ((batch.pairs.group_N[has_N] > 0).numpy() == [expected[p][1] > 0 for p in positions]).all()
        assert batch.units["targets"] == len(positions)
        inside += sum(expected[p][1] > 0 for p in positions)
    assert inside == table["inside"][:].sum() > 50


def test_each_part_of_a_text_begins_as_the_teacher_begins_texts():
    found = sides("with_bos", "byte_bpe")
    table = rows_of(found, documents())
    bos = found.teacher.convert_tokens_to_ids("<bos>")
    rows = [ids for row in table for ids in parts(row, "teacher_")]
    assert {int(ids[0]) for ids in rows} == {bos}
    assert sum((ids == bos).sum() for ids in rows) == len(rows)
    share = table["targets"][:].sum() / table["tokens"][:].sum()
    assert share == 1  # the first token of the student in a row has the teacher's whole row behind it too


def test_a_document_that_a_normaliser_changes_is_the_students_alone():
    from tokenizers import normalizers

    teacher, student = byte_bpe(400), byte_bpe(320)
    teacher.backend_tokenizer.normalizer = normalizers.Lowercase()
    found = tokenizers_of(teacher, student)
    table = rows_of(found, ["all of it small", "Not All Of It Small", "small again"])
    assert table["unshared"][:].sum() == 1
    [row] = table
    assert len(parts(row)) == 3
    assert len(parts(row, "teacher_")) == 2
    alone = np.cumsum(row["document_lengths"])[:2]
    assert (row["ends"][alone[0] : alone[1]] == -1).all()
    assert 0 < row["targets"] < row["tokens"]


def test_a_document_without_a_common_boundary_in_a_row_is_the_students_alone():
    found = sides("byte_bpe", "byte_bpe")
    table = rows_of(found, ["e" * 300], length=4)  # one side's tokens end nowhere near the other's
    total = sum(len(row["input_ids"]) for row in table)
    assert total >= len(found.student("e" * 300)["input_ids"])


def test_ids_are_of_one_tokenizer_and_refused():
    found = sides("byte_bpe", "byte_bpe")
    with pytest.raises(UserError, match=r"^data.dataset: input_ids are of one tokenizer"):
        rows_of(found, [[1, 2, 3]], column="input_ids")


def chats():
    said = ["What is it?", "A tuple, that is all.", "  And a list? ", "Longer: it can be changed.\n\nSee below."]
    return [
        [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said[: 2 * k])]
        for k in (1, 2)
    ]


OTHER = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] | trim }}[/end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("completion_only", [True, False])
def test_conversations_meet_in_their_contents(completion_only):
    found = sides("byte_bpe", "sentencepiece_bpe")
    found.student.chat_template, found.teacher.chat_template = PLAIN, OTHER
    chat = Chat(completion_only_loss=completion_only)
    table = rows_of(found, chats(), length=256, chat=chat, column="messages")
    vocabularies = found.vocabularies
    rows = PackedRows(table, np.arange(len(table)), 256, found.pad_id, pairing=found.pairing)
    [batch] = [rows.__getitems__(request) for request in EveryRowOnce(rows.units_R, 9)]
    taught = (batch.pairs.group_N >= 0).nonzero().flatten()
    assert 20 < len(taught) == batch.units["targets"] < batch.units["tokens"]
    ids, theirs = batch.student.input_ids.flatten(), batch.teacher.input_ids.flatten()
    labels = set()
    for n in taught.tolist():
        position, place = int(batch.student.positions[n]), int(batch.pairs.teacher_N[n])
        label, answer = (
            side.tokens[i]
            for side, i in (
                (vocabularies.student, int(ids[position + 1])),
                (vocabularies.teacher, int(theirs[place + 1])),
            )
        )
        labels.add(label)
        if batch.pairs.group_N[n] == 0:  # both go on with the same text
            assert label[: len(answer)] == answer[: len(label)]
    spelt = b" ".join(labels)
    assert b"[" not in spelt
    assert b"<|im" not in spelt


def test_a_template_that_changes_a_content_leaves_the_conversation_to_the_student():
    found = sides("byte_bpe", "byte_bpe")
    found.student.chat_template = PLAIN
    found.teacher.chat_template = PLAIN.replace("message['content']", "message['content'] | upper")
    table = rows_of(found, chats(), length=256, column="messages")
    assert table["unshared"][:].sum() == 2
    assert table["targets"][:].sum() == 0
    assert table["tokens"][:].sum() > 20


def test_completions_of_text_keep_their_masks():
    found = sides("unigram", "byte_bpe")
    table = Dataset.from_dict({"prompt": ["def f():", None], "completion": [" return 1 + 2", "pass"]})
    [row] = pack_with(found.packer(Chat(), 64, True), table).with_format("numpy")
    learnt = row["labels"] != IGNORE
    assert 0 < learnt.sum() < len(learnt)
    assert row["targets"] == learnt[1:].sum()


def test_digests_see_both_sides_and_where_they_meet():
    found = sides("byte_bpe", "unigram")
    table = rows_of(found, documents())
    first = row_digests(table, np.arange(len(table)))
    for name in ("teacher_input_ids", "ends"):
        changed = table.map(lambda row, name=name: {name: row[name][::-1].copy()})
        assert (row_digests(changed, np.arange(len(table))) != first).any(1).all()

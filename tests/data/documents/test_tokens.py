"""Rows that are tokenised already: what their further columns say is honoured, or refused by name."""

import json

import numpy as np
import pytest
from datasets import Dataset

from distill.data.documents.chat import Chat
from distill.data.documents.encode import Encoder
from distill.data.documents.files import load_documents, open_stream
from distill.data.documents.tokens import tokens_of
from distill.data.rows.packing import pack
from distill.errors import UserError
from helpers.shown import OPTIONS


def documents(row: dict, completion_only_loss: bool = True) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), labels.tolist()) for ids, labels in tokens_of(row, 100, completion_only_loss)]


IDS = [5, 6, 7, 8]
PLAIN = [(IDS, IDS)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"input_ids": [*IDS, 0, 0], "attention_mask": [1, 1, 1, 1, 0, 0]}, PLAIN),
        ({"input_ids": [0, 0, *IDS], "attention_mask": [0, 0, 1, 1, 1, 1]}, PLAIN),
        ({"input_ids": [0, *IDS, 0], "attention_mask": [0, 1, 1, 1, 1, 0], "labels": [-100, *IDS, -100]}, PLAIN),
        ({"input_ids": [*IDS, 0], "attention_mask": [1, 1, 1, 1, 0], "labels": [*IDS, 0]}, PLAIN),
        ({"input_ids": IDS, "completion_mask": [0, 0, 1, 1]}, [(IDS, [-100, -100, 7, 8])]),
        ({"input_ids": IDS, "assistant_masks": [0, 1, 0, 1]}, [(IDS, [-100, 6, -100, 8])]),
        ({"input_ids": IDS, "loss_mask": [1, 1, 0, 0]}, [(IDS, [5, 6, -100, -100])]),
        ({"input_ids": IDS, "labels": [-100, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}, [(IDS, [-100, -100, 7, 8])]),
        ({"input_ids": IDS, "position_ids": [0, 1, 0, 1]}, [([5, 6], [5, 6]), ([7, 8], [7, 8])]),
        ({"input_ids": IDS, "position_ids": [2, 3, 4, 5]}, PLAIN),
        ({"input_ids": IDS, "seq_lengths": [1, 3]}, [([5], [5]), ([6, 7, 8], [6, 7, 8])]),
        ({"input_ids": [*IDS, 0], "attention_mask": [1, 1, 2, 2, 0]}, [([5, 6], [5, 6]), ([7, 8], [7, 8])]),
        ({"input_ids": [0, *IDS], "attention_mask": [0, 1, 1, 1, 1], "position_ids": [1, 0, 1, 2, 3]}, PLAIN),
        ({"input_ids": IDS, "labels": None, "attention_mask": None}, PLAIN),
        ({"input_ids": "[5, 6, 7, 8]", "attention_mask": "[1, 1, 1, 1]"}, PLAIN),
        ({"input_ids": [0, 0], "attention_mask": [0, 0]}, []),
    ],
    ids=str,
)
def test_what_the_columns_say(row, expected):
    assert documents(row) == expected


def test_masks_of_completions_count_where_completions_alone_do():
    row = {"input_ids": IDS, "completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 0, 0, 1]}
    assert documents(row, completion_only_loss=False) == PLAIN
    assert documents(row | {"loss_mask": [0, 1, 1, 1]}, completion_only_loss=False) == [(IDS, [-100, 6, 7, 8])]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"attention_mask": [1, 1]}, "4 input_ids and 2 attention_mask; give one per token"),
        ({"completion_mask": [0, 2, 1, 1]}, "its completion_mask holds other numbers than 0 and 1"),
        ({"loss_mask": [0.5, 1, 1, 1]}, "its loss_mask are no list of numbers"),
        ({"seq_lengths": [3, 3]}, "its seq_lengths add up to 6 of 4 input_ids"),
        ({"attention_mask": [-1, 1, 1, 1]}, "its attention_mask holds numbers below 0"),
        ({"position_ids": "0 1 2 3"}, "its position_ids are no list of numbers"),
    ],
)
def test_columns_that_cannot_be(tokenizer, row, told):
    with pytest.raises(UserError, match=f"data.dataset: document 2: {told}"):
        Encoder(tokenizer, Chat())(
            {name: [IDS if name == "input_ids" else None, value] for name, value in ({"input_ids": IDS} | row).items()}
        )


@pytest.mark.parametrize("packing", [True, False])
def test_padding_is_in_no_row_and_documents_of_a_row_do_not_see_each_other(tokenizer, packing):
    first, second = tokenizer("first words")["input_ids"], tokenizer("others")["input_ids"]
    ids = [*first, *second, 0, 0, 0]
    mask = [1] * (len(ids) - 3) + [0] * 3
    positions = [*range(len(first)), *range(len(second)), 0, 0, 0]
    rows = pack(
        Dataset.from_list([{"input_ids": ids, "attention_mask": mask, "position_ids": positions}] * 2),
        tokenizer,
        64,
        packing,
    )
    found = [tokenizer.decode(row["input_ids"]) for row in rows]
    assert found == (["first wordsothers" * 2] if packing else ["first words", "others"] * 2)
    assert [length for row in rows for length in row["document_lengths"]] == [len(first), len(second)] * 2
    assert sum(rows["tokens"]) == 2 * (len(ids) - 3 - 2)


def test_tokens_with_nothing_but_padding_told_go_on_in_the_next_row(tokenizer):
    ids = tokenizer("words " * 50)["input_ids"]
    plain = pack(Dataset.from_list([{"input_ids": ids}]), tokenizer, 16, packing=True)
    padded = [{"input_ids": [*ids, 0, 0], "attention_mask": [1] * len(ids) + [0, 0]}]
    rows = pack(Dataset.from_list(padded), tokenizer, 16, packing=True)
    assert rows.to_list() == plain.to_list()
    assert sum(rows["cut_documents"]) == 0


def test_a_mask_that_comes_late_in_a_stream_is_refused(tokenizer, tmp_path):
    rows = [{"input_ids": IDS}] * 150 + [{"input_ids": IDS, "completion_mask": [0, 0, 1, 1]}]
    (tmp_path / "late.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream, _ = open_stream(str(tmp_path / "late.jsonl"), **OPTIONS)
    with pytest.raises(UserError, match=r"late.jsonl, row 151 has completion_mask, which none of the first 100 rows"):
        list(stream)
    table = load_documents(str(tmp_path / "late.jsonl"), **OPTIONS)
    assert table.column_names == ["input_ids", "completion_mask"]
    [*_, (_, labels, _)] = Encoder(tokenizer, Chat())({name: table[name][:] for name in table.column_names})
    assert np.flatnonzero(labels != -100).tolist() == [2, 3]

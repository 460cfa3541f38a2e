"""Streams by themselves: every document once per pass over all readers, places that lead back, shares of mixtures."""

import json
from itertools import islice

import datasets
import numpy as np
import pytest

from distill.data.documents.chat import Chat
from distill.data.documents.encode import Encoder
from distill.data.documents.files import open_stream
from distill.data.order.stream import Stream, StreamBatches, validation_rows
from distill.data.rows.packing import Packer, encoder_of
from distill.errors import UserError

OPTIONS = {"config": None, "split": "train", "text_column": "text"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Four files of 15 completions each; the number of a document is in its prompt."""
    folder = tmp_path_factory.mktemp("stream")
    for part in range(4):
        rows = [{"prompt": f"{15 * part + i}:", "completion": " so" * (1 + i % 4)} for i in range(15)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{part}.parquet", batch_size=7)
    return folder


@pytest.fixture
def stream(files, tokenizer):
    def call(pattern: str = "*.jsonl", **options) -> Stream:
        documents, columns = open_stream(str(files / pattern), **OPTIONS)
        packer = Packer(encoder_of(tokenizer, Chat()), 40, packing=options.pop("packing", True))
        return Stream(documents, columns, packer, **({"block": 4} | options))

    return call


def numbers(tokenizer, row) -> list[int]:
    """The documents in a row."""
    text = tokenizer.decode(row["input_ids"])
    return [int(part.partition(":")[0]) for part in text.split("<eos>") if part]


def one_pass(tokenizer, stream: Stream, reader: int = 0, readers: int = 1) -> list[int]:
    """Documents that a reader has before it starts over."""
    found = []
    for row, place in stream.read(None, reader, readers):
        if place["at"][0] > 0:
            return found
        found += numbers(tokenizer, row)
    raise AssertionError


@pytest.mark.parametrize(("pattern", "readers"), [("*.jsonl", 1), ("*.parquet", 3), ("*.jsonl", 4), ("*.jsonl", 5)])
def test_readers_share_every_document_once_per_pass(stream, tokenizer, pattern, readers):
    shares = [one_pass(tokenizer, stream(pattern), reader, readers) for reader in range(readers)]
    assert sorted(number for share in shares for number in share) == list(range(60))
    assert all(shares)


def test_passes_differ_and_the_order_is_that_of_the_seed(stream, tokenizer):
    def first(count: int, **options) -> list[list[int]]:
        return [numbers(tokenizer, row) for row, _ in islice(stream(**options).read(None, 0, 1), count)]

    rows = len(first(200)) and sum(place["at"][0] == 0 for _, place in islice(stream().read(None, 0, 1), 200))
    both = first(2 * rows)
    assert both == first(2 * rows)
    assert both[:rows] != both[rows:]
    assert sorted(n for row in both[rows:] for n in row) == list(range(60))
    assert first(rows, seed=1) != both[:rows]


@pytest.mark.parametrize(("pattern", "readers"), [("*.jsonl", 1), ("*.jsonl", 2), ("*.jsonl", 5), ("*.parquet", 2)])
def test_every_place_leads_back(stream, pattern, readers):
    whole = list(islice(stream(pattern).read(None, readers - 1, readers), 40))
    assert whole[-1][1]["at"][0] > 0 or readers == 1
    for step in (1, 3):  # broken off after so many rows, again and again
        place, found = None, []
        while len(found) < len(whole):
            *_, (_, place) = some = list(islice(stream(pattern).read(place, readers - 1, readers), step))
            found += some
            place = json.loads(json.dumps(place))
        for (row, where), (other, elsewhere) in zip(found, whole, strict=False):
            assert np.array_equal(row["input_ids"], other["input_ids"])
            assert np.array_equal(row["labels"], other["labels"])
            assert [where["at"][i] for i in (0, 2, 3)] == [elsewhere["at"][i] for i in (0, 2, 3)]


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_readers_in_different_passes_do_not_touch_each_other(stream, tokenizer, readers):
    one = stream()
    one_pass(tokenizer, one, readers - 1, readers)
    assert one.documents.epoch == 0  # what forked workers have in common


def test_documents_that_are_held_out_are_never_trained_on(stream, tokenizer):
    held_out = {n for row in stream(held_out=0.3).validation_rows(1000) for n in numbers(tokenizer, row)}
    for readers in (1, 3):  # however they are shared
        trained = [one_pass(tokenizer, stream(held_out=0.3), reader, readers) for reader in range(readers)]
        assert sorted([*held_out, *(n for share in trained for n in share)]) == list(range(60))
    assert 8 <= len(held_out) <= 28
    assert len(stream(held_out=0.3).validation_rows(2)) == 2
    assert len(validation_rows([stream(weight=3.0), stream(weight=1.0)], 8)) == 8


def test_streams_take_turns_by_their_weights(stream, tokenizer):
    light, heavy = stream("0.jsonl", weight=1.0, packing=False), stream("[123].jsonl", weight=3.0, packing=False)
    batches = StreamBatches([light, heavy], 2, 0, rank=0, world_size=1, workers=0)
    found = []
    for batch, place in islice(batches, 20):
        found += [
            n for ids in batch.student.input_ids for n in numbers(tokenizer, {"input_ids": ids[: (ids != 0).sum()]})
        ]
        assert sum(number < 15 for number in found) in (len(found) // 4, -(-len(found) // 4))
        assert place["rows"] == [sum(number < 15 for number in found), sum(number >= 15 for number in found)]
        assert batch.units["tokens"] == int((batch.student.labels[:, 1:] != -100).sum())
    assert place["documents"] == 40


def test_a_stream_without_a_target_is_refused(stream, monkeypatch):
    silent = [(np.ones(3, dtype=np.int32), np.full(3, -100, dtype=np.int32), np.zeros(3, dtype=np.int64))]
    monkeypatch.setattr(Encoder, "__call__", lambda *_: silent)
    with pytest.raises(UserError, match=r"data.dataset: all labels of 60 documents are masked"):
        next(stream().read(None, 0, 1))


def test_more_readers_than_blocks_are_refused(stream):
    with pytest.raises(UserError, match=r"data.shuffle_buffer: 100 documents make 1 blocks for 5 readers"):
        next(stream(block=100).read(None, 4, 5))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"body": "words"}\n', "data.text_column: 'text' is no column .*body"),
        ("", "has no documents|cannot be read"),
        ('{"text": "a"}\n{"text": ', "cannot be read"),
    ],
)
def test_unreadable_streams(tmp_path, content, told):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(UserError, match=told) as caught:
        open_stream(str(tmp_path / "rows.jsonl"), **OPTIONS)
    assert "\n" not in str(caught.value)


def test_a_stream_is_one_source(files, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"makes 2 streams whose lengths nobody knows"):
        open_stream([str(files / "0.jsonl"), str(tmp_path / "a.txt")], **OPTIONS)


def test_text_streams(assets, tokenizer):
    documents, columns = open_stream(str(assets / "text.txt"), **OPTIONS)
    assert isinstance(documents, datasets.IterableDataset)
    stream = Stream(documents, columns, Packer(encoder_of(tokenizer, Chat()), 64, packing=True))
    text = (assets / "text.txt").read_text()
    expected = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    rows = [row for row, place in islice(stream.read(None, 0, 1), -(-len(expected) // 64)) if place["at"][0] == 0]
    assert sorted(tuple(row["input_ids"]) for row in rows) == sorted(
        tuple(expected[at : at + 64]) for at in range(0, len(expected), 64)
    )

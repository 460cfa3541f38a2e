"""Parts with weights: exact shares, every row of a source before any comes again, nothing of validation trained."""

import json

import numpy as np
import pytest

from distill.data.datamodule import DistillationDataModule
from distill.data.documents.sources import Source, sources_of
from distill.data.order.mixing import draw, quotas, split_rows
from distill.data.order.sampler import StepSampler, group_by_length
from distill.errors import UserError


def test_a_name_or_names_are_one_part_and_parts_take_over_what_they_leave_open():
    assert sources_of("a", split="train") == [Source("a", split="train")]
    assert sources_of(["a", "b"]) == [Source(["a", "b"])]
    parts = sources_of([{"dataset": "a", "weight": 2, "split": "test"}, {"dataset": "b", "weight": 1}], split="train")
    assert parts == [Source("a", 2, split="test"), Source("b", 1, split="train")]
    assert [part.weight for part in sources_of(["a", {"dataset": "b"}])] == [None, None]


@pytest.mark.parametrize(
    ("dataset", "told"),
    [
        ([], r"data.dataset: \[\]; name at least one source"),
        ([{"dataset": "a", "weight": 0}], r"data.dataset\[0\].weight: 0 must be above 0"),
        ([{"dataset": "a", "weight": 1}, {"dataset": "b", "weight": -1.0}], r"data.dataset\[1\].weight: -1.0 must be"),
        ([{"dataset": "a", "weight": float("nan")}], r"data.dataset\[0\].weight: nan"),
        ([{"dataset": "a", "weight": 1}, "b"], r"data.dataset\[1\].weight: null, while other parts have one"),
        ([{"dataset": "a", "wieght": 1}], r"data.dataset\[0\].wieght: .* did you mean 'weight'"),
        ([{"dataset": "a", "weight": "1"}], r"data.dataset\[0\].weight: '1' is no number"),
        ([{"weight": 1}], r"data.dataset\[0\].dataset: missing"),
        ([{"dataset": "a", "format": "txt"}], r"data.dataset\[0\].format: 'txt'; did you mean 'text'"),
    ],
)
def test_parts_that_cannot_be(dataset, told):
    with pytest.raises(UserError, match=told):
        sources_of(dataset)


@pytest.mark.parametrize(
    ("rows", "weights", "limit", "expected"),
    [
        ([100, 1000], [1, 3], None, [100, 300]),
        ([1000, 100], [0.5, 0.5], None, [100, 100]),
        ([1000, 100], [0.9, 0.1], None, [900, 100]),
        ([100, 100, 7], [0.7, 0.2, 0.1], None, [49, 14, 7]),
        ([1000, 1000], [3, 1], 40, [30, 10]),
        ([1000, 1], [1000, 1], 10, [9, 1]),
    ],
)
def test_an_epoch_has_the_shares_of_the_weights(rows, weights, limit, expected):
    assert quotas(rows, weights, limit) == expected


def test_sources_go_on_where_the_epoch_before_stopped():
    rows, taken = [10, 35], [10, 15]
    epochs = [draw(rows, taken, 3, epoch) for epoch in range(8)]
    for order in epochs:
        assert [(order < 10).sum(), (order >= 10).sum()] == taken
    assert np.array_equal(draw(rows, taken, 3, 5), epochs[5])
    assert not np.array_equal(draw(rows, taken, 4, 5), epochs[5])
    drawn = np.bincount(np.concatenate(epochs)[np.concatenate(epochs) >= 10], minlength=45)[10:]
    assert drawn.sum() == 8 * 15
    assert set(drawn.tolist()) == {3, 4}  # 120 draws of 35 rows: none a second time before all
    first_two = np.concatenate(epochs[:2])
    assert len(np.unique(first_two[first_two >= 10])) == 30


@pytest.mark.parametrize("weights", [[1.0, 3.0], None])
def test_rows_are_held_out_of_each_source_before_it_is_mixed(weights):
    rows = [40, 200] if weights else [240]
    split = split_rows(rows, 0.1, weights, 5)
    assert not set(split.train) & set(split.validation)
    if weights:
        assert len(split.train) == 216  # all are there, an epoch takes some
        assert split.parts == ([36, 180], [36, 108])
        assert [(split.validation < 40).sum(), (split.validation >= 40).sum()] == [4, 12]
        assert sorted(split.train[:36]) == split.train[:36].tolist()
        assert max(split.train[:36]) < 40
    else:
        assert (len(split.train), len(split.validation), split.parts) == (216, 24, None)
    limited = split_rows(rows, 0.1, weights, 5, (20, 4))
    assert (len(limited.train), len(limited.validation)) == (20, 4)
    assert set(limited.train) <= set(split.train)


LENGTHS = np.random.default_rng(7).integers(1, 400, size=1003)
UNITS = {"tokens": LENGTHS, "queries": LENGTHS}


def padding(order: np.ndarray, batch: int) -> float:
    """Padded tokens per token, where each batch is as long as its longest row."""
    cut = [order[at : at + batch] for at in range(0, len(order), batch)]
    return sum(LENGTHS[rows].max() * len(rows) for rows in cut) / LENGTHS[order].sum() - 1


def test_grouping_keeps_every_row_once_and_spares_the_padding():
    order = np.random.default_rng(0).permutation(1003)
    grouped = group_by_length(order, LENGTHS, 8, 0)
    assert sorted(grouped) == list(range(1003))
    assert np.array_equal(grouped, group_by_length(order, LENGTHS, 8, 0))
    assert padding(order, 8) > 0.5
    assert padding(grouped, 8) < 0.05
    assert sorted(grouped[-3:]) == sorted(order[-3:])  # what fills no step stays last
    means = LENGTHS[grouped[:1000]].reshape(-1, 8).mean(1)
    assert abs(np.corrcoef(np.arange(125), means)[0, 1]) < 0.3  # neither the long nor the short ones come first


@pytest.mark.parametrize(("world_size", "batch_size", "accumulate"), [(1, 8, 1), (2, 4, 1), (1, 4, 2), (4, 1, 2)])
def test_a_grouped_step_is_the_same_rows_however_split(world_size, batch_size, accumulate):
    def steps(world_size: int, batch_size: int, accumulate: int) -> list[list[int]]:
        ranks = []
        for rank in range(world_size):
            sampler = StepSampler(UNITS, batch_size, 3, rank, world_size, lengths_R=LENGTHS)
            sampler.accumulate = accumulate
            sampler.set_epoch(2)
            ranks.append(list(sampler))
        together = list(zip(*ranks, strict=True))
        windows = [together[at : at + accumulate] for at in range(0, len(together), accumulate)]
        return [[i for micro in window for part in micro for i in part.indices] for window in windows]

    assert steps(world_size, batch_size, accumulate) == steps(1, 8, 1)
    assert sorted(row for step in steps(1, 8, 1) for row in step) == list(range(1003))


def ready(**options) -> DistillationDataModule:
    data = DistillationDataModule(**options)
    data.prepare_data()
    data.setup()
    return data


def ids(loader) -> list[tuple[int, ...]]:
    return [
        tuple(row[mask.bool()].tolist())
        for b in loader
        for row, mask in zip(b.student.input_ids, b.student.attention_mask, strict=True)
    ]


def test_a_mixture_of_text_and_completions_trains_on_its_shares(assets, tmp_path, caplog):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"question {i}\n", "completion": f"answer {i} " * (1 + i % 5)} for i in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"tokenizer": str(assets / "llama"), "sequence_length": 64, "per_device_batch_size": 1}
    parts = [{"dataset": str(assets / "text.txt"), "weight": 3}, {"dataset": str(path), "weight": 1}]
    with caplog.at_level("INFO"):
        data = ready(dataset=parts, **options)
    assert data._parts is not None
    (text, pairs), (of_text, of_pairs) = data._parts
    assert of_text == 3 * of_pairs or (of_text, of_pairs) == (text, int(text / 3))
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == of_text + of_pairs
    assert sum(b.student.packed and (b.student.labels == -100).sum() > 20 for b in batches) <= of_pairs
    assert not set(ids(batches)) & set(ids(data.val_dataloader()))
    lines = [record.message for record in caplog.records if record.message.startswith("Data:")]
    assert lines[0].startswith("Data: 75.0% of the rows from 1 document (text)")
    assert lines[1].startswith("Data: 25.0% of the rows from 300 documents (prompt_completion)")
    assert f"{text + pairs:,} training rows ({of_text + of_pairs:,} per epoch" in lines[2]
    assert ids(ready(dataset=parts, **options).train_dataloader()) == ids(batches)


def test_parts_without_weights_are_all_there(assets, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "one", "completion": " and two"}\n' * 40)
    options = {"tokenizer": str(assets / "llama"), "sequence_length": 64}
    alone = [ready(dataset=name, **options) for name in (str(assets / "text.txt"), str(tmp_path / "pairs.jsonl"))]
    data = ready(dataset=[{"dataset": str(assets / "text.txt")}, {"dataset": str(tmp_path / "pairs.jsonl")}], **options)
    rows = [len(d.train_rows) + len(d.validation_rows) for d in (*alone, data)]
    assert rows[2] == rows[0] + rows[1]
    assert len(ids(data.train_dataloader())) == len(data.train_rows)


def test_grouped_batches_are_as_long_as_their_longest_row(assets, tmp_path):
    lengths = np.random.default_rng(0).integers(1, 240, size=100)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"input_ids": [5] * int(n) + [6]}) + "\n" for n in lengths))
    options = {"dataset": str(tmp_path / "rows.jsonl"), "tokenizer": str(assets / "llama"), "sequence_length": 200}
    plain = ready(**options, packing=False, per_device_batch_size=4)
    data = ready(**options, packing=False, group_by_length=True, per_device_batch_size=4)
    batches = list(data.train_dataloader())
    assert {batch.student.input_ids.shape[1] for batch in batches} == {64, 128, 192, 200}
    for batch in batches:
        longest = int(batch.student.attention_mask.sum(1).max())
        assert batch.student.input_ids.shape[1] == min(200, -(-longest // 64) * 64)
    assert sorted(ids(batches)) == sorted(ids(plain.train_dataloader()))
    with pytest.raises(UserError, match=r"data.group_by_length: true with data.packing true groups nothing"):
        ready(**options, group_by_length=True)

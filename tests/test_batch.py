"""A batch of two tokenizers: all of it moves and is saved, and its counts say what each loss is a mean over."""

import numpy as np
import torch

from distill.batch import Batch, Pairs, Spelling, Tokens


def tokens(rows: int, length: int) -> Tokens:
    ids = torch.arange(rows * length).view(rows, length)
    return Tokens(ids, ids, torch.ones_like(ids), ids % length, ids[:, :-1].flatten(), packed=False)


def batch_of_two() -> Batch:
    student, teacher = tokens(2, 4), tokens(2, 3)
    places = torch.tensor([0, 1, 1, 3, 4, 0])
    groups = torch.tensor([0, 0, 1, 0, 0, -1])
    on_host = Spelling(*(np.zeros(6, dtype=np.int64) for _ in range(5)), groups.numpy(), np.array([0, 2]))
    pairs = Pairs(places, groups, torch.tensor([0, 2]), torch.tensor([5, 7]), torch.tensor([1, 2]), on_host)
    return Batch(student, teacher, {"tokens": 6, "queries": 4, "targets": 5, "micro_batches": 1}, 9, (3, 4), pairs)


def test_both_sides_and_their_pairs_move_together():
    moved = batch_of_two().to("meta")
    assert moved.pairs is not None
    assert moved.teacher is not moved.student
    every = [part.tensors() for part in (moved.student, moved.teacher, moved.pairs)]
    assert {tensor.device.type for tensors in every for tensor in tensors.values()} == {"meta"}
    assert moved.rows == (3, 4)


def test_a_batch_of_one_tokenizer_keeps_one_object():
    one = tokens(2, 4)
    moved = Batch(one, one, {"tokens": 6, "queries": 4}, 9).to("meta")
    assert moved.teacher is moved.student
    assert moved.pairs is None


def test_it_is_saved_whole_and_plain(tmp_path):
    batch = batch_of_two()
    torch.save(batch.plain(), tmp_path / "batch.pt")
    loaded = torch.load(tmp_path / "batch.pt", weights_only=True)
    assert loaded["pairs"].keys() == batch.pairs.tensors().keys()
    assert torch.equal(loaded["pairs"]["group_N"], batch.pairs.group_N)
    assert torch.equal(loaded["teacher"]["input_ids"], batch.teacher.input_ids)


def test_targets_are_all_tokens_unless_they_were_counted():
    batch, one = batch_of_two(), tokens(2, 4)
    assert (batch.count("tokens"), batch.count("targets")) == (6, 5)
    assert Batch(one, one, {"tokens": 6, "queries": 4}, 9).count("targets") == 6

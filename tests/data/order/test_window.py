"""Windows of an optimizer step by themselves: what their micro-batches carry, and what a resumed window leaves out."""

import pytest
import torch

from distill.batch import Batch, Tokens
from distill.data.order.window import Hosts, StepWindow


def batch(tokens: int) -> Batch:
    ids = torch.zeros(1, tokens, dtype=torch.long)
    row = Tokens(ids, ids, ids, ids, ids[0], packed=False)
    return Batch(row, row, {"tokens": tokens, "queries": tokens - 1}, bytes=tokens)


class TwoRanks(Hosts):
    """As if another rank had read the same."""

    def __len__(self) -> int:
        return 2

    def sum(self, counts: list[int]) -> list[int]:
        return [2 * count for count in counts]


@pytest.mark.parametrize(("hosts", "ranks"), [(Hosts(), 1), (TwoRanks(), 2)])
def test_every_micro_batch_carries_the_counts_of_its_whole_step(hosts, ranks):
    window = StepWindow(6, [batch(5), batch(3), batch(1)])
    counted = list(window.counted(hosts))
    assert [each.bytes for each in counted] == [5, 3, 1]
    assert window.stop == 9
    for each in counted:
        assert each.units == {"tokens": 9 * ranks, "queries": 6 * ranks, "micro_batches": 3 * ranks}


@pytest.mark.parametrize(("start", "left"), [(4, [5, 3, 1]), (7, [3, 1]), (8, [1]), (9, [])])
def test_micro_batches_before_the_start_count_but_are_not_handed_out(start, left):
    counted = list(StepWindow(6, [batch(5), batch(3), batch(1)]).counted(Hosts(), start))
    assert [each.bytes for each in counted] == left
    assert all(each.units["tokens"] == 9 for each in counted)


def test_one_process_gathers_its_own_value():
    assert Hosts().gather({"at": 1}) == [{"at": 1}]

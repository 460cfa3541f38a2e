"""Which rows form a step, however they are split, against slices of one permutation."""

import itertools

import numpy as np
import pytest

from distill.data.order.sampler import EveryRowOnce, StepSampler
from distill.data.rows.table import MicroBatch

ROWS = 29
UNITS = {"tokens": np.arange(ROWS) ** 2, "queries": np.arange(ROWS)}


def ranks(
    world_size: int, batch_size: int, accumulate: int = 1, epoch: int = 0, **attributes
) -> list[list[MicroBatch]]:
    """Rank -> micro-batches."""
    dealt = []
    for rank in range(world_size):
        sampler = StepSampler(UNITS, batch_size, 3, rank, world_size)
        sampler.set_epoch(epoch)
        sampler.accumulate = accumulate
        for name, value in attributes.items():
            setattr(sampler, name, value)
        dealt.append(list(sampler))
        if not attributes:
            assert len(sampler) == len(dealt[-1])
    return dealt


def steps(dealt: list[list[MicroBatch]], accumulate: int) -> list[list[MicroBatch]]:
    """Optimizer step -> its micro-batches of all ranks, in the order of the permutation."""
    across = [list(together) for together in zip(*dealt, strict=True)]
    return [list(itertools.chain(*across[at : at + accumulate])) for at in range(0, len(across), accumulate)]


@pytest.mark.parametrize(("world_size", "batch_size", "accumulate"), [(1, 8, 1), (2, 4, 1), (1, 4, 2), (4, 1, 2)])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_step_is_the_same_rows_and_units_however_split(world_size, batch_size, accumulate, epoch):
    order = np.random.default_rng([3, epoch]).permutation(ROWS)
    dealt = steps(ranks(world_size, batch_size, accumulate, epoch), accumulate)
    assert len(dealt) == 4
    for number, step in enumerate(dealt):
        rows = order[number * 8 : number * 8 + 8]
        assert [index for micro in step for index in micro.indices] == rows.tolist()
        for micro in step:
            assert micro.units == {
                "tokens": sum(int(row) ** 2 for row in rows),
                "queries": sum(int(row) for row in rows),
                "micro_batches": len(step),
            }


def test_last_step_has_only_the_micro_batches_that_it_needs_and_ranks_stay_in_step():
    dealt = ranks(world_size=2, batch_size=2, accumulate=4)  # 29 rows: 16, then 13 in 4 micro-batches of 4
    assert [[len(micro.indices) for micro in rank] for rank in dealt] == [[2] * 7 + [1], [2] * 7 + [0]]
    dealt = ranks(world_size=2, batch_size=3, accumulate=4)  # 24 rows in the first step, 5 in one micro-batch
    assert [[len(micro.indices) for micro in rank] for rank in dealt] == [[3] * 5, [3] * 4 + [2]]
    assert dealt[0][-1].units["micro_batches"] == dealt[1][-1].units["micro_batches"] == 2


def test_a_limit_counts_what_is_delivered():
    whole, cut = ranks(1, 2, accumulate=4), ranks(1, 2, accumulate=4, limit=6)
    assert [micro.indices for micro in cut[0]] == [micro.indices for micro in whole[0][:6]]
    assert cut[0][0].units == whole[0][0].units
    rows = [index for micro in cut[0][4:] for index in micro.indices]
    assert cut[0][4].units == {"tokens": sum(row**2 for row in rows), "queries": sum(rows), "micro_batches": 2}


@pytest.mark.parametrize("start", range(16))
def test_a_start_within_the_epoch_gives_the_rest(start):
    assert ranks(1, 2, accumulate=4, start=start)[0] == ranks(1, 2, accumulate=4)[0][start:]


def test_epochs_differ_and_each_row_comes_once_per_epoch():
    first, second = ([index for micro in ranks(1, 4, epoch=epoch)[0] for index in micro.indices] for epoch in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(ROWS))


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 4), (3, 5), (4, 8)])
def test_evaluation_sees_every_row_once(world_size, batch_size):
    dealt = [list(EveryRowOnce(UNITS, batch_size, rank, world_size)) for rank in range(world_size)]
    assert len({len(rank) for rank in dealt}) == 1
    assert len(dealt[0]) == len(EveryRowOnce(UNITS, batch_size, 0, world_size))
    micro_batches = [micro for rank in dealt for micro in rank]
    assert sorted(index for micro in micro_batches for index in micro.indices) == list(range(ROWS))
    for micro in micro_batches:
        assert micro.units == {
            "tokens": sum(index**2 for index in micro.indices),
            "queries": sum(micro.indices),
            "micro_batches": 1,
        }

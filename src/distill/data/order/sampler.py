"""Rows in an order that depends on seed and epoch alone, dealt out so that an optimizer step is the same set of rows
however it is split over micro-batches and ranks.

The sampler knows the units of every row, so each micro-batch carries the counts of its whole optimizer step over all
ranks and the normaliser needs no communication. That takes one small integer array of the data set's length per kind
of unit in memory, and dummy rows where the last micro-batch does not fill every rank.

Grouping by length puts rows of about one length into a step, so that little is spent on padding; the rows of a step are
then no longer independent of each other.

Letters: R rows, W ranks, b rows per micro-batch and rank, A micro-batches per optimizer step and rank.
"""

from collections.abc import Iterator

import numpy as np

from distill.data.order.mixing import draw
from distill.data.rows.table import MicroBatch

POOL = 50  # optimizer steps whose rows are sorted together where rows are grouped by length


class StepSampler:
    """Micro-batches of one rank for training, in a new order each epoch.

    Micro-batch m of rank r holds rows [(m W + r) b, (m W + r + 1) b) of the order of (seed, epoch).

    Args:
        units_R: kind of unit -> count of each row, int64 [R].
        batch_size: b.
        seed: of the order.
        rank: r.
        world_size: W.
        parts: rows of each source, and how many of them an epoch has; None = one source, of which it has all.
        lengths_R: tokens of each row, by which rows are grouped; None = they are not.
    """

    def __init__(
        self,
        units_R: dict[str, np.ndarray],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        parts: tuple[list[int], list[int]] | None = None,
        lengths_R: np.ndarray | None = None,
    ) -> None:
        self.units_R, self.batch_size, self.seed = units_R, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.parts, self.lengths_R = parts, lengths_R
        self.rows = sum(parts[1]) if parts is not None else len(next(iter(units_R.values())))
        self.epoch = 0
        self.accumulate = 1
        self.limit: float = float("inf")
        self.start = 0

    @property
    def sampler(self) -> "StepSampler":
        """Itself: Lightning calls `set_epoch` on `batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.rows // (self.batch_size * self.world_size))

    def _order(self, step: int) -> np.ndarray:
        """The rows of the epoch, `step` of them per optimizer step."""
        if self.parts is None:
            order_R = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        else:
            order_R = draw(*self.parts, self.seed, self.epoch)
        return order_R if self.lengths_R is None else group_by_length(order_R, self.lengths_R, step, self.seed)

    def __iter__(self) -> Iterator[MicroBatch]:
        order_R = self._order(self.batch_size * self.world_size * self.accumulate)
        across = self.batch_size * self.world_size  # rows of one micro-batch over all ranks
        count = int(min(len(self), self.limit))
        units: dict[str, int] = {}
        for index in range(self.start, count):
            if index % self.accumulate == 0 or not units:
                first = index // self.accumulate * self.accumulate
                last = min(first + self.accumulate, count)
                step_rows = order_R[first * across : last * across]
                units = {name: int(counts[step_rows].sum()) for name, counts in self.units_R.items()}
                units["micro_batches"] = (last - first) * self.world_size
            mine = index * across + self.rank * self.batch_size
            yield MicroBatch(order_R[mine : mine + self.batch_size].tolist(), units)


def group_by_length(order_R: np.ndarray, lengths_R: np.ndarray, step: int, seed: int) -> np.ndarray:
    """The same rows in an order in which the rows of an optimizer step are about as long as each other.

    Rows are sorted within pools of POOL steps, then the steps are shuffled; those that fill no step stay last. So the
    rows of a step don't depend on how it is split over micro-batches and ranks.

    Args:
        order_R: rows in a random order.
        lengths_R: tokens of every row.
        step: rows of an optimizer step.
        seed: of the order of the steps, which otherwise depends on `order_R` alone.
    """
    whole = len(order_R) // step * step
    pools = [order_R[at : min(at + POOL * step, whole)] for at in range(0, whole, POOL * step)]
    by_length = [pool[np.argsort(-lengths_R[pool], kind="stable")] for pool in pools]
    if not by_length:
        return order_R
    steps_SR = np.concatenate(by_length).reshape(-1, step)
    shuffled_SR = steps_SR[np.random.default_rng([seed, int(order_R[0])]).permutation(len(steps_SR))]
    rest_R = order_R[whole:]
    return np.concatenate([shuffled_SR.ravel(), rest_R[np.argsort(-lengths_R[rest_R], kind="stable")]])


class EveryRowOnce:
    """Micro-batches of one rank for evaluation: all rows in order, none twice, as many micro-batches on each rank.

    Args:
        units_R: kind of unit -> count of each row, int64 [R].
        batch_size: b.
        rank: r.
        world_size: W.
    """

    def __init__(self, units_R: dict[str, np.ndarray], batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.units_R, self.batch_size = units_R, batch_size
        self.rank, self.world_size = rank, world_size
        self.rows = len(next(iter(units_R.values())))

    def __len__(self) -> int:
        return -(-self.rows // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[MicroBatch]:
        for index in range(len(self)):
            mine = (index * self.world_size + self.rank) * self.batch_size
            rows = range(mine, min(mine + self.batch_size, self.rows))
            units = {name: int(counts[list(rows)].sum()) for name, counts in self.units_R.items()}
            yield MicroBatch(list(rows), units | {"micro_batches": 1})

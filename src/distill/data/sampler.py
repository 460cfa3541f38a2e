"""Rows in an order that depends on seed and epoch alone, dealt out so that an optimizer step is the same set of rows
however it is split over micro-batches and ranks.

The sampler knows the units of every row, so each micro-batch carries the counts of its whole optimizer step over all
ranks and the normaliser needs no communication. The price is one small integer array of the data set's length per
kind of unit in memory, and dummy rows where the last micro-batch does not fill every rank.

Grouping by length puts rows of about one length into a step, so that little is spent on padding; the price is that the
rows of a step are no longer independent of each other.

Letters: R rows, W ranks, b rows per micro-batch and rank, A micro-batches per optimizer step and rank.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from distill.data.mixture import draw
from distill.errors import UserError

POOL = 50  # optimizer steps whose rows are sorted together where rows are grouped by length


@dataclass(frozen=True)
class MicroBatch:
    """What one rank reads at once.

    Args:
        indices: rows; none asks for a dummy row without labels, so that the ranks stay in step.
        units: kind of unit -> count, over the whole optimizer step and all ranks in training, over this micro-batch in
            evaluation.
    """

    indices: list[int]
    units: dict[str, int]


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


class ResumableLoader(DataLoader):
    """A training loader that Lightning saves and resumes in the middle of an epoch, to the micro-batch.

    It stores how many micro-batches were processed rather than handed out, since workers read ahead.

    Args:
        dataset: see `PackedRows`.
        sampler: of the training rows.
        trainer: whose accumulation, limit and progress count; without one, every micro-batch is a step.
        layout: what makes a place within an epoch meaningful (data, seed, sizes); plain values.
        options: of `DataLoader`.
    """

    def __init__(
        self, dataset: Any, sampler: StepSampler, trainer: L.Trainer | None, layout: dict[str, Any], **options: Any
    ) -> None:
        # A generator of its own: the default draws from the global one, and a resumed run would draw once more.
        generator = torch.Generator().manual_seed(sampler.seed)
        # torch types a request as a list of indices, but hands whatever it is to `__getitems__`.
        super().__init__(dataset, batch_sampler=sampler, generator=generator, **options)  # type: ignore[arg-type]
        self.steps, self.trainer, self.layout = sampler, trainer, layout
        self._start = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator function: Lightning calls iter() before it sets the epoch and counts the batches.
        if self.trainer is not None:
            self.steps.accumulate = self.trainer.accumulate_grad_batches
            self.steps.limit = self.trainer.num_training_batches
        self.steps.start, self._start = self._start, 0
        yield from super().__iter__()

    def _layout(self) -> dict[str, Any]:
        assert self.trainer is not None
        return self.layout | {"trainer.accumulate_grad_batches": self.trainer.accumulate_grad_batches}

    def state_dict(self) -> dict[str, Any]:
        """Place within the epoch, and what it refers to."""
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return {
            "processed": progress.processed % max(1, int(self.trainer.num_training_batches)),
            "layout": self._layout(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the stored place.

        Raises:
            UserError: the place lies within an epoch over other data, or otherwise dealt out.
        """
        if state["processed"]:
            stored, now = state["layout"], self._layout()
            sizes = ("data.per_device_batch_size", "trainer.devices")
            if math.prod(stored[size] for size in sizes) == math.prod(now[size] for size in sizes):
                now |= {size: stored[size] for size in sizes}  # the same rows in every micro-batch, dealt out otherwise
            check_layout(stored, now, "stands within an epoch")
        self._start = state["processed"]


def check_layout(stored: dict[str, Any], now: dict[str, Any], stands: str) -> None:
    """Refuses a place in data that are not those of the configuration.

    Raises:
        UserError: something differs.
    """
    remedy = ", or from a checkpoint at the end of an epoch" if "epoch" in stands else ""
    for name, value in stored.items():
        if name == "data" and now[name] != value:
            raise UserError(_other_data(stored["read"], now["read"], stands, remedy))
        if name != "read" and now.get(name) != value:
            raise UserError(
                f"{name}: {now.get(name)!r}, but the checkpoint {stands} with {value!r}; resume with the same "
                f"value{remedy}"
            )


def _other_data(stored: dict[str, Any], now: dict[str, Any], stands: str, remedy: str) -> str:
    """What the checkpoint's run read, and what to do about it."""
    differing = [name for name in stored if now.get(name) != stored[name]]
    anew = f"{remedy}, or start anew from the student's weights (distill export, model.student)"
    if not differing:
        return (
            f"data.dataset: {now['data.dataset']!r} holds other rows than when the checkpoint was written, which "
            f"{stands} of it, or other keys of data made them; restore it{anew}"
        )
    key, *others = differing
    also = "".join(f", {name}: {stored[name]!r} (now {now.get(name)!r})" for name in others)
    return (
        f"{key}: {now.get(key)!r}, but the checkpoint {stands} of rows made with {key}: {stored[key]!r}{also}; resume "
        f"with the same{anew}"
    )

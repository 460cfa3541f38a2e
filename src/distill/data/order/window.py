"""The micro-batches of one optimizer step, read before the first of them is handed out.

Where nobody knows the units of rows that were not read yet, a step's counts are known only once all of its
micro-batches are there, on every rank. A window holds them in memory for that long; the sum over ranks is one small
collective per step between hosts, so no device waits for it. Whatever rewrites rows before they are trained on does
so here too, before they are counted.

Letters: W ranks, A micro-batches per optimizer step and rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from distill.batch import Batch

KINDS = ("tokens", "queries", "micro_batches")


class Hosts:
    """All ranks of a run, which communicate between their hosts' memories whatever the devices use."""

    def __init__(self) -> None:
        self._group: Any = None

    def __len__(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    def sum(self, counts: list[int]) -> list[int]:
        """Counts added up over the ranks, each of which calls this."""
        if len(self) == 1:
            return counts
        total = torch.tensor(counts)
        dist.all_reduce(total, group=self._connected())
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """What each rank has, by rank; all of them call this."""
        values = [value] * len(self)
        if len(self) > 1:
            dist.all_gather_object(values, value, group=self._connected())
        return values

    def _connected(self) -> Any:
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        return self._group


@dataclass(frozen=True)
class StepWindow:
    """What one rank reads for one optimizer step.

    Args:
        first: micro-batches of the epoch before it.
        batches: at most A micro-batches, each with the units of its own rows.
    """

    first: int
    batches: list[Batch]

    @property
    def stop(self) -> int:
        """Micro-batches of the epoch up to its end."""
        return self.first + len(self.batches)

    def counted(self, hosts: Hosts, start: int = 0) -> Iterator[Batch]:
        """The micro-batches with the units of the whole step over all ranks.

        Args:
            hosts: all ranks, which read as many micro-batches of this step.
            start: micro-batch of the epoch from which on they are handed out; those before it count all the same.
        """
        kinds = [*KINDS, *(kind for kind in ("targets",) if kind in self.batches[0].units)]
        of_rows = [[batch.units.get(kind, 1) for kind in kinds] for batch in self.batches]
        counts = hosts.sum([sum(column) for column in zip(*of_rows, strict=True)])
        units = dict(zip(kinds, counts, strict=True))
        for batch in self.batches[max(0, start - self.first) :]:
            yield replace(batch, units=units)

"""The loader of streams: batches that carry the counts of their optimizer step, and a place to resume from.

Nobody knows the units of rows that were not read. So the window of an optimizer step is read before its first
micro-batch is handed out, and its counts are summed over the ranks. The price: one window of batches in memory and one
small collective per step, on the host, so that no device waits for it.

Letters: W ranks, A micro-batches per optimizer step and rank.
"""

from collections import deque
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from distill.data.order.loader import check_layout
from distill.data.order.stream import COUNTS, Place, StreamBatches

KINDS = ("tokens", "queries", "micro_batches")


class StreamLoader(DataLoader):
    """A training loader without length that Lightning saves and resumes to the micro-batch.

    It stores the place behind what was processed rather than read, since windows and workers read ahead.

    Args:
        dataset: micro-batches of this rank.
        trainer: whose accumulation, limit and progress count; without one, every micro-batch is a step.
        layout: what makes a place meaningful (data, seed, sizes); plain values.
        options: of `DataLoader`.
    """

    def __init__(
        self, dataset: StreamBatches, trainer: L.Trainer | None, layout: dict[str, Any], **options: Any
    ) -> None:
        generator = torch.Generator().manual_seed(0)  # the default draws from the global one
        super().__init__(dataset, batch_size=None, generator=generator, **options)
        self.batches, self.trainer, self.layout = dataset, trainer, layout
        self.place = dataset.place
        self._start = 0
        self._group: Any = None
        self._places: deque[tuple[int, Place]] = deque(maxlen=4)  # micro-batches of the epoch, the place behind them

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        trainer = self.trainer
        accumulate = trainer.accumulate_grad_batches if trainer is not None else 1
        limit = trainer.num_training_batches if trainer is not None else float("inf")
        start, self._start = self._start, 0
        number = start // accumulate * accumulate
        self.batches.place = self.place
        self._places.clear()
        self._places.append((number, self.place))
        turn, readers = self.place["turn"], list(self.place["readers"])
        stream = super().__iter__()
        while number < limit:
            window = []
            for _ in range(int(min(accumulate, limit - number))):
                batch, readers[turn] = next(stream)
                turn = (turn + 1) % len(readers)
                window.append(batch)
            units = self._whole_step([batch["units"] for batch in window])
            self.place = {"turn": turn, "readers": list(readers)}
            self._places.append((number + len(window), self.place))
            for batch in window[max(0, start - number) :]:
                yield batch | {"units": units}
            number += len(window)

    def _whole_step(self, units: list[dict[str, int]]) -> dict[str, int]:
        """Counts of a window over all ranks."""
        counts = torch.tensor([sum(unit.get(kind, 1) for unit in units) for kind in KINDS])
        if self._ranks() > 1:
            dist.all_reduce(counts, group=self._hosts())
        return dict(zip(KINDS, counts.tolist(), strict=True))

    def _ranks(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    def _hosts(self) -> Any:
        """A group of all ranks that communicates between hosts' memories, whatever the devices use."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        return self._group

    def counts(self) -> dict[str, int]:
        """Documents that this rank has read, and those of them that were cut."""
        readers = [reader for reader in self.place["readers"] if reader is not None]
        return {name: sum(reader[name] for reader in readers) for name in COUNTS}

    def _layout(self) -> dict[str, Any]:
        assert self.trainer is not None
        return self.layout | {"trainer.accumulate_grad_batches": self.trainer.accumulate_grad_batches}

    def state_dict(self) -> dict[str, Any]:
        """Places of all ranks, and what they refer to."""
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        limit = self.trainer.num_training_batches
        done = progress.processed
        _, place = max(
            (known for known in self._places if known[0] <= done), default=(0, self.place), key=itemgetter(0)
        )
        places = [place]
        if self._ranks() > 1:
            places = [place] * self._ranks()
            dist.all_gather_object(places, place, group=self._hosts())
        processed = done % int(limit) if limit != float("inf") else done
        return {"processed": processed, "places": places, "layout": self._layout()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the stored place.

        Raises:
            UserError: it is one of other data, or otherwise dealt out.
        """
        check_layout(state["layout"], self._layout(), "stands within a stream")
        self._start = state["processed"]
        self.place = state["places"][self.batches.rank]

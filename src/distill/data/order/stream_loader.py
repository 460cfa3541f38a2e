"""The loader of streams: batches that carry the counts of their optimizer step, and a place to resume from.

It reads a step's micro-batches as a window, see `StepWindow`, so it stores the place behind what was processed and not
behind what windows and workers have read ahead.

Letters: W ranks, A micro-batches per optimizer step and rank.
"""

from collections import deque
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import lightning as L

from distill.batch import Batch
from distill.data.documents.forms import form_of
from distill.data.order.loader import Reader, TrainingLoader, check_layout
from distill.data.order.stream import COUNTS, Place, Stream, StreamBatches
from distill.data.order.window import Hosts, StepWindow
from distill.data.rows.packing import fingerprint
from distill.data.rows.paired import Pairing


class StreamLoader(TrainingLoader):
    """A training loader without length that Lightning saves and resumes to the micro-batch.

    Args:
        dataset: micro-batches of this rank.
        trainer: whose accumulation, limit and progress count; without one, every micro-batch is a step.
        layout: what makes a place meaningful (data, seed, sizes); plain values.
        options: of `DataLoader`.
    """

    def __init__(
        self, dataset: StreamBatches, trainer: L.Trainer | None, layout: dict[str, Any], **options: Any
    ) -> None:
        super().__init__(dataset, trainer, layout, batch_size=None, **options)
        self.batches, self.hosts = dataset, Hosts()
        self.place = dataset.place
        self._places: deque[tuple[int, Place]] = deque(maxlen=4)  # micro-batches of the epoch, the place behind them

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        accumulate, limit = self.window()
        start, self._start = self._start, 0
        number = start // accumulate * accumulate
        self.batches.place = self.place
        self._places.clear()
        self._places.append((number, self.place))
        turn, readers = self.place["turn"], list(self.place["readers"])
        stream = self.read()
        while number < limit:
            batches = []
            for _ in range(int(min(accumulate, limit - number))):
                batch, readers[turn] = next(stream)
                turn = (turn + 1) % len(readers)
                batches.append(batch)
            window = StepWindow(number, batches)
            counted = window.counted(self.hosts, start)
            self.place = {"turn": turn, "readers": list(readers)}
            self._places.append((window.stop, self.place))
            yield from counted
            number = window.stop

    def counts(self) -> dict[str, int]:
        """Documents that this rank has read, and those of them that were cut."""
        readers = [reader for reader in self.place["readers"] if reader is not None]
        return {name: sum(reader[name] for reader in readers) for name in COUNTS}

    def state_dict(self) -> dict[str, Any]:
        """Places of all ranks, and what they refer to."""
        known = [place for place in self._places if place[0] <= self.processed()]
        _, place = max(known, default=(0, self.place), key=itemgetter(0))
        return super().state_dict() | {"places": self.hosts.gather(place)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the stored place.

        Raises:
            UserError: it is one of other data, or otherwise dealt out.
        """
        check_layout(state["layout"], self.laid_out(), "stands within a stream")
        self._start = state["processed"]
        self.place = state["places"][self.batches.rank]


def stream_loader(
    streams: list[Stream],
    reader: Reader,
    trainer: L.Trainer | None,
    read: dict[str, Any],
    made_of: list[Any],
    pad_id: int,
    pairing: Pairing | None = None,
) -> StreamLoader:
    """The loader of training streams.

    Args:
        streams: the sources.
        reader: how this process reads.
        trainer: see `StreamLoader`.
        read: what the user asked for, for an error that says what has changed since a checkpoint was written.
        made_of: plain values on which the documents and their rows depend.
        pad_id: token that pads.
        pairing: of streams with tokens of two tokenizers.
    """
    options = [stream.packer.encoder.key(form_of(list(stream.columns))) for stream in streams]
    layout = reader.layout(read, fingerprint(options, *made_of))
    layout |= {"data.num_workers": reader.workers, "data.shuffle_buffer": streams[0].block}
    ranks = (reader.rank, reader.world_size, reader.workers)
    batches = StreamBatches(streams, reader.batch_size, pad_id, *ranks, pairing)
    return StreamLoader(batches, trainer, layout, **reader.options())

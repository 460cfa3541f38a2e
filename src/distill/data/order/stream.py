"""Data that are read while they train: an endless order of rows, cut into micro-batches, resumable to the bit.

`datasets` reads documents and remembers its place; blocks of them are packed and shuffled at once, so a place is the
one before a block and the number of rows that were taken of it. Each worker of each rank is a reader of its own with
its share of the files or, where these cannot be dealt out evenly, of the blocks. Rows are shuffled within `block`
documents only, what does not fill a row at the end of a block leaves it short, and readers that share the same files
each read them whole, though they encode only their own blocks.

A reader starts over when its share ends, with the files in another order. Shares differ by a file's or a block's size,
so readers start over at different times.

Letters: W ranks.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from distill.batch import Batch
from distill.data.documents.files import open_stream
from distill.data.documents.forms import form_of
from distill.data.documents.sources import Source
from distill.data.rows.packing import Packer, no_labels
from distill.data.rows.paired import Pairing
from distill.data.rows.table import collate
from distill.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset

COUNTS = ("documents", "cut_documents", "cut_tokens")  # of the rows that were read

Place = dict[str, Any]  # plain values, for a checkpoint
Row = dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """One source, and how its documents become rows.

    Args:
        documents: as they are read.
        columns: of the form, see `recognise`.
        packer: of each block.
        block: documents that are read, packed and shuffled at once.
        seed: of the order of files and rows.
        held_out: share of the documents that validation has; which ones depends on their content alone.
        weight: share of the rows in a mixture.
    """

    documents: "IterableDataset"
    columns: dict[str, str]
    packer: Packer
    block: int = 1000
    seed: int = 0
    held_out: float = 0.0
    weight: float = 1.0

    def rows(self, block: dict[str, list[Any]], validation: bool = False) -> list[Row]:
        """Rows of a block of documents."""
        columns = {own: block[name] for own, name in self.columns.items()}
        if self.held_out:
            keep = [self._is_held_out(document) == validation for document in zip(*columns.values(), strict=True)]
            columns = {
                name: [value for value, kept in zip(values, keep, strict=True) if kept]
                for name, values in columns.items()
            }
        return replace(self.packer, documents=None).rows(columns)

    def _is_held_out(self, document: tuple[Any, ...]) -> bool:
        return zlib.crc32(json.dumps(document, default=str).encode()) < self.held_out * 2**32

    def read(self, place: Place | None, reader: int, readers: int) -> Iterator[tuple[Row, Place]]:
        """Rows without end, each with the place behind it.

        Args:
            place: to go on from; None = the beginning.
            reader: number of this reader.
            readers: among whom the documents are shared.

        Raises:
            UserError: a whole pass has no row.
        """
        epoch, source, number, skip = place["at"] if place else (0, None, 0, 0)
        shared = self.documents.num_shards % readers == 0
        # Another object in any case: an epoch lies in memory that forked workers share, and each reader is in its own.
        documents = self.documents.shard(*((readers, reader) if shared else (1, 0)), contiguous=False)
        while True:
            documents.set_epoch(int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]))
            if source is not None:
                documents.load_state_dict(source)
            empty = source is None
            for block in documents.iter(self.block):
                if shared or number % readers == reader:
                    rows = self.rows(block)
                    order_R = np.random.default_rng([self.seed, epoch, number, reader]).permutation(len(rows))
                    for taken in range(skip, len(rows)):
                        yield rows[order_R[taken]], {"at": [epoch, source, number, taken + 1]}
                    empty &= not rows
                source, number, skip = documents.state_dict(), number + 1, 0
            if empty:
                if not shared and number <= reader:
                    raise UserError(
                        f"data.shuffle_buffer: {self.block} documents make {number} blocks for {readers} readers "
                        "(ranks x workers); lower it, or give a multiple of them in files"
                    )
                raise no_labels(
                    "data.dataset", number * self.block, self.packer.sequence_length, form_of(list(self.columns))
                )
            epoch, source, number, skip = epoch + 1, None, 0, 0

    def first_block(self) -> tuple[int, list[Row]]:
        """Number of documents and training rows of the first block."""
        block = next(iter(self.documents.iter(self.block)))
        return len(next(iter(block.values()))), self.rows(block)

    def validation_rows(self, count: int) -> list[Row]:
        """The first rows that are held out; of a stream that holds out none, its first rows."""
        rows: list[Row] = []
        for block in self.documents.iter(self.block):
            rows += self.rows(block, validation=True)
            if len(rows) >= count:
                break
        return rows[:count]


def beginning(source: str | list[str], number: int, document: tuple[Any, ...]) -> str:
    """What error messages call a document of a stream, which has no number: its source and how it begins."""
    return f"{source}, the document {json.dumps(document[0], ensure_ascii=False, default=str)[:60]}..."


def open_streams(
    sources: Sequence[tuple[Source, str]],
    packer: Packer,
    block: int,
    seed: int,
    held_out: float = 0.0,
    tell: Callable[[str], object] = str,
) -> list[Stream]:
    """The streams of several sources.

    Args:
        sources: each with the YAML key that names it.
        packer: of their documents.
        block: see `Stream`, as for what follows.
        seed: likewise.
        held_out: likewise.
        tell: see `open_stream`.

    Raises:
        UserError: a source cannot be read, or several have no weights.
    """
    if len(sources) > 1 and not all(source.weight for source, _ in sources):
        raise UserError("data.dataset: streams have no known length to be mixed by; give every part a weight")
    streams = []
    for source, key in sources:
        documents, columns = open_stream(source.dataset, **source.options(), key=key, tell=tell)
        encoder = replace(packer.encoder, place=partial(beginning, source.dataset))
        own = replace(packer, encoder=encoder)
        streams.append(Stream(documents, columns, own, block, seed, held_out, source.weight or 1.0))
    return streams


def validation_rows(streams: list[Stream], count: int) -> list[Row]:
    """About `count` rows to validate on, in the shares of the weights."""
    total = sum(stream.weight for stream in streams)
    return [row for s in streams for row in s.validation_rows(max(1, int(count * s.weight / total)))]


class StreamBatches(torch.utils.data.IterableDataset):
    """Micro-batches of one rank without end, each with the place behind it; sources take turns by their weights.

    Args:
        streams: the sources.
        batch_size: rows per micro-batch.
        pad_id: token that pads.
        rank: of this process.
        world_size: W.
        workers: processes that read.
        pairing: of rows with tokens of two tokenizers; None = of one.
    """

    def __init__(
        self, streams: list[Stream], batch_size: int, pad_id: int, rank: int, world_size: int, workers: int,
        pairing: Pairing | None = None,
    ) -> None:  # fmt: skip
        self.streams, self.batch_size, self.pad_id, self.pairing = streams, batch_size, pad_id, pairing
        self.rank, self.world_size, self.workers = rank, world_size, max(1, workers)
        self.place: Place = {"turn": 0, "readers": [None] * self.workers}

    def __iter__(self) -> Iterator[tuple[Batch, Place]]:
        worker = get_worker_info()
        mine = ((worker.id if worker is not None else 0) + self.place["turn"]) % self.workers
        reader, readers = self.rank * self.workers + mine, self.world_size * self.workers
        start = self.place["readers"][mine] or {
            "sources": [None] * len(self.streams),
            "rows": [0] * len(self.streams),
            **dict.fromkeys(COUNTS, 0),
        }
        places, taken = list(start["sources"]), list(start["rows"])
        counts = {name: start[name] for name in COUNTS}
        sources = [stream.read(place, reader, readers) for stream, place in zip(self.streams, places, strict=True)]
        while True:
            rows = []
            for _ in range(self.batch_size):
                due = min(range(len(sources)), key=lambda i: (taken[i] + 1) / self.streams[i].weight)
                row, places[due] = next(sources[due])
                taken[due] += 1
                rows.append(row)
                for name in COUNTS:
                    counts[name] += row[name]
            kinds = ("tokens", "queries") if self.pairing is None else ("tokens", "queries", "targets")
            units = {name: sum(row[name] for row in rows) for name in kinds}
            length = self.streams[0].packer.sequence_length
            batch = collate(rows, length, self.pad_id, units, pairing=self.pairing)
            yield batch, {"sources": list(places), "rows": list(taken), **counts}

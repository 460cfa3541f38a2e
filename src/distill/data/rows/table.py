"""Rows become batches that carry the unit counts of their optimizer step.

All batches have one shape and pad on the right, or, where rows are grouped by length, the shape of their longest row,
rounded up so that a compiled model sees few of them. Packed rows keep their documents apart through `position_ids`
alone, from which transformers derives the attention mask, so where `packed` is true models must be called without an
attention mask and without a cache.

Letters: R rows, B rows of a batch, L sequence length, N valid tokens of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distill.batch import IGNORE, Batch, Tokens
from distill.data.rows.digests import row_digests


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


if TYPE_CHECKING:
    from datasets import Dataset

MULTIPLE = 64  # to which the length of a batch of grouped rows is rounded up


class PackedRows(torch.utils.data.Dataset):
    """Some rows of a packed table, read as whole batches.

    Args:
        table: see `pack`.
        indices: which rows.
        sequence_length: L.
        pad_id: token that pads.
        shortest: pad batches to their longest row instead of L.
        first_number: what batches call the table's first row, so that rows of two tables have numbers of their own.
    """

    def __init__(
        self,
        table: "Dataset",
        indices: np.ndarray,
        sequence_length: int,
        pad_id: int,
        shortest: bool = False,
        first_number: int = 0,
    ) -> None:
        self.table = table.with_format("numpy")
        self.indices, self.sequence_length, self.pad_id, self.shortest = indices, sequence_length, pad_id, shortest
        self.first_number = first_number
        self.units_R = {name: self.column(name) for name in ("tokens", "queries")}

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, int64 [R]."""
        return np.asarray(self.table[name][:])[self.indices]

    def numbers_R(self) -> np.ndarray:
        """What batches call these rows, int64 [R]."""
        return self.indices.astype(np.int64) + self.first_number

    def digests_R2(self) -> np.ndarray:
        """Digests by which the rows are known again, uint64 [R, 2]."""
        return row_digests(self.table, self.indices)

    def lengths_R(self) -> np.ndarray:
        """Tokens of each row, int64 [R]."""
        import pyarrow.compute as pc

        return pc.list_value_length(self.table.data.column("input_ids")).to_numpy()[self.indices].astype(np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.table[int(self.indices[index])]

    def _read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows in one read of the table, a sixth of the time that one by one takes."""
        if not len(indices):
            return []
        columns = self.table[[int(self.indices[index]) for index in indices]]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def __getitems__(self, micro_batch: MicroBatch) -> Batch:
        """The batch that a sampler asks for; the units travel with the request."""
        rows = self._read(micro_batch.indices)
        length = self.sequence_length
        if self.shortest:
            length = shape_of(rows, length)
        numbers = tuple(int(self.indices[index]) + self.first_number for index in micro_batch.indices)
        return collate(rows, length, self.pad_id, micro_batch.units, numbers)


def shape_of(rows: Sequence[dict[str, Any]], sequence_length: int) -> int:
    """Length of a batch that holds its longest row, a multiple of MULTIPLE or `sequence_length`."""
    longest = max((len(row["input_ids"]) for row in rows), default=1)
    return min(sequence_length, -(-longest // MULTIPLE) * MULTIPLE)


def collate(
    rows: Sequence[dict[str, Any]],
    sequence_length: int,
    pad_id: int,
    units: dict[str, int],
    numbers: tuple[int, ...] = (),
) -> Batch:
    """A batch of packed rows, or one dummy row without labels where there are none.

    Args:
        rows: with input_ids, labels, document_lengths and bytes.
        sequence_length: L.
        pad_id: token that pads on the right.
        units: passed through.
        numbers: of the rows in their table, passed through.
    """
    shape = (max(1, len(rows)), sequence_length)
    input_ids_BL, labels_BL = np.full(shape, pad_id), np.full(shape, IGNORE)
    attention_mask_BL, position_ids_BL = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    segments_D: list[np.ndarray] = []
    for b in range(shape[0]):
        lengths = np.asarray(rows[b]["document_lengths"], dtype=np.int64) if rows else np.zeros(0, dtype=np.int64)
        used = int(lengths.sum())
        if rows:
            input_ids_BL[b, :used], labels_BL[b, :used] = rows[b]["input_ids"], rows[b]["labels"]
        attention_mask_BL[b, :used] = 1
        segments = np.append(lengths, sequence_length - used)  # padding is a document of its own
        segments_D.append(segments[segments > 0])
        position_ids_BL[b] = np.arange(sequence_length) - np.repeat(np.cumsum(segments) - segments, segments)
    shifted_BL = np.roll(labels_BL, -1, axis=1)
    shifted_BL[:, -1] = IGNORE
    lengths_D = np.concatenate(segments_D)
    tokens = Tokens(
        input_ids=torch.from_numpy(input_ids_BL),
        labels=torch.from_numpy(labels_BL),
        attention_mask=torch.from_numpy(attention_mask_BL),
        position_ids=torch.from_numpy(position_ids_BL),
        positions=torch.from_numpy(np.flatnonzero(shifted_BL != IGNORE)),
        packed=any(len(row["document_lengths"]) > 1 for row in rows),
        starts=torch.from_numpy(np.append(0, np.cumsum(lengths_D)).astype(np.int32)),
        longest=int(lengths_D.max()),
    )
    return Batch(tokens, tokens, units, int(sum(row["bytes"] for row in rows)), numbers)


def as_is(batch: Batch) -> Batch:
    """What a loader collates with whose data set gives whole batches."""
    return batch

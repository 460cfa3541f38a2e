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
from distill.data.rows.paired import Pairing


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
        pairing: of rows with tokens of two tokenizers; None = of one. Batches of these are padded to their longest row.
    """

    def __init__(
        self,
        table: "Dataset",
        indices: np.ndarray,
        sequence_length: int,
        pad_id: int,
        shortest: bool = False,
        first_number: int = 0,
        pairing: Pairing | None = None,
    ) -> None:
        self.table = table.with_format("numpy")
        self.indices, self.sequence_length, self.pad_id, self.shortest = indices, sequence_length, pad_id, shortest
        self.first_number, self.pairing = first_number, pairing
        kinds = ("tokens", "queries") if pairing is None else ("tokens", "queries", "targets")
        self.units_R = {name: self.column(name) for name in kinds}

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
        length = shape_of(rows, self.sequence_length) if self.shortest else self.sequence_length
        numbers = tuple(int(self.indices[index]) + self.first_number for index in micro_batch.indices)
        return collate(rows, length, self.pad_id, micro_batch.units, numbers, self.pairing)


def shape_of(rows: Sequence[dict[str, Any]], sequence_length: int) -> int:
    """Length of a batch that holds its longest row, a multiple of MULTIPLE or `sequence_length`."""
    longest = max((len(row["input_ids"]) for row in rows), default=1)
    return min(sequence_length, -(-max(longest, 1) // MULTIPLE) * MULTIPLE)


def collate(
    rows: Sequence[dict[str, Any]],
    sequence_length: int,
    pad_id: int,
    units: dict[str, int],
    numbers: tuple[int, ...] = (),
    pairing: Pairing | None = None,
) -> Batch:
    """A batch of packed rows, or one dummy row without labels where there are none.

    Args:
        rows: with input_ids, labels, document_lengths and bytes.
        sequence_length: L.
        pad_id: token that pads on the right.
        units: passed through.
        numbers: of the rows in their table, passed through.
        pairing: of rows that have a teacher's side too.
    """
    text_bytes = int(sum(row["bytes"] for row in rows))
    if pairing is None:
        tokens = _padded(rows, sequence_length, pad_id)
        return Batch(tokens, tokens, units, text_bytes, numbers)
    student = _padded(rows, shape_of(rows, sequence_length), pad_id)
    theirs = [_of_teacher(row) for row in rows]
    teacher = _padded(theirs, shape_of(theirs, sequence_length), pairing.pad_id)
    places = (teacher.input_ids.numpy(), student.input_ids.numpy(), student.positions.numpy())
    return Batch(student, teacher, units, text_bytes, numbers, pairing.pairs(rows, *places))


def _of_teacher(row: dict[str, Any]) -> dict[str, Any]:
    """The teacher's side of a row as if there were no other; all of its tokens but the first of a document count."""
    lengths = np.asarray(row["teacher_document_lengths"], dtype=np.int64)
    labels_L = np.array(row["teacher_input_ids"])
    labels_L[np.cumsum(lengths) - lengths] = IGNORE
    return {"input_ids": row["teacher_input_ids"], "labels": labels_L, "document_lengths": lengths}


def _padded(rows: Sequence[dict[str, Any]], sequence_length: int, pad_id: int) -> Tokens:
    """One side's tokens of some rows."""
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
    return Tokens(
        input_ids=torch.from_numpy(input_ids_BL),
        labels=torch.from_numpy(labels_BL),
        attention_mask=torch.from_numpy(attention_mask_BL),
        position_ids=torch.from_numpy(position_ids_BL),
        positions=torch.from_numpy(np.flatnonzero(shifted_BL != IGNORE)),
        packed=any(len(row["document_lengths"]) > 1 for row in rows),
        starts=torch.from_numpy(np.append(0, np.cumsum(lengths_D)).astype(np.int32)),
        longest=int(lengths_D.max()),
    )


def joined(tables: list["Dataset"]) -> list["Dataset"]:
    """Tables as one."""
    from datasets import concatenate_datasets

    return tables if len(tables) < 2 else [concatenate_datasets(tables)]


def as_is(batch: Batch) -> Batch:
    """What a loader collates with whose data set gives whole batches."""
    return batch

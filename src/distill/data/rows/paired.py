"""Rows that both sides read, each with its own tokens, cut where both have a boundary.

A row is full when either side has `sequence_length` tokens. Where a document's next common boundary lies further away
than that, it is the student's alone. The bytes behind the tokens stand in the row, so that a batch can tell by itself
where the tokens meet.

Letters: S tokens of the student in a row, T of the teacher, N valid tokens of the student in a batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distill.batch import IGNORE, Pairs
from distill.data.documents.forms import goes_on
from distill.data.documents.paired import GAP, Paired, PairedEncoder
from distill.data.rows.packing import LISTS, NUMBERS, Packer, Piece, best_fit, make_row
from distill.vocabularies.pair import VocabularyPair
from distill.vocabularies.places import places

PAIRED_LISTS = ("teacher_input_ids", "teacher_document_lengths", "ends", "teacher_ends")
PAIRED_NUMBERS = (
    "targets",  # of its tokens, those for which the teacher says something
    "inside",  # of these, the ones that begin within a token of the teacher
    "unshared",  # documents that begin in the row and whose tokens do not spell one text on both sides
)


@dataclass(frozen=True)
class Pairing:
    """What makes pairs of batches.

    Args:
        vocabularies: of both sides.
        pad_id: that pads the teacher's rows.
    """

    vocabularies: VocabularyPair
    pad_id: int

    def pairs(
        self, rows: Sequence[dict[str, Any]], teacher_ids_BT: np.ndarray, student_ids_BS: np.ndarray,
        positions_N: np.ndarray,
    ) -> Pairs:  # fmt: skip
        """How the tokens of a batch meet.

        Args:
            rows: of the batch.
            teacher_ids_BT: padded.
            student_ids_BS: padded.
            positions_N: flat indices of the student's valid tokens.
        """
        length, their_length = student_ids_BS.shape[1], teacher_ids_BT.shape[1]
        place_N, inside_N = np.full(len(positions_N), -1), np.zeros(len(positions_N), dtype=np.int64)
        for b, row in enumerate(rows):
            here = slice(*np.searchsorted(positions_N, (b * length, (b + 1) * length)))
            found, inside_N[here] = meet(row, positions_N[here] - b * length, self.vocabularies)
            place_N[here] = np.where(found >= 0, found + b * their_length, -1)
        student_T, teacher_T = student_ids_BS.reshape(-1), teacher_ids_BT.reshape(-1)
        behind_N = student_T[positions_N + 1]
        return self.vocabularies.pairs(teacher_T, place_N, inside_N, student_T[positions_N], behind_N)


def meet(row: dict[str, Any], positions: np.ndarray, vocabularies: VocabularyPair) -> tuple[np.ndarray, np.ndarray]:
    """Where some of the student's positions of a row stand between the teacher's tokens.

    Args:
        row: with both sides' ids and ends.
        positions: within the row.
        vocabularies: of both sides.

    Returns:
        The teacher's position of each, -1 for none, and the bytes of the teacher's next token that lie before it.
    """
    ids_T, ends_T = np.asarray(row["teacher_input_ids"]), np.asarray(row["teacher_ends"], dtype=np.int64)
    goes_on_T = ends_T >= 0
    goes_on_T[np.cumsum(row["teacher_document_lengths"]) - 1] = False  # nothing of its document follows there
    known_T = np.flatnonzero(goes_on_T)
    ends_N = np.asarray(row["ends"], dtype=np.int64)[positions]
    found, inside = np.full(len(positions), -1), np.zeros(len(positions), dtype=np.int64)
    known_N = np.flatnonzero(ends_N >= 0)
    at = places(ends_T[known_T], ends_N[known_N])
    known_N, at = known_N[at >= 0], at[at >= 0]
    place = known_T[at]
    within = ends_N[known_N] - ends_T[place]
    fits = (within == 0) | (within < vocabularies.teacher.lengths[ids_T[place + 1]])
    found[known_N[fits]], inside[known_N[fits]] = place[fits], within[fits]
    return found, inside


@dataclass(frozen=True, eq=False)
class _Part:
    """Tokens of one document in a row; whether it begins with them."""

    document: Paired
    ours: slice
    theirs: slice
    cut_tokens: int = 0

    @property
    def lead(self) -> int:
        """The teacher's tokens that are put before it again."""
        return self.document.lead if self.theirs.start > 0 else 0

    def of_teacher(self) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's ids and ends, with what comes before a text."""
        ids_T, ends_T, lead = self.document.teacher_T, self.document.teacher_ends_T, self.lead
        ends = ends_T[self.theirs]
        if lead:
            ends = np.concatenate([np.full(lead - 1, -1), [ends_T[self.theirs.start - 1]], ends])
        return np.concatenate([ids_T[:lead], ids_T[self.theirs]]), ends


@dataclass
class PairedPacker(Packer):
    """Turns batches of documents into rows of both sides; see `Packer`.

    Args:
        encoder: of the documents.
    """

    encoder: PairedEncoder  # type: ignore[assignment]
    parts: list[_Part] = field(default_factory=list, init=False)  # of the unfinished row

    lists = (*LISTS, *PAIRED_LISTS)
    numbers = (*NUMBERS, *PAIRED_NUMBERS)

    def rows(self, batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
        """The rows that a batch of the columns of a form completes."""
        documents = self.encoder(batch, self.seen)
        self.seen += len(next(iter(batch.values())))
        packed = self._joined(documents) if goes_on(list(batch)) else self._fitted(documents)
        made = (paired_row(parts, self.encoder.vocabularies) for parts in packed)
        return [row for row in made if row["tokens"]]

    def _joined(self, documents: Sequence[Paired]) -> Iterator[list[_Part]]:
        """Documents one behind the other, or each by itself, in rows that are as full as common boundaries allow."""
        for document in documents:
            if len(document.student[0]) < 2:
                continue
            yield from self._laid(document)
            if not self.packing:
                yield from self._finished()
        if self.documents is None or self.seen == self.documents:
            yield from self._finished()

    def _laid(self, document: Paired) -> Iterator[list[_Part]]:
        """The rows that a document fills; what it begins is kept."""
        length = self.sequence_length
        ours, theirs = document.cuts()
        if max(np.diff(ours).max(), np.diff(theirs).max() + document.lead) > length:
            document = document.alone()
            ours, theirs = document.cuts()
        at = 0
        while at < len(ours) - 1:
            room = [length - sum(size) for size in zip(*(_sizes(part) for part in self.parts), strict=True)]
            room = room or [length, length]
            room[1] -= document.lead if at else 0
            last = min(
                np.searchsorted(side, side[at] + free, side="right") - 1
                for side, free in zip((ours, theirs), room, strict=True)
            )
            if last > at:
                self.parts.append(_Part(document, slice(ours[at], ours[last]), slice(theirs[at], theirs[last])))
                at = int(last)
            if at < len(ours) - 1:
                yield from self._finished()

    def _finished(self) -> Iterator[list[_Part]]:
        """The row that was begun."""
        parts, self.parts = self.parts, []
        if parts:
            yield parts

    def _fitted(self, documents: Sequence[Paired]) -> Iterator[list[_Part]]:
        """Documents cut to at most a row each and put together as they fit both sides."""
        length = self.sequence_length
        kept = []
        for document in documents:
            part = _first_part(document, length)
            if (document.student[1][1 : part.ours.stop] != IGNORE).any():
                kept.append(part)
        lengths = [max(_sizes(part)) for part in kept]
        bins = best_fit(lengths, length) if self.packing else [[index] for index in range(len(kept))]
        yield from ([kept[item] for item in items] for items in bins)


def _sizes(part: _Part) -> tuple[int, int]:
    return part.ours.stop - part.ours.start, part.theirs.stop - part.theirs.start + part.lead


def _first_part(document: Paired, length: int) -> _Part:
    """A document up to the last common boundary within a row."""
    size, their_size = len(document.student[0]), len(document.teacher_T)
    if max(size, their_size) <= length:
        return _Part(document, slice(0, size), slice(0, their_size))
    ours, theirs = document.cuts()
    last = min(np.searchsorted(side, length, side="right") - 1 for side in (ours, theirs))
    if last <= 0:
        document = document.alone()
        return _Part(document, slice(0, min(size, length)), slice(0, 0), max(0, size - length))
    return _Part(document, slice(0, ours[last]), slice(0, theirs[last]), size - ours[last])


def paired_row(parts: Sequence[_Part], vocabularies: VocabularyPair) -> dict[str, Any]:
    """One row of both sides; the ends of its parts are made to lie GAP apart."""
    base = GAP
    ends: list[np.ndarray] = []
    teacher_ends: list[np.ndarray] = []
    for part in parts:
        sides = part.document.ends_S[part.ours], part.of_teacher()[1]
        known = np.concatenate([side[side >= 0] for side in sides])
        shift = base - known.min() if len(known) else 0
        base += int(known.max() - known.min()) + GAP if len(known) else 0
        for side, moved in zip(sides, (ends, teacher_ends), strict=True):
            moved.append(np.where(side >= 0, side + shift, -1))
    starts = np.concatenate([np.arange(part.ours.start, part.ours.stop) == 0 for part in parts])
    ids, labels, text_bytes = (
        np.concatenate([part.document.student[n][part.ours] for part in parts]) for n in range(3)
    )
    cut = [part.cut_tokens for part in parts]
    row = make_row(Piece(ids, labels, text_bytes, starts, sum(n > 0 for n in cut), sum(cut)))
    row |= {
        "teacher_input_ids": np.concatenate([part.of_teacher()[0] for part in parts]),
        "teacher_document_lengths": np.array([size for _, size in map(_sizes, parts) if size], dtype=np.int32),
        "ends": np.concatenate(ends).astype(np.int32),
        "teacher_ends": np.concatenate(teacher_ends).astype(np.int32),
        "unshared": sum(not part.document.is_shared and part.ours.start == 0 for part in parts),
    }
    positions = np.flatnonzero(row["labels"][1:] != IGNORE)
    place, inside = meet(row, positions, vocabularies)
    begins_L = np.zeros(len(row["labels"]), dtype=bool)
    begins_L[np.cumsum(row["document_lengths"])[:-1]] = begins_L[0] = True
    queries = int(((place >= 0) & ~begins_L[positions]).sum())  # the others have no state of the teacher's beside them
    return row | {"targets": int((place >= 0).sum()), "inside": int((inside > 0).sum()), "queries": queries}

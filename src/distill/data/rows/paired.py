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

PAIRED_LISTS = ("teacher_input_ids", "teacher_document_lengths", "ends", "teacher_ends")
PAIRED_NUMBERS = (
    "targets",  # of its tokens, those for which the teacher says something
    "inside",  # of these, the ones that begin within a token of the teacher
    "unshared",  # documents that begin in the row and whose tokens do not spell one text on both sides
)

_ROW = 1 << 40  # bytes from one row to the next where several are looked at together


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
        row_N, at_N = np.divmod(positions_N, length)
        place_N, inside_N = meet(rows, row_N, at_N, self.vocabularies)
        place_N = np.where(place_N >= 0, place_N + row_N * their_length, -1)
        student_T, teacher_T = student_ids_BS.reshape(-1), teacher_ids_BT.reshape(-1)
        behind_N = student_T[positions_N + 1]
        return self.vocabularies.pairs(teacher_T, place_N, inside_N, student_T[positions_N], behind_N)


def meet(
    rows: Sequence[dict[str, Any]], row_N: np.ndarray, at_N: np.ndarray, vocabularies: VocabularyPair
) -> tuple[np.ndarray, np.ndarray]:
    """Where some of the student's positions stand between the teacher's tokens.

    Args:
        rows: with both sides' ids and ends.
        row_N: the row of each position, ascending.
        at_N: its place within the row.
        vocabularies: of both sides.

    Returns:
        The teacher's position of each within the row, -1 for none, and the bytes of the teacher's next token that lie
        before it.
    """
    found_N, inside_N = np.full(len(row_N), -1), np.zeros(len(row_N), dtype=np.int64)
    if not len(row_N):
        return found_N, inside_N
    ids_T = np.concatenate([row["teacher_input_ids"] for row in rows])
    starts_R, ends_S = _joined_ends([row["ends"] for row in rows])
    their_starts_R, ends_T = _joined_ends([row["teacher_ends"] for row in rows])
    goes_on_T = ends_T >= 0
    goes_on_T[np.cumsum(np.concatenate([row["teacher_document_lengths"] for row in rows])) - 1] = False
    known_T = np.flatnonzero(goes_on_T)  # at the others nothing of their document follows
    ends_N = ends_S[starts_R[row_N] + at_N]
    at = np.searchsorted(ends_T[known_T], ends_N, side="right") - 1
    known_N = np.flatnonzero((ends_N >= 0) & (at >= 0))
    place = known_T[at[known_N]]
    within = ends_N[known_N] - ends_T[place]
    fits = (within == 0) | (within < vocabularies.teacher.lengths[ids_T[place + 1]])
    kept_N = known_N[fits]
    found_N[kept_N], inside_N[kept_N] = place[fits] - their_starts_R[row_N[kept_N]], within[fits]
    return found_N, inside_N


def _joined_ends(ends: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Where each row begins among all, and the ends of all, those of each row beyond those before it."""
    sizes_R = np.array([len(row) for row in ends])
    joined = np.concatenate(ends).astype(np.int64)
    beyond = np.repeat(np.arange(len(ends)) * _ROW, sizes_R)
    return np.cumsum(sizes_R) - sizes_R, np.where(joined >= 0, joined + beyond, -1)


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
        made = [row for row in map(paired_row, packed) if row["tokens"]]
        return counted(made, self.encoder.vocabularies)

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


def paired_row(parts: Sequence[_Part]) -> dict[str, Any]:
    """One row of both sides, without what is counted of how they meet; the ends of its parts lie GAP apart."""
    base = GAP
    ends: list[np.ndarray] = []
    teacher_ends: list[np.ndarray] = []
    for part in parts:
        sides = part.document.ends_S[part.ours], part.of_teacher()[1]
        known = [side[side >= 0] for side in sides]
        first = min((side[0] for side in known if len(side)), default=0)
        shift, base = base - first, base + max((side[-1] for side in known if len(side)), default=0) - first + GAP
        for side, moved in zip(sides, (ends, teacher_ends), strict=True):
            moved.append(np.where(side >= 0, side + shift, -1))
    starts = np.concatenate([np.arange(part.ours.start, part.ours.stop) == 0 for part in parts])
    ids, labels, text_bytes = (
        np.concatenate([part.document.student[n][part.ours] for part in parts]) for n in range(3)
    )
    cut = [part.cut_tokens for part in parts]
    row = make_row(Piece(ids, labels, text_bytes, starts, sum(n > 0 for n in cut), sum(cut)))
    return row | {
        "teacher_input_ids": np.concatenate([part.of_teacher()[0] for part in parts]),
        "teacher_document_lengths": np.array([size for _, size in map(_sizes, parts) if size], dtype=np.int32),
        "ends": np.concatenate(ends).astype(np.int32),
        "teacher_ends": np.concatenate(teacher_ends).astype(np.int32),
        "unshared": sum(not part.document.is_shared and part.ours.start == 0 for part in parts),
    }


def counted(rows: list[dict[str, Any]], vocabularies: VocabularyPair) -> list[dict[str, Any]]:
    """The rows with their targets; queries are those of them that have an earlier token in their document."""
    if not rows:
        return rows
    starts_R = np.cumsum([0, *(len(row["labels"]) for row in rows)])
    learnt_S = np.concatenate([row["labels"] for row in rows])[1:] != IGNORE  # a row's first token never is
    places = np.flatnonzero(learnt_S)
    row_N = np.searchsorted(starts_R, places, side="right") - 1
    place_N, inside_N = meet(rows, row_N, places - starts_R[row_N], vocabularies)
    lengths_D = np.concatenate([row["document_lengths"] for row in rows])
    begins_S = np.zeros(starts_R[-1], dtype=bool)
    begins_S[np.cumsum(lengths_D) - lengths_D] = True
    taught_N = place_N >= 0
    of = {"targets": taught_N, "inside": inside_N > 0, "queries": taught_N & ~begins_S[places]}
    for name, counted_N in of.items():
        for row, count in zip(rows, np.bincount(row_N[counted_N], minlength=len(rows)).tolist(), strict=True):
            row[name] = count
    return rows

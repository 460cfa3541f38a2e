"""Where the teacher's next token leads to in the student's vocabulary.

A position of the student stands behind its token, at byte c. The teacher's last boundary at or before c is b, and its
position there says how the text goes on from b. Where c lies inside a token of the teacher, u = text[b:c] has been
written already: only tokens that strictly extend u can come, and what is left of them behind u is what the student has
to write. What is left goes to the first id of the student's own encoding of it.

Letters: T tokens of the teacher in a batch, N valid tokens of the student, E pairs of ids, G distinct u, I tokens of
the student with a u.
"""

from bisect import bisect_left, bisect_right
from functools import cached_property

import numpy as np
import torch

from distill.batch import Pairs, Spelling
from distill.vocabularies.token_bytes import TokenBytes


class VocabularyPair:
    """Teacher's and student's tokenizer.

    Args:
        teacher: as bytes.
        student: as bytes.

    Attributes:
        order: the teacher's ids that have bytes, sorted by them, int64.
    """

    def __init__(self, teacher: TokenBytes, student: TokenBytes) -> None:
        self.teacher, self.student = teacher, student
        with_bytes = sorted((token, number) for number, token in enumerate(teacher.tokens) if token)
        self.order = np.array([number for _, number in with_bytes], dtype=np.int64)
        self._sorted = [token for token, _ in with_bytes]
        self._extending: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def extending(self, seen: bytes) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's ids that strictly extend u, and the student's that what is left leads to, 2 x int64 [E].

        What the student cannot even begin to spell is left out.
        """
        if seen not in self._extending:
            first = bisect_right(self._sorted, seen)
            last = bisect_left(self._sorted, seen + b"\xff" * (self.teacher.longest + 1))
            rest = [token[len(seen) :] for token in self._sorted[first:last]]
            found = [(place, number) for place, number in enumerate(self.student.first_all(rest)) if number is not None]
            places, firsts = np.array(found, dtype=np.int64).reshape(-1, 2).T
            self._extending[seen] = self.order[first + places], firsts
        return self._extending[seen]

    @cached_property
    def firsts(self) -> np.ndarray:
        """The student's id that each of the teacher's leads to where both have a boundary, int64 [teacher's ids].

        The number of the student's ids stands for none. The end of a document leads to the end of a document, another
        special token to the one of the same text. A token that its own tokenizer does not write alone shows up within
        others only: what that tokenizer makes of its bytes says nothing of it, and it leads to the student's token of
        the same bytes.
        """
        teacher, student = self.teacher, self.student
        firsts = np.full(teacher.size, student.size, dtype=np.int64)
        alone = []
        for number, token, first in zip(
            self.order.tolist(), self._sorted, student.first_all(self._sorted), strict=True
        ):
            firsts[number] = student.size if first is None else first
            if (same := student.ids.get(token)) is not None and same != first:
                alone.append((number, token, same))
        for (number, _, same), ids in zip(alone, teacher.encode_all([token for _, token, _ in alone]), strict=True):
            if ids is None or len(ids) > 1:
                firsts[number] = same
        for text, number in teacher.specials.items():
            if number < teacher.size and text in student.specials:
                firsts[number] = student.specials[text]
        if teacher.eos is not None and student.eos is not None:
            firsts[teacher.eos] = student.eos
        return firsts

    @cached_property
    def classes(self) -> np.ndarray:
        """Class of each of the student's ids, named by one of its members, int64 [student's ids].

        Where the teacher begins a token of the student's with a shorter one, it says of both together how probable they
        are, as far as a row of it goes: they are one class, and so is all that hangs together in this way.
        """
        teacher, student = self.teacher, self.student
        parent = list(range(student.size))

        def root(number: int) -> int:
            while parent[number] != number:
                parent[number] = number = parent[parent[number]]
            return number

        with_bytes = [(number, token) for number, token in enumerate(student.tokens) if token]
        joined = []
        for (number, token), first in zip(with_bytes, teacher.first_all([t for _, t in with_bytes]), strict=True):
            if first is not None and teacher.lengths[first] < len(token) and self.firsts[first] < student.size:
                joined.append((number, token, int(self.firsts[first])))
        for (number, _, first), ids in zip(joined, student.encode_all([t for _, t, _ in joined]), strict=True):
            if ids is None or len(ids) == 1:  # the student does write it alone
                parent[root(number)] = root(first)
        return np.array([root(number) for number in range(student.size)], dtype=np.int64)

    def pairs(
        self, ids_T: np.ndarray, place_N: np.ndarray, inside_N: np.ndarray, own_N: np.ndarray, label_N: np.ndarray
    ) -> Pairs:
        """Where a batch's targets are to be had.

        Args:
            ids_T: the teacher's ids, the rows one after the other.
            place_N: index into them of the position that predicts on from b; -1 where there is no target.
            inside_N: bytes of u, in those of the token behind that position; 0 where both have a boundary.
            own_N: the student's id at each valid token.
            label_N: that behind it.
        """
        places_I = np.flatnonzero(inside_N)
        seen_I = [
            (self.teacher.tokens[number] or b"")[:length]
            for number, length in zip(ids_T[place_N[places_I] + 1].tolist(), inside_N[places_I].tolist(), strict=True)
        ]
        group_of = {seen: group for group, seen in enumerate(dict.fromkeys(seen_I), start=1)}
        entries = [self.extending(seen) for seen in group_of]
        starts_G = np.cumsum([0, *(len(ids) for ids, _ in entries)])
        group_N = np.where(place_N < 0, -1, 0)
        group_N[places_I] = [group_of[seen] for seen in seen_I]
        teacher_ids_E, student_ids_E = (
            torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *(entry[side] for entry in entries)]))
            for side in (0, 1)
        )
        return Pairs(
            teacher_N=torch.from_numpy(np.maximum(place_N, 0)),
            group_N=torch.from_numpy(group_N),
            starts_G=torch.from_numpy(starts_G),
            teacher_ids_E=teacher_ids_E,
            student_ids_E=student_ids_E,
            spelling=Spelling(ids_T, place_N, inside_N, own_N, label_N, group_N, starts_G),
        )

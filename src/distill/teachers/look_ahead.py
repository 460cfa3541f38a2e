"""Targets of another tokenizer past the text's own next tokens, and with the student's last token in view.

A row of the teacher ends at its next token. Where the student's token is longer, that row says nothing of what comes
behind the token; but behind the text's own next token t there is a row too, so t's mass can be parted by what follows
it, and so on along the text until the student's token is passed. And what is left of a token goes to the second id of
the student's encoding of its last token and the rest together, which may differ from that of the rest alone: mass on
what the student's tokenizer would have written in other tokens from the start is dropped, and the rest renormalised.

Both are done for the most probable tokens of a row, on the host and remembered; the others stay where the tables lead.
At T = 1 the products are probabilities of texts; at another temperature they are a heuristic.

Shapes: N valid tokens of the student, T positions of the teacher, K tokens of a row that are looked at, V vocabulary of
the teacher, A tokens of rows that do not stay where the tables lead, H shares of their mass.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from distill.batch import Pairs, Spelling
from distill.losses.engine.mapped import Ahead, inside_rows
from distill.models.head import LMHead, logits_dtype, mm_into
from distill.vocabularies.pair import VocabularyPair

_CHUNK_ELEMENTS = 1 << 25  # of logits at a time: 128 MiB in fp32
_MEMORY = 1 << 20  # pairs of a token and a text whose next id is kept
_ALONE = -1  # in place of the student's last token: what is left by itself


@dataclass(frozen=True, eq=False)
class Changes:
    """What looking ahead moves between the student's ids, by token.

    Args:
        temperature: that it was found at.
        starts_2N: where each row's A begin, and the number of all, then likewise of the H; NumPy.
        rows_A: which of the N.
        teacher_A: the teacher's id.
        rows_H: which of the N.
        student_H: the student's id that mass goes to.
        mass_H: how much it is.
        class_N: class within which ids stand for themselves; -1 for none.
    """

    temperature: float
    starts_2N: np.ndarray
    rows_A: Tensor
    teacher_A: Tensor
    rows_H: Tensor
    student_H: Tensor
    mass_H: Tensor
    class_N: Tensor

    def of(self, rows: slice) -> Ahead:
        """Those of some tokens."""
        a, h = (slice(int(starts[rows.start]), int(starts[rows.stop])) for starts in self.starts_2N)
        return Ahead(
            self.rows_A[a] - rows.start,
            self.teacher_A[a],
            self.rows_H[h] - rows.start,
            self.student_H[h],
            self.mass_H[h],
            self.class_N[rows],
        )


class LookAhead:
    """Finds `Changes`.

    Args:
        pair: the two tokenizers.
        smallest: probability above which a token, or a text of several, is looked at.
        most: tokens of a row that are looked at.
    """

    def __init__(self, pair: VocabularyPair, smallest: float = 0.004, most: int = 64) -> None:
        self.pair, self.smallest, self.most = pair, smallest, most
        self._next: dict[tuple[int, bytes], int] = {}

    @torch.no_grad()
    def __call__(
        self, hidden_ND: Tensor, states: Callable[[Tensor], Tensor], head: LMHead, class_S: np.ndarray, pairs: Pairs,
        temperature: float,
    ) -> Changes:  # fmt: skip
        """Changes to the targets of a batch; the host waits for the device once.

        Args:
            hidden_ND: the teacher's states that the targets are made of.
            states: its states at any of its positions, (places) -> (places, D).
            head: the teacher's.
            class_S: number of each of the student's ids' class, -1 where it is alone in it.
            pairs: of the batch.
            temperature: T.
        """
        spelling, device = pairs.spelling, hidden_ND.device
        paths, head = self._paths(spelling), head.whole()
        aligned = spelling.place_N[spelling.group_N == 0]
        places_P = np.array(sorted({place for path in paths for place in path} | set(aligned.tolist())), dtype=np.int64)
        inside_I = spelling.inside_I
        further_PD = states(torch.from_numpy(places_P).to(device))
        found = [
            self._likely(further_PD, head, _behind(spelling.ids_T, places_P), temperature, None),
            self._likely(hidden_ND, head, _behind(spelling.ids_T, spelling.place_N), temperature, pairs),
        ]
        at = _Likely.on_host(torch.cat(found))
        row_of = {place: row for row, place in enumerate(places_P.tolist())}
        inside_row = {n: row for row, n in enumerate(inside_I.tolist(), start=len(places_P))}
        moves = _Moves()
        refined_N = np.full(len(spelling.place_N), -1, dtype=np.int64)
        for n in np.flatnonzero(spelling.place_N >= 0).tolist():
            row = inside_row[n] if n in inside_row else row_of[int(spelling.place_N[n])]
            refined_N[n] = self._row(n, spelling, at, row, [row_of[place] for place in paths[n]], moves)
        return self._found(moves, refined_N, class_S, temperature, hidden_ND)

    def _paths(self, spelling: Spelling) -> list[list[int]]:
        """The teacher's positions along the text from behind its next token on, until the student's is passed."""
        teacher, student = self.pair.teacher.lengths, self.pair.student.lengths
        ids, lengths = spelling.ids_T.tolist(), teacher[spelling.ids_T].tolist()
        ends = (spelling.inside_N + student[spelling.label_N]).tolist()
        paths = []
        for place, end in zip(spelling.place_N.tolist(), ends, strict=True):
            path: list[int] = []
            last = place + 1
            if place >= 0 and last < len(ids) and lengths[last]:
                path.append(last)
                reached = lengths[last]
                while last + 1 < len(ids) and lengths[last + 1] and reached + lengths[last + 1] <= end:
                    last += 1
                    reached += lengths[last]
                    path.append(last)
            paths.append(path)
        return paths

    def _likely(
        self, hidden_XD: Tensor, head: LMHead, own_X: np.ndarray, temperature: float, pairs: Pairs | None
    ) -> Tensor:
        """Ids, their probabilities, those of the text's own next id and of all others, (rows, 2K + 2), on the device.

        The probability of an id that is not looked at is -1. With pairs, only the rows that stand inside a token of the
        teacher, conditioned on what they have seen of it.
        """
        vocab, device = head.vocab_size, hidden_XD.device
        most = min(self.most, vocab)
        size = max(1, _CHUNK_ELEMENTS // vocab)
        dtype = logits_dtype(hidden_XD.dtype, device)
        wide = torch.promote_types(dtype, torch.float32)  # which has room for ids below 2^24
        found = [hidden_XD.new_zeros(0, 2 * most + 2, dtype=wide)]
        rows_X = np.arange(len(hidden_XD)) if pairs is None else pairs.spelling.inside_I
        for start in range(0, len(rows_X), size):
            rows_R = rows_X[start : start + size]
            at_R = torch.from_numpy(rows_R).to(device)
            logits_RV = hidden_XD.new_empty(len(rows_R), vocab, dtype=dtype)
            mm_into(logits_RV, hidden_XD[at_R], head.weight.T)
            logits_RV = head.finish_(logits_RV.to(wide)).mul_(1 / temperature)
            if pairs is not None:
                inside = inside_rows(pairs, slice(int(rows_R[0]), int(rows_R[-1]) + 1))
                assert inside is not None
                where = inside.nth_E, inside.teacher_E
                kept_E = logits_RV[where]
                logits_RV.fill_(-torch.inf).index_put_(where, kept_E)
            probs_RV = torch.softmax(logits_RV, -1, out=logits_RV)
            top = probs_RV.topk(most)
            own_R1 = torch.from_numpy(own_X[rows_R]).to(device)[:, None].clamp(max=vocab - 1)
            own_p_R1, looked_RK = probs_RV.gather(1, own_R1), top.values > self.smallest
            # Summed up by itself: one less what is known would be rounding where that is nearly all.
            others_RV = probs_RV.scatter_(1, top.indices, top.values.masked_fill(looked_RK, 0)).scatter_(1, own_R1, 0)
            others_R1 = others_RV.sum(-1, keepdim=True)
            shown_RK = top.values.masked_fill(~looked_RK, -1)
            found.append(torch.cat([top.indices.to(wide), shown_RK, own_p_R1, others_R1], 1))
        return torch.cat(found)

    def _row(self, n: int, spelling: Spelling, at: "_Likely", row: int, path: list[int], moves: "_Moves") -> int:
        """Notes what moves in one row; the text whose first id's class stands for itself there, -1 for none."""
        tokens = self.pair.teacher.tokens
        seen, before = int(spelling.inside_N[n]), int(spelling.own_N[n])
        own = int(spelling.ids_T[spelling.place_N[n] + 1]) if path else -1
        for number, mass in zip(at.ids[row], at.masses[row], strict=True):
            token = tokens[number] if number < len(tokens) else None
            if number != own and token:
                rest = token[seen:]
                source = moves.text(_ALONE, rest) if seen else ~int(self.pair.firsts[number])
                moves.add(n, source, moves.text(before, rest), mass, number)
        if own < 0:
            return -1
        rest = (tokens[own] or b"")[seen:]
        alone = moves.text(_ALONE, rest)
        moves.add(n, alone if seen else ~int(self.pair.firsts[own]), _NOWHERE, at.own[row], own)
        mass, written = at.own[row], rest
        for step, place in enumerate(path):
            behind = int(_behind(spelling.ids_T, spelling.place_N[n] + 1 + step))
            following = behind if step + 1 < len(path) else -1
            left = at.others[place] + (at.own[place] if following < 0 and behind not in at.ids[place] else 0.0)
            for number, share in zip(at.ids[place], at.masses[place], strict=True):
                if number == following:
                    continue
                if mass * share <= self.smallest:
                    left += share
                    continue
                token = tokens[number] if number < len(tokens) else None
                moves.add(n, _NOWHERE, moves.text(before, written + (token or b"")), mass * share)
            if left > 0:
                moves.add(n, _NOWHERE, moves.text(before, written), mass * left)
            if following >= 0:
                mass *= at.own[place]
                written += tokens[following] or b""
        return alone

    def _found(
        self, moves: "_Moves", refined_N: np.ndarray, class_S: np.ndarray, temperature: float, like: Tensor
    ) -> Changes:
        """The moves as changes; a row of which next to nothing would be left stays as the tables have it."""
        to_text = np.array(self._ids(list(moves.numbers)), dtype=np.int64)
        rows, sources, targets = (np.array(x, dtype=np.int64) for x in (moves.rows, moves.sources, moves.targets))
        masses, taken_ids = np.array(moves.masses), np.array(moves.taken, dtype=np.int64)
        nowhere = to_text.size
        to_text = np.append(to_text, -1)
        targets = to_text[np.where(targets == _NOWHERE, nowhere, targets)]
        of_text = to_text[np.where((sources == _NOWHERE) | (sources < 0), nowhere, sources)]
        sources = np.where((sources < 0) & (sources != _NOWHERE), ~sources, of_text)
        count = len(refined_N)
        taken = np.bincount(rows, masses * (sources >= 0), count) - np.bincount(rows, masses * (targets >= 0), count)
        kept = (taken < 1 - 1e-3)[rows] & (sources != targets)
        shared = len(class_S)
        leave, come = kept & (sources >= 0) & (sources < shared), kept & (targets >= 0) & (targets < shared)
        found = np.where((refined_N >= 0) & (taken < 1 - 1e-3), to_text[refined_N], -1)
        classes = np.where((found >= 0) & (found < shared), class_S[np.clip(found, 0, shared - 1)], -1)
        a, h = (np.flatnonzero(x)[np.argsort(rows[x], kind="stable")] for x in (leave, come))
        wide = torch.promote_types(like.dtype, torch.float32)
        parts = (
            torch.from_numpy(rows[a]),
            torch.from_numpy(taken_ids[a]),
            torch.from_numpy(rows[h]),
            torch.from_numpy(targets[h]),
            torch.from_numpy(masses[h]).to(wide),
            torch.from_numpy(classes),
        )
        starts_2N = np.stack([np.searchsorted(rows[x], np.arange(count + 1)) for x in (a, h)])
        return Changes(temperature, starts_2N, *(part.to(like.device, non_blocking=True) for part in parts))

    def _ids(self, texts: list[tuple[int, bytes]]) -> list[int]:
        """The student's id for what is left behind one of its tokens; -1 where it would not have written that token."""
        new = [text for text in texts if text not in self._next]
        if len(self._next) + len(new) > _MEMORY:
            self._next.clear()
            new = texts
        student = self.pair.student
        leads = [(student.tokens[before] or b"") if before != _ALONE else b"" for before, _ in new]
        encoded = student.encode_all([lead + rest for lead, (_, rest) in zip(leads, new, strict=True)])
        by_itself = [text for text, lead, ids in zip(new, leads, encoded, strict=True) if not (ids and lead)]
        for text, first in zip(by_itself, student.first_all([rest for _, rest in by_itself]), strict=True):
            self._next[text] = -1 if first is None else first
        for text, lead, ids in zip(new, leads, encoded, strict=True):
            if ids and lead:
                self._next[text] = ids[1] if len(ids) > 1 and ids[0] == text[0] else -1
        return [self._next[text] for text in texts]


_NOWHERE = -(1 << 40)


@dataclass(frozen=True, eq=False)
class _Likely:
    """The most probable tokens of some rows, on the host, and probabilities of the text's own next one and others."""

    ids: list[list[int]]
    masses: list[list[float]]
    own: list[float]
    others: list[float]

    @classmethod
    def on_host(cls, found: Tensor) -> "_Likely":
        """Those that are looked at, see `LookAhead._likely`."""
        table = found.cpu().double().numpy()
        most = table.shape[1] // 2 - 1
        ids, masses = table[:, :most].astype(np.int64), table[:, most:-2]
        counts = (masses >= 0).sum(-1).tolist()
        return cls(
            [row[:count].tolist() for row, count in zip(ids, counts, strict=True)],
            [row[:count].tolist() for row, count in zip(masses, counts, strict=True)],
            table[:, -2].tolist(),
            table[:, -1].tolist(),
        )


@dataclass(eq=False)
class _Moves:
    """Mass that goes from one of the student's ids to another, most of which are still to be found.

    A target is the number of a text, a source likewise, or ~id; `_NOWHERE` stands for none. What is taken from a source
    is the whole of one of the teacher's ids, -1 where the source is none.
    """

    numbers: dict[tuple[int, bytes], int] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    masses: list[float] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)

    def text(self, before: int, rest: bytes) -> int:
        """Number of a text behind one of the student's tokens."""
        return self.numbers.setdefault((before, rest), len(self.numbers))

    def add(self, row: int, source: int, target: int, mass: float, taken: int = -1) -> None:
        self.rows.append(row)
        self.sources.append(source)
        self.targets.append(target)
        self.masses.append(mass)
        self.taken.append(taken)


def _behind(ids_T: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The teacher's id behind each place; any where there is none."""
    return ids_T[np.clip(places + 1, 0, len(ids_T) - 1)]

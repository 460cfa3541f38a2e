"""Documents as two tokenizers read them, and the bytes behind which both say how the same text goes on.

Each token has an end: the byte behind it in the text that both sides share, -1 where nothing that is shared follows it.
Texts are shared whole. Of conversations, which each side renders by its own template, the contents of the messages are,
so that what a template writes is no target of the teacher's. Where a side's tokens do not spell the text, as behind a
normaliser that changes it, a document has no ends, and nothing of the teacher's.

Letters: S tokens of the student in one document, T of the teacher, C places where both may be cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from distill.data.documents.chat import Chat, Rendered, rendered
from distill.data.documents.contents import contents
from distill.data.documents.encode import Document, Encoder, are_texts, each, plain_rows, tokenize
from distill.data.documents.forms import form_of
from distill.data.documents.messages import conversation_of
from distill.errors import UserError
from distill.vocabularies.pair import VocabularyPair
from distill.vocabularies.token_bytes import TokenBytes

GAP = 1 << 16  # bytes between stretches of shared text, more than a token has: no token reaches from one into the next


@dataclass(frozen=True, eq=False)
class Paired:
    """A document as both sides read it.

    Args:
        student: ids, labels and bytes of text; see `Encoder`.
        ends_S: of the student's tokens, int64.
        teacher_T: the teacher's ids, int32; none where the document has no ends.
        teacher_ends_T: int64.
        lead: the teacher's tokens before the text, which each part of the document begins with: some models (Gemma)
            read a text without them a good deal worse.
    """

    student: Document
    ends_S: np.ndarray
    teacher_T: np.ndarray
    teacher_ends_T: np.ndarray
    lead: int = 0

    @property
    def is_shared(self) -> bool:
        """Whether the teacher says anything of it."""
        return bool(len(self.teacher_T))

    def alone(self) -> "Paired":
        """The student's side of it."""
        return unshared(self.student)

    def cuts(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the student and of the teacher before each place where both may be cut, 2 x int64 [C], ascending.

        The first is before the document, the last behind it. Tokens without bytes stay with the text beside them.
        """
        size, their_size = len(self.ends_S), len(self.teacher_T)
        if not self.is_shared:
            return np.arange(size + 1), np.zeros(size + 1, dtype=np.int64)
        sides = [_behind_text(ends) for ends in (self.ends_S, self.teacher_ends_T)]
        ends, their_ends = self.ends_S[sides[0]], np.append(self.teacher_ends_T[sides[1]], -1)
        at = np.searchsorted(their_ends[:-1], ends)
        same = their_ends[at] == ends
        places = (sides[0][same] + 1, size), (sides[1][at[same]] + 1, their_size)
        ours, theirs = (np.concatenate([[0], inner, [last]]) for inner, last in places)
        return ours, theirs


def _behind_text(ends: np.ndarray) -> np.ndarray:
    """Tokens that end where shared text has begun and goes on."""
    known = np.flatnonzero(ends >= 0)
    there = ends[known]
    return known[(there > there[0]) & (there < there[-1])]


def unshared(student: Document) -> Paired:
    """A document of which the teacher says nothing."""
    nothing = np.zeros(0, dtype=np.int64)
    return Paired(student, np.full(len(student[0]), -1), nothing.astype(np.int32), nothing)


@dataclass
class PairedEncoder:
    """Encodes batches of documents of any form but ids, for two tokenizers.

    Args:
        student: of the student's side, whose labels and bytes count.
        teacher: the teacher's tokenizer; fast.
        vocabularies: both as bytes.
        place: what error messages call a document, see `Encoder`.
        source: YAML key that names the documents.
    """

    student: Encoder
    teacher: Any
    vocabularies: VocabularyPair
    place: Callable[[int, Any], str] = "document {}".format
    source: str = "data.dataset"
    their_chat: Chat = field(init=False)

    def __post_init__(self) -> None:
        own = self.teacher.chat_template is not None  # the run's template is the student's to learn
        self.their_chat = replace(self.student.chat, template=None) if own else self.student.chat

    def __call__(self, batch: dict[str, list[Any]], first: int = 0) -> list[Paired]:
        """Documents of a batch of columns; see `Encoder`.

        Raises:
            UserError: documents are not of their form, or ids, which are those of one tokenizer.
        """
        form = form_of(list(batch))
        if form == "text":
            return self._texts(batch["text"], self.student(batch, first))
        if form == "tokens":
            raise UserError(
                f"{self.source}: input_ids are of one tokenizer, and teacher and student have one each; give text, "
                "conversations, or prompts and completions"
            )
        rows = plain_rows(batch)
        if form == "messages":
            return each(self._conversation, rows, first, self.place, self.source)
        if are_texts(rows):
            whole = [(row["prompt"] or "") + (row["completion"] or "") for row in rows]
            return self._texts(whole, replace(self.student, place=self.place, source=self.source)(batch, first))
        return each(self._reply, rows, first, self.place, self.source)

    def key(self, form: str) -> list[Any]:
        """What the result depends on beside the documents, as plain values."""
        teacher = Encoder(self.teacher, self.their_chat)
        return [*self.student.key(form), "each part begins as a text of the teacher", *teacher.key(form)]

    def _texts(self, texts: Sequence[str | None], documents: Sequence[Document]) -> list[Paired]:
        """The student's documents of texts, with the teacher's side."""
        sides = self.vocabularies.student, self.vocabularies.teacher
        found = []
        for text, student, (teacher_T, _) in zip(texts, documents, tokenize(self.teacher, texts), strict=True):
            spelt = (text or "").encode()
            ours, theirs = (_ends(side, ids, spelt) for side, ids in zip(sides, (student[0], teacher_T), strict=True))
            if ours is None or theirs is None:
                found.append(unshared(student))
            else:
                lead = int(np.argmax(sides[1].lengths[teacher_T] > 0))
                found.append(Paired(student, ours, teacher_T, theirs, lead))
        return found

    def _reply(self, prompt: Any = None, completion: Any = None, **more: Any) -> list[Paired]:
        sides = [*(prompt or []), *(completion or [])]
        return self._conversation(sides, prompt=len(prompt or []), **more)

    def _conversation(self, messages: Any = None, prompt: int = 0, **more: Any) -> list[Paired]:
        if not messages:
            return []
        conversation = conversation_of(messages, **more)
        ours = rendered(self.student.tokenizer, conversation, self.student.chat)
        student = self.student.labelled(ours, conversation, prompt)
        theirs = rendered(self.teacher, conversation, self.their_chat)
        spans = contents(ours), contents(theirs)
        if spans[0] is None or spans[1] is None:
            return [unshared(student)]
        ends = np.full(len(ours.ids_T), -1), np.full(len(theirs.ids_T), -1)
        base = GAP
        for one, other in zip(spans[0], spans[1], strict=True):
            same = _same(ours.turns.text[slice(*one)], theirs.turns.text[slice(*other)])
            if same is None:
                continue
            sides = (self.vocabularies.student, ours, one[0]), (self.vocabularies.teacher, theirs, other[0])
            for (vocabulary, side, start), ends_T, at in zip(sides, ends, same[1:], strict=True):
                _mark(ends_T, vocabulary, side, start + at, same[0], base)
            base += len(same[0].encode()) + GAP
        return [Paired(student, ends[0], theirs.ids_T, ends[1])]


def _ends(side: TokenBytes, ids_T: np.ndarray, text: bytes) -> np.ndarray | None:
    """Ends of the tokens of a whole text, from 1 on, int64 [T]; None where they do not spell it.

    A blank before the text that is none of it (Llama 2's) has an end before the text's first byte, so that what comes
    behind it is known to begin with a blank.
    """
    found = side.text(ids_T.tolist())
    before = len(found) - len(text)
    if not text or not found.endswith(text) or found[: max(0, before)] not in (b"", b" "):
        return None
    widths_T = side.lengths[ids_T]
    ends_T = np.cumsum(widths_T) - before + 1
    last = np.flatnonzero(widths_T)[-1]
    ends_T[last + 1 :] = -1
    ends_T[
        : max(0, np.argmax(widths_T > 0) - 1)
    ] = -1  # of several tokens before the text the last one says how it begins
    return ends_T


def _same(one: str, other: str) -> tuple[str, int, int] | None:
    """What two texts that differ in blanks around them share, and where it begins in each."""
    short, long = sorted((one, other), key=len)
    at = long.find(short)
    if at < 0 or not short:
        return None
    return (short, 0, at) if short is one else (short, at, 0)


def _mark(ends_T: np.ndarray, side: TokenBytes, found: Rendered, start: int, text: str, base: int) -> None:
    """Writes the ends of the tokens that lie within a content, where they spell it.

    Args:
        ends_T: of the whole conversation.
        side: its tokenizer.
        found: it.
        start: of the content, in characters.
        text: of it.
        base: end before its first byte.
    """
    stop = start + len(text)
    inside = np.flatnonzero((found.starts_T >= start) & (found.ends_T <= stop) & (found.ends_T > found.starts_T))
    if not len(inside):
        return
    first, last = inside[0], inside[-1]
    ids = found.ids_T[first : last + 1]
    lead, spelt = (
        text[: found.starts_T[first] - start],
        text[found.starts_T[first] - start : found.ends_T[last] - start],
    )
    whole = side.text(ids.tolist())
    before = len(whole) - len(spelt.encode())
    if not whole.endswith(spelt.encode()) or whole[: max(0, before)] not in (b"", b" "):
        return
    begins = base + len(lead.encode()) - before
    if first:
        ends_T[first - 1] = begins
    ends_T[first:last] = begins + np.cumsum(side.lengths[ids])[:-1]

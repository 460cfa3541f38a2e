"""Documents become rows of one length, so that no position is spent on padding.

Two ways, by form. A text that does not fit continues in the next row, where its first token has neither context nor
label. Everything else (conversations, completions, tokens with labels) stays whole: rows are filled by
best fit, what is longer than a row is cut at its end and counted. Every row knows its valid tokens, queries and label
bytes, so that normalisers are known before a batch is read.

Letters: D documents, T tokens of one document, S tokens of a stream, L tokens of a row.
"""

import bisect
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from distill.batch import IGNORE
from distill.data.documents.chat import Chat
from distill.data.documents.encode import Document, Encoder
from distill.data.documents.forms import form_of, goes_on
from distill.data.documents.hub import bars_on_terminals
from distill.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, Features

LISTS = (
    "input_ids",
    "labels",
    "document_lengths",  # of the documents, or parts of them, that the row is made of
)
NUMBERS = (
    "bytes",  # UTF-8 bytes of the text behind the labels
    "tokens",  # positions whose next-token label is not -100
    "queries",  # of these, the ones with an earlier token of their document in the row
    "documents",  # that begin in the row
    "cut_documents",  # of these, the ones that were cut
    "cut_tokens",  # that these lost
)
ROW_FORMAT = 3  # part of the cache's key; a change of what a row holds is a new number
BLOCK = {"text": 256}  # documents of one call: long ones where texts are joined, more where rows are filled by fit


def features(lists: Sequence[str] = LISTS, numbers: Sequence[str] = NUMBERS) -> "Features":
    """The columns of packed rows."""
    from datasets import Features, List, Value

    return Features({name: List(Value("int32")) for name in lists} | {name: Value("int64") for name in numbers})


@dataclass(frozen=True)
class Piece:
    """Tokens that follow each other in a row; `starts` marks the first token of each document."""

    ids: np.ndarray
    labels: np.ndarray
    bytes: np.ndarray
    starts: np.ndarray
    cut_documents: int = 0
    cut_tokens: int = 0

    def part(self, first: int, stop: int) -> "Piece":
        """The tokens from `first` to before `stop`."""
        here = slice(first, stop)
        return Piece(self.ids[here], self.labels[here], self.bytes[here], self.starts[here])


def make_row(piece: Piece) -> dict[str, Any]:
    """One row; its first token counts as the first of a document."""
    starts_L = piece.starts.copy()
    starts_L[0] = True
    labels_L = np.where(starts_L, IGNORE, piece.labels).astype(np.int32)
    valid = labels_L[1:] != IGNORE
    return {
        "input_ids": piece.ids,
        "labels": labels_L,
        "document_lengths": np.diff(np.flatnonzero(starts_L), append=len(piece.ids)).astype(np.int32),
        "bytes": int(piece.bytes[1:][valid].sum()),
        "tokens": int(valid.sum()),
        "queries": int((valid & ~starts_L[:-1]).sum()),
        "documents": int(piece.starts.sum()),
        "cut_documents": piece.cut_documents,
        "cut_tokens": piece.cut_tokens,
    }


def best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Which items share a bin: the longest first, each into the fullest bin that still has room for it.

    Args:
        lengths: of the items, each at most `room`.
        room: of a bin.

    Returns:
        the items of each bin in order, bins in the order of their first items.

    Example:
        >>> best_fit([3, 9, 7, 1], 10)
        [[0, 2], [1, 3]]
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room that is left and the bin, sorted
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = bisect.bisect_left(free, (lengths[item], -1))
        left, index = free.pop(at) if at < len(free) else (room, len(bins))
        if index == len(bins):
            bins.append([])
        bins[index].append(item)
        bisect.insort(free, (left - lengths[item], index))
    return sorted(sorted(items) for items in bins)


@dataclass
class Packer:
    """Turns batches of documents into rows; call it in order, it keeps the unfinished row of text between batches.

    Documents and rests of documents without a label yield nothing.

    Args:
        encoder: of the documents.
        sequence_length: L.
        packing: join documents; otherwise each starts a row of its own.
        documents: how many rows of them there will be, so that the last call lets go of the unfinished row; None =
            every call does.
    """

    encoder: Encoder
    sequence_length: int
    packing: bool
    documents: int | None = None
    seen: int = field(default=0, init=False)
    rest: list[Piece] = field(default_factory=list, init=False)
    lists: ClassVar[tuple[str, ...]] = LISTS  # the columns of a row
    numbers: ClassVar[tuple[str, ...]] = NUMBERS

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = self.rows(batch)
        return {name: [row[name] for row in rows] for name in (*self.lists, *self.numbers)}

    def features(self) -> "Features":
        """The columns of its rows."""
        return features(self.lists, self.numbers)

    def rows(self, batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
        """The rows that a batch of the columns of a form completes."""
        encoded = self.encoder(batch, self.seen)
        self.seen += len(next(iter(batch.values())))
        pieces = self._stream(encoded) if goes_on(list(batch)) else self._whole(encoded)
        return [row for row in map(make_row, pieces) if row["tokens"]]

    def _whole(self, documents: list[Document]) -> list[Piece]:
        """Documents cut to at most a row each and put together as they fit."""
        length = self.sequence_length
        kept = [document for document in documents if (document[1][1:length] != IGNORE).any()]
        lengths = [min(len(ids_T), length) for ids_T, _, _ in kept]
        bins = best_fit(lengths, length) if self.packing else [[index] for index in range(len(kept))]
        pieces = []
        for items in bins:
            ids_L, labels_L, bytes_L = (
                np.concatenate([kept[item][column][:length] for item in items]) for column in range(3)
            )
            starts_L = np.zeros(len(ids_L), dtype=bool)
            starts_L[np.cumsum([0, *(lengths[item] for item in items)])[:-1]] = True
            over = [len(kept[item][0]) - lengths[item] for item in items]
            pieces.append(Piece(ids_L, labels_L, bytes_L, starts_L, sum(n > 0 for n in over), sum(over)))
        return pieces

    def _stream(self, documents: list[Document]) -> list[Piece]:
        """Documents joined, or one by one, and cut into rows."""
        streams = [Piece(*document, np.arange(len(document[0])) == 0) for document in documents if len(document[0]) > 1]
        if self.packing:
            streams = self._join(streams, last=self.documents is None or self.seen == self.documents)
        length = self.sequence_length
        return [piece.part(at, at + length) for piece in streams for at in range(0, len(piece.ids), length)]

    def _join(self, streams: list[Piece], last: bool) -> list[Piece]:
        """The streams as one, cut at the last full row unless nothing follows; the rest is kept."""
        streams = [*self.rest, *streams]
        self.rest = []
        if not streams:
            return []
        whole = Piece(
            np.concatenate([stream.ids for stream in streams]),
            np.concatenate([stream.labels for stream in streams]),
            np.concatenate([stream.bytes for stream in streams]),
            np.concatenate([stream.starts for stream in streams]),
        )
        size = len(whole.ids)
        cut = size if last else size // self.sequence_length * self.sequence_length
        if cut < size:
            self.rest = [whole.part(cut, size)]
        return [whole.part(0, cut)]


def pack(
    documents: "Dataset",
    tokenizer: Any,
    sequence_length: int,
    packing: bool,
    chat: Chat = Chat(),  # noqa: B008  (frozen)
    key: str = "data.dataset",
    place: Callable[[int, Any], str] | None = None,
) -> "Dataset":
    """Rows of at most `sequence_length` tokens with the columns of `features`, cached by content.

    Args:
        documents: table with the columns of a form, see `recognise`.
        tokenizer: a fast tokenizer.
        sequence_length: tokens per row.
        packing: put documents together; otherwise each starts a row of its own.
        chat: template and choice of targets.
        key: YAML key that error messages name.
        place: what they call a document, see `Encoder`.

    Raises:
        UserError: the tokenizer gives no offsets, a document is not of its form, or no row has a label.
    """
    return pack_with(Packer(encoder_of(tokenizer, chat), sequence_length, packing), documents, key, place)


def pack_with(
    packer: Packer, documents: "Dataset", key: str = "data.dataset", place: Callable[[int, Any], str] | None = None
) -> "Dataset":
    """The same with a packer that has nothing begun; see `pack`."""
    encoder = replace(packer.encoder, place=place or packer.encoder.place, source=key)
    form = form_of(documents.column_names)
    options = encoder.key(form)
    with bars_on_terminals():
        rows = documents.map(
            replace(packer, encoder=encoder, documents=documents.num_rows),
            batched=True,
            batch_size=BLOCK.get(form, 1024),
            remove_columns=documents.column_names,
            features=packer.features(),
            new_fingerprint=fingerprint(documents._fingerprint, options, packer.sequence_length, packer.packing),
            desc="Tokenising and packing",
        )
    if not rows.num_rows:
        raise no_labels(key, documents.num_rows, packer.sequence_length, form)
    return rows


def encoder_of(tokenizer: Any, chat: Chat) -> Encoder:
    """The encoder of a tokenizer.

    Raises:
        UserError: it is a slow one, which gives no offsets.
    """
    if not tokenizer.is_fast:
        raise UserError(f"data.tokenizer: {tokenizer.name_or_path!r} is a slow tokenizer; give one with tokenizer.json")
    return Encoder(tokenizer, chat)


def no_labels(key: str, documents: int, sequence_length: int, form: str) -> UserError:
    """The error of data in which nothing is left to learn."""
    reason = "each has fewer than two tokens" if form == "text" else "no completion, or it begins behind the cut"
    return UserError(
        f"{key}: all labels of {documents} documents are masked ({reason}, or data.sequence_length: {sequence_length} "
        "is too short); give longer text or rows"
    )


def fingerprint(*parts: Any) -> str:
    """16 hexadecimal digits that change with any part and stay the same from run to run."""
    return hashlib.sha256(json.dumps([ROW_FORMAT, *parts]).encode()).hexdigest()[:16]

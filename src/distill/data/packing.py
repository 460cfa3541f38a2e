"""Documents become rows of one length: tokenised, joined and cut, so that no position is spent on padding.

A document that does not fit continues in the next row; the price is that its first token there has no context and
no label. The last row of the stream is kept short. Every row knows its valid tokens, queries and label bytes, so that
normalisers are known before a batch is read.

Letters: D documents, T tokens of one document, S tokens of a stream, L tokens of a row.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from distill.data.text import bars_on_terminals
from distill.errors import UserError

IGNORE = -100  # label of a position that is no target
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "document_lengths": List(Value("int32")),  # of the documents, or parts of them, that the row is made of
        "bytes": Value("int64"),  # UTF-8 bytes of the text behind the labels
        "tokens": Value("int64"),  # positions whose next-token label is not -100
        "queries": Value("int64"),  # of these, the ones with an earlier token of their document in the row
    }
)
ROW_FORMAT = 1  # part of the cache's key; a change of what a row holds is a new number


def byte_counts(text: str, ends_T: np.ndarray) -> np.ndarray:
    """UTF-8 bytes that each token adds, from the character offset at which it ends; they sum to the text's length.

    A character that several tokens spell counts for the first that ends behind it; text behind the last token counts
    for the last.

    Args:
        text: the document.
        ends_T: offsets in characters; special tokens have 0.

    Returns:
        int64 [T], bytes.

    Example:
        >>> byte_counts("aé", np.array([1, 2])).tolist()
        [1, 2]
    """
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000)
    upto = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])
    reached = upto[np.maximum.accumulate(ends_T)]
    reached[-1] = upto[-1]
    return np.diff(reached, prepend=0)


def tokenize(tokenizer: Any, texts: Sequence[str | None]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids [T] and bytes [T] of each document, with what the tokenizer puts around a text and its end-of-sequence id."""
    filled = [text or "" for text in texts]
    encoded = tokenizer(filled, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    documents = []
    for text, ids, offsets in zip(filled, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ids_T = np.asarray(ids, dtype=np.int32)
        bytes_T = np.zeros(len(ids), dtype=np.int64)
        if len(ids):
            bytes_T = byte_counts(text, np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 1])
        eos = tokenizer.eos_token_id
        if eos is not None and (not len(ids) or ids[-1] != eos):
            ids_T, bytes_T = np.append(ids_T, np.int32(eos)), np.append(bytes_T, 0)
        documents.append((ids_T, bytes_T))
    return documents


def make_row(ids_L: np.ndarray, bytes_L: np.ndarray, starts_L: np.ndarray) -> dict[str, Any]:
    """One row; `starts_L` marks the first token of each document, and the row's first token counts as one."""
    starts_L = starts_L.copy()
    starts_L[0] = True
    labels_L = np.where(starts_L, IGNORE, ids_L).astype(np.int32)
    valid = labels_L[1:] != IGNORE
    return {
        "input_ids": ids_L,
        "labels": labels_L,
        "document_lengths": np.diff(np.flatnonzero(starts_L), append=len(ids_L)).astype(np.int32),
        "bytes": int(bytes_L[1:][valid].sum()),
        "tokens": int(valid.sum()),
        "queries": int((valid & ~starts_L[:-1]).sum()),
    }


@dataclass
class Packer:
    """Turns batches of documents into rows; call it in order, it keeps the unfinished row between batches.

    Documents and rests of documents without a label (fewer than two tokens) yield nothing.

    Args:
        tokenizer: a fast tokenizer.
        sequence_length: L.
        packing: join documents; otherwise each starts a row of its own.
        documents: how many there will be, so that the last call lets go of the unfinished row.
    """

    tokenizer: Any
    sequence_length: int
    packing: bool
    documents: int
    seen: int = 0
    rest: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)

    def __call__(self, batch: dict[str, list[str | None]]) -> dict[str, list[Any]]:
        streams = []
        for ids_T, bytes_T in tokenize(self.tokenizer, batch["text"]):
            if len(ids_T) > 1:
                streams.append((ids_T, bytes_T, np.arange(len(ids_T)) == 0))
        self.seen += len(batch["text"])
        if self.packing:
            streams = self._join(streams, last=self.seen == self.documents)
        rows = [row for stream in streams for row in self._cut(stream) if row["tokens"]]
        return {name: [row[name] for row in rows] for name in FEATURES}

    def _join(self, streams: list[Any], last: bool) -> list[Any]:
        """The streams as one, cut at the last full row unless nothing follows; the rest is kept."""
        streams = self.rest + streams
        self.rest = []
        if not streams:
            return []
        ids_S, bytes_S, starts_S = (np.concatenate(parts) for parts in zip(*streams, strict=True))
        cut = len(ids_S) if last else len(ids_S) // self.sequence_length * self.sequence_length
        if cut < len(ids_S):
            self.rest = [(ids_S[cut:], bytes_S[cut:], starts_S[cut:])]
        return [(ids_S[:cut], bytes_S[:cut], starts_S[:cut])]

    def _cut(self, stream: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[dict[str, Any]]:
        length = self.sequence_length
        return [make_row(*(part[at : at + length] for part in stream)) for at in range(0, len(stream[0]), length)]


def pack(documents: Dataset, tokenizer: Any, sequence_length: int, packing: bool) -> Dataset:
    """Rows of at most `sequence_length` tokens with the columns of `FEATURES`, cached by content.

    Args:
        documents: table with the column `text`.
        tokenizer: a fast tokenizer.
        sequence_length: tokens per row.
        packing: join documents; otherwise each starts a row of its own.

    Raises:
        UserError: the tokenizer gives no offsets, or no row has a label.
    """
    if not tokenizer.is_fast:
        raise UserError(f"data.tokenizer: {tokenizer.name_or_path!r} is a slow tokenizer; give one with tokenizer.json")
    key = fingerprint(documents._fingerprint, tokenizer_hash(tokenizer), sequence_length, packing)
    with bars_on_terminals():
        rows = documents.map(
            Packer(tokenizer, sequence_length, packing, documents.num_rows),
            batched=True,
            batch_size=256,
            remove_columns=documents.column_names,
            features=FEATURES,
            new_fingerprint=key,
            desc="Tokenising and packing",
        )
    if not rows.num_rows:
        raise UserError(
            f"data.dataset: all labels of {documents.num_rows} documents are masked (each has fewer than two tokens, "
            f"or data.sequence_length: {sequence_length} is too short); give longer text"
        )
    return rows


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of what a fast tokenizer does with text, wherever it was loaded from."""
    return fingerprint(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)


def fingerprint(*parts: Any) -> str:
    """16 hexadecimal digits that change with any part and stay the same from run to run."""
    return hashlib.sha256(json.dumps([ROW_FORMAT, *parts]).encode()).hexdigest()[:16]

"""Documents of every form become ids, labels and the bytes of text behind them.

Labels are the ids themselves where a token is a target, else IGNORE. Bytes are exact for text; for conversations and
tokens they are those of the decoded text without special tokens, which has no place for a tokenizer's normalisation.

Letters: T tokens of one document.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from distill.batch import IGNORE
from distill.data.documents.chat import Chat, Rendered, decoded_bytes, rendered, template_of
from distill.data.documents.forms import form_of, restored
from distill.data.documents.messages import Conversation, conversation_of
from distill.data.documents.offsets import whole_offsets
from distill.data.documents.reading import without_nulls
from distill.data.documents.tokens import tokens_of
from distill.errors import DocumentError, UserError

TOLD = 3  # bad documents that an error names
Document = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids and labels, int32 [T]; bytes, int64 [T]
Encoded = TypeVar("Encoded")


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
    return [(ids_T, bytes_T) for ids_T, bytes_T, _ in _tokenize(tokenizer, texts)]


def _tokenize(tokenizer: Any, texts: Sequence[str | None]) -> list[Document]:
    """Ids [T], bytes [T] and the character offsets [T] at which tokens end, 0 for special ones."""
    filled = [text or "" for text in texts]
    if not filled:
        return []  # which tokenizers do not take
    with whole_offsets(tokenizer):
        encoded = tokenizer(filled, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    documents = []
    for text, ids, offsets in zip(filled, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ids_T = np.asarray(ids, dtype=np.int32)
        ends_T = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 1]
        bytes_T = byte_counts(text, ends_T) if len(ids) else np.zeros(0, dtype=np.int64)
        eos = tokenizer.eos_token_id
        if eos is not None and (not len(ids) or ids[-1] != eos):
            ids_T, bytes_T, ends_T = np.append(ids_T, np.int32(eos)), np.append(bytes_T, 0), np.append(ends_T, 0)
        documents.append((ids_T, bytes_T, ends_T))
    return documents


@dataclass
class Encoder:
    """Encodes batches of documents of any one form.

    Args:
        tokenizer: a fast tokenizer.
        chat: template and choice of targets.
        place: what error messages call a document, from its number (from 1) and its columns.
        source: YAML key that names the documents.
    """

    tokenizer: Any
    chat: Chat
    place: Callable[[int, Any], str] = "document {}".format
    source: str = "data.dataset"

    def __call__(self, batch: dict[str, list[Any]], first: int = 0) -> list[Document]:
        """Documents of a batch of columns, a row's behind each other; those that are missing are empty.

        Args:
            batch: the columns of a form, nested values perhaps as `stored` keeps them.
            first: rows before these, for error messages.

        Raises:
            UserError: documents are not of their form; names the first few.
        """
        form = form_of(list(batch))
        if form == "text":
            return [(ids_T, ids_T, bytes_T) for ids_T, bytes_T in tokenize(self.tokenizer, batch["text"])]
        rows = plain_rows(batch)
        told = partial(each, rows=rows, first=first, place=self.place, source=self.source)
        if form == "tokens":
            return told(self._tokens)
        if form == "messages":
            return told(self._conversation)
        if not are_texts(rows):
            return told(self._reply)
        told(check_sides)
        return self.completions([row["prompt"] for row in rows], [row["completion"] for row in rows])

    def key(self, form: str) -> list[Any]:
        """What the result depends on beside the documents, as plain values."""
        tokenizer = self.tokenizer
        parts: list[Any] = [tokenizer_hash(tokenizer)]
        if form != "text":
            parts.append(self.chat.completion_only_loss)
        if form == "messages" or (form == "prompt_completion" and self._template() is not None):
            parts += [self._template(), tokenizer.special_tokens_map, asdict(self.chat)]
        return parts

    def _template(self) -> str | None:
        if self.chat.template is None and self.tokenizer.chat_template is None:
            return None
        return template_of(self.tokenizer, self.chat)

    def _reply(self, prompt: Any = None, completion: Any = None, **more: Any) -> list[Document]:
        sides = [*(prompt or []), *(completion or [])]
        return self._conversation(sides, prompt=len(prompt or []), **more)

    def _conversation(self, messages: Any = None, prompt: int = 0, **more: Any) -> list[Document]:
        if not messages:
            return [_empty()]
        conversation = conversation_of(messages, **more)
        return [self.labelled(rendered(self.tokenizer, conversation, self.chat), conversation, prompt)]

    def labelled(self, found: Rendered, conversation: Conversation, prompt: int) -> Document:
        """A conversation with its targets; see `encode_conversation`."""
        targets_T = found.targets(conversation, self.chat.completion_only_loss, prompt)
        labels_T = np.where(targets_T, found.ids_T, IGNORE).astype(np.int32)
        return found.ids_T, labels_T, decoded_bytes(self.tokenizer, found.ids_T)

    def completions(self, prompts: list[str | None], completions: list[str | None]) -> list[Document]:
        """Texts of which the tokens that hold a character of the completion, and the last, are targets."""
        pairs = [(prompt or "", completion or "") for prompt, completion in zip(prompts, completions, strict=True)]
        documents = []
        encoded = _tokenize(self.tokenizer, [prompt + completion for prompt, completion in pairs])
        for (prompt, completion), (ids_T, bytes_T, ends_T) in zip(pairs, encoded, strict=True):
            labels_T = ids_T
            if self.chat.completion_only_loss:
                targets_T = ends_T > len(prompt)
                targets_T[-1:] = True
                labels_T = np.where(targets_T & bool(completion), ids_T, IGNORE).astype(np.int32)
            documents.append((ids_T, labels_T, bytes_T))
        return documents

    def _tokens(self, **row: Any) -> list[Document]:
        parts = tokens_of(row, len(self.tokenizer), self.chat.completion_only_loss)
        return [(*part, decoded_bytes(self.tokenizer, part[0])) for part in parts] or [_empty()]


def each(
    encode: Callable[..., list[Encoded]],
    rows: Sequence[dict[str, Any]],
    first: int,
    place: Callable[[int, Any], str],
    source: str,
) -> list[Encoded]:
    """Documents row by row; of rows that cannot be encoded the first few are told in one error.

    Args:
        encode: called with a row's columns.
        rows: plain values by column.
        first: rows before these.
        place: see `Encoder`, as for the next.
        source: likewise.

    Raises:
        UserError: names those rows.
    """
    documents: list[Encoded] = []
    bad: list[DocumentError] = []
    places: dict[str, list[str]] = {}
    for number, row in enumerate(rows, start=first + 1):
        try:
            documents += encode(**row)
        except DocumentError as error:
            bad.append(error)
            if (error.key, error.remedy) == (bad[0].key, bad[0].remedy):
                places.setdefault(error.reason, []).append(place(number, tuple(row.values())))
            if len(bad) == TOLD:
                break
    if bad:
        told = "; ".join(f"{', '.join(where)}: {reason}" for reason, where in places.items())
        raise UserError(f"{bad[0].key or source}: {told}; {bad[0].remedy}") from bad[0]
    return documents


def plain_rows(batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The rows of a batch of columns, with nested values as their files had them."""
    return [
        {name: _plain(value) for name, value in zip(batch, values, strict=True)}
        for values in zip(*batch.values(), strict=True)
    ]


def are_texts(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether prompts and completions are texts rather than lists of messages."""
    return any(isinstance(row[side], str) for row in rows for side in ("prompt", "completion"))


def _plain(value: Any) -> Any:
    """A value as its file had it; a table's own nested types fill with null what a row lacks."""
    return restored(value) if isinstance(value, bytes) else without_nulls(value)


def check_sides(
    prompt: str | None, completion: str | None, tools: Any = None, chat_template_kwargs: Any = None
) -> list[Document]:
    """Refuses what texts have no place for."""
    if tools or chat_template_kwargs:
        name = "tools" if tools else "chat_template_kwargs"
        raise DocumentError(
            f"it has {name}, and a prompt of text has no template", "give lists of messages, or drop it"
        )
    return []


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of what a fast tokenizer does with text, wherever it was loaded from."""
    parts = json.dumps([tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _empty() -> Document:
    return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64)

"""What a source becomes: the text of each document, and the part of it that is learnt."""

from typing import Any

from distill.data.documents.chat import Chat
from distill.data.documents.encode import Encoder
from distill.data.documents.files import load_documents, open_stream

OPTIONS: dict[str, Any] = {"config": None, "split": "train", "text_column": "text"}


def shown(tokenizer: Any, source: Any, chat: Chat = Chat(), **options: Any) -> list[tuple[str, str]]:  # noqa: B008
    """Pairs of text and targets, documents in order."""
    table = load_documents(source, **(OPTIONS | options))
    return decoded(tokenizer, Encoder(tokenizer, chat)({name: table[name][:] for name in table.column_names}))


def streamed(tokenizer: Any, source: Any, chat: Chat = Chat(), **options: Any) -> list[tuple[str, str]]:  # noqa: B008
    """The same of a stream."""
    stream, columns = open_stream(source, **(OPTIONS | options))
    rows = list(stream)
    return decoded(
        tokenizer, Encoder(tokenizer, chat)({own: [row[name] for row in rows] for own, name in columns.items()})
    )


def decoded(tokenizer: Any, documents: Any) -> list[tuple[str, str]]:
    return [(tokenizer.decode(ids), tokenizer.decode(labels[labels != -100])) for ids, labels, _ in documents]

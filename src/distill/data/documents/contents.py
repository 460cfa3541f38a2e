"""Where the contents of messages lie in a text that a template made of them."""

from collections.abc import Sequence

from distill.data.documents.chat import Rendered, Renderer, Spans
from distill.data.documents.messages import Message
from distill.errors import DocumentError

_STAND_IN = "content-{}-5e1d"  # of a message, that no template writes itself


def contents(found: Rendered) -> Spans | None:
    """The characters of each message's content, in order; messages without text have none.

    The template is rendered once more with stand-ins for the contents, which shows what it writes between them. A
    template may strip a content, but one that changes it otherwise, or leaves one out, cannot be read so.

    Returns:
        None where the text is not what the template writes around the contents.
    """
    renderer, messages, text = found.turns.renderer, found.turns.messages, found.turns.text
    said = [message["content"] for message in messages if _says(message)]
    between = _between(renderer, messages, len(said))
    if between is None or not text.startswith(between[0]):
        return None
    at, spans = len(between[0]), []
    for content, behind in zip(said, between[1:], strict=True):
        forms = (content, content.strip(), content.lstrip(), content.rstrip())
        form = next((form for form in forms if text.startswith(form + behind, at)), None)
        if form is None:
            return None
        spans.append((at, at + len(form)))
        at += len(form) + len(behind)
    return spans if at == len(text) else None


def _says(message: Message) -> bool:
    return isinstance(message.get("content"), str) and bool(message["content"])


def _between(renderer: Renderer, messages: Sequence[Message], count: int) -> list[str] | None:
    """What a template writes before, between and behind `count` contents."""
    numbers = iter(range(count))
    stood_in = [
        message | {"content": _STAND_IN.format(next(numbers))} if _says(message) else message for message in messages
    ]
    try:
        rest = renderer.text(stood_in)
    except DocumentError:
        return None
    pieces = []
    for number in range(count):
        piece, mark, rest = rest.partition(_STAND_IN.format(number))
        if not mark:
            return None
        pieces.append(piece)
    return [*pieces, rest]

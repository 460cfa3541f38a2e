"""Conversations become tokens of which those that the model has to say are targets.

A template that marks its completions with `{% generation %}` is believed, by transformers' own mask. With any other,
an assistant's message is what the template adds when the message follows its generation prompt; that the added text is
the same in the whole conversation is checked for every conversation, at the price of two more renderings per message.
Nothing comes before a conversation's first message, which some templates cannot render: where the assistant has it, it
begins behind the first generation prompt in it. A token is a target where it holds a character of a completion. Line
breaks behind the token that ends a turn are none: nobody generates them.

Letters: T tokens of one document.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from tokenizers.decoders import DecodeStream

from distill.errors import DocumentError, UserError
from distill.sources import resolve

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """How conversations are rendered and which of their tokens are targets.

    Args:
        template: Jinja text; None = the tokenizer's own.
        template_options: further variables of the template, for instance `enable_thinking`.
        completion_only_loss: only what the model has to say; else every token.
    """

    template: str | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    completion_only_loss: bool = True


def template_of(tokenizer: Any, chat: Chat) -> str:
    """The template's text.

    Raises:
        UserError: neither the tokenizer nor the configuration has one.
    """
    try:
        template: str = tokenizer.get_chat_template(chat.template)
    except ValueError as error:
        raise UserError(
            f"data.chat_template: null, and the tokenizer {tokenizer.name_or_path!r} has none of its own; give a Jinja "
            "file, or an instruction-tuned model's tokenizer (data.tokenizer)"
        ) from error
    return template


def encode_conversation(
    tokenizer: Any, messages: Sequence[Message], chat: Chat, prompt: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int32 [T], and which of them are targets, bool [T].

    Args:
        tokenizer: a fast tokenizer.
        messages: with role and content.
        chat: template and choice of targets.
        prompt: this many messages at the beginning are no targets, whoever says them.

    Raises:
        DocumentError: a message lacks role or content, the template refuses them, or completions cannot be told.
        UserError: there is no template.
    """
    template = template_of(tokenizer, chat)
    conversation = [_clean(number, message) for number, message in enumerate(messages, start=1)]
    marked = chat.completion_only_loss and MARK.search(template) is not None

    def render(messages: list[Message], **options: Any) -> Any:
        try:
            return tokenizer.apply_chat_template(messages, chat_template=template, **chat.template_options, **options)
        except TemplateSyntaxError as error:
            raise UserError(f"data.chat_template: line {error.lineno}: {error.message}; repair it") from error
        except (TemplateError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise DocumentError(f"the chat template refuses it ({reason})", "repair or remove it") from error

    text = render(conversation, tokenize=False)
    if marked:
        mapping = {"return_offsets_mapping": True}
        encoded = render(conversation, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs=mapping)
    else:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids_T = np.asarray(encoded["input_ids"], dtype=np.int32)
    if not chat.completion_only_loss:
        return ids_T, np.ones(len(ids_T), dtype=bool)
    starts_T, ends_T = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T

    def opening(index: int) -> str:
        """The text up to where message `index` is generated."""
        if index:
            opened: str = render(conversation[:index], tokenize=False, add_generation_prompt=True)
            if not text.startswith(opened):
                _unstable(index)
            return opened
        asked = [{"role": "user", "content": "x"}]
        prompted = render(asked, tokenize=False, add_generation_prompt=True)
        mark = prompted.removeprefix(render(asked, tokenize=False))
        if not mark or mark not in text:
            _unstable(index)
        return text[: text.index(mark) + len(mark)]

    if marked:
        targets_T = np.asarray(encoded["assistant_masks"], dtype=bool)
        return ids_T, targets_T & (ends_T > len(opening(prompt))) if prompt else targets_T
    targets_T = np.zeros(len(ids_T), dtype=bool)
    special_T = np.isin(ids_T, tokenizer.all_special_ids)
    for index, message in enumerate(conversation):
        if index < prompt or message["role"] != "assistant":
            continue
        opened = opening(index)
        closed = render(conversation[: index + 1], tokenize=False) if index + 1 < len(conversation) else text
        if not text.startswith(closed) or len(closed) < len(opened):
            _unstable(index)
        span_T = (starts_T < len(closed)) & (ends_T > np.maximum(starts_T, len(opened)))
        turn_ends = np.flatnonzero(span_T & special_T)
        if len(turn_ends) and not text[ends_T[turn_ends[-1]] : len(closed)].strip():
            span_T[turn_ends[-1] + 1 :] = False
        targets_T |= span_T
    return ids_T, targets_T


def _clean(number: int, message: Message) -> Message:
    """Without the empty keys that a table fills in where messages have different ones.

    Templates make "None" of missing content, or refuse it, but for what comes without, such as calls of tools.
    """
    remedy = "repair or remove it"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DocumentError(f"message {number} has no role", remedy)
    if message.get("content") is None and all(message[key] is None for key in message.keys() - {"role"}):
        raise DocumentError(f"message {number} ({message['role']}) has no content", remedy)
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _unstable(index: int) -> None:
    raise DocumentError(
        f"what comes before message {index + 1} or the message itself reads otherwise in the whole conversation, so "
        "completions cannot be told",
        "mark them with {% generation %} in a template of your own, or set data.completion_only_loss to false",
        "data.chat_template",
    )


def decoded_bytes(tokenizer: Any, ids_T: np.ndarray) -> np.ndarray:
    """UTF-8 bytes of text that each token adds, int64 [T]; special tokens add none.

    A character that several tokens spell counts for the last of them.
    """
    stream, backend = DecodeStream(skip_special_tokens=True), tokenizer.backend_tokenizer
    return np.array([len((stream.step(backend, int(i)) or "").encode()) for i in ids_T], dtype=np.int64)


def read_template(source: str | None) -> str | None:
    """A template's text, from a file where it is not the text itself.

    Raises:
        UserError: the file does not exist or is no text.
    """
    if source is None or "{%" in source or "{{" in source:
        return source
    path = Path(resolve(source, "data.chat_template"))
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.chat_template: {source!r} is neither a template nor a file that can be read; give a Jinja file"
        ) from error

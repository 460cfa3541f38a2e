"""Conversations become tokens of which those that the model has to say are targets.

A template that marks its completions with `{% generation %}` is believed. With any other, an assistant's message is
what the template adds when the message follows its generation prompt; that the added text is the same in the whole
conversation is checked for every conversation, with two more renderings per message. Nothing comes before a
conversation's first message, which some templates cannot render: where the assistant has it, it begins behind the first
generation prompt in it. A token is a target where it holds a character of a completion. Line breaks behind the token
that ends a turn are none: nobody generates them.

Letters: T tokens of one document.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from tokenizers.decoders import DecodeStream

from distill.data.documents.forms import is_text
from distill.data.documents.messages import Conversation, Message
from distill.data.documents.offsets import covered, whole_offsets
from distill.errors import DocumentError, UserError
from distill.sources import resolve

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
CHAT_TEMPLATE = "data.chat_template"
BYTE_ORDER_MARK = "\ufeff"
Spans = list[tuple[int, int]]  # first character of each stretch of a text, and the one behind it


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
    return template.removeprefix(BYTE_ORDER_MARK)


@dataclass(frozen=True)
class Renderer:
    """A template with what a row says of it.

    Args:
        tokenizer: whose special tokens the template may use.
        template: Jinja text.
        tools: that the template tells of.
        options: further variables.
    """

    tokenizer: Any
    template: str
    tools: list[Any] | None
    options: dict[str, Any]

    def text(self, messages: Sequence[Message], **options: Any) -> str:
        """The messages as the template has them.

        Raises:
            DocumentError: the template refuses them.
            UserError: it is no template.
        """
        return self._told(
            self.tokenizer.apply_chat_template,
            list(messages),
            chat_template=self.template,
            tools=self.tools,
            tokenize=False,
            **self.options,
            **options,
        )

    def marked(self, messages: Sequence[Message]) -> Spans:
        """What the template marks as generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        variables = {**self.tokenizer.special_tokens_map, **self.options}
        _, [spans] = self._told(
            render_jinja_template,
            [list(messages)],
            chat_template=self.template,
            tools=self.tools,
            return_assistant_tokens_mask=True,
            **variables,
        )
        return [(start, stop) for start, stop in spans]

    def _told(self, render: Callable[..., Any], *messages: Any, **options: Any) -> Any:
        try:
            return render(*messages, **options)
        except TemplateSyntaxError as error:
            raise UserError(f"data.chat_template: line {error.lineno}: {error.message}; repair it") from error
        except (TemplateError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise DocumentError(f"the chat template refuses it ({reason})", "repair or remove it") from error


@dataclass(frozen=True)
class Rendered:
    """A conversation as text and as tokens.

    Args:
        turns: where its messages lie in its text.
        ids_T: int32.
        starts_T: first character of each token, int64; see `covered`.
        ends_T: the character behind it.
    """

    turns: "Turns"
    ids_T: np.ndarray
    starts_T: np.ndarray
    ends_T: np.ndarray

    def within(self, spans: Spans) -> np.ndarray:
        """Which tokens hold a character of some stretches of the text, bool [T]."""
        held_T = np.zeros(len(self.ids_T), dtype=bool)
        for start, stop in spans:
            held_T |= (self.starts_T < stop) & (self.ends_T > np.maximum(self.starts_T, start))
        return held_T

    def targets(self, conversation: Conversation, completion_only_loss: bool, prompt: int) -> np.ndarray:
        """Which tokens are targets, bool [T]; see `encode_conversation`."""
        turns, messages, text = self.turns, self.turns.messages, self.turns.text
        unlearnt = [index for index, learnt in enumerate(conversation.learnt) if learnt is False]
        if not completion_only_loss:
            return ~self.within([turns.span(index) for index in unlearnt])
        said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        targets_T = np.zeros(len(self.ids_T), dtype=bool)
        if MARK.search(turns.renderer.template):
            if prompt < len(messages):
                opening = turns.opening(prompt) if prompt else 0
                targets_T = self.within(turns.renderer.marked(messages)) & (self.ends_T > opening)
            return targets_T & ~self.within([turns.span(index) for index in unlearnt if index in said])
        special_T = np.isin(self.ids_T, turns.renderer.tokenizer.all_special_ids)
        for index in said:
            if index < prompt or index in unlearnt:
                continue
            start, stop = turns.span(index)
            span_T = self.within([(start, stop)])
            turn_ends = np.flatnonzero(span_T & special_T)
            if len(turn_ends) and not text[self.ends_T[turn_ends[-1]] : stop].strip():
                span_T[turn_ends[-1] + 1 :] = False
            targets_T |= span_T
        return targets_T


def rendered(tokenizer: Any, conversation: Conversation, chat: Chat) -> Rendered:
    """A conversation through a template and a tokenizer.

    Raises:
        DocumentError: the template refuses the messages.
        UserError: there is no template.
    """
    options = {**chat.template_options, **conversation.options}
    renderer = Renderer(tokenizer, template_of(tokenizer, chat), conversation.tools, options)
    messages = conversation.messages
    try:
        text = renderer.text(messages)
    except DocumentError:
        if not conversation.spelt:
            raise
        messages = conversation.as_text()
        text = renderer.text(messages)
    _check_written(renderer, messages, text)
    if not is_text(text):
        raise DocumentError("it holds half a character, a lone surrogate", "repair or remove it")
    with whole_offsets(tokenizer):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids_T = np.asarray(encoded["input_ids"], dtype=np.int32)
    starts_T, ends_T = covered(np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2))
    return Rendered(Turns(renderer, messages, text), ids_T, starts_T, ends_T)


def _check_written(renderer: Renderer, messages: Sequence[Message], text: str) -> None:
    """Refuses tools and calls that the template leaves out, so that an answer which is a call would be an empty one.

    A template that names neither may still write a message as it stands; only that needs a second rendering.
    """
    remedy = "give a template that writes them, or leave them out"
    calls = next((place for place, message in enumerate(messages, start=1) if message.get("tool_calls")), None)
    if calls is not None and "tool_calls" not in renderer.template:
        silent = [message | {"tool_calls": None} for message in messages]
        if renderer.text(silent) == text:
            raise DocumentError(f"message {calls} calls tools, which the template leaves out", remedy, CHAT_TEMPLATE)
    if renderer.tools and "tools" not in renderer.template and replace(renderer, tools=None).text(messages) == text:
        raise DocumentError("it has tools, which the template leaves out", remedy, CHAT_TEMPLATE)


def encode_conversation(
    tokenizer: Any, conversation: Conversation, chat: Chat, prompt: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int32 [T], and which of them are targets, bool [T].

    Args:
        tokenizer: a fast tokenizer.
        conversation: messages and what is said of them.
        chat: template and choice of targets.
        prompt: this many messages at the beginning are no targets, whoever says them.

    Raises:
        DocumentError: the template refuses the messages, or completions cannot be told.
        UserError: there is no template.
    """
    found = rendered(tokenizer, conversation, chat)
    return found.ids_T, found.targets(conversation, chat.completion_only_loss, prompt)


@dataclass(frozen=True)
class Turns:
    """Where the messages of a conversation lie in its text.

    Args:
        renderer: of the text.
        messages: all of them.
        text: as the template has it.
    """

    renderer: Renderer
    messages: Sequence[Message]
    text: str

    def span(self, index: int) -> tuple[int, int]:
        """The characters of a message that is generated: what it adds to those before it and its generation prompt.

        Raises:
            DocumentError: the text before it, or its own, is another one in the whole conversation.
        """
        start, last = self.opening(index), index + 1 == len(self.messages)
        closed = self.text if last else self.renderer.text(self.messages[: index + 1])
        if not self.text.startswith(closed) or len(closed) < start:
            raise _unstable(index)
        return start, len(closed)

    def opening(self, index: int) -> int:
        """The character at which message `index` begins, once the template has announced it.

        Raises:
            DocumentError: the text before it is another one in the whole conversation.
        """
        assistant = self.messages[index]["role"] == "assistant"
        if index:
            opened = self.renderer.text(self.messages[:index], add_generation_prompt=assistant)
            if not self.text.startswith(opened):
                raise _unstable(index)
            return len(opened)
        if not assistant:
            return 0
        asked = [{"role": "user", "content": "x"}]
        prompted = self.renderer.text(asked, add_generation_prompt=True)
        mark = prompted.removeprefix(self.renderer.text(asked))
        if not mark or mark not in self.text:
            raise _unstable(index)
        return self.text.index(mark) + len(mark)


def _unstable(index: int) -> DocumentError:
    return DocumentError(
        f"what comes before message {index + 1} or the message itself reads otherwise in the whole conversation, so "
        "completions cannot be told",
        "mark them with {% generation %} in a template of your own, or set data.completion_only_loss to false",
        CHAT_TEMPLATE,
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
        return source and source.removeprefix(BYTE_ORDER_MARK)
    path = Path(resolve(source, "data.chat_template"))
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.chat_template: {source!r} is neither a template nor a file that can be read; give a Jinja file"
        ) from error

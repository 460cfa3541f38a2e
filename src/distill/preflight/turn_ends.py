"""Whether a student can learn to stop: documents must end with a token, and generation must stop at that token."""

from typing import Any

import numpy as np

from distill.data.documents.chat import Chat, encode_conversation
from distill.data.documents.messages import conversation_of
from distill.errors import UserError

ASKED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def turn_end_findings(tokenizer: Any, chat: Chat, conversations: bool, stops: int | list[int] | None) -> list[str]:
    """Whether what is learnt ends with a token of its own, and whether the student would stop there.

    Args:
        tokenizer: of the documents.
        chat: how conversations are rendered.
        conversations: whether there are any; other documents end with the tokenizer's end-of-sequence id.
        stops: `eos_token_id` of the generation configuration that the student is exported with; None = unknown.
    """
    known = set() if stops is None else set(stops) if isinstance(stops, list | tuple) else {stops}
    own = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    ends, what = (answer_ends(tokenizer, chat), "answers end") if conversations else (own, "documents end")
    marks = own | set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    if unmarked := sorted(ends - marks):
        mark = "a token of its own" if tokenizer.eos_token is None else f"for instance with {tokenizer.eos_token!r}"
        return [
            f"data.chat_template: answers end with {tokenizer.decode(unmarked[:1])!r} and no token of their own, so "
            f"the student never learns to stop: let the template end them, {mark}"
        ]
    if not conversations and not own:
        return [
            "data.tokenizer: it has no end-of-sequence token, so documents of text end with none, and the student "
            "never learns to stop: name one as eos_token in its tokenizer_config.json"
        ]
    if not known or ends <= known:
        return []
    end, stop = (tokenizer.convert_ids_to_tokens(min(ids)) for ids in (ends - known, known))
    return [
        f"student: {what} with {end!r}, but its generation_config stops at {stop!r} (eos_token_id), so an exported "
        f"student would talk on: add {min(ends - known)} to eos_token_id there"
    ]


def answer_ends(tokenizer: Any, chat: Chat) -> set[int]:
    """The last target of each answer in two turns, else in one; none where the template refuses both."""
    for turns in (2, 1):
        try:
            ids_T, targets_T = encode_conversation(tokenizer, conversation_of(ASKED * turns), chat)
        except UserError:
            continue
        if not chat.completion_only_loss:  # all are targets: the last but the line breaks behind it
            return {int(ids_T[np.flatnonzero(_said(tokenizer, ids_T))[-1]])} if len(ids_T) else set()
        last_T = targets_T & ~np.append(targets_T[1:], False)
        return {int(token) for token in ids_T[last_T]}
    return set()


def _said(tokenizer: Any, ids_T: np.ndarray) -> np.ndarray:
    """Tokens that are more than blanks, bool [T]."""
    return np.array([bool(tokenizer.decode([int(token)]).strip()) for token in ids_T])

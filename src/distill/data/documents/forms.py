"""The forms that documents come in, told by their columns, with one name per column from here on.

A form is the set of its columns: `text`; `messages`; `prompt` and `completion`; `input_ids`, with or without `labels`.
The price of telling them by columns: a table that has several forms is read as the first of FORMS, unless
`data.format` says otherwise.
"""

from collections.abc import Set
from typing import TYPE_CHECKING, Any, Literal

from distill.errors import UserError, did_you_mean

if TYPE_CHECKING:  # `datasets` takes most of a second to import, which only data that are read should cost
    from datasets import Features

SHAREGPT = "rename from and value to role and content, human and gpt to user and assistant"

Form = Literal["text", "messages", "prompt_completion", "tokens"]
FormOption = Literal["auto", "text", "messages", "prompt_completion", "tokens"]
# Columns of other programs that are a prompt and its completion.
PAIRS = (("instruction", "output"), ("question", "answer"), ("prompt", "response"), ("input", "output"))
FORMS: tuple[Form, ...] = ("messages", "prompt_completion", "tokens", "text")  # in order of precedence


def recognise(
    features: "Features", source: Any, *, form: FormOption, text_column: str, messages_column: str
) -> dict[str, str]:
    """Column of a form -> column of the table.

    Args:
        features: of the table.
        source: what error messages call it.
        form: auto = a text column under a name of its own, else the first of FORMS whose columns are there.
        text_column: name of the column of texts.
        messages_column: name of the column of conversations.

    Raises:
        UserError: a column is not there or holds something else.
    """
    wanted: dict[Form, list[str]] = {
        "messages": [messages_column],
        "prompt_completion": ["prompt", "completion"],
        "tokens": ["input_ids"],
        "text": [text_column],
    }
    chosen: Form = "text"
    if form != "auto":
        chosen = form
    elif text_column == "text" or text_column not in features:
        chosen = next((name for name in FORMS if all(column in features for column in wanted[name])), "text")
    here = ", ".join(features)
    keys = {"text": "data.text_column", "messages": "data.messages_column"}
    for column in wanted[chosen]:
        if column not in features:
            if chosen in keys:
                remedy = _remedy(features, text_column if chosen == "text" else messages_column)
                raise UserError(f"{keys[chosen]}: {column!r} is no column of {source!r} ({here}); {remedy}")
            raise UserError(
                f"data.format: {chosen} needs the column {column}, which is none of {source!r} ({here}); rename one to "
                "it or choose another format"
            )
    if chosen == "text":
        if not _is_string(features[text_column]):
            kind = getattr(features[text_column], "dtype", None) or "nested data"
            raise UserError(f"data.text_column: {text_column!r} of {source!r} holds {kind}, not text; name another")
        return {"text": text_column}
    if chosen == "messages":
        if not _is_conversation(features[messages_column]):
            remedy = SHAREGPT if _is_conversation(features[messages_column], {"from", "value"}) else "name another"
            raise UserError(
                f"data.messages_column: {messages_column!r} of {source!r} holds no lists of messages with role and "
                f"content; {remedy}"
            )
        return {"messages": messages_column}
    if chosen == "prompt_completion":
        sides = [features[name] for name in ("prompt", "completion")]
        if not all(_is_string(side) for side in sides) and not all(_is_conversation(side) for side in sides):
            raise UserError(
                f"data.format: prompt and completion of {source!r} must both be text, or both lists of messages with "
                "role and content; bring them to one form"
            )
        return {"prompt": "prompt", "completion": "completion"}
    columns = [name for name in ("input_ids", "labels") if name in features]
    for column in columns:
        inner = getattr(features[column], "feature", None)
        if not getattr(inner, "dtype", "").startswith(("int", "uint")):
            raise UserError(
                f"data.format: {column} of {source!r} holds no lists of token ids; tokenise it, or choose another form"
            )
    return {name: name for name in columns}


def form_of(columns: list[str]) -> Form:
    """The form that a table's columns are, once they have the names of `recognise`."""
    firsts: dict[str, Form] = {"messages": "messages", "prompt": "prompt_completion", "input_ids": "tokens"}
    return next((form for column, form in firsts.items() if column in columns), "text")


def _remedy(features: "Features", missing: str) -> str:
    """What to do about a table that lacks a column: what its own columns most likely are."""
    for column, feature in features.items():
        if _is_conversation(feature):
            return f"set data.messages_column: {column}"
        if _is_conversation(feature, {"from", "value"}):
            return f"for {column}, {SHAREGPT}, and set data.messages_column: {column}"
    for prompt, completion in PAIRS:
        if prompt in features and completion in features:
            return f"rename {prompt} and {completion} to prompt and completion"
    return did_you_mean(missing, features)


def _is_string(feature: Any) -> bool:
    from datasets import Value

    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _is_conversation(feature: Any, keys: Set[str] = frozenset({"role", "content"})) -> bool:
    from datasets import Json, List

    inner = feature.feature if isinstance(feature, List) else feature[0] if isinstance(feature, list) else None
    if isinstance(inner, Json):  # messages with different keys: which, is seen where they are encoded
        return "role" in keys
    return isinstance(inner, dict) and keys <= inner.keys()

"""The forms that documents come in, told by their columns, with one name per column from here on.

A form has columns that make it (`text`; `messages`; `prompt` and `completion`; `input_ids`) and columns that say more
about a document, such as its tools or which of its tokens count. A table that has several forms is read as the first of
FORMS, unless `data.format` says otherwise. The table of all columns stands in docs/data.md.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from distill.errors import UserError, did_you_mean

Form = Literal["text", "messages", "prompt_completion", "tokens"]
FormOption = Literal["auto", "text", "messages", "prompt_completion", "tokens"]
Row = dict[str, Any]

FORMS: tuple[Form, ...] = ("messages", "prompt_completion", "tokens", "text")  # in order of precedence
MADE_OF: dict[Form, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "tokens": ("input_ids",),
    "text": ("text",),
}
# Columns that say more about a document; one that is missing is the same as null.
SAID_OF: dict[Form, tuple[str, ...]] = {
    "messages": ("tools", "functions", "chat_template_kwargs", "system"),
    "prompt_completion": ("tools", "chat_template_kwargs"),
    "tokens": (
        "labels",
        "attention_mask",
        "completion_mask",
        "assistant_masks",
        "loss_mask",
        "position_ids",
        "seq_lengths",
    ),
    "text": (),
}
COUNTING = frozenset({"labels", "completion_mask", "assistant_masks", "loss_mask"})  # that say what is a target
TEXTS = frozenset({"text", "prompt", "completion", "system"})  # columns of text, where they are not of messages
DIALOGUES = ("conversations", "conversation")  # names of other programs for `messages`
# Columns of other programs that are a prompt and its completion.
PAIRS = (("instruction", "output"), ("question", "answer"), ("prompt", "response"), ("input", "output"))
CHATML, SHAREGPT = frozenset({"role", "content"}), frozenset({"from", "value"})  # keys of a message


def recognise(
    rows: Sequence[Row], source: Any, *, form: FormOption, text_column: str, messages_column: str
) -> dict[str, str]:
    """Column of a form -> column of the table: those that make it, then those that are there and say more.

    Args:
        rows: the first of the table.
        source: what error messages call it.
        form: auto = a text column under a name of its own, else the first of FORMS whose columns are there.
        text_column: name of the column of texts.
        messages_column: name of the column of conversations.

    Raises:
        UserError: a column is not there or holds something else.
    """
    here = list(dict.fromkeys(name for row in rows for name in row))
    wanted = MADE_OF | {"messages": (messages_column,), "text": (text_column,)}
    there: list[Form] = [name for name in FORMS if all(column in here for column in wanted[name])]
    chosen: Form = "text" if form == "auto" else form
    if form == "auto" and (text_column == "text" or text_column not in here):
        chosen = there[0] if there else chosen
    if messages_column == "messages" and (chosen == "messages" or (form == "auto" and not there)):
        names = [name for name in DIALOGUES if is_conversation(sample(rows, name))]
        if names and "messages" not in here:
            chosen, wanted["messages"] = "messages", (names[0],)
    for column in wanted[chosen]:
        if column not in here:
            raise _missing(column, rows, here, source, chosen)
    _CHECKS[chosen](rows, source, wanted[chosen])
    more = [name for name in SAID_OF[chosen] if name in here and name not in wanted[chosen]]
    if chosen == "messages":
        more = [name for name in more if _says(name, sample(rows, name))]
    return dict(zip(MADE_OF[chosen], wanted[chosen], strict=True)) | {name: name for name in more}


def form_of(columns: Sequence[str]) -> Form:
    """The form that a table's columns are, once they have the names of `recognise`."""
    return next((form for form in FORMS if MADE_OF[form][0] in columns), "text")


def has_turns(columns: Sequence[str], features: Mapping[str, Any] | None) -> bool:
    """Whether documents with these columns are conversations, which a chat template renders."""
    form = form_of(columns)
    side = (features or {}).get("prompt")
    return form == "messages" or (
        form == "prompt_completion" and "string" not in str(getattr(side, "dtype", "" if features else "string"))
    )


def goes_on(columns: Sequence[str]) -> bool:
    """Whether documents with these columns are targets throughout, so that the next row may go on with them."""
    form = form_of(columns)
    return form == "text" or (form == "tokens" and not COUNTING & set(columns))


def sample(rows: Sequence[Row], column: str) -> Any:
    """The first value of a column that says something; None where there is none."""
    return next((row[column] for row in rows if row.get(column) not in (None, [], "")), None)


def stored(value: Any) -> bytes | None:
    """A nested value as a table keeps it: as JSON, so that no key is added, lost or given another type."""
    return None if value is None else json.dumps(value, default=str).encode()


def restored(value: Any) -> Any:
    """A value that `stored` made, or any other as it is."""
    return json.loads(value) if isinstance(value, bytes) else value


def nested(value: Any, kind: type) -> Any:
    """A list or object, also where a table holds it as JSON in a text; None where it is neither.

    Example:
        >>> nested('[1, 2]', list), nested("one, two", list)
        ([1, 2], None)
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    return value if isinstance(value, kind) else None


def is_text(value: Any) -> bool:
    """Whether a value is a text; halves of characters, which JSON can spell, are none."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, in the keys of OpenAI's or of ShareGPT's format."""
    turns = [nested(turn, dict) for turn in nested(value, list) or []]
    keys = {key for turn in turns if turn is not None for key in turn}
    return bool(turns) and None not in turns and (keys >= CHATML or keys >= SHAREGPT)


def _says(column: str, value: Any) -> bool:
    """Whether a column beside messages is what its name says; others of that name are left alone."""
    if value is None:
        return True
    if column == "functions":
        given = nested(value, list)
        return bool(given) and all(isinstance(each, dict) and "name" in each for each in given)
    return column != "system" or isinstance(value, str)


def _missing(column: str, rows: Sequence[Row], here: list[str], source: Any, form: Form) -> UserError:
    keys = {"text": "data.text_column", "messages": "data.messages_column"}
    listed = ", ".join(_shown(here))
    if form in keys:
        return UserError(
            f"{keys[form]}: {column!r} is no column of {source!r} ({listed}); {_remedy(rows, here, column)}"
        )
    return UserError(
        f"data.format: {form} needs the column {column}, which is none of {source!r} ({listed}); rename one to it or "
        "choose another format"
    )


def _remedy(rows: Sequence[Row], here: list[str], missing: str) -> str:
    """What to do about a table that lacks a column: what its own columns most likely are."""
    for column in here:
        if is_conversation(sample(rows, column)):
            return f"set data.messages_column: {column}"
    for prompt, completion in PAIRS:
        if prompt in here and completion in here:
            return f"rename {prompt} and {completion} to prompt and completion"
    return did_you_mean(missing, _shown(here))


def _shown(names: Sequence[str]) -> list[str]:
    """Names of columns on one line; a table whose first line names none has a document in their place."""
    return [" ".join(str(name)[:40].splitlines()) for name in names]


def _check_text(rows: Sequence[Row], source: Any, columns: tuple[str, ...]) -> None:
    value = sample(rows, columns[0])
    if value is not None and not isinstance(value, str):
        raise UserError(f"data.text_column: {columns[0]!r} of {source!r} holds {_type(value)}, not text; name another")


def _check_messages(rows: Sequence[Row], source: Any, columns: tuple[str, ...]) -> None:
    value = sample(rows, columns[0])
    if value is not None and not is_conversation(value):
        raise UserError(
            f"data.messages_column: {columns[0]!r} of {source!r} holds no lists of messages with role and content; "
            "name another"
        )


def _check_sides(rows: Sequence[Row], source: Any, columns: tuple[str, ...]) -> None:
    sides = [value for value in (sample(rows, name) for name in columns) if value is not None]
    if not all(isinstance(side, str) for side in sides) and not all(
        isinstance(side, list) and is_conversation(side) for side in sides
    ):
        raise UserError(
            f"data.format: prompt and completion of {source!r} must both be text, or both lists of messages with "
            "role and content; bring them to one form"
        )


def _check_tokens(rows: Sequence[Row], source: Any, columns: tuple[str, ...]) -> None:
    for column in (*columns, "labels"):
        value = sample(rows, column)
        if value is not None and not all(type(token) is int for token in nested(value, list) or [None]):
            raise UserError(
                f"data.format: {column} of {source!r} holds no lists of token ids; tokenise it, or choose another form"
            )


_CHECKS = {
    "text": _check_text,
    "messages": _check_messages,
    "prompt_completion": _check_sides,
    "tokens": _check_tokens,
}


def _type(value: Any) -> str:
    return {int: "int64", float: "float64", bool: "bool", bytes: "bytes"}.get(type(value), "nested data")

"""Conversations in the dialects of other programs become messages as transformers' templates expect them.

Known are the formats of OpenAI, ShareGPT, TRL and axolotl, see docs/data.md. A key that says what counts is honoured or
refused by name, never dropped; all keys that are not named here go to the template, which may know them.
"""

import json
from dataclasses import dataclass
from typing import Any

from distill.data.documents.forms import nested
from distill.errors import DocumentError

Message = dict[str, Any]

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
SHAREGPT_SPEAKERS = {"observation": "tool", "function_response": "tool", "function_call": "assistant"}
LEARNT = ("weight", "train", "training", "loss")  # keys that say whether a message is a target
UNKNOWN = ("mask", "loss_mask", "loss_weight", "train_detail", "train_on_turn")  # that say it in ways not known here
TEXT_PARTS = ("text", "input_text", "output_text")
REMEDY = "repair or remove it"


@dataclass(frozen=True)
class Conversation:
    """Messages, and what is said of them.

    Args:
        messages: with role and content, and what else the template may use.
        learnt: of each message what its row says of it: False = no target; None = nothing.
        tools: of the row, None where it has none.
        options: variables of the template, of the row.
        spelt: whether arguments of calls stood there as JSON text; `messages` has them as objects.
    """

    messages: list[Message]
    learnt: list[bool | None]
    tools: list[Any] | None
    options: dict[str, Any]
    spelt: bool

    def as_text(self) -> list[Message]:
        """The messages with the arguments of calls as JSON text, as some templates want them."""
        return [_with_arguments(message, _dumped) for message in self.messages]


def conversation_of(
    messages: Any, tools: Any = None, functions: Any = None, chat_template_kwargs: Any = None, system: Any = None
) -> Conversation:
    """What a row says.

    Args:
        messages: a list of messages, or JSON of one.
        tools: list of tools, or JSON of one.
        functions: the same in OpenAI's older format.
        chat_template_kwargs: variables of the template, or JSON of them.
        system: text of a system message that comes first.

    Raises:
        DocumentError: a value is not what its column says, or a message cannot be what it is.
    """
    turns = nested(messages, list)
    if turns is None:
        raise DocumentError("its messages are no list", REMEDY)
    given = [_known(number, nested(turn, dict)) for number, turn in enumerate(turns, start=1)]
    learnt = [_learnt(number, message) for number, message in enumerate(given, start=1)]
    said = {*LEARNT, *UNKNOWN}
    cleaned = [{key: value for key, value in message.items() if key not in said} for message in given]
    if system:
        if cleaned and cleaned[0]["role"] == "system":
            raise DocumentError("it has a system message and a column system", "keep one of them")
        cleaned, learnt = [{"role": "system", "content": system}, *cleaned], [None, *learnt]
    parsed = [_with_arguments(message, _parsed) for message in cleaned]
    offered = _list_of("tools", tools) + [{"type": "function", "function": f} for f in _list_of("functions", functions)]
    options = nested(chat_template_kwargs or {}, dict)
    if options is None:
        raise DocumentError("its chat_template_kwargs are no object", REMEDY)
    return Conversation(parsed, learnt, offered or None, options, parsed != cleaned)


def _list_of(column: str, value: Any) -> list[Any]:
    """A list of objects, each perhaps JSON in a text."""
    items = [] if value in (None, "") else nested(value, list)
    objects = None if items is None else [nested(item, dict) for item in items]
    if objects is None or None in objects:
        raise DocumentError(f"its {column} are no list of objects", REMEDY)
    return objects


def _known(number: int, message: Message | None) -> Message:
    """A message with role and content, without what is null."""
    if message is None:
        raise DocumentError(f"message {number} is no object", REMEDY)
    shared = "from" in message and message.get("role") is None
    role = message.get("from" if shared else "role")
    if not isinstance(role, str):
        raise DocumentError(f"message {number} has no role", REMEDY)
    plain = role.strip().lower()
    speakers = SPEAKERS | (SHAREGPT_SPEAKERS if shared else {})
    content = message.get("value" if shared else "content")
    rest = {
        key: value
        for key, value in message.items()
        if value is not None
        and not (key == "tool_calls" and value == [])  # templates ask whether it is there
        and key not in ("role", "content", *(("from", "value") if shared else ()))
    }
    role = speakers.get(plain, plain if plain in ROLES else role)
    if content is None and not rest.keys() - {*LEARNT, *UNKNOWN, "name"}:
        raise DocumentError(f"message {number} ({role}) has no content", REMEDY)
    known = {"role": role, "content": _text_of(number, role, content)} | rest
    if shared and plain == "function_call" and (calls := _calls(content)):
        return known | {"content": None, "tool_calls": calls}
    if isinstance(call := known.get("function_call"), dict):
        del known["function_call"]
        known["tool_calls"] = [{"type": "function", "function": call}]
    if known.get("refusal") and known["content"] is None:
        raise DocumentError(f"message {number} ({role}) is a refusal without content", REMEDY)
    return known


def _text_of(number: int, role: str, content: Any) -> Any:
    """Content of text parts as one text; other lists, such as results of tools, are left to the template."""
    if not isinstance(content, list) or not content or not all(isinstance(p, dict) and "type" in p for p in content):
        return content
    other = next((part["type"] for part in content if part["type"] not in TEXT_PARTS), None)
    if other is not None:
        raise DocumentError(f"message {number} ({role}) holds {other}, which is no text", REMEDY)
    return "".join(part.get("text") or "" for part in content)


def _calls(content: Any) -> list[Message]:
    """ShareGPT's calls of functions, JSON in a text; none where it is something else."""
    given = nested(content, list) or [nested(content, dict)]
    calls = [nested(call, dict) for call in given if call is not None]
    if not all(call is not None and "name" in call for call in calls):
        return []
    return [{"type": "function", "function": call} for call in calls]


def _learnt(number: int, message: Message) -> bool | None:
    """What a message says of being a target."""
    for key in UNKNOWN:
        if key in message:
            raise DocumentError(
                f"message {number} has {key}, which is not known here", "say weight: 0 of messages that are no targets"
            )
    said = {key: message[key] for key in LEARNT if key in message}
    for key, value in said.items():
        if value not in (0, 1):
            raise DocumentError(f"message {number} has {key}: {value!r}", "give 0 or 1")
        if value and key != "weight" and message["role"] != "assistant":
            raise DocumentError(
                f"message {number} ({message['role']}) has {key}: true, but only what the assistant says is learnt",
                "set it to false",
            )
    return all(said.values()) if said else None


def _with_arguments(message: Message, change: Any) -> Message:
    """A message whose calls have other arguments."""
    if not isinstance(calls := message.get("tool_calls"), list):
        return message
    return message | {"tool_calls": [_changed(call, change) for call in calls]}


def _changed(call: Any, change: Any) -> Any:
    if isinstance(call, dict) and isinstance(inner := call.get("function"), dict) and "arguments" in inner:
        return call | {"function": inner | {"arguments": change(inner["arguments"])}}
    if isinstance(call, dict) and "arguments" in call:
        return call | {"arguments": change(call["arguments"])}
    return call


def _parsed(arguments: Any) -> Any:
    """Arguments as an object, as transformers asks for them; text that is none stays."""
    found = nested(arguments, dict)
    return arguments if found is None else found


def _dumped(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)

"""Conversations in the dialects of other programs, each against the same conversation in plain messages."""

import json

import pytest

from distill.data.documents.chat import Chat
from distill.data.documents.encode import Encoder
from distill.data.documents.forms import stored
from distill.data.documents.messages import conversation_of
from distill.errors import UserError
from helpers.chat_templates import MARKED, PLAIN
from helpers.shown import decoded

# Tells of tools, and writes arguments of calls as they are.
TOOLS = (
    "{% if tools is not none %}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message.content is not none %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls %}{{ call.function.name + (call.function.arguments | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAINLY = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


def learnt(tokenizer, row: dict, template: str = PLAIN, **chat) -> tuple[str, str]:
    batch = {name: [value if isinstance(value, str) else stored(value)] for name, value in row.items()}
    [found] = decoded(tokenizer, Encoder(tokenizer, Chat(template, **chat))(batch))
    return found


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "User", "content": "Hi"}, {"role": " ASSISTANT ", "content": "Yo"}],
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}],
        [{"from": "Human", "value": "Hi", "weight": None}, {"from": "assistant", "value": "Yo", "weight": 1}],
        [{"role": "human", "content": "Hi"}, {"role": "model", "content": "Yo"}],
        [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, PLAINLY[1]],
        [PLAINLY[0], {"role": "assistant", "content": [{"type": "output_text", "text": "Yo"}], "refusal": None}],
        [PLAINLY[0], PLAINLY[1] | {"tool_calls": []}],
        [PLAINLY[0] | {"train": False}, PLAINLY[1] | {"train": True}],
        json.dumps(PLAINLY),
        [json.dumps(turn) for turn in PLAINLY],
    ],
    ids=str,
)
@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "marks"])
def test_dialects_read_like_plain_messages(chat_tokenizer, messages, template):
    assert learnt(chat_tokenizer, {"messages": messages}, template) == learnt(
        chat_tokenizer, {"messages": PLAINLY}, template
    )


CALLS = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {"x": 1}}}],
}
OFFERED = [{"type": "function", "function": {"name": "now", "parameters": {}}}]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"messages": [PLAINLY[0], CALLS | {"content": ""}]},
            "message 2 calls tools, which the template leaves out",
        ),
        (
            {"messages": [*PLAINLY, PLAINLY[0], CALLS | {"content": "Hm"}]},
            "message 4 calls tools, which the template",
        ),
        ({"messages": PLAINLY, "tools": OFFERED}, "it has tools, which the template leaves out; give a template that"),
    ],
)
def test_what_a_template_would_leave_out_is_refused(chat_tokenizer, row, told):
    """PLAIN knows contents alone, so that a call would be an empty answer."""
    with pytest.raises(UserError, match=f"^data.chat_template: document 1: {told}"):
        learnt(chat_tokenizer, row)
    assert learnt(chat_tokenizer, row, TOOLS)


def test_a_template_that_writes_whole_messages_names_no_key_of_theirs(chat_tokenizer):
    whole = PLAIN.replace("message['content']", "(message | tojson)")
    text, targets = learnt(chat_tokenizer, {"messages": [PLAINLY[0], CALLS]}, whole)
    assert '"name": "now"' in targets
    assert targets in text


def spoken(*words: str, **more: dict) -> list[dict]:
    """Turns of user and assistant; a word's further keys come under its name."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": word} | more.get(word, {}) for i, word in enumerate(words)]


@pytest.mark.parametrize("said", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": 0}])
@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "marks"])
def test_what_says_that_it_is_no_target_is_none_but_is_read(chat_tokenizer, said, template):
    first = {"messages": spoken("a", "bad", "c", "good", bad=said, good={"weight": 1})}
    text, targets = learnt(chat_tokenizer, first, template)
    assert (text, targets) == (
        learnt(chat_tokenizer, {"messages": spoken("a", "bad", "c", "good")})[0],
        "good<|im_end|>",
    )
    last = {"messages": spoken("a", "good", "c", "bad", bad=said)}
    assert learnt(chat_tokenizer, last, template)[1] == "good<|im_end|>"
    every = learnt(chat_tokenizer, last, template, completion_only_loss=False)
    assert every[1] == every[0].replace("bad<|im_end|>\n", "")


def test_what_says_it_in_completions(chat_tokenizer):
    turns = spoken("a", "b", "c", "d", "e", "f", d={"weight": 0})
    assert learnt(chat_tokenizer, {"prompt": turns[:1], "completion": turns[1:]})[1] == "b<|im_end|>f<|im_end|>"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("weight", 0.5, "message 2 has weight: 0.5; give 0 or 1"),
        ("train_detail", [{"begin_offset": 0}], "message 2 has train_detail, which is not known here; say weight: 0"),
        ("loss_mask", [0, 1], "message 2 has loss_mask, which is not known here"),
        (
            "content",
            [{"type": "image_url", "image_url": {}}],
            r"message 2 \(assistant\) holds image_url, which is no te",
        ),
    ],
)
def test_keys_that_say_what_counts_are_never_dropped(chat_tokenizer, key, value, told):
    with pytest.raises(UserError, match=f"data.dataset: document 1: {told}"):
        learnt(chat_tokenizer, {"messages": spoken("a", "b", b={key: value})})


def test_a_user_that_shall_be_learnt_is_refused(chat_tokenizer):
    with pytest.raises(UserError, match=r"message 1 \(user\) has train: true, but only what the assistant says"):
        learnt(chat_tokenizer, {"messages": spoken("a", "b", a={"train": True})})
    assert learnt(chat_tokenizer, {"messages": spoken("a", "b", a={"weight": 1})})[1] == "b<|im_end|>"


def test_a_refusal_in_place_of_content(chat_tokenizer):
    with pytest.raises(UserError, match=r"message 2 \(assistant\) is a refusal without content; repair or remove it"):
        learnt(chat_tokenizer, {"messages": [PLAINLY[0], {"role": "assistant", "content": None, "refusal": "no"}]})


TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "now", "arguments": {"zone": "UTC", "at": None}}}
CALLING = [PLAINLY[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"functions": [TOOL["function"]]},
        {"tools": None, "functions": json.dumps([TOOL["function"]])},
    ],
    ids=str,
)
def test_tools_of_a_row_are_told_by_the_template(chat_tokenizer, more):
    text, targets = learnt(chat_tokenizer, {"messages": CALLING, **more}, TOOLS)
    assert text.startswith(f"<|im_start|>tools\n{json.dumps([TOOL])}<|im_end|>\n")
    assert targets == 'now{"zone": "UTC", "at": null}<|im_end|>'
    text, _ = learnt(chat_tokenizer, {"prompt": CALLING[:1], "completion": CALLING[1:], "tools": [TOOL]}, TOOLS)
    assert text.startswith("<|im_start|>tools\n")


@pytest.mark.parametrize("none", [None, [], "[]", ""])
def test_rows_without_tools_have_none(chat_tokenizer, none):
    assert learnt(chat_tokenizer, {"messages": PLAINLY, "tools": none}, TOOLS) == learnt(
        chat_tokenizer, {"messages": PLAINLY}, TOOLS
    )


OPENAI = {"role": "assistant", "tool_calls": [{"id": "1", **CALL}]}
ARGUMENTS = json.dumps(CALL["function"]["arguments"])


@pytest.mark.parametrize(
    "said",
    [
        OPENAI,
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": ARGUMENTS}}]},
        {"role": "assistant", "tool_calls": json.loads(json.dumps([CALL])), "audio": None},
    ],
    ids=str,
)
def test_calls_of_tools_in_every_dialect(chat_tokenizer, said):
    assert learnt(chat_tokenizer, {"messages": [PLAINLY[0], said]}, TOOLS)[1] == f"now{ARGUMENTS}<|im_end|>"


def test_templates_that_want_arguments_as_text_get_them_so(chat_tokenizer):
    template = TOOLS.replace("call.function.arguments | tojson", "call.function.arguments")
    spelt = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": ARGUMENTS}}]}
    assert learnt(chat_tokenizer, {"messages": [PLAINLY[0], spelt]}, template)[1] == f"now{ARGUMENTS}<|im_end|>"


def test_variables_of_a_row_beat_those_of_the_run(chat_tokenizer):
    template = "{% if think %}{{ 'THINK ' + name }}{% endif %}" + PLAIN
    options = {"template_options": {"think": True, "name": "run"}}
    for given in ({"name": "row"}, '{"name": "row"}'):
        row = {"messages": PLAINLY, "chat_template_kwargs": given}
        assert learnt(chat_tokenizer, row, template, **options)[0].startswith("THINK row<|im_start|>user")
    row = {"messages": PLAINLY, "chat_template_kwargs": {"think": False}}
    assert learnt(chat_tokenizer, row, template, **options)[0].startswith("<|im_start|>user")
    with pytest.raises(UserError, match=r"document 1: its chat_template_kwargs are no object"):
        learnt(chat_tokenizer, {"messages": PLAINLY, "chat_template_kwargs": "think"}, template)


def test_a_system_text_beside_the_messages_comes_first(chat_tokenizer):
    text, targets = learnt(chat_tokenizer, {"messages": PLAINLY, "system": "Be kind."})
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi")
    assert targets == "Yo<|im_end|>"
    with pytest.raises(UserError, match=r"document 1: it has a system message and a column system; keep one"):
        learnt(chat_tokenizer, {"messages": [{"role": "system", "content": "s"}, *PLAINLY], "system": "t"})


def test_tools_with_a_prompt_of_text_are_refused(chat_tokenizer):
    with pytest.raises(UserError, match=r"document 1: it has tools, and a prompt of text has no template"):
        learnt(chat_tokenizer, {"prompt": "a", "completion": "b", "tools": [TOOL]})


def test_other_keys_and_roles_go_to_the_template():
    given = [
        {"role": "narrator", "content": "x", "name": "n"},
        {"role": "tool", "content": {"t": 1}, "tool_call_id": "1"},
    ]
    assert conversation_of(given).messages == given
    assert conversation_of([{"from": "observation", "value": "x"}]).messages == [{"role": "tool", "content": "x"}]

"""Ids, labels and bytes of every form against transformers' own templates and masks, and what is refused."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
from datasets import Dataset

from distill.data.documents.chat import Chat, decoded_bytes, read_template
from distill.data.documents.encode import Encoder
from distill.data.documents.files import load_documents, place_of
from distill.data.rows.packing import pack
from distill.errors import UserError
from distill.models.load import load_tokenizer
from helpers.chat_templates import MARKED, PLAIN, UNSTABLE


def turns(*contents: str, system: str | None = None) -> list[dict]:
    """Messages of user and assistant in turn."""
    opening = [{"role": "system", "content": system}] if system else []
    return opening + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


CONVERSATIONS = [
    turns("What is a list?", "A sequence."),
    turns("One", "Two", "Three", "Four, naïve 東京 😀", system="Count."),
    turns("  spaces ", "\nbegins with a line break", "and", "ends with two\n\n"),
    turns("no question", "an answer", "no answer to this"),
]


def reference(tokenizer, messages) -> tuple[list[int], list[int]]:
    """Ids and mask as transformers has them with the marked template."""
    out = tokenizer.apply_chat_template(
        messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    return out["input_ids"], out["assistant_masks"]


def labels_of(ids, mask) -> list[int]:
    return [token if target else -100 for token, target in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "marks"])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_conversations_have_the_ids_and_targets_of_transformers(chat_tokenizer, template, messages):
    [(ids, labels, _)] = Encoder(chat_tokenizer, Chat(template))({"messages": [messages]})
    expected, mask = reference(chat_tokenizer, messages)
    assert ids.tolist() == expected
    assert labels.tolist() == labels_of(expected, mask)
    assert sum(mask) > 0
    said = "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")
    assert chat_tokenizer.decode(ids[labels != -100]) == said


def test_a_conversation_to_the_id(chat_tokenizer):
    [(ids, labels, counts)] = Encoder(chat_tokenizer, Chat())({"messages": [turns("Hi", "Yo")]})
    start, end = chat_tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def of(text: str) -> list[int]:
        return chat_tokenizer(text)["input_ids"]

    answer = [*of("Yo"), end]
    before = [start, *of("user\nHi"), end, *of("\n"), start, *of("assistant\n")]
    assert ids.tolist() == [*before, *answer, *of("\n")]
    assert labels.tolist() == [-100] * len(before) + answer + [-100] * len(of("\n"))
    assert counts[labels != -100].sum() == len("Yo")


def test_all_tokens_are_targets_on_demand(chat_tokenizer):
    for template in (PLAIN, MARKED, UNSTABLE):
        chat = Chat(template, completion_only_loss=False)
        for ids, labels, _ in Encoder(chat_tokenizer, chat)({"messages": CONVERSATIONS}):
            assert labels.tolist() == ids.tolist()


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "marks"])
def test_completions_of_messages_are_the_assistants_messages_behind_the_prompt(chat_tokenizer, template):
    messages = CONVERSATIONS[1]
    batch = {"prompt": [messages[:4]], "completion": [messages[4:]]}
    [(ids, labels, _)] = Encoder(chat_tokenizer, Chat(template))(batch)
    expected, mask = reference(chat_tokenizer, messages)
    prompt = chat_tokenizer.apply_chat_template(messages[:4], add_generation_prompt=True)["input_ids"]
    assert expected[: len(prompt)] == prompt
    mask = [0] * len(prompt) + mask[len(prompt) :]
    assert ids.tolist() == expected
    assert labels.tolist() == labels_of(expected, mask)
    assert chat_tokenizer.decode(ids[labels != -100]) == messages[4]["content"] + "<|im_end|>"


def test_completions_of_text_begin_behind_the_prompt_and_end_with_the_end_of_sequence(tokenizer):
    prompts, completions = ["Q: 1 + 1?\n", "", "東京 is\n"], ["two", "alone", "in Japan 😀"]
    batch = {"prompt": prompts, "completion": completions}
    everything = Encoder(tokenizer, Chat(completion_only_loss=False))(batch)
    for i, (ids, labels, counts) in enumerate(Encoder(tokenizer, Chat())(batch)):
        prompt = tokenizer(prompts[i])["input_ids"]
        expected = tokenizer(prompts[i] + completions[i])["input_ids"] + [tokenizer.eos_token_id]
        assert expected[: len(prompt)] == prompt
        assert ids.tolist() == expected
        assert labels.tolist() == [-100] * len(prompt) + expected[len(prompt) :]
        assert counts[labels != -100].sum() == len(completions[i].encode())
        assert everything[i][1].tolist() == expected


def test_a_token_across_the_border_belongs_to_the_completion(tokenizer):
    whole = tokenizer("something")["input_ids"]
    merged = next(token for token in whole if len(tokenizer.decode([token])) > 1)
    text = tokenizer.decode([merged])
    [(ids, labels, _)] = Encoder(tokenizer, Chat())({"prompt": [text[:1]], "completion": [text[1:]]})
    assert labels.tolist() == ids.tolist() == [merged, tokenizer.eos_token_id]


def test_tokens_are_taken_as_they_are(tokenizer):
    ids, eos = tokenizer("words as tokens, naïve 東京")["input_ids"], tokenizer.eos_token_id
    [(got, labels, counts)] = Encoder(tokenizer, Chat())({"input_ids": [ids]})
    assert got.tolist() == labels.tolist() == ids
    assert counts.sum() == len("words as tokens, naïve 東京".encode())
    given = [-100, *ids[1:], eos]
    [(got, labels, counts)] = Encoder(tokenizer, Chat())({"input_ids": [[*ids, eos]], "labels": [given]})
    assert (got.tolist(), labels.tolist(), counts[-1]) == ([*ids, eos], given, 0)


def test_missing_documents_are_empty(chat_tokenizer):
    encode = Encoder(chat_tokenizer, Chat())
    for batch in ({"messages": [None, []]}, {"input_ids": [None, []]}, {"prompt": [None], "completion": [None]}):
        for _, labels, _ in encode(batch):
            assert (labels == -100).all()
    [(_, labels, _)] = encode({"prompt": ["a question"], "completion": [""]})
    assert (labels == -100).all()


@pytest.mark.parametrize("text", ["plain words", "naïve café 東京 😀😀", "tab\tand\nline  "])
def test_decoded_bytes_are_those_of_the_text(chat_tokenizer, text):
    ids = chat_tokenizer(f"<|im_start|>{text}<|im_end|>")["input_ids"]
    counts = decoded_bytes(chat_tokenizer, np.array(ids))
    assert (counts.sum(), counts[0], counts[-1]) == (len(text.encode()), 0, 0)


def test_a_template_that_changes_what_was_said_is_refused_and_names_the_document(chat_tokenizer):
    thought = turns("a", "<think>hm</think>b", "c", "d")
    encode = Encoder(chat_tokenizer, Chat(UNSTABLE))
    assert (encode({"messages": [turns("a", "b", "c", "d")]})[0][1] != -100).any()  # nothing is left out here
    with pytest.raises(UserError, match=r"data.chat_template: document 9: .*message 2 .*{% generation %}") as caught:
        encode({"messages": [CONVERSATIONS[0], thought]}, first=7)
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_a_conversation(chat_tokenizer):
    picky = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + PLAIN
    with pytest.raises(UserError, match=r"data.dataset: document 1: the chat template refuses it \(user first\)"):
        Encoder(chat_tokenizer, Chat(picky))({"messages": [turns("a", "b", system="s")]})


def test_a_conversation_that_the_assistant_opens(chat_tokenizer):
    opened = [{"role": "assistant", "content": "I start."}, *turns("You do.", "Yes.")]
    for system in ([], [{"role": "system", "content": "s"}]):
        [(ids, labels, _)] = Encoder(chat_tokenizer, Chat(PLAIN))({"messages": [system + opened]})
        expected, mask = reference(chat_tokenizer, system + opened)
        assert labels.tolist() == labels_of(expected, mask)
        assert chat_tokenizer.decode(ids[labels != -100]) == "I start.<|im_end|>Yes.<|im_end|>"
    default = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    [(ids, labels, _)] = Encoder(chat_tokenizer, Chat(default + PLAIN))({"messages": [opened]})
    assert chat_tokenizer.decode(ids[labels != -100]) == "I start.<|im_end|>Yes.<|im_end|>"
    unmarked = PLAIN.replace("add_generation_prompt", "false")
    with pytest.raises(UserError, match=r"document 1: what comes before message 1 "):
        Encoder(chat_tokenizer, Chat(unmarked))({"messages": [opened]})


def test_an_error_of_a_template_is_told(chat_tokenizer):
    with pytest.raises(UserError, match=r"document 1: the chat template refuses it .*; repair or remove it"):
        Encoder(chat_tokenizer, Chat(PLAIN + "{{ messages[0]['content'].index('z') }}"))({"messages": [MESSAGES]})


def test_rows_that_are_no_conversations_are_named_with_their_file(chat_tokenizer, tmp_path):
    good, without = {"messages": MESSAGES}, {"messages": [MESSAGES[0], {"role": "assistant", "content": None}]}
    nobody, silent = {"messages": [{"content": "a"}]}, {"messages": [MESSAGES[0], {"role": "assistant"}]}
    for name, rows in (("a", [good] * 3), ("b", [good, without, nobody, silent, without])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"config": None, "split": "train", "text_column": "text"}
    documents = load_documents(str(tmp_path), **options)
    with pytest.raises(UserError) as caught:
        pack(documents, chat_tokenizer, 64, True, Chat(PLAIN), place=partial(place_of, str(tmp_path)))
    b = tmp_path / "b.jsonl"
    assert str(caught.value) == (
        f"data.dataset: {b}, row 2, {b}, row 4: message 2 (assistant) has no content; "
        f"{b}, row 3: message 1 has no role; repair or remove it"
    )


def test_calls_of_tools_come_without_content(chat_tokenizer):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "now", "arguments": {}}}]}
    template = PLAIN.replace("message['content']", "(message['content'] or message['tool_calls'][0].function.name)")
    [(ids, labels, _)] = Encoder(chat_tokenizer, Chat(template))({"messages": [[MESSAGES[0], call]]})
    assert chat_tokenizer.decode(ids[labels != -100]) == "now<|im_end|>"


def test_variables_of_the_template(chat_tokenizer):
    template = "{{ greeting }}" + PLAIN
    [(ids, _, _)] = Encoder(chat_tokenizer, Chat(template, {"greeting": "Hello"}))({"messages": [turns("a", "b")]})
    assert chat_tokenizer.decode(ids).startswith("Hello<|im_start|>user")


def test_a_template_from_a_file(tmp_path):
    (tmp_path / "own.jinja").write_text(MARKED)
    assert read_template(str(tmp_path / "own.jinja")) == read_template(MARKED) == MARKED
    assert read_template(None) is None
    with pytest.raises(UserError, match=r"data.chat_template"):
        read_template(str(tmp_path / "none.jinja"))


def test_no_template_anywhere(tokenizer):
    with pytest.raises(UserError, match=r"data.chat_template: null, and the tokenizer .* has none of its own"):
        pack(Dataset.from_dict({"messages": [CONVERSATIONS[0]]}), tokenizer, 64, packing=True)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"input_ids": [1, 2, 3], "labels": [1, 2]}, "document 1: 3 input_ids and 2 labels"),
        ({"input_ids": [1, 99999]}, "document 1: the id 99999"),
        ({"input_ids": [1, 2], "labels": [-1, 2]}, "document 1: the id -1"),
    ],
)
def test_tokens_that_cannot_be(tokenizer, row, told):
    with pytest.raises(UserError, match=f"data.dataset: {told}"):
        pack(Dataset.from_list([row]), tokenizer, 64, packing=True)


def load(tmp_path, *rows: dict, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"config": None, "split": "train", "text_column": "text"} | options
    return load_documents(str(path), **options)


MESSAGES = turns("a", "b")


@pytest.mark.parametrize(
    ("row", "options", "columns"),
    [
        ({"text": "t", "id": 1}, {}, ["text"]),
        ({"messages": MESSAGES, "prompt": "p"}, {}, ["messages"]),
        ({"prompt": "p", "completion": "c", "text": "t"}, {}, ["prompt", "completion"]),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, {}, ["prompt", "completion"]),
        ({"input_ids": [1, 2], "attention_mask": [1, 1]}, {}, ["input_ids", "attention_mask"]),
        ({"conversations": MESSAGES, "id": 1}, {}, ["messages"]),
        ({"conversations": MESSAGES}, {"form": "messages"}, ["messages"]),
        ({"conversations": [{"from": "human", "value": "a"}]}, {}, ["messages"]),
        ({"conversations": MESSAGES, "text": "t"}, {}, ["text"]),
        ({"input_ids": [1, 2], "labels": [1, 2]}, {}, ["input_ids", "labels"]),
        ({"messages": MESSAGES, "text": "t"}, {"form": "text"}, ["text"]),
        ({"messages": MESSAGES, "body": "t"}, {"text_column": "body"}, ["text"]),
        ({"conversation": MESSAGES, "text": "t"}, {"messages_column": "conversation"}, ["messages"]),
    ],
)
def test_forms_are_told_by_columns(tmp_path, row, options, columns):
    assert load(tmp_path, row, **options).column_names == columns


@pytest.mark.parametrize(
    ("row", "options", "told"),
    [
        ({"body": "t"}, {}, "data.text_column: 'text' is no column .*body"),
        ({"text": "t"}, {"form": "messages"}, "data.messages_column: 'messages' is no column"),
        ({"messages": "t"}, {}, "data.messages_column: 'messages' .* holds no lists of messages"),
        ({"messages": [{"speaker": "a", "line": "b"}]}, {}, "data.messages_column: .* with role and content"),
        ({"dialog": MESSAGES}, {}, "set data.messages_column: dialog"),
        ({"instruction": "q", "output": "a"}, {}, "rename instruction and output to prompt and completion"),
        ({"prompt": "p"}, {"form": "prompt_completion"}, "data.format: prompt_completion needs the column completion"),
        ({"prompt": "p", "completion": MESSAGES}, {}, "data.format: prompt and completion .* must both be text"),
        ({"input_ids": "1 2"}, {}, "data.format: input_ids .* holds no lists of token ids"),
        ({"text": "t"}, {"form": "tokens"}, "data.format: tokens needs the column input_ids"),
    ],
)
def test_columns_that_are_not_of_their_form(tmp_path, row, options, told):
    with pytest.raises(UserError, match=told) as caught:
        load(tmp_path, row, **options)
    assert "\n" not in str(caught.value)


def test_forms_do_not_mix_in_one_table(tmp_path):
    load(tmp_path, {"messages": MESSAGES})
    (tmp_path / "more.txt").write_text("text")
    options = {"config": None, "split": "train", "text_column": "text"}
    with pytest.raises(UserError, match=r"mixes documents of different forms \(messages and text\)"):
        load_documents(str(tmp_path), **options)


def test_a_byte_order_mark_in_a_template_is_no_text(chat_tokenizer, chat_folder, tmp_path):
    turns = {"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]}
    [(expected, _, _)] = Encoder(chat_tokenizer, Chat(PLAIN))(turns)
    own = tmp_path / "own"
    shutil.copytree(chat_folder, own)
    for path in (tmp_path / "given.jinja", own / "chat_template.jinja"):
        path.write_text("\ufeff" + PLAIN, encoding="utf-8")
    for tokenizer, template in (
        (chat_tokenizer, read_template(str(tmp_path / "given.jinja"))),
        (chat_tokenizer, read_template("\ufeff" + PLAIN)),
        (chat_tokenizer, "\ufeff" + PLAIN),
        (load_tokenizer(str(own)), None),
    ):
        [(ids, _, _)] = Encoder(tokenizer, Chat(template))(turns)
        assert ids.tolist() == expected.tolist()
    assert load_tokenizer(str(own)).chat_template == PLAIN

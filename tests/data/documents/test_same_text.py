"""One form reads the same text from every kind of file, although tables fill what their rows lack."""

import json

import datasets
import pandas
import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from distill.data.documents.chat import Chat
from helpers.shown import shown, streamed

# Writes whole messages and tools as JSON, so that any key that is added shows.
WHOLE = (
    "{{ tools | tojson }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for key in message | list | sort %}{{ key + '=' + (message[key] | tojson(sort_keys=true)) + ' ' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, **properties) -> dict:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


ROWS = [
    {
        "messages": [
            {"role": "user", "content": "w?"},
            {"role": "assistant", "content": "", "tool_calls": [call("weather", city="Paris", day={"from": 1})]},
            {"role": "tool", "content": "sunny", "name": "weather"},
            {"role": "assistant", "content": "Sunny."},
        ],
        "tools": [tool("weather", city={"type": "string"}), tool("search", query={"enum": ["a", "b"]})],
    },
    {
        "messages": [
            {"role": "user", "content": "find it"},
            {"role": "assistant", "content": "So.", "tool_calls": [call("search", query="it", day={"to": 2})]},
        ],
        "tools": [tool("search", query={"type": "string", "nested": {"deep": [{"x": 1}, {"y": 2}]}})],
    },
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "weight": 1}]},
]


def write(folder, kind: str, rows: list[dict]) -> str:
    path = folder / f"rows.{kind}"
    match kind:
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "json":
            path.write_text(json.dumps(rows, indent=1))
        case "csv":
            texts = [
                {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
                for row in rows
            ]
            pandas.DataFrame(texts).to_csv(path, index=False)
        case "parquet":
            parquet.write_table(pa.Table.from_pylist(rows), path)
        case "feather":
            feather.write_feather(pa.Table.from_pylist(rows), path)
        case "saved":
            datasets.Dataset.from_list(rows).save_to_disk(path)
        case "json.parquet":
            datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(path)
    return str(path)


KINDS = ["jsonl", "json", "csv", "parquet", "feather", "saved", "json.parquet"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", [shown, streamed], ids=["table", "stream"])
def test_conversations_with_different_keys_at_every_depth(tmp_path, chat_tokenizer, kind, read):
    if kind == "csv":
        assert "NaN" not in write(tmp_path, kind, ROWS)
    found = read(chat_tokenizer, write(tmp_path, kind, ROWS), Chat(WHOLE))
    assert found == read(chat_tokenizer, write(tmp_path, "jsonl", ROWS), Chat(WHOLE))
    assert "null" not in "".join(text for text, _ in found).replace("null<|im_start|>user", "", 1)
    assert '"arguments": {"city": "Paris", "day": {"from": 1}}' in found[0][1]


@pytest.mark.parametrize("kind", ["json", "parquet", "feather", "saved"])
def test_prompts_and_completions_of_messages(tmp_path, chat_tokenizer, kind):
    rows = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in ROWS]
    expected = shown(chat_tokenizer, write(tmp_path, "jsonl", rows), Chat(WHOLE))
    assert shown(chat_tokenizer, write(tmp_path, kind, rows), Chat(WHOLE)) == expected


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "feather", "saved"])
@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "NA"}, {"text": "007"}, {"text": " x\ny "}, {"text": 'naïve, "quoted"'}],
        [{"prompt": "1+1=", "completion": "2"}, {"prompt": "null", "completion": "None"}],
        [{"prompt": "[1]", "completion": "[{}]"}],
    ],
    ids=str,
)
def test_texts(tmp_path, tokenizer, kind, rows):
    expected = shown(tokenizer, write(tmp_path, "jsonl", rows))
    assert shown(tokenizer, write(tmp_path, kind, rows)) == expected
    assert expected[0][1].endswith("<eos>")


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "feather", "saved"])
def test_tokens(tmp_path, tokenizer, kind):
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0], "completion_mask": [0, 1, 1]}, {"input_ids": [8, 9]}]
    rows[1] |= {"attention_mask": [1, 1], "completion_mask": [1, 1]}
    expected = shown(tokenizer, write(tmp_path, "jsonl", rows))
    assert shown(tokenizer, write(tmp_path, kind, rows)) == expected
    assert len({text for text, _ in expected}) == 2


def test_rows_that_lack_what_others_say(tmp_path, tokenizer, chat_tokenizer):
    """A CSV cell without anything is what a missing key is elsewhere."""
    masked = [{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}, {"input_ids": [8, 9]}]
    offered = [{key: ROWS[0][key] for key in ("messages", "tools")}, {"messages": ROWS[2]["messages"]}]
    for reader, rows in ((tokenizer, masked), (chat_tokenizer, offered)):
        expected = shown(reader, write(tmp_path, "jsonl", rows), Chat(WHOLE))
        for kind in ("json", "csv", "parquet"):
            assert shown(reader, write(tmp_path, kind, rows), Chat(WHOLE)) == expected, kind


@pytest.mark.parametrize("streaming", [False, True])
def test_a_table_of_the_hub_fills_no_keys_either(chat_tokenizer, monkeypatch, tmp_path, streaming):
    expected = shown(chat_tokenizer, write(tmp_path, "jsonl", ROWS), Chat(WHOLE))
    filled = datasets.Dataset.from_list(ROWS)
    assert "query" in filled[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    there = filled.to_iterable_dataset() if streaming else filled
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: there)
    read = streamed if streaming else shown
    assert read(chat_tokenizer, "some/name", Chat(WHOLE)) == expected


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json.parquet"])
def test_a_null_that_json_has_stays(tmp_path, chat_tokenizer, kind):
    said = [call("search", query=None), call("search", query={"a": 1})]  # of two types, so that a table has JSON there
    rows = [{"messages": [ROWS[0]["messages"][0], {"role": "assistant", "tool_calls": said}]}]
    [(_, learnt)] = shown(chat_tokenizer, write(tmp_path, kind, rows), Chat(WHOLE))
    assert '"arguments": {"query": null}' in learnt


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_a_row_has_late_is_honoured(tmp_path, chat_tokenizer, kind):
    rows = [{"messages": ROWS[2]["messages"], "tools": None}] * 120 + [ROWS[0]]
    for read in (shown, streamed):
        *_, (text, _) = read(chat_tokenizer, write(tmp_path, kind, rows), Chat(WHOLE))
        assert '"name": "weather"' in text.partition("<|im_start|>")[0]

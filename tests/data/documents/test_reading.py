"""Rows of files by hand-written inputs: what other programs write is read as it was meant, or refused by place."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pandas
import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from distill.data.documents.files import load_documents
from distill.data.documents.reading import read, without_nulls
from distill.errors import UserError
from helpers.shown import OPTIONS, shown, streamed

MARK = "\ufeff"


def texts(source, **options) -> list[str]:
    return load_documents(str(source), **(OPTIONS | options))["text"][:]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    content = {"jsonl": '{"text": "words"}\n', "ndjson": '{"text": "words"}\n', "json": '[\n{"text": "words"}\n]'}
    content |= {"csv": "text,n\nwords,1\n", "tsv": "text\tn\nwords\t1\n"}
    suffix = name.partition(".")[2]
    (tmp_path / name).write_text(MARK + content.get(suffix, "words"), encoding="utf-8")
    assert texts(tmp_path / name) == ["words"]


def test_every_file_of_several_may_begin_with_a_byte_order_mark(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(f'{MARK}{{"text": "{name}"}}\n', encoding="utf-8")
    assert texts(tmp_path / "*.jsonl") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)]
)
def test_compressed_files(tmp_path, suffix, compress):
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(compress(b'{"text": "one"}\n{"text": "two"}\n'))
    (tmp_path / f"b.txt.{suffix}").write_bytes(compress("naïve".encode()))
    (tmp_path / f"c.CSV.{suffix}").write_bytes(compress(b"text\nthree\n"))
    parquet.write_table(pa.table({"text": ["four"]}), tmp_path / "d.parquet")
    (tmp_path / f"d.parquet.{suffix}").write_bytes(compress((tmp_path / "d.parquet").read_bytes()))
    files = [tmp_path / f"{name}.{suffix}" for name in ("a.jsonl", "b.txt", "c.CSV", "d.parquet")]
    assert [text for file in files for text in texts(file)] == ["one", "two", "naïve", "three", "four"]


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a"}\n\n{"text": "b"}',
        '[{"text": "a"}, {"text": "b"}]',
        '[\n  {"text": "a"},\n  {"text": "b"}\n]\n',
        '{"text": ["a", "b"], "n": [1, 2]}'.replace(", ", ",\n"),
        '{"text": ["a", "b"], "n": [[1], []]}\n',
        '["a", "b"]',
        '"a"\n"b"\n',
    ],
)
def test_ways_to_write_json(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert texts(tmp_path / "a.json") == ["a", "b"]


def test_one_conversation_over_several_lines_is_one_record(tmp_path, chat_tokenizer):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    (tmp_path / "one.json").write_text(json.dumps({"messages": turns}, indent=2))
    assert [learnt for _, learnt in shown(chat_tokenizer, str(tmp_path / "one.json"))] == ["Yo<|im_end|>"]


@pytest.mark.parametrize("indent", [None, 1], ids=["one line", "several"])
def test_one_record_of_lists_is_not_read_by_column(tmp_path, tokenizer, indent):
    row = {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}
    (tmp_path / "one.json").write_text(json.dumps(row, indent=indent))
    assert [learnt for _, learnt in shown(tokenizer, str(tmp_path / "one.json"))] == [tokenizer.decode([6, 7])]


def test_csv_holds_text_whatever_it_looks_like(tmp_path):
    words = ["NA", "null", "007", "1.50", "True", "", " x ", 'say "hi", twice', "two\nlines"]
    pandas.DataFrame({"text": words}).to_csv(tmp_path / "a.csv", index=False)
    assert texts(tmp_path / "a.csv") == words


def test_completions_of_numbers_in_csv(tmp_path, tokenizer):
    (tmp_path / "sums.csv").write_text("prompt,completion\n1+1=,2\n2+2=,04\n")
    assert [learnt for _, learnt in shown(tokenizer, str(tmp_path / "sums.csv"))] == ["2<eos>", "04<eos>"]


@pytest.mark.parametrize("name", ["x [1].jsonl", "[abc]/y.jsonl", "what?.jsonl", "a*b.jsonl"])
def test_a_path_that_exists_is_a_path(tmp_path, tokenizer, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"text": "here"}\n')
    (tmp_path / "x 1.jsonl").write_text('{"text": "not this"}\n')
    assert texts(path) == ["here"]
    assert streamed(tokenizer, str(path)) == [("here<eos>", "here<eos>")]


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
STRING = pa.struct([("role", pa.string()), ("content", pa.string())])
VIEW = pa.struct([("role", pa.string_view()), ("content", pa.string_view())])


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_list(STRING),
        pa.list_(VIEW),
        pa.list_view(STRING),
        pa.list_(STRING, 2),
        pa.list_(pa.map_(pa.string(), pa.string())),
        pa.large_list(pa.struct([("role", pa.dictionary(pa.int8(), pa.string())), ("content", pa.large_string())])),
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["arrow", "stream.arrow"])
def test_arrow_types_of_other_writers(tmp_path, chat_tokenizer, kind, suffix):
    column = pa.array([[list(turn.items()) for turn in TURNS] if "map" in str(kind) else TURNS] * 2, kind)
    table, path = pa.table({"messages": column, "score": [1.0, None]}), tmp_path / f"a.{suffix}"
    make = pa.ipc.new_stream if suffix == "stream.arrow" else pa.ipc.new_file
    with make(str(path), table.schema) as writer:
        writer.write_table(table)
    assert [learnt for _, learnt in shown(chat_tokenizer, str(path))] == ["Yo<|im_end|>"] * 2


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_and_feather_of_every_kind_of_text(tmp_path, kind):
    table = pa.table({"text": pa.array(["a", "b"], pa.string()).cast(kind)})
    parquet.write_table(table, tmp_path / "a.parquet")
    feather.write_feather(table, tmp_path / "a.feather")
    assert texts(tmp_path / "a.parquet") == texts(tmp_path / "a.feather") == ["a", "b"]


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_nobody_needs_may_differ(tmp_path, chat_tokenizer, streaming):
    odd = [{"meta": None}, {"meta": "web", "n": 1}, {"meta": {"a": [1, {}]}, "n": "one"}, {"meta": 7, "late": [[]]}]
    rows = [{"messages": TURNS} | more for more in odd]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 60))
    (tmp_path / "b.jsonl").write_text(json.dumps(rows[3]) + "\n" + json.dumps(rows[1]) + "\n")
    lines: list[str] = []
    read_rows = streamed if streaming else shown
    found = read_rows(chat_tokenizer, str(tmp_path / "*.jsonl"), tell=lines.append)
    assert [learnt for _, learnt in found] == ["Yo<|im_end|>"] * 242
    assert lines[-1] == f"Data: columns of {str(tmp_path / '*.jsonl')!r} that are not read: meta, n, late."
    assert len(lines) == 2


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("late", [0, 120], ids=["at once", "late"])
def test_columns_that_nobody_needs_need_not_have_a_value_in_python(tmp_path, suffix, late):
    """Databases write dates beyond the year 9999 for what never ends; a map may have a key twice."""
    count = late + 2
    ends = pa.array([0] * late + [2**31 - 1] * 2, pa.int32()).cast(pa.date32())
    twice = pa.array([[("a", 1)]] * late + [[("a", 1), ("a", 2)]] * 2, pa.map_(pa.string(), pa.int64()))
    table = pa.table({"ends": ends, "text": [f"w{i}" for i in range(count)], "pairs": twice})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        parquet.write_table(table, path)
    else:
        feather.write_feather(table, path)
    lines: list[str] = []
    assert texts(path, tell=lines.append) == [f"w{i}" for i in range(count)]
    assert lines == [f"Data: columns of {str(path)!r} that are not read: ends, pairs."]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a.jsonl' cannot be read as json \(line 2: Expecting value"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"cannot be read as json \(line 2 is no object"),
        ("a.jsonl", '[{"text": "a"}]\n{"text": "b"}\n', r"cannot be read as json \(line 1 is a list and others follow"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', r"a.jsonl, row 2: text holds no text; correct it"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b \\ud83d"}\n', r"a.jsonl, row 2: text holds no text; correct it"),
        ("a.csv", "text,n\na,1\nb,2,3\n", r"cannot be read as csv \(line 3 has 3 values for 2 columns"),
        ("a.csv", "text\nwords, more\nlast, one\n", r"cannot be read as csv \(line 2 has 2 values for 1 columns"),
        ("a.csv", "n,text\n1,words, more\n2,last, one\n", r"\(line 2 has 3 values for 2 columns"),
        ("a.csv", 'n,text\n1,"so \\"what\\", twice"\n', r"\(line 2: ',' expected after '\"'\)"),
        ("a.csv", 'n,text\n1,"half a text\n2,more\n', r"\(line 3: unexpected end of data\)"),
        ("a.csv", "n,text\n1\n2,more\n", r"\(line 2 has 1 values for 2 columns"),
        ("a.csv", "text,text\na,b\n", r"\(its first line names text twice\)"),
        ("a.csv", "text;n\na;1\n", r"\(its columns are separated by ';' and not by ','\)"),
        ("a.tsv", "text,n\na,1\n", r"\(its columns are separated by ',' and not by '\\t'\)"),
        ("a.csv", 'words of a document,1\n"more\nof it",2\n', r"'text' is no column of .* \(words of a document, 1\)"),
        ("a.jsonl.gz", "no gzip", "cannot be read as json"),
        ("a.arrow", "no arrow", "cannot be read as arrow"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=told) as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n')
    assert texts(path) == ["one"]
    path.write_text('{"text": "another"}\n')
    assert texts(path) == ["another"]


def test_only_what_is_asked_for_is_decoded(tmp_path):
    parquet.write_table(pa.table({"text": ["a"], "image": [b"\x89PNG"]}), tmp_path / "a.parquet")
    assert list(read(tmp_path / "a.parquet", "data.dataset", ["text"])) == [{"text": "a"}]


def test_nulls_are_left_out_at_every_depth():
    value = {"a": None, "b": [{"c": None, "d": 1}, None], "e": {"f": {"g": None}}}
    assert without_nulls(value) == {"b": [{"d": 1}, None], "e": {"f": {}}}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_another_encoding_is_named(tmp_path, name):
    content = json.dumps({"text": "Grüße"}, ensure_ascii=False) if name == "a.jsonl" else "text\nGrüße\n"
    (tmp_path / name).write_text(content, encoding="utf-16")
    with pytest.raises(UserError, match=rf"{name}' cannot be read as .* \('utf-8' codec .*\); save it as UTF-8"):
        texts(tmp_path / name)


def test_csv_of_many_writers(tmp_path):
    """An index without a name, a text longer than a field of Python's own reader, blank lines, quotes within a text."""
    written = ["", "a, b", 'so "what"', "two\nlines", "x" * 300_000, "NA"]
    pandas.DataFrame({"text": written}).to_csv(tmp_path / "a.csv", lineterminator="\r\n")
    lines = []
    assert texts(tmp_path / "a.csv", tell=lines.append) == written
    assert lines == [f"Data: columns of {str(tmp_path / 'a.csv')!r} that are not read: column 1."]
    (tmp_path / "b.csv").write_text('n,text,n\n\n1,one "word",2\n\n')  # what nobody needs may stand there twice
    assert texts(tmp_path / "b.csv") == ['one "word"']


def test_windows_text(tmp_path):
    Path(tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert texts(tmp_path / "a.txt") == ["one\ntwo\n"]

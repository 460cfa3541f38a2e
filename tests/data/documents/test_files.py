"""Every kind of source by hand-written files, and every way in which it can be wrong."""

import datasets
import pandas
import pytest

from distill.data.documents.files import load_documents
from distill.errors import UserError

RECORDS = [{"text": "first", "n": 1}, {"text": "zweite Zeile\nnoch eine", "n": 2}]


def load(source, **options):
    options = {"config": None, "split": "train", "text_column": "text"} | options
    return load_documents(source, **options)["text"][:]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    (root / "deep").mkdir(parents=True)
    (root / ".hidden").write_text("no")
    (root / "a.txt").write_text("one\n\ndocument")
    (root / "b.md").write_text("# two")
    (root / "deep" / "c.py").write_text("three = 3\n")
    return root


def write(tmp_path, kind):
    table, path = pandas.DataFrame(RECORDS), str(tmp_path / f"records.{kind}")
    match kind:
        case "jsonl":
            table.to_json(path, orient="records", lines=True)
        case "json":
            table.to_json(path, orient="records")
        case "csv":
            table.to_csv(path, index=False)
        case "tsv":
            table.to_csv(path, index=False, sep="\t")
        case "parquet":
            table.to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_tables_hold_one_document_per_row(tmp_path, kind):
    assert load(write(tmp_path, kind)) == [record["text"] for record in RECORDS]


def test_another_column(tmp_path):
    path = tmp_path / "named.jsonl"
    path.write_text('{"content": "words", "text": 3}\n')
    assert load(str(path), text_column="content") == ["words"]


def test_text_files_are_one_document_each(folder):
    assert load(str(folder / "a.txt")) == ["one\n\ndocument"]
    assert load(str(folder)) == ["one\n\ndocument", "# two", "three = 3\n"]
    assert load(str(folder / "**" / "*.py")) == ["three = 3\n"]
    assert load([str(folder / "b.md"), str(folder / "a.txt")]) == ["# two", "one\n\ndocument"]


def test_text_and_tables_mix(folder, tmp_path):
    assert load([str(folder / "b.md"), write(tmp_path, "csv")]) == ["# two", *(record["text"] for record in RECORDS)]


def test_file_inside_a_package():
    from pydoc_data import topics

    with open(topics.__file__, encoding="utf-8") as handle:
        assert load("package://pydoc_data/topics.py") == [handle.read()]


def test_column_that_is_not_there_names_the_others(tmp_path):
    path = tmp_path / "named.jsonl"
    path.write_text('{"content": "words", "id": 3}\n')
    with pytest.raises(UserError, match=r"data.text_column: 'contents' .*\(content, id\); did you mean 'content'\?"):
        load(str(path), text_column="contents")


def test_column_without_text(tmp_path):
    with pytest.raises(UserError, match=r"data.text_column: 'n' .* holds int64, not text"):
        load(write(tmp_path, "jsonl"), text_column="n")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("image.png", b"\x89PNG\0\0", "unknown type"),
        ("latin.txt", "für".encode("latin-1"), "unknown type"),
        ("late.txt", b"a" * 20_000 + b"\xff", "cannot be read as text .*'utf-8' codec"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "cannot be read as json"),
        ("empty.jsonl", b"", "cannot be read as json|has no documents"),
        ("fake.parquet", b"nothing", "cannot be read as parquet"),
    ],
)
def test_unreadable_files(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^data.dataset: .*{name}.*({told})") as caught:
        load(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_missing_sources(tmp_path):
    for source, told in (
        ("./nowhere.txt", "does not exist"),
        (str(tmp_path / "*.nothing"), "matches no file"),
        ("package://pydoc_data/nothing.py", "has no 'nothing.py'"),
    ):
        with pytest.raises(UserError, match=f"data.dataset: .*{told}"):
            load(source)
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match="holds no files"):
        load(str(tmp_path / "void"))


def test_a_hub_that_cannot_be_reached():
    with pytest.raises(
        UserError, match=r"data.dataset: 'nobody/nothing' is no local file, and not to be had"
    ) as caught:
        load("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("Unknown split \"trian\". Should be one of ['train']."), r"data.split: 'train'.*Unknown split"),
        (ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']"), r"data.dataset_config: None.*'a'"),
    ],
)
def test_hub_errors_name_their_key(monkeypatch, error, told):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=told):
        load("some/data")

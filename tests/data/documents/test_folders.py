"""Folders by hand-written trees: a split of a data set is read as the hub reads it, any other folder as a whole."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from distill.data.datamodule import DistillationDataModule
from distill.data.documents.files import load_documents, place_of
from distill.data.documents.folders import find_files
from distill.errors import UserError
from helpers.shown import OPTIONS, streamed


def texts(source, **options) -> list[str]:
    return load_documents(str(source), **(OPTIONS | options))["text"][:]


def grow(root: Path, *names: str, card: str | None = None) -> Path:
    """A folder of files whose only document is their own name; a card if it is given."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            parquet.write_table(pa.table({"text": [name]}), path)
        elif name.endswith(".jsonl"):
            path.write_text(json.dumps({"text": name}) + "\n")
        else:
            path.write_text(name)
    if card is not None:
        (root / "README.md").write_text(card)
    return root


SHARDS = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"]


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (SHARDS, SHARDS[:2]),
        (["train.jsonl", "valid.jsonl", "test.jsonl"], ["train.jsonl"]),
        (["my_train.jsonl", "my-dev.jsonl"], ["my_train.jsonl"]),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], ["train/a.jsonl", "train/b.jsonl"]),
        (["train.txt", "test.txt"], ["train.txt"]),
        (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (["a.jsonl", "LICENSE", "dataset_infos.json"], ["a.jsonl"]),
        (["part-0.parquet", "_SUCCESS", "_delta_log/0.json"], ["part-0.parquet"]),
        (["train-00000-of-00001.parquet", "test.jsonl", "notes.txt"], ["train-00000-of-00001.parquet"]),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("card", [None, "---\nlicense: mit\n---\n# card", "# only words"])
@pytest.mark.parametrize("name", ["clone", "clone [1]"])
def test_a_clone_is_read_by_its_training_split_without_its_card(tmp_path, names, read, card, name, tokenizer):
    root = grow(tmp_path / name, *names, card=card)
    assert texts(root) == read
    assert [text for text, _ in streamed(tokenizer, str(root))] == [f"{each}<eos>" for each in read]


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["train/a.parquet", "train/b.jsonl", "dev/a.jsonl", "instruction.md"], ["train/a.parquet", "train/b.jsonl"]),
        (["a.jsonl", "README.txt", "one.txt", "two.txt"], ["a.jsonl", "one.txt", "two.txt"]),
    ],
    ids=" ".join,
)
def test_kinds_of_files_do_not_outvote_each_other(tmp_path, names, read):
    assert texts(grow(tmp_path / "clone", *names)) == read


def test_what_is_read_and_what_is_not_is_told(tmp_path):
    root, lines = grow(tmp_path / "clone", *SHARDS, ".gitattributes", card="---\n---\n"), []
    texts(root, tell=lines.append)
    assert lines == [
        f"Data: {str(root)!r}: split train, 2 files (train-00000-of-00002.parquet, train-00001-of-00002.parquet) read; "
        "2 files (test-00000-of-00001.parquet, README.md) not."
    ]
    lines.clear()
    texts(root / "data" / "test*", tell=lines.append)
    assert lines == []


CONFIGS = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: a/*.jsonl
  - split: extra
    path: test.jsonl
- config_name: other
  data_files: b/*.jsonl
---
"""


def test_configurations_of_a_card(tmp_path):
    root = grow(tmp_path / "clone", "a/x.jsonl", "a/y.jsonl", "b/z.jsonl", "test.jsonl", card=CONFIGS)
    assert texts(root, config="main") == ["a/x.jsonl", "a/y.jsonl"]
    assert texts(root, config="main", split="extra") == ["test.jsonl"]
    assert texts(root, config="other") == ["b/z.jsonl"]
    with pytest.raises(UserError, match=r"^data.dataset_config: None for .*\['main', 'other'\]") as caught:
        texts(root)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^data.dataset_config: 'third' for"):
        texts(root, config="third")


def test_splits_and_parts_of_them(tmp_path):
    root = tmp_path / "clone"
    root.mkdir()
    for split, count in (("train", 10), ("test", 4)):
        (root / f"{split}.jsonl").write_text("".join(f'{{"text": "{split}{i}"}}\n' for i in range(count)))
    assert texts(root, split="test") == [f"test{i}" for i in range(4)]
    assert texts(root, split="train[:20%]+test[-1:]") == ["train0", "train1", "test3"]
    assert texts(root / "train.jsonl", split="train[8:]") == ["train8", "train9"]
    assert place_of(str(root), 3, split="test") == f"{root}/test.jsonl, row 3"
    for split, told in (
        ("dev", r"data.split: 'dev', but .* has the splits train, test; choose one of them"),
        ("train[x]", r"data.split: 'train\[x\]' is no slice"),
    ):
        with pytest.raises(UserError, match=told):
            texts(root, split=split)
    with pytest.raises(UserError, match=r"data.split: 'test', but .*train.jsonl' has no splits; leave it out"):
        texts(root / "train.jsonl", split="test")


def test_folders_that_datasets_saved(tmp_path, tokenizer):
    first, second = (datasets.Dataset.from_dict({"text": [f"{name}{i}" for i in range(3)]}) for name in "ab")
    first.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": second, "test": first}).save_to_disk(tmp_path / "both")
    assert texts(tmp_path / "one") == ["a0", "a1", "a2"]
    assert texts(tmp_path / "both") == ["b0", "b1", "b2"]
    assert texts(tmp_path / "both", split="test") == ["a0", "a1", "a2"]
    assert [text for text, _ in streamed(tokenizer, str(tmp_path / "one"))] == [f"a{i}<eos>" for i in range(3)]


def test_what_datasets_saved_is_known_by_what_it_wrote_of_it(tmp_path):
    """Names that tell of no split, and a file that `map` has left there."""
    first, second = (datasets.Dataset.from_dict({"text": [f"{name}{i}" for i in range(2)]}) for name in "ab")
    datasets.DatasetDict({"sft": first, "held": second}).save_to_disk(tmp_path / "both")
    assert texts(tmp_path / "both", split="sft") == ["a0", "a1"]
    with pytest.raises(UserError, match=r"data.split: 'train', but .* has the splits sft, held; choose one of them"):
        texts(tmp_path / "both")
    first.save_to_disk(tmp_path / "one")
    [saved] = (tmp_path / "one").glob("data-*.arrow")
    saved.with_name("cache-0123.arrow").write_bytes(saved.read_bytes())
    assert texts(tmp_path / "one") == ["a0", "a1"]


def test_a_folder_without_a_training_split_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data.split: 'train', but .* has the splits test; choose one"):
        texts(grow(tmp_path / "clone", "test.jsonl", "README.md"))


def test_other_folders_are_the_union_of_their_texts(tmp_path):
    code = grow(tmp_path / "code", "a.py", "tests/test_a.py", "train.py", "README.md", ".hidden", "notes.txt")
    assert texts(code) == ["README.md", "a.py", "notes.txt", "tests/test_a.py", "train.py"]
    plain = grow(tmp_path / "plain", "test-plan.txt", "one.txt")
    assert texts(plain) == ["one.txt", "test-plan.txt"]


def rows(root: Path, **options) -> DistillationDataModule:
    data = DistillationDataModule(dataset=str(root), sequence_length=64, packing=False, **options)
    data.prepare_data()
    data.setup()
    return data


def test_validation_by_a_split_of_a_local_folder(tmp_path, assets):
    root = grow(tmp_path / "clone", "train.jsonl", "validation.jsonl", "test.jsonl")
    options = {"tokenizer": str(assets / "llama")}
    data = rows(root, validation_split="validation", **options)
    for table, text in ((data.train_rows, "train.jsonl"), (data.validation_rows, "validation.jsonl")):
        assert data.tokenizer.decode(table[0]["input_ids"]) == f"{text}<eos>"
    with pytest.raises(UserError, match=r"data.validation_split: 'dev' is no local file, and local data have the spl"):
        rows(root, validation_split="dev", **options)
    with pytest.raises(UserError, match=r"data.validation_split: the folder .* has the splits train, validation, test"):
        rows(root / "train.jsonl", validation_split=str(root), **options)


def test_a_card_alone_is_no_data(tmp_path):
    with pytest.raises(UserError, match=r"holds no files"):
        find_files(str(grow(tmp_path, card="---\n---\n")), "data.dataset")

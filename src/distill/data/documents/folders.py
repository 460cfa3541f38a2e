"""Which files a source names: a file, a glob, or a folder, whose splits are read as the hub reads them.

A folder that `datasets` saved, or a clone of a hub data set, has splits: one of them is read, never their union. Any
other folder is the union of its text files and tables, without what only describes them.
"""

import glob
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from distill.data.documents.reading import TABLES, suffix_of
from distill.errors import UserError
from distill.sources import resolve

ABOUT = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
CARD = "README.md"
NAMED = 3  # files that a line names


@dataclass(frozen=True)
class Found:
    """The files that a source names.

    Args:
        files: in order; where there are splits, those of all of them.
        splits: name of a split -> its files; empty where the source has none.
        left: files of a folder that are not read whatever the split.
    """

    files: list[Path]
    splits: dict[str, list[Path]] = field(default_factory=dict)
    left: list[Path] = field(default_factory=list)

    def of_split(self, source: str, split: str, key: str) -> list[Path]:
        """The files of one split, without its slice.

        Raises:
            UserError: there is no such split.
        """
        asked = split.partition("[")[0]
        if not self.splits and asked == "train":
            return self.files
        if asked not in self.splits:
            there = f"has the splits {', '.join(self.splits)}" if self.splits else "has no splits"
            raise UserError(f"{split_key(key)}: {split!r}, but {source!r} {there}; {_choose(self.splits)}")
        return self.splits[asked]

    def describe(self, source: str, split: str) -> str | None:
        """What is read of a source and what is not; None where that goes without saying."""
        read = self.splits[split.partition("[")[0]] if self.splits else self.files
        left = [path for path in [*self.files, *self.left] if path not in set(read)]
        if len(read) == 1 and not left and not Path(source).expanduser().is_dir():
            return None
        text = f"Data: {source!r}: {f'split {split}, ' if self.splits else ''}{listed(read)} read"
        return f"{text}; {listed(left)} not." if left else f"{text}."


def sliced(split: str) -> bool:
    """Whether a split's name takes a part of it, such as train[:10%]."""
    return "[" in split


def split_key(key: str) -> str:
    """The key beside one that names a source, under which its split stands."""
    is_split = key == "data.validation_split" or (key.startswith("data.validation.") and not key.endswith(".dataset"))
    return key if is_split else f"{key.rpartition('.')[0]}.split"


def _choose(splits: dict[str, list[Path]]) -> str:
    return "choose one of them" if splits else "leave it out"


def listed(files: list[Path]) -> str:
    """How many files, and the names of the first few."""
    names = ", ".join(path.name for path in files[:NAMED])
    return f"{len(files):,} file{'s' * (len(files) != 1)} ({names}{', ...' * (len(files) > NAMED)})"


def find_files(source: str, key: str, config: str | None = None) -> Found | None:
    """Files that a source names, sorted; None where it can only be a hub data set.

    Args:
        source: a path, a glob or `package://name/path`; a path that exists is a path, whatever its characters.
        key: YAML key that error messages name.
        config: configuration, of a folder that has several.

    Raises:
        UserError: nothing is there.
    """
    there = not source.startswith("package://") and Path(source).expanduser().exists()
    if glob.has_magic(source) and not there and not source.startswith("package://"):
        files = [Path(name) for name in sorted(glob.glob(str(Path(source).expanduser()), recursive=True))]
        files = [path for path in files if path.is_file()]
        if not files:
            raise UserError(f"{key}: {source!r} matches no file (looked in {Path.cwd()}); correct the pattern")
        return Found(files)
    path = Path(resolve(source, key))
    if path.is_dir():
        found = _saved(path) or _folder(path, key, config)
        if not found.files:
            raise UserError(f"{key}: the folder {source!r} holds no files; give one with text")
        return found
    return Found([path]) if path.is_file() else None


def _saved(folder: Path) -> Found | None:
    """What `save_to_disk` of `datasets` wrote: one data set, or a folder for each split."""
    if (folder / "state.json").is_file():
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return Found([folder / each["filename"] for each in state.get("_data_files", [])])
    if not (folder / "dataset_dict.json").is_file():
        return None
    names = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
    parts = {name: _saved(folder / name) for name in names}
    splits = {name: part.files for name, part in parts.items() if part is not None}
    return Found([path for files in splits.values() for path in files], splits)


def _folder(folder: Path, key: str, config: str | None) -> Found:
    """A folder's files, by splits where the hub would see some."""
    every = sorted(item for item in folder.rglob("*") if item.is_file() and not _hidden(item.relative_to(folder)))
    tables = [path for path in every if suffix_of(path) in TABLES and path.name not in ABOUT]
    about = [path for path in every if path.name in ABOUT or _is_about(path.relative_to(folder), folder, bool(tables))]
    kept = [path for path in every if path not in about]
    data = [path for path in kept if path in tables] or [path for path in kept if suffix_of(path) == ".txt"]
    splits = _hub_splits(folder, data, key, config) if data else {}
    if not splits or ("train" not in splits and not tables and not _has_card(folder)):
        return Found(kept, left=about)  # where no split is, or texts of which one happens to be called test
    read = [path for files in splits.values() for path in files]
    return Found(read, splits, [path for path in every if path not in set(read)])


def _hub_splits(folder: Path, data: list[Path], key: str, config: str | None) -> dict[str, list[Path]]:
    """Split -> files, as `datasets` tells them by the card of a folder or by names; empty where neither says any."""
    import datasets
    from datasets.data_files import DataFilesDict, get_data_patterns

    with _stand_in(folder, data) as plain:
        try:
            if config is not None or _names_files(folder):
                found = datasets.load_dataset_builder(str(plain), config).config.data_files or {}
            else:  # by names alone: a builder would leave out all kinds of files but the most frequent
                patterns = get_data_patterns(str(plain))
                found = {} if [*patterns.values()] == [["**"]] else DataFilesDict.from_patterns(patterns, str(plain))
        except Exception as error:
            text = " ".join(str(error).split())
            if re.search("^Config name is missing|^BuilderConfig .* not found", text):
                section = key.rpartition(".")[0]
                raise UserError(f"{section}.dataset_config: {config!r} for {str(folder)!r}: {text}") from error
            return {}
    return {str(split): [folder / Path(name).relative_to(plain) for name in names] for split, names in found.items()}


@contextmanager
def _stand_in(folder: Path, data: list[Path]) -> Iterator[Path]:
    """Another folder with the same card and names of data, and nothing else whose name could tell of a split."""
    with TemporaryDirectory() as place:
        plain = Path(place).resolve()
        for path in data:
            copy = plain / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.touch()
        if (folder / CARD).is_file():
            (plain / CARD).write_bytes((folder / CARD).read_bytes())
        yield plain


def _names_files(folder: Path) -> bool:
    """Whether the card of a folder says which files are which split."""
    said = rb"^\s*-?\s*data_(files|dir):"
    return _has_card(folder) and re.search(said, (folder / CARD).read_bytes(), re.MULTILINE) is not None


def _has_card(folder: Path) -> bool:
    card = folder / CARD
    return card.is_file() and card.read_bytes().removeprefix(b"\xef\xbb\xbf").startswith(b"---")


def _is_about(path: Path, folder: Path, beside_tables: bool) -> bool:
    """Whether a file of a folder describes its data: a hub's card, or beside tables a README, a licence or a log.

    Spark, Arrow and Delta Lake begin the names of their own files and folders with a low line.
    """
    if path.name == CARD and _has_card((folder / path).parent):
        return True
    plain = path.stem.upper() in ("README", "LICENSE", "LICENCE", "CITATION", "CHANGELOG")
    return beside_tables and (plain or any(part.startswith("_") for part in path.parts))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)

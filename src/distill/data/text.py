"""Where documents come from: hub data sets and local files become one `datasets` table with one column, `text`.

A text file is one document; tables (JSON, Parquet, CSV, hub) hold one per row. `datasets` reads, checks and caches, so
a second run starts from memory-mapped Arrow files; the price is a copy of local text in its cache.
"""

import codecs
import glob
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from distill.errors import UserError, did_you_mean
from distill.sources import resolve

TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
}


def load_documents(
    source: str | list[str], *, config: str | None, split: str, text_column: str, key: str = "data.dataset"
) -> Dataset:
    """All documents of one or more sources, in order: a table with the single column `text`.

    Args:
        source: hub name, local file, folder, glob or `package://name/path`, or a list of them.
        config: configuration of a hub data set.
        split: split of a hub data set, slices such as `train[:1%]` included; local files have none.
        text_column: column of tables that holds the text.
        key: YAML key that error messages name.

    Raises:
        UserError: missing or empty data, unreadable files, a column that is not there or holds no text.
    """
    parts = []
    for name in [source] if isinstance(source, str) else source:
        files = local_files(name, key)
        loaded = _load_hub(name, config, split, key) if files is None else _load_files(files, key)
        parts += [_text_of(table, text_column, name) for table in loaded]
    if not any(part.num_rows for part in parts):
        raise UserError(f"{key}: {source!r} has no documents; give a source with text")
    if len({part.features["text"].dtype for part in parts}) > 1:  # Arrow has two kinds of string
        parts = [part.cast_column("text", datasets.Value("large_string")) for part in parts]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def local_files(source: str, key: str) -> list[Path] | None:
    """Files that a source names, sorted; None where it can only be a hub data set."""
    if glob.has_magic(source) and not source.startswith("package://"):
        files = [Path(name) for name in sorted(glob.glob(str(Path(source).expanduser()), recursive=True))]
        files = [path for path in files if path.is_file()]
        if not files:
            raise UserError(f"{key}: {source!r} matches no file (looked in {Path.cwd()}); correct the pattern")
        return files
    path = Path(resolve(source, key))
    if path.is_dir():
        files = sorted(item for item in path.rglob("*") if item.is_file() and not _hidden(item.relative_to(path)))
        if not files:
            raise UserError(f"{key}: the folder {source!r} holds no files; give one with text")
        return files
    return [path] if path.is_file() else None


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _load_files(files: list[Path], key: str) -> list[Dataset]:
    """One table per kind of file, each in the order of its files."""
    by_kind: dict[str, list[str]] = {}
    for path in files:
        suffix = path.suffix.lower()
        if suffix not in TABLES and not _is_text(path):
            raise UserError(
                f"{key}: {str(path)!r} is of an unknown type; give UTF-8 text files or {', '.join(TABLES)}, "
                "for instance by a glob such as folder/**/*.md"
            )
        by_kind.setdefault(suffix if suffix in TABLES else "", []).append(str(path))
    tables = []
    for suffix, names in by_kind.items():
        builder, options = TABLES.get(suffix, ("text", {"sample_by": "document"}))
        try:
            with bars_on_terminals():
                tables.append(datasets.load_dataset(builder, data_files=names, split="train", **options))
        except Exception as error:
            reason = str(error.__cause__ or error).partition("\n")[0] or "it is empty"
            shown = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
            raise UserError(f"{key}: {shown!r} cannot be read as {builder} ({reason}); repair the file") from error
    return tables


def _is_text(path: Path) -> bool:
    with path.open("rb") as handle:
        head = handle.read(8192)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _load_hub(name: str, config: str | None, split: str, key: str) -> list[Dataset]:
    try:
        with bars_on_terminals():
            loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:
        text = str(error)
        reason = text.partition("\n")[0].rstrip(". ")
        if "config" in text.lower() and ("missing" in text or "not found" in text or "pick one" in text):
            choices = " ".join(text.split())
            raise UserError(f"{key.rpartition('.')[0]}.dataset_config: {config!r} for {name!r}: {choices}") from error
        if "split" in text.lower() and isinstance(error, ValueError):
            raise UserError(f"{key.rpartition('.')[0]}.split: {split!r} for {name!r}: {reason}; correct it") from error
        raise UserError(
            f"{key}: {name!r} is no local file, and not to be had from the hub ({reason}); check the spelling and the "
            "network, or give local files"
        ) from error
    return [loaded]


def _text_of(table: Dataset, column: str, source: str) -> Dataset:
    """The table with its text column alone, called `text`."""
    if column not in table.column_names:
        names = table.column_names
        remedy = did_you_mean(column, names)
        raise UserError(f"data.text_column: {column!r} is no column of {source!r} ({', '.join(names)}); {remedy}")
    kind = getattr(table.features[column], "dtype", None)
    if kind not in ("string", "large_string"):
        raise UserError(
            f"data.text_column: {column!r} of {source!r} holds {kind or 'nested data'}, not text; name another"
        )
    table = table.select_columns([column])
    return table if column == "text" else table.rename_column(column, "text")


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Progress bars of `datasets` only where someone can see them move."""
    on = not datasets.are_progress_bars_disabled()
    if on and not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if on:
            datasets.enable_progress_bars()

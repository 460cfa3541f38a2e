"""Where documents come from: hub data sets and local files become one `datasets` table with the columns of one form.

A text file is one document; tables (JSON, Parquet, CSV, hub) hold one per row. `datasets` reads, checks and caches, so
a second run starts from memory-mapped Arrow files; the price is a copy of local text in its cache. It is imported where
it is used, since that takes most of a second, which `--help` and mistakes in a configuration should not cost.
"""

import codecs
import glob
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.data.documents.forms import FormOption, recognise
from distill.errors import UserError
from distill.sources import resolve

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
}


def load_documents(
    source: str | list[str],
    *,
    config: str | None,
    split: str,
    text_column: str,
    messages_column: str = "messages",
    form: FormOption = "auto",
    key: str = "data.dataset",
) -> "Dataset":
    """All documents of one or more sources, in order: a table with the columns of one form alone, see `recognise`.

    Args:
        source: hub name, local file, folder, glob or `package://name/path`, or a list of them.
        config: configuration of a hub data set.
        split: split of a hub data set, slices such as `train[:1%]` included; local files have none.
        text_column: column of tables that holds the text.
        messages_column: column of tables that holds conversations.
        form: of the documents; auto = by their columns.
        key: YAML key that error messages name.

    Raises:
        UserError: missing or empty data, unreadable files, a column that is not there or holds something else.
    """
    import datasets

    parts = []
    for name in [source] if isinstance(source, str) else source:
        for table in _load(name, config, split, key):
            columns = recognise(
                table.features, name, form=form, text_column=text_column, messages_column=messages_column
            )
            renamed = {column: own for own, column in columns.items() if own != column}
            parts.append(table.select_columns(list(columns.values())).rename_columns(renamed))
    if not any(part.num_rows for part in parts):
        raise UserError(f"{key}: {source!r} has no documents; give a source with text")
    if len(parts) == 1:
        return parts[0]
    if len({tuple(part.column_names) for part in parts}) > 1:
        found = " and ".join(sorted({", ".join(part.column_names) for part in parts}))
        raise UserError(
            f"{key}: {source!r} mixes documents of different forms ({found}); list them as parts, each {{dataset: ...}}"
        )
    if "text" in parts[0].column_names and len({part.features["text"].dtype for part in parts}) > 1:
        parts = [part.cast_column("text", datasets.Value("large_string")) for part in parts]  # Arrow has two strings
    try:
        return datasets.concatenate_datasets(parts)
    except ValueError as error:
        raise UserError(
            f"{key}: the tables of {source!r} differ in what their columns hold; list them as parts, "
            "each {dataset: ...}"
        ) from error


def place_of(source: str | list[str], number: int, document: Any = None) -> str:
    """File and row of a document of `load_documents`; since files are counted for it, only for error messages.

    Args:
        source: as for `load_documents`.
        number: of the document, from 1.
        document: not looked into.
    """
    names = [source] if isinstance(source, str) else source
    for name in names:
        files = local_files(name, "data.dataset")
        if files is None and len(names) == 1:
            return f"{name}, row {number}"
        if files is None:
            break
        for file in (file for kind in _by_kind(files, "data.dataset").values() for file in kind):
            rows = _load_files([Path(file)], "data.dataset", streaming=False)[0].num_rows
            if number <= rows:
                return f"{file}, row {number}"
            number -= rows
    return f"document {number}"


def open_stream(
    source: str | list[str],
    *,
    config: str | None,
    split: str,
    text_column: str,
    messages_column: str = "messages",
    form: FormOption = "auto",
    key: str = "data.dataset",
) -> tuple["IterableDataset", dict[str, str]]:
    """The documents of one source as they are read, and the columns of their form, see `recognise`.

    Args:
        source: as for `load_documents`, but all files of one kind.
        config: configuration of a hub data set.
        split: split of a hub data set.
        text_column: column that holds the text.
        messages_column: column that holds conversations.
        form: of the documents; auto = by their columns.
        key: YAML key that error messages name.

    Raises:
        UserError: as `load_documents` does, for the first document; several streams, whose lengths nobody knows.
    """
    import datasets

    names = [source] if isinstance(source, str) else source
    streams = [stream for name in names for stream in _load(name, config, split, key, streaming=True)]
    if len(streams) != 1:
        raise UserError(
            f"{key}: {source!r} makes {len(streams)} streams whose lengths nobody knows; list them as parts, each "
            "{dataset: ..., weight: ...}"
        )
    try:
        first = next(iter(streams[0]), None)
    except Exception as error:
        raise UserError(f"{key}: {source!r} cannot be read ({_reason(error)}); repair it") from error
    if first is None:
        raise UserError(f"{key}: {source!r} has no documents; give a source with text")
    features = streams[0].features or datasets.Dataset.from_list([first]).features
    return streams[0], recognise(features, source, form=form, text_column=text_column, messages_column=messages_column)


def _reason(error: Exception) -> str:
    return str(error.__cause__ or error).partition("\n")[0] or "it is empty"


def _load(name: str, config: str | None, split: str, key: str, streaming: bool = False) -> list[Any]:
    files = local_files(name, key)
    if files is None:
        return _load_hub(name, config, split, key, streaming)
    return _load_files(files, key, streaming)


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


def _by_kind(files: list[Path], key: str) -> dict[str, list[str]]:
    """Suffix of TABLES, or nothing for text -> its files in order."""
    by_kind: dict[str, list[str]] = {}
    for path in files:
        suffix = path.suffix.lower()
        if suffix not in TABLES and not _is_text(path):
            raise UserError(
                f"{key}: {str(path)!r} is of an unknown type; give UTF-8 text files or {', '.join(TABLES)}, "
                "for instance by a glob such as folder/**/*.md"
            )
        by_kind.setdefault(suffix if suffix in TABLES else "", []).append(str(path))
    return by_kind


def _load_files(files: list[Path], key: str, streaming: bool) -> list[Any]:
    """One table, or stream, per kind of file, each in the order of its files."""
    import datasets

    tables = []
    for suffix, names in _by_kind(files, key).items():
        builder, options = TABLES.get(suffix, ("text", {"sample_by": "document"}))
        try:
            with bars_on_terminals():
                tables.append(
                    datasets.load_dataset(builder, data_files=names, split="train", streaming=streaming, **options)
                )
        except Exception as error:
            shown = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
            raise UserError(
                f"{key}: {shown!r} cannot be read as {builder} ({_reason(error)}); repair the file"
            ) from error
    return tables


def _is_text(path: Path) -> bool:
    with path.open("rb") as handle:
        head = handle.read(8192)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _load_hub(name: str, config: str | None, split: str, key: str, streaming: bool) -> list[Any]:
    import datasets

    try:
        with bars_on_terminals():
            loaded = datasets.load_dataset(name, config, split=split, streaming=streaming)
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


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Progress bars of `datasets` only where someone can see them move."""
    import datasets

    on = not datasets.are_progress_bars_disabled()
    if on and not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if on:
            datasets.enable_progress_bars()

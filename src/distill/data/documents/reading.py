"""The rows of one local file, whoever wrote it: plain Python values, by column, exactly as the file has them.

Tables are read row by row rather than into one Arrow type, so that rows may have different keys at any depth and only
the columns that are asked for need to make sense. Parquet and Arrow files do have one type, which fills what a row
lacks with null: there nulls within a value are left out again. That takes about 0.1 ms a row, once.

A file may be compressed (.gz, .bz2, .xz, .zst) and may begin with a byte order mark.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from distill.errors import UserError

if TYPE_CHECKING:
    import pyarrow


Row = dict[str, Any]
HEAD = 100  # rows from which the columns of a file are known
CHUNK = 1000  # rows that are decoded at once


def _zstd(path: str) -> Any:
    import pyarrow

    return pyarrow.input_stream(path, compression="zstd")


COMPRESSIONS: dict[str, Callable[[str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstd,
}


def suffix_of(path: Path) -> str:
    """The suffix that tells what a file holds, in lower case, compression aside.

    Example:
        >>> suffix_of(Path("chats.JSONL.gz"))
        '.jsonl'
    """
    if path.suffix.lower() in COMPRESSIONS:
        path = path.with_suffix("")
    return path.suffix.lower()


def kind_of(path: Path, key: str) -> str:
    """Which of READERS reads a file.

    Raises:
        UserError: it is neither a table nor text.
    """
    suffix = suffix_of(path)
    if suffix in TABLES:
        return TABLES[suffix]
    if not _is_text(path):
        raise UserError(
            f"{key}: {str(path)!r} is of an unknown type; give UTF-8 text files or {', '.join(TABLES)}, "
            "for instance by a glob such as folder/**/*.md"
        )
    return "text"


def read(path: str | Path, key: str, columns: list[str] | None = None) -> Iterator[Row]:
    """The rows of a file.

    Args:
        path: of the file.
        key: YAML key that error messages name.
        columns: those that are needed; None = all.

    Raises:
        UserError: the file cannot be read.
    """
    kind = kind_of(Path(path), key)
    try:
        yield from READERS[kind](Path(path), columns)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        remedy = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "repair the file"
        raise UserError(f"{key}: {str(path)!r} cannot be read as {kind} ({reason}); {remedy}") from error


def head(path: Path, key: str) -> list[Row]:
    """The first rows of a file with all of their columns; what cannot be decoded is null there."""
    return list(islice(read(path, key), HEAD))


def without_nulls(value: Any) -> Any:
    """A value without the keys that a table filled with null, at any depth.

    Example:
        >>> without_nulls([{"name": "now", "arguments": {"query": None}}])
        [{'name': 'now', 'arguments': {}}]
    """
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def _opened(path: Path) -> IO[bytes]:
    return COMPRESSIONS.get(path.suffix.lower(), lambda name: open(name, "rb"))(str(path))


def _unpacked(path: Path) -> bytes:
    with _opened(path) as handle:
        return handle.read()


def _is_text(path: Path) -> bool:
    try:
        with _opened(path) as handle:
            start = handle.read(8192)
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except (UnicodeDecodeError, OSError, EOFError, lzma.LZMAError):
        return False
    return b"\0" not in start


def _text(path: Path, columns: list[str] | None) -> Iterator[Row]:
    """A text file is one document."""
    with io.TextIOWrapper(_opened(path), encoding="utf-8-sig") as handle:
        yield {"text": handle.read()}


def _json(path: Path, columns: list[str] | None) -> Iterator[Row]:
    """JSON Lines, an array of records or of texts, or one object: a record, or lists by column."""
    with io.TextIOWrapper(_opened(path), encoding="utf-8-sig") as handle:
        lines = ((number, line) for number, line in enumerate(handle, start=1) if line.strip())
        number, line = next(lines, (0, "[]"))
        try:
            first = json.loads(line)
        except json.JSONDecodeError:  # not one record a line
            first = list(_records(json.loads(line + handle.read())))
        if isinstance(first, list):
            for index, record in enumerate(first, start=1):
                yield _record(record, f"record {index}")
            if next(lines, None) is not None:
                raise ValueError(f"line {number} is a list and others follow")
            return
        second = next(lines, None)
        for record in _records(first) if second is None else [first]:
            yield _record(record, f"line {number}")
        for number, line in chain([second] if second else [], lines):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg}") from error
            yield _record(record, f"line {number}")


def _records(whole: Any) -> Iterator[Any]:
    """The records of a JSON document."""
    if isinstance(whole, list):
        yield from whole
        return
    if not isinstance(whole, dict) or not _by_columns(whole):
        yield whole
        return
    for values in zip(*whole.values(), strict=True):
        yield dict(zip(whole, values, strict=True))


def _by_columns(whole: Row) -> bool:
    """Whether an object holds lists by column, and is not one record whose own values are lists."""
    lists = list(whole.values())
    if not lists or not all(isinstance(each, list) and len(each) == len(lists[0]) for each in lists):
        return False
    turns = any(isinstance(item, dict) and item.keys() & {"role", "from"} for each in lists for item in each)
    tokens = any(isinstance(item, int) for item in whole.get("input_ids", []))
    return not turns and not tokens


def _record(record: Any, where: str) -> Row:
    if isinstance(record, str):
        return {"text": record}
    if not isinstance(record, dict):
        raise ValueError(f"{where} is no object")
    return record


def _separated(separator: str) -> Callable[[Path, list[str] | None], Iterator[Row]]:
    def rows(path: Path, columns: list[str] | None) -> Iterator[Row]:
        """Every value is text: "NA", "007" and "null" are what they say.

        A line has a value for each column: commas that nobody quoted would shift a text into its neighbours' places.
        """
        csv.field_size_limit(2**31 - 1)  # a document may be longer than the 128 KiB that a field has by default
        with io.TextIOWrapper(_opened(path), encoding="utf-8-sig", newline="") as handle:
            lines = csv.reader(handle, delimiter=separator, strict=True)
            try:
                names = _names(next(lines, []), separator, columns or [])
                for values in filter(None, lines):
                    if len(values) != len(names):
                        raise ValueError(f"line {lines.line_num} has {len(values)} values for {len(names)} columns")
                    row = zip(names, values, strict=True)
                    yield {name: value for name, value in row if columns is None or name in columns}
            except csv.Error as error:
                raise ValueError(f"line {lines.line_num}: {error}") from error

    return rows


def _names(first: list[str], separator: str, needed: list[str]) -> list[str]:
    """The columns that a table's first line names.

    Raises:
        ValueError: one that is needed stands there twice, or another character separates them.
    """
    for name in needed:
        if first.count(name) > 1:
            raise ValueError(f"its first line names {name} twice")
    other = next((mark for mark in ",;\t|" if len(first) == 1 and mark in first[0]), None)
    if other is not None:
        raise ValueError(f"its columns are separated by {other!r} and not by {separator!r}")
    return [name or f"column {place}" for place, name in enumerate(first, start=1)]  # as an index has none


def _parquet(path: Path, columns: list[str] | None) -> Iterator[Row]:
    from pyarrow import parquet

    compressed = path.suffix.lower() in COMPRESSIONS
    file = parquet.ParquetFile(io.BytesIO(_unpacked(path)) if compressed else str(path))
    known = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
    for batch in file.iter_batches(HEAD if columns is None else CHUNK, columns=known):
        yield from _plain(batch, known is None)


def _arrow(path: Path, columns: list[str] | None) -> Iterator[Row]:
    """The file format and the stream format, which `datasets` writes."""
    import pyarrow

    compressed = path.suffix.lower() in COMPRESSIONS
    source = io.BytesIO(_unpacked(path)) if compressed else pyarrow.memory_map(str(path))
    try:
        file = pyarrow.ipc.open_file(source)
        batches = (file.get_batch(index) for index in range(file.num_record_batches))
    except pyarrow.ArrowInvalid:
        source.seek(0)
        batches = iter(pyarrow.ipc.open_stream(source))
    for batch in batches:
        if columns is not None:
            batch = batch.select([name for name in columns if name in batch.schema.names])
        for start in range(0, batch.num_rows, CHUNK):
            yield from _plain(batch.slice(start, CHUNK), columns is None)


def _plain(batch: "pyarrow.RecordBatch", whole: bool) -> Iterator[Row]:
    """Rows as plain values; of whole ones a column that has none, such as a date beyond Python's, is null."""
    kinds = {field.name: field.type for field in batch.schema if "json" in str(field.type)}
    try:
        rows = batch.to_pylist(maps_as_pydicts="strict")
    except Exception:  # which of them pyarrow raises depends on the type
        if not whole:
            raise
        columns = {name: _values(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for row in rows:
        plain = {name: without_nulls(value) for name, value in row.items()}
        yield plain | {name: _from_json(plain[name], kind) for name, kind in kinds.items()}  # whose nulls were written


def _values(column: "pyarrow.Array") -> list[Any]:
    try:
        return column.to_pylist(maps_as_pydicts="strict")
    except Exception:  # as above
        return [None] * len(column)


def _from_json(value: Any, kind: Any) -> Any:
    """A value in whose type some parts are JSON, which `datasets` writes where rows differ in their keys."""
    import pyarrow

    if value is None or isinstance(kind, pyarrow.JsonType):
        return value and json.loads(value)
    if isinstance(value, dict) and pyarrow.types.is_struct(kind):
        return {name: _from_json(inner, kind.field(name).type) for name, inner in value.items()}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_from_json(item, kind.value_type) for item in value]
    return value


READERS: dict[str, Callable[[Path, list[str] | None], Iterator[Row]]] = {
    "text": _text,
    "json": _json,
    "csv": _separated(","),
    "tsv": _separated("\t"),
    "parquet": _parquet,
    "arrow": _arrow,
}
TABLES = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".arrow": "arrow",
    ".feather": "arrow",
}

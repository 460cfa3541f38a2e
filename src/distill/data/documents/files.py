"""Where documents come from: hub data sets and local files become one `datasets` table with the columns of one form.

A text file is one document; tables (JSON, Parquet, Arrow, CSV, hub) hold one per row. Local files are copied once into
the cache of `datasets`, so a second run starts from memory-mapped Arrow files. `datasets` is imported where it is used,
since that takes most of a second, which `--help` and mistakes in a configuration should not cost.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.data.documents.folders import Found, find_files, sliced, split_key
from distill.data.documents.forms import (
    MADE_OF,
    SAID_OF,
    TEXTS,
    Form,
    FormOption,
    Row,
    form_of,
    is_text,
    recognise,
    sample,
    stored,
)
from distill.data.documents.hub import bars_on_terminals, load_hub
from distill.data.documents.reading import HEAD, head, kind_of, read
from distill.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

READ_FORMAT = 3  # part of the cache's key; a change of what is read of a file is a new number
Tell = Callable[[str], object]


@dataclass(frozen=True)
class Table:
    """A local file, and what is read of it.

    Args:
        path: of the file.
        form: of its documents.
        columns: pairs of a form's column and the file's, of those that its first rows have.
        texts: those of the form's columns that hold text; all others hold nested values.
        unread: the file's other columns.
    """

    path: str
    form: Form
    columns: tuple[tuple[str, str], ...]
    texts: tuple[str, ...]
    unread: tuple[str, ...]


def load_documents(
    source: str | list[str],
    *,
    config: str | None,
    split: str,
    text_column: str,
    messages_column: str = "messages",
    form: FormOption = "auto",
    key: str = "data.dataset",
    tell: Tell = str,
) -> "Dataset":
    """All documents of one or more sources, in order: a table with the columns of one form alone, see `recognise`.

    Args:
        source: hub name, local file, folder, glob or `package://name/path`, or a list of them.
        config: configuration of a hub data set, or of a folder that is a clone of one.
        split: split of them, slices such as `train[:1%]` included; a file has one split, train.
        text_column: column of tables that holds the text.
        messages_column: column of tables that holds conversations.
        form: of the documents; auto = by their columns.
        key: YAML key that error messages name.
        tell: gets a sentence on what is read of several files, and one on the columns that are not read.

    Raises:
        UserError: missing or empty data, unreadable files, a column that is not there or holds something else.
    """
    import datasets

    options: dict[str, Any] = {"form": form, "text_column": text_column, "messages_column": messages_column}
    parts: list[Dataset] = []
    for name in [source] if isinstance(source, str) else source:
        if (found := find_files(name, key, config)) is None:
            loaded = load_hub(name, config, split, key, streaming=False)
            columns = _hub_columns(name, loaded.with_format("arrow")[:HEAD].to_pylist(), options, key, tell)
            renamed = {column: own for own, column in columns.items() if own != column}
            parts.append(loaded.select_columns(list(columns.values())).rename_columns(renamed))
            continue
        for piece in split.split("+"):
            tables = _tables(name, found, piece, options, key, tell)
            _check_alike(source, tables, key)
            parts += [_sliced(_copied(tables, key), found, piece, key)] if tables else []
    if not any(part.num_rows for part in parts):
        raise UserError(f"{key}: {source!r} has no documents; give a source with text")
    forms = {form_of(part.column_names) for part in parts}
    if len(forms) > 1:
        raise _mixed(source, forms, key)
    if len({str(part.features.get("text")) for part in parts}) > 1:
        parts = [part.cast_column("text", datasets.Value("large_string")) for part in parts]  # Arrow has two strings
    try:
        whole = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    except ValueError as error:
        raise UserError(
            f"{key}: the tables of {source!r} differ in what their columns hold; list them as parts, "
            "each {dataset: ...}"
        ) from error
    counts = {name: whole.data.column(name).null_count for name in whole.column_names}
    silent = [name for name in SAID_OF[forms.pop()] if counts.get(name) == whole.num_rows]
    return whole.remove_columns(silent) if silent else whole


def open_stream(
    source: str | list[str],
    *,
    config: str | None,
    split: str,
    text_column: str,
    messages_column: str = "messages",
    form: FormOption = "auto",
    key: str = "data.dataset",
    tell: Tell = str,
) -> tuple["IterableDataset", dict[str, str]]:
    """The documents of one source as they are read, and the columns of their form, see `recognise`.

    Args:
        source: as for `load_documents`, but all files of one kind.
        config: likewise.
        split: likewise, without a slice.
        text_column: likewise.
        messages_column: likewise.
        form: likewise.
        key: likewise.
        tell: likewise.

    Raises:
        UserError: as `load_documents` does, for the first documents; several streams, whose lengths nobody knows.
    """
    import datasets

    options: dict[str, Any] = {"form": form, "text_column": text_column, "messages_column": messages_column}
    places = {name: find_files(name, key, config) for name in ([source] if isinstance(source, str) else source)}
    streams = []
    for name, found in places.items():
        files = [None] if found is None else found.of_split(name, split, key)
        streams += [name for _ in {file and kind_of(file, key) for file in files}]
    if len(streams) != 1:
        raise UserError(
            f"{key}: {source!r} makes {len(streams)} streams whose lengths nobody knows; list them as parts, each "
            "{dataset: ..., weight: ...}"
        )
    [name] = streams
    if (found := places[name]) is None:
        stream = load_hub(name, config, split, key, streaming=True)
        try:
            first = list(islice(stream, HEAD))
        except Exception as error:
            raise UserError(f"{key}: {source!r} cannot be read ({reason_of(error)}); repair it") from error
        return stream, _hub_columns(name, first, options, key, tell)
    if sliced(split):
        raise UserError(f"{split_key(key)}: {split!r}: a stream has no known length to take a part of; name a split")
    tables = _tables(name, found, split, options, key, tell)
    if not tables:
        raise UserError(f"{key}: {source!r} has no documents; give a source with text")
    _check_alike(source, tables, key)
    # Of tokens it must be known beforehand whether the next row may go on with a document, see `goes_on`.
    late = SAID_OF[tables[0].form] if tables[0].form != "tokens" else ()
    own = tuple(dict.fromkeys([*(column for table in tables for column, _ in table.columns), *late]))
    stream = datasets.IterableDataset.from_generator(
        rows_of, _features(own, tables[0]), {"tables": tables, "own": own, "key": key}
    )
    return stream, {column: column for column in own}


def rows_of(tables: Iterable[Table], own: tuple[str, ...], key: str) -> Iterator[Row]:
    """The rows of several files under the names of a form, nested values as `stored` keeps them.

    Raises:
        UserError: a file cannot be read, or a row holds something else than the first ones.
    """
    for table in tables:
        columns = {name: name for name in SAID_OF[table.form] if name not in table.unread} | dict(table.columns)
        for number, row in enumerate(read(table.path, key, list(columns.values())), start=1):
            found: Row = dict.fromkeys(own)
            for name, column in columns.items():
                value = row.get(column)
                if value is None or (value == "" and name not in table.texts):  # CSV has no other null
                    continue
                if name not in own:
                    raise UserError(
                        f"{key}: {table.path}, row {number} has {column}, which none of the first {HEAD} rows has; "
                        "put a row with it first"
                    )
                if name in table.texts and not is_text(value):
                    raise UserError(f"{key}: {table.path}, row {number}: {column} holds no text; correct it")
                found[name] = value if name in table.texts else stored(value)
            yield found


def place_of(
    source: str | list[str], number: int, document: Any = None, *, config: str | None = None, split: str = "train"
) -> str:
    """File and row of a document of `load_documents`; since files are counted for it, only for error messages.

    Args:
        source: as for `load_documents`.
        number: of the document, from 1.
        document: not looked into.
        config: as for `load_documents`.
        split: likewise.
    """
    names, key = [source] if isinstance(source, str) else source, "data.dataset"
    for name in names:
        found = find_files(name, key, config)
        if found is None and len(names) == 1:
            return f"{name}, row {number}"
        if found is None or sliced(split):
            break
        for file in found.of_split(name, split, key):
            rows = sum(1 for _ in read(file, key))
            if number <= rows:
                return f"{file}, row {number}"
            number -= rows
    return f"document {number}"


def _tables(name: str, found: Found, split: str, options: dict[str, Any], key: str, tell: Tell) -> list[Table]:
    """What is read of each file of a source; those without rows are left out."""
    files = found.of_split(name, split, key)
    if (line := found.describe(name, split)) is not None:
        tell(line)
    tables = []
    for file in files:
        if not (rows := head(file, key)):
            continue
        columns = recognise(rows, name if len(files) == 1 else str(file), **options)
        form = form_of(list(columns))
        texts = tuple(
            own
            for own in (*MADE_OF[form], *SAID_OF[form])
            if own in TEXTS and not isinstance(sample(rows, columns.get(own, own)), list)
        )
        here = dict.fromkeys(column for row in rows for column in row)
        unread = tuple(column for column in here if column not in columns.values())
        tables.append(Table(str(file), form, tuple(columns.items()), texts, unread))
    _tell_unread(name, [column for table in tables for column in table.unread], tell)
    return tables


def _tell_unread(name: str, unread: list[str], tell: Tell) -> None:
    if columns := list(dict.fromkeys(unread)):
        tell(f"Data: columns of {name!r} that are not read: {', '.join(map(str, columns))}.")


def _check_alike(source: str | list[str], tables: list[Table], key: str) -> None:
    """Refuses files of different forms."""
    forms = {table.form for table in tables}
    if len(forms) > 1:
        raise _mixed(source, forms, key)
    odd = next((table for table in tables if table.texts != tables[0].texts), None)
    if odd is not None:
        raise UserError(
            f"{key}: prompts of {odd.path!r} and {tables[0].path!r} are texts in one and messages in the other; list "
            "them as parts, each {dataset: ...}"
        )


def _mixed(source: str | list[str], forms: Iterable[Form], key: str) -> UserError:
    found = " and ".join(sorted(", ".join(MADE_OF[form]) for form in forms))
    return UserError(
        f"{key}: {source!r} mixes documents of different forms ({found}); list them as parts, each {{dataset: ...}}"
    )


def _features(own: tuple[str, ...], table: Table) -> "Features":
    from datasets import Features, Value

    return Features({name: Value("large_string" if name in table.texts else "large_binary") for name in own})


def _copied(tables: list[Table], key: str) -> "Dataset":
    """The rows of files in the cache, by what the files are now."""
    import datasets

    own = (*MADE_OF[tables[0].form], *SAID_OF[tables[0].form])
    stats = [(str(Path(table.path).absolute()), Path(table.path).stat()) for table in tables]
    state = [READ_FORMAT, own, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats], tables]
    name = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    try:
        with bars_on_terminals():
            return datasets.Dataset.from_generator(
                rows_of,
                _features(own, tables[0]),
                gen_kwargs={"tables": tables, "own": own, "key": key},
                fingerprint=name,
                writer_batch_size=HEAD,  # held in memory at once: texts may be long, and the default is 1000
            )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise UserError(
            f"{key}: {tables[0].path!r} cannot be copied into the cache of `datasets` ({reason_of(error)}); make room, "
            "or set HF_DATASETS_CACHE to another folder"
        ) from error


def _sliced(rows: "Dataset", found: Found, split: str, key: str) -> "Dataset":
    """The part of a split that its slice names."""
    import datasets

    if not sliced(split):
        return rows
    try:
        instruction = datasets.ReadInstruction.from_spec(split)
        [part] = instruction.to_absolute({split.partition("[")[0]: rows.num_rows})
    except (ValueError, AssertionError) as error:
        raise UserError(f"{split_key(key)}: {split!r} is no slice ({reason_of(error)}); correct it") from error
    return rows.select(range(part.from_, part.to))


def reason_of(error: Exception) -> str:
    return str(error.__cause__ or error).partition("\n")[0] or "it is empty"


def _hub_columns(name: str, rows: list[Row], options: dict[str, Any], key: str, tell: Tell) -> dict[str, str]:
    """Columns of a hub data set by its first rows."""
    if not rows:
        raise UserError(f"{key}: {name!r} has no documents; give a source with text")
    columns = recognise(rows, name, **options)
    _tell_unread(name, [column for column in rows[0] if column not in columns.values()], tell)
    return columns

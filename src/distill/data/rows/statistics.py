"""What is in the data, in a line per source and one in all: what was cut or left out is told, never silent."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.data.rows.table import PackedRows

if TYPE_CHECKING:
    from datasets import Dataset


def several(number: int, noun: str) -> str:
    """A number of things.

    Example:
        >>> several(1, "row"), several(1200, "row")
        ('1 row', '1,200 rows')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def describe_table(what: str, documents: "Dataset", rows: "Dataset", form: str, sequence_length: int) -> str:
    """One source: its documents, how full its rows are, what was cut and what was left out."""
    import pyarrow.compute as pc

    sums = {name: int(np.sum(rows[name][:])) for name in ("documents", "cut_documents", "cut_tokens")}
    tokens = int(pc.sum(pc.list_value_length(rows.data.column("input_ids"))).as_py())
    filled = tokens / (rows.num_rows * sequence_length)
    left_out = max(0, documents.num_rows - sums["documents"])  # a row of tokens may hold several
    read, packed = several(documents.num_rows, "document"), several(rows.num_rows, "row")
    return (
        f"Data: {what}{read} ({form}), {tokens:,} tokens in {packed} of at most {sequence_length}, {filled:.1%} full; "
        f"{_cut(sums)}; {left_out:,} without a target left out.{_paired_table(rows)}"
    )


def _paired_table(rows: "Dataset") -> str:
    """What a teacher with another tokenizer has of the same rows; nothing where there is none."""
    import pyarrow.compute as pc

    if "teacher_input_ids" not in rows.column_names:
        return ""
    sums = {name: int(np.sum(rows[name][:])) for name in ("tokens", "targets", "unshared")}
    return _paired(sums, int(pc.sum(pc.list_value_length(rows.data.column("teacher_input_ids"))).as_py()))


def _paired(sums: Mapping[str, int], tokens: int) -> str:
    share, alone = sums["targets"] / max(1, sums["tokens"]), several(sums["unshared"], "document")
    return (
        f" The teacher reads them as {tokens:,} tokens and says something of {share:.1%} of the targets; {alone} that "
        "one side's tokens do not spell left to next tokens."
    )


def describe_rows(train: PackedRows, held_out: Mapping[str, PackedRows], epoch: int) -> list[str]:
    """The rows of a run, in a line and one more for each validation set after the first."""
    first, *others = (describe_held_out(name, rows) for name, rows in held_out.items())
    some = f"{epoch:,} per epoch, " if epoch < len(train) else ""
    line = (
        f"Data: {several(len(train), 'training row')} ({some}{train.lengths_R().sum():,} tokens, "
        f"{train.units_R['tokens'].sum():,} of them targets), {first}."
    )
    return [line, *(f"Data: {other}." for other in others)]


def describe_held_out(name: str, rows: PackedRows) -> str:
    """The rows of a validation set, which has a name or is the only one."""
    targets = several(int(rows.units_R["tokens"].sum()), "target")
    return f"{several(len(rows), 'validation row')}{name and ' of ' + name} ({targets})"


def describe_stream(documents: int, rows: Sequence[Mapping[str, Any]], form: str, sequence_length: int) -> str:
    """The first block of a stream, since nobody knows the rest."""
    tokens, targets = sum(len(row["input_ids"]) for row in rows), sum(row["tokens"] for row in rows)
    sums = {name: sum(row[name] for row in rows) for name in ("documents", "cut_documents", "cut_tokens")}
    filled = tokens / max(1, len(rows) * sequence_length)
    return (
        f"Data: a stream; of its first {documents:,} documents ({form}) {tokens:,} tokens, {targets:,} of them "
        f"targets, in {len(rows):,} rows, {filled:.1%} full; {_cut(sums)}; {documents - sums['documents']:,} held out "
        f"or without a target.{_paired_rows(rows)}"
    )


def _paired_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same of rows of a stream."""
    if not rows or "teacher_input_ids" not in rows[0]:
        return ""
    sums = {name: sum(row[name] for row in rows) for name in ("tokens", "targets", "unshared")}
    return _paired(sums, sum(len(row["teacher_input_ids"]) for row in rows))


def describe_read(counts: Mapping[str, int]) -> str:
    """What rank zero has read of the streams."""
    return f"Data: rank 0 read {counts['documents']:,} documents; {_cut(counts)}."


def _cut(sums: Mapping[str, int]) -> str:
    if not sums["cut_documents"]:
        return "none cut"
    return f"{sums['cut_documents']:,} cut at the end of a row, which lost {sums['cut_tokens']:,} tokens"

"""What a run across tokenizers takes from its teacher: how much of the text has targets, and what of them is lost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table

from distill.batch import Batch
from distill.curriculum import CurriculumState
from distill.data.datamodule import DistillationDataModule
from distill.data.rows.table import PackedRows
from distill.data.tokenizers import Tokenizers
from distill.models.trace import Needs
from distill.preflight.checks import Vocabulary, special_ids
from distill.preflight.tables import titled
from distill.teachers.mapped import MappedTargets, MappedTeacher
from distill.teachers.targets import DenseTargets, teacher_logprobs

LEAST_COVERAGE = 0.8  # below it, a good part of the text has no targets
ROWS_AT_A_TIME = 64  # of the teacher's distributions


def with_tokenizers(
    tokenizers: Tokenizers, models: Sequence[Vocabulary]
) -> list[tuple[Any, tuple[Vocabulary, list[Vocabulary]]]]:
    """Each tokenizer, what it is as a side, and the models that it serves.

    Args:
        tokenizers: of the run.
        models: teacher and student, or the student alone.
    """
    if tokenizers.vocabularies is None:
        groups = [(tokenizers.student, list(models))]
    else:
        by_name = {"teacher": tokenizers.teacher, "student": tokenizers.student}
        groups = [(by_name[model.name], [model]) for model in models]
    return [
        (tokenizer, (Vocabulary("tokenizer", len(tokenizer), special_ids(tokenizer)), served))
        for tokenizer, served in groups
    ]


@dataclass(frozen=True)
class Coverage:
    """How much of some rows has targets.

    Args:
        tokens: of the student that have a label.
        targets: of these, those for which the teacher says something.
        inside: of these, those that stand within a token of the teacher.
        documents: that begin in the rows.
        unshared: of these, those whose tokens do not spell one text on both sides.
    """

    tokens: int
    targets: int
    inside: int
    documents: int
    unshared: int

    @property
    def share(self) -> float:
        """Of the tokens that have a target."""
        return self.targets / max(1, self.tokens)


def coverage_of(rows: PackedRows) -> Coverage:
    """That of a table's rows."""
    return Coverage(*(int(rows.column(name).sum()) for name in Coverage.__dataclass_fields__))


def coverage_findings(data: DistillationDataModule) -> list[str]:
    """Whether a good part of the text has no targets."""
    rows = data.train_rows if data.train_rows is not None else data.validation_rows
    if rows is None or rows.pairing is None:
        return []
    found = coverage_of(rows)
    if found.share >= LEAST_COVERAGE:
        return []
    left_out = f", and {found.unshared:,} of {found.documents:,} documents have none" if found.unshared else ""
    return [
        f"model.vocabulary: the teacher says something of {found.share:.1%} of the student's tokens{left_out}: where a "
        "tokenizer normalises text, or a template changes what messages say, there is nothing to learn but next tokens"
    ]


def pairing_table(data: DistillationDataModule, teacher: MappedTeacher | None, batch: Batch | None) -> Table:
    """What the teacher says across tokenizers, in figures.

    Args:
        data: whose rows are counted.
        teacher: opened; None = there is none here.
        batch: on which the mass that leads nowhere is measured.
    """
    rows = data.train_rows if data.train_rows is not None else data.validation_rows
    assert rows is not None
    assert rows.pairing is not None
    found, vocabularies = coverage_of(rows), rows.pairing.vocabularies
    table = titled("Two tokenizers: what the teacher says of the student's tokens", "", "")
    table.add_row("tokens with a target", f"{found.share:.1%}")
    table.add_row("of these, within a token of the teacher", f"{found.inside / max(1, found.targets):.1%}")
    table.add_row("documents left to next tokens", f"{found.unshared:,} of {found.documents:,}")
    largest = np.bincount(vocabularies.classes[: vocabularies.student.size]).max()
    table.add_row("largest class of the student's ids", f"{int(largest):,}")
    if teacher is not None and batch is not None:
        table.add_row("teacher's mass that leads nowhere", f"{residual_mass(teacher, batch):.4f}")
    return table


@torch.no_grad()
def residual_mass(teacher: MappedTeacher, batch: Batch) -> float:
    """Mean probability that leads to none of the student's ids, where both have a boundary."""
    state = CurriculumState(0, 0.0, {}, 1.0, None)
    targets = teacher(batch, Needs(), state, kd=False).classes
    assert isinstance(targets, MappedTargets)
    assert batch.pairs is not None
    hidden_ND = targets.hidden_ND[batch.pairs.group_N == 0]
    total = 0.0
    for part_RD in hidden_ND.split(ROWS_AT_A_TIME):
        logprobs_RV = teacher_logprobs(DenseTargets(part_RD, targets.head), 1.0, targets.head.vocab_size)
        total += float(logprobs_RV.index_select(1, targets.tables.nowhere_U).exp().sum())
    return total / max(1, len(hidden_ND))

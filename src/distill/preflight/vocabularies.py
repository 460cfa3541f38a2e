"""What `distill check` shows of tokenizers: ids of each side, and what the teacher says across two of them."""

from typing import Any

from lightning.fabric.utilities import move_data_to_device
from rich.console import Console

from distill.data.datamodule import DistillationDataModule
from distill.preflight.checks import Vocabulary, special_ids, vocabulary_findings
from distill.preflight.quick import single_rows, stopping_findings
from distill.preflight.tables import show, vocabulary_table
from distill.preflight.two_tokenizers import coverage_findings, pairing_table, with_tokenizers
from distill.teachers.mapped import MappedTeacher
from distill.training.module import DistillationModule


def own_ids(data: DistillationDataModule) -> int | None:
    """Ids of the student's tokenizer, where it is another than the teacher's."""
    tokenizers = data.tokenizers
    return None if tokenizers is None or tokenizers.vocabularies is None else len(tokenizers.student)


def show_vocabularies(
    console: Console, module: DistillationModule, data: DistillationDataModule, configs: tuple[Any, Any]
) -> list[str]:
    """Shows ids, padding and special tokens of every side; returns what does not fit together.

    Args:
        console: to print on.
        module: of the run.
        data: set up, or not to be had.
        configs: the teacher's and the student's.
    """
    sides = [
        Vocabulary(name, config.get_text_config(decoder=True).vocab_size, special_ids(config))
        for name, config in zip(("teacher", "student"), configs, strict=True)
    ]
    tokenizers = data.tokenizers
    # What transformers makes of a folder without tokenizer files has special tokens alone.
    if tokenizers is None or len(tokenizers.student) <= len(tokenizers.student.all_special_tokens):
        show(console, vocabulary_table(sides, None))
        return []
    groups = with_tokenizers(tokenizers, sides)
    odd = [finding for _, group in groups for finding in vocabulary_findings(*group)]
    for tokenizer, (own, served) in groups:
        show(console, vocabulary_table([own, *served], tokenizer))
    return odd + stopping_findings(module, data, bool(odd))


def show_pairs(console: Console, module: DistillationModule, data: DistillationDataModule) -> list[str]:
    """Shows what the teacher says across tokenizers; returns whether that is little."""
    assert module.teacher is None or isinstance(module.teacher, MappedTeacher)
    assert data.validation_rows is not None
    batch = move_data_to_device(next(single_rows(data.validation_rows)), module.device)
    show(console, pairing_table(data, module.teacher, batch))
    return coverage_findings(data)

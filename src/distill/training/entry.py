"""What a checkpoint says of a run: the entry `distill`, by which it is refused, exported and loaded later."""

from pathlib import Path
from typing import Any

import lightning as L
from transformers import PreTrainedModel

from distill.checkpoints import contents
from distill.teachers.cache_files import is_cache, read_manifest
from distill.training.build import data_of, vocabularies_of
from distill.training.options import ModelOptions


def settings(options: ModelOptions, trainer: L.Trainer) -> dict[str, Any]:
    """What a checkpoint is made with, as plain values by YAML key."""
    chosen = options.settings()
    first = {
        "model.teacher": chosen["model.teacher"],
        "data.tokenizer": tokenizer_source(options, trainer),
        "data.packing": getattr(data_of(trainer), "packing", None),
    }
    if is_cache(options.teacher):
        first["model.teacher_cache"] = read_manifest(Path(options.teacher).expanduser()).identity
    return first | chosen


def tokenizer_source(options: ModelOptions, trainer: L.Trainer) -> str:
    """Where the tokenizer comes from that the teacher's side of the data is read with."""
    return getattr(data_of(trainer), "tokenizer_source", None) or options.teacher


def student_tokenizer_source(options: ModelOptions, trainer: L.Trainer) -> str:
    """Where the tokenizer comes from that the student reads with."""
    own = options.tokenizer_source if vocabularies_of(trainer) is not None else None
    return own or tokenizer_source(options, trainer)


def entry(
    options: ModelOptions,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    trainer: L.Trainer,
    made: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The entry of a checkpoint that is written now.

    Args:
        options: of the run.
        student: as it is trained.
        teacher: None where there is none in memory.
        trainer: whose datamodule, callbacks and metrics are recorded.
        made: how the student was, before the run; None where it was not.
    """
    generation = student.generation_config
    alike = vocabularies_of(trainer) is None
    if options.student_config is not None and teacher is not None and alike:
        # Random weights learn the teacher's tokens, and its own defaults for where to stop mean other ones.
        generation = teacher.generation_config
    run = contents.run_record(trainer, options.losses) | ({} if made is None else {"student_fit": made})
    source = student_tokenizer_source(options, trainer)
    recorded = contents.record(student, generation, source, options.lora, data_of(trainer), run)
    return contents.describe(settings(options, trainer)) | recorded

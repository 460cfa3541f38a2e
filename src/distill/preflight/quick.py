"""The checks that `fit` makes before its first step: a few batches, a teacher's forward pass, no training."""

import math
from collections.abc import Iterator

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device

from distill.batch import Batch
from distill.curriculum import WEIGHT_KEYS, CurriculumState, Schedules
from distill.data.datamodule import DistillationDataModule
from distill.data.order.sampler import EveryRowOnce
from distill.data.rows.table import PackedRows
from distill.losses.engine.loss import distillation_loss
from distill.models.trace import Needs
from distill.preflight.checks import (
    Vocabulary,
    batch_findings,
    gpu_findings,
    held_out_findings,
    precision_findings,
    special_ids,
    teacher_findings,
    unigram_nll,
    vocabulary_findings,
)
from distill.preflight.choices import choice_findings
from distill.preflight.plan import head_size
from distill.preflight.turn_ends import turn_end_findings
from distill.preflight.two_tokenizers import coverage_findings, with_tokenizers
from distill.teachers.mapped import MappedTeacher
from distill.teachers.source import TargetSource
from distill.training.callbacks.curriculum import Curriculum
from distill.training.lightning_internals import callbacks_of
from distill.training.module import DistillationModule

COUNTED_ROWS = 256  # of the training rows, whose tokens are counted for the unigram


def quick_findings(
    trainer: L.Trainer, module: DistillationModule, datamodule: L.LightningDataModule | None
) -> tuple[list[str], str]:
    """The same judgement in its short form, with what a fit has loaded: one row per rank through the teacher alone.

    Returns:
        Findings, and one line that sums the run up.
    """
    teacher, student = module.teacher.model if module.teacher is not None else None, module.student
    ours = datamodule if isinstance(datamodule, DistillationDataModule) else None
    rows = ours.validation_rows if ours is not None else None
    models = {name: model for name, model in (("teacher", teacher), ("student", student)) if model is not None}
    sizes = [head_size(model) for model in models.values()]
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    line = f"Check: {counted(trained)} parameters learn"
    if teacher is not None:
        line += f" from a teacher of {counted(sum(p.numel() for p in teacher.parameters()))}"
    device = trainer.strategy.root_device.type
    findings = precision_findings(str(trainer.precision), device)
    if student is not None:
        findings += choice_findings(module.options, schedules_of(trainer), student)
    if teacher is not None:
        findings += gpu_findings(module.options, str(trainer.precision), device, teacher)
    if ours is not None and ours.tokenizers is not None:
        sides = [
            Vocabulary(name, size, special_ids(model.config))
            for (name, model), size in zip(models.items(), sizes, strict=True)
        ]
        odd = [
            finding for _, group in with_tokenizers(ours.tokenizers, sides) for finding in vocabulary_findings(*group)
        ]
        findings += odd + stopping_findings(module, ours, bool(odd))
        findings += coverage_findings(ours)
    if ours is not None and rows is not None and len(rows):
        findings += held_out_findings(ours) if trainer.limit_val_batches else []
        batch = move_data_to_device(next(single_rows(rows)), module.device)
        findings += batch_findings(batch, min(sizes) if batch.pairs is None else sizes[-1])
        if teacher is not None:
            assert module.teacher is not None
            nll = teacher_nll(module.teacher, batch)
            findings += teacher_findings(nll, counting_nll(ours, [batch], sizes[0]), sizes[0])
            line += f", whose perplexity on the first validation row is {math.exp(min(nll, 700)):,.1f}"
    return findings, f"{line}, on {trainer.world_size} x {device}."


def schedules_of(trainer: L.Trainer) -> Schedules:
    """Of the curriculum; constant ones without it."""
    found = callbacks_of(trainer, Curriculum)
    return found[0].schedules if found else Schedules(*(1.0 for _ in WEIGHT_KEYS))


def stopping_findings(
    module: DistillationModule, datamodule: DistillationDataModule | None, told: bool = False
) -> list[str]:
    """Whether the student learns to stop, and where; `told` = it was said already that special ids differ."""
    if datamodule is None or (told and not datamodule.conversations):
        return []
    shared = datamodule.tokenizers is None or datamodule.tokenizers.vocabularies is None
    random = module.options.student_config is not None and shared  # exported with the teacher's generation_config
    teacher = module.teacher.model if module.teacher is not None else None
    generation = getattr(teacher if random else getattr(module, "student", None), "generation_config", None)
    stops = getattr(generation, "eos_token_id", None)
    return turn_end_findings(datamodule.tokenizer, datamodule.chat, datamodule.conversations, stops)


def counted(number: int) -> str:
    """A number of parameters, in millions where there are some."""
    return f"{number / 1e6:,.1f}M" if number >= 1e5 else f"{number:,}"


@torch.no_grad()
def teacher_nll(teacher: TargetSource, batch: Batch) -> float:
    """Nats per token of its own of a batch under a teacher that has its whole distribution, without a logits tensor."""
    source = teacher.source if isinstance(teacher, MappedTeacher) else teacher
    whole = source(batch, Needs(), CurriculumState(0, 0.0, {}, 1.0, None), kd=False).whole
    assert whole is not None
    engine = distillation_loss(whole.hidden_ND, whole.head, batch.teacher.labels_N, None, lm_weight=0.0)
    assert engine.lm_sum is not None
    return float(engine.lm_sum) / max(1, len(batch.teacher.labels_N))


def of_its_own(teacher: TargetSource, batches: list[Batch]) -> dict[str, float]:
    """The teacher's perplexity on its own tokens of rows that the student reads otherwise."""
    tokens = [len(batch.teacher.labels_N) for batch in batches]
    total = sum(teacher_nll(teacher, batch) * count for batch, count in zip(batches, tokens, strict=True))
    nll = total / max(1, sum(tokens))
    return {"teacher_nll": nll, "teacher_perplexity": math.exp(min(nll, 700))}


def single_rows(rows: PackedRows) -> Iterator[Batch]:
    """Rows one by one, as batches."""
    return (rows.__getitems__(micro_batch) for micro_batch in EveryRowOnce(rows.units_R, 1))


def counting_nll(datamodule: DistillationDataModule, batches: list[Batch], vocab_size: int) -> float:
    """Nats per token of the teacher's of a word count of training rows, or of later validation rows of a stream."""
    rows = datamodule.train_rows if datamodule.train_rows is not None else datamodule.validation_rows
    assert rows is not None
    step = max(1, len(rows) // COUNTED_ROWS)
    column = "input_ids" if rows.pairing is None else "teacher_input_ids"
    counted = [torch.as_tensor(rows[index][column]) for index in range(0, len(rows), step)]
    labels = [batch.teacher.labels_N.cpu() for batch in batches]
    return unigram_nll(torch.cat(counted).long(), torch.cat(labels), vocab_size)

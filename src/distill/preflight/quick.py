"""The checks that `fit` makes before its first step: a few batches, a teacher's forward pass, no training."""

import math
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device

from distill.data.order.sampler import EveryRowOnce
from distill.losses.engine.loss import distillation_loss
from distill.models.head import lm_head_of
from distill.models.trace import valid_labels, valid_rows
from distill.preflight.checks import (
    Vocabulary,
    batch_findings,
    held_out_findings,
    precision_findings,
    special_ids,
    teacher_findings,
    unigram_nll,
    vocabulary_findings,
)

COUNTED_ROWS = 256  # of the training rows, whose tokens are counted for the unigram


def quick_findings(trainer: L.Trainer, module: Any, datamodule: Any) -> tuple[list[str], str]:
    """The judgement of `check` in its short form, with what a fit has loaded: one row per rank through the teacher.

    Returns:
        Findings, and one line that sums the run up.
    """
    teacher, student = getattr(module.teacher, "model", None), module.student
    tokenizer, rows = getattr(datamodule, "tokenizer", None), getattr(datamodule, "validation_rows", None)
    sizes = [m.get_output_embeddings().weight.shape[0] for m in (teacher, student) if m is not None]
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    line = f"Check: {counted(trained)} parameters learn"
    if teacher is not None:
        line += f" from a teacher of {counted(sum(p.numel() for p in teacher.parameters()))}"
    device = trainer.strategy.root_device.type
    findings = precision_findings(str(trainer.precision), device)
    if tokenizer is not None:
        named = [("teacher", teacher), ("student", student)]
        sides = [
            Vocabulary(name, size, special_ids(model.config))
            for (name, model), size in zip([pair for pair in named if pair[1] is not None], sizes, strict=True)
        ]
        findings += vocabulary_findings(Vocabulary("tokenizer", len(tokenizer), special_ids(tokenizer)), sides)
    if rows is not None and len(rows):
        findings += held_out_findings(datamodule) if trainer.limit_val_batches else []
        batch = move_data_to_device(next(single_rows(rows)), module.device)
        findings += batch_findings(batch, min(sizes))
        if teacher is not None:
            nll = teacher_nll(module.teacher, batch)
            findings += teacher_findings(nll, counting_nll(datamodule, [batch], sizes[0]), sizes[0])
            line += f", whose perplexity on the first validation row is {math.exp(min(nll, 700)):,.1f}"
    return findings, f"{line}, on {trainer.world_size} x {device}."


def counted(number: int) -> str:
    """A number of parameters, in millions where there are some."""
    return f"{number / 1e6:,.1f}M" if number >= 1e5 else f"{number:,}"


@torch.no_grad()
def teacher_nll(teacher: Any, batch: dict[str, Any]) -> float:
    """Nats per token of a batch under an online teacher, without a logits tensor."""
    hidden_ND, labels_N = valid_rows(teacher.hidden(batch), batch), valid_labels(batch)
    engine = distillation_loss(hidden_ND, lm_head_of(teacher.model), labels_N, None, lm_weight=0.0)
    assert engine.lm_sum is not None
    return float(engine.lm_sum) / max(1, len(labels_N))


def single_rows(rows: Any) -> Iterator[dict[str, Any]]:
    """Rows of a `PackedRows` one by one, as batches."""
    return (rows.__getitems__(micro_batch) for micro_batch in EveryRowOnce(rows.units_R, 1))


def counting_nll(datamodule: Any, batches: list[dict[str, Any]], vocab_size: int) -> float:
    """Nats per token when each is predicted by its count in training rows, or in validation rows of a stream."""
    rows = datamodule.train_rows if datamodule.train_rows is not None else datamodule.validation_rows
    step = max(1, len(rows) // COUNTED_ROWS)
    counted = [torch.as_tensor(rows[index]["input_ids"]) for index in range(0, len(rows), step)]
    labels = [valid_labels(batch).cpu() for batch in batches]
    return unigram_nll(torch.cat(counted).long(), torch.cat(labels), vocab_size)

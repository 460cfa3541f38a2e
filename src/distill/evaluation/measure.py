"""Figures of several models on the same rows: the weight-free metrics of validation, for each model and the teacher.

The sums come from the loss engine, so that no logits tensor exists and the figures are those that `distill validate`
logs. All models are in memory at once, so that the teacher runs once for all of them.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.batch import Batch, Tokens
from distill.losses.engine.loss import distillation_loss, with_classes
from distill.losses.engine.mapped import VocabularyMap, vocabulary_map
from distill.losses.engine.metrics import DistillationMetrics
from distill.models.head import LMHead, lm_head_of
from distill.models.trace import decode
from distill.teachers.mapped import MappedTargets
from distill.teachers.online import OnlineTeacher
from distill.teachers.targets import DenseTargets
from distill.vocabularies.pair import VocabularyPair

TEACHER = "teacher"


@dataclass
class Sums:
    """What is added up over the batches for one model."""

    model: PreTrainedModel
    head: LMHead
    metrics: DistillationMetrics = field(default_factory=DistillationMetrics)
    tokens: int = 0  # read by the decoder in the time below
    seconds: float = 0.0


@torch.inference_mode()
def measure(
    students: Mapping[str, PreTrainedModel], teacher: OnlineTeacher, batches: Iterable[Batch],
    fabric: L.Fabric, chunk_size: int | None = None, vocabularies: VocabularyPair | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Every model's figures on the same tokens.

    Args:
        students: name -> model in eval mode, on the fabric's device, all with the same tokens.
        teacher: on the same device.
        batches: what the datamodule's loader yields.
        fabric: device and autocast.
        chunk_size: tokens whose logits exist at one time; None = by a byte budget.
        vocabularies: of teacher and students; None where they have the same tokens.

    Returns:
        `teacher` and every name -> figures; see `figures`.
    """
    sums = {TEACHER: Sums(teacher.model, lm_head_of(teacher.model))}
    sums |= {name: Sums(model, lm_head_of(model)) for name, model in students.items()}
    for one in sums.values():
        one.metrics.to(fabric.device)
    tables = None if vocabularies is None else _tables(vocabularies, sums).to(fabric.device)
    compares = True  # whether bits per byte of teacher and students are of the same text
    for index, host_batch in enumerate(batches):
        batch = fabric.to_device(host_batch)
        targets: DenseTargets | MappedTargets | None = None
        for name, one in sums.items():
            tokens, text_bytes = batch.teacher if name == TEACHER else batch.student, batch.bytes
            with fabric.autocast():
                if index == 0:
                    _decode(name, one, teacher, batch)  # warms up
                before = _now(fabric)
                hidden_BLD = _decode(name, one, teacher, batch)
                one.seconds += _now(fabric) - before
                one.tokens += tokens.input_ids.numel()
                side = (tokens.valid(hidden_BLD), one.head, tokens.labels_N)
                whole = targets if isinstance(targets, DenseTargets) else None
                stats = distillation_loss(*side, whole, chunk_size=chunk_size, metrics=True).stats
                assert stats is not None
                if isinstance(targets, MappedTargets):
                    stats = with_classes(stats, *side, targets, targets.pairs.group_N >= 0, chunk_size)
            if name == TEACHER and vocabularies is not None and tables is not None and batch.pairs is not None:
                states_ND = hidden_BLD.flatten(0, 1).index_select(0, batch.pairs.teacher_N)
                targets = MappedTargets(states_ND, one.head, tables, batch.pairs)
                text_bytes = int(vocabularies.teacher.lengths[tokens.labels_N.cpu()].sum())
                compares &= _learns_all(batch.student)
            elif name == TEACHER:
                targets = DenseTargets(side[0], one.head)
            one.metrics.update(stats, text_bytes)
    found = {name: {key: float(value) for key, value in one.metrics.compute().items()} for name, one in sums.items()}
    if not compares:
        found[TEACHER].pop("bits_per_byte", None)
    return {name: figures(one, found[name], found[TEACHER]) for name, one in sums.items()}


def _tables(vocabularies: VocabularyPair, sums: Mapping[str, Sums]) -> VocabularyMap:
    """Where the teacher's ids lead to among those of all students' heads."""
    ids = min(one.head.vocab_size for name, one in sums.items() if name != TEACHER)
    return vocabulary_map(vocabularies.firsts, vocabularies.classes, sums[TEACHER].head.vocab_size, ids)


def _learns_all(tokens: Tokens) -> bool:
    """Whether every token but the first of a document is a target, as in plain text."""
    begins_BL = (tokens.position_ids == 0) & tokens.real_BL
    return len(tokens.positions) == int(tokens.real_BL.sum() - begins_BL.sum())


def _decode(name: str, one: Sums, teacher: OnlineTeacher, batch: Batch) -> Tensor:
    if name == TEACHER:
        return teacher.hidden(batch.teacher)
    hidden_BLD: Tensor = decode(one.model, batch.student).last_hidden_state
    return hidden_BLD


def _now(fabric: L.Fabric) -> float:
    if fabric.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def figures(one: Sums, found: Mapping[str, float], teacher: Mapping[str, float]) -> dict[str, float]:
    """One model's row of the report, what does not apply left out.

    Args:
        one: its sums.
        found: what its metrics say.
        teacher: what the teacher's say.

    Returns:
        nll (nats per token), perplexity, bits_per_byte, accuracy (share of tokens whose label it prefers), ece, entropy
        (nats); compared with the teacher kl_div_T1 (nats per token), top1_agreement, top5_agreement, acceptance (see
        `DistillationMetrics`), entropy_gap (nats) and retention_percent (the teacher's perplexity in percent of its
        own); parameters, weights_MB, tokens_per_s of the decoder on these batches.
    """
    result = {
        "nll": found["student_nll"],
        "perplexity": found["student_perplexity"],
        "bits_per_byte": found.get("bits_per_byte"),
        "accuracy": float(one.metrics.calibration[:, 2].sum() / one.metrics.tokens),
        "ece": found["ece"],
        "entropy": found["student_entropy"],
        "kl_div_T1": found.get("kl_div_T1"),
        "top1_agreement": found.get("top1_agreement"),
        "top5_agreement": found.get("top5_agreement"),
        "acceptance": found.get("acceptance"),
    }
    if "teacher_entropy" in found:
        result["entropy_gap"] = found["student_entropy"] - found["teacher_entropy"]
        result["retention_percent"] = 100 * teacher["student_perplexity"] / found["student_perplexity"]
    tensors: dict[int, Tensor] = {id(p): p for p in one.model.parameters()}
    result |= {
        "parameters": sum(p.numel() for p in tensors.values()),
        "weights_MB": sum(p.numel() * p.element_size() for p in tensors.values()) / 1e6,
        "tokens_per_s": one.tokens / one.seconds,
    }
    return {name: value for name, value in result.items() if value is not None}


def gap_closed_percent(baseline: float, student: float, goal: float) -> float | None:
    """How much of a baseline's distance to the goal the student has covered, in percent; None without a distance.

    Example:
        >>> gap_closed_percent(4.0, 2.5, goal=2.0)
        75.0
    """
    return 100 * (baseline - student) / (baseline - goal) if baseline != goal else None

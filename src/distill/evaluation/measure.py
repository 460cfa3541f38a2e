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

from distill.batch import Batch
from distill.losses.engine.loss import distillation_loss
from distill.losses.engine.metrics import DistillationMetrics
from distill.models.head import LMHead, lm_head_of
from distill.models.trace import decode
from distill.teachers.online import OnlineTeacher
from distill.teachers.targets import DenseTargets

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
    fabric: L.Fabric, chunk_size: int | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Every model's figures on the same tokens.

    Args:
        students: name -> model in eval mode, on the fabric's device, with the teacher's tokens.
        teacher: on the same device.
        batches: what the datamodule's loader yields.
        fabric: device and autocast.
        chunk_size: tokens whose logits exist at one time; None = by a byte budget.

    Returns:
        `teacher` and every name -> figures; see `figures`.
    """
    sums = {TEACHER: Sums(teacher.model, lm_head_of(teacher.model))}
    sums |= {name: Sums(model, lm_head_of(model)) for name, model in students.items()}
    for one in sums.values():
        one.metrics.to(fabric.device)
    for index, host_batch in enumerate(batches):
        batch = fabric.to_device(host_batch)
        targets: DenseTargets | None = None
        for name, one in sums.items():
            with fabric.autocast():
                if index == 0:
                    _decode(name, one, teacher, batch)  # warms up
                before = _now(fabric)
                hidden_BLD = _decode(name, one, teacher, batch)
                one.seconds += _now(fabric) - before
                one.tokens += batch.student.input_ids.numel()
                hidden_ND = batch.student.valid(hidden_BLD)
                stats = distillation_loss(
                    hidden_ND, one.head, batch.student.labels_N, targets, chunk_size=chunk_size, metrics=True
                ).stats
            assert stats is not None
            one.metrics.update(stats, batch.bytes)
            if name == TEACHER:
                targets = DenseTargets(hidden_ND, one.head)
    found = {name: {key: float(value) for key, value in one.metrics.compute().items()} for name, one in sums.items()}
    return {name: figures(one, found[name], found[TEACHER]) for name, one in sums.items()}


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

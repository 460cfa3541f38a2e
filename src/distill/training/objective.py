"""The objective: where the losses of a batch are computed and weighed, for training and validation alike.

Losses of weight zero are not computed, and what only they need (teacher, hidden states, attention, experts) is not
captured.

Shapes: B rows, L positions, N valid tokens, D width.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.batch import Batch
from distill.breakdown import LossBreakdown
from distill.curriculum import WEIGHT_KEY, CurriculumState
from distill.losses.component import Component
from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.loss import distillation_loss, with_classes
from distill.losses.engine.metrics import TokenStats
from distill.models.head import lm_head_of
from distill.models.trace import Trace, merged, trace
from distill.teachers.source import TargetSource, Taught

VOCABULARY = {"kd_loss": "targets", "lm_loss": "tokens"}  # the losses of the engine, and their units


@dataclass(frozen=True)
class Losses:
    """What one micro-batch on one rank yields.

    Args:
        total: sum of the scaled losses, carries the gradient.
        breakdown: the same in parts, detached.
        stats: name -> scalar for the log, a mean over tokens.
        token_stats: weight-free sums over tokens; None where they were not asked for.
    """

    total: Tensor
    breakdown: LossBreakdown
    stats: dict[str, Tensor]
    token_stats: TokenStats | None


@dataclass
class _Parts:
    """What is added up: the total, raw values, and statistics."""

    total: Tensor
    raw: dict[str, Tensor]
    token_stats: TokenStats | None
    stats: dict[str, Tensor] = field(default_factory=dict)


def objective(
    batch: Batch,
    student: PreTrainedModel,
    teacher: TargetSource,
    names: Sequence[str],
    state: CurriculumState,
    share: float,
    kd: KDLoss | None = None,
    components: Sequence[Component] = (),
    chunk_size: int | None = None,
    measure_inactive: Collection[str] = (),
    metrics: bool = False,
) -> Losses:
    """Total and breakdown of a batch.

    Args:
        batch: what the datamodule's loader yields.
        student: trained.
        teacher: opened.
        names: configured losses, in listing order.
        state: weights, temperature and routed experts now.
        share: factor on every (sum over units) / (units of the step): accumulation x world size in training, 1 in
            validation, where the units are the batch's own.
        kd: options of `kd_loss`.
        components: the losses on layers.
        chunk_size: tokens whose logits exist at one time.
        measure_inactive: losses to measure at weight zero too, without gradient.
        metrics: also return the weight-free sums.
    """
    weights = {name: state.weights[WEIGHT_KEY[name]] for name in names}
    wanted = [name for name in names if weights[name] > 0 or name in measure_inactive]
    looking = [component for component in components if any(name in wanted for name in component.units)]
    factor = {kind: share / max(batch.count(kind), 1) for kind in {*batch.units, *VOCABULARY.values()}}

    taught = None
    if "kd_loss" in wanted or looking or metrics:
        needs = merged(component.teacher_needs for component in looking)
        taught = teacher(batch, needs, state, kd="kd_loss" in wanted)
    seen = trace(student, batch.student, merged(component.student_needs for component in looking))

    wanted_weights = {name: weights[name] for name in wanted}
    options: dict[str, Any] = {"kd": kd, "temperature": state.temperature, "chunk_size": chunk_size}
    factors = {name: factor[unit] for name, unit in VOCABULARY.items()}
    parts = _over_vocabulary(batch, student, seen, taught, wanted_weights, factors, options, metrics)
    for component in looking:
        assert taught is not None
        _add_component(parts, component, batch, seen, taught.trace, wanted_weights, factor, state)
    breakdown = LossBreakdown({name: parts.raw[name] for name in wanted}, weights)
    return Losses(parts.total, breakdown, parts.stats, parts.token_stats)


def _over_vocabulary(
    batch: Batch, student: PreTrainedModel, seen: Trace, taught: Taught | None, weights: dict[str, float],
    factors: dict[str, float], options: dict[str, Any], metrics: bool,
) -> _Parts:  # fmt: skip
    """KD, next tokens and weight-free sums in one walk over the vocabulary wherever that is the same arithmetic."""
    whole, targets = (taught.whole, taught.targets) if taught is not None else (None, None)
    classes = taught.classes if taught is not None else None
    student_side = (batch.student.valid(seen.last_BLD), lm_head_of(student), batch.student.labels_N)
    watched = weights.get("kd_loss") == 0
    learns = "kd_loss" in weights and not watched
    engine = distillation_loss(
        *student_side,
        targets if learns else whole,
        **options,
        kd_weight=weights["kd_loss"] * factors["kd_loss"] if learns else None,
        lm_weight=weights["lm_loss"] * factors["lm_loss"] if "lm_loss" in weights else None,
        metrics=metrics and (not learns or targets is whole or classes is not None),
    )
    sums, token_stats = {"kd_loss": engine.kd_sum, "lm_loss": engine.lm_sum}, engine.stats
    if watched:  # by itself: a teacher beside the LM loss would move the borders of the chunks, and the last bits
        sums["kd_loss"] = distillation_loss(*student_side, targets, **options, kd_weight=0.0).kd_sum
    if metrics and token_stats is None:  # of the teacher's whole distribution, whatever the loss learns from
        token_stats = distillation_loss(*student_side, whole, chunk_size=options["chunk_size"], metrics=True).stats
    if token_stats is not None and classes is not None:
        assert batch.pairs is not None
        token_stats = with_classes(token_stats, *student_side, classes, batch.pairs.group_N >= 0, options["chunk_size"])
    raw = {name: value * factors[name] for name, value in sums.items() if value is not None}
    return _Parts(engine.loss, raw, token_stats)


def _add_component(
    parts: _Parts, component: Component, batch: Batch, seen: Trace, taught: Trace, weights: dict[str, float],
    factor: dict[str, float], state: CurriculumState,
) -> None:  # fmt: skip
    """A component's losses: those of weight above zero with gradient, the others that are wanted without."""
    for active in (True, False):
        names = [name for name in component.units if name in weights and (weights[name] > 0) == active]
        if not names:
            continue
        with torch.set_grad_enabled(torch.is_grad_enabled() and active):
            measured = component.measure(names, seen, taught, batch, state)
            parts.stats |= measured.stats
            for name, total in measured.sums.items():
                value = total * factor[component.units[name]]
                parts.raw[name] = value.detach()
                if active:
                    parts.total = parts.total + weights[name] * value

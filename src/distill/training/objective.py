"""The objective: where the losses of a batch are computed and weighed, for training and validation alike.

Components of weight zero are not computed, and what only they need (teacher, hidden states, attention, experts) is not
captured.
The price is one function that knows which component needs what.

Shapes: B rows, L positions, N valid tokens, D width.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.breakdown import LossBreakdown
from distill.curriculum import WEIGHT_KEY, CurriculumState
from distill.losses.attention import AttentionTransfer
from distill.losses.contrastive import Contrastive
from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.loss import distillation_loss
from distill.losses.engine.metrics import TokenStats
from distill.losses.layerwise import Layerwise
from distill.losses.routing import UNIT as ROUTING_UNIT
from distill.losses.routing import Routing
from distill.models.head import lm_head_of
from distill.models.trace import Needs, merged, trace, valid_labels, valid_rows
from distill.teachers.online import OnlineTeacher, thinned
from distill.teachers.targets import DenseTargets, Targets

FeatureLoss = AttentionTransfer | Layerwise | Contrastive

# Component -> the kind of unit that it is a sum over, as the batch counts them.
UNIT = (
    dict.fromkeys(WEIGHT_KEY, "tokens")
    | ROUTING_UNIT
    | {loss.component: loss.unit for loss in (AttentionTransfer, Layerwise, Contrastive)}
)


@dataclass(frozen=True)
class Losses:
    """What one micro-batch on one rank yields.

    Args:
        total: sum of the scaled components, carries the gradient.
        breakdown: the same in parts, detached.
        routing_stats: name -> scalar for the log under `routing/`.
        token_stats: weight-free sums over tokens; None where they were not asked for.
    """

    total: Tensor
    breakdown: LossBreakdown
    routing_stats: dict[str, Tensor]
    token_stats: TokenStats | None


def objective(
    batch: Mapping[str, Any],
    student: PreTrainedModel,
    teacher: OnlineTeacher,
    components: list[str],
    state: CurriculumState,
    share: float,
    kd: KDLoss | None = None,
    routing: Routing | None = None,
    features: Sequence[FeatureLoss] = (),
    chunk_size: int | None = None,
    measure_inactive: Collection[str] = (),
    metrics: bool = False,
) -> Losses:
    """Total and breakdown of a batch.

    Args:
        batch: what the datamodule's collate returns.
        student: trained.
        teacher: frozen.
        components: configured ones, in listing order.
        state: weights, temperature and routed experts now.
        share: factor on every (sum over units) / (units of the step): accumulation x world size in training, 1 in
            validation, where the units are the batch's own.
        kd: options of `kd_loss`.
        routing: the routing losses.
        features: the losses on hidden states and attention.
        chunk_size: tokens whose logits exist at one time.
        measure_inactive: components to measure at weight zero too, without gradient.
        metrics: also return the weight-free sums.
    """
    weights = {name: state.weights[WEIGHT_KEY[name]] for name in components}
    wanted = [name for name in components if weights[name] > 0 or name in measure_inactive]
    routed = [name for name in wanted if name in ROUTING_UNIT]
    features = [loss for loss in features if loss.component in wanted]
    factor = {kind: share / max(count, 1) for kind, count in batch["units"].items()}

    record = routing.record() if routing is not None and routed else None
    taught = None
    if "kd_loss" in wanted or routed or features or metrics:
        with record or nullcontext():
            taught = teacher.trace(batch, merged(loss.teacher_needs for loss in features))
    layers = routing.student_layer_indices if routing is not None and routed else []
    seen = trace(student, batch, merged(loss.student_needs for loss in features) | Needs(hidden=frozenset(layers)))

    targets = None
    if taught is not None:
        targets = DenseTargets(valid_rows(taught.last_BLD, batch), lm_head_of(teacher.model))
    student_side = (valid_rows(seen.last_BLD, batch), lm_head_of(student), valid_labels(batch))
    kd_targets: Targets | None = targets
    if "kd_loss" in wanted and kd is not None and (kd.top_k is not None or kd.samples is not None):
        kd_targets = thinned(targets, kd, student_side[1].vocab_size, state, batch)
    kd_options: dict[str, Any] = {"kd": kd, "temperature": state.temperature, "chunk_size": chunk_size}
    watched = "kd_loss" in wanted and weights["kd_loss"] == 0
    learns = "kd_loss" in wanted and not watched
    engine = distillation_loss(
        *student_side,
        kd_targets if learns else targets,
        **kd_options,
        kd_weight=weights["kd_loss"] * factor["tokens"] if learns else None,
        lm_weight=weights["lm_loss"] * factor["tokens"] if "lm_loss" in wanted else None,
        metrics=metrics and (not learns or kd_targets is targets),
    )
    sums, token_stats = {"kd_loss": engine.kd_sum, "lm_loss": engine.lm_sum}, engine.stats
    if watched:  # by itself: a teacher beside the LM loss would move the borders of the chunks, and the last bits
        sums["kd_loss"] = distillation_loss(*student_side, kd_targets, **kd_options, kd_weight=0.0).kd_sum
    if metrics and token_stats is None:  # of the teacher's whole distribution, whatever the loss learns from
        token_stats = distillation_loss(*student_side, targets, chunk_size=chunk_size, metrics=True).stats
    total = engine.loss
    stats: dict[str, Tensor] = {}
    raw = {name: value * factor["tokens"] for name, value in sums.items() if value is not None}

    if record is not None:
        assert routing is not None
        states = [seen.hidden[layer] for layer in layers]
        active = [name for name in routed if weights[name] > 0]
        for names, learns in ((active, torch.is_grad_enabled()), ([n for n in routed if n not in active], False)):
            if not names:
                continue
            with torch.set_grad_enabled(learns):
                result = routing(names, states, record, batch, state.top_k_experts)
            stats |= result.stats
            for name, value in result.sums.items():
                value = value * factor[UNIT[name]]
                raw[name] = value.detach()
                if weights[name] > 0:
                    total = total + weights[name] * value
    for loss in features:
        assert taught is not None
        weight = weights[loss.component]
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
            value = loss(seen, taught, batch) * factor[loss.unit]
        raw[loss.component] = value.detach()
        if weight > 0:
            total = total + weight * value
    breakdown = LossBreakdown({name: raw[name] for name in wanted}, weights)
    return Losses(total, breakdown, stats, token_stats)

"""The objective: where the losses of a batch are computed and weighed, for training and validation alike.

Components of weight zero are not computed, and what only they need (teacher, hidden states, experts) is not captured.
The price is one function that knows which component needs what.

Shapes: B rows, L positions, N valid tokens, D width.
"""

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.breakdown import WEIGHT_KEY, LossBreakdown
from distill.curriculum import CurriculumState
from distill.losses.engine import KDLoss, TokenStats, distillation_loss
from distill.losses.head import lm_head_of
from distill.losses.routing import UNIT, Routing
from distill.teachers.online import OnlineTeacher, decode
from distill.teachers.targets import DenseTargets


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
        chunk_size: tokens whose logits exist at one time.
        measure_inactive: components to measure at weight zero too, without gradient.
        metrics: also return the weight-free sums.
    """
    weights = {name: state.weights[WEIGHT_KEY[name]] for name in components}
    wanted = [name for name in components if weights[name] > 0 or name in measure_inactive]
    routed = [name for name in wanted if name in UNIT]
    factor = {kind: share / max(count, 1) for kind, count in batch["units"].items()}

    record = routing.record() if routing is not None and routed else None
    teacher_hidden_BLD = None
    if "kd_loss" in wanted or routed or metrics:
        with record or nullcontext():
            teacher_hidden_BLD = teacher.hidden(batch)
    layers = [index + 1 for index in routing.student_layer_indices] if routing is not None and routed else []
    output = decode(student, batch, **({"output_hidden_states": sorted(set(layers))} if layers else {}))

    positions_N = batch["positions"]
    targets = None
    if teacher_hidden_BLD is not None:
        targets = DenseTargets(_rows(teacher_hidden_BLD, positions_N), lm_head_of(teacher.model))
    engine = distillation_loss(
        _rows(output.last_hidden_state, positions_N),
        lm_head_of(student),
        batch["labels"].flatten().index_select(0, positions_N + 1),
        targets,
        kd=kd,
        temperature=state.temperature,
        kd_weight=weights["kd_loss"] * factor["tokens"] if "kd_loss" in wanted else None,
        lm_weight=weights["lm_loss"] * factor["tokens"] if "lm_loss" in wanted else None,
        chunk_size=chunk_size,
        metrics=metrics,
    )
    total = engine.loss
    stats: dict[str, Tensor] = {}
    sums = {"kd_loss": engine.kd_sum, "lm_loss": engine.lm_sum}
    raw = {name: value * factor["tokens"] for name, value in sums.items() if value is not None}

    if record is not None:
        assert routing is not None
        states = [output.hidden_states[layer] for layer in layers]
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
    breakdown = LossBreakdown({name: raw[name] for name in wanted}, weights)
    return Losses(total, breakdown, stats, engine.stats)


def _rows(hidden_BLD: Tensor, positions_N: Tensor) -> Tensor:
    """Hidden states of the valid tokens, [N, D]."""
    return hidden_BLD.flatten(0, 1).index_select(0, positions_N)

"""The curriculum is a pure function of the optimizer step: nothing to save, nothing to drift.

Each entry is a number or a list of `[progress, value]` knots, piecewise linear between them and constant outside; two
knots at one progress are a jump, the later value from there on. What depends on the course of the training itself, such
as a plateau, cannot be a schedule.
"""

# ruff: noqa: RUF009 (`weighs` makes a field as `dataclasses.field` does)

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

from distill.errors import UserError

Schedule = float | list[list[float]]


@dataclass(frozen=True)
class CurriculumState:
    """What the curriculum says at one optimizer step; training and validation read the same object.

    Args:
        step: optimizer steps done before the batch.
        progress: step / horizon, in [0, 1].
        weights: weight key -> value.
        temperature: of the KD softmaxes.
        top_k_experts: experts a token is routed to, None = the teacher's native number.
    """

    step: int
    progress: float
    weights: Mapping[str, float]
    temperature: float
    top_k_experts: int | None


def weighs(default: Schedule, *losses: str) -> Any:
    """A field of `Schedules` that is the weight of these losses."""
    metadata = {"losses": losses}
    if isinstance(default, list):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Schedules:
    """What changes over a run, as a function of the share of it that is done: each field is a key of `curriculum:`.

    The default is the three-phase curriculum; no published result supports exactly these phases.

    Args:
        kd: weight of `kd_loss`. Each entry is a number or a list of `[progress, value]` knots, linear between them.
        lm: weight of `lm_loss`.
        feature: weight of routing feature matching, expert importance and load balancing.
        attention: weight of routing attention alignment and attention transfer.
        layerwise: weight of `layerwise_loss`.
        contrastive: weight of `contrastive_loss`.
        temperature: of the KD softmaxes.
        top_k_experts: experts a token is routed to, rounded half up; null = the teacher's native number.

    Raises:
        UserError: a value or its knots out of range.
    """

    kd: Schedule = weighs(0.7, "kd_loss")
    lm: Schedule = weighs(0.3, "lm_loss")
    feature: Schedule = weighs(
        [[0.3, 0.0], [0.6, 0.1]],
        "routing_feature_matching_loss",
        "routing_expert_importance_loss",
        "routing_load_balancing_loss",
    )
    attention: Schedule = weighs([[0.3, 0.0], [0.6, 0.1]], "routing_attention_alignment_loss", "attention_loss")
    layerwise: Schedule = weighs([[0.6, 0.0], [1.0, 0.05]], "layerwise_loss")
    contrastive: Schedule = weighs([[0.6, 0.0], [1.0, 0.05]], "contrastive_loss")
    temperature: Schedule = 2.0
    top_k_experts: Schedule | None = None

    def __post_init__(self) -> None:
        for key, schedule in self.weights.items():
            check_schedule(key, schedule)
        check_schedule("temperature", self.temperature, exclusive=True)
        if self.top_k_experts is not None:
            check_schedule("top_k_experts", self.top_k_experts, minimum=1.0)

    @property
    def weights(self) -> dict[str, Schedule]:
        """Weight key -> schedule."""
        return {key: getattr(self, key) for key in WEIGHT_KEYS}

    def state_at(self, step: int, horizon: int | None) -> CurriculumState:
        """The state before optimizer step `step` of `horizon`; at progress 0 without a horizon."""
        progress = min(max(step / horizon, 0.0), 1.0) if horizon else 0.0
        experts = self.top_k_experts
        return CurriculumState(
            step=step,
            progress=progress,
            weights={key: value_at(schedule, progress) for key, schedule in self.weights.items()},
            temperature=value_at(self.temperature, progress),
            top_k_experts=None if experts is None else round_half_up(value_at(experts, progress)),
        )

    def unheard(self, losses: Iterable[str]) -> tuple[str, Schedule, list[str]] | None:
        """A weight that somebody set, and is above zero, of a key that scales none of these losses.

        Returns:
            Key, schedule and the losses that the key would scale; None where every weight is of use.
        """
        present = {WEIGHT_KEY[name] for name in losses}
        for (key, schedule), default in zip(self.weights.items(), Schedules().weights.values(), strict=True):
            if key not in present and schedule != default and peak(schedule) > 0:
                return key, schedule, [name for name, weight_key in WEIGHT_KEY.items() if weight_key == key]
        return None


# Loss -> the curriculum entry that scales it. The order is the order wherever losses are listed.
WEIGHT_KEY = {name: each.name for each in fields(Schedules) for name in each.metadata.get("losses", ())}
WEIGHT_KEYS = tuple(dict.fromkeys(WEIGHT_KEY.values()))


def value_at(schedule: Schedule, progress: float) -> float:
    """Value of a schedule at `progress` in [0, 1].

    Example:
        >>> value_at([[0.3, 0.0], [0.6, 0.1]], 0.45)
        0.05
    """
    if not isinstance(schedule, list):
        return float(schedule)
    after = bisect_right([knot[0] for knot in schedule], progress)
    if after == 0:
        return float(schedule[0][1])
    if after == len(schedule):
        return float(schedule[-1][1])
    (x0, y0), (x1, y1) = schedule[after - 1], schedule[after]
    return y0 + (y1 - y0) * (progress - x0) / (x1 - x0)


def peak(schedule: Schedule) -> float:
    """The highest value of a schedule."""
    return float(max(knot[1] for knot in schedule)) if isinstance(schedule, list) else float(schedule)


def leaves_zero(schedule: Schedule) -> float | None:
    """Progress from which on a schedule is above zero, None where it never is.

    Example:
        >>> leaves_zero([[0.6, 0.0], [1.0, 0.05]])
        0.6
    """
    knots = schedule if isinstance(schedule, list) else [[0.0, schedule]]
    index = next((index for index, knot in enumerate(knots) if knot[1] > 0), None)
    return None if index is None else float(knots[index - 1][0]) if index else 0.0


def check_schedule(key: str, schedule: Schedule | None, minimum: float = 0.0, exclusive: bool = False) -> None:
    """Refuses knots that are not `[progress, value]` pairs in ascending order within [0, 1], and values out of range.

    Raises:
        UserError: names the key, the value and the remedy.
    """
    if schedule is None:
        raise UserError(f"curriculum.{key}: null is no schedule: give a number, 0 to leave a loss out")
    knots = schedule if isinstance(schedule, list) else [[0.0, schedule]]
    if not knots or any(len(knot) != 2 for knot in knots):
        raise UserError(f"curriculum.{key}: {schedule} is not a schedule: give a number or a list of [progress, value]")
    places = [knot[0] for knot in knots]
    if (
        any(not 0 <= place <= 1 for place in places)
        or any(b < a for a, b in pairwise(places))
        or any(places.count(place) > 2 for place in places)
    ):
        raise UserError(f"curriculum.{key}: knots out of order in {schedule}: progress must ascend within [0, 1]")
    for _, value in knots:
        if not math.isfinite(value) or value < minimum or (exclusive and value == minimum):
            bound = "above" if exclusive else "at least"
            raise UserError(f"curriculum.{key}: {value} is out of range: give values {bound} {minimum:g}")


def round_half_up(value: float) -> int:
    """Nearest whole number, halves upwards (Python's own `round` takes them to the even one)."""
    return math.floor(value + 0.5)

"""The curriculum is a pure function of the optimizer step: nothing to save, nothing to drift.

Each entry is a number or a list of `[progress, value]` knots, piecewise linear between them and constant outside. What
depends on the course of the training itself, such as a plateau, cannot be a schedule.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from distill.errors import UserError

Schedule = float | list[list[float]]

# Component -> the curriculum entry that scales it. The order is the order wherever components are listed.
WEIGHT_KEY = {
    "kd_loss": "kd",
    "lm_loss": "lm",
    "routing_feature_matching_loss": "feature",
    "routing_expert_importance_loss": "feature",
    "routing_load_balancing_loss": "feature",
    "routing_attention_alignment_loss": "attention",
    "attention_loss": "attention",
    "layerwise_loss": "layerwise",
    "contrastive_loss": "contrastive",
}
WEIGHT_KEYS = tuple(dict.fromkeys(WEIGHT_KEY.values()))


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
    if any(not 0 <= place <= 1 for place in places) or any(b <= a for a, b in pairwise(places)):
        raise UserError(f"curriculum.{key}: knots out of order in {schedule}: progress must ascend within [0, 1]")
    for _, value in knots:
        if not math.isfinite(value) or value < minimum or (exclusive and value == minimum):
            bound = "above" if exclusive else "at least"
            raise UserError(f"curriculum.{key}: {value} is out of range: give values {bound} {minimum:g}")


def round_half_up(value: float) -> int:
    """Nearest whole number, halves upwards (Python's own `round` takes them to the even one)."""
    return math.floor(value + 0.5)

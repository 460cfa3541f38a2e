"""Figures as a log printed them: when two can be one number, and what was said of a weight at some place of a run.

Two figures that should be equal may differ by what was rounded off when they were printed, and by 1e-5 of their size,
ten times what the audit allows. A weight below 0.00005 is printed as zero and counts as zero.
"""

from bisect import bisect
from dataclasses import dataclass
from functools import lru_cache

from distill.analysis.run_files import RunFiles
from distill.analysis.training_log import Block, Figure, weight_key
from distill.curriculum import WEIGHT_KEYS

RELATIVE = 1e-5
LATER = tuple(key for key in WEIGHT_KEYS if key not in ("kd", "lm"))  # zero in phase 1
NEAR = 0.01  # share of the run over which a weight printed once is taken to hold


def same(a: Figure, b: Figure) -> bool:
    """Whether two printed figures can be one number; nan compares with nothing."""
    return not abs(a.value - b.value) > a.half + b.half + RELATIVE * max(abs(a.value), abs(b.value))


def product(raw: Figure, weight: Figure) -> Figure:
    """raw x weight, and by how much rounding may have moved it."""
    return Figure(
        raw.value * weight.value, raw.line, raw.half * abs(weight.value) + weight.half * (abs(raw.value) + raw.half)
    )


def total_of(parts: list[Figure]) -> Figure:
    """Sum of figures and of their roundings."""
    return Figure(sum(f.value for f in parts), parts[0].line, sum(f.half for f in parts))


def listed(block: Block) -> Figure | None:
    """Sum of the contributions that a whole TRAIN DEBUG block lists; None of a quoted one, which may leave some out."""
    figures = [parts.scaled for parts in block.components.values() if parts.scaled is not None]
    return total_of(figures) if figures and "sum" in block.figures else None


@dataclass(frozen=True)
class Said:
    """What one place says of a curriculum weight.

    Args:
        step: optimizer step, None where none is printed.
        line: of the log, None in metrics.csv.
        value: the weight.
        text: the line, for evidence.
        rank: 0 = CURRICULUM itself, 1 = metrics.csv, 2 = a block of losses.
    """

    step: int | None
    line: int | None
    value: Figure
    text: str
    rank: int


@dataclass(frozen=True)
class Weights:
    """What is said of one weight key, in the order of the log, and by step."""

    entries: list[Said]
    by_step: dict[int | None, list[Said]]
    steps: list[int]


@lru_cache(maxsize=1)  # several rules ask
def weights_said(run: RunFiles) -> dict[str, Weights]:
    """Weight key -> what the log and the metrics say of it."""
    said: dict[str, list[Said]] = {}
    for block in run.log.blocks:
        figures: dict[str, Figure] = {}
        rank = 0 if block.kind == "CURRICULUM" else 2
        if rank == 0:
            figures = dict(block.figures)
            if block.phase == 1:
                figures = {key: Figure(0.0, block.line, 0.0) for key in LATER} | figures
        elif block.kind in ("KD LOSS", "ROUTING LOSSES"):
            figures = {weight_key(n): parts.weight for n, parts in block.components.items() if parts.weight is not None}
        for key, figure in figures.items():
            said.setdefault(key, []).append(Said(block.step, figure.line, figure, run.quote(block, figure), rank))
    for column, points in run.metrics.items():
        if column.startswith("curriculum/"):
            entries = said.setdefault(column.removeprefix("curriculum/"), [])
            entries += [Said(p.step, None, Figure(p.value, 0, 1e-6), run.say(column, p), 1) for p in points]
    weights = {}
    for key, entries in said.items():
        by_step: dict[int | None, list[Said]] = {}
        for entry in entries:
            by_step.setdefault(entry.step, []).append(entry)
        weights[key] = Weights(entries, by_step, sorted(step for step in by_step if step is not None))
    return weights


def weight_there(weights: Weights | None, block: Block, rank: int = 2) -> Said | None:
    """What is said of a weight at the block's own step by places up to `rank`, of equals the nearest in the log."""
    found = [entry for entry in weights.by_step.get(block.step, []) if entry.rank <= rank] if weights else []
    return min(found, key=lambda entry: (entry.rank, abs((entry.line or 0) - block.line)), default=None)


def weight_near(run: RunFiles, weights: Weights | None, block: Block) -> Said | None:
    """What is said of a weight where a block stands; None where that cannot be told.

    In order: at the same step; next to it in the log, where steps are not printed; between two steps that say the same;
    within 1 % of the run before or after.
    """
    if weights is None:
        return None
    if block.step is None or not weights.steps:
        placed = [entry for entry in weights.entries if entry.line is not None]
        return min(placed, key=lambda entry: abs((entry.line or 0) - block.line), default=None)
    if there := weight_there(weights, block):
        return there
    at = bisect(weights.steps, block.step)
    around = [weights.by_step[step] for step in weights.steps[max(at - 1, 0) : at + 1]]
    nearest = [min(entries, key=lambda entry: entry.rank) for entries in around]
    if 0 < at < len(weights.steps):
        return nearest[0] if nearest[0].value.value == nearest[1].value.value else None
    near = run.horizon is None or abs((nearest[0].step or 0) - block.step) <= NEAR * run.horizon
    return nearest[0] if near else None

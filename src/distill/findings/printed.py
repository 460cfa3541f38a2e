"""Figures as a log printed them: when two can be one number, and what was said of a weight at some place of a run.

Two figures that should be equal may differ by what was rounded off when they were printed, and by 1e-5 of their size,
ten times what the audit allows. The price of judging by printed digits: a weight below 0.00005 counts as zero.
"""

from dataclasses import dataclass

from distill.findings.evidence import Run
from distill.training_log import Block, Figure, weight_key

RELATIVE = 1e-5
LATER = ("feature", "attention", "layerwise", "contrastive")  # zero in phase 1
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
    """A curriculum weight that the run printed: by CURRICULUM itself (rank 0) or by a reader of it (rank 1)."""

    step: int | None
    line: int | None
    value: Figure
    text: str
    rank: int


def weights_said(run: Run) -> dict[str, list[Said]]:
    """Weight key -> what the log and the metrics say of it, in the order of the log."""
    said: dict[str, list[Said]] = {}
    for block in run.log.blocks:
        figures: dict[str, Figure] = {}
        if block.kind == "CURRICULUM":
            figures = dict(block.figures)
            if block.phase == 1:
                figures = {key: Figure(0.0, block.line, 0.0) for key in LATER} | figures
        elif block.kind in ("KD LOSS", "ROUTING LOSSES"):
            figures = {weight_key(n): parts.weight for n, parts in block.components.items() if parts.weight is not None}
        for key, figure in figures.items():
            rank = 0 if block.kind == "CURRICULUM" else 1
            said.setdefault(key, []).append(Said(block.step, figure.line, figure, run.quote(block, figure), rank))
    for column, points in run.metrics.items():
        key = column.removeprefix("curriculum/")
        if key != column:
            for point in points:
                figure = Figure(point.value, 0, 1e-6)
                said.setdefault(key, []).append(Said(point.step, None, figure, run.say(column, point), 1))
    return said


def weight_at(run: Run, said: list[Said], block: Block) -> Said | None:
    """What was said of a weight where `block` stands; None where that cannot be told.

    In order: at the same step; next to it in the log, where steps are not printed; between two steps that say the same;
    within 1 % of the run before or after.
    """
    stepped = [entry for entry in said if entry.step is not None]
    placed = [entry for entry in said if entry.line is not None]
    if block.step is None or not stepped:
        return min(placed, key=lambda entry: abs((entry.line or 0) - block.line), default=None)
    same = [entry for entry in stepped if entry.step == block.step]
    if same:
        return min(same, key=lambda entry: (entry.rank, abs((entry.line or 0) - block.line)))
    before = max((e for e in stepped if (e.step or 0) < block.step), key=lambda e: (e.step or 0, -e.rank), default=None)
    after = min((e for e in stepped if (e.step or 0) > block.step), key=lambda e: (e.step or 0, e.rank), default=None)
    if before is not None and after is not None:
        return before if before.value.value == after.value.value else None
    one = before or after
    if one is None or one.step is None:
        return None
    near = run.horizon is None or abs(one.step - block.step) <= NEAR * run.horizon
    return one if near else None

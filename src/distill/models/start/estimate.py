"""How long the making of a student will take, by making it from few rows: with one step, with some, and from more rows.

Time is a constant, plus one for each row, plus one for each step; three short runs tell them apart. Their steps are so
small that they change nothing, so what they show of the errors is the closed form's. One layer is made before, for what
only the first one pays: imports, memory, kernels.
"""

import time
from dataclasses import replace

from transformers import PreTrainedModel

from distill.models.start.make import Place, make_student
from distill.models.start.shape import LayerFit, Shape, StudentFit
from distill.models.start.walk import Rows

FEW_TOKENS, MORE_TOKENS, STEPS = 1024, 3072, 8
NO_RATE = 1e-20


def estimate(
    teacher: PreTrainedModel, shape: Shape, rows: Rows, fit: StudentFit, place: Place
) -> tuple[float, list[LayerFit]]:
    """Seconds that `make_student` will take, and how near the layers come in closed form on a few rows.

    Args:
        teacher: in eval mode.
        shape: of the student.
        rows: calibration rows.
        fit: how layers are fitted.
        place: where they run.
    """
    few, more = few_and_more(rows)
    count, once = len(rows.ids_RL), replace(fit, steps=min(fit.steps, 1), learning_rate=NO_RATE)
    make_student(teacher, replace(shape, layers=shape.layers[:1]), rows.first(few), once, place)
    few_s, fits = _timed(teacher, shape, rows.first(few), once, place)
    total = few_s
    if more > few:
        more_s, fits = _timed(teacher, shape, rows.first(more), once, place)
        total += max(0.0, more_s - few_s) / (more - few) * (count - few)
    if fit.steps > 1:
        steps = min(fit.steps, 1 + STEPS)
        stepped_s, _ = _timed(teacher, shape, rows.first(few), replace(once, steps=steps), place)
        total += max(0.0, stepped_s - few_s) / (steps - 1) * (fit.steps - 1)
    return total, fits


def few_and_more(rows: Rows) -> tuple[int, int]:
    """How many rows are few and how many are more: at least one, and two more where there are as many."""
    count, length = rows.ids_RL.shape
    few = max(1, FEW_TOKENS // length)
    return min(count, few), min(count, max(few + 2, MORE_TOKENS // length))


def _timed(
    teacher: PreTrainedModel, shape: Shape, rows: Rows, fit: StudentFit, place: Place
) -> tuple[float, list[LayerFit]]:
    started = time.perf_counter()
    _, fits = make_student(teacher, shape, rows, fit, place)
    return time.perf_counter() - started, fits

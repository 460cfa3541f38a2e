"""How long the making of a student will take, by making it from few rows: once, on more of them, and with some steps.

Time is a constant, plus one for each row, plus one for each step; three short runs tell them apart.
"""

import time
from dataclasses import replace

from transformers import PreTrainedModel

from distill.models.start.make import Place, make_student
from distill.models.start.shape import LayerFit, Shape, StudentFit
from distill.models.start.walk import Rows

FEW_TOKENS, MORE_TOKENS, STEPS = 1024, 3072, 3


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
    count, length = rows.ids_RL.shape
    few, more = (min(count, max(1, tokens // length)) for tokens in (FEW_TOKENS, MORE_TOKENS))
    closed = replace(fit, steps=0)
    few_s, _ = _timed(teacher, shape, rows.first(few), closed, place)
    more_s, fits = _timed(teacher, shape, rows.first(more), closed, place) if more > few else (few_s, _)
    row_s = max(0.0, more_s - few_s) / max(1, more - few)
    total = few_s + row_s * (count - few)
    if fit.steps:
        stepped_s, _ = _timed(teacher, shape, rows.first(few), replace(fit, steps=STEPS), place)
        total += max(0.0, stepped_s - few_s) / STEPS * fit.steps
    return total, fits


def _timed(
    teacher: PreTrainedModel, shape: Shape, rows: Rows, fit: StudentFit, place: Place
) -> tuple[float, list[LayerFit]]:
    started = time.perf_counter()
    _, fits = make_student(teacher, shape, rows, fit, place)
    return time.perf_counter() - started, fits

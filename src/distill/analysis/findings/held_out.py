"""What a falling KL does not show: other validation sets on which it rises, and tasks whose score falls.

A student that is trained on narrow text learns that text and forgets the rest. The KL on text of the same kind falls
all the while, and a checkpoint that is chosen by it is the most forgetful one.
"""

import math
import re

from distill.analysis.findings.evidence import Finding, shorten
from distill.analysis.findings.trends import UNSEEN
from distill.analysis.run_files import Point, RunFiles

RISEN = 0.02  # relative rise above its lowest value; from one validation of the same text to the next it wavers by less
FALLEN = 0.02  # fall of a score that counts where nothing tells its error: two standard errors of some 2,500 questions
DIVERGENCES = ("kl_div_T1", "bits_per_byte")  # the second one across tokenizers, where there is no KL
SCORES = ("acc", "acc_norm", "exact_match", "f1")  # of lm-evaluation-harness, where more is better


def sets_disagree(run: RunFiles) -> list[Finding]:
    """A KL that rises on one validation set while it falls on another."""
    sets = divergences(run)
    findings = []
    for name, points in sets.items():
        lowest, last = min(points, key=lambda point: (point.value, -point.step)), points[-1]
        falling = falling_from(sets, lowest.step)
        if last.value <= lowest.value * (1 + RISEN) or not falling:
            continue
        other, (high, low) = next(iter(falling.items()))
        choice = f"choose the checkpoint by {name} (checkpoint.monitor: {name})"
        if run.monitor == name:
            choice = f"keep the checkpoint that {name} chose, near step {lowest.step}"
        findings.append(
            Finding(
                "validation sets disagree",
                f"The student gets better on one validation set and worse on another: from step {lowest.step} to "
                f"{last.step} {name} rises from {lowest.value:.4f} to {last.value:.4f}, while {other} falls from "
                f"{high.value:.4f} to {low.value:.4f}.",
                [run.say(name, lowest), run.say(name, last), run.say(other, high), run.say(other, low)],
                "the training text is narrower than what the sets ask for: the student learns that text and forgets "
                "the rest",
                f"{choice}, and mix text of that kind into the training data, or train for fewer steps",
            )
        )
    return findings


def score_falls(run: RunFiles) -> list[Finding]:
    """A task's score that falls by more than its error while the KL on the validation text falls."""
    sets = divergences(run)
    findings = []
    for column, series in run.metrics.items():
        score = re.fullmatch(r"tasks/.+/(\w+)(,.*)?", column)  # NAME/METRIC, or METRIC,FILTER
        points = [point for point in series if math.isfinite(point.value)]
        if score is None or score[1] not in SCORES or len(points) < 2:
            continue
        best, last = max(points, key=lambda point: (point.value, point.step)), points[-1]
        falling = falling_from(sets, best.step)
        if best.value - last.value <= 2 * error_of(run, column, best.value) or not falling:
            continue
        name, (high, low) = next(iter(falling.items()))
        findings.append(
            Finding(
                "task score falls",
                f"The score of a task falls while the student comes closer to the teacher on the validation text: from "
                f"step {best.step} to {last.step} {column} falls from {best.value:.4f} to {last.value:.4f}, and {name} "
                f"from {high.value:.4f} to {low.value:.4f}.",
                shorten([run.say(column, best), run.say(column, last), run.say(name, high), run.say(name, low)]),
                "the validation text is of the same narrow kind as the training text, so its KL does not see what the "
                "student forgets",
                f"choose the checkpoint by {column} or by a validation set of the text that the task is about "
                "(checkpoint.monitor), and mix such text into the training data, or train for fewer steps",
            )
        )
    return findings


def divergences(run: RunFiles) -> dict[str, list[Point]]:
    """Column -> finite points of the KL on each validation set that has two of them; the first set counts once."""
    for metric in DIVERGENCES:
        sets: dict[str, list[Point]] = {}
        for column in sorted(run.metrics, key=lambda column: column.count("/")):
            points = [point for point in run.metrics[column] if math.isfinite(point.value)]
            twin = any([p.value for p in points] == [p.value for p in known] for known in sets.values())
            if len(points) > 1 and re.fullmatch(rf"val/([^/]+/)?{metric}", column) and not twin:
                sets[column] = points
        if sets:
            return sets
    return {}


def falling_from(sets: dict[str, list[Point]], step: int) -> dict[str, tuple[Point, Point]]:
    """Column -> its value at a step and its last one, of those that have fallen since by what can be seen."""
    falls = {}
    for column, points in sets.items():
        start = max((p for p in points if p.step <= step), key=lambda point: point.step, default=points[0])
        if start.step < points[-1].step and points[-1].value < start.value * (1 - UNSEEN):
            falls[column] = (start, points[-1])
    return falls


def error_of(run: RunFiles, column: str, score: float) -> float:
    """Standard error of a score in [0, 1]: as logged beside it, else by the number of questions, else half `FALLEN`."""
    name, separator, selection = column.partition(",")
    logged = run.metrics.get(f"{name}_stderr{separator}{selection}")
    if logged:
        return max(point.value for point in logged)
    questions = run.setting("harness.limit")
    if isinstance(questions, int) and questions > 0:
        return math.sqrt(score * (1 - score) / questions)
    return FALLEN / 2

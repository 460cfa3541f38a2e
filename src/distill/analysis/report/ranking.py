"""Runs in the order of one metric, the best first.

Of what is measured again and again on the same text or task the best value after the first step counts, since the
checkpoint that is kept is the best one; of anything else the last value.
"""

from dataclasses import dataclass

import numpy as np

from distill.analysis.report.runs import RunHistory, Series
from distill.analysis.report.tables import NONE, more_is_better, number
from distill.errors import UserError, did_you_mean

USUAL = ("val/kl_div_T1", "val/bits_per_byte", "val/student_nll")  # no weight enters these


@dataclass(frozen=True)
class Place:
    """A run's place, as it is shown.

    Args:
        place: 1 is the best; a dash where the run has not logged the metric.
        name: of the run.
        value: the one that counts.
        step: where it was measured.
        last: the last value.
    """

    place: str
    name: str
    value: str = NONE
    step: str = NONE
    last: str = NONE


@dataclass(frozen=True)
class Ranking:
    """Runs by a metric.

    Args:
        metric: its name.
        counts: which of a run's values counts, and which ones are better.
        places: the best first; runs of the same value share a place.
    """

    metric: str
    counts: str
    places: list[Place]


def ranking(runs: list[RunHistory], metric: str | None = None, comparable: bool = True) -> Ranking | None:
    """The runs by a metric.

    Args:
        runs: in the order in which they were given, which equal runs keep.
        metric: any that was logged; None = what all runs chose their checkpoint by, else the KL to the teacher, or bits
            per byte where there is none.
        comparable: whether the runs are of one teacher and validation set; if not, they are ranked only by a metric
            that was asked for.

    Returns:
        None for a single run, and where no metric is asked for and none of the usual ones is there.

    Raises:
        UserError: no run has logged the metric.
    """
    logged = dict.fromkeys(name for run in runs for name in run.series)
    if metric is not None and metric not in logged:
        measured = [name for name in logged if name.startswith(("val/", "tasks/"))]
        raise UserError(f"--rank_by: no run has logged {metric}; {did_you_mean(metric, measured)}")
    if metric is None and comparable:
        chosen_by = {run.files.monitor for run in runs}
        metric = next((name for name in [*(chosen_by if len(chosen_by) == 1 else ()), *USUAL] if name in logged), None)
    if metric is None or len(runs) < 2:
        return None
    more = more_is_better(metric)
    best = metric.startswith(("val/", "tasks/"))
    found = [(run, counted(run.series.get(metric), more, best)) for run in runs]
    known = [(run, *value) for run, value in found if value is not None]
    known.sort(key=lambda entry: -entry[1] if more else entry[1])
    values = [value for _, value, _ in known]
    places = [
        Place(str(1 + values.index(value)), run.name, number(value), f"{step:,}", number(run.series[metric].last))
        for run, value, step in known
    ]
    places += [Place(NONE, run.name) for run, value in found if value is None]
    which = "best of all measurements" if best else "last value"
    return Ranking(metric, f"{which}, {'more' if more else 'less'} is better", places)


def counted(series: Series | None, more: bool, best: bool) -> tuple[float, int] | None:
    """The value that counts and its step; None where no value is finite."""
    if series is None or not len(finite := np.flatnonzero(np.isfinite(series.values))):
        return None
    if best and series.steps[finite[-1]] > 0:
        finite = finite[series.steps[finite] > 0]  # what was measured before training is no merit of the run
    values = series.values[finite]
    at = finite[(values.argmax() if more else values.argmin()) if best else -1]
    return float(series.values[at]), int(series.steps[at])


def told(ranking: Ranking) -> list[str]:
    """The ranking as lines of text."""
    width = max(len(place.name) for place in ranking.places)
    lines = [f"Ranked by {ranking.metric} ({ranking.counts}):"]
    for place in ranking.places:
        value = f"{place.value} at step {place.step}" if place.value != NONE else "not logged"
        lines.append(f"  {place.place:>2}  {place.name:<{width}}  {value}")
    return lines

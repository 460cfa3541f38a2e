"""What the sections of a report are made of: charts in groups, and one metric of several runs in one chart."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from distill.analysis.report.drawing import COLOURS, Chart, Line
from distill.analysis.report.runs import RunHistory


@dataclass
class Group:
    """Charts side by side, under a heading where there is one of them for each run."""

    heading: str
    charts: list[Chart]


@dataclass
class Section:
    """A part of the page.

    Args:
        identity: of its anchor.
        title: its heading.
        groups: its charts.
        absent: sentences on what is not there.
    """

    identity: str
    title: str
    groups: list[Group] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)


def colour_of(index: int) -> int:
    """Colour of the run at `index`."""
    return index % COLOURS


def overlay(
    runs: list[RunHistory],
    metric: str,
    title: str,
    unit: str,
    marked: bool = True,
    from_zero: bool = False,
    logarithmic: bool = False,
) -> Chart | None:
    """One chart with a line for each run that logged the metric; None where none did."""
    kind: Literal["marked", "line"] = "marked" if marked else "line"
    lines = []
    for index, run in enumerate(runs):
        series = run.series.get(metric)
        if series is not None:
            label = run.name if len(runs) > 1 else metric
            lines.append(Line(label, series.steps, series.values, colour_of(index), index // COLOURS % 3, kind))
    return Chart(title, unit, lines, from_zero=from_zero, logarithmic=logarithmic) if lines else None


def with_teacher(runs: list[RunHistory], chart: Chart | None, metric: str) -> Chart | None:
    """The chart with the teacher's line, or with several where the runs' teachers differ."""
    if chart is None:
        return None
    steps = np.unique(np.concatenate([line.x for line in chart.lines]))
    teachers: dict[str, list[str]] = {}  # of one value, its runs
    values = {}
    for run in runs:
        if metric in run.series:
            value = run.series[metric].last
            teachers.setdefault(f"{value:.5g}", []).append(run.name)
            values[f"{value:.5g}"] = value
    for key, names in teachers.items():
        label = "teacher" if len(teachers) == 1 else f"teacher of {', '.join(names)}"
        chart.lines.append(Line(label, steps, np.full(len(steps), values[key]), None, kind="reference"))
    return chart


def only(charts: Iterable[Chart | None]) -> list[Chart]:
    """Those that there are."""
    return [chart for chart in charts if chart is not None]

"""The tables of a report: what people compare at the top, and how the configurations differ."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from distill.analysis.report.drawing import Chart
from distill.analysis.report.runs import RunHistory, flat, sets_of

NONE = "\N{EN DASH}"  # in place of a figure that is not there
POINTS = 100  # rows of a chart's table for each series
# Where runs differ in these, they differ in teacher or validation set; of `data.` all but the last two.
COMPARABLE = ("model.teacher", "data.")
INCIDENTAL = ("data.per_device_batch_size", "data.num_workers")
MORE_IS_BETTER = re.compile(
    r"(acc|acc_norm|accuracy|exact_match|f1|bleu|rouge\w*|retention|\w+_retention_percent|acceptance|top\d_agreement|tokens_per_s)(,.*)?"
)


@dataclass
class Cell:
    """A figure of the summary; `best` marks the best of several runs."""

    text: str
    best: bool = False


@dataclass
class Row:
    """A row of the summary: what it is, under which name it was logged, and a cell for each run."""

    label: str
    metric: str
    cells: list[Cell]
    minor: bool = False


def number(value: float) -> str:
    """Four decimals as in training.log; more compact where those would say nothing."""
    if not math.isfinite(value):
        return str(value)
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.3e}"
    return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.4f}"


def last(metric: str) -> Callable[[RunHistory], float | None]:
    """Reads a metric's last value."""
    return lambda run: run.series[metric].last if metric in run.series else None


def lowest_kl(run: RunHistory) -> float | None:
    """The lowest KL of all validations."""
    series = run.series.get("val/kl_div_T1")
    finite = series.values[np.isfinite(series.values)] if series is not None else np.empty(0)
    return float(finite.min()) if len(finite) else None


def quotient(above: str, below: str) -> Callable[[RunHistory], float | None]:
    """Reads the ratio of two metrics' last values."""

    def read(run: RunHistory) -> float | None:
        a, b = last(above)(run), last(below)(run)
        return None if a is None or not b else a / b

    return read


def median_speed(run: RunHistory) -> float | None:
    """Median throughput."""
    series = run.series.get("train/tokens_per_s")
    return None if series is None else float(np.median(series.values))


Measure = tuple[str, str, Callable[[RunHistory], float | None], int, bool]
# label, metric or what it is, how to read it, sign of better (-1 = less), whether it stands back
SUMMARY: tuple[Measure, ...] = (
    ("KL to the teacher", "val/kl_div_T1", last("val/kl_div_T1"), -1, False),
    ("lowest", "of all validations", lowest_kl, -1, True),
    ("Top-1 agreement", "val/top1_agreement", last("val/top1_agreement"), 1, False),
    ("top-5", "val/top5_agreement", last("val/top5_agreement"), 1, True),
    ("Acceptance", "val/acceptance", last("val/acceptance"), 1, False),
    ("Student perplexity", "val/student_perplexity", last("val/student_perplexity"), -1, False),
    ("teacher's", "val/teacher_perplexity", last("val/teacher_perplexity"), 0, True),
    ("student / teacher", "ratio", quotient("val/student_perplexity", "val/teacher_perplexity"), -1, True),
    ("Bits per byte", "val/bits_per_byte", last("val/bits_per_byte"), -1, False),
    ("Calibration error", "val/ece", last("val/ece"), -1, False),
    ("Training loss", "train/loss", last("train/loss"), 0, False),
    ("Validation loss", "val/loss", last("val/loss"), 0, False),
    ("validation / training", "same weighting", quotient("val/loss", "train/loss"), 0, True),
    ("Tokens per second", "median", median_speed, 1, False),
)
ON_EACH_SET = {"lowest": "kl_div_T1", "Acceptance": "acceptance", "Bits per byte": "bits_per_byte"}  # after these rows


def more_is_better(metric: str) -> bool:
    """Whether more of a metric is better, by its name's last part; less is better of losses and distances."""
    return MORE_IS_BETTER.fullmatch(metric.rpartition("/")[2]) is not None


def measures(runs: list[RunHistory]) -> Iterator[Measure]:
    """The rows of the summary: the usual ones, those of further validation sets below them, and the tasks' scores."""
    for measure in SUMMARY:
        yield measure
        label, _, _, sign, _ = measure
        for name in sets_of(runs) if label in ON_EACH_SET else ():
            metric = f"val/{name}/{ON_EACH_SET[label]}"
            yield f"on {name}", metric, last(metric), sign, True
    for metric in dict.fromkeys(name for run in runs for name in run.series if name.startswith("tasks/")):
        if "_stderr" not in metric and "/teacher_" not in metric:
            label = metric.removeprefix("tasks/").replace("_retention_percent", ", % of the teacher's")
            yield label, metric, last(metric), 1 if more_is_better(metric) else 0, False


def summary(runs: list[RunHistory], comparable: bool) -> list[Row]:
    """The figures that people compare, rows that no run has left out; the best of a row only where runs compare."""
    rows = [Row("Steps", "done / planned", [Cell(steps(run)) for run in runs])]
    for label, metric, read, sign, minor in measures(runs):
        values = [read(run) for run in runs]
        known = [value for value in values if value is not None and math.isfinite(value)]
        if not any(value is not None for value in values):
            continue
        best = (max if sign > 0 else min)(known) if comparable and sign and len(set(known)) > 1 else None
        cells = [Cell(NONE if value is None else number(value), best is not None and value == best) for value in values]
        rows.append(Row(label, metric, cells, minor))
    return rows


def steps(run: RunHistory) -> str:
    """Optimizer steps done, of how many."""
    done = max((int(series.steps[-1]) + 1 for series in run.series.values() if len(series.steps)), default=0)
    return f"{done:,}" if run.horizon is None else f"{done:,} / {run.horizon:,}"


def differences(runs: list[RunHistory]) -> list[tuple[str, list[str]]]:
    """Configuration keys in which runs differ, with each one's value; empty for a single run."""
    configs = [flat(run.files.config.values) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [(key, [str(config.get(key, NONE)) for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def caution(rows: list[tuple[str, list[str]]]) -> str:
    """A sentence where the runs' figures are not of the same teacher or data."""
    keys = [key for key, _ in rows if key.startswith(COMPARABLE) and key not in INCIDENTAL]
    return f"These runs differ in {', '.join(keys)}: their figures do not compare." if keys else ""


def chart_table(chart: Chart) -> tuple[list[str], list[tuple[float, list[str]]]]:
    """Headings and rows `(x, cells)` of a chart's data; of a long series evenly spaced points, with both ends."""
    lines = [line for line in chart.lines if not line.silent]
    columns = []
    for line in lines:
        chosen = np.unique(np.linspace(0, len(line.x) - 1, min(len(line.x), POINTS)).round().astype(int))
        columns.append({float(line.x[i]): float(line.y[i]) for i in chosen})
    places = sorted({x for column in columns for x in column})
    rows = [(x, [number(column[x]) if x in column else "" for column in columns]) for x in places]
    return [line.label for line in lines], rows

"""Tables and verdicts of quality.py from its runs: means over seeds, and differences paired by seed.

Intervals are Student's t over seeds, 95%, without a correction for the number of arms. With four seeds, a difference
must be 1.6 times its own standard deviation to count.
"""

import statistics
from collections.abc import Iterable
from typing import Any

from scipy.stats import t

METRICS = {"student_nll": "NLL", "kl_div_T1": "KL T=1", "top1_agreement": "agreement", "ece": "ECE"}
Runs = dict[str, dict[int, dict[str, float]]]  # arm -> seed -> metric -> value


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval."""
    if len(values) < 2:
        return values[0], float("inf")
    return statistics.mean(values), float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def paired(runs: Runs, arm: str, reference: str, metric: str) -> tuple[float, float] | None:
    """Mean difference to the reference over the seeds that both have, and half its interval; None without any."""
    seeds = sorted(runs.get(arm, {}).keys() & runs.get(reference, {}).keys())
    if not seeds:
        return None
    return interval([runs[arm][seed][metric] - runs[reference][seed][metric] for seed in seeds])


def shown(pair: tuple[float, float] | None, signed: bool = False) -> str:
    """Mean and half-width as text."""
    if pair is None:
        return "-"
    mean, half = pair
    return f"{mean:{'+' if signed else ''}.4f}" + (f" ± {half:.4f}" if half < float("inf") else "")


def table(runs: Runs, arms: Iterable[str], reference: str | None = None, teacher: bool = False) -> list[list[str]]:
    """Rows with a heading: each metric's mean, and the paired differences of NLL and KL to the reference, if any."""
    heading = ["arm", "seeds", *METRICS.values(), *([f"NLL - {reference}", f"KL - {reference}"] if reference else [])]
    rows = [heading + (["teacher NLL"] if teacher else [])]
    for arm in arms:
        if arm not in runs:
            continue
        own = list(runs[arm].values())
        cells = [shown(interval([run[metric] for run in own])) for metric in METRICS]
        differences = [
            "" if arm == reference else shown(paired(runs, arm, str(reference), metric), signed=True)
            for metric in ("student_nll", "kl_div_T1")
            if reference
        ]
        tail = [shown(interval([run["teacher_nll"] for run in own]))] if teacher else []
        rows.append([arm, str(len(own)), *cells, *differences, *tail])
    return rows


def markdown(title: str, rows: list[list[str]]) -> str:
    """A table in markdown under its title."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([f"## {title}", "", lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""])


def effect(pair: tuple[float, float]) -> str:
    """What a paired difference of a loss says: lower is better."""
    mean, half = pair
    return "null" if abs(mean) <= half else "helps" if mean < 0 else "hurts"


def verdict(name: str, pair: tuple[float, float] | None, below: bool) -> tuple[str, bool]:
    """A line for a target that a paired difference must meet with its whole interval, and whether it does."""
    met = pair is not None and (pair[0] + pair[1] < 0 if below else pair[0] - pair[1] > 0)
    return f"{name} {shown(pair, signed=True)} {'< 0' if below else '> 0'} {'ok' if met else 'short'}", met


def by_arm(records: list[dict[str, Any]], teacher: str) -> Runs:
    """The runs of one teacher by arm and seed."""
    runs: Runs = {}
    for record in records:
        if record["teacher"] == teacher:
            runs.setdefault(record["arm"], {})[record["seed"]] = record["metrics"]
    return runs

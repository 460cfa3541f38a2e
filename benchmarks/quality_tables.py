"""Tables and verdicts of quality.py from its runs: means over seeds, and differences and ratios paired by seed.

Intervals are Student's t over seeds, 95%, without a correction for the number of arms. With four seeds, a difference
must be 1.6 times its own standard deviation to count. Ratios are of KL, by the mean of its logarithm.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from scipy.stats import t

METRICS = {"student_nll": "NLL", "kl_div_T1": "KL", "top1_agreement": "agreement", "ece": "ECE"}
OPTIMIZERS = ("adamw", "muon")
FIRST = 0.6  # what KL with features first may be of KD alone's, from scratch
FEWEST = 4  # seeds of a main arm
Runs = dict[str, dict[int, dict[str, float]]]  # arm -> seed -> metric -> value
AllRuns = dict[tuple[str, str], Runs]  # by student and optimizer
Line = tuple[str, bool]


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


def by_arm(records: list[dict[str, Any]], teacher: str) -> Runs:
    """The runs of one teacher by arm and seed."""
    runs: Runs = {}
    for record in records:
        if record["teacher"] == teacher:
            runs.setdefault(record["arm"], {})[record["seed"]] = record["metrics"]
    return runs


def grouped(records: list[dict[str, Any]]) -> AllRuns:
    """All runs of quality.py."""
    runs: AllRuns = {}
    for record in records:
        of = runs.setdefault((record["student"], record["optimizer"]), {})
        of.setdefault(record["arm"], {})[record["seed"]] = record["metrics"]
    return runs


def rows_of(runs: Runs, names: list[str]) -> list[list[str]]:
    """Rows with a heading: each metric's mean, paired differences to KD alone, seconds; then the rates' sweep."""
    rows = [["arm", "seeds", *METRICS.values(), "NLL - KD", "KL - KD", "steps", "CPU s"]]
    for arm in [*names, *sorted(name for name in runs if name not in names)]:
        if arm not in runs:
            continue
        own = list(runs[arm].values())
        cells = [shown(interval([run[metric] for run in own])) for metric in METRICS.values()]
        differences = ["" if arm == "KD" else shown(paired(runs, arm, "KD", m), signed=True) for m in ("NLL", "KL")]
        steps, seconds = (statistics.mean(run[key] for run in own) for key in ("steps", "seconds"))
        rows.append([arm, str(len(own)), *cells, *differences, f"{steps:.0f}", f"{seconds:.1f}"])
    return rows


def markdown(title: str, rows: list[list[str]]) -> str:
    """A table in markdown under its title."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([f"## {title}", "", lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""])


def effect(pair: tuple[float, float]) -> str:
    """What a paired difference says: lower is better."""
    mean, half = pair
    return "null" if abs(mean) <= half else "helps" if mean < 0 else "hurts"


def log_ratio(ours: Mapping[int, dict[str, float]], base: Mapping[int, dict[str, float]]) -> tuple[float, float] | None:
    """Mean of log KL / KL over the seeds of both, and half its interval; None without any."""
    seeds = sorted(ours.keys() & base.keys())
    return interval([math.log(ours[seed]["KL"] / base[seed]["KL"]) for seed in seeds]) if seeds else None


def spelled(pair: tuple[float, float]) -> str:
    """A ratio with its interval."""
    mean, half = pair
    return f"{math.exp(mean):.3f}" + (
        f" ({math.exp(mean - half):.3f} to {math.exp(mean + half):.3f})" if half < float("inf") else ""
    )


def at_most(what: str, pair: tuple[float, float] | None, most: float) -> Line:
    """A target on the mean of a ratio."""
    if pair is None:
        return f"{what}: not measured, at most {most}: short", False
    met = math.exp(pair[0]) <= most
    return f"{what}: {spelled(pair)}, at most {most}: {'ok' if met else 'short'}", met


def worse(what: str, pair: tuple[float, float] | None) -> Line:
    """A target of a control: its whole interval above 1."""
    if pair is None:
        return f"{what}: not measured, above 1: short", False
    met = pair[1] < float("inf") and pair[0] - pair[1] > 0
    return f"{what}: {spelled(pair)}, above 1 with its whole interval: {'ok' if met else 'short'}", met


def verdicts(
    runs: AllRuns, most: Mapping[str, float], main: Mapping[str, Mapping[str, Iterable[str]]]
) -> tuple[list[str], bool]:
    """A line per target and whether all are met; then what else was measured against KD alone, which is no target.

    Args:
        runs: all.
        most: student -> what Muon's KL may be of AdamW's.
        main: student -> optimizer -> the arms that need four seeds.
    """

    def ratio(student: str, ours: tuple[str, str], base: tuple[str, str]) -> tuple[float, float] | None:
        found = [runs.get((student, optimizer), {}).get(arm, {}) for optimizer, arm in (ours, base)]
        return log_ratio(found[0], found[1])

    targets = [
        at_most(
            f"scratch, {each}: features first / KD alone, KL",
            ratio("scratch", (each, "features first"), (each, "KD")),
            FIRST,
        )
        for each in OPTIMIZERS
    ]
    for student, bound in most.items():
        for arm, what in (("KD", "equal tokens"), ("KD, equal seconds", "equal seconds")):
            pair = ratio(student, ("muon", arm), ("adamw", "KD"))
            targets.append(at_most(f"{student}: Muon / AdamW, KL of KD alone at {what}", pair, bound))
    for each in OPTIMIZERS:
        pair = ratio("scratch", (each, "features, then KD, shuffled"), (each, "features, then KD"))
        targets.append(worse(f"scratch, {each}: shuffled / true features, then KD, KL", pair))
    few = [
        f"{student}, {optimizer}, {arm}"
        for student, of in main.items()
        for optimizer, arms in of.items()
        for arm in arms
        if len(runs.get((student, optimizer), {}).get(arm, {})) < FEWEST
    ]
    targets.append((f"main arms with fewer than {FEWEST} seeds: {'; '.join(few) or 'none'}: " + _ok(not few), not few))
    lines = [line for line, _ in targets]
    for (student, optimizer), found in sorted(runs.items()):
        for arm in found:
            pair = log_ratio(found[arm], found.get("KD", {}))
            if pair is not None and pair[1] < float("inf") and arm != "KD":
                lines.append(f"{student}, {optimizer}: {arm} / KD alone, KL: {spelled(pair)}: {effect(pair)}")
    return lines, all(met for _, met in targets)


def _ok(met: bool) -> str:
    return "ok" if met else "short"

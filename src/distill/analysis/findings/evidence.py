"""What a rule finds, and the reading of what it judges.

Each rule takes a run's files and is silent where it lacks what it needs. Silence may therefore mean that a matter could
not be judged; `distill diagnose` says which matters these were.
"""

import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from distill.analysis.run_files import RunFiles, read_folder
from distill.analysis.training_log import read
from distill.errors import UserError

QUOTED = 4  # lines of evidence that a finding shows


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or that explains what looks wrong.

    Args:
        name: short and stable, for scripts.
        title: one sentence with the figures that matter most.
        evidence: lines of the files that show it.
        cause: what makes it so.
        fix: what to do.
    """

    name: str
    title: str
    evidence: list[str]
    cause: str
    fix: str


def load(source: str) -> RunFiles:
    """Reads a run directory, a log, or a log from standard input.

    Args:
        source: folder with a `training.log` or a `metrics.csv`; a log; `-` for standard input. Beside a file that is
            called training.log its metrics and configuration are read too.

    Raises:
        UserError: nothing there, nothing in it that a diagnosis could be made of, or a file that is damaged.
    """
    path = Path(source)
    if source == "-":
        run = RunFiles("stdin", read(sys.stdin.read()))
    elif not path.exists():
        raise UserError(f"RUN_OR_LOG: {source} does not exist: give a run directory, a training.log or - for stdin")
    elif path.is_dir() or path.name == "training.log":
        run = read_folder(path if path.is_dir() else path.parent)
    else:
        run = RunFiles(path.name, read(path.read_text(encoding="utf-8", errors="replace")))
    for fault in (run.table.fault, run.config.fault):
        if fault is not None:
            raise UserError(f"RUN_OR_LOG: {fault}")
    if not (run.log.blocks or run.log.rates or run.metrics):
        raise UserError(
            f"RUN_OR_LOG: {source} has no block of a training.log ([TRAIN DEBUG], [CURRICULUM], [Eval], ...) and no "
            "metrics.csv: give a run directory, a training.log or - for stdin"
        )
    return run


def shorten(evidence: list[str]) -> list[str]:
    """The first lines and how many more there are."""
    unique = list(dict.fromkeys(evidence))
    more = len(unique) - QUOTED
    return [*unique[:QUOTED], *([f"and {more} more"] if more > 0 else [])]


@lru_cache(maxsize=1)  # several rules ask
def raw_readings(run: RunFiles) -> dict[str, list[tuple[int, float]]]:
    """Component -> `(step, raw value)` in training, from the metrics and the log, by step."""
    readings: dict[str, dict[int, float]] = {}
    for block in run.log.of("KD LOSS", "ROUTING LOSSES"):
        for name, parts in block.components.items():
            if parts.raw is not None and block.step is not None and math.isfinite(parts.raw.value):
                readings.setdefault(name, {})[block.step] = parts.raw.value
    for column, points in run.metrics.items():
        name = column.removeprefix("train/")
        if name != column and name.endswith("_loss"):
            found = {point.step: point.value for point in points if math.isfinite(point.value)}
            readings[name] = readings.get(name, {}) | found
    return {name: sorted(values.items()) for name, values in readings.items()}

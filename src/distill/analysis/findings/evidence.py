"""What a run left behind, read without torch so that a diagnosis takes a moment.

Everything is optional: a bare log has no metrics and no configuration; a rule that lacks what it needs is silent.
The price is that silence about a matter may mean that it could not be judged, which is why that is told as well.
"""

import csv
import math
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distill.analysis.training_log import Block, Figure, TrainingLog, read
from distill.errors import UserError

QUOTED = 4  # lines of evidence that a finding shows


class Point(NamedTuple):
    """One value of a metric: optimizer step, value, line of metrics.csv from 1."""

    step: int
    value: float
    line: int


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


@dataclass(frozen=True, eq=False)
class Run:
    """What there is to judge.

    Args:
        name: of the log, as evidence names it.
        log: its blocks.
        metrics: column of metrics.csv -> its values, in order.
        config: config.yaml.
        files: names of the files beside it.
    """

    name: str
    log: TrainingLog
    metrics: dict[str, list[Point]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    files: frozenset[str] = frozenset()

    def quote(self, block: Block, figure: Figure | None = None) -> str:
        """A line of the log with its number and where in the run it stands."""
        line = block.line if figure is None else figure.line
        step = "" if block.step is None else f" step {block.step}"
        return f"{self.name} line {line}, [{block.kind}]{step}: {self.log.lines[line - 1].strip()}"

    def say(self, column: str, point: Point) -> str:
        """A value of metrics.csv with its line and step."""
        return f"metrics.csv line {point.line}, step {point.step}: {column} {point.value:.6g}"

    def setting(self, key: str) -> Any:
        """A dotted key of the configuration, None where it is not known."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def horizon(self) -> int | None:
        """Optimizer steps of the whole run: the configuration's, else estimated from the log's progress."""
        steps = self.setting("trainer.max_steps")
        if isinstance(steps, int) and steps > 0:
            return steps
        known = [(b.progress, b.step) for b in self.log.of("CURRICULUM") if b.progress and b.step]
        return round(max(known)[1] / max(known)[0]) if known else None

    @property
    def begins_late(self) -> bool:
        """Whether it goes on with an earlier run: its first logged step comes later than its steps lie apart."""
        points = max((p for name, p in self.metrics.items() if name.startswith("train/")), key=len, default=[])
        return len(points) > 1 and points[0].step > max(b.step - a.step for a, b in pairwise(points))

    @property
    def last_step(self) -> int:
        """The furthest optimizer step that is mentioned anywhere, -1 where none is."""
        steps = [block.step for block in self.log.blocks if block.step is not None]
        return max([*steps, *(points[-1].step for points in self.metrics.values() if points)], default=-1)


def load(source: str) -> Run:
    """Reads a run directory, a log, or a log from standard input.

    Args:
        source: folder with a `training.log` or a `metrics.csv`; a log; `-` for standard input. Beside a file that is
            called training.log its metrics and configuration are read too.

    Raises:
        UserError: nothing there, or nothing in it that a diagnosis could be made of.
    """
    if source == "-":
        return _judgeable(Run("stdin", read(sys.stdin.read())), source)
    path = Path(source)
    if not path.exists():
        raise UserError(f"RUN_OR_LOG: {source} does not exist: give a run directory, a training.log or - for stdin")
    folder = path if path.is_dir() else path.parent if path.name == "training.log" else None
    log = path / "training.log" if path.is_dir() else path
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    if folder is None:
        return _judgeable(Run(log.name, read(text)), source)
    files = frozenset(entry.name for entry in folder.iterdir())
    metrics = read_metrics(folder / "metrics.csv") if "metrics.csv" in files else {}
    config: Any = None
    if "config.yaml" in files:
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            line = str(error).splitlines()[0]
            raise UserError(f"RUN_OR_LOG: {folder / 'config.yaml'} is no YAML ({line}): mend or remove it") from None
    return _judgeable(Run(log.name, read(text), metrics, config if isinstance(config, dict) else {}, files), source)


def _judgeable(run: Run, source: str) -> Run:
    if not (run.log.blocks or run.log.rates or run.metrics):
        raise UserError(
            f"RUN_OR_LOG: {source} has no block of a training.log ([TRAIN DEBUG], [CURRICULUM], [Eval], ...) and no "
            "metrics.csv: give a run directory, a training.log or - for stdin"
        )
    return run


def read_metrics(path: Path) -> dict[str, list[Point]]:
    """Columns of a metrics.csv as CSVLogger writes it; empty cells are left out.

    Raises:
        UserError: a value that is no number, or no column `step`.
    """
    columns: dict[str, list[Point]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or ["step"]):
            raise UserError(f"RUN_OR_LOG: {path} has no column step: give the metrics.csv that CSVLogger wrote")
        for row in reader:
            try:
                step = int(float(row["step"]))
                for name, cell in row.items():
                    if cell and name not in ("step", "epoch", None):
                        columns.setdefault(name, []).append(Point(step, float(cell), reader.line_num))
            except (TypeError, ValueError):
                raise UserError(
                    f"RUN_OR_LOG: {path} line {reader.line_num} is not numbers: remove the line, or give the log alone"
                ) from None
    return columns


def shorten(evidence: list[str]) -> list[str]:
    """The first lines and how many more there are."""
    unique = list(dict.fromkeys(evidence))
    more = len(unique) - QUOTED
    return [*unique[:QUOTED], *([f"and {more} more"] if more > 0 else [])]


@lru_cache(maxsize=1)  # several rules ask
def raw_readings(run: Run) -> dict[str, list[tuple[int, float]]]:
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

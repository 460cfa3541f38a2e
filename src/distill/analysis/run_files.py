"""The files of a run's folder, read once, for those who judge a run and for those who draw it.

Every file is optional, and a damaged one stops nobody here: what is wrong with it is kept as a sentence. `diagnose`
refuses such a file, since its verdict would rest on half of it; `report` draws what is left and prints the sentence.
"""

import csv
import io
import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distill.analysis import training_log
from distill.analysis.training_log import Block, Figure, TrainingLog

PROGRESS_ROUNDING = 6e-4  # the log prints progress in percent with one decimal


class Point(NamedTuple):
    """One value of a metric: optimizer step, value, line of metrics.csv from 1."""

    step: int
    value: float
    line: int


@dataclass(frozen=True)
class MetricsTable:
    """What metrics.csv holds.

    Args:
        columns: metric -> its points in the order of the file; empty cells are left out, and a cell that is no number
            is nan.
        doubtful: lines that CSVLogger did not finish or did not write: they lack the newline, have another number of
            cells than the header, or a step that is not written in digits.
        fault: what is wrong with the file and what to do about it, None where nothing is.
    """

    columns: dict[str, list[Point]] = field(default_factory=dict)
    doubtful: frozenset[int] = frozenset()
    fault: str | None = None


@dataclass(frozen=True)
class YamlFile:
    """A mapping in a YAML file.

    Args:
        values: the mapping, empty where the file is absent or holds none.
        text: of the file as it is written.
        fault: what is wrong with the YAML, None where nothing is or there is no file.
    """

    values: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    fault: str | None = None


@dataclass(frozen=True, eq=False)
class RunFiles:
    """What a run has left.

    Args:
        log_name: name of the log, as evidence quotes it.
        log: the blocks of training.log, none where it is absent.
        table: metrics.csv.
        config: config.yaml.
        environment: environment.yaml.
        student_fit: student_fit.json, how the student was made before the run.
        names: of the files in the folder; empty for a log without a folder.
    """

    log_name: str
    log: TrainingLog
    table: MetricsTable = MetricsTable()
    config: YamlFile = YamlFile()
    environment: YamlFile = YamlFile()
    student_fit: YamlFile = YamlFile()
    names: frozenset[str] = frozenset()

    @property
    def metrics(self) -> dict[str, list[Point]]:
        """Metric -> its points in the order of metrics.csv."""
        return self.table.columns

    def setting(self, key: str) -> Any:
        """The configuration's value at a dotted key, None where it is not known."""
        value: Any = self.config.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def monitor(self) -> str | None:
        """The metric by which the run's best checkpoint is chosen, None where that is not known."""
        metric = self.setting("checkpoint.init_args.monitor") or self.setting("checkpoint.monitor")
        return metric if isinstance(metric, str) else None

    @cached_property
    def horizon(self) -> int | None:
        """Optimizer steps of the whole run, None where nothing tells."""
        known = [(b.step, b.progress) for b in self.log.of("CURRICULUM") if b.step is not None and b.progress]
        return horizon_of(self.config.values, known)

    @property
    def begins_late(self) -> bool:
        """Whether it goes on with an earlier run: its first logged step comes later than its steps lie apart."""
        points = max((p for name, p in self.metrics.items() if name.startswith("train/")), key=len, default=[])
        return len(points) > 1 and points[0].step > max(b.step - a.step for a, b in pairwise(points))

    def quote(self, block: Block, figure: Figure | None = None) -> str:
        """A line of the log with its number and where in the run it stands."""
        line = block.line if figure is None else figure.line
        step = "" if block.step is None else f" step {block.step}"
        return f"{self.log_name} line {line}, [{block.kind}]{step}: {self.log.lines[line - 1].strip()}"

    def say(self, column: str, point: Point) -> str:
        """A value of metrics.csv with its line and step."""
        return f"metrics.csv line {point.line}, step {point.step}: {column} {point.value:.6g}"


def read_folder(folder: Path) -> RunFiles:
    """Reads what is there of training.log, metrics.csv, config.yaml and environment.yaml."""
    return RunFiles(
        "training.log",
        training_log.read(text_of(folder / "training.log")),
        read_metrics(folder / "metrics.csv"),
        read_yaml(folder / "config.yaml"),
        read_yaml(folder / "environment.yaml"),
        read_yaml(folder / "student_fit.json"),
        frozenset(entry.name for entry in folder.iterdir()),
    )


def text_of(path: Path) -> str:
    """The text of a file, empty where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_metrics(path: Path) -> MetricsTable:
    """Reads a metrics.csv as Lightning's CSVLogger writes it."""
    text = text_of(path)
    rows = csv.reader(io.StringIO(text))
    header = next(rows, [])
    if "step" not in header:
        fault = f"{path} has no column step: give the metrics.csv that CSVLogger wrote" if header else None
        return MetricsTable(fault=fault)
    place = header.index("step")
    measured: list[tuple[int, list[Point]]] = [
        (index, []) for index, name in enumerate(header) if name not in ("step", "epoch")
    ]
    doubtful, wrong = set(), []
    for row in filter(None, rows):
        line = rows.line_num
        if len(row) != len(header) or not row[place].isdigit():
            doubtful.add(line)
        try:
            step = int(float(row[place]))
        except (IndexError, ValueError, OverflowError):
            wrong.append(line)
            continue
        for index, points in measured:
            if index < len(row) and (cell := row[index]):
                try:
                    points.append(Point(step, float(cell), line))
                except ValueError:
                    points.append(Point(step, math.nan, line))
                    wrong.append(line)
    if not text.endswith("\n"):
        doubtful.add(rows.line_num)
    columns = {header[index]: points for index, points in measured if points}
    fault = f"{path} line {wrong[0]} is not numbers: remove the line, or give the log alone" if wrong else None
    return MetricsTable(columns, frozenset(doubtful), fault)


def read_yaml(path: Path) -> YamlFile:
    """Reads a YAML file that should hold a mapping."""
    text = text_of(path)
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return YamlFile(text=text, fault=f"{path} is no YAML ({str(error).splitlines()[0]}): mend or remove it")
    return YamlFile(values if isinstance(values, dict) else {}, text)


def horizon_of(config: dict[str, Any], progress: list[tuple[int, float]]) -> int | None:
    """Optimizer steps of the whole run: as configured where the log's rounded progress agrees, else by the log.

    Args:
        config: nested as in config.yaml.
        progress: `(step, share of the run)` as the log prints them.
    """
    trainer = config.get("trainer")
    configured = trainer.get("max_steps") if isinstance(trainer, dict) else None
    configured = configured if isinstance(configured, int) and configured > 0 else None
    told = max(((step, share) for step, share in progress if step > 0 and share > 0), default=None)
    if told is None:
        return configured
    step, share = told
    if configured is not None and math.isclose(step / configured, share, abs_tol=PROGRESS_ROUNDING):
        return configured
    return round(step / share)

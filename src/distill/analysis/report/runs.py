"""What a run left in its folder, read leniently: whatever is missing or damaged becomes a sentence, not an error.

metrics.csv is exact and sparse (every `log_every_n_steps` steps); training.log has the first steps, components of
weight zero and the validation before training, to four decimals. Both go into the same series, the exact value first.
Nothing heavy is imported, so that a report of a finished run takes seconds.
"""

import csv
import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from distill.analysis import training_log
from distill.curriculum import WEIGHT_KEY
from distill.errors import UserError


@dataclass(frozen=True)
class Series:
    """One metric over optimizer steps, in ascending order, the last value where a step was logged twice.

    Args:
        steps: `[N]`, as logged: the step's index from 0.
        values: `[N]`, may hold nan and inf.
    """

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        return float(self.values[-1])


@dataclass(frozen=True)
class Run:
    """One run as far as its folder tells.

    Args:
        name: the folder's name, with its parents' where several runs share it.
        folder: where it lies.
        series: metric name -> its values.
        config: config.yaml as nested dictionaries, empty where there is none.
        config_text: config.yaml as written.
        environment: environment.yaml, empty where there is none.
        horizon: optimizer steps that the curriculum reckoned with, None where nothing tells.
        absent: a sentence for each piece that is missing or damaged.
    """

    name: str
    folder: Path
    series: dict[str, Series]
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    horizon: int | None
    absent: list[str] = field(default_factory=list)

    def components(self, pattern: str) -> dict[str, Series]:
        """Component -> its series, in listing order; `pattern` is a metric's name with `{}` for the component."""
        found = {name: self.series.get(pattern.format(name)) for name in WEIGHT_KEY}
        return {name: series for name, series in found.items() if series is not None}

    def setting(self, key: str) -> Any:
        """A configuration value by its dotted key, None where it is not there."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def read_runs(folders: list[Path]) -> list[Run]:
    """Reads each folder; of two that share their last name the parents' are told too.

    Raises:
        UserError: a folder that is not there, is given twice, or has nothing of a run.
    """
    paths = [folder.resolve() for folder in folders]
    for path, given in zip(paths, folders, strict=True):
        if not path.is_dir():
            raise UserError(f"RUN: {given} is no folder: give a run's, such as lightning_logs/version_0")
        if paths.count(path) > 1:
            raise UserError(f"RUN: {given} is given twice: name each run once")
    # The folder that every run's logger makes tells nothing.
    parts = [[part for part in path.parts if part != "lightning_logs"] or [path.name] for path in paths]
    depth = 1
    while len({tuple(own[-depth:]) for own in parts}) < len(paths) and depth < max(map(len, parts)):
        depth += 1
    return [read_run(path, "/".join(own[-depth:])) for path, own in zip(paths, parts, strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """Reads one run's folder.

    Raises:
        UserError: it holds neither metrics.csv nor training.log nor config.yaml.
    """
    absent: list[str] = []
    series: dict[str, Series] = {}
    log_series: dict[str, Series] = {}
    progress: list[tuple[int, float]] = []
    files = {part: folder / part for part in ("metrics.csv", "training.log", "config.yaml")}
    if not any(path.is_file() for path in files.values()):
        raise UserError(
            f"RUN: {folder} has no {', '.join(files)}: give a run's folder, such as lightning_logs/version_0"
        )
    if files["metrics.csv"].is_file():
        series = read_metrics(files["metrics.csv"].read_text(encoding="utf-8", errors="replace"))
        if not series:
            absent.append("metrics.csv holds no values yet.")
    else:
        absent.append("metrics.csv is not there: what only it knows is left out.")
    if files["training.log"].is_file():
        log_series, progress = read_log(files["training.log"].read_text(encoding="utf-8", errors="replace"))
    else:
        absent.append(
            "training.log is not there: raw values at weight zero and the scaled ones of validation are left out."
        )
    config, text = read_yaml(files["config.yaml"], absent)
    environment, told = read_yaml(folder / "environment.yaml", absent)
    if not told:
        absent.append("environment.yaml is not there: the run did not write down its versions and devices.")
    weights = {metric for metric in series if metric.startswith("curriculum/")}
    for metric, found in log_series.items():
        if not metric.startswith("curriculum/") or metric in weights or not weights:
            series[metric] = merge(series.get(metric), found)
    series = after(series, environment.get("resumed_from"), folder)
    horizon = horizon_of(config, progress)
    if horizon is not None and any(found.steps[-1] >= horizon for found in series.values()):
        horizon = None  # this configuration is not the one that the run had
    return Run(name, folder, series, config, text, environment, horizon, absent)


def after(series: dict[str, Series], checkpoint: Any, folder: Path) -> dict[str, Series]:
    """A resumed run's series behind those of the run whose checkpoint it went on from, where that is still there."""
    before = Path(str(checkpoint)).resolve().parent.parent
    if not (checkpoint and series and (before / "metrics.csv").is_file()) or before == folder.resolve():
        return series
    start = min(int(own.steps[0]) for own in series.values())
    for metric, earlier in read_run(before, before.name).series.items():
        kept = earlier.steps < start
        own = series.get(metric, Series(earlier.steps[:0], earlier.values[:0]))
        if kept.any():
            values = np.concatenate([earlier.values[kept], own.values])
            series[metric] = Series(np.concatenate([earlier.steps[kept], own.steps]), values)
    return series


def read_metrics(text: str) -> dict[str, Series]:
    """Metric -> series of Lightning's metrics.csv; a last line that a kill cut off is left out."""
    rows = csv.reader(io.StringIO(text[: text.rfind("\n") + 1]))
    header = next(rows, [])
    if "step" not in header:
        return {}
    place = header.index("step")
    kept = [row for row in rows if len(row) == len(header) and row[place].isdigit()]
    series: dict[str, Series] = {}
    for name, column in zip(header, zip(*kept, strict=True), strict=False):
        filled = [i for i, cell in enumerate(column) if cell]
        if filled and name not in ("step", "epoch"):
            steps = [int(kept[i][place]) for i in filled]
            series[name] = make_series(steps, [number(column[i]) for i in filled])
    return series


def number(cell: str) -> float:
    """A cell's value; nan where it is none."""
    try:
        return float(cell)
    except ValueError:
        return math.nan


def make_series(steps: list[int], values: list[float]) -> Series:
    """Sorted by step; of several values of one step the last one."""
    latest = dict(zip(steps, values, strict=True)) if len(set(steps)) < len(steps) else None
    keys = np.asarray(list(latest) if latest is not None else steps, dtype=np.int64)
    data = np.asarray(list(latest.values()) if latest is not None else values, dtype=np.float64)
    order = np.argsort(keys, kind="stable")
    return Series(keys[order], data[order])


def merge(exact: Series | None, rounded: Series) -> Series:
    """The exact values, and the rounded ones of the steps that lack one."""
    if exact is None:
        return rounded
    extra = ~np.isin(rounded.steps, exact.steps)
    steps = np.concatenate([exact.steps, rounded.steps[extra]])
    order = np.argsort(steps, kind="stable")
    return Series(steps[order], np.concatenate([exact.values, rounded.values[extra]])[order])


def read_log(text: str) -> tuple[dict[str, Series], list[tuple[int, float]]]:
    """Series of the blocks of training.log under the names of metrics.csv, and `(step, progress)` of the curriculum."""
    points: dict[str, tuple[list[int], list[float]]] = {}
    progress: list[tuple[int, float]] = []

    def add(metric: str, step: int, figure: training_log.Figure | None) -> None:
        if figure is not None and not math.isnan(figure.value):  # nan: not measured
            steps, values = points.setdefault(metric, ([], []))
            steps.append(step)
            values.append(figure.value)

    for block in training_log.read(text).of("CURRICULUM", "KD LOSS", "ROUTING LOSSES", "Eval"):
        if block.step is None:
            continue
        if block.progress is not None:
            progress.append((block.step, block.progress))
        stage = "val" if block.kind == "Eval" else "train"
        add("val/loss", block.step, block.figures.pop("loss", None))
        for key, figure in block.figures.items():
            add(f"curriculum/{key}", block.step, figure)
        for name, parts in block.components.items():
            add(f"{stage}/{name}", block.step, parts.raw)
            if stage == "val":
                add(f"val/{name}_scaled", block.step, parts.scaled)
    return {metric: make_series(*column) for metric, column in points.items()}, progress


def read_yaml(path: Path, absent: list[str]) -> tuple[dict[str, Any], str]:
    """A YAML mapping and its text; empty, with a sentence in `absent`, where there is none."""
    if not path.is_file():
        return {}, ""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError:
        loaded = None
    if not isinstance(loaded, dict):
        absent.append(f"{path.name} is not readable YAML.")
        return {}, text
    return loaded, text


def horizon_of(config: dict[str, Any], progress: list[tuple[int, float]]) -> int | None:
    """Optimizer steps of the whole run: as configured where the log's rounded progress agrees, else by the log."""
    trainer = config.get("trainer")
    configured = trainer.get("max_steps") if isinstance(trainer, dict) else None
    configured = configured if isinstance(configured, int) and configured > 0 else None
    told = max(((step, share) for step, share in progress if step > 0 and share > 0), default=None)
    if told is None:
        return configured
    step, share = told
    if configured is not None and math.isclose(step / configured, share, abs_tol=6e-4):
        return configured
    return round(step / share)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists and empty mappings are values."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result

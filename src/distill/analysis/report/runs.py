"""A run's metrics as series over its steps; whatever is missing or damaged becomes a sentence, not an error.

metrics.csv is exact and sparse (every `log_every_n_steps` steps); training.log has the first steps, components of
weight zero and the validation before training, to four decimals. Both go into the same series, the exact value first.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill.analysis.run_files import RunFiles, read_folder
from distill.analysis.training_log import Figure, TrainingLog
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
class RunHistory:
    """One run over its steps, as far as its folder tells.

    Args:
        name: the folder's name, with its parents' where several runs share it.
        folder: where it lies.
        files: what it holds.
        series: metric name -> its values.
        horizon: optimizer steps that the curriculum reckoned with, None where nothing tells.
        absent: a sentence for each piece that is missing or damaged.
    """

    name: str
    folder: Path
    files: RunFiles
    series: dict[str, Series]
    horizon: int | None
    absent: list[str] = field(default_factory=list)

    def components(self, pattern: str) -> dict[str, Series]:
        """Component -> its series, in listing order; `pattern` is a metric's name with `{}` for the component."""
        found = {name: self.series.get(pattern.format(name)) for name in WEIGHT_KEY}
        return {name: series for name, series in found.items() if series is not None}

    def setting(self, key: str) -> Any:
        """The configuration's value at a dotted key, None where it is not there."""
        return self.files.setting(key)


def read_runs(folders: list[Path]) -> list[RunHistory]:
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


def read_run(folder: Path, name: str) -> RunHistory:
    """Reads one run's folder.

    Raises:
        UserError: it holds neither metrics.csv nor training.log nor config.yaml.
    """
    needed = ("metrics.csv", "training.log", "config.yaml")
    if not any((folder / part).is_file() for part in needed):
        raise UserError(
            f"RUN: {folder} has no {', '.join(needed)}: give a run's folder, such as lightning_logs/version_0"
        )
    files = read_folder(folder)
    series = series_of_metrics(files)
    absent = missing(files, series)
    weights = {metric for metric in series if metric.startswith("curriculum/")}
    for metric, found in series_of_log(files.log).items():
        if not metric.startswith("curriculum/") or metric in weights or not weights:
            series[metric] = merge(series.get(metric), found)
    series = after(series, files.environment.values.get("resumed_from"), folder)
    horizon = files.horizon
    if horizon is not None and any(found.steps[-1] >= horizon for found in series.values()):
        horizon = None  # this configuration is not the one that the run had
    return RunHistory(name, folder, files, series, horizon, absent)


def missing(files: RunFiles, series: dict[str, Series]) -> list[str]:
    """A sentence for each file that is not there, or of which nothing can be read."""
    sentences = []
    if "metrics.csv" not in files.names:
        sentences.append("metrics.csv is not there: what only it knows is left out.")
    elif not series:
        sentences.append("metrics.csv holds no values yet.")
    if "training.log" not in files.names:
        sentences.append(
            "training.log is not there: raw values at weight zero and the scaled ones of validation are left out."
        )
    for name, yaml in (("config.yaml", files.config), ("environment.yaml", files.environment)):
        if name in files.names and not yaml.values:
            sentences.append(f"{name} is not readable YAML.")
    if not files.environment.text:
        sentences.append("environment.yaml is not there: the run did not write down its versions and devices.")
    return sentences


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


def series_of_metrics(files: RunFiles) -> dict[str, Series]:
    """Metric -> series of metrics.csv; lines that a kill cut off are left out."""
    doubtful = files.table.doubtful
    series = {}
    for metric, points in files.metrics.items():
        kept = [point for point in points if point.line not in doubtful] if doubtful else points
        if kept:
            series[metric] = make_series([point.step for point in kept], [point.value for point in kept])
    return series


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


def series_of_log(log: TrainingLog) -> dict[str, Series]:
    """Series of the blocks of training.log, under the names of metrics.csv."""
    points: dict[str, tuple[list[int], list[float]]] = {}

    def add(metric: str, step: int, figure: Figure | None) -> None:
        if figure is not None and not math.isnan(figure.value):  # nan: not measured
            steps, values = points.setdefault(metric, ([], []))
            steps.append(step)
            values.append(figure.value)

    for block in log.of("CURRICULUM", "KD LOSS", "ROUTING LOSSES", "Eval"):
        if block.step is None:
            continue
        stage = "val" if block.kind == "Eval" else "train"
        for key, figure in block.figures.items():
            add("val/loss" if stage == "val" else f"curriculum/{key}", block.step, figure)
        for name, parts in block.components.items():
            add(f"{stage}/{name}", block.step, parts.raw)
            if stage == "val":
                add(f"val/{name}_scaled", block.step, parts.scaled)
    return {metric: make_series(*column) for metric, column in points.items()}


def sets_of(runs: list[RunHistory]) -> list[str]:
    """Names of the validation sets beside the first one, whose metrics have the plain names."""
    names = dict.fromkeys(
        name.split("/")[1] for run in runs for name in run.series if name.startswith("val/") and name.count("/") == 2
    )
    return [name for name in names if not all(is_first(run, name) for run in runs)]


def is_first(run: RunHistory, name: str) -> bool:
    """Whether a named validation set is the run's first one, logged under its own name too."""
    pairs = [
        (series, run.series.get(f"val/{metric.split('/')[2]}"))
        for metric, series in run.series.items()
        if metric.startswith(f"val/{name}/")
    ]
    return all(plain is not None and np.array_equal(plain.values, own.values) for own, plain in pairs)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists and empty mappings are values."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result

"""How the student was trained: charts by the metrics' names alone; what was not logged becomes a sentence about it."""

import re
from typing import Literal

import numpy as np

from distill.analysis.report.charts import Group, Section, colour_of, only, overlay
from distill.analysis.report.drawing import COLOURS, Chart, Line
from distill.analysis.report.runs import RunHistory
from distill.curriculum import WEIGHT_KEY, WEIGHT_KEYS, value_at

COLOUR = {name: index for index, name in enumerate(WEIGHT_KEY)}
KEY_COLOUR = {key: list(WEIGHT_KEY.values()).index(key) for key in WEIGHT_KEYS}
ROUTING = {"gate_entropy": ("Entropy of the gates", "nats"), "mean_gap": ("Gap to the experts", "mean squared error")}
MEMORY = re.compile(r"memory|allocated_bytes\.all\.peak|/rss", re.IGNORECASE)


def losses(runs: list[RunHistory]) -> Section:
    """Curriculum, scaled and raw components of each run, a row for each."""
    section = Section("losses", "Curriculum and components")
    for run in runs:
        charts = only(
            [
                curriculum(run),
                scaled(run, "train", "Scaled components, training"),
                components(run, "train", "Raw components, training"),
                targets(run),
                scaled(run, "val", "Scaled components, validation"),
                components(run, "val", "Raw components, validation"),
            ]
        )
        if charts:
            section.groups.append(Group(run.name if len(runs) > 1 else "", charts))
        else:
            section.absent.append(f"{run.name}: no curriculum and no component was logged.")
    return section


def curriculum(run: RunHistory) -> Chart | None:
    """Weights as logged, over progress, on the lines that the configuration plans."""
    weights = {key: run.series[f"curriculum/{key}"] for key in KEY_COLOUR if f"curriculum/{key}" in run.series}
    if not weights:
        return None
    lines, horizon = [], run.horizon
    for key, series in weights.items():
        colour, dash = KEY_COLOUR[key], KEY_COLOUR[key] % 3
        if horizon is None:
            lines.append(Line(key, series.steps, series.values, colour, dash))
            continue
        schedule = run.setting(f"curriculum.{key}")
        if isinstance(schedule, int | float | list):
            knots = schedule if isinstance(schedule, list) else []
            places = sorted({0.0, 1.0, *(float(knot[0]) for knot in knots)})
            plan = np.array([value_at(schedule, place) for place in places])
            lines.append(Line(f"{key}, planned", 100 * np.array(places), plan, colour, dash, silent=True))
        some = np.unique(np.linspace(0, len(series.steps) - 1, 30).round().astype(int))
        lines.append(Line(key, 100 * series.steps[some] / horizon, series.values[some], colour, dash, kind="points"))
    note = "Lines: as configured; points: as logged." if any(line.silent for line in lines) else ""
    return Chart("Curriculum", "weight", lines, x_label="step" if horizon is None else "progress", note=note)


def targets(run: RunHistory) -> Chart | None:
    """KD temperature and number of experts."""
    found = {name: run.series.get(f"curriculum/{name}") for name in ("temperature", "top_k_experts")}
    lines = [
        Line(name, series.steps, series.values, 3 + index, index)
        for index, (name, series) in enumerate(found.items())
        if series is not None
    ]
    return Chart("Temperature and experts", "curriculum", lines, from_zero=True) if lines else None


def scaled(run: RunHistory, stage: str, title: str) -> Chart | None:
    """Scaled components on top of each other, with the total that they must add up to."""
    parts, total = run.components(f"{stage}/{{}}_scaled"), run.series.get(f"{stage}/loss")
    if not parts or total is None:
        return None
    sums, lines = np.zeros(len(total.steps)), []
    for name, series in parts.items():
        heights = np.zeros(len(total.steps))
        here = np.isin(series.steps, total.steps)
        heights[np.searchsorted(total.steps, series.steps[here])] = series.values[here]
        sums += heights
        lines.append(Line(name, total.steps, heights, COLOUR[name]))
    apart = np.abs(sums - total.values)
    apart = apart[np.isfinite(apart)]
    lines.append(Line("total", total.steps, total.values, None, kind="reference"))
    note = f"The parts add up to the total within {apart.max():.0e}." if len(apart) else ""
    stacked: Literal["areas", "bars"] = "areas" if stage == "train" else "bars"
    return Chart(title, "raw x weight, stacked", lines, stacked=stacked, note=note)


def components(run: RunHistory, stage: str, title: str) -> Chart | None:
    """Raw values before the curriculum."""
    kind: Literal["marked", "line"] = "marked" if stage == "val" else "line"
    lines = [
        Line(name, series.steps, series.values, COLOUR[name], COLOUR[name] % 3, kind)
        for name, series in run.components(f"{stage}/{{}}").items()
    ]
    return Chart(title, "before weighting", lines, logarithmic=True) if lines else None


def optimisation(runs: list[RunHistory]) -> Section:
    """Learning rate, gradients, throughput and memory: what all runs share first, then each run's components."""
    section = Section("optimisation", "Optimisation, throughput and memory")
    rates = rate_chart(runs)
    norm = overlay(runs, "train/grad_norm", "Gradient norm", "before clipping", marked=False, logarithmic=True)
    pace = overlay(runs, "train/tokens_per_s", "Throughput", "tokens per second", marked=False, from_zero=True)
    names = sorted({metric for run in runs for metric in run.series if MEMORY.search(metric)})
    memory = [overlay(runs, metric, "Memory", metric, marked=False, from_zero=True) for metric in names]
    groups = [Group("", only([rates, norm, pace, *memory]))]
    for run in runs:
        layer = run.series.get("gradients/layer")
        unit = "weighted" if layer is None else f"weighted, of layer {layer.last:g}"
        pull = gradients(run, "norm", "Gradient norms of components", unit)
        against = gradients(run, "cosine", "Gradient cosines of components", "with that of KD")
        groups.append(Group(run.name, only([pull, against])))
    if len(runs) == 1:  # one grid
        groups = [Group("", [chart for group in groups for chart in group.charts])]
    section.groups = [group for group in groups if group.charts]
    for found, sentence in (
        (rates, "No learning rate was logged (train/lr, or lr-* of Lightning's LearningRateMonitor)."),
        (norm, "No gradient norm was logged (train/grad_norm)."),
        (pace, "No throughput was logged (train/tokens_per_s)."),
        (names, "No memory was logged (train/peak_memory_gib, or what DeviceStatsMonitor logs)."),
        (
            any(metric.startswith("gradients/") for run in runs for metric in run.series),
            "No gradients of single components were logged: --gradients.every_n_steps 100 does.",
        ),
    ):
        if not found:
            section.absent.append(sentence)
    return section


def rate_chart(runs: list[RunHistory]) -> Chart | None:
    """Learning rates; of parameter groups with the same rate only one."""
    lines: list[Line] = []
    for index, run in enumerate(runs):
        own: list[Line] = []
        for metric, series in run.series.items():
            if metric != "train/lr" and not metric.startswith(("train/lr/", "lr-")):
                continue
            if not any(np.array_equal(line.y, series.values) for line in own):
                label = f"{run.name} {metric}" if len(runs) > 1 else metric
                own.append(Line(label, series.steps, series.values, colour_of(index), len(own) % 3))
        lines += own
    return Chart("Learning rate", "per step", lines) if lines else None


def gradients(run: RunHistory, figure: str, title: str, unit: str) -> Chart | None:
    """`gradients/<name>_norm` or `_cosine` of one run."""
    lines = []
    for metric, series in run.series.items():
        found = re.fullmatch(rf"gradients/(.+)_{figure}", metric)
        if found:
            colour = COLOUR.get(found[1], COLOUR.get(f"{found[1]}_loss"))
            lines.append(Line(found[1], series.steps, series.values, colour, (colour or 0) % 3))
    lines.sort(key=lambda line: len(WEIGHT_KEY) if line.colour is None else line.colour)
    limits = (-1.05, 1.05) if figure == "cosine" else None
    return Chart(title, unit, lines, limits=limits, logarithmic=figure == "norm") if lines else None


def routing(runs: list[RunHistory]) -> Section:
    """What the routing losses saw of the experts: a row of charts for each run."""
    section = Section("routing", "Expert usage")
    for run in runs:
        metrics = {metric: series for metric, series in run.series.items() if metric.startswith("routing/")}
        charts = []
        usage = {metric: metrics.pop(metric) for metric in list(metrics) if "usage" in metric}
        if usage:
            lines = [
                Line(metric.removeprefix("routing/"), series.steps, series.values, index % COLOURS)
                for index, (metric, series) in enumerate(usage.items())
            ]
            experts = run.setting("model.routing.num_experts")
            if isinstance(experts, int):
                even = np.full(len(lines[0].x), 1 / experts)
                lines.append(Line("even", lines[0].x, even, None, kind="reference"))
            charts.append(Chart("Share of the most used expert", "of all choices", lines))
        constant, probe = (
            metrics.pop("routing/constant_gate_kl", None),
            run.series.get("train/routing_expert_importance_loss"),
        )
        if constant is not None and probe is not None:
            metrics.pop("routing/probe_gain", None)  # the distance of the two lines
            lines = [
                Line("expert_importance_loss", probe.steps, probe.values, COLOUR["routing_expert_importance_loss"]),
                Line("best constant gate", constant.steps, constant.values, None, kind="reference"),
            ]
            note = "The probe has learned to tell tokens apart only where it lies below the constant gate."
            charts.append(Chart("Gate probe", "nats per token", lines, note=note))
        for metric, series in metrics.items():
            title, unit = ROUTING.get(metric.removeprefix("routing/"), (metric, "mean over layers"))
            charts.append(Chart(title, unit, [Line(metric, series.steps, series.values, 6)]))
        if charts:
            section.groups.append(Group(run.name if len(runs) > 1 else "", charts))
        else:
            section.absent.append(f"{run.name}: no routing was logged (routing/*).")
    return section

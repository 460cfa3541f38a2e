"""Which charts a report has, from the metrics' names alone; what was not logged becomes a sentence that says so."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from distill.analysis.report.drawing import COLOURS, Chart, Line
from distill.analysis.report.runs import RunHistory
from distill.curriculum import WEIGHT_KEY, WEIGHT_KEYS, value_at

COLOUR = {name: index for index, name in enumerate(WEIGHT_KEY)}
KEY_COLOUR = {key: list(WEIGHT_KEY.values()).index(key) for key in WEIGHT_KEYS}
ROUTING = {"gate_entropy": ("Entropy of the gates", "nats"), "mean_gap": ("Gap to the experts", "mean squared error")}
MEMORY = re.compile(r"memory|allocated_bytes\.all\.peak|/rss", re.IGNORECASE)


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
    runs: list[RunHistory], metric: str, title: str, unit: str, marked: bool = True, **options: object
) -> Chart | None:
    """One chart with a line for each run that logged the metric; None where none did."""
    lines = []
    for index, run in enumerate(runs):
        series = run.series.get(metric)
        if series is not None:
            label = run.name if len(runs) > 1 else metric
            kind = "marked" if marked else "line"
            lines.append(
                Line(label, series.steps, series.values, colour_of(index), index // COLOURS % 3, kind)  # type: ignore[arg-type]
            )
    return Chart(title, unit, lines, **options) if lines else None  # type: ignore[arg-type]


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


def outcome(runs: list[RunHistory]) -> list[Chart]:
    """The charts beside the table: KL, agreement and perplexity, and training against validation."""
    perplexity = overlay(runs, "val/student_perplexity", "Perplexity", "on the validation set", logarithmic=True)
    return only(
        [
            overlay(runs, "val/kl_div_T1", "KL to the teacher", "nats per token, T = 1", from_zero=True)
            or overlay(runs, "val/bits_per_byte", "Bits per byte", "across tokenizers"),
            with_teacher(runs, perplexity, "val/teacher_perplexity"),
            agreement(runs),
            train_and_validation(runs),
        ]
    )


def agreement(runs: list[RunHistory]) -> Chart | None:
    """Agreement of the likeliest token, and of the teacher's five likeliest where that was logged."""
    chart = overlay(runs, "val/top1_agreement", "Agreement", "share of tokens", from_zero=True)
    five = overlay(runs, "val/top5_agreement", "", "")
    if chart is not None and five is not None:
        for line in five.lines:
            label = f"{line.label}, top 5" if len(runs) > 1 else line.label
            chart.lines.append(replace(line, label=label, dash=1))
    return chart


def train_and_validation(runs: list[RunHistory]) -> Chart | None:
    """Both totals on the same weighting."""
    lines = []
    for index, run in enumerate(runs):
        prefix = f"{run.name} " if len(runs) > 1 else ""
        train, validation = run.series.get("train/loss"), run.series.get("val/loss")
        if train is not None:
            lines.append(Line(f"{prefix}training", train.steps, train.values, colour_of(index), 2 if prefix else 0))
        if validation is not None:
            colour = colour_of(index) if prefix else 1
            lines.append(Line(f"{prefix}validation", validation.steps, validation.values, colour, kind="marked"))
    note = "Both totals carry the curriculum's weights of their step."
    return Chart("Training and validation loss", "weighted total", lines, note=note) if lines else None


def weight_free(runs: list[RunHistory]) -> Section:
    """The other metrics that no weight enters."""
    nll = overlay(runs, "val/student_nll", "Negative log-likelihood", "nats per token")
    entropy = overlay(runs, "val/student_entropy", "Entropy of the prediction", "nats per token")
    charts = only(
        [
            with_teacher(runs, nll, "val/teacher_nll"),
            with_teacher(runs, entropy, "val/teacher_entropy"),
            overlay(runs, "val/ece", "Calibration error", "15 equal bins", from_zero=True),
        ]
    )
    section = Section("metrics", "Other weight-free metrics", [Group("", charts)] if charts else [])
    if not charts:
        section.absent.append("No validation was logged.")
    return section


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
    kind = "marked" if stage == "val" else "line"
    lines = [
        Line(name, series.steps, series.values, COLOUR[name], COLOUR[name] % 3, kind)  # type: ignore[arg-type]
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
        pull = gradients(run, "norm", "Gradient norms of components", unit, logarithmic=True)
        against = gradients(run, "cosine", "Gradient cosines of components", "with that of KD", limits=(-1.05, 1.05))
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


def gradients(run: RunHistory, figure: str, title: str, unit: str, **options: object) -> Chart | None:
    """`gradients/<name>_norm` or `_cosine` of one run."""
    lines = []
    for metric, series in run.series.items():
        found = re.fullmatch(rf"gradients/(.+)_{figure}", metric)
        if found:
            colour = COLOUR.get(found[1], COLOUR.get(f"{found[1]}_loss"))
            lines.append(Line(found[1], series.steps, series.values, colour, (colour or 0) % 3))
    lines.sort(key=lambda line: len(WEIGHT_KEY) if line.colour is None else line.colour)
    return Chart(title, unit, lines, **options) if lines else None  # type: ignore[arg-type]


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

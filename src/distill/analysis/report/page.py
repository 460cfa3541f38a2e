"""Lays the report out: one HTML file with its style, script and drawings inside, and a policy that forbids the network.

Every chart is a figure that Tab reaches: arrow keys move a cursor whose values stand in the legend, and its data are a
table below it. A chart takes some 20 kB of the file.
"""

from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from itertools import count
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from matplotlib.axes import Axes

from distill.analysis.report import quality, sections, tables
from distill.analysis.report.drawing import Chart, Drawing, draw, surface
from distill.analysis.report.ranking import Ranking
from distill.analysis.report.runs import RunHistory
from distill.version import __version__


@dataclass
class Key:
    """An entry of a legend."""

    label: str
    colour: str
    kind: str
    value: str


@dataclass
class Figure:
    """A chart as the template wants it."""

    identity: str
    chart: Chart
    drawing: Drawing
    legend: list[Key]
    headings: list[str]
    rows: list[tuple[float, list[str]]]
    summary: str


def render(runs: list[RunHistory], ranking: Ranking | None = None) -> str:
    """The page of these runs, the first one first, and of their order by a metric."""
    template = environment().from_string(asset("page.html"))
    numbers, axes = count(), surface()
    last_step = max((float(series.steps[-1]) for run in runs for series in run.series.values()), default=1.0) or 1.0

    def figure(chart: Chart) -> Figure:
        return make_figure(chart, f"c{next(numbers)}", last_step, axes)

    parts = [
        quality.weight_free(runs),
        quality.validation_sets(runs),
        quality.tasks(runs),
        sections.losses(runs),
        sections.optimisation(runs),
        sections.routing(runs),
    ]
    differences = tables.differences(runs)
    caution = tables.caution(differences)
    return template.render(
        title=f"distill report: {', '.join(run.name for run in runs)}",
        runs=runs,
        facts=facts_of(runs),
        summary=tables.summary(runs, comparable=not caution),
        caution=caution,
        differences=differences,
        ranking=ranking,
        outcome=quality.outcome(runs),
        sections=[part for part in parts if part is not None],
        figure=figure,
        version=__version__,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        style=Markup(asset("page.css")),
        script=Markup(asset("page.js")),
    )


def environment() -> Environment:
    """Jinja with everything escaped that is not our own markup."""
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)


def asset(name: str) -> str:
    """Text of a file that lies beside this one."""
    return files("distill.analysis.report").joinpath(name).read_text(encoding="utf-8")


def facts_of(runs: list[RunHistory]) -> list[tuple[str, list[tuple[str, str]]]]:
    """`(run's name, its facts)`: first without a name those that all share, then what sets each run apart."""
    told = [facts(run) for run in runs]
    shared = [fact for fact in told[0] if all(fact in own for own in told)]
    rows = [(run.name, [fact for fact in own if fact not in shared]) for run, own in zip(runs, told, strict=True)]
    return [row for row in [("", shared), *rows] if row[1]]


def facts(run: RunHistory) -> list[tuple[str, str]]:
    """What one wants to know of a run before its figures."""
    known = {
        "teacher": run.setting("model.teacher"),
        "student": student_of(run),
        "fit before the run": fit_of(run),
        "data": run.setting("data.dataset"),
        "precision": run.setting("trainer.precision"),
        "devices": run.setting("trainer.devices"),
        "seed": run.setting("seed_everything"),
    }
    return [(name, str(value)) for name, value in known.items() if value is not None]


def student_of(run: RunHistory) -> Any:
    """What the student was at first."""
    layers, width, stream = (
        run.setting(f"model.student_{key}") for key in ("layers", "intermediate_size", "hidden_size")
    )
    if layers is None and width is None and stream is None:
        return run.setting("model.student") or run.setting("model.student_config")
    size = len(layers) if isinstance(layers, list) else layers
    parts = ["all of the teacher's layers" if size is None else f"{size} of the teacher's layers"]
    parts += [] if width is None else [f"FFNs of {width} of its neurons"]
    parts += [] if stream is None else [f"a stream of {stream} principal axes"]
    return ", ".join(parts)


def fit_of(run: RunHistory) -> str | None:
    """How near each layer of the student came to the teacher before the run, None where it was not fitted."""
    record = run.files.student_fit.values
    layers = record.get("layers")
    if not isinstance(layers, list):
        return None
    errors = ", ".join(f"{layer['after']:.3f}" for layer in layers)
    return f"{record['seconds']:,.0f} s on {record['tokens']:,} tokens; unexplained, layer by layer: {errors}"


def make_figure(chart: Chart, identity: str, last_step: float, axes: Axes) -> Figure:
    """Draws a chart and writes down what its legend, table and label say."""
    headings, rows = tables.chart_table(chart)
    shown = [line for line in chart.lines if not line.silent]
    legend = []
    for line in shown:
        colour = "var(--soft)" if line.colour is None else f"var(--s{line.colour})"
        kind: str = "area" if chart.stacked and line.kind != "reference" else line.kind
        kind = f"{kind} dash{line.dash}" if line.dash else kind
        legend.append(Key(line.label, colour, kind, tables.number(float(line.y[-1]))))
    spans = [
        f"{line.label} from {tables.number(float(line.y[0]))} to {tables.number(float(line.y[-1]))}" for line in shown
    ]
    return Figure(identity, chart, draw(chart, identity, last_step, axes), legend, headings, rows, "; ".join(spans))

"""Charts as static SVG by matplotlib: they open anywhere, print, and need no script to be seen.

Colours are written as placeholders and become CSS variables, so that one drawing serves light and dark; sizes are CSS
pixels, so that text stays legible in a column of 370 to 400 pixels. They cannot be zoomed: values are read off with the
page's cursor, or in the table under each chart.
"""

import io
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

WIDTH, HEIGHT = 400, 222  # CSS pixels
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 8, 36
COLOURS = 9
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5))
STEPS = [1, 2, 2.5, 5, 10]  # between ticks
INK, GRID, PAPER = "#fd0001", "#fd0002", "#fd0003"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "distill",
    "font.size": 11,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "path.simplify": True,
    "path.simplify_threshold": 0.5,
}


@dataclass(frozen=True, eq=False)
class Line:
    """One series of a chart.

    Args:
        label: in the legend and as the table's heading.
        x: `[N]`.
        y: `[N]`; what is not finite is a gap.
        colour: 0 to 8, None = the ink of a reference.
        dash: 0 to 2.
        kind: `reference` is thin and dashed, and across the whole chart where it is constant; `points` has no line.
        silent: neither in the legend nor in the table.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: int | None = 0
    dash: int = 0
    kind: Literal["line", "marked", "points", "reference"] = "line"
    silent: bool = False


@dataclass(frozen=True)
class Chart:
    """What is to be drawn, before it is.

    Args:
        title: of the figure.
        unit: of the vertical axis.
        lines: the series, in the order of the legend.
        x_label: of the horizontal axis.
        stacked: `areas` or `bars` on top of each other instead of lines; all lines have the same x. References stay
            lines.
        logarithmic: a logarithmic vertical axis where the values span more than a factor of 30.
        from_zero: the vertical axis starts at 0.
        limits: of the vertical axis, where they are fixed.
        note: a sentence under the chart.
    """

    title: str
    unit: str
    lines: list[Line]
    x_label: str = "step"
    stacked: Literal["areas", "bars"] | None = None
    from_zero: bool = False
    logarithmic: bool = False
    limits: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class Drawing:
    """An SVG and where its plot area lies, as shares of its width, for the cursor."""

    svg: str
    left: float = LEFT / WIDTH
    right: float = 1 - RIGHT / WIDTH
    x_limits: tuple[float, float] = (0.0, 1.0)
    notes: list[str] = field(default_factory=list)


def placeholder(colour: int | None) -> str:
    """The colour that stands for a CSS variable in matplotlib's output."""
    return INK if colour is None else f"#fe00{colour:02x}"


def surface() -> Axes:
    """Empty axes to draw on, one chart after the other: making them and their ticks costs more than a drawing."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))  # an SVG unit is 1/72 inch: here it is a CSS pixel
        axes = figure.add_axes((LEFT / WIDTH, BOTTOM / HEIGHT, 1 - (LEFT + RIGHT) / WIDTH, 1 - (TOP + BOTTOM) / HEIGHT))
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_linewidth(1)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=5)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
    return axes


def draw(chart: Chart, identity: str, last_step: float, axes: Axes) -> Drawing:
    """The chart as an SVG element.

    Args:
        chart: what is drawn.
        identity: what the ids in it start with.
        last_step: steps go from 0 to this one, on all charts of a page.
        axes: a `surface`; what was on it is removed.
    """
    with matplotlib.rc_context(STYLE):
        for artist in [*axes.lines, *axes.collections, *axes.patches]:
            artist.remove()
        axes.relim()
        axes.set_yscale("linear")
        axes.set_ylim(0, 1)
        axes.set_autoscaley_on(True)
        finite = [line.y[np.isfinite(line.y)] for line in chart.lines]
        notes = [chart.note] if chart.note else []
        lost = sum(len(line.y) for line in chart.lines) - sum(map(len, finite))
        if lost:
            notes.append(f"{lost} value{'s' * (lost > 1)} not finite.")
        values = np.concatenate(finite)
        positive = values[values > 0]
        logarithmic = chart.logarithmic and len(positive) > 0 and positive.max() > 30 * positive.min()
        if logarithmic:
            axes.set_yscale("log")
            hidden = len(values) - len(positive)
            if hidden:
                notes.append(f"{hidden} value{'s' * (hidden > 1)} at or below 0 have no place on this axis.")
        areas = [line for line in chart.lines if line.kind != "reference"] if chart.stacked else []
        if areas:
            stack(axes, areas, bar=0.02 * last_step if chart.stacked == "bars" else 0.0)
        few = max(len(line.x) for line in chart.lines) <= 15
        for index, line in enumerate(line for line in chart.lines if line not in areas):
            trace(axes, line, few, marker=max(3.0, 6.5 - index) if line.kind == "points" else 5.0)
        dress(axes, chart, logarithmic, 100.0 if chart.x_label == "progress" else last_step)
        buffer = io.StringIO()
        assert isinstance(axes.figure, Figure)
        axes.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    low, high = axes.get_xlim()
    return Drawing(clean(buffer.getvalue(), identity), x_limits=(float(low), float(high)), notes=notes)


def trace(axes: Axes, line: Line, few: bool, marker: float) -> None:
    """Draws one line; where a chart has few points it shows them, as dots `marker` pixels wide."""
    colour = placeholder(line.colour)
    x, y = envelope(line.x, np.where(np.isfinite(line.y), line.y, np.nan))
    if line.kind == "reference" and np.ptp(y) == 0:
        axes.axhline(y[0], color=colour, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
        return
    if line.kind == "reference":
        axes.plot(x, y, color=colour, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
        return
    marked = len(x) <= 60 and (line.kind != "line" or (few and not line.silent))
    dashes = DASHES[line.dash]
    axes.plot(
        x,
        y,
        color=colour,
        linewidth=0 if line.kind == "points" else 1.6,
        linestyle=(0, dashes) if dashes else "-",
        marker="o" if marked else None,
        markersize=marker,
        markeredgewidth=0,
        zorder=4 if line.kind == "marked" else 3,
    )


def envelope(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A long series as the lowest and highest value of each stretch, two points a pixel: it looks the same."""
    if len(x) <= 4 * WIDTH:
        return x, y
    chosen = []
    for stretch in np.array_split(np.arange(len(x)), WIDTH):
        known = stretch[np.isfinite(y[stretch])]
        chosen += sorted({known[y[known].argmin()], known[y[known].argmax()]}) if len(known) else [stretch[0]]
    return x[chosen], y[chosen]


def stack(axes: Axes, areas: list[Line], bar: float) -> None:
    """Draws the lines on top of each other, the first one at the bottom, as areas or as bars `bar` steps wide."""
    some = np.unique(np.linspace(0, len(areas[0].x) - 1, WIDTH).round().astype(int))
    heights = np.nan_to_num(np.stack([area.y[some] for area in areas]), nan=0.0, posinf=0.0, neginf=0.0)
    tops = heights.cumsum(0)
    x = areas[0].x[some]
    for area, top, height in zip(areas, tops, heights, strict=True):
        colour = placeholder(area.colour)
        if bar:
            axes.bar(x, height, bar, top - height, color=colour, edgecolor=PAPER, linewidth=0.5, alpha=0.8, zorder=2)
        else:
            axes.fill_between(x, top - height, top, facecolor=colour, linewidth=0, alpha=0.8, zorder=2)
            axes.plot(x, top, color=PAPER, linewidth=0.8, zorder=3)


def dress(axes: Axes, chart: Chart, logarithmic: bool, end: float) -> None:
    """Few ticks, and 0 to `end` along the horizontal axis."""
    axes.set_xlabel(chart.x_label, loc="right", labelpad=1)
    axes.set_xlim(-0.03 * end, 1.03 * end)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS, integer=True))
    percent = chart.x_label == "progress"
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}%" if percent else compact(x)))
    if chart.limits is not None:
        axes.set_ylim(*chart.limits)
    elif (chart.stacked or chart.from_zero) and not logarithmic:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if logarithmic:
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
        if len([tick for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]) < 2:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: compact(y)))


def clean(svg: str, identity: str) -> str:
    """matplotlib's SVG without its prologue and sizes, with ids of its own and colours of the page."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r"\b(id=\"|href=\"#|url\(#)", rf"\g<1>{identity}-", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"#fe00(\d\d)", lambda match: f"var(--s{int(match[1], 16)})", svg)
    svg = re.sub(r"font: [^;\"]*", "font-size: 11px", svg)
    for colour, name in ((INK, "soft"), (GRID, "grid"), (PAPER, "paper")):
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"\s*\n\s*", " ", svg).strip()


def compact(value: float) -> str:
    """A tick label of at most six characters: 0.05, 64, 12k, 1.9M, 3e-5."""
    if value != 0 and abs(value) < 1e-3:
        text = f"{value:.0e}" if math.isclose(value, float(f"{value:.0e}"), rel_tol=1e-6) else f"{value:.1e}"
        return text.replace("e-0", "e-")
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):g}{letter}"
    return f"{value:g}"

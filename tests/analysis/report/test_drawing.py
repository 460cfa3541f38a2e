"""Charts as SVG."""

import numpy as np

from distill.analysis.report import drawing
from distill.analysis.report.drawing import WIDTH, Chart, Line


def test_a_long_series_keeps_its_extremes():
    y = np.random.default_rng(0).normal(size=100_000)
    y[12_345], y[77_777] = 50.0, -50.0
    x, short = drawing.envelope(np.arange(100_000.0), y)
    assert len(short) <= 2 * WIDTH
    assert (short.max(), short.min()) == (50.0, -50.0)
    assert (np.diff(x) > 0).all()
    assert all(y[int(place)] == value for place, value in zip(x, short, strict=True))


def test_what_was_drawn_before_leaves_no_trace():
    x = np.arange(5.0)
    plain = Chart("a", "b", [Line("one", x, x)])
    others = [
        Chart("c", "", [Line("one", x, 10.0**x)], logarithmic=True),
        Chart("d", "", [Line("one", x, x + 1), Line("two", x, x)], stacked="bars", limits=(-1, 20)),
        Chart("e", "", [Line("one", x, x), Line("t", x, x, None, kind="reference")], stacked="areas"),
        Chart("f", "", [Line("t", x, np.full(5, 3.0), None, kind="reference")], from_zero=True),
    ]
    used = drawing.surface()
    for chart in [*others, plain, *others]:
        fresh = drawing.draw(chart, "c", 4.0, drawing.surface())
        assert drawing.draw(chart, "c", 4.0, used) == fresh


def test_values_that_cannot_be_drawn_are_counted():
    x = np.arange(4.0)
    drawn = drawing.draw(Chart("", "", [Line("a", x, np.array([1, np.nan, np.inf, 2]))]), "c", 3.0, drawing.surface())
    assert drawn.notes == ["2 values not finite."]
    values = np.array([1e-3, 1.0, 0.0, 2])
    drawn = drawing.draw(Chart("", "", [Line("a", x, values)], logarithmic=True), "c", 3.0, drawing.surface())
    assert drawn.notes == ["1 value at or below 0 have no place on this axis."]
    nothing = drawing.draw(Chart("", "", [Line("a", x, np.full(4, np.nan))]), "c", 3.0, drawing.surface())
    assert nothing.notes == ["4 values not finite."]

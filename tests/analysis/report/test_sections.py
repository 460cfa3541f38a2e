"""Which charts there are, and what they hold."""

import numpy as np
import pytest

from distill.analysis.report import sections, tables
from helpers.written_run import METRICS, read, write


def test_scaled_parts_are_held_against_the_total(folder):
    chart = sections.scaled(read(folder), "train", "")
    assert chart.note == "The parts add up to the total within 0e+00."
    assert [line.label for line in chart.lines] == ["kd_loss", "lm_loss", "total"]
    assert (chart.lines[0].y + chart.lines[1].y).tolist() == chart.lines[2].y.tolist() == [4.0, 2.5, 1.5]


def test_a_broken_sum_is_told(tmp_path):
    run = read(write(tmp_path / "run", METRICS.replace("2.0,1.0,6.0", "2.0,1.25,6.0")))
    assert sections.scaled(run, "train", "").note == "The parts add up to the total within 2e-01."


def test_curriculum_is_drawn_over_progress_with_its_plan(folder):
    chart = sections.curriculum(read(folder))
    shown = {line.label: line for line in chart.lines}
    assert shown["kd"].x == pytest.approx(100 * np.array([1, 3, 5]) / 6)
    assert shown["kd, planned"].silent
    assert shown["kd, planned"].x.tolist() == [0.0, 100.0]
    assert tables.chart_table(chart)[0] == ["kd", "lm"]

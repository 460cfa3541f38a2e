"""What validation and tasks measured, on each validation set."""

import pytest

from distill.analysis.report import quality, runs, tables
from helpers.written_run import METRICS, Reader, page, read, write


def test_teachers_that_differ_have_lines_of_their_own(tmp_path, folder):
    other = write(tmp_path / "other", METRICS.replace(",16.0,", ",20.0,"))
    labels = [line.label for line in quality.outcome(runs.read_runs([folder, other]))[1].lines]
    assert labels == ["version_0", "other", "teacher of version_0", "teacher of other"]
    same = write(tmp_path / "same")
    assert [line.label for line in quality.outcome(runs.read_runs([folder, same]))[1].lines][2:] == ["teacher"]


SETS = """step,train/loss,val/kl_div_T1,val/acceptance,val/first/kl_div_T1,val/first/acceptance,val/wiki/kl_div_T1,\
val/wiki/acceptance,val/wiki/student_perplexity,val/wiki/teacher_perplexity,tasks/arc_easy/acc,tasks/arc_easy/acc_stderr
0,4.0,0.5,0.25,0.5,0.25,0.75,0.125,9.0,4.0,0.25,0.01
3,2.0,0.25,0.5,0.25,0.5,0.5,0.375,7.0,4.0,,
5,1.0,0.125,0.75,0.125,0.75,0.625,0.25,8.0,4.0,0.375,0.01
"""


@pytest.fixture
def sets(tmp_path):
    """A run with a first validation set, logged under its own name too, and a second one, and a task."""
    return write(tmp_path / "run", SETS, log="")


def test_sets_are_those_beside_the_first_one(sets, folder, tmp_path):
    assert runs.sets_of([read(sets)]) == ["wiki"]
    assert runs.sets_of([read(folder)]) == []
    other = write(
        tmp_path / "other", SETS.replace("first", "chat").replace("0.125,0.75,0.125", "0.125,0.75,0.25"), log=""
    )
    assert runs.sets_of(runs.read_runs([sets, other])) == ["wiki", "chat"]


def test_a_single_runs_kl_is_drawn_for_every_set(sets):
    chart = quality.outcome([read(sets)])[0]
    assert [line.label for line in chart.lines] == ["val/kl_div_T1", "val/wiki/kl_div_T1"]
    assert chart.lines[1].y.tolist() == [0.75, 0.5, 0.625]
    assert len({line.colour for line in chart.lines}) == 2


def test_each_set_has_its_charts_and_rows(sets, tmp_path):
    two = [sets, write(tmp_path / "two", SETS.replace("0.625,0.25,8.0", "0.375,0.5,6.0"), log="")]
    found = runs.read_runs(two)
    (group,) = quality.validation_sets(found).groups
    assert group.heading == "wiki"
    assert [(chart.title, chart.unit) for chart in group.charts] == [
        ("KL to the teacher", "nats per token, T = 1"),
        ("Perplexity", "on wiki"),
        ("Acceptance", "share of drafts"),
    ]
    assert [line.label for line in group.charts[1].lines] == ["run", "two", "teacher"]
    assert group.charts[1].lines[2].y.tolist() == [4.0, 4.0, 4.0]
    rows = {row.metric: row for row in tables.summary(found, comparable=True)}
    assert [cell.text for cell in rows["val/wiki/kl_div_T1"].cells] == ["0.6250", "0.3750"]
    assert [cell.best for cell in rows["val/wiki/kl_div_T1"].cells] == [False, True]
    assert [cell.best for cell in rows["val/wiki/acceptance"].cells] == [False, True]
    assert "val/first/kl_div_T1" not in rows
    assert rows["tasks/arc_easy/acc"].label == "arc_easy/acc"
    assert "tasks/arc_easy/acc_stderr" not in rows


def test_the_page_has_sections_of_sets_and_tasks_only_where_there_are_some(sets, folder):
    assert {"sets", "tasks"} <= set(Reader(page(sets)).ids)
    assert not {"sets", "tasks", "ranking"} & set(Reader(page(folder)).ids)


def test_tasks_are_drawn_without_their_errors(sets):
    (group,) = quality.tasks([read(sets)]).groups
    assert [(chart.title, chart.unit) for chart in group.charts] == [("arc_easy", "acc")]
    assert group.charts[0].lines[0].x.tolist() == [0, 5]

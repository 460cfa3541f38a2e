"""Runs in the order of a metric."""

import pytest

from distill.analysis.report import runs
from distill.analysis.report.ranking import ranking, told
from distill.commands.report import main, report
from distill.errors import UserError
from helpers.written_run import CONFIG, Reader, write

HEADER = "step,train/loss,val/kl_div_T1,val/wiki/kl_div_T1,tasks/t/acc\n"
FIGURES = {
    "a": ["0,9.0,0.1,0.9,0.9", "5,1.0,0.5,0.75,0.25", "9,2.0,0.25,0.875,0.5"],
    "b": ["5,3.0,0.125,0.8,0.375", "9,0.5,0.375,0.9,nan"],
    "c": ["5,4.0,0.25,0.7,"],
}


@pytest.fixture
def three(tmp_path):
    """Three runs whose order differs with the metric; the first one was measured before training, too."""
    texts = {name: HEADER + "\n".join(rows) + "\n" for name, rows in FIGURES.items()}
    return [write(tmp_path / name, text, log="") for name, text in texts.items()]


def order(ranked):
    return [(place.place, place.name, place.value, place.step, place.last) for place in ranked.places]


def test_the_usual_metric_is_the_kl_and_its_best_value_after_the_start_counts(three):
    ranked = ranking(runs.read_runs(three))
    assert (ranked.metric, ranked.counts) == ("val/kl_div_T1", "best of all measurements, less is better")
    assert order(ranked) == [
        ("1", "b", "0.1250", "5", "0.3750"),
        ("2", "a", "0.2500", "9", "0.2500"),
        ("2", "c", "0.2500", "5", "0.2500"),
    ]


@pytest.mark.parametrize(
    ("metric", "names", "counts"),
    [
        ("val/wiki/kl_div_T1", "cab", "best of all measurements, less is better"),
        ("tasks/t/acc", "abc", "best of all measurements, more is better"),
        ("train/loss", "bac", "last value, less is better"),
    ],
)
def test_any_metric_ranks(three, metric, names, counts):
    ranked = ranking(runs.read_runs(three), metric)
    assert "".join(place.name for place in ranked.places) == names
    assert ranked.counts == counts


def test_a_run_without_the_metric_comes_last_without_a_place(three):
    ranked = ranking(runs.read_runs(three), "tasks/t/acc")
    assert order(ranked)[2] == ("\N{EN DASH}", "c", *["\N{EN DASH}"] * 3)
    assert told(ranked) == [
        "Ranked by tasks/t/acc (best of all measurements, more is better):",
        "   1  a  0.5000 at step 9",
        "   2  b  0.3750 at step 5",
        "   \N{EN DASH}  c  not logged",
    ]


def test_what_all_runs_choose_their_checkpoint_by_is_the_default(tmp_path):
    text = HEADER + "\n".join(FIGURES["a"]) + "\n"
    checkpoint = {"checkpoint": {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/wiki/kl_div_T1"}}}
    folders = [write(tmp_path / name, text, log="", config=CONFIG | checkpoint) for name in "ab"]
    assert ranking(runs.read_runs(folders)).metric == "val/wiki/kl_div_T1"
    folders.append(write(tmp_path / "c", text, log=""))
    assert ranking(runs.read_runs(folders)).metric == "val/kl_div_T1"


def test_one_run_and_runs_that_do_not_compare_are_not_ranked_unasked(three):
    found = runs.read_runs(three)
    assert ranking(found[:1]) is None
    assert ranking(found, comparable=False) is None
    assert ranking(found, "val/kl_div_T1", comparable=False) is not None


def test_the_command_prints_the_order_and_the_page_shows_it(three, tmp_path, capsys):
    out = tmp_path / "out.html"
    assert main([*map(str, three), "--out", str(out), "--rank_by", "val/wiki/kl_div_T1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Ranked by val/wiki/kl_div_T1 (best of all measurements, less is better):",
        "   1  c  0.7000 at step 5",
        "   2  a  0.7500 at step 5",
        "   3  b  0.8000 at step 5",
        f"Report: {out}",
    ]
    rows = Reader(out.read_text()).rows
    assert rows[rows.index(["place", "run", "value", "at step", "last value"]) + 1] == [
        "1",
        "c",
        "0.7000",
        "5",
        "0.7000",
    ]


def test_a_ranking_that_was_asked_for_says_what_does_not_compare(three, tmp_path, capsys):
    other = write(tmp_path / "d", HEADER + "5,1.0,1.0,,\n", log="", config=CONFIG | {"data": {"dataset": "b.txt"}})
    assert main([str(three[0]), str(other), "--rank_by", "val/kl_div_T1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[3] == "These runs differ in data.dataset: their figures do not compare."
    assert main([str(three[0]), str(other)]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["Report"]


@pytest.mark.parametrize(
    ("metric", "remedy"),
    [("val/wki/kl_div_T1", "did you mean 'val/wiki/kl_div_T1'"), ("none", "choose from val/kl_div_T1, ")],
)
def test_a_metric_that_no_run_has_logged_is_refused_before_anything_is_written(three, metric, remedy):
    with pytest.raises(UserError, match=f"--rank_by: no run has logged {metric}; {remedy}"):
        report(three, rank_by=metric)
    assert not (three[0] / "report.html").exists()

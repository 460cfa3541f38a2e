"""The report: what it reads, what it draws, and what a browser makes of it."""

import asyncio
import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from distill.analysis import run_files
from distill.analysis.report import drawing, runs, sections, tables
from distill.analysis.report.drawing import WIDTH, Chart, Line
from distill.commands.report import main, report
from distill.errors import UserError
from helpers.browser import CHROMIUM, Page, browse

ROOT = Path(__file__).parents[2]
METRICS = """curriculum/kd,curriculum/lm,epoch,step,train/kd_loss,train/kd_loss_scaled,train/lm_loss,\
train/lm_loss_scaled,train/loss,train/tokens_per_s,val/kl_div_T1,val/loss,val/student_perplexity,val/teacher_perplexity,val/top1_agreement
0.5,0.25,0,1,4.0,2.0,8.0,2.0,4.0,100.0,,,,,
0.5,0.25,0,3,2.0,1.0,6.0,1.5,2.5,300.0,,,,,
,,0,3,,,,,,,1.25,2.0,64.0,16.0,0.5
0.5,0.25,0,5,1.0,0.5,4.0,1.0,1.5,200.0,,,,,
,,0,5,,,,,,,1.5,1.75,48.0,16.0,0.625
"""
LOG = """
============================================================
[CURRICULUM] Step 1, Progress 16.7%
============================================================
  Curriculum weights:
    kd: 0.5000
    feature: 0.0000
    attention: 0.0000
    layerwise: 0.0000
    contrastive: 0.0000
    lm: 0.2500
============================================================


============================================================
[KD LOSS] Step 0
============================================================
  Raw KD loss: 9.0000
  Curriculum weight: 0.5000
  Weighted KD loss: 4.5000
============================================================


============================================================
[ROUTING LOSSES] Step 0
============================================================
  feature_matching_loss:
    Raw: 1.2500
    Weight: 0.0000
    Scaled: 0.0000
============================================================


[Eval] Step 0, loss: 9.5000
    kd_loss: raw 15.0000, weight 0.5000, scaled 7.5000
    lm_loss: raw 8.0000, weight 0.2500, scaled 2.0000
    routing_feature_matching_loss: raw nan, weight 0.0000, scaled 0.0000

"""
CONFIG = {
    "seed_everything": 1,
    "trainer": {"max_steps": 6},
    "model": {"teacher": "big", "student_layers": 2, "learning_rate": 0.001},
    "curriculum": {"kd": 0.5, "lm": [[0.0, 0.25], [1.0, 0.25]]},
    "data": {"dataset": "text.txt", "per_device_batch_size": 1},
}


class Reader(HTMLParser):
    """Ids, links, text of table rows, and elements with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.cell = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = False

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data


def write(folder: Path, metrics: str | None = METRICS, log: str | None = LOG, config: dict | None = CONFIG) -> Path:
    folder.mkdir(parents=True)
    texts = {"metrics.csv": metrics, "training.log": log, "config.yaml": None if config is None else yaml.dump(config)}
    for name, text in texts.items():
        if text is not None:
            (folder / name).write_text(text)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "lightning_logs" / "version_0")


def read(folder: Path) -> runs.RunHistory:
    return runs.read_runs([folder])[0]


def page(*folders: Path) -> str:
    return report(folders).read_text()


def test_log_fills_what_the_metrics_lack(folder):
    run = read(folder)
    assert run.series["train/kd_loss"].steps.tolist() == [0, 1, 3, 5]
    assert run.series["train/kd_loss"].values.tolist() == [9.0, 4.0, 2.0, 1.0]
    assert run.series["train/routing_feature_matching_loss"].values.tolist() == [1.25]
    assert run.series["val/loss"].values.tolist() == [9.5, 2.0, 1.75]
    assert run.series["val/kd_loss_scaled"].values.tolist() == [7.5]
    assert "val/routing_feature_matching_loss" not in run.series  # nan: not measured
    assert "curriculum/layerwise" not in run.series  # printed, but not configured
    assert run.horizon == 6
    assert run.name == "version_0"


def test_exact_value_beats_the_rounded_one(tmp_path):
    exact = METRICS.replace("0.5,0.25,0,1,4.0,", "0.5,0.25,0,0,9.00004,")
    assert read(write(tmp_path / "run", exact)).series["train/kd_loss"].values.tolist() == [9.00004, 2.0, 1.0]


def test_a_killed_run_is_read_up_to_its_last_whole_line(tmp_path):
    run = read(write(tmp_path / "run", METRICS + ",,0,7,0.2"))
    assert run.series["train/kd_loss"].steps[-1] == 5
    assert read(write(tmp_path / "empty", "")).absent[0] == "metrics.csv holds no values yet."


def test_a_resumed_run_is_read_behind_the_one_it_went_on_from(tmp_path):
    header = "step,train/loss,val/loss\n"
    first = write(tmp_path / "version_0", f"{header}0,5.0,\n2,4.0,9.0\n4,3.0,\n", log="", config=None)
    second = write(tmp_path / "version_1", f"{header}3,2.5,\n5,2.0,\n", log="", config=None)
    checkpoint = first / "checkpoints" / "last.ckpt"
    (second / "environment.yaml").write_text(f"resumed_from: {checkpoint}\n")
    found = read(second).series
    assert (found["train/loss"].steps.tolist(), found["train/loss"].values.tolist()) == ([0, 2, 3, 5], [5, 4, 2.5, 2])
    assert found["val/loss"].steps.tolist() == [2]
    shutil.rmtree(first)
    assert read(second).series["train/loss"].steps.tolist() == [3, 5]


def test_of_a_step_logged_twice_the_last_value_counts():
    series = runs.make_series([3, 1, 3], [1.0, 2.0, 4.0])
    assert series.steps.tolist() == [1, 3]
    assert series.values.tolist() == [2.0, 4.0]


@pytest.mark.parametrize(
    ("max_steps", "progress", "expected"),
    [
        (60, [(0, 0.0), (9, 0.15)], 60),
        (60, [(9, 0.3)], 30),  # an epoch ended the run before max_steps
        (-1, [(9, 0.15)], 60),
        (75_000, [(9, 0.0), (2500, 0.033)], 75_000),  # the log rounds progress
        (None, [], None),
        (20, [], 20),
    ],
)
def test_horizon_is_the_configured_one_where_the_log_agrees(max_steps, progress, expected):
    assert run_files.horizon_of({"trainer": {"max_steps": max_steps}}, progress) == expected


def test_names_tell_runs_apart_without_the_folder_they_share(tmp_path):
    found = runs.read_runs([write(tmp_path / side / "lightning_logs" / "version_0") for side in ("a", "b")])
    assert [run.name for run in found] == ["a/version_0", "b/version_0"]


def test_summary_has_the_last_values_and_the_lowest_kl(folder):
    rows = {row.label: row.cells[0].text for row in tables.summary([read(folder)], comparable=True)}
    assert rows["Steps"] == "6 / 6"
    assert rows["KL to the teacher"] == "1.5000"
    assert rows["lowest"] == "1.2500"
    assert rows["Top-1 agreement"] == "0.6250"
    assert rows["Student perplexity"] == "48.0000"
    assert rows["student / teacher"] == "3.0000"
    assert rows["Tokens per second"] == "200.0000"
    assert float(rows["validation / training"]) == pytest.approx(1.75 / 1.5, abs=1e-4)


def test_best_of_a_row_is_marked_only_where_runs_compare(tmp_path, folder):
    better = write(tmp_path / "better", METRICS.replace(",1.5,1.75,", ",0.5,1.75,"))
    rows = tables.summary(runs.read_runs([folder, better]), comparable=True)
    assert [cell.best for cell in rows[1].cells] == [False, True]
    other = write(tmp_path / "other", config=CONFIG | {"data": {"dataset": "b.txt", "per_device_batch_size": 8}})
    html = page(folder, other)
    assert "These runs differ in data.dataset: their figures do not compare." in html
    assert "(best)" not in html
    assert ["data.per_device_batch_size", "1", "8"] in Reader(html).rows
    assert ["model.teacher", "big", "big"] not in Reader(html).rows


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.24810602, "2.2481"), (7.96e-6, "7.960e-06"), (0.0, "0.0000"), (1934567.8, "1,934,568"), (math.nan, "nan")],
)
def test_numbers_have_the_digits_of_the_log(value, text):
    assert tables.number(value) == text


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


def test_teachers_that_differ_have_lines_of_their_own(tmp_path, folder):
    other = write(tmp_path / "other", METRICS.replace(",16.0,", ",20.0,"))
    labels = [line.label for line in sections.outcome(runs.read_runs([folder, other]))[1].lines]
    assert labels == ["version_0", "other", "teacher of version_0", "teacher of other"]
    same = write(tmp_path / "same")
    assert [line.label for line in sections.outcome(runs.read_runs([folder, same]))[1].lines][2:] == ["teacher"]


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


def test_colours_are_the_pages_and_ids_its_own(folder):
    html = page(folder)
    reader = Reader(html)
    assert len(reader.ids) == len(set(reader.ids))
    drawings = "".join(re.findall(r'<div class="plot".*?</div>', html, re.DOTALL))
    assert re.findall(r"#[0-9a-f]{6}", drawings) == []
    assert set(re.findall(r"url\(#([\w-]+)\)", html)) | set(re.findall(r'href="#([\w-]+)"', html)) <= set(reader.ids)


def test_the_page_asks_for_nothing_and_every_chart_has_label_and_table(folder):
    html = page(folder)
    reader = Reader(html)
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?\s*(https?:)?//", html)
    assert "default-src 'none'" in html
    plots = [attributes for tag, attributes in reader.elements if attributes.get("class") == "plot"]
    figures = [attributes for tag, attributes in reader.elements if tag == "figure"]
    assert len(plots) == len(figures) >= 8
    for attributes in plots:
        assert attributes["tabindex"] == "0"
        assert {attributes["aria-labelledby"], attributes["aria-describedby"]} <= set(reader.ids)
    assert html.count("<details>") == len(figures) + 1  # and the configuration
    assert ["step", "val/student_perplexity", "teacher"] in reader.rows
    assert ["5", "48.0000", "16.0000"] in reader.rows
    assert ("a", {"class": "skip", "href": "#outcome"}) in reader.elements


def test_names_from_outside_are_text(tmp_path):
    metrics = METRICS.replace("train/tokens_per_s", "routing/<b>&").replace("curriculum/lm", 'curriculum/"lm')
    html = page(write(tmp_path / "<i>run", metrics, config=CONFIG | {"seed_everything": "</pre><script>"}))
    assert "<b>" not in html
    assert "<i>" not in html
    assert "routing/&lt;b&gt;&amp;" in html
    assert html.count("<script>") == 1


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ({"metrics": None}, "metrics.csv is not there"),
        ({"log": None}, "training.log is not there"),
        ({"config": None}, "config.yaml is not there"),
        ({"metrics": None, "config": None}, "No validation was logged."),
        ({"metrics": None, "log": None}, "no curriculum and no component was logged"),
        ({"metrics": "step\n", "log": ""}, "metrics.csv holds no values yet."),
    ],
)
def test_a_missing_piece_is_a_sentence(tmp_path, missing, sentence):
    html = page(write(tmp_path / "run", **missing))
    assert sentence in html
    assert "environment.yaml is not there" in html
    assert "No learning rate was logged" in html


def test_config_that_is_no_yaml_is_shown_and_told(folder):
    (folder / "config.yaml").write_text("trainer: [\n")
    html = page(folder)
    assert "config.yaml is not readable YAML." in html
    assert "trainer: [" in html


def test_environment_of_the_run_is_shown(folder):
    (folder / "environment.yaml").write_text("torch: 2.13.0\ndevice: 2 CPU cores\n")
    html = page(folder)
    assert ["device", "2 CPU cores"] in Reader(html).rows
    assert "environment.yaml is not there" not in html


def test_refusals_name_value_and_remedy(tmp_path, folder, monkeypatch):
    with pytest.raises(UserError, match=r"RUN: .*nowhere is no folder: give a run's"):
        report([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"RUN: .*version_0 is given twice"):
        report([folder, folder / ".." / "version_0"])
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match=r"RUN: .*void has no metrics.csv, training.log, config.yaml"):
        report([tmp_path / "void"])
    with pytest.raises(UserError, match=r"--out: .*x.html cannot be written \(No such file"):
        report([folder], tmp_path / "no" / "x.html")
    with pytest.raises(UserError, match="see distill report --help"):
        main([])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        UserError, match=r"matplotlib is not installed: pip install 'student-aware-distillation\[report"
    ):
        report([folder])
    assert not (folder / "report.html").exists()


def test_command_writes_where_it_is_told_and_needs_no_torch(folder, tmp_path):
    script = "import sys; from distill.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    out = tmp_path / "out.html"
    arguments = [sys.executable, "-c", script, "report", str(folder), "--out", str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"Report: {out}\n", "")
    assert out.stat().st_size < 1_000_000


def test_everything_the_page_needs_is_packaged():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    files = (ROOT / "src/distill/analysis/report").iterdir()
    needed = [path.name for path in files if path.is_file() and path.suffix != ".py"]
    assert sorted(needed) == ["page.css", "page.html", "page.js"]
    assert all(any(fnmatch(name, pattern) for pattern in patterns["distill.analysis.report"]) for name in needed)


@pytest.fixture
def real(distill, config) -> Path:
    """A real run with all routing losses, gradients of components and several validations."""
    config["trainer"] |= {"max_steps": 12, "val_check_interval": 4, "num_sanity_val_steps": -1}
    config["gradients"] = {"every_n_steps": 2}
    return Path(distill("fit", config).trainer.log_dir)


def test_report_of_a_real_run_has_every_section_and_its_figures(real):
    assert main([str(real)]) == 0
    html = (real / "report.html").read_text()
    titles = re.findall(r'<span class="name"[^>]*>(.*?)</span>', html)
    assert titles == [
        "KL to the teacher",
        "Perplexity",
        "Agreement",
        "Training and validation loss",
        "Negative log-likelihood",
        "Entropy of the prediction",
        "Calibration error",
        "Curriculum",
        "Scaled components, training",
        "Raw components, training",
        "Temperature and experts",
        "Scaled components, validation",
        "Raw components, validation",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Memory",
        "Gradient norms of components",
        "Gradient cosines of components",
        "Share of the most used expert",
        "Gate probe",
        "Entropy of the gates",
    ]
    sums = [float(text) for text in re.findall(r"add up to the total within (\S+)\.<", html)]
    assert len(sums) == 2
    assert sums[0] < 1e-6  # training, exact
    assert sums[1] < 6 * 1e-4  # validation, from a log of four decimals
    last = list(csv.DictReader(io.StringIO((real / "metrics.csv").read_text())))[-1]
    rows = Reader(html).rows
    for label, metric in (("KL to the teacher", "val/kl_div_T1"), ("Top-1 agreement", "val/top1_agreement")):
        assert [f"{label} {metric}", tables.number(float(last[metric]))] in rows


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
def test_browser_shows_it_without_network_or_complaint_and_by_keyboard(real, tmp_path):
    second = tmp_path / "second"
    shutil.copytree(real, second)
    path = report([real, second])
    seen: dict = {}

    async def visit(view: Page) -> None:
        await view.show(1280, "light")
        await view.open(path)
        for width, scheme in ((1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")):
            await view.show(width, scheme)
            await asyncio.sleep(0.1)
            picture = tmp_path / f"{width}-{scheme}.png"
            await view.picture(picture)
            look = "[document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor,"
            look += "Math.min(...[...document.querySelectorAll('.plot')].map(p => p.getBoundingClientRect().width))"
            seen[width, scheme] = [*await view.run(f"{look}]"), picture.stat().st_size]
        reached = []
        focus = "document.activeElement.className + '|' + document.activeElement.getAttribute('role') + '|'"
        focus += "+ (document.activeElement.closest('figure') || {}).id + '|'"
        focus += "+ getComputedStyle(document.activeElement).outlineStyle"
        for _ in range(400):
            await view.press("Tab", 9)
            reached.append(await view.run(focus))
            if len(reached) > 1 and reached[-1] == reached[0]:
                break
        seen["tab"] = reached
        seen["figures"] = await view.run("[...document.querySelectorAll('figure')].map(f => f.id)")
        await view.run("document.querySelector('.plot').focus()")
        spoken = "document.querySelector('.plot').getAttribute('aria-valuetext')"
        for key, code in (("Home", 36), ("ArrowRight", 39), ("End", 35)):
            await view.press(key, code)
            seen[key] = await view.run(spoken)
        seen["requests"], seen["complaints"] = view.requests, view.complaints

    browse(tmp_path, visit)
    assert seen["requests"] == [path.as_uri()]
    assert seen["complaints"] == []
    assert seen[1280, "light"][1] == seen[400, "light"][1] == "rgb(255, 255, 255)"
    assert seen[1280, "dark"][1] == seen[400, "dark"][1] == "rgb(20, 23, 27)"
    for (width, _), (scroll, _, narrowest, size) in ((k, v) for k, v in seen.items() if isinstance(k, tuple)):
        assert scroll == width  # nothing sticks out to the side
        assert narrowest > 340  # at which 11 units of the drawing are 9 pixels or more
        assert size > 50_000
    assert seen["tab"][0].startswith("skip|")
    plots = [stop.split("|") for stop in seen["tab"] if stop.startswith("plot|")]
    assert [stop[2] for stop in plots] == seen["figures"]
    assert {(stop[1], stop[3]) for stop in plots} == {("slider", "solid")}
    values = runs.read_run(real, "run").series["val/kl_div_T1"]
    for key, index in (("Home", 0), ("ArrowRight", 1), ("End", -1)):
        assert seen[key].startswith(f"step {values.steps[index]}: ")
        assert seen[key].count(tables.number(float(values.values[index]))) == 2, json.dumps(seen[key])
    assert path.stat().st_size < 5_000_000

"""The page: what it holds and asks for, what it says of missing pieces, and what a browser makes of it."""

import asyncio
import csv
import io
import json
import math
import re
import shutil
from pathlib import Path

import pytest

from distill.analysis.report import quality, runs, tables
from distill.commands.report import main, report
from helpers.browser import CHROMIUM, Page, browse
from helpers.written_run import CONFIG, METRICS, Reader, page, write


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


def test_how_the_student_was_made_stands_among_the_facts(folder, tmp_path):
    assert "fit before the run" not in page(folder)
    cut = {key: value for key, value in CONFIG["model"].items() if not key.startswith("student")}
    cut |= {"student_layers": 2, "student_intermediate_size": 24}
    run = write(tmp_path / "cut", METRICS, config=CONFIG | {"model": cut})
    layers = [{"layer": 0, "after": 0.25}, {"layer": 1, "after": 0.5}]
    (run / "student_fit.json").write_text(json.dumps({"seconds": 54.2, "tokens": 16180, "layers": layers}))
    html = page(run)
    assert "2 of the teacher&#39;s layers, FFNs of 24 of its neurons" in html
    assert "54 s on 16,180 tokens; unexplained, layer by layer: 0.250, 0.500" in html


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
        "Acceptance",
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


def test_charts_of_a_real_run_begin_with_what_was_measured_before_the_first_step(real):
    run = runs.read_run(real, "run")
    for chart in quality.outcome([run])[:3]:
        assert {line.x.tolist()[0] for line in chart.lines} == {0}, chart.title
        assert chart.lines[0].x.tolist() == [0, 3, 7, 11]
    start = {metric: float(series.values[0]) for metric, series in run.series.items() if metric.startswith("val/")}
    assert start["val/student_perplexity"] == pytest.approx(math.exp(start["val/student_nll"]))
    # The log's own line about that validation: next-token cross-entropy of the same tokens, to four decimals.
    said = next(block for block in run.files.log.of("Eval") if block.step == 0).components["lm_loss"].raw
    assert start["val/student_nll"] == pytest.approx(said.value, abs=6e-5)
    assert start["val/kl_div_T1"] > run.series["val/kl_div_T1"].values[1]


LONG = ("val/{}/kl_div_T1", "val/{}/student_perplexity", "tasks/{}/acc")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
def test_browser_shows_it_without_network_or_complaint_and_by_keyboard(real, tmp_path):
    second = tmp_path / "second"
    shutil.copytree(real, second)
    long = (
        "conversations_of_customers_with_the_support_team." * 2
    )  # of a set and a task, which leave the page its width
    with (second / "metrics.csv").open() as file:
        logged = [row | {name.format(long): row["val/kl_div_T1"] for name in LONG} for row in csv.DictReader(file)]
    with (second / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(logged[0]))
        writer.writeheader()
        writer.writerows(logged)
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

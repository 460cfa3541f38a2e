"""What a falling KL does not show: other validation sets, and tasks."""

import csv

import pytest

from distill.commands.diagnose import diagnose
from helpers.diagnosis import names

STEPS = (0, 100, 200, 300, 400)


@pytest.fixture
def judged(tmp_path):
    """Judges a run of 400 steps by columns of its metrics.csv, one value a validation; '' = not measured there."""

    def call(config="", **columns):
        columns = {name.replace("__", "/"): values for name, values in columns.items()}
        with (tmp_path / "metrics.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["step", *columns], *zip(STEPS, *columns.values(), strict=True)])
        (tmp_path / "config.yaml").write_text(f"trainer: {{max_steps: 401}}\n{config}")
        return diagnose(str(tmp_path))

    return call


NARROW = (0.52, 0.3, 0.15, 0.09, 0.06)


def test_kl_that_falls_on_one_set_and_rises_on_another(judged):
    diagnosis = judged(val__kl_div_T1=NARROW, val__wiki__kl_div_T1=(0.6, 0.5, 0.55, 0.7, 0.83))
    assert names(diagnosis) == ["validation sets disagree"]
    (found,) = diagnosis.findings
    assert found.title == (
        "The student gets better on one validation set and worse on another: from step 100 to 400 "
        "val/wiki/kl_div_T1 rises from 0.5000 to 0.8300, while val/kl_div_T1 falls from 0.3000 to 0.0600."
    )
    assert found.evidence == [
        "metrics.csv line 3, step 100: val/wiki/kl_div_T1 0.5",
        "metrics.csv line 6, step 400: val/wiki/kl_div_T1 0.83",
        "metrics.csv line 3, step 100: val/kl_div_T1 0.3",
        "metrics.csv line 6, step 400: val/kl_div_T1 0.06",
    ]
    assert "checkpoint.monitor: val/wiki/kl_div_T1" in found.fix
    assert not any("kl_div_T1" in sentence for sentence in diagnosis.healthy)


def test_the_set_that_chooses_already_is_not_recommended(judged):
    monitor = "checkpoint: {monitor: val/wiki/kl_div_T1}\n"
    found = judged(monitor, val__kl_div_T1=NARROW, val__wiki__kl_div_T1=(0.6, 0.5, 0.55, 0.7, 0.83)).findings[0]
    assert "keep the checkpoint that val/wiki/kl_div_T1 chose, near step 100" in found.fix


def test_each_set_that_rises_is_told_and_bits_stand_in_across_tokenizers(judged):
    wiki, chat = (1.1, 1.0, 1.2, 1.3, 1.4), ("", 0.9, "", 0.95, 1.0)
    diagnosis = judged(val__bits_per_byte=NARROW, val__wiki__bits_per_byte=wiki, val__chat__bits_per_byte=chat)
    assert names(diagnosis) == ["validation sets disagree"] * 2
    assert "from step 100 to 400 val/chat/bits_per_byte rises from 0.9000" in diagnosis.findings[1].title


@pytest.mark.parametrize(
    "other",
    [
        (0.6, 0.55, 0.54, 0.53, 0.53),
        (0.6, 0.55, 0.54, 0.53, 0.5353),  # wavers by one percent
        NARROW,  # the first set under its own name
    ],
)
def test_sets_that_fall_together_are_in_order(judged, other):
    diagnosis = judged(val__kl_div_T1=NARROW, val__wiki__kl_div_T1=other)
    assert names(diagnosis) == []
    assert "val/kl_div_T1 went from 0.5200 (step 0) to 0.0600." in diagnosis.healthy
    assert f"val/wiki/kl_div_T1 went from {other[0]:.4f} (step 0) to {other[-1]:.4f}." in diagnosis.healthy


def test_sets_that_rise_together_do_not_disagree(judged):
    diagnosis = judged(val__kl_div_T1=(0.3, 0.2, 0.22, 0.25, 0.28), val__wiki__kl_div_T1=(0.6, 0.5, 0.55, 0.7, 0.83))
    assert names(diagnosis) == []


@pytest.mark.parametrize("task", ["tasks__arc_easy__acc", "tasks__gsm8k__exact_match,strict-match"])
def test_a_score_that_falls_while_kl_falls(judged, task):
    diagnosis = judged(val__kl_div_T1=NARROW, **{task: ("", 0.48, "", 0.4, 0.25)})
    assert names(diagnosis) == ["task score falls"]
    name = task.replace("__", "/")
    title = f"from step 100 to 400 {name} falls from 0.4800 to 0.2500, and val/kl_div_T1 from 0.3000 to 0.0600."
    assert diagnosis.findings[0].title.endswith(title)
    assert f"choose the checkpoint by {name}" in diagnosis.findings[0].fix


@pytest.mark.parametrize(
    ("limit", "error", "found"),
    [
        (None, None, True),  # more than 0.02
        (100, None, False),  # two standard errors of 100 questions are 0.1
        (10_000, None, True),
        (10_000, 0.05, False),  # what was logged counts
        (100, 0.01, True),
    ],
)
def test_a_score_may_waver_by_its_error(judged, limit, error, found):
    config = f"harness: {{tasks: [t], limit: {limit}}}\n" if limit else ""
    columns = {"tasks__t__acc": (0.5, 0.5, 0.5, 0.48, 0.45)}
    if error is not None:
        columns["tasks__t__acc_stderr"] = (error,) * 5
    assert ("task score falls" in names(judged(config, val__kl_div_T1=NARROW, **columns))) == found


def test_a_score_that_falls_with_a_rising_kl_and_one_where_less_is_better_are_other_matters(judged):
    rising, falling = (0.1, 0.11, 0.12, 0.12, 0.13), (0.9, 0.8, 0.7, 0.6, 0.5)
    assert names(judged(val__kl_div_T1=rising, tasks__t__acc=falling)) == []
    assert names(judged(val__kl_div_T1=NARROW, tasks__t__perplexity=falling)) == []
